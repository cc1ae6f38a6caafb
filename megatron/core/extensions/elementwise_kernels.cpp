// Elementwise operations of the model for CPUs; called through cpu_elementwise.py, which says what they compute.
//
// Tensors are contiguous and given by their addresses. Data are fp32 or bf16; arithmetic is fp32 and
// is rounded once, when a result is stored. Threads divide rows or fixed chunks, and no sum depends on how many they are.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernel_arguments.h"
#include "parallel.h"
#include "random_bits.h"
#include "vector_math.h"

namespace py = pybind11;

namespace {

using megatron::at;
using megatron::bfloat16;
using megatron::exponential;
using megatron::exponential_in_range;
using megatron::load;
using megatron::parallel_for;
using megatron::random_bits;
using megatron::require;
using megatron::rounded_bits;
using megatron::store;
using megatron::with_type;

// ---- Head ----

// Logarithm of the sum of exponentials over a row of logits, in one pass over memory: each block is read for its
// maximum and, then in cache, for its sum.
template <class T>
MULTIVERSIONED float log_sum_exp(const T* __restrict__ logits, std::int64_t words) {
    constexpr std::int64_t block_size = 2048;
    constexpr float infinity = std::numeric_limits<float>::infinity();
    float maximum = -infinity, reference = 0.0f, sum = 0.0f;
    for (std::int64_t start = 0; start < words; start += block_size) {
        const T* block = logits + start;
        const std::int64_t size = std::min(block_size, words - start);
        float block_maximum = -infinity;
#pragma omp simd reduction(max : block_maximum)
        for (std::int64_t i = 0; i < size; ++i) block_maximum = std::max(block_maximum, load(block + i));
        if (block_maximum > maximum) {
            sum *= std::exp(maximum - block_maximum);
            maximum = block_maximum;
            reference = maximum < infinity ? maximum : 0.0f;
        }
        float block_sum = 0.0f;
#pragma omp simd reduction(+ : block_sum)
        for (std::int64_t i = 0; i < size; ++i) block_sum += exponential(load(block + i) - reference);
        sum += block_sum;
    }
    return std::log(sum) + reference;
}

template <class T>
MULTIVERSIONED void row_gradient(
    T* __restrict__ logits, std::int64_t words, std::int64_t label, float log_z, float label_scale, float softmax_scale) {
    const bool here = label >= 0 && label < words;
    const float label_logit = here ? load(logits + label) : 0.0f;
    for (std::int64_t i = 0; i < words; ++i) {
        store(logits + i, exponential(load(logits + i) - log_z) * softmax_scale);
    }
    if (here) store(logits + label, exponential(label_logit - log_z) * softmax_scale - label_scale);
}

void softmax_statistics(std::uintptr_t logits, const std::string& dtype, std::int64_t rows, std::int64_t words,
                        std::uintptr_t labels, std::uintptr_t log_z, std::uintptr_t label_logit, int threads) {
    require(rows >= 0 && words > 0 && threads > 0, "sizes must be positive");
    const auto* label = at<const std::int64_t>(labels);
    auto* z_out = at<float>(log_z);
    auto* label_out = at<float>(label_logit);
    py::gil_scoped_release release;
    with_type(dtype, [&](auto type) {
        const auto* x = at<const decltype(type)>(logits);
        parallel_for(rows, rows * words, threads, [=](std::int64_t begin, std::int64_t end) {
            for (std::int64_t r = begin; r < end; ++r) {
                const auto* row = x + r * words;
                z_out[r] = log_sum_exp(row, words);
                label_out[r] = label[r] >= 0 && label[r] < words ? load(row + label[r]) : 0.0f;
            }
        });
    });
}

void logits_gradient(std::uintptr_t logits, const std::string& dtype, std::int64_t rows, std::int64_t words,
                     std::uintptr_t labels, std::uintptr_t log_z, std::uintptr_t label_scale,
                     std::uintptr_t softmax_scale, int threads) {
    require(rows >= 0 && words > 0 && threads > 0, "sizes must be positive");
    const auto* label = at<const std::int64_t>(labels);
    const auto* z = at<const float>(log_z);
    const auto* of_label = at<const float>(label_scale);
    const auto* of_softmax = at<const float>(softmax_scale);
    py::gil_scoped_release release;
    with_type(dtype, [&](auto type) {
        auto* x = at<decltype(type)>(logits);
        parallel_for(rows, rows * words, threads, [=](std::int64_t begin, std::int64_t end) {
            for (std::int64_t r = begin; r < end; ++r) {
                row_gradient(x + r * words, words, label[r], z[r], of_label[r], of_softmax[r]);
            }
        });
    });
}

// ---- Gated activation: units lie as pairs (gate, up) ----

struct Unit {
    float gate, up;
};

inline Unit load_unit(const float* address) { return {address[0], address[1]}; }
inline void store_unit(float* address, Unit unit) {
    address[0] = unit.gate;
    address[1] = unit.up;
}

// The two bf16 of a unit are the halves of one word: taking words spares the shuffles of vectors.
#ifdef __BYTE_ORDER__
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "a unit's gate must be the lower half of its word");
#endif
inline Unit load_unit(const bfloat16* address) {
    std::uint32_t word;
    std::memcpy(&word, address, sizeof(word));
    return {megatron::bits_to_float(word << 16), megatron::bits_to_float(word & 0xffff0000u)};
}
inline void store_unit(bfloat16* address, Unit unit) {
    const std::uint32_t word = rounded_bits(unit.gate) >> 16 | (rounded_bits(unit.up) & 0xffff0000u);
    std::memcpy(address, &word, sizeof(word));
}

// An activation x * sigmoid(z(x)): value and slope. Beyond `bound` the sigmoid is 0 or 1 to fp32, and x is taken for
// -bound below it, so that nothing overflows; a NaN stays one in value and slope.
struct Activated {
    float value, slope;
};

struct Gelu {  // z = 2 sqrt(2 / pi) (x + 0.044715 x^3): with it the sigmoid is (1 + tanh(z / 2)) / 2
    static constexpr float bound = 9.5f, factor = 1.5957691216057308f, cubic = 0.044715f;
    static float argument(float x) { return factor * x * (1.0f + cubic * x * x); }
    static float slope(float x) { return factor * (1.0f + 3.0f * cubic * x * x); }
};

struct Silu {  // z = x
    static constexpr float bound = 80.0f;
    static float argument(float x) { return x; }
    static float slope(float) { return 1.0f; }
};

template <class Function>
inline Activated activated(float x) {
    const float above = x < -Function::bound ? -Function::bound : x;
    const float within = above > Function::bound ? Function::bound : above;
    const float inverse = exponential_in_range(-Function::argument(within));
    const float sigmoid = 1.0f / (1.0f + inverse);
    return {above * sigmoid, sigmoid + within * Function::slope(within) * (inverse * sigmoid * sigmoid)};
}

template <class Function, class T>
MULTIVERSIONED void gated_units(const T* __restrict__ x, T* __restrict__ y, std::int64_t units) {
    for (std::int64_t i = 0; i < units; ++i) {
        const Unit unit = load_unit(x + 2 * i);
        store(y + i, activated<Function>(unit.gate).value * unit.up);
    }
}

template <class Function, class T>
MULTIVERSIONED void gated_units_gradient(const T* __restrict__ gradient, const T* __restrict__ x,
                                         T* __restrict__ x_gradient, std::int64_t units) {
    for (std::int64_t i = 0; i < units; ++i) {
        const Unit unit = load_unit(x + 2 * i);
        const float outer = load(gradient + i);
        const Activated gate = activated<Function>(unit.gate);
        store_unit(x_gradient + 2 * i, {outer * unit.up * gate.slope, outer * gate.value});
    }
}

// Calls function(Gelu{}) or function(Silu{}).
template <class Function>
void with_activation(const std::string& name, const Function& function) {
    if (name == "gelu") {
        function(Gelu{});
    } else if (name == "silu") {
        function(Silu{});
    } else {
        throw std::invalid_argument("activation must be gelu or silu, not " + name);
    }
}

void gated(std::uintptr_t x, std::uintptr_t y, const std::string& dtype, const std::string& activation,
           std::int64_t units, int threads) {
    require(units >= 0 && threads > 0, "sizes must be positive");
    py::gil_scoped_release release;
    with_type(dtype, [&](auto type) {
        with_activation(activation, [&](auto function) {
            const auto* from = at<const decltype(type)>(x);
            auto* to = at<decltype(type)>(y);
            parallel_for(units, 4 * units, threads, [=](std::int64_t begin, std::int64_t end) {
                gated_units<decltype(function)>(from + 2 * begin, to + begin, end - begin);
            });
        });
    });
}

void gated_gradient(std::uintptr_t gradient, std::uintptr_t x, std::uintptr_t x_gradient, const std::string& dtype,
                    const std::string& activation, std::int64_t units, int threads) {
    require(units >= 0 && threads > 0, "sizes must be positive");
    py::gil_scoped_release release;
    with_type(dtype, [&](auto type) {
        with_activation(activation, [&](auto function) {
            const auto* outer = at<const decltype(type)>(gradient);
            const auto* from = at<const decltype(type)>(x);
            auto* to = at<decltype(type)>(x_gradient);
            parallel_for(units, 4 * units, threads, [=](std::int64_t begin, std::int64_t end) {
                gated_units_gradient<decltype(function)>(outer + begin, from + 2 * begin, to + 2 * begin, end - begin);
            });
        });
    });
}

// ---- Dropout, row by row: the random bits of a row are a function of the seed and the row's number ----

// y = x * (0 or scale), plus residual if `add`. One word of random bits decides an element and the one half a row on.
template <bool add, class T>
MULTIVERSIONED void drop_row(const T* __restrict__ residual, const T* __restrict__ x, T* __restrict__ y,
                             std::int64_t width, megatron::RandomKey key, megatron::DropoutRate rate) {
    const std::int64_t half = (width + 1) / 2, pairs = width / 2;
    const auto element = [=](std::int64_t i, std::uint32_t bits) __attribute__((always_inline)) {
        const float kept = load(x + i) * (bits < rate.threshold ? 0.0f : rate.scale);
        store(y + i, add ? load(residual + i) + kept : kept);
    };
    for (std::int64_t i = 0; i < pairs; ++i) {
        const std::uint32_t bits = random_bits(key, static_cast<std::uint32_t>(i));
        element(i, bits & 0xffffu);
        element(i + half, bits >> 16);
    }
    if (half > pairs) element(pairs, random_bits(key, static_cast<std::uint32_t>(pairs)) & 0xffffu);
}

void dropout(std::uintptr_t residual, std::uintptr_t x, std::uintptr_t y, const std::string& dtype, std::int64_t rows,
             std::int64_t width, double probability, std::uintptr_t seed, int threads) {
    require(rows >= 0 && width >= 0 && threads > 0, "sizes must be positive");
    require(probability >= 0.0 && probability < 1.0, "a probability of dropout is in [0, 1)");
    const std::uint64_t start = *at<const std::uint64_t>(seed);
    const megatron::DropoutRate rate = megatron::dropout_rate(probability);
    py::gil_scoped_release release;
    with_type(dtype, [&](auto type) {
        const auto* add = at<const decltype(type)>(residual);
        const auto* from = at<const decltype(type)>(x);
        auto* to = at<decltype(type)>(y);
        parallel_for(rows, 2 * rows * width, threads, [=](std::int64_t begin, std::int64_t end) {
            for (std::int64_t r = begin; r < end; ++r) {
                const std::int64_t offset = r * width;
                const megatron::RandomKey key = megatron::random_key(start, static_cast<std::uint64_t>(r));
                if (add) {
                    drop_row<true>(add + offset, from + offset, to + offset, width, key, rate);
                } else {
                    drop_row<false>(from, from + offset, to + offset, width, key, rate);
                }
            }
        });
    });
}

// ---- Root-mean-square normalisation ----

// 1 / sqrt(mean(x^2) + epsilon) of a row.
inline float reciprocal_root(float sum_of_squares, std::int64_t width, float epsilon) {
    return 1.0f / std::sqrt(sum_of_squares / static_cast<float>(width) + epsilon);
}

template <class T, class Out>
MULTIVERSIONED void norm_row(const T* __restrict__ x, const float* __restrict__ weight, Out* __restrict__ y,
                             std::int64_t width, float epsilon) {
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (std::int64_t i = 0; i < width; ++i) squares += load(x + i) * load(x + i);
    const float scale = reciprocal_root(squares, width, epsilon);
    for (std::int64_t i = 0; i < width; ++i) store(y + i, load(x + i) * scale * weight[i]);
}

template <class T>
MULTIVERSIONED void add_row(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ sum, std::int64_t width) {
    for (std::int64_t i = 0; i < width; ++i) store(sum + i, load(a + i) + load(b + i));
}

// Gradient of x, plus `more` if `add`, and of the weight, which is added to weight_gradient.
template <bool add, class T, class Out>
MULTIVERSIONED void norm_row_gradient(const T* __restrict__ more, const Out* __restrict__ gradient,
                                      const T* __restrict__ x, const float* __restrict__ weight,
                                      T* __restrict__ x_gradient, float* __restrict__ weight_gradient,
                                      std::int64_t width, float epsilon) {
    float squares = 0.0f, product = 0.0f;
#pragma omp simd reduction(+ : squares, product)
    for (std::int64_t i = 0; i < width; ++i) {
        const float value = load(x + i);
        squares += value * value;
        product += value * load(gradient + i) * weight[i];
    }
    const float scale = reciprocal_root(squares, width, epsilon);
    const float along = product * scale * scale / static_cast<float>(width);  // what is along x does not change y
    for (std::int64_t i = 0; i < width; ++i) {
        const float value = load(x + i), outer = load(gradient + i);
        const float inner = scale * (outer * weight[i] - value * along);
        weight_gradient[i] += outer * value * scale;
        store(x_gradient + i, add ? load(more + i) + inner : inner);
    }
}

// y = norm(sum) * weight, where sum = residual + branch, dropped at random with a seed; or norm(sum) as it is given.
void rms_norm(std::uintptr_t residual, std::uintptr_t branch, std::uintptr_t sum, std::uintptr_t weight,
              std::uintptr_t y, const std::string& dtype, const std::string& out_dtype, std::int64_t rows,
              std::int64_t width, double epsilon, double probability, std::uintptr_t seed, int threads) {
    require(rows >= 0 && width > 0 && threads > 0, "sizes must be positive");
    require(probability >= 0.0 && probability < 1.0, "a probability of dropout is in [0, 1)");
    const std::uint64_t start = seed ? *at<const std::uint64_t>(seed) : 0;
    const megatron::DropoutRate rate = megatron::dropout_rate(probability);
    py::gil_scoped_release release;
    with_type(dtype, [&](auto type) {
        with_type(out_dtype, [&](auto out_type) {
            const auto* first = at<const decltype(type)>(residual);
            const auto* second = at<const decltype(type)>(branch);
            auto* x = at<decltype(type)>(sum);
            const auto* w = at<const float>(weight);
            auto* to = at<decltype(out_type)>(y);
            parallel_for(rows, rows * width, threads, [=](std::int64_t begin, std::int64_t end) {
                for (std::int64_t r = begin; r < end; ++r) {
                    const std::int64_t offset = r * width;
                    if (seed) {
                        const megatron::RandomKey key = megatron::random_key(start, static_cast<std::uint64_t>(r));
                        drop_row<true>(first + offset, second + offset, x + offset, width, key, rate);
                    } else if (first) {
                        add_row(first + offset, second + offset, x + offset, width);
                    }
                    norm_row(x + offset, w, to + offset, width, static_cast<float>(epsilon));
                }
            });
        });
    });
}

// Gradients of a norm's input x and weight; that of x is added to `more`, if given. Rows are summed in fixed blocks
// and the blocks in their order: the weight's gradient does not depend on the number of threads.
void rms_norm_gradient(std::uintptr_t more, std::uintptr_t gradient, std::uintptr_t x, std::uintptr_t weight,
                       std::uintptr_t x_gradient, std::uintptr_t weight_gradient, const std::string& dtype,
                       const std::string& out_dtype, std::int64_t rows, std::int64_t width, double epsilon,
                       int threads) {
    require(rows >= 0 && width > 0 && threads > 0, "sizes must be positive");
    const std::int64_t blocks = std::min<std::int64_t>(64, (rows + 15) / 16);
    std::vector<float> partial(static_cast<std::size_t>(blocks * width));
    float* sums = partial.data();
    const auto* w = at<const float>(weight);
    py::gil_scoped_release release;
    with_type(dtype, [&](auto type) {
        with_type(out_dtype, [&](auto out_type) {
            const auto* also = at<const decltype(type)>(more);
            const auto* outer = at<const decltype(out_type)>(gradient);
            const auto* from = at<const decltype(type)>(x);
            auto* to = at<decltype(type)>(x_gradient);
            const auto eps = static_cast<float>(epsilon);
            parallel_for(blocks, rows * width, threads, [=](std::int64_t begin, std::int64_t end) {
                for (std::int64_t block = begin; block < end; ++block) {
                    float* sum = sums + block * width;
                    for (std::int64_t r = block * rows / blocks; r < (block + 1) * rows / blocks; ++r) {
                        const std::int64_t i = r * width;
                        if (also) {
                            norm_row_gradient<true>(also + i, outer + i, from + i, w, to + i, sum, width, eps);
                        } else {
                            norm_row_gradient<false>(from, outer + i, from + i, w, to + i, sum, width, eps);
                        }
                    }
                }
            });
        });
    });
    auto* total = at<float>(weight_gradient);
    std::fill(total, total + width, 0.0f);
    for (std::int64_t block = 0; block < blocks; ++block) {
        for (std::int64_t i = 0; i < width; ++i) total[i] += sums[block * width + i];
    }
}

// ---- Gradient norm ----

constexpr std::int64_t SQUARES_BLOCK = 1 << 12;

template <class T>
MULTIVERSIONED float block_of_squares(const T* values, std::int64_t size) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < size; ++i) {
        const float value = load(values + i);
        sum += value * value;
    }
    return sum;
}

// Blocks of a fixed size in fp32, added up in their order in fp64: the same bits for any number of threads.
double sum_of_squares(std::uintptr_t address, const std::string& dtype, std::int64_t size, int threads) {
    require(size >= 0 && threads > 0, "sizes must be positive");
    const std::int64_t blocks = (size + SQUARES_BLOCK - 1) / SQUARES_BLOCK;
    std::vector<float> partial(static_cast<std::size_t>(blocks));
    float* sums = partial.data();
    py::gil_scoped_release release;
    with_type(dtype, [&](auto type) {
        const auto* values = at<const decltype(type)>(address);
        parallel_for(blocks, size, threads, [=](std::int64_t begin, std::int64_t end) {
            for (std::int64_t block = begin; block < end; ++block) {
                const std::int64_t start = block * SQUARES_BLOCK;
                sums[block] = block_of_squares(values + start, std::min(SQUARES_BLOCK, size - start));
            }
        });
    });
    double total = 0.0;
    for (const float sum : partial) total += sum;
    return total;
}

}  // namespace

PYBIND11_MODULE(elementwise_kernels, module) {
    module.doc() = "Elementwise kernels for CPUs.";
    module.def("softmax_statistics", &softmax_statistics);
    module.def("logits_gradient", &logits_gradient);
    module.def("gated", &gated);
    module.def("gated_gradient", &gated_gradient);
    module.def("dropout", &dropout);
    module.def("rms_norm", &rms_norm);
    module.def("rms_norm_gradient", &rms_norm_gradient);
    module.def("sum_of_squares", &sum_of_squares);
}
