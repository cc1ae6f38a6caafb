// Random bits that are a function of where they are used, so that a backward pass finds those of the forward pass again.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace megatron {

// What tells one sequence of random bits from another.
struct RandomKey {
    std::uint32_t first, second;
};

// Step `stream` of SplitMix64 (Steele, Lea and Flood 2014) from `seed`: unrelated keys for all pairs of them.
inline RandomKey random_key(std::uint64_t seed, std::uint64_t stream) {
    std::uint64_t x = seed + (stream + 1) * 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    return {static_cast<std::uint32_t>(x), static_cast<std::uint32_t>(x >> 32)};
}

// 32 random bits for each index of a sequence, in plain 32-bit arithmetic, which vectorises. The hash is Wellons'
// "lowbias32" with half of the key before its first multiplication and half before its last.
inline std::uint32_t random_bits(RandomKey key, std::uint32_t index) {
    std::uint32_t x = index + key.first;
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15) ^ key.second) * 0x846ca68bu;
    return x ^ (x >> 16);
}

// Dropout by 16 random bits an element: what is below `threshold` is dropped, the rest multiplied by `scale`, which
// makes up for exactly the share that is dropped.
struct DropoutRate {
    std::uint32_t threshold;
    float scale;
};

// The nearest rate in units of 2^-16; not everything is dropped if probability < 1.
inline DropoutRate dropout_rate(double probability) {
    const double units = std::min(65535.0, std::floor(probability * 65536.0 + 0.5));
    return {static_cast<std::uint32_t>(units), static_cast<float>(65536.0 / (65536.0 - units))};
}

}  // namespace megatron
