// The tokens of corpora, read as rings: each corpus is one array or several end to end, of any integer type that
// indexed datasets use, and a part of it is joined end to start.

#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "arrays.h"

namespace megatron {

constexpr std::int64_t kMaxTokens = std::int64_t{1} << 62;

class TokenOutOfVocabulary : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// [begin, end) in tokens of a corpus.
struct TokenRange {
  std::int64_t begin, end;
  std::int64_t size() const { return end - begin; }
};

inline std::vector<TokenRange> token_ranges(const Int64Array& array) {
  const auto bounds = table_of(array, 2, "ranges");
  std::vector<TokenRange> ranges;
  for (std::size_t i = 0; i < bounds.size(); i += 2) {
    const TokenRange range{bounds[i], bounds[i + 1]};
    require(range.begin >= 0 && range.begin < range.end && range.end <= kMaxTokens,
            "the token range [" + std::to_string(range.begin) + ", " + std::to_string(range.end) +
                ") is empty or out of bounds");
    ranges.push_back(range);
  }
  return ranges;
}

// Copies tokens as int32; false if one is outside [0, vocab_size). Branch-free, so that compilers vectorise it: the
// sign bit of `flags` ends up set if any id is negative or above the last one.
template <typename Token>
bool widen(const void* tokens, std::int64_t count, std::int64_t vocab_size, std::int32_t* to) {
  using Wide = std::conditional_t<(sizeof(Token) > 4), std::uint64_t, std::uint32_t>;
  const auto* from = static_cast<const Token*>(tokens);
  const auto last_id = static_cast<Wide>(vocab_size - 1);
  Wide flags = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto id = static_cast<Wide>(from[i]);
    flags |= id | (last_id - id);
    to[i] = static_cast<std::int32_t>(id);
  }
  return flags >> (8 * sizeof(Wide) - 1) == 0;
}

template <typename Token>
std::int64_t token_at(const void* tokens, std::int64_t index) {
  return static_cast<std::int64_t>(static_cast<const Token*>(tokens)[index]);
}

// What differs between the element types.
struct TokenType {
  bool (*widen)(const void*, std::int64_t, std::int64_t, std::int32_t*) = nullptr;
  std::int64_t (*at)(const void*, std::int64_t) = nullptr;
  bool operator==(const TokenType& other) const { return widen == other.widen; }
};

template <typename... Tokens>
TokenType type_among(const py::array& array) {
  TokenType type;
  ((py::isinstance<py::array_t<Tokens>>(array) ? (type = {&widen<Tokens>, &token_at<Tokens>}, true) : false) || ...);
  return type;
}

class TokenSources {
 public:
  TokenSources(const std::vector<std::vector<py::array>>& corpora, const Int64Array& ranges, std::int64_t vocab_size,
               std::vector<std::string> names)
      : ranges_(token_ranges(ranges)), vocab_size_(vocab_size), names_(std::move(names)) {
    require(vocab_size >= 1 && vocab_size < (std::int64_t{1} << 31),
            "vocab_size is " + std::to_string(vocab_size) + "; it must lie between 1 and 2^31 - 1");
    require(corpora.size() == ranges_.size(), "there must be one token range for each corpus");
    require(names_.empty() || names_.size() == corpora.size(), "there must be one name for each corpus, or none");
    for (std::size_t i = 0; i < corpora.size(); ++i) {
      corpora_.emplace_back(corpora[i]);
      require(ranges_[i].end <= corpora_[i].ends.back(),
              "the token range ends at " + std::to_string(ranges_[i].end) + ", but there are " +
                  std::to_string(corpora_[i].ends.back()) + " tokens");
    }
  }

  std::int64_t size() const { return static_cast<std::int64_t>(corpora_.size()); }
  std::int64_t vocab_size() const { return vocab_size_; }
  const TokenRange& range(std::int64_t dataset) const { return ranges_[static_cast<std::size_t>(dataset)]; }

  // Whether the range has a run of `count` tokens from `start` on; a run wraps from its end to its beginning.
  bool contains(std::int64_t dataset, std::int64_t start, std::int64_t count) const {
    const TokenRange& ring = range(dataset);
    return start >= ring.begin && start < ring.end && count <= ring.size();
  }

  // Copies such a run as int32; refuses ids outside the vocabulary.
  void read(std::int64_t dataset, std::int64_t start, std::int64_t count, std::int32_t* to) const {
    bool valid = true;
    each_run(dataset, start, count, [&](const Corpus& corpus, const char* from, std::int64_t length) {
      valid &= corpus.type.widen(from, length, vocab_size_, to);
      to += length;
    });
    if (!valid) report(dataset, start, count);
  }

  // Asks for the cache lines of a run that is read soon; examples are in random order, so no hardware would.
  void prefetch(std::int64_t dataset, std::int64_t start, std::int64_t count) const {
    each_run(dataset, start, count, [](const Corpus& corpus, const char* from, std::int64_t length) {
      const char* end = from + length * corpus.item_size;
      for (; from < end; from += 64) __builtin_prefetch(from);
    });
  }

  // Asks for the pages of a run from the disk, without waiting: the reads of a batch then go on beside each other.
  void will_need(std::int64_t dataset, std::int64_t start, std::int64_t count) const {
    each_run(dataset, start, count, [](const Corpus& corpus, const char* from, std::int64_t length) {
      advise(from, length * corpus.item_size, MADV_WILLNEED);
    });
  }

  // Tells the system that a read says nothing about the next one, so that it reads no megabytes around each.
  void expect_random_reads() const {
    for (const Corpus& corpus : corpora_) {
      for (const auto& piece : corpus.pieces) {
        advise(static_cast<const char*>(piece.data()), static_cast<std::int64_t>(piece.nbytes()), MADV_RANDOM);
      }
    }
  }

 private:
  // Advice for the pages that hold these bytes; it changes no results, so that a refusal does not matter.
  static void advise(const char* from, std::int64_t size, int advice) {
    const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
    const auto begin = reinterpret_cast<std::uintptr_t>(from) / page * page;
    ::madvise(reinterpret_cast<void*>(begin), reinterpret_cast<std::uintptr_t>(from) + size - begin, advice);
  }

  // Arrays end to end, those without tokens left out.
  struct Corpus {
    explicit Corpus(const std::vector<py::array>& arrays) {
      std::int64_t total = 0;
      for (const auto& array : arrays) {
        require(array.ndim() == 1 && (array.flags() & py::array::c_style), "tokens must be a contiguous vector");
        const TokenType found =
            type_among<std::uint8_t, std::int8_t, std::int16_t, std::int32_t, std::int64_t, std::uint16_t>(array);
        require(found.widen != nullptr,
                "tokens must be uint8, int8, int16, uint16, int32 or int64 in native byte order");
        require(type.widen == nullptr || type == found, "the pieces of a corpus must have tokens of one type");
        require_aligned(array, "tokens");
        type = found;
        item_size = array.itemsize();
        if (array.size() == 0) continue;
        total += array.size();
        pieces.push_back(array);
        starts.push_back(static_cast<const char*>(array.data()));
        ends.push_back(total);
      }
      require(!pieces.empty(), "a corpus has no tokens");
    }

    std::vector<py::array> pieces;  // keeps them alive
    std::vector<const char*> starts;
    std::vector<std::int64_t> ends;  // in tokens of the corpus
    TokenType type;
    std::int64_t item_size = 1;
  };

  // Calls visit(corpus, address, length) for the contiguous runs that make up tokens [start, start + count) of a ring.
  template <typename Visit>
  void each_run(std::int64_t dataset, std::int64_t start, std::int64_t count, Visit&& visit) const {
    const Corpus& corpus = corpora_[static_cast<std::size_t>(dataset)];
    const TokenRange& ring = range(dataset);
    while (count > 0) {
      const auto piece = std::upper_bound(corpus.ends.begin(), corpus.ends.end(), start) - corpus.ends.begin();
      const std::int64_t piece_begin = piece == 0 ? 0 : corpus.ends[piece - 1];
      const std::int64_t length = std::min(count, std::min(corpus.ends[piece], ring.end) - start);
      visit(corpus, corpus.starts[piece] + (start - piece_begin) * corpus.item_size, length);
      count -= length;
      start += length;
      if (start == ring.end) start = ring.begin;
    }
  }

  [[noreturn]] void report(std::int64_t dataset, std::int64_t start, std::int64_t count) const {
    const TokenRange& ring = range(dataset);
    each_run(dataset, start, count, [&](const Corpus& corpus, const char* from, std::int64_t length) {
      for (std::int64_t i = 0; i < length; ++i) {
        const std::int64_t id = corpus.type.at(from, i);
        if (id < 0 || id >= vocab_size_) {
          const std::string name = names_.empty() ? "" : names_[static_cast<std::size_t>(dataset)] + ": ";
          throw TokenOutOfVocabulary(name + "token id " + std::to_string(id) + " at token offset " +
                                     std::to_string(start + i) + " is outside the vocabulary of " +
                                     std::to_string(vocab_size_) + " ids");
        }
      }
      start += length;
      if (start == ring.end) start = ring.begin;
    });
    throw std::runtime_error("the tokens changed while they were read");
  }

  std::vector<Corpus> corpora_;
  std::vector<TokenRange> ranges_;
  std::int64_t vocab_size_;
  std::vector<std::string> names_;
};

}  // namespace megatron
