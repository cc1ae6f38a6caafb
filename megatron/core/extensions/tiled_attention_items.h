// Attention of items (b, n), tile by tile. No include guard: tiled_attention.cpp includes this once for each instruction
// set, in a namespace of its own and under its own compiler target, with TILED_LANES (floats in a vector register) and
// TILED_VECTORS (registers across a tile of a product, whose TILED_ROWS rows fill the rest of the register file).
//
// Vector types are lowered to what the target of a function has before functions are cloned for several targets, so
// `target_clones` does not serve here.

constexpr int lanes = TILED_LANES, tile_rows = TILED_ROWS, tile_vectors = TILED_VECTORS;
typedef float Vector __attribute__((vector_size(4 * lanes), may_alias, aligned(4)));

// C [Rows, Vectors lanes] (+)= A [Rows, depth] B [depth, Vectors lanes], with C in registers throughout. Rows of B and C
// are contiguous; A has any strides.
template <int Rows, int Vectors>
void multiply_tile(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                   int64_t c_row, int64_t depth, bool accumulate) {
    Vector sums[Rows][Vectors] = {};
    for (int64_t k = 0; k < depth; ++k) {
        Vector row[Vectors];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) row[v] = *reinterpret_cast<const Vector*>(b + k * b_row + v * lanes);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            const float factor = a[r * a_row + k * a_column];
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; ++v) sums[r][v] += factor * row[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) {
            Vector* const target = reinterpret_cast<Vector*>(c + r * c_row + v * lanes);
            // Sums of sums of blocks have smaller errors of rounding than one sum of everything.
            *target = accumulate ? *target + sums[r][v] : sums[r][v];
        }
}

using MultiplyTile = void (*)(const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t, int64_t, bool);

template <int Rows>
MultiplyTile tile_of_rows(int64_t vectors) {
    static_assert(tile_vectors <= 4, "one entry for each number of vectors");
    static constexpr MultiplyTile tiles[] = {multiply_tile<Rows, 1>, multiply_tile<Rows, std::min(2, tile_vectors)>,
                                             multiply_tile<Rows, std::min(3, tile_vectors)>,
                                             multiply_tile<Rows, std::min(4, tile_vectors)>};
    return tiles[vectors - 1];
}

MultiplyTile tile_of(int64_t rows, int64_t vectors) {
    static_assert(tile_rows == 6, "one case for each number of rows");
    switch (rows) {
        case 1: return tile_of_rows<1>(vectors);
        case 2: return tile_of_rows<2>(vectors);
        case 3: return tile_of_rows<3>(vectors);
        case 4: return tile_of_rows<4>(vectors);
        case 5: return tile_of_rows<5>(vectors);
        default: return tile_of_rows<6>(vectors);
    }
}

// C [rows, columns] (+)= A [rows, depth] B [depth, columns]; columns are a multiple of `alignment`. A panel of B as wide
// as a tile stays in the first-level cache for all rows.
void multiply(Matrix a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t rows, int64_t columns,
              int64_t depth, bool accumulate) {
    constexpr int64_t width = tile_vectors * lanes;
    for (int64_t j = 0; j < columns; j += width) {
        const int64_t vectors = std::min(width, columns - j) / lanes;
        const MultiplyTile whole = tile_of(tile_rows, vectors);
        int64_t i = 0;
        for (; i + tile_rows <= rows; i += tile_rows)
            whole(a.data + i * a.row, a.row, a.column, b + j, b_row, c + i * c_row + j, c_row, depth, accumulate);
        if (i < rows)
            tile_of(rows - i, vectors)(a.data + i * a.row, a.row, a.column, b + j, b_row, c + i * c_row + j, c_row,
                                       depth, accumulate);
    }
}

// Rows [count, d] of a head to contiguous fp32, times a scale.
void pack_rows(const float* source, int64_t stride, int64_t count, int64_t channels, float scale, float* target) {
    for (int64_t s = 0; s < count; ++s)
        for (int64_t c = 0; c < channels; ++c) target[s * channels + c] = source[s * stride + c] * scale;
}

void unpack_rows(const float* source, int64_t count, int64_t channels, float scale, float* target, int64_t stride) {
    for (int64_t s = 0; s < count; ++s)
        for (int64_t c = 0; c < channels; ++c) target[s * stride + c] = source[s * channels + c] * scale;
}

// A square of `lanes` rows to its columns, [lanes, lanes] both.
inline void transpose_square(const float* source, int64_t stride, float* target, int64_t target_stride) {
#ifdef TILED_SHUFFLES
    typedef int Indices __attribute__((vector_size(4 * lanes)));
    Indices low, high;
    for (int i = 0; i < lanes; ++i) {
        low[i] = i / 2 + i % 2 * lanes;
        high[i] = low[i] + lanes / 2;
    }
    Vector rows[lanes], next[lanes];
#pragma GCC unroll 16
    for (int s = 0; s < lanes; ++s) rows[s] = *reinterpret_cast<const Vector*>(source + s * stride);
    // Interleaving the first half of the rows with the second, as often as they can be halved, transposes.
#pragma GCC unroll 4
    for (int half = 1; half < lanes; half *= 2) {
#pragma GCC unroll 16
        for (int s = 0; s < lanes / 2; ++s) {
            next[2 * s] = __builtin_shuffle(rows[s], rows[s + lanes / 2], low);
            next[2 * s + 1] = __builtin_shuffle(rows[s], rows[s + lanes / 2], high);
        }
#pragma GCC unroll 16
        for (int s = 0; s < lanes; ++s) rows[s] = next[s];
    }
#pragma GCC unroll 16
    for (int c = 0; c < lanes; ++c) *reinterpret_cast<Vector*>(target + c * target_stride) = rows[c];
#else
    for (int c = 0; c < lanes; ++c)
        for (int s = 0; s < lanes; ++s) target[c * target_stride + s] = source[s * stride + c];
#endif
}

// Keys or values [k, d] to blocks [k / block, d, block], with zeros after the last.
void pack_transposed(const float* source, int64_t stride, int64_t keys, int64_t channels, float* target) {
    for (int64_t first = 0; first < keys; first += block, target += channels * block) {
        const int64_t count = std::min(block, keys - first), whole = count / lanes * lanes;
        const float* rows = source + first * stride;
        for (int64_t s = 0; s < whole; s += lanes)
            for (int64_t c = 0; c < channels; c += lanes)
                transpose_square(rows + s * stride + c, stride, target + c * block + s, block);
        if (whole == block) continue;
        for (int64_t c = 0; c < channels; ++c) {
            for (int64_t s = whole; s < count; ++s) target[c * block + s] = rows[s * stride + c];
            std::fill(target + c * block + count, target + (c + 1) * block, 0.0f);
        }
    }
}

// What belongs to the part of a row of scores in a block of keys.
struct RowPart {
    const float* bias;
    const float* mask;
    int64_t visible;  // only the first so many of the block's keys get probability

    // Where the block is cut off, what lies behind the end of bias and mask is not looked at but replaced by zeros.
    RowPart(const ScoreRule& rule, int64_t item, int64_t query, int64_t first_key, float* buffer)
        : bias(rule.bias(item, query) + first_key), mask(rule.mask(item, query) + first_key),
          visible(std::clamp(rule.visible(query) - first_key, int64_t{0}, block)) {
        if (visible == block) return;
        for (int64_t j = 0; j < block; ++j) buffer[j] = j < visible ? bias[j] + mask[j] : 0.0f;
        std::fill(buffer + block, buffer + 2 * block, 0.0f);
        bias = buffer;
        mask = buffer + block;
    }
};

// Adds bias and mask to the scores [rows, block] of a block of keys, and raises the rows' maxima, in which NaN do not
// count.
void add_bias(const ScoreRule& rule, int64_t item, int64_t first_query, int64_t rows, int64_t first_key, float* scores,
              float* maxima) {
    float buffer[2 * block];
    for (int64_t r = 0; r < rows; ++r, scores += block) {
        const RowPart part(rule, item, first_query + r, first_key, buffer);
        std::fill(scores + part.visible, scores + block, -infinity);
        float maximum = maxima[r];
#pragma omp simd reduction(max : maximum)
        for (int64_t j = 0; j < block; ++j) {
            const float score = scores[j] + (part.bias[j] + part.mask[j]);
            scores[j] = score;
            maximum = score > maximum ? score : maximum;
        }
        maxima[r] = maximum;
    }
}

// What the elements of a row in a block of keys are multiplied by: 0 where they are dropped.
void dropout_factors(const ScoreRule& rule, int64_t row, int64_t first_key, float* factors) {
    const megatron::RandomKey key = megatron::random_key(rule.seed, row);
    const std::uint32_t threshold = rule.dropout.threshold, first = static_cast<std::uint32_t>(first_key);
    for (std::uint32_t j = 0; j < block; ++j)
        factors[j] = (megatron::random_bits(key, first + j) >> 16) < threshold ? 0.0f : rule.dropout.scale;
}

// Exponentials of scores [rows, block] less their maxima, in place, added to the rows' sums; then dropout.
void exponentials(const ScoreRule& rule, int64_t first_row, int64_t rows, int64_t first_key, float* scores,
                  const float* maxima, float* sums) {
    float factors[block];
    for (int64_t r = 0; r < rows; ++r, scores += block) {
        const float maximum = maxima[r];
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < block; ++j) {
            const float value = megatron::exponential_of_negative(scores[j] - maximum);
            scores[j] = value;
            sum += value;
        }
        sums[r] += sum;
        if (!rule.dropout.threshold) continue;
        dropout_factors(rule, first_row + r, first_key, factors);
        for (int64_t j = 0; j < block; ++j) scores[j] *= factors[j];
    }
}

void forward_items(const Problem& problem, int64_t begin, int64_t end, float* memory) {
    const ScoreRule& rule = problem.rule;
    const int64_t channels = problem.channels, keys = rule.keys, blocks = blocks_of(keys);
    Memory buffers{memory};
    float* const keys_across = buffers.take(blocks * block * channels);  // [k / block, d, block]
    float* const values = buffers.take(keys * channels);                 // [k, d]
    float* const query = buffers.take(block * channels);                 // [block, d]
    float* const context = buffers.take(block * channels);               // [block, d]
    float* const scores = buffers.take(blocks * block * block);          // [k / block, block, block]
    float maxima[block], sums[block];
    for (int64_t item = begin; item < end; ++item) {
        const View q = problem.query.head(rule, item), o = problem.context.head(rule, item);
        const View k = problem.key.head(rule, item), v = problem.value.head(rule, item);
        pack_transposed(k.at(0), k.position, keys, channels, keys_across);
        pack_rows(v.at(0), v.position, keys, channels, 1.0f, values);
        for (int64_t first = 0; first < rule.queries; first += block) {
            const int64_t rows = std::min(block, rule.queries - first), visible = rule.visible(first + rows - 1);
            pack_rows(q.at(first), q.position, rows, channels, rule.scale, query);
            std::fill(maxima, maxima + block, -infinity);
            std::fill(sums, sums + block, 0.0f);
            for (int64_t key = 0; key < visible; key += block) {
                float* tile = scores + key * block;
                multiply({query, channels, 1}, keys_across + key * channels, block, tile, block, rows,
                         padded(std::min(block, keys - key)), channels, false);
                add_bias(rule, item, first, rows, key, tile, maxima);
            }
            const int64_t first_row = item * rule.queries + first;
            for (int64_t key = 0; key < visible; key += block) {
                float* tile = scores + key * block;
                exponentials(rule, first_row, rows, key, tile, maxima, sums);
                multiply({tile, block, 1}, values + key * channels, channels, context, channels, rows, channels,
                         std::min(block, keys - key), key > 0);
            }
            for (int64_t r = 0; r < rows; ++r) {
                const float inverse = 1.0f / sums[r];
                problem.statistics[2 * (first_row + r)] = maxima[r];
                problem.statistics[2 * (first_row + r) + 1] = inverse;
                unpack_rows(context + r * channels, 1, channels, inverse, o.at(first + r), 0);
            }
        }
    }
}

// Scores and gradients of probabilities after dropout, both [rows, block], to those probabilities and to gradients of
// scores. `means` are the rows' sums of probability times gradient. With p = exp(score - maximum) / sum and the factor
// f of dropout, the gradient of a score is p * (f * gradient - mean).
void differentiate_scores(const Problem& problem, int64_t item, int64_t first_query, int64_t rows, int64_t first_key,
                          const float* means, float* scores, float* gradients) {
    const ScoreRule& rule = problem.rule;
    float buffer[2 * block], factors[block];
    std::fill(factors, factors + block, 1.0f);
    for (int64_t r = 0; r < rows; ++r, scores += block, gradients += block) {
        const int64_t row = item * rule.queries + first_query + r;
        const RowPart part(rule, item, first_query + r, first_key, buffer);
        const float maximum = problem.statistics[2 * row], inverse = problem.statistics[2 * row + 1], mean = means[r];
        if (rule.dropout.threshold) dropout_factors(rule, row, first_key, factors);
#pragma omp simd
        for (int64_t j = 0; j < block; ++j) {
            const float score = scores[j] + (part.bias[j] + part.mask[j]);
            const float probability = megatron::exponential_of_negative(score - maximum) * inverse;
            scores[j] = probability * factors[j];
            gradients[j] = probability * (factors[j] * gradients[j] - mean);
        }
        std::fill(scores + part.visible, scores + block, 0.0f);
        std::fill(gradients + part.visible, gradients + block, 0.0f);
    }
}

// Adds gradients of scores [rows, block] to the sums along the diagonals. Rows go in steps of a vector: the sums that one
// wrote are then read by the next in the same vectors, which processors do without waiting for the write.
void add_diagonals(const float* gradients, int64_t rows, float* last_row_sums) {
    for (int64_t start = 0; start < lanes; ++start)
        for (int64_t r = start; r < rows; r += lanes) {
            float* sums = last_row_sums + rows - 1 - r;
            for (int64_t j = 0; j < block; ++j) sums[j] += gradients[r * block + j];
        }
}

// Rows of the gradient of the context, packed; the rows' sums of gradient times context, which are those of gradient
// times probability.
void pack_gradient(const View& gradient, const View& context, int64_t first, int64_t rows, int64_t channels,
                   float* packed, float* means) {
    pack_rows(gradient.at(first), gradient.position, rows, channels, 1.0f, packed);
    for (int64_t r = 0; r < rows; ++r) {
        const float* output = context.at(first + r);
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < channels; ++c) sum += packed[r * channels + c] * output[c];
        means[r] = sum;
    }
}

void backward_items(const Problem& problem, int64_t begin, int64_t end, float* memory) {
    const ScoreRule& rule = problem.rule;
    const int64_t d = problem.channels, keys = rule.keys, blocks = blocks_of(keys);
    Memory buffers{memory};
    float* const keys_across = buffers.take(blocks * block * d);    // [k / block, d, block]
    float* const values_across = buffers.take(blocks * block * d);  // [k / block, d, block]
    float* const key = buffers.take(keys * d);                      // [k, d]
    float* const key_gradient = buffers.take(keys * d);             // [k, d]
    float* const value_gradient = buffers.take(keys * d);           // [k, d]
    float* const query = buffers.take(block * d);                   // [block, d]
    float* const gradient = buffers.take(block * d);                // [block, d]
    float* const query_gradient = buffers.take(block * d);          // [block, d]
    float* const scores = buffers.take(block * block);              // [block, block], then probabilities
    float* const scores_gradient = buffers.take(block * block);     // [block, block]
    float* const diagonals = buffers.take(rule.queries + blocks * block);
    float means[block];
    for (int64_t item = begin; item < end; ++item) {
        const View q = problem.query.head(rule, item), k = problem.key.head(rule, item);
        const View v = problem.value.head(rule, item), o = problem.context.head(rule, item);
        const View out = problem.gradient.head(rule, item), dq = problem.query_gradient.head(rule, item);
        const View dk = problem.key_gradient.head(rule, item), dv = problem.value_gradient.head(rule, item);
        pack_transposed(k.at(0), k.position, keys, d, keys_across);
        pack_transposed(v.at(0), v.position, keys, d, values_across);
        pack_rows(k.at(0), k.position, keys, d, 1.0f, key);
        std::fill(key_gradient, key_gradient + keys * d, 0.0f);
        std::fill(value_gradient, value_gradient + keys * d, 0.0f);
        std::fill(diagonals, diagonals + rule.queries + blocks * block, 0.0f);
        for (int64_t first = 0; first < rule.queries; first += block) {
            const int64_t rows = std::min(block, rule.queries - first), visible = rule.visible(first + rows - 1);
            pack_rows(q.at(first), q.position, rows, d, rule.scale, query);
            pack_gradient(out, o, first, rows, d, gradient, means);
            for (int64_t j = 0; j < visible; j += block) {
                const int64_t count = std::min(block, keys - j), columns = padded(count);
                multiply({query, d, 1}, keys_across + j * d, block, scores, block, rows, columns, d, false);
                multiply({gradient, d, 1}, values_across + j * d, block, scores_gradient, block, rows, columns, d,
                         false);
                differentiate_scores(problem, item, first, rows, j, means, scores, scores_gradient);
                if (problem.diagonals)
                    add_diagonals(scores_gradient, rows, diagonals + rule.queries - first - rows + j);
                multiply({scores, 1, block}, gradient, d, value_gradient + j * d, d, count, d, rows, true);
                multiply({scores_gradient, 1, block}, query, d, key_gradient + j * d, d, count, d, rows, true);
                multiply({scores_gradient, block, 1}, key + j * d, d, query_gradient, d, rows, d, count, j > 0);
            }
            unpack_rows(query_gradient, rows, d, rule.scale, dq.at(first), dq.position);
        }
        unpack_rows(key_gradient, keys, d, 1.0f, dk.at(0), dk.position);
        unpack_rows(value_gradient, keys, d, 1.0f, dv.at(0), dv.position);
        if (problem.diagonals)
            std::copy(diagonals, diagonals + rule.diagonals_length(),
                      problem.diagonals + item * rule.diagonals_length());
    }
}
