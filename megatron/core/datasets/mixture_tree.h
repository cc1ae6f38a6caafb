// Which leaf of a mixture (mixture.py) gives position k of its stream, and what the leaves gave before.

#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "arrays.h"

namespace megatron {

// A binary tree over the datasets. Each node deals its draws to two children so that after k of them the left one has
// had k * fraction, rounded: no draw needs to know those before it.
class MixtureTree {
 public:
  MixtureTree(const UInt64Array& fractions, const Int32Array& children)
      : fractions_(vector_of(fractions, "fractions")), children_(table_of(children, 2, "children")) {
    require(children_.size() == 2 * fractions_.size(), "fractions must be [n] and children [n, 2]");
    const auto num_nodes = static_cast<std::int64_t>(fractions_.size());
    for (std::size_t i = 0; i < children_.size(); ++i) {
      const std::int64_t child = children_[i];
      require(child < 0 || (child > static_cast<std::int64_t>(i / 2) && child < num_nodes),
              "children must follow parents");
    }
  }

  std::size_t num_nodes() const { return fractions_.size(); }

  // Whether every leaf is one of [0, num_leaves).
  bool has_only_leaves_below(std::int64_t num_leaves) const {
    for (const std::int32_t child : children_) {
      if (child < 0 && ~child >= num_leaves) return false;
    }
    return num_leaves >= 1;
  }

  // Leaf of draw `position` >= 0, which becomes the number of draws that the leaf had before.
  std::int32_t leaf(std::uint64_t& position) const {
    if (fractions_.empty()) return 0;
    std::int32_t node = 0;
    do {
      const auto index = static_cast<std::size_t>(node);
      const std::uint64_t fraction = fractions_[index];
      const Wide product = lefts(position, fraction);
      const auto before = static_cast<std::uint64_t>(product >> 64);
      // The left child is next when adding the fraction carries.
      const bool left = static_cast<std::uint64_t>(product) + fraction < fraction;
      position = left ? before : position - before;
      node = children_[2 * index + (left ? 0 : 1)];
    } while (node >= 0);
    return ~node;
  }

  // Calls visit(leaf, draws) with the draws of each leaf before `position`. `passed` is scratch, num_nodes() elements.
  template <typename Visit>
  void counts(std::uint64_t position, std::vector<std::uint64_t>& passed, Visit&& visit) const {
    if (fractions_.empty()) {
      visit(std::int32_t{0}, position);
      return;
    }
    passed[0] = position;
    for (std::size_t node = 0; node < fractions_.size(); ++node) {
      const auto left = static_cast<std::uint64_t>(lefts(passed[node], fractions_[node]) >> 64);
      for (const auto& [child, count] : {std::pair{children_[2 * node], left},
                                         std::pair{children_[2 * node + 1], passed[node] - left}}) {
        if (child < 0) {
          visit(~child, count);
        } else {
          passed[static_cast<std::size_t>(child)] = count;
        }
      }
    }
  }

 private:
  __extension__ using Wide = unsigned __int128;

  // Draws of the left child among the first `position` of a node, plus 1/2 for rounding, in units of 2^-64.
  static Wide lefts(std::uint64_t position, std::uint64_t fraction) {
    return static_cast<Wide>(position) * fraction + (static_cast<Wide>(1) << 63);
  }

  std::vector<std::uint64_t> fractions_;
  std::vector<std::int32_t> children_;
};

}  // namespace megatron
