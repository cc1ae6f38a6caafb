// bf16 attention on CPUs with matrix tiles (Intel AMX); called through cpu_attention.py.
//
// The scores of a block of queries never leave the cache: softmax runs over them there, and the backward pass computes
// them again from queries and keys, as in FlashAttention (Dao et al. 2022, 2023). Kept are the maximum of each row and
// the inverse of its sum, not their logarithm, which would lose a row whose keys are all hidden by huge negative numbers.
//
// Shapes: b batch, n heads, q queries, k keys, s either, d channels of a head; an item is one of b n. Products take bf16
// and sum in fp32; everything else is fp32. Threads divide the items, so no sum depends on how many they are.
//
// A tile is 16 rows of 64 bytes, here always adjacent in memory. A product C += A B of tiles takes A as 16 rows of 32
// numbers, and B, which has 32 rows of 16, as 16 rows of pairs: number c of row r is (B[2r, c], B[2r+1, c]). So 32 rows
// of a matrix X [s, d] can be packed as
//   rows              A tiles of X: [d/32][2][16 positions][32 channels]
//   rows, transposed  B tiles of X^T: [d/32][2][16 pairs of channels][16 positions]
//   pairs             B tiles of X: [d/16][16 pairs of positions][16 channels]
//   pairs, transposed A tiles of X^T: [d/16][16 channels][32 positions]
// where "transposed" transposes each tile as 16 x 16 words of 32 bits. Each takes 32 d numbers; lengths are filled up
// with zeros to whole blocks of 32.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <vector>

#include "attention_rule.h"
#include "parallel.h"

#if defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 14) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 11))
#define HAS_AMX 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HAS_AMX 0
#endif

namespace py = pybind11;

namespace {

using megatron::ScoreRule;
using std::int64_t;
using bits16 = std::uint16_t;  // a bf16 number as it lies in memory

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

// A tensor [b, s, n, d] whose channels are adjacent; strides in elements.
struct Heads {
    bits16* data;
    int64_t batch_stride, position_stride, head_stride;

    Heads(std::uintptr_t address, const std::vector<int64_t>& strides) : data(reinterpret_cast<bits16*>(address)) {
        require(strides.size() == 4 && strides[3] == 1, "strides must be four: batch, position, head, 1");
        batch_stride = strides[0], position_stride = strides[1], head_stride = strides[2];
    }
};

// The part [s, d] of such a tensor that belongs to an item.
struct Matrix {
    bits16* data;
    int64_t stride, length;

    Matrix(const Heads& heads, const ScoreRule& rule, int64_t item, int64_t length)
        : data(heads.data + item / rule.heads * heads.batch_stride + item % rule.heads * heads.head_stride),
          stride(heads.position_stride), length(length) {}
};

#if HAS_AMX

#define AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

constexpr int64_t block = 32;                // positions that are packed together
constexpr int64_t tile = 512;                // numbers of a bf16 tile
constexpr int64_t keys_at_once = 128;        // of the backward pass: scores of block x these stay in the nearest cache
constexpr int64_t queries_at_once = 128;     // of the backward pass: between two additions to the sums over queries
constexpr int64_t margin = 64;               // around the sums along diagonals, for whole vectors at the ends
constexpr std::size_t alignment = 64;        // of packed data, a tile's row

int64_t padded(int64_t length) { return (length + block - 1) / block * block; }

// Uninitialised memory of a thread, handed out in aligned parts.
class Workspace {
   public:
    explicit Workspace(std::size_t size) : size_(size + alignment), memory_(new char[size_]) {
        const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
        used_ = (alignment - address % alignment) % alignment;
    }
    template <class T>
    T* take(int64_t count) {
        T* result = reinterpret_cast<T*>(memory_.get() + used_);
        used_ += bytes<T>(count);
        return result;
    }
    template <class T>
    static std::size_t bytes(int64_t count) {
        return (count * sizeof(T) + alignment - 1) / alignment * alignment;
    }

   private:
    std::size_t size_, used_;
    std::unique_ptr<char[]> memory_;
};

// All eight tiles are 16 rows of 64 bytes, from construction to destruction; other users of tiles configure their own.
class TileConfiguration {
   public:
    AMX TileConfiguration() {
        struct alignas(64) {
            std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
            std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } configuration;
        static_assert(sizeof(configuration) == 64, "the layout is the processor's");
        _tile_loadconfig(&configuration);
    }
    AMX ~TileConfiguration() { _tile_release(); }
};

// C [32, 32] = or += A [32, 32 steps] B [32 steps, 32]. Of A the two tiles of a step are adjacent, and of B; the steps
// are `a_step` and `b_step` numbers apart.
AMX __attribute__((noinline)) void multiply(const bits16* a, int64_t a_step, const bits16* b, int64_t b_step,
                                            int64_t steps, float* c, int64_t c_stride, bool add) {
    asm volatile("" ::: "memory");  // compilers do not know that tiles are read from memory
    const int64_t c_bytes = c_stride * 4;
    if (add) {
        _tile_loadd(0, c, c_bytes);
        _tile_loadd(1, c + 16, c_bytes);
        _tile_loadd(2, c + 16 * c_stride, c_bytes);
        _tile_loadd(3, c + 16 * c_stride + 16, c_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; ++step, a += a_step, b += b_step) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + tile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + tile, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16, c_bytes);
    _tile_stored(2, c + 16 * c_stride, c_bytes);
    _tile_stored(3, c + 16 * c_stride + 16, c_bytes);
}

// 32 channels of a position, zeros after the end.
AMX inline __m512i load_position(const Matrix& x, int64_t position, int64_t channel) {
    if (position >= x.length) return _mm512_setzero_si512();
    return _mm512_loadu_si512(x.data + position * x.stride + channel);
}

// "rows" of the positions [first, first + 32).
AMX void pack_rows(const Matrix& x, int64_t channels, int64_t first, bits16* out) {
    for (int64_t c = 0; c < channels; c += 32)
        for (int64_t s = 0; s < block; ++s, out += 32) _mm512_store_si512(out, load_position(x, first + s, c));
}

// The order of 16 pairs (a, b) in a vector of 16 a and 16 b.
AMX inline __m512i pair_order() {
    const __m512i a = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_or_si512(a, _mm512_slli_epi32(_mm512_add_epi32(a, _mm512_set1_epi32(16)), 16));
}

// "pairs" of the positions [first, first + 32).
AMX void pack_pairs(const Matrix& x, int64_t channels, int64_t first, bits16* out) {
    const __m512i order = pair_order();
    for (int64_t c = 0; c < channels; c += 32, out += 2 * tile) {
        for (int64_t r = 0; r < 16; ++r) {
            const __m512i a = load_position(x, first + 2 * r, c), b = load_position(x, first + 2 * r + 1, c);
            const __m512i low = _mm512_inserti64x4(a, _mm512_castsi512_si256(b), 1);
            const __m512i high = _mm512_shuffle_i64x2(a, b, 0xee);
            _mm512_store_si512(out + r * 32, _mm512_permutexvar_epi16(order, low));
            _mm512_store_si512(out + tile + r * 32, _mm512_permutexvar_epi16(order, high));
        }
    }
}

// Transposes tiles as 16 x 16 words of 32 bits, in place.
AMX void transpose_tiles(bits16* tiles, int64_t count) {
    for (; count > 0; --count, tiles += tile) {
        __m512i a[16], b[16];
        for (int i = 0; i < 16; ++i) a[i] = _mm512_load_si512(tiles + i * 32);
        for (int i = 0; i < 16; i += 2) {
            b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        }
        for (int i = 0; i < 16; i += 4) {  // a[i + c]: column c of the rows [i, i + 4), a quarter for each of c + 4 m
            a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
            a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
            a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
            a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
        }
        for (int c = 0; c < 4; ++c) {
            const __m512i top_even = _mm512_shuffle_i32x4(a[c], a[c + 4], 0x88);
            const __m512i top_odd = _mm512_shuffle_i32x4(a[c], a[c + 4], 0xdd);
            const __m512i bottom_even = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0x88);
            const __m512i bottom_odd = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0xdd);
            _mm512_store_si512(tiles + c * 32, _mm512_shuffle_i32x4(top_even, bottom_even, 0x88));
            _mm512_store_si512(tiles + (c + 4) * 32, _mm512_shuffle_i32x4(top_odd, bottom_odd, 0x88));
            _mm512_store_si512(tiles + (c + 8) * 32, _mm512_shuffle_i32x4(top_even, bottom_even, 0xdd));
            _mm512_store_si512(tiles + (c + 12) * 32, _mm512_shuffle_i32x4(top_odd, bottom_odd, 0xdd));
        }
    }
}

// exp(x) of the lanes, x <= 0 or NaN, to about 3e-6 of itself; 0 below -87.3 and in the other lanes.
AMX inline __m512 exponential(__mmask16 lanes, __m512 x) {
    const __m512 exponent = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f));
    const __m512 r = _mm512_reduce_ps(exponent, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // the fraction, in [0, 1)
    __m512 p = _mm512_set1_ps(1.35341680e-2f);  // 2^r, the best polynomial of degree 4
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.20114611e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.41442756e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93003835e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.00000259f));
    lanes = _mm512_mask_cmp_ps_mask(lanes, x, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(lanes, p, exponent);  // p * 2^floor(exponent)
}

AMX inline __mmask16 first_lanes(int64_t count) {
    return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
}

// Scores of 16 keys after scale, bias and mask.
AMX inline __m512 biased(__mmask16 lanes, __m512 scale, const float* scores, const float* bias, const float* mask) {
    const __m512 added = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, bias), _mm512_maskz_loadu_ps(lanes, mask));
    return _mm512_fmadd_ps(_mm512_loadu_ps(scores), scale, added);
}

AMX inline __m512i to_bf16(__m512 low, __m512 high) {
    const __m512bh pair = _mm512_cvtne2ps_pbh(high, low);
    __m512i result;
    std::memcpy(&result, &pair, sizeof(result));
    return result;
}

// Scores of a query to exponentials that are not yet divided by their sum: A tiles at `exponentials`, 0 from the last
// visible key to `end`. Writes the row's statistics, maximum and 1 / sum.
AMX void softmax_row(const ScoreRule& rule, int64_t item, int64_t query, int64_t end, float* scores,
                     bits16* exponentials, float* statistics) {
    const int64_t visible = rule.visible(query);
    const float *bias = rule.bias(item, query), *mask = rule.mask(item, query);
    const __m512 scale = _mm512_set1_ps(rule.scale);
    __m512 maxima = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (int64_t j = 0; j < visible; j += 16) {
        const __mmask16 lanes = first_lanes(visible - j);
        const __m512 score = biased(lanes, scale, scores + j, bias + j, mask + j);
        _mm512_storeu_ps(scores + j, score);
        maxima = _mm512_mask_max_ps(maxima, lanes, score, maxima);  // the second one if the first is NaN
    }
    const __m512 maximum = _mm512_set1_ps(_mm512_reduce_max_ps(maxima));
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t j = 0; j < end; j += 32, exponentials += 2 * tile) {
        __m512 values[2];
        for (int half = 0; half < 2; ++half) {
            const __m512 score = _mm512_loadu_ps(scores + j + 16 * half);
            values[half] = exponential(first_lanes(visible - j - 16 * half), _mm512_sub_ps(score, maximum));
            sums[half] = _mm512_add_ps(sums[half], values[half]);
        }
        _mm512_store_si512(exponentials, to_bf16(values[0], values[1]));
    }
    statistics[0] = _mm512_cvtss_f32(maximum);
    statistics[1] = 1.0f / _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
}

// A row of fp32 numbers times a factor to bf16.
AMX inline void store_row(const float* row, float factor, int64_t channels, bits16* out) {
    const __m512 factors = _mm512_set1_ps(factor);
    for (int64_t c = 0; c < channels; c += 32) {
        const __m512 low = _mm512_mul_ps(_mm512_loadu_ps(row + c), factors);
        const __m512 high = _mm512_mul_ps(_mm512_loadu_ps(row + c + 16), factors);
        _mm512_storeu_si512(out + c, to_bf16(low, high));
    }
}

struct ForwardArguments {
    const ScoreRule& rule;
    int64_t channels;
    Heads query, key, value, context;
    float* statistics;  // [b n, q, 2]
};

AMX void forward_items(const ForwardArguments& given, int64_t begin, int64_t end) {
    const ScoreRule& rule = given.rule;
    const int64_t d = given.channels, keys = padded(rule.keys), scores_stride = keys + 16;
    using W = Workspace;
    W space(2 * W::bytes<bits16>(keys * d) + W::bytes<bits16>(block * d) + W::bytes<bits16>(block * keys) +
            W::bytes<float>(block * scores_stride) + W::bytes<float>(block * d));
    bits16 *key_tiles = space.take<bits16>(keys * d), *value_tiles = space.take<bits16>(keys * d);
    bits16 *query_tiles = space.take<bits16>(block * d), *probabilities = space.take<bits16>(block * keys);
    float *scores = space.take<float>(block * scores_stride), *sums = space.take<float>(block * d);
    const TileConfiguration configuration;
    for (int64_t item = begin; item < end; ++item) {
        const Matrix query(given.query, rule, item, rule.queries), key(given.key, rule, item, rule.keys);
        const Matrix value(given.value, rule, item, rule.keys), context(given.context, rule, item, rule.queries);
        for (int64_t j = 0; j < keys; j += block) {
            pack_rows(key, d, j, key_tiles + j * d);
            pack_pairs(value, d, j, value_tiles + j * d);
        }
        transpose_tiles(key_tiles, keys * d / tile);
        for (int64_t first = 0; first < rule.queries; first += block) {
            const int64_t rows = std::min(block, rule.queries - first);
            const int64_t limit = padded(rule.visible(first + rows - 1));
            float* statistics = given.statistics + (item * rule.queries + first) * 2;
            pack_rows(query, d, first, query_tiles);
            for (int64_t j = 0; j < limit; j += block)
                multiply(query_tiles, 2 * tile, key_tiles + j * d, 2 * tile, d / 32, scores + j, scores_stride, false);
            for (int64_t r = 0; r < rows; ++r)
                softmax_row(rule, item, first + r, limit, scores + r * scores_stride, probabilities + r * 32,
                            statistics + r * 2);
            for (int64_t c = 0; c < d; c += 32)
                multiply(probabilities, 2 * tile, value_tiles + c * 32, d * 32, limit / block, sums + c, d, false);
            for (int64_t r = 0; r < rows; ++r)
                store_row(sums + r * d, statistics[r * 2 + 1], d, context.data + (first + r) * context.stride);
        }
    }
}

struct BackwardArguments {
    const ScoreRule& rule;
    int64_t channels;
    Heads gradient, context, query, key, value, query_gradient, key_gradient, value_gradient;
    const float* statistics;  // [b n, q, 2]
    float* diagonals;         // [b n, q + k - 1], or null
};

// What the backward pass needs of a query; one after the last sees no keys.
struct Row {
    int64_t visible;
    const float *bias, *mask, *scores, *gradients;  // by key; `gradients` of probabilities
    float maximum, inverse_sum, mean;               // `mean` of the gradients, weighted by probability
};

AMX inline void differentiate(const Row& row, __m512 scale, int64_t j, __m512& probability, __m512& gradient) {
    const __mmask16 lanes = first_lanes(row.visible - j);
    const __m512 score = biased(lanes, scale, row.scores + j, row.bias + j, row.mask + j);
    const __m512 value = exponential(lanes, _mm512_sub_ps(score, _mm512_set1_ps(row.maximum)));
    probability = _mm512_mul_ps(value, _mm512_set1_ps(row.inverse_sum));
    const __m512 centred = _mm512_sub_ps(_mm512_loadu_ps(row.gradients + j), _mm512_set1_ps(row.mean));
    gradient = _mm512_maskz_mul_ps(lanes, probability, centred);
}

// Where the results of a pair of queries go: probabilities and gradients of scores as "pairs" by key, the latter also
// as "rows"; sums along diagonals, or null, begin with key 0 of the second query.
struct PairTargets {
    bits16 *probability_pairs, *gradient_pairs, *gradient_rows;
    float* diagonals;
};

// Probabilities and gradients of scores of two queries and the keys [begin, end).
AMX void differentiate_pair(const Row& a, const Row& b, float scale, int64_t begin, int64_t end,
                            const PairTargets& out) {
    const __m512i order = pair_order();
    const __m512 scales = _mm512_set1_ps(scale);
    __m512i previous = _mm512_setzero_si512();  // gradients of `a`: one key on, they lie on the same diagonal as `b`
    for (int64_t j = begin; j < end; j += 32) {
        __m512 gradients[2][2];
        for (int half = 0; half < 2; ++half) {
            const int64_t k = j + 16 * half;
            __m512 probability[2], *gradient = gradients[half];
            differentiate(a, scales, k, probability[0], gradient[0]);
            differentiate(b, scales, k, probability[1], gradient[1]);
            const __m512i pairs = to_bf16(probability[0], probability[1]);
            _mm512_store_si512(out.probability_pairs + k * 32, _mm512_permutexvar_epi16(order, pairs));
            const __m512i gradient_pairs = to_bf16(gradient[0], gradient[1]);
            _mm512_store_si512(out.gradient_pairs + k * 32, _mm512_permutexvar_epi16(order, gradient_pairs));
            if (out.diagonals) {
                const __m512i current = _mm512_castps_si512(gradient[0]);
                const __m512 shifted = _mm512_castsi512_ps(_mm512_alignr_epi32(current, previous, 15));
                const __m512 sum = _mm512_add_ps(_mm512_loadu_ps(out.diagonals + k), _mm512_add_ps(shifted, gradient[1]));
                _mm512_storeu_ps(out.diagonals + k, sum);
                previous = current;
            }
        }
        _mm512_store_si512(out.gradient_rows + j * 32, to_bf16(gradients[0][0], gradients[1][0]));
        _mm512_store_si512(out.gradient_rows + j * 32 + 32, to_bf16(gradients[0][1], gradients[1][1]));
    }
    if (out.diagonals) {
        const __m512 last = _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_setzero_si512(), previous, 15));
        _mm512_storeu_ps(out.diagonals + end, _mm512_add_ps(_mm512_loadu_ps(out.diagonals + end), last));
    }
}

// A thread's backward pass, item by item; every buffer is of one item.
class Backward {
   public:
    explicit Backward(const BackwardArguments& given)
        : given_(given), rule_(given.rule), d_(given.channels), queries_(padded(rule_.queries)),
          keys_(padded(rule_.keys)), sums_stride_(keys_ + 16), space_(place(nullptr)) {
        place(&space_);
    }

    AMX void run(int64_t begin, int64_t end) {
        const TileConfiguration configuration;
        for (int64_t item = begin; item < end; ++item) {
            pack(item);
            std::fill(diagonals_, diagonals_ + rule_.diagonals_length() + 2 * margin, 0.0f);
            std::memset(key_sums_, 0, d_ * sums_stride_ * sizeof(float));
            std::memset(value_sums_, 0, d_ * sums_stride_ * sizeof(float));
            for (int64_t first = 0; first < rule_.queries; first += queries_at_once) {
                const int64_t after = std::min(first + queries_at_once, queries_);
                const int64_t limit = padded(rule_.visible(std::min(after, rule_.queries) - 1));
                for (int64_t query = first; query < after; query += block) queries(item, first, query, limit);
                add_to_sums(gradient_transposed_ + first * d_, probability_pairs_, after - first, limit, value_sums_);
                add_to_sums(query_transposed_ + first * d_, gradient_pairs_, after - first, limit, key_sums_);
            }
            store_transposed(key_sums_, rule_.scale, Matrix(given_.key_gradient, rule_, item, rule_.keys));
            store_transposed(value_sums_, 1.0f, Matrix(given_.value_gradient, rule_, item, rule_.keys));
            if (given_.diagonals)
                std::copy(diagonals_ + margin, diagonals_ + margin + rule_.diagonals_length(),
                          given_.diagonals + item * rule_.diagonals_length());
        }
    }

   private:
    // Takes the buffers from `space`, or adds up their bytes.
    std::size_t place(Workspace* space) {
        std::size_t size = 0;
        const auto take = [&](auto*& buffer, int64_t count) {
            using T = std::remove_reference_t<decltype(*buffer)>;
            size += Workspace::bytes<T>(count);
            if (space) buffer = space->take<T>(count);
        };
        for (bits16** buffer : {&key_transposed_, &value_transposed_, &key_pairs_}) take(*buffer, keys_ * d_);
        for (bits16** buffer : {&query_transposed_, &gradient_transposed_}) take(*buffer, queries_ * d_);
        for (bits16** buffer : {&query_rows_, &output_gradient_rows_}) take(*buffer, block * d_);
        for (bits16** buffer : {&probability_pairs_, &gradient_pairs_}) take(*buffer, queries_at_once * keys_);
        take(gradient_rows_, block * keys_);
        for (float** buffer : {&scores_, &score_gradients_}) take(*buffer, block * (keys_at_once + 16));
        for (float** buffer : {&key_sums_, &value_sums_}) take(*buffer, d_ * sums_stride_);
        take(query_sums_, block * d_);
        take(diagonals_, rule_.diagonals_length() + 2 * margin);
        return size;
    }

    AMX void pack(int64_t item) {
        const Matrix key(given_.key, rule_, item, rule_.keys), value(given_.value, rule_, item, rule_.keys);
        const Matrix query(given_.query, rule_, item, rule_.queries);
        const Matrix gradient(given_.gradient, rule_, item, rule_.queries);
        for (int64_t j = 0; j < keys_; j += block) {
            pack_rows(key, d_, j, key_transposed_ + j * d_);
            pack_rows(value, d_, j, value_transposed_ + j * d_);
            pack_pairs(key, d_, j, key_pairs_ + j * d_);
        }
        for (int64_t i = 0; i < queries_; i += block) {
            pack_pairs(query, d_, i, query_transposed_ + i * d_);
            pack_pairs(gradient, d_, i, gradient_transposed_ + i * d_);
        }
        for (bits16* tiles : {key_transposed_, value_transposed_}) transpose_tiles(tiles, keys_ * d_ / tile);
        for (bits16* tiles : {query_transposed_, gradient_transposed_}) transpose_tiles(tiles, queries_ * d_ / tile);
    }

    // The queries [first, first + 32) of those from `start` on: probabilities and gradients of scores, zeros from the
    // last visible key to `limit`; gradients of the queries.
    AMX void queries(int64_t item, int64_t start, int64_t first, int64_t limit) {
        const int64_t count = std::min(block, rule_.queries - first), end = padded(rule_.visible(first + count - 1));
        bits16* probability_pairs = probability_pairs_ + (first - start) * keys_;
        bits16* gradient_pairs = gradient_pairs_ + (first - start) * keys_;
        pack_rows(Matrix(given_.query, rule_, item, rule_.queries), d_, first, query_rows_);
        pack_rows(Matrix(given_.gradient, rule_, item, rule_.queries), d_, first, output_gradient_rows_);
        Row rows[block];
        for (int64_t r = 0; r < block; ++r) rows[r] = row(item, first + r, r);
        constexpr int64_t stride = keys_at_once + 16;
        for (int64_t begin = 0; begin < end; begin += keys_at_once) {
            const int64_t part = std::min(begin + keys_at_once, end);
            for (int64_t j = begin; j < part; j += block) {
                multiply(query_rows_, 2 * tile, key_transposed_ + j * d_, 2 * tile, d_ / 32, scores_ + j - begin, stride,
                         false);
                multiply(output_gradient_rows_, 2 * tile, value_transposed_ + j * d_, 2 * tile, d_ / 32,
                         score_gradients_ + j - begin, stride, false);
            }
            for (int64_t r = 0; r < block; r += 2) {
                // the diagonal of key j and query i is j - i + q - 1
                float* diagonals = diagonals_ + margin + rule_.queries - 2 - first - r;
                const PairTargets targets{probability_pairs + r * 16, gradient_pairs + r * 16, gradient_rows_ + r * 32,
                                          given_.diagonals ? diagonals : nullptr};
                differentiate_pair(rows[r], rows[r + 1], rule_.scale, begin, part, targets);
            }
            for (Row& each : rows) each.scores -= keys_at_once, each.gradients -= keys_at_once;
        }
        std::memset(probability_pairs + end * 32, 0, (limit - end) * 64);
        std::memset(gradient_pairs + end * 32, 0, (limit - end) * 64);
        const Matrix result(given_.query_gradient, rule_, item, rule_.queries);
        for (int64_t c = 0; c < d_; c += 32)
            multiply(gradient_rows_, 2 * tile, key_pairs_ + c * 32, d_ * 32, end / block, query_sums_ + c, d_, false);
        for (int64_t r = 0; r < count; ++r)
            store_row(query_sums_ + r * d_, rule_.scale, d_, result.data + (first + r) * result.stride);
    }

    AMX Row row(int64_t item, int64_t query, int64_t r) const {
        constexpr int64_t stride = keys_at_once + 16;
        const bool exists = query < rule_.queries;
        const int64_t read = std::min(query, rule_.queries - 1);
        const Matrix context(given_.context, rule_, item, rule_.queries);
        const float* statistics = given_.statistics + (item * rule_.queries + read) * 2;
        // The weighted mean of the probabilities' gradients is the product of the context and its gradient.
        __m512 mean = _mm512_setzero_ps();
        for (int64_t c = 0; c < d_; c += 32) {
            const __m512i gradient = _mm512_load_si512(output_gradient_rows_ + c * 32 + r * 32);
            const __m512i value = load_position(context, read, c);
            __m512bh factors[2];
            std::memcpy(&factors[0], &gradient, sizeof(gradient));
            std::memcpy(&factors[1], &value, sizeof(value));
            mean = _mm512_dpbf16_ps(mean, factors[0], factors[1]);
        }
        return {exists ? rule_.visible(query) : 0, rule_.bias(item, read), rule_.mask(item, read),
                scores_ + r * stride, score_gradients_ + r * stride, statistics[0], statistics[1],
                _mm512_reduce_add_ps(mean)};
    }

    // sums [d, keys] += transposed [d, queries] x pairs [queries, keys]
    AMX void add_to_sums(const bits16* transposed, const bits16* pairs, int64_t queries, int64_t keys, float* sums) {
        for (int64_t c = 0; c < d_; c += 32)
            for (int64_t j = 0; j < keys; j += block)
                multiply(transposed + c * 32, d_ * 32, pairs + j * 32, keys_ * 32, queries / block,
                         sums + c * sums_stride_ + j, sums_stride_, true);
    }

    // sums [d, keys], times a factor, to rows [keys, d]
    AMX void store_transposed(const float* sums, float factor, const Matrix& result) {
        alignas(alignment) float words[2][tile / 2];
        const __m512 factors = _mm512_set1_ps(factor);
        for (int64_t c = 0; c < d_; c += 32)
            for (int64_t j = 0; j < keys_; j += 16) {
                for (int half = 0; half < 2; ++half) {
                    for (int64_t r = 0; r < 16; ++r) {
                        const __m512 row = _mm512_loadu_ps(sums + (c + 16 * half + r) * sums_stride_ + j);
                        _mm512_store_ps(words[half] + r * 16, _mm512_mul_ps(row, factors));
                    }
                    transpose_tiles(reinterpret_cast<bits16*>(words[half]), 1);
                }
                for (int64_t r = 0; r < 16 && j + r < result.length; ++r) {
                    const __m512 low = _mm512_load_ps(words[0] + r * 16), high = _mm512_load_ps(words[1] + r * 16);
                    _mm512_storeu_si512(result.data + (j + r) * result.stride + c, to_bf16(low, high));
                }
            }
    }

    const BackwardArguments& given_;
    const ScoreRule& rule_;
    const int64_t d_, queries_, keys_, sums_stride_;
    bits16 *key_transposed_, *value_transposed_, *key_pairs_;                       // whole item
    bits16 *query_transposed_, *gradient_transposed_;                               // whole item
    bits16 *query_rows_, *output_gradient_rows_, *gradient_rows_;                   // of 32 queries
    bits16 *probability_pairs_, *gradient_pairs_;                                   // of `queries_at_once`
    float *scores_, *score_gradients_, *key_sums_, *value_sums_, *query_sums_, *diagonals_;
    Workspace space_;
};

// Whether the processor has the instructions and Linux lets this process have the tiles.
bool available() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned tiles = 1u << 24, tiles_bf16 = 1u << 22;
    if (!(d & tiles) || !(d & tiles_bf16) || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
    constexpr unsigned avx512_bf16 = 1u << 5;
    if (!(a & avx512_bf16) || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return false;
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

#else

struct ForwardArguments {
    const ScoreRule& rule;
    int64_t channels;
    Heads query, key, value, context;
    float* statistics;
};
struct BackwardArguments {
    const ScoreRule& rule;
    int64_t channels;
    Heads gradient, context, query, key, value, query_gradient, key_gradient, value_gradient;
    const float* statistics;
    float* diagonals;
};
struct Backward {
    explicit Backward(const BackwardArguments&) {}
    void run(int64_t, int64_t) {}
};
void forward_items(const ForwardArguments&, int64_t, int64_t) {}
bool available() { return false; }

#endif

bool is_available() {
    static const bool result = available();
    return result;
}

void check(int64_t channels) {
    require(is_available(), "this processor or system has no AMX");
    require(channels > 0 && channels % 32 == 0, "channels must be a multiple of 32");
}

using Address = std::uintptr_t;
using Strides = std::vector<int64_t>;

void forward(const ScoreRule& rule, int64_t channels, const std::vector<Address>& addresses,
             const std::vector<Strides>& strides, Address statistics, int threads) {
    check(channels);
    require(addresses.size() == 4 && strides.size() == 4, "tensors must be query, key, value, context");
    const auto tensor = [&](int index) { return Heads(addresses[index], strides[index]); };
    const ForwardArguments given{rule, channels, tensor(0), tensor(1), tensor(2), tensor(3),
                                 reinterpret_cast<float*>(statistics)};
    const py::gil_scoped_release released;
    megatron::parallel_for(rule.items(), rule.rows() * rule.keys, threads,
                           [&](int64_t begin, int64_t end) { forward_items(given, begin, end); });
}

void backward(const ScoreRule& rule, int64_t channels, const std::vector<Address>& addresses,
              const std::vector<Strides>& strides, Address statistics, Address diagonals, int threads) {
    check(channels);
    require(addresses.size() == 8 && strides.size() == 8,
            "tensors must be gradient, context, query, key, value and gradients of the last three");
    const auto tensor = [&](int index) { return Heads(addresses[index], strides[index]); };
    std::vector<float> sums(diagonals ? rule.items() * rule.diagonals_length() : 0);  // [b n, q + k - 1]
    const BackwardArguments given{rule, channels, tensor(0), tensor(1), tensor(2), tensor(3), tensor(4), tensor(5),
                                  tensor(6), tensor(7), reinterpret_cast<const float*>(statistics),
                                  diagonals ? sums.data() : nullptr};
    const py::gil_scoped_release released;
    megatron::parallel_for(rule.items(), rule.rows() * rule.keys, threads,
                           [&](int64_t begin, int64_t end) { Backward(given).run(begin, end); });
    if (diagonals) rule.sum_over_batch(sums.data(), reinterpret_cast<float*>(diagonals));
}

}  // namespace

PYBIND11_MODULE(amx_attention, module) {
    module.doc() = "bf16 attention on CPUs with AMX; see amx_attention.pyi.";
    py::module_::import("megatron.core.extensions.attention_kernels");  // knows ScoreRule
    module.def("available", &is_available);
    module.def("forward", &forward, py::arg("rule"), py::arg("channels"), py::arg("addresses"), py::arg("strides"),
               py::arg("statistics"), py::arg("threads"));
    module.def("backward", &backward, py::arg("rule"), py::arg("channels"), py::arg("addresses"), py::arg("strides"),
               py::arg("statistics"), py::arg("diagonals"), py::arg("threads"));
}
