// bf16 attention on CPUs with matrix tiles (Intel AMX); called through cpu_attention.py.
//
// The scores of a block of queries never leave the cache: softmax runs over them there, and the backward pass computes
// them again from queries and keys, as in FlashAttention (Dao et al. 2022, 2023). Kept are the maximum of each row and
// the inverse of its sum, not their logarithm: that would lose a row whose keys are all hidden by huge numbers.
//
// Shapes: b batch, n heads, q queries, k keys, s either, d channels of a head; an item is one of b n. Products take
// bf16 and sum in fp32; everything else is fp32. Threads divide the items, so no sum depends on how many they are.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "amx_tiles.h"
#include "attention_rule.h"
#include "kernel_arguments.h"
#include "parallel.h"

#if HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace py = pybind11;

namespace {

using megatron::at;
using megatron::require;
using megatron::ScoreRule;
using std::int64_t;
using bits16 = std::uint16_t;  // a bf16 number as it lies in memory

// A tensor [b, s, n, d] whose channels are adjacent; strides in elements.
struct Heads {
    bits16* data;
    int64_t batch_stride, position_stride, head_stride;

    Heads(std::uintptr_t address, const std::vector<int64_t>& strides) : data(at<bits16>(address)) {
        require(strides.size() == 4 && strides[3] == 1, "strides must be four: batch, position, head, 1");
        batch_stride = strides[0], position_stride = strides[1], head_stride = strides[2];
    }
};

#if HAS_AMX

using namespace megatron::amx;

constexpr int64_t keys_at_once = 128;     // of the backward pass: scores of block x these stay in the nearest cache
constexpr int64_t queries_at_once = 128;  // of the backward pass: between two additions to the sums over queries
constexpr int64_t margin = 64;            // around the sums along diagonals, for whole vectors at the ends

// The part of a tensor that belongs to an item.
Matrix part_of(const Heads& tensor, const ScoreRule& rule, int64_t item, int64_t length) {
    bits16* data = tensor.data + item / rule.heads * tensor.batch_stride + item % rule.heads * tensor.head_stride;
    return {data, tensor.position_stride, length};
}

// Scores of 16 keys after scale, bias and mask, which may be null. `whole`: no lane is off.
template <bool whole>
AMX inline __m512 biased(__mmask16 lanes, __m512 scale, const float* scores, const float* bias, const float* mask) {
    __m512 added = whole ? _mm512_loadu_ps(bias) : _mm512_maskz_loadu_ps(lanes, bias);
    if (mask) added = _mm512_add_ps(added, whole ? _mm512_loadu_ps(mask) : _mm512_maskz_loadu_ps(lanes, mask));
    return _mm512_fmadd_ps(_mm512_loadu_ps(scores), scale, added);
}

// The keys after `key`, or null without a mask.
inline const float* shifted(const float* mask, int64_t key) { return mask ? mask + key : nullptr; }

// Scores of a query to exponentials that are not yet divided by their sum: A tiles at `exponentials`, 0 from the last
// visible key to `end`. Writes the row's statistics, maximum and 1 / sum.
AMX void softmax_row(const ScoreRule& rule, int64_t item, int64_t query, int64_t end, float* scores,
                     bits16* exponentials, float* statistics) {
    const int64_t visible = rule.visible(query);
    const float *bias = rule.bias(item, query), *mask = rule.has_mask() ? rule.mask(item, query) : nullptr;
    const __m512 scale = _mm512_set1_ps(rule.scale);
    __m512 maxima = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    int64_t j = 0;
    for (; j + 16 <= visible; j += 16) {
        const __m512 score = biased<true>(0xffff, scale, scores + j, bias + j, shifted(mask, j));
        _mm512_storeu_ps(scores + j, score);
        maxima = _mm512_max_ps(score, maxima);  // the second one if the first is NaN
    }
    if (j < visible) {
        const __mmask16 lanes = first_lanes(visible - j);
        const __m512 score = biased<false>(lanes, scale, scores + j, bias + j, shifted(mask, j));
        _mm512_storeu_ps(scores + j, score);
        maxima = _mm512_mask_max_ps(maxima, lanes, score, maxima);
    }
    const __m512 maximum = _mm512_set1_ps(_mm512_reduce_max_ps(maxima));
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (j = 0; j + 32 <= visible; j += 32, exponentials += 2 * tile) {
        __m512 values[2];
        for (int half = 0; half < 2; ++half) {
            const __m512 score = _mm512_loadu_ps(scores + j + 16 * half);
            values[half] = exponential(0xffff, _mm512_sub_ps(score, maximum));
            sums[half] = _mm512_add_ps(sums[half], values[half]);
        }
        _mm512_store_si512(exponentials, to_bf16(values[0], values[1]));
    }
    for (; j < end; j += 32, exponentials += 2 * tile) {
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
        const Matrix query = part_of(given.query, rule, item, rule.queries);
        const Matrix key = part_of(given.key, rule, item, rule.keys);
        const Matrix value = part_of(given.value, rule, item, rule.keys);
        const Matrix context = part_of(given.context, rule, item, rule.queries);
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

template <bool whole>
AMX inline void differentiate(const Row& row, __m512 scale, int64_t j, __m512& probability, __m512& gradient) {
    const __mmask16 lanes = whole ? 0xffff : first_lanes(row.visible - j);
    const __m512 score = biased<whole>(lanes, scale, row.scores + j, row.bias + j, shifted(row.mask, j));
    const __m512 value = exponential(lanes, _mm512_sub_ps(score, _mm512_set1_ps(row.maximum)));
    probability = _mm512_mul_ps(value, _mm512_set1_ps(row.inverse_sum));
    const __m512 centred = _mm512_sub_ps(_mm512_loadu_ps(row.gradients + j), _mm512_set1_ps(row.mean));
    gradient = whole ? _mm512_mul_ps(probability, centred) : _mm512_maskz_mul_ps(lanes, probability, centred);
}

// Where the results of a pair of queries go: probabilities and gradients of scores as "pairs" by key, the latter also
// as "rows"; sums along diagonals, or null, begin with key 0 of the second query.
struct PairTargets {
    bits16 *probability_pairs, *gradient_pairs, *gradient_rows;
    float* diagonals;
};

// Probabilities and gradients of scores of two queries and the keys [begin, end). `previous` are the gradients of `a`
// at the keys before: one key on, they lie on the same diagonal as those of `b`.
template <bool whole>
AMX inline void differentiate_keys(const Row& a, const Row& b, float scale, int64_t begin, int64_t end,
                                   const PairTargets& out, __m512i& previous) {
    const __m512i order = pair_order();
    const __m512 scales = _mm512_set1_ps(scale);
    for (int64_t j = begin; j < end; j += 32) {
        __m512 gradients[2][2];
        for (int half = 0; half < 2; ++half) {
            const int64_t k = j + 16 * half;
            __m512 probability[2], *gradient = gradients[half];
            differentiate<whole>(a, scales, k, probability[0], gradient[0]);
            differentiate<whole>(b, scales, k, probability[1], gradient[1]);
            const __m512i pairs = to_bf16(probability[0], probability[1]);
            _mm512_store_si512(out.probability_pairs + k * 32, _mm512_permutexvar_epi16(order, pairs));
            const __m512i gradient_pairs = to_bf16(gradient[0], gradient[1]);
            _mm512_store_si512(out.gradient_pairs + k * 32, _mm512_permutexvar_epi16(order, gradient_pairs));
            if (!out.diagonals) continue;
            const __m512i current = _mm512_castps_si512(gradient[0]);
            const __m512 before = _mm512_castsi512_ps(_mm512_alignr_epi32(current, previous, 15));
            const __m512 sum = _mm512_add_ps(_mm512_loadu_ps(out.diagonals + k), _mm512_add_ps(before, gradient[1]));
            _mm512_storeu_ps(out.diagonals + k, sum);
            previous = current;
        }
        _mm512_store_si512(out.gradient_rows + j * 32, to_bf16(gradients[0][0], gradients[1][0]));
        _mm512_store_si512(out.gradient_rows + j * 32 + 32, to_bf16(gradients[0][1], gradients[1][1]));
    }
}

AMX void differentiate_pair(const Row& a, const Row& b, float scale, int64_t begin, int64_t end,
                            const PairTargets& out) {
    const int64_t whole = std::clamp(std::min(a.visible, b.visible) / 32 * 32, begin, end);
    __m512i previous = _mm512_setzero_si512();
    differentiate_keys<true>(a, b, scale, begin, whole, out, previous);
    differentiate_keys<false>(a, b, scale, whole, end, out, previous);
    if (!out.diagonals) return;
    const __m512 last = _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_setzero_si512(), previous, 15));
    _mm512_storeu_ps(out.diagonals + end, _mm512_add_ps(_mm512_loadu_ps(out.diagonals + end), last));
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
            store_transposed(key_sums_, rule_.scale, part_of(given_.key_gradient, rule_, item, rule_.keys));
            store_transposed(value_sums_, 1.0f, part_of(given_.value_gradient, rule_, item, rule_.keys));
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
        const Matrix key = part_of(given_.key, rule_, item, rule_.keys);
        const Matrix value = part_of(given_.value, rule_, item, rule_.keys);
        const Matrix query = part_of(given_.query, rule_, item, rule_.queries);
        const Matrix gradient = part_of(given_.gradient, rule_, item, rule_.queries);
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
        pack_rows(part_of(given_.query, rule_, item, rule_.queries), d_, first, query_rows_);
        pack_rows(part_of(given_.gradient, rule_, item, rule_.queries), d_, first, output_gradient_rows_);
        Row rows[block];
        for (int64_t r = 0; r < block; ++r) rows[r] = row(item, first + r, r);
        constexpr int64_t stride = keys_at_once + 16;
        for (int64_t begin = 0; begin < end; begin += keys_at_once) {
            const int64_t part = std::min(begin + keys_at_once, end);
            for (int64_t j = begin; j < part; j += block) {
                multiply(query_rows_, 2 * tile, key_transposed_ + j * d_, 2 * tile, d_ / 32, scores_ + j - begin,
                         stride, false);
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
        const Matrix result = part_of(given_.query_gradient, rule_, item, rule_.queries);
        for (int64_t c = 0; c < d_; c += 32)
            multiply(gradient_rows_, 2 * tile, key_pairs_ + c * 32, d_ * 32, end / block, query_sums_ + c, d_, false);
        for (int64_t r = 0; r < count; ++r)
            store_row(query_sums_ + r * d_, rule_.scale, d_, result.data + (first + r) * result.stride);
    }

    AMX Row row(int64_t item, int64_t query, int64_t r) const {
        constexpr int64_t stride = keys_at_once + 16;
        const bool exists = query < rule_.queries;
        const int64_t read = std::min(query, rule_.queries - 1);
        const Matrix context = part_of(given_.context, rule_, item, rule_.queries);
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
        const float* mask = rule_.has_mask() ? rule_.mask(item, read) : nullptr;
        return {exists ? rule_.visible(query) : 0, rule_.bias(item, read), mask,
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
    const ForwardArguments given{rule, channels, tensor(0), tensor(1), tensor(2), tensor(3), at<float>(statistics)};
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
                                  tensor(6), tensor(7), at<const float>(statistics),
                                  diagonals ? sums.data() : nullptr};
    const py::gil_scoped_release released;
    megatron::parallel_for(rule.items(), rule.rows() * rule.keys, threads,
                           [&](int64_t begin, int64_t end) { Backward(given).run(begin, end); });
    if (diagonals) rule.sum_over_batch(sums.data(), at<float>(diagonals));
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
