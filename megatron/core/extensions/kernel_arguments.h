// Arguments of kernels as Python gives them: addresses as numbers, dtypes by name.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "vector_math.h"

namespace megatron {

template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Throws what becomes a ValueError.
inline void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

// Calls function(T{}) with the type that `dtype` names.
template <class Function>
void with_type(const std::string& dtype, const Function& function) {
    if (dtype == "float32") {
        function(float{});
    } else if (dtype == "bfloat16") {
        function(bfloat16{});
    } else {
        throw std::invalid_argument("dtype must be float32 or bfloat16, not " + dtype);
    }
}

}  // namespace megatron
