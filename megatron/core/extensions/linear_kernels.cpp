// What linear layers on CPUs need beside torch's matrix products; called through cpu_linear.py.
//
// Matrices are contiguous bf16 and given by their addresses.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "parallel.h"
#include "vector_math.h"

namespace py = pybind11;

namespace {

using megatron::bfloat16;
using megatron::load;
using megatron::parallel_for;
using megatron::store;

constexpr std::int64_t SIDE = 8;   // of the squares that are transposed in registers
constexpr std::int64_t TILE = 64;  // whose rows on both sides stay in the first-level cache

using Words = std::uint16_t __attribute__((vector_size(2 * SIDE), aligned(2), may_alias));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Words{__VA_ARGS__})
#endif

inline Words low(Words a, Words b) { return SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
inline Words high(Words a, Words b) { return SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }

// Transposes an 8 x 8 square: three rounds in which row i is interleaved with row i + 4.
inline void transpose_square(
    const std::uint16_t* from, std::int64_t from_stride, std::uint16_t* to, std::int64_t to_stride) {
    Words a[SIDE], b[SIDE];
    for (int i = 0; i < SIDE; ++i) a[i] = *reinterpret_cast<const Words*>(from + i * from_stride);
    for (int i = 0; i < 4; ++i) b[2 * i] = low(a[i], a[i + 4]), b[2 * i + 1] = high(a[i], a[i + 4]);
    for (int i = 0; i < 4; ++i) a[2 * i] = low(b[i], b[i + 4]), a[2 * i + 1] = high(b[i], b[i + 4]);
    for (int i = 0; i < 4; ++i) b[2 * i] = low(a[i], a[i + 4]), b[2 * i + 1] = high(a[i], a[i + 4]);
    for (int i = 0; i < SIDE; ++i) *reinterpret_cast<Words*>(to + i * to_stride) = b[i];
}

// Transposes `rows` x `columns` at `from`, whose rows are `from_stride` apart, to rows `to_stride` apart.
void transpose_tile(
    const std::uint16_t* from, std::int64_t rows, std::int64_t columns, std::int64_t from_stride, std::uint16_t* to,
    std::int64_t to_stride) {
    const std::int64_t whole_rows = rows - rows % SIDE, whole_columns = columns - columns % SIDE;
    for (std::int64_t c = 0; c < whole_columns; c += SIDE) {
        for (std::int64_t r = 0; r < whole_rows; r += SIDE) {
            transpose_square(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
        }
    }
    for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) {
            to[c * to_stride + r] = from[r * from_stride + c];
        }
    }
}

// from [blocks, rows, columns] to [blocks, columns, rows]
void transpose(
    std::uintptr_t from_address, std::uintptr_t to_address, std::int64_t blocks, std::int64_t rows,
    std::int64_t columns, int threads) {
    const auto* from = reinterpret_cast<const std::uint16_t*>(from_address);
    auto* to = reinterpret_cast<std::uint16_t*>(to_address);
    const std::int64_t column_tiles = (columns + TILE - 1) / TILE;
    py::gil_scoped_release released;
    parallel_for(blocks * column_tiles, blocks * rows * columns, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t index = begin; index < end; ++index) {
            const std::int64_t block = index / column_tiles, c = index % column_tiles * TILE;
            const std::uint16_t* source = from + block * rows * columns + c;
            std::uint16_t* target = to + (block * columns + c) * rows;
            for (std::int64_t r = 0; r < rows; r += TILE) {  // so that the target's rows are written in order
                const std::int64_t height = std::min(TILE, rows - r), width = std::min(TILE, columns - c);
                transpose_tile(source + r * columns, height, width, columns, target + r, rows);
            }
        }
    });
}

template <class Out>
MULTIVERSIONED void sum_range(
    const bfloat16* parts, std::int64_t count, std::int64_t size, std::int64_t start, std::int64_t end, Out* to) {
    if (count == 1) {
#pragma omp simd
        for (std::int64_t i = start; i < end; ++i) store(to + i, load(parts + i));
        return;
    }
    constexpr std::int64_t strip = 512;
    for (std::int64_t first = start; first < end; first += strip) {
        float sums[strip];
        const std::int64_t length = std::min(strip, end - first);
#pragma omp simd
        for (std::int64_t i = 0; i < length; ++i) sums[i] = load(parts + first + i);
        for (std::int64_t part = 1; part < count; ++part) {
            const bfloat16* values = parts + part * size + first;
#pragma omp simd
            for (std::int64_t i = 0; i < length; ++i) sums[i] += load(values + i);
        }
#pragma omp simd
        for (std::int64_t i = 0; i < length; ++i) store(to + first + i, sums[i]);
    }
}

// parts [count, size] to their sum [size]
void sum_parts(
    std::uintptr_t parts_address, std::int64_t count, std::int64_t size, std::uintptr_t to_address, bool to_float,
    int threads) {
    const auto* parts = reinterpret_cast<const bfloat16*>(parts_address);
    py::gil_scoped_release released;
    parallel_for(size, count * size, threads, [&](std::int64_t begin, std::int64_t end) {
        if (to_float) {
            sum_range(parts, count, size, begin, end, reinterpret_cast<float*>(to_address));
        } else {
            sum_range(parts, count, size, begin, end, reinterpret_cast<bfloat16*>(to_address));
        }
    });
}

template <class Out>
MULTIVERSIONED void sum_tile_transposed(
    const bfloat16* parts, std::int64_t count, std::int64_t size, std::int64_t rows, std::int64_t columns,
    std::int64_t from_stride, Out* to, std::int64_t to_stride) {
    float sums[TILE][TILE];
    for (std::int64_t r = 0; r < rows; ++r) {
        const bfloat16* row = parts + r * from_stride;
#pragma omp simd
        for (std::int64_t c = 0; c < columns; ++c) sums[r][c] = load(row + c);
        for (std::int64_t part = 1; part < count; ++part) {
            const bfloat16* values = row + part * size;
#pragma omp simd
            for (std::int64_t c = 0; c < columns; ++c) sums[r][c] += load(values + c);
        }
    }
    for (std::int64_t c = 0; c < columns; ++c) {
        Out* target = to + c * to_stride;
#pragma omp simd
        for (std::int64_t r = 0; r < rows; ++r) store(target + r, sums[r][c]);
    }
}

// parts [count, rows, columns] to the transpose of their sum, [columns, rows]
void sum_parts_transposed(
    std::uintptr_t parts_address, std::int64_t count, std::int64_t rows, std::int64_t columns,
    std::uintptr_t to_address, bool to_float, int threads) {
    const auto* parts = reinterpret_cast<const bfloat16*>(parts_address);
    const std::int64_t column_tiles = (columns + TILE - 1) / TILE, size = rows * columns;
    py::gil_scoped_release released;
    parallel_for(column_tiles, count * size, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t c = begin * TILE; c < std::min(columns, end * TILE); c += TILE) {
            for (std::int64_t r = 0; r < rows; r += TILE) {
                const std::int64_t height = std::min(TILE, rows - r), width = std::min(TILE, columns - c);
                const bfloat16* from = parts + r * columns + c;
                const std::int64_t place = c * rows + r;
                if (to_float) {
                    auto* to = reinterpret_cast<float*>(to_address) + place;
                    sum_tile_transposed(from, count, size, height, width, columns, to, rows);
                } else {
                    auto* to = reinterpret_cast<bfloat16*>(to_address) + place;
                    sum_tile_transposed(from, count, size, height, width, columns, to, rows);
                }
            }
        }
    });
}

}  // namespace

PYBIND11_MODULE(linear_kernels, module) {
    module.def("transpose", &transpose, "from [blocks, rows, columns] to [blocks, columns, rows], 16 bits an element");
    module.def("sum_parts", &sum_parts, "bf16 parts [count, size] to their sum, fp32 or bf16 [size]");
    module.def(
        "sum_parts_transposed", &sum_parts_transposed,
        "bf16 parts [count, rows, columns] to the transpose of their sum, fp32 or bf16 [columns, rows]");
}
