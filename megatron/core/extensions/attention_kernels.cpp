// Softmax of attention scores and its derivative for CPUs; called through cpu_attention.py.
//
// Shapes: b batch, n heads, q queries, k keys, s either, d channels of a head. Scores are [b n, q, k], contiguous, fp32
// or bf16; arithmetic is fp32 and every result is rounded once. Threads divide rows (b, n, q) or items (b, n), and no
// sum depends on how many they are.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "attention_rule.h"
#include "kernel_arguments.h"
#include "parallel.h"
#include "random_bits.h"
#include "vector_math.h"

namespace py = pybind11;

namespace {

using megatron::at;
using megatron::load;
using megatron::parallel_for;
using megatron::random_bits;
using megatron::require;
using megatron::ScoreRule;
using megatron::store;
using megatron::with_type;
using std::int64_t;

constexpr int64_t vector_size = 16;  // buffers of rows are filled up to whole vectors

int64_t padded(int64_t length) { return (length + vector_size - 1) / vector_size * vector_size; }

// Biased scores of a row to `buffer`; returns their maximum, in which NaN do not count.
template <class T>
inline float biased_scores(const T* scores, const float* bias, const float* mask, float scale, int64_t visible,
                           float* buffer) {
    float maximum = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : maximum)
    for (int64_t j = 0; j < visible; ++j) {
        const float score = load(scores + j) * scale + (bias[j] + mask[j]);
        buffer[j] = score;
        maximum = score > maximum ? score : maximum;
    }
    return maximum;
}

// exp(buffer - maximum) in place, with zeros up to the next whole vector; returns the sum. NaN if one is NaN.
inline float exponentials(float* buffer, int64_t visible, float maximum) {
    const int64_t end = padded(visible);
    for (int64_t j = visible; j < end; ++j) buffer[j] = -std::numeric_limits<float>::infinity();
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < end; ++j) {
        const float value = megatron::exponential_of_negative(buffer[j] - maximum);
        buffer[j] = value;
        sum += value;
    }
    return sum;
}

// Dropout of the elements of a row, in place.
inline void drop_elements(const ScoreRule& rule, int64_t row, int64_t visible, float* __restrict__ buffer) {
    const megatron::RandomKey key = megatron::random_key(rule.seed, row);
    const std::uint32_t threshold = rule.dropout.threshold;
    const float scale = rule.dropout.scale;
    for (int64_t j = 0; j < visible; ++j)
        buffer[j] = (random_bits(key, static_cast<std::uint32_t>(j)) >> 16) < threshold ? 0.0f : buffer[j] * scale;
}

// Scores [b n q, k] of rows [begin, end) to probabilities, in place. `statistics` [b n q, 2], a row's maximum and
// 1 / sum of exponentials, are written, or read if they are `known`. `dropped`, if not null, receives the probabilities
// after dropout.
template <class T>
MULTIVERSIONED void softmax_rows(const ScoreRule& rule, T* scores, T* dropped, float* statistics, bool known,
                                 int64_t begin, int64_t end, float* buffer) {
    const int64_t keys = rule.keys;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t item = row / rule.queries, query = row % rule.queries, visible = rule.visible(query);
        T* probabilities = scores + row * keys;
        const float largest = biased_scores(probabilities, rule.bias(item, query), rule.mask(item, query), rule.scale,
                                            visible, buffer);
        const float maximum = known ? statistics[2 * row] : largest;
        const float sum = exponentials(buffer, visible, maximum);
        const float inverse = known ? statistics[2 * row + 1] : 1.0f / sum;
        statistics[2 * row] = maximum;
        statistics[2 * row + 1] = inverse;
        for (int64_t j = 0; j < visible; ++j) store(probabilities + j, buffer[j] * inverse);
        std::memset(static_cast<void*>(probabilities + visible), 0, (keys - visible) * sizeof(T));
        if (!dropped) continue;
        T* kept = dropped + row * keys;
        drop_elements(rule, row, visible, buffer);
        for (int64_t j = 0; j < visible; ++j) store(kept + j, buffer[j] * inverse);
        std::memset(static_cast<void*>(kept + visible), 0, (keys - visible) * sizeof(T));
    }
}

// Gradients of probabilities [b n, q, k] of items [begin, end) to those of scores, in place: p * (g - sum(p * g)).
// `diagonals` [b n, q + k - 1], if not null, receives an item's sums along the diagonals.
template <class T>
MULTIVERSIONED void softmax_backward_items(const ScoreRule& rule, const T* probabilities, T* gradients,
                                           float* diagonals, int64_t begin, int64_t end, float* buffer) {
    const int64_t queries = rule.queries, keys = rule.keys, length = rule.diagonals_length();
    float* sums = buffer + padded(keys);  // [q + k - 1]
    for (int64_t item = begin; item < end; ++item) {
        std::fill(sums, sums + length, 0.0f);
        for (int64_t query = 0; query < queries; ++query) {
            const int64_t row = item * queries + query, visible = rule.visible(query);
            const T* probability = probabilities + row * keys;
            T* gradient = gradients + row * keys;
            for (int64_t j = 0; j < visible; ++j) buffer[j] = load(gradient + j);
            if (rule.dropout.threshold) drop_elements(rule, row, visible, buffer);
            float mean = 0.0f;
#pragma omp simd reduction(+ : mean)
            for (int64_t j = 0; j < visible; ++j) mean += load(probability + j) * buffer[j];
            float* sum = sums + queries - 1 - query;
#pragma omp simd
            for (int64_t j = 0; j < visible; ++j) {
                const float value = load(probability + j) * (buffer[j] - mean);
                sum[j] += value;
                store(gradient + j, value * rule.scale);
            }
            std::memset(static_cast<void*>(gradient + visible), 0, (keys - visible) * sizeof(T));
        }
        if (diagonals) std::copy(sums, sums + length, diagonals + item * length);
    }
}

// Probabilities [b n q, k] of rows [begin, end) as they were after dropout.
template <class T>
MULTIVERSIONED void dropout_rows(const ScoreRule& rule, const T* probabilities, T* dropped, int64_t begin, int64_t end,
                                 float* buffer) {
    const int64_t keys = rule.keys;
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t j = 0; j < keys; ++j) buffer[j] = load(probabilities + row * keys + j);
        drop_elements(rule, row, keys, buffer);
        for (int64_t j = 0; j < keys; ++j) store(dropped + row * keys + j, buffer[j]);
    }
}

void softmax(const ScoreRule& rule, const std::string& dtype, std::uintptr_t scores, std::uintptr_t dropped,
             std::uintptr_t statistics, bool known, int threads) {
    const py::gil_scoped_release released;
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        parallel_for(rule.rows(), rule.rows() * rule.keys, threads, [&](int64_t begin, int64_t end) {
            std::vector<float> buffer(padded(rule.keys));
            softmax_rows<T>(rule, at<T>(scores), at<T>(dropped), at<float>(statistics), known, begin, end,
                            buffer.data());
        });
    });
}

void dropout(const ScoreRule& rule, const std::string& dtype, std::uintptr_t probabilities, std::uintptr_t dropped,
             int threads) {
    const py::gil_scoped_release released;
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        parallel_for(rule.rows(), rule.rows() * rule.keys, threads, [&](int64_t begin, int64_t end) {
            std::vector<float> buffer(rule.keys);
            dropout_rows<T>(rule, at<const T>(probabilities), at<T>(dropped), begin, end, buffer.data());
        });
    });
}

// `diagonals` [n, q + k - 1], if not null, receives the gradient of the bias: sums over the batch and the diagonals.
void softmax_backward(const ScoreRule& rule, const std::string& dtype, std::uintptr_t probabilities,
                      std::uintptr_t gradients, std::uintptr_t diagonals, int threads) {
    const py::gil_scoped_release released;
    const int64_t length = rule.diagonals_length();
    std::vector<float> sums(diagonals ? rule.items() * length : 0);  // [b n, q + k - 1]
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        parallel_for(rule.items(), rule.rows() * rule.keys, threads, [&](int64_t begin, int64_t end) {
            std::vector<float> buffer(padded(rule.keys) + length);
            softmax_backward_items<T>(rule, at<const T>(probabilities), at<T>(gradients),
                                      diagonals ? sums.data() : nullptr, begin, end, buffer.data());
        });
    });
    if (!diagonals) return;
    rule.sum_over_batch(sums.data(), at<float>(diagonals));
}

// Where the elements of [b, s, n, d] lie; strides in elements.
struct Layout {
    int64_t batch_stride, position_stride, head_stride, channel_stride;
};

Layout layout(const std::vector<int64_t>& strides) {
    require(strides.size() == 4, "strides must be four: batch, position, head, channel");
    return {strides[0], strides[1], strides[2], strides[3]};
}

// Positions in blocks whose columns stay in the first-level cache, for the sake of transposed layouts.
template <class T>
void copy_head(const T* source, const Layout& from, T* target, const Layout& to, int64_t positions, int64_t channels) {
    constexpr int64_t block_size = 32;
    for (int64_t start = 0; start < positions; start += block_size) {
        const int64_t size = std::min(block_size, positions - start);
        const T* first = source + start * from.position_stride;
        T* destination = target + start * to.position_stride;
        if (from.channel_stride == 1 && to.channel_stride == 1) {
            for (int64_t s = 0; s < size; ++s)
                std::memcpy(destination + s * to.position_stride, first + s * from.position_stride,
                            channels * sizeof(T));
        } else {
            for (int64_t c = 0; c < channels; ++c)
                for (int64_t s = 0; s < size; ++s)
                    destination[s * to.position_stride + c * to.channel_stride] =
                        first[s * from.position_stride + c * from.channel_stride];
        }
    }
}

void copy_heads(int element_size, std::uintptr_t source, const std::vector<int64_t>& source_strides,
                std::uintptr_t target, const std::vector<int64_t>& target_strides, int64_t batch, int64_t positions,
                int64_t heads, int64_t channels, int threads) {
    require(element_size == 2 || element_size == 4, "elements must have 2 or 4 bytes");
    require(batch >= 0 && positions >= 0 && heads >= 0 && channels >= 0, "sizes must not be negative");
    const Layout from = layout(source_strides), to = layout(target_strides);
    const py::gil_scoped_release released;
    const auto copy = [&](auto type) {
        using T = decltype(type);
        parallel_for(batch * heads, batch * heads * positions * channels, threads, [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; ++item) {
                const int64_t row = item / heads, head = item % heads;
                copy_head<T>(at<const T>(source) + row * from.batch_stride + head * from.head_stride, from,
                             at<T>(target) + row * to.batch_stride + head * to.head_stride, to, positions, channels);
            }
        });
    };
    element_size == 2 ? copy(std::uint16_t{}) : copy(std::uint32_t{});
}

}  // namespace

PYBIND11_MODULE(attention_kernels, module) {
    module.doc() = "Kernels of attention on CPUs; see attention_kernels.pyi.";
    py::class_<ScoreRule>(module, "ScoreRule")
        .def(py::init<int64_t, int64_t, int64_t, int64_t, bool, float, std::uintptr_t, std::uintptr_t, int64_t, int64_t,
                      int64_t, std::uint64_t, double>(),
             py::arg("batch"), py::arg("heads"), py::arg("queries"), py::arg("keys"), py::arg("causal"),
             py::arg("scale"), py::arg("diagonals"), py::arg("mask"), py::arg("mask_batch_stride"),
             py::arg("mask_head_stride"), py::arg("mask_query_stride"), py::arg("seed"), py::arg("dropout"));
    module.def("softmax", &softmax, py::arg("rule"), py::arg("dtype"), py::arg("scores"), py::arg("dropped"),
               py::arg("statistics"), py::arg("known"), py::arg("threads"));
    module.def("dropout", &dropout, py::arg("rule"), py::arg("dtype"), py::arg("probabilities"), py::arg("dropped"),
               py::arg("threads"));
    module.def("softmax_backward", &softmax_backward, py::arg("rule"), py::arg("dtype"), py::arg("probabilities"),
               py::arg("gradients"), py::arg("diagonals"), py::arg("threads"));
    module.def("copy_heads", &copy_heads, py::arg("element_size"), py::arg("source"), py::arg("source_strides"),
               py::arg("target"), py::arg("target_strides"), py::arg("batch"), py::arg("positions"), py::arg("heads"),
               py::arg("channels"), py::arg("threads"));
}
