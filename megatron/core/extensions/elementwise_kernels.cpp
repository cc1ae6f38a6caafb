// Elementwise operations of the model for CPUs; called through cpu_elementwise.py, which says what they compute.
//
// r rows, v words. Tensors are contiguous and given by their addresses. Data are fp32 or bf16; arithmetic is fp32 and
// is rounded once, when a result is stored. Threads divide rows or fixed chunks, and no sum depends on how many they are.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"
#include "vector_math.h"

namespace py = pybind11;

namespace {

using megatron::bfloat16;
using megatron::exponential;
using megatron::load;
using megatron::parallel_for;
using megatron::store;

template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void require(bool condition, const char* message) {
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

}  // namespace

PYBIND11_MODULE(elementwise_kernels, module) {
    module.doc() = "Elementwise kernels for CPUs.";
    module.def("softmax_statistics", &softmax_statistics);
    module.def("logits_gradient", &logits_gradient);
}
