// What becomes of attention scores on their way to probabilities: a scale, what is added, what is dropped.
//
// Shapes: b batch, n heads, q queries, k keys; an item is one of b n.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "random_bits.h"

namespace megatron {

class ScoreRule {
   public:
    const std::int64_t batch, heads, queries, keys;
    const bool causal;
    const float scale;
    const std::uint64_t seed;
    const DropoutRate dropout;

    ScoreRule(std::int64_t batch, std::int64_t heads, std::int64_t queries, std::int64_t keys, bool causal, float scale,
              std::uintptr_t diagonals, std::uintptr_t mask, std::int64_t mask_batch_stride,
              std::int64_t mask_head_stride, std::int64_t mask_query_stride, std::uint64_t seed, double dropout)
        : batch(batch), heads(heads), queries(queries), keys(keys), causal(causal), scale(scale), seed(seed),
          dropout(dropout_rate(dropout)), diagonals_(reinterpret_cast<const float*>(diagonals)),
          mask_(reinterpret_cast<const float*>(mask)), mask_batch_stride_(mask_batch_stride),
          mask_head_stride_(mask_head_stride), mask_query_stride_(mask_query_stride) {
        if (batch < 0 || heads <= 0 || queries <= 0 || keys <= 0)
            throw std::invalid_argument("sizes of scores must be positive");
        if (!(dropout >= 0.0 && dropout < 1.0)) throw std::invalid_argument("dropout must be in [0, 1)");
        zeros_.assign(keys, 0.0f);
    }

    std::int64_t items() const { return batch * heads; }
    std::int64_t rows() const { return items() * queries; }
    std::int64_t diagonals_length() const { return queries + keys - 1; }
    // Number of keys that a query may see.
    std::int64_t visible(std::int64_t query) const { return causal ? std::min(query + 1, keys) : keys; }
    // What is added to the scores of a query, by key.
    const float* bias(std::int64_t item, std::int64_t query) const {
        if (!diagonals_) return zeros_.data();
        return diagonals_ + item % heads * diagonals_length() + queries - 1 - query;
    }
    bool has_mask() const { return mask_ != nullptr; }
    const float* mask(std::int64_t item, std::int64_t query) const {
        if (!mask_) return zeros_.data();
        return mask_ + item / heads * mask_batch_stride_ + item % heads * mask_head_stride_ +
               query * mask_query_stride_;
    }
    // The gradient of the bias, [n, q + k - 1]: the items' sums along the diagonals, [b n, q + k - 1], over the batch.
    void sum_over_batch(const float* sums, float* total) const {
        const std::int64_t length = diagonals_length();
        std::fill(total, total + heads * length, 0.0f);
        for (std::int64_t item = 0; item < items(); ++item) {
            float* target = total + item % heads * length;
            for (std::int64_t j = 0; j < length; ++j) target[j] += sums[item * length + j];
        }
    }

   private:
    const float* const diagonals_;  // [n, q + k - 1] by ascending key - query, or null
    const float* const mask_;       // additive, or null
    const std::int64_t mask_batch_stride_, mask_head_stride_, mask_query_stride_;
    std::vector<float> zeros_;  // [k], in place of what is null: one loop for all cases
};

}  // namespace megatron
