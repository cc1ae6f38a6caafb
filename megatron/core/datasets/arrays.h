// What all bindings check of the arrays that Python hands in. Wrong arguments throw std::invalid_argument (ValueError
// in Python), never assert: Python's build flags define NDEBUG.

#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace megatron {

namespace py = pybind11;

template <typename Element>
using Array = py::array_t<Element, py::array::c_style>;
using Int32Array = Array<std::int32_t>;
using Int64Array = Array<std::int64_t>;
using UInt64Array = Array<std::uint64_t>;

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

// For checks in loops, whose message would cost more to make than the check.
inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

inline void require_aligned(const py::array& array, const char* name) {
  const auto address = reinterpret_cast<std::uintptr_t>(array.data());
  require(address % static_cast<std::uintptr_t>(array.itemsize()) == 0, std::string(name) + " is not aligned");
}

// A copy: nobody can change it after it was checked.
template <typename Element>
std::vector<Element> elements(const Array<Element>& array, const char* name) {
  require_aligned(array, name);
  return {array.data(), array.data() + array.size()};
}

template <typename Element>
std::vector<Element> vector_of(const Array<Element>& array, const char* name) {
  require(array.ndim() == 1, std::string(name) + " must have one dimension");
  return elements(array, name);
}

template <typename Element>
std::vector<Element> table_of(const Array<Element>& array, py::ssize_t columns, const char* name) {
  require(array.ndim() == 2 && array.shape(1) == columns,
          std::string(name) + " must have two dimensions, and columns: " + std::to_string(columns));
  return elements(array, name);
}

}  // namespace megatron
