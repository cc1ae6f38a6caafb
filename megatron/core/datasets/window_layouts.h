// Which tokens the samples of denoising objectives read: epochs of windows over a ring of tokens.
//
// An epoch cuts the ring, from a new random offset, into windows that do not overlap, and takes them in a new random
// order: no token comes twice in it, and fewer than one window is left out. With several denoisers the windows differ in
// length: window j of the ring has the denoiser that a mixture gives position j, and begins behind all windows before
// it, whose numbers the mixture tells without looking at them.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "arrays.h"
#include "mixture_tree.h"
#include "randomness.h"
#include "token_sources.h"

namespace megatron {

constexpr std::int64_t kMaxWindow = std::int64_t{1} << 30;
constexpr std::int64_t kPaddingSample = -1;  // the draw of a row without data
constexpr std::int64_t kNoCut = -1;          // the cut that the example's key decides, or of denoisers that have none

// Uses of a dataset's key that must not share random numbers.
enum class Domain : std::uint64_t { kOffset = 1, kPermutation = 2, kMask = 3, kGroup = 4 };

inline std::uint64_t derive(std::uint64_t key, Domain domain) {
  return derive(key, static_cast<std::uint64_t>(domain));
}

// What is to be denoised, as fill_rows takes it.
struct Example {
  std::int64_t row, dataset, start, length, denoiser, cut;
};
static_assert(sizeof(Example) == 6 * sizeof(std::int64_t));

class WindowLayouts {
 public:
  WindowLayouts(const Int64Array& ranges, const UInt64Array& keys, const Int64Array& window_lengths,
                const UInt64Array& fractions, const Int32Array& children, std::int64_t block_windows)
      : lengths_(vector_of(window_lengths, "window_lengths")), tree_(fractions, children), block_(block_windows) {
    require(tree_.has_only_leaves_below(static_cast<std::int64_t>(lengths_.size())), "a leaf has no window length");
    require(block_ >= 1 && block_ <= kMaxWindow, "block_windows must lie between 1 and 2^30");
    for (const std::int64_t length : lengths_) {
      require(length >= 1 && length <= kMaxWindow, "a window must have between 1 and 2^30 tokens");
    }
    const auto rings = token_ranges(ranges);
    const auto ring_keys = vector_of(keys, "keys");
    require(rings.size() == ring_keys.size(), "there must be one key for each range");
    for (std::size_t i = 0; i < rings.size(); ++i) {
      const std::int64_t windows = windows_that_fit(rings[i].size());
      require(windows >= 1, "a window does not fit into the token range of " + std::to_string(rings[i].size()));
      rings_.emplace_back(rings[i], ring_keys[i], windows, windows / block_);
    }
  }

  // Windows of an epoch, one number a dataset.
  std::vector<std::int64_t> windows_per_epoch() const {
    std::vector<std::int64_t> windows;
    for (const Ring& ring : rings_) windows.push_back(ring.windows);
    return windows;
  }

  std::int64_t size() const { return static_cast<std::int64_t>(rings_.size()); }

  // The windows of these draws and the keys of their masks; of `whole_blocks`, all of the block that a window is in.
  // Draws of one dataset in a row are cheaper than others.
  void windows(const std::vector<std::int32_t>& datasets, const std::vector<std::int64_t>& draws, bool whole_blocks,
               Example* examples, std::uint64_t* keys) const {
    Order order;
    std::vector<std::uint64_t> scratch(tree_.num_nodes());
    for (std::size_t row = 0; row < draws.size(); ++row) {
      if (draws[row] == kPaddingSample) continue;
      const Ring& ring = rings_[static_cast<std::size_t>(datasets[row])];
      const std::int64_t epoch = draws[row] / ring.windows;
      if (order.ring != &ring || order.epoch != epoch) order = Order(ring, epoch);
      const std::int64_t window = window_at(order, draws[row] - epoch * ring.windows);
      auto draw_of_denoiser = static_cast<std::uint64_t>(window);
      const std::int32_t denoiser = tree_.leaf(draw_of_denoiser);
      const std::int64_t first = whole_blocks ? window - window % block_ : window;
      const Wide begin = extent(first, scratch);
      std::int64_t length = lengths_[static_cast<std::size_t>(denoiser)];
      if (whole_blocks) {
        length = static_cast<std::int64_t>(extent(std::min(first + block_, ring.windows), scratch) - begin);
      }
      // Neither sum overflows: both numbers are at most 2^62.
      std::int64_t position = order.offset + static_cast<std::int64_t>(begin);
      if (position >= ring.range.size()) position -= ring.range.size();
      const std::int64_t start = ring.range.begin + position;
      *examples++ = {static_cast<std::int64_t>(row), datasets[row], start, length, denoiser, kNoCut};
      *keys++ = derive(ring.mask_key, static_cast<std::uint64_t>(draws[row]));
    }
  }

 private:
  __extension__ using Wide = unsigned __int128;
  static constexpr std::int64_t kGroupBlocks = 256;  // blocks whose windows are shuffled together

  struct Ring {
    Ring(const TokenRange& tokens, std::uint64_t ring_key, std::int64_t num_windows, std::int64_t num_blocks)
        : range(tokens),
          key(ring_key),
          mask_key(derive(ring_key, Domain::kMask)),
          windows(num_windows),
          blocks(num_blocks),
          block_order(static_cast<std::uint64_t>(std::max<std::int64_t>(num_blocks, 1))) {}

    TokenRange range;
    std::uint64_t key, mask_key;
    std::int64_t windows, blocks;
    Permutation block_order;
  };

  // Offset and order of an epoch of a ring.
  struct Order {
    Order() = default;
    Order(const Ring& of_ring, std::int64_t of_epoch) : ring(&of_ring), epoch(of_epoch), blocks(of_ring.block_order) {
      const auto number = static_cast<std::uint64_t>(epoch);
      Random random(derive(derive(ring->key, Domain::kOffset), number));
      offset = static_cast<std::int64_t>(random.below_wide(static_cast<std::uint64_t>(ring->range.size())));
      blocks.set_key(derive(derive(ring->key, Domain::kPermutation), number));
    }

    const Ring* ring = nullptr;
    std::int64_t epoch = -1;
    std::int64_t offset = 0;
    Permutation blocks{1};
    std::int64_t group = -1;
    Permutation within_group{1};
  };

  // The window at a place of the epoch's order. Blocks of neighbouring windows come in random order, and the windows of
  // each kGroupBlocks of them are shuffled; what is less than a block comes last, shuffled too.
  std::int64_t window_at(Order& order, std::int64_t place) const {
    if (block_ == 1) return static_cast<std::int64_t>(order.blocks(static_cast<std::uint64_t>(place)));
    const std::int64_t in_blocks = order.ring->blocks * block_;
    const std::int64_t group = place < in_blocks ? place / (kGroupBlocks * block_) : order.ring->blocks;
    const std::int64_t first = place < in_blocks ? group * kGroupBlocks * block_ : in_blocks;
    if (order.group != group) {
      const std::int64_t end = place < in_blocks ? std::min(first + kGroupBlocks * block_, in_blocks)
                                                 : order.ring->windows;
      order.within_group = Permutation(static_cast<std::uint64_t>(end - first));
      const std::uint64_t epoch_key = derive(derive(order.ring->key, Domain::kGroup),
                                             static_cast<std::uint64_t>(order.epoch));
      order.within_group.set_key(derive(epoch_key, static_cast<std::uint64_t>(group)));
      order.group = group;
    }
    place = first + static_cast<std::int64_t>(order.within_group(static_cast<std::uint64_t>(place - first)));
    if (place >= in_blocks) return place;
    const auto block = static_cast<std::int64_t>(order.blocks(static_cast<std::uint64_t>(place / block_)));
    return block * block_ + place % block_;
  }

  // Tokens of the first `windows` windows of a ring.
  Wide extent(std::int64_t windows, std::vector<std::uint64_t>& scratch) const {
    Wide tokens = 0;
    tree_.counts(static_cast<std::uint64_t>(windows), scratch, [&](std::int32_t denoiser, std::uint64_t count) {
      tokens += static_cast<Wide>(count) * static_cast<std::uint64_t>(lengths_[static_cast<std::size_t>(denoiser)]);
    });
    return tokens;
  }

  std::int64_t windows_that_fit(std::int64_t num_tokens) const {
    std::vector<std::uint64_t> scratch(tree_.num_nodes());
    std::int64_t fit = 0;
    std::int64_t too_many = num_tokens / *std::min_element(lengths_.begin(), lengths_.end()) + 1;
    while (too_many - fit > 1) {
      const std::int64_t middle = fit + (too_many - fit) / 2;
      (extent(middle, scratch) <= static_cast<Wide>(num_tokens) ? fit : too_many) = middle;
    }
    return fit;
  }

  std::vector<std::int64_t> lengths_;  // tokens of a window of each denoiser
  MixtureTree tree_;
  std::int64_t block_;
  std::vector<Ring> rings_;
};

}  // namespace megatron
