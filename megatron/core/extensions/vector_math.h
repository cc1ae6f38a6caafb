// Arithmetic for loops that the compiler turns into vector instructions: bf16 as it lies in memory, the exponential.
//
// Everything here is branch-free and inline, so that a plain loop over it vectorises at whatever width the processor
// has (see MULTIVERSIONED). Arithmetic is fp32 for bf16 data too; results are rounded once, when they are stored.
#pragma once

#include <cstdint>
#include <cstring>

// A function is compiled for several instruction sets and the best one is chosen when the library is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define MULTIVERSIONED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MULTIVERSIONED
#endif

namespace megatron {

struct bfloat16 {
    std::uint16_t bits;
};

inline float bits_to_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

inline std::uint32_t float_to_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

inline float load(const float* address) { return *address; }
inline float load(const bfloat16* address) { return bits_to_float(static_cast<std::uint32_t>(address->bits) << 16); }

inline void store(float* address, float value) { *address = value; }

// The nearest bf16, ties to even, in the upper half of a word; a NaN stays one.
inline std::uint32_t rounded_bits(float value) {
    const std::uint32_t bits = float_to_bits(value);
    return value != value ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
}

inline void store(bfloat16* address, float value) {
    address->bits = static_cast<std::uint16_t>(rounded_bits(value) >> 16);
}

// 2^n p of exp(x), in two factors: n, the nearest integer to x / ln(2), is in the lowest bits of `shifted`, increased by
// an integer `bias`; the other, p, is between sqrt(1/2) and sqrt(2), or NaN if x is.
struct Exponential {
    float shifted, p;
};

inline Exponential exponential_factors(float x, float bias) {
    constexpr float log2_e = 1.44269504088896341f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    const float round_shift = 12582912.0f + bias;  // 1.5 * 2^23: adding and subtracting it rounds to an integer
    const float shifted = x * log2_e + round_shift;
    const float n = shifted - round_shift;
    const float r = (x - n * ln2_high) - n * ln2_low;
    // Taylor series of exp(r), |r| <= ln(2) / 2, coefficients economised (Cephes, Moshier).
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return {shifted, p * r * r + r + 1.0f};
}

// exp(x) for -87.3 <= x <= 88.72, to about 2 units in the last place; a NaN may come out as anything.
inline float exponential_in_range(float x) {
    const Exponential factors = exponential_factors(x, 0.0f);
    // n is added to the exponent of p. That stays in its range: p < 1 when n = 128 and p > 1 when n = -126.
    return bits_to_float(float_to_bits(factors.p) + (float_to_bits(factors.shifted) << 23));
}

// exp(x); 0 below -87.3, infinity above 88.72, NaN for NaN.
inline float exponential(float x) {
    const float value = exponential_in_range(x);
    const float bounded = x < -87.3f ? 0.0f : (x > 88.72f ? bits_to_float(0x7f800000u) : value);
    return x != x ? x : bounded;
}

// The same for x <= 0 or NaN; 0 below -87.7.
inline float exponential_of_negative(float x) {
    const Exponential factors = exponential_factors(x < -88.0f ? -88.0f : x, 127.0f);
    // A power of two by its exponent, which is 0, like that power, when n = -127; what a NaN makes of it does not matter.
    return factors.p * bits_to_float(float_to_bits(factors.shifted) << 23);
}

}  // namespace megatron
