// How a run of tokens becomes inputs and targets: the three kinds of denoiser of denoising.py.
//
//   1. Denoisers      how many tokens go where             (as Denoiser.lengths there, to the last bit)
//   2. SpanMask       which of them are noise              (Raffel et al. 2020, section 3.1.4; random spans)
//   3. Emitter        inputs and targets of one example    (mode, sentinels, EOS)
//
// Everything is a pure function of (tokens, denoiser, key), in unsigned integer arithmetic but for the lengths, whose
// two roundings IEEE 754 defines, so that a sample is the same on every platform, compiler, batch size and rank count.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "arrays.h"
#include "randomness.h"
#include "window_layouts.h"

namespace megatron {

// ---------------------------------------------------------------------------------------------------------
// Step 1: lengths

// Token counts of a denoised example.
struct Lengths {
  std::int64_t raw, inputs, targets, noise, spans;
};

class Denoisers {
 public:
  Denoisers(const Array<double>& table, const std::vector<Int32Array>& mode_ids, const Int32Array& sentinels,
            std::int64_t eos, std::int64_t pad, std::int64_t decoder_start, std::int64_t vocabulary)
      : sentinel_ids(vector_of(sentinels, "sentinel_ids")),
        eos_id(static_cast<std::int32_t>(eos)),
        pad_id(static_cast<std::int32_t>(pad)),
        decoder_start_id(static_cast<std::int32_t>(decoder_start)),
        vocab_size(vocabulary) {
    require(vocab_size >= 1 && vocab_size < (std::int64_t{1} << 31),
            "vocab_size is " + std::to_string(vocab_size) + "; it must lie between 1 and 2^31 - 1");
    require_id(pad, "pad_id");
    require_id(eos, "eos_id");
    require_id(decoder_start, "decoder_start_id");
    for (const std::int32_t id : sentinel_ids) require_id(id, "a sentinel id");
    const auto numbers = table_of(table, 2, "table");
    require(numbers.size() == 2 * mode_ids.size(), "there must be one list of mode ids for each denoiser");
    for (std::size_t i = 0; i < mode_ids.size(); ++i) {
      Kind kind{numbers[2 * i], numbers[2 * i + 1], vector_of(mode_ids[i], "mode_ids")};
      for (const std::int32_t id : kind.mode_ids) require_id(id, "a mode id");
      require(kind.mode_ids.size() <= 1 << 16, "a mode must have at most 2^16 ids");
      const bool prefix = kind.mean_span == 0.0;
      require(prefix || (kind.mean_span >= 1.0 && std::isfinite(kind.mean_span)),
              "a mean span length must be 0 or at least 1");
      require((kind.density > 0.0 && kind.density < 1.0) || (prefix && kind.density == 0.0),
              "a noise density must lie between 0 and 1, or be 0 with a mean span length of 0");
      kinds_.push_back(std::move(kind));
    }
  }

  std::int64_t size() const { return static_cast<std::int64_t>(kinds_.size()); }
  const std::vector<std::int32_t>& mode_ids(std::int64_t denoiser) const { return kind(denoiser).mode_ids; }

  // Whether the text is cut at a random place.
  bool is_uniform(std::int64_t denoiser) const { return kind(denoiser).density == 0.0; }

  // Refuses what `lengths` and `random_cut` cannot do.
  void check(std::int64_t denoiser, std::int64_t raw, std::int64_t cut) const {
    require(denoiser >= 0 && denoiser < size(), "there is no such denoiser");
    require(raw >= 2 && raw <= kMaxWindow, "an example must have between 2 and 2^30 tokens");
    require(cut == kNoCut || (is_uniform(denoiser) && cut >= 1 && cut < raw),
            "a cut must lie inside the example and be for a denoiser without a density");
  }

  // Without a cut (-1), those of the uniform kind are the most inputs and the most targets that there may be.
  Lengths lengths(std::int64_t denoiser, std::int64_t raw, std::int64_t cut) const {
    const Kind& kind = this->kind(denoiser);
    const auto mode = static_cast<std::int64_t>(kind.mode_ids.size());
    if (kind.density == 0.0) {
      if (cut == kNoCut) return {raw, mode + raw, raw, raw - 1, 0};
      return {raw, mode + cut + 1, raw - cut + 1, raw - cut, 0};
    }
    const auto tokens = static_cast<double>(raw);
    const std::int64_t noise = std::min(std::max<std::int64_t>(rounded(tokens * kind.density), 1), raw - 1);
    std::int64_t spans = 0;
    if (kind.mean_span != 0.0) {
      const std::int64_t wanted = rounded(static_cast<double>(noise) / kind.mean_span);
      spans = std::min(std::max<std::int64_t>(wanted, 1), raw - noise);
    }
    return {raw, mode + raw - noise + spans + 1, noise + spans + 1, noise, spans};
  }

  // Tokens of the beginning, uniform on 1 .. raw - 1; -1 for denoisers of another kind.
  std::int64_t random_cut(std::int64_t denoiser, std::int64_t raw, std::uint64_t key) const {
    if (!is_uniform(denoiser)) return kNoCut;
    return 1 + static_cast<std::int64_t>(Random(key).below(static_cast<std::uint32_t>(raw - 1)));
  }

  const std::vector<std::int32_t> sentinel_ids;
  const std::int32_t eos_id, pad_id, decoder_start_id;
  const std::int64_t vocab_size;

 private:
  struct Kind {
    double mean_span, density;  // 0: a prefix; 0: cut at a random place
    std::vector<std::int32_t> mode_ids;
  };

  const Kind& kind(std::int64_t denoiser) const { return kinds_[static_cast<std::size_t>(denoiser)]; }

  // Half to even, as Python does, and whatever rounding mode the process is in.
  static std::int64_t rounded(double value) {
    const double floor = std::floor(value);
    const auto below = static_cast<std::int64_t>(floor);
    const double rest = value - floor;  // exact
    return below + (rest > 0.5 || (rest == 0.5 && below % 2 != 0));
  }

  void require_id(std::int64_t id, const char* name) const {
    if (id >= 0 && id < vocab_size) return;
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(id) + ", outside the vocabulary of " +
                                std::to_string(vocab_size) + " ids");
  }

  std::vector<Kind> kinds_;
};

// ---------------------------------------------------------------------------------------------------------
// Step 2: spans

// Splits items into non-empty segments, uniformly over all ways to do so.
class RandomComposition {
 public:
  void reserve(std::int64_t items, std::int64_t segments) {
    lengths_.resize(std::max(lengths_.size(), static_cast<std::size_t>(segments)));
    bitmap_.resize(std::max(bitmap_.size(), static_cast<std::size_t>(items + 63) / 64));
  }

  // Draws the cuts, segments - 1 of the items - 1 gaps, by Floyd's sampling (Bentley and Floyd 1987) into a
  // bitmap, which sorts them.
  void draw(std::uint32_t items, std::uint32_t segments, Random& random) {
    const std::uint32_t words = (items + 63) / 64;
    std::fill_n(bitmap_.begin(), words, 0);
    for (std::uint32_t last = items - segments; last < items - 1; ++last) {
      const std::uint32_t gap = random.below(last + 1);
      const auto taken = static_cast<std::uint32_t>(bitmap_[gap / 64] >> (gap % 64) & 1);
      const std::uint32_t cut = gap + taken * (last - gap);  // taken ? last : gap, without a branch
      bitmap_[cut / 64] |= std::uint64_t{1} << (cut % 64);
    }
    std::uint32_t segment = 0;
    std::uint32_t previous = 0;
    for (std::uint32_t word = 0; word < words; ++word) {
      for (std::uint64_t bits = bitmap_[word]; bits != 0; bits &= bits - 1) {
        const std::uint32_t cut = word * 64 + static_cast<std::uint32_t>(__builtin_ctzll(bits)) + 1;
        lengths_[segment++] = cut - previous;
        previous = cut;
      }
    }
    lengths_[segment] = items - previous;
  }

  std::uint32_t operator[](std::size_t segment) const { return lengths_[segment]; }

 private:
  std::vector<std::uint32_t> lengths_;
  std::vector<std::uint64_t> bitmap_;
};

// Alternating runs of kept and of noise tokens, kept first: the first token is never noise, the last always is.
struct SpanMask {
  void reserve(const Lengths& lengths) {
    noise.reserve(lengths.noise, lengths.spans);
    kept.reserve(lengths.raw - lengths.noise, lengths.spans);
  }

  void draw(const Lengths& lengths, Random random) {
    const auto spans = static_cast<std::uint32_t>(lengths.spans);
    noise.draw(static_cast<std::uint32_t>(lengths.noise), spans, random);
    kept.draw(static_cast<std::uint32_t>(lengths.raw - lengths.noise), spans, random);
  }

  RandomComposition kept, noise;
};

// ---------------------------------------------------------------------------------------------------------
// Step 3: inputs and targets

// Copies whole chunks, so `to` and `from` need kChunk - 1 elements of slack. Runs are short and of random
// length; fixed-size copies spare most of the branches that nobody can predict.
template <std::size_t kChunk>
inline std::int32_t* copy_run(std::int32_t* to, const std::int32_t* from, std::uint32_t count) {
  for (std::uint32_t i = 0; i < count; i += kChunk) std::memcpy(to + i, from + i, kChunk * sizeof(std::int32_t));
  return to + count;
}

// Buffers for the tokens of one example and for what becomes of them.
class Emitter {
 public:
  explicit Emitter(const Denoisers& denoisers) : denoisers_(denoisers) {}

  // Makes room for examples with these lengths.
  void reserve(const Lengths& lengths) {
    grow(tokens_, lengths.raw);
    grow(inputs_, lengths.inputs);
    grow(targets_, lengths.targets);
    if (lengths.spans > 0) mask_.reserve(lengths);
  }

  std::int32_t* tokens() { return tokens_.data(); }
  const std::int32_t* inputs() const { return inputs_.data(); }
  const std::int32_t* targets() const { return targets_.data(); }

  // Makes inputs and targets of the tokens.
  void emit(std::int64_t denoiser, const Lengths& lengths, std::uint64_t key) {
    const auto& mode = denoisers_.mode_ids(denoiser);
    std::int32_t* input = std::copy(mode.begin(), mode.end(), inputs_.data());
    if (lengths.spans == 0) {
      const std::int32_t* cut = tokens_.data() + (lengths.raw - lengths.noise);
      *std::copy(static_cast<const std::int32_t*>(tokens_.data()), cut, input) = denoisers_.eos_id;
      *std::copy_n(cut, lengths.noise, targets_.data()) = denoisers_.eos_id;
      return;
    }
    mask_.draw(lengths, Random(key));
    // Chunks about twice as long as the mean run: longer ones cost more than the branches that they spare.
    const bool long_kept = lengths.raw - lengths.noise > 8 * lengths.spans;
    const bool long_noise = lengths.noise > 8 * lengths.spans;
    if (long_kept) {
      long_noise ? emit_spans<kSlack, kSlack>(input, lengths.spans) : emit_spans<kSlack, 8>(input, lengths.spans);
    } else {
      long_noise ? emit_spans<8, kSlack>(input, lengths.spans) : emit_spans<8, 8>(input, lengths.spans);
    }
  }

 private:
  static constexpr std::size_t kSlack = 32;

  static void grow(std::vector<std::int32_t>& buffer, std::int64_t count) {
    buffer.resize(std::max(buffer.size(), static_cast<std::size_t>(count) + kSlack));
  }

  template <std::size_t kKeptChunk, std::size_t kNoiseChunk>
  void emit_spans(std::int32_t* input, std::int64_t spans) {
    const std::int32_t* token = tokens_.data();
    std::int32_t* target = targets_.data();
    for (std::size_t span = 0; span < static_cast<std::size_t>(spans); ++span) {
      input = copy_run<kKeptChunk>(input, token, mask_.kept[span]);
      token += mask_.kept[span];
      *input++ = *target++ = denoisers_.sentinel_ids[span];
      target = copy_run<kNoiseChunk>(target, token, mask_.noise[span]);
      token += mask_.noise[span];
    }
    *input = *target = denoisers_.eos_id;
  }

  const Denoisers& denoisers_;
  SpanMask mask_;
  std::vector<std::int32_t> tokens_, inputs_, targets_;
};

}  // namespace megatron
