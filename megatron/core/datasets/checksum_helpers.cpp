// CRC-32 as zlib's, at the speed of memory: carry-less multiplication where the processor has it (Gopal et al. 2009,
// "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ"), eight tables elsewhere.
//
// A text is a polynomial over GF(2), a checksum its remainder modulo P. Bit 31 of a 32-bit value is the coefficient of
// x^0, so that multiplying by x shifts to the right.

#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace py = pybind11;

namespace {

constexpr std::uint32_t kModulus = 0xEDB88320;

constexpr std::uint32_t times_x(std::uint32_t value) { return value >> 1 ^ (value & 1 ? kModulus : 0); }

// table[k][b]: what byte b adds to the checksum when k more bytes follow.
using Tables = std::array<std::array<std::uint32_t, 256>, 8>;

constexpr Tables make_tables() {
  Tables tables{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t value = byte;
    for (int bit = 0; bit < 8; ++bit) value = times_x(value);
    tables[0][byte] = value;
  }
  for (std::size_t k = 1; k < 8; ++k) {
    for (std::size_t byte = 0; byte < 256; ++byte) {
      const std::uint32_t before = tables[k - 1][byte];
      tables[k][byte] = before >> 8 ^ tables[0][before & 0xFF];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

// `state` is the checksum inverted, here and below.
std::uint32_t update_by_tables(std::uint32_t state, const std::uint8_t* data, std::size_t size) {
  for (; size >= 8; data += 8, size -= 8) {
    std::uint32_t next = 0;
    for (unsigned byte = 0; byte < 4; ++byte) {
      next ^= kTables[7 - byte][(state >> 8 * byte & 0xFF) ^ data[byte]] ^ kTables[3 - byte][data[4 + byte]];
    }
    state = next;
  }
  for (; size > 0; ++data, --size) state = state >> 8 ^ kTables[0][(state ^ *data) & 0xFF];
  return state;
}

#if defined(__x86_64__)

// x^power modulo P, as a factor for 64 bits of text: the product of reflected values is one bit short of its place.
constexpr long long factor(int power) {
  std::uint32_t value = 0x80000000;
  for (int n = 0; n < power; ++n) value = times_x(value);
  return static_cast<long long>(std::uint64_t{value} << 1);
}

// `text` moved forward by the distance of `factors`, onto `next`; congruent modulo P.
__attribute__((target("pclmul"))) inline __m128i folded(__m128i text, __m128i factors, __m128i next) {
  const __m128i low = _mm_clmulepi64_si128(text, factors, 0x00);
  const __m128i high = _mm_clmulepi64_si128(text, factors, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

// Of at least 64 bytes: four lanes of 16 bytes each move forward by 64 bytes at a time.
__attribute__((target("pclmul"))) std::uint32_t update_by_multiplication(
    std::uint32_t state, const std::uint8_t* data, std::size_t size) {
  const __m128i by_512_bits = _mm_set_epi64x(factor(512 - 32), factor(512 + 32));
  const __m128i by_128_bits = _mm_set_epi64x(factor(128 - 32), factor(128 + 32));
  __m128i lanes[4];
  for (int lane = 0; lane < 4; ++lane) lanes[lane] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data) + lane);
  lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi32_si128(static_cast<int>(state)));
  data += 64, size -= 64;
  for (; size >= 64; data += 64, size -= 64) {
    for (int lane = 0; lane < 4; ++lane) {
      const __m128i next = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data) + lane);
      lanes[lane] = folded(lanes[lane], by_512_bits, next);
    }
  }
  __m128i text = lanes[0];
  for (int lane = 1; lane < 4; ++lane) text = folded(text, by_128_bits, lanes[lane]);
  std::uint8_t rest[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(rest), text);
  return update_by_tables(update_by_tables(0, rest, sizeof rest), data, size);
}

#endif

std::uint32_t update(std::uint32_t state, const std::uint8_t* data, std::size_t size, bool portable) {
#if defined(__x86_64__)
  static const bool multiplies = __builtin_cpu_supports("pclmul") != 0;
  if (multiplies && !portable && size >= 64) return update_by_multiplication(state, data, size);
#endif
  (void)portable;
  return update_by_tables(state, data, size);
}

std::uint32_t crc32(const py::buffer& data, std::uint32_t value, bool portable) {
  Py_buffer view;
  if (PyObject_GetBuffer(data.ptr(), &view, PyBUF_C_CONTIGUOUS) != 0) throw py::error_already_set();
  {
    py::gil_scoped_release release;
    value = ~update(~value, static_cast<const std::uint8_t*>(view.buf), static_cast<std::size_t>(view.len), portable);
  }
  PyBuffer_Release(&view);
  return value;
}

}  // namespace

PYBIND11_MODULE(checksum_helpers, module) {
  module.doc() = "CRC-32 as zlib's, several times as fast.";
  module.def("crc32", &crc32, py::arg("data"), py::arg("value") = 0, py::kw_only(), py::arg("portable") = false,
             "Checksum of what has the checksum `value`, followed by `data`.");
}
