// Attention on CPUs that keeps scores and probabilities in the caches; called through cpu_attention.py.
//
// As in FlashAttention (Dao et al. 2022), a block of queries meets the keys block by block, probabilities are never
// written to memory, and the backward pass computes them again from two statistics of each row. Unlike there, a block of
// queries has all its scores before the first exponential: they fit into a second-level cache, and nothing has to be
// scaled again. The gradient of a bias that depends on the distance of key and query is summed along the diagonals of
// the tiles.
//
// Shapes: b batch, n heads, q queries, k keys, s either, d channels of a head; an item is one of b n. All arithmetic is
// fp32. A thread has whole items, and no sum depends on how many threads there are.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "attention_rule.h"
#include "kernel_arguments.h"
#include "parallel.h"
#include "vector_math.h"

namespace py = pybind11;

namespace {

using megatron::at;
using megatron::require;
using megatron::ScoreRule;
using std::int64_t;

constexpr int64_t block = 64;      // queries and keys of a tile: a tile and its factors fit into a first-level cache
constexpr int64_t alignment = 16;  // channels, and the columns of products, are multiples of this
constexpr float infinity = std::numeric_limits<float>::infinity();

int64_t padded(int64_t count) { return (count + alignment - 1) / alignment * alignment; }
int64_t blocks_of(int64_t count) { return (count + block - 1) / block; }

// Strides in elements.
struct Matrix {
    const float* data;
    int64_t row, column;
};

// A tensor [b, s, n, d], or a head [s, d] of it; strides in elements, channels adjacent.
struct View {
    float* data;
    int64_t batch, position, head_stride;

    View head(const ScoreRule& rule, int64_t item) const {
        return {data + item / rule.heads * batch + item % rule.heads * head_stride, batch, position, head_stride};
    }
    float* at(int64_t s) const { return data + s * position; }
};

struct Problem {
    const ScoreRule& rule;
    int64_t channels;
    View query, key, value, context;
    float* statistics;  // [b n q, 2], a row's maximum and 1 / sum of exponentials
    // of the backward pass only
    View gradient, query_gradient, key_gradient, value_gradient;
    float* diagonals;  // [b n, q + k - 1], an item's sums of gradients along the diagonals, or null
};

// Divides memory into buffers that begin at a cache line.
struct Memory {
    float* next;
    float* take(int64_t count) {
        float* const result = next;
        next += padded(count);
        return result;
    }
};

// Upper bound of what an item needs in either direction, in floats.
int64_t memory_size(const ScoreRule& rule, int64_t channels) {
    const int64_t rows = blocks_of(rule.keys) * block;
    const int64_t shared = rows * (5 * channels + 1) + 3 * block * channels + 2 * block * block + rule.queries;
    return shared + rows * block + 16 * alignment;
}

// x86-64-v4 and -v3 by their features: not all compilers know the levels' names.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TILED_FOR_X86
#define TILED_SHUFFLES
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")
#define TILED_LANES 16
#define TILED_ROWS 6
#define TILED_VECTORS 4
namespace v4 {
#include "tiled_attention_items.h"
}
#undef TILED_LANES
#undef TILED_VECTORS
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define TILED_LANES 8
#define TILED_VECTORS 2
namespace v3 {
#include "tiled_attention_items.h"
}
#undef TILED_LANES
#undef TILED_ROWS
#undef TILED_VECTORS
#pragma GCC pop_options
#endif
#define TILED_LANES 4
#define TILED_ROWS 6
#define TILED_VECTORS 2
namespace plain {
#include "tiled_attention_items.h"
}

using Items = void (*)(const Problem&, int64_t, int64_t, float*);

// The function for the widest vectors of this processor.
Items items_function(bool backward) {
#ifdef TILED_FOR_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return backward ? v4::backward_items : v4::forward_items;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return backward ? v3::backward_items : v3::forward_items;
#endif
    return backward ? plain::backward_items : plain::forward_items;
}

// Whether the vectors of this processor are used; without them torch's products are faster.
bool available() { return items_function(false) != plain::forward_items; }

using Addresses = std::vector<std::uintptr_t>;
using Strides = std::vector<std::vector<int64_t>>;

// Views of so many tensors [b, s, n, d].
std::vector<View> views(const Addresses& addresses, const Strides& strides, std::size_t count) {
    require(addresses.size() == count && strides.size() == count, "wrong number of addresses or strides of tensors");
    std::vector<View> result;
    for (std::size_t i = 0; i < count; ++i) {
        require(strides[i].size() == 4 && strides[i][3] == 1, "strides must be four, the last of them 1");
        result.push_back({at<float>(addresses[i]), strides[i][0], strides[i][1], strides[i][2]});
    }
    return result;
}

void run(const Problem& problem, Items items, int threads) {
    const int64_t size = memory_size(problem.rule, problem.channels);
    const int64_t work = problem.rule.rows() * problem.rule.keys * problem.channels;
    megatron::parallel_for(problem.rule.items(), work, threads, [&](int64_t begin, int64_t end) {
        const std::unique_ptr<float[]> memory(new float[size + alignment]);
        void* start = memory.get();
        std::size_t space = (size + alignment) * sizeof(float);
        items(problem, begin, end, static_cast<float*>(std::align(64, size * sizeof(float), start, space)));
    });
}

void check_channels(int64_t channels) {
    require(channels > 0 && channels % alignment == 0 && channels <= 256, "channels must be a multiple of 16 up to 256");
}

void forward(const ScoreRule& rule, int64_t channels, const Addresses& addresses, const Strides& strides,
             std::uintptr_t statistics, int threads) {
    check_channels(channels);
    const std::vector<View> v = views(addresses, strides, 4);
    const Problem problem{rule, channels, v[0], v[1], v[2], v[3], at<float>(statistics), {}, {}, {}, {}, nullptr};
    const py::gil_scoped_release released;
    run(problem, items_function(false), threads);
}

// `diagonals` [n, q + k - 1], if not null, receives the gradient of the bias.
void backward(const ScoreRule& rule, int64_t channels, const Addresses& addresses, const Strides& strides,
              std::uintptr_t statistics, std::uintptr_t diagonals, int threads) {
    check_channels(channels);
    const std::vector<View> v = views(addresses, strides, 8);
    const py::gil_scoped_release released;
    std::vector<float> sums(diagonals ? rule.items() * rule.diagonals_length() : 0);  // [b n, q + k - 1]
    const Problem problem{rule, channels, v[2], v[3], v[4], v[1], at<float>(statistics), v[0], v[5],
                          v[6], v[7], diagonals ? sums.data() : nullptr};
    run(problem, items_function(true), threads);
    if (diagonals) rule.sum_over_batch(sums.data(), at<float>(diagonals));
}

}  // namespace

PYBIND11_MODULE(tiled_attention, module) {
    module.doc() = "Attention on CPUs, tile by tile; see tiled_attention.pyi.";
    py::module_::import("megatron.core.extensions.attention_kernels");  // registers ScoreRule
    module.def("available", &available);
    module.def("forward", &forward, py::arg("rule"), py::arg("channels"), py::arg("addresses"), py::arg("strides"),
               py::arg("statistics"), py::arg("threads"));
    module.def("backward", &backward, py::arg("rule"), py::arg("channels"), py::arg("addresses"), py::arg("strides"),
               py::arg("statistics"), py::arg("diagonals"), py::arg("threads"));
}
