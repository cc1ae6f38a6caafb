// What mixing datasets and packing their examples into rows takes:
//
//   mixture_draws     which dataset gives stream position k, and its how-manieth draw that is
//   shuffled          which example that draw is       (keyed permutation of the dataset in each of its epochs)
//   cut_documents     the pieces of documents, each of which is an example
//   first_fit         which row an example goes to
//   example_spans     where an example's tokens are
//   fill_packed_rows  T5 batches of such rows
//
// Nothing here may change what an existing seed gives: checkpoints count on it, and tests pin it. Wrong arguments
// throw std::invalid_argument (ValueError in Python). All functions release the GIL.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "arrays.h"
#include "mixture_tree.h"
#include "randomness.h"

namespace py = pybind11;

namespace {

constexpr std::int32_t kIgnoredLabel = -100;  // what the loss leaves out

using megatron::Int32Array;
using megatron::Int64Array;
using megatron::MixtureTree;
using megatron::require;
using megatron::UInt64Array;

// ---------------------------------------------------------------------------------------------------------
// Mixture

void require_not_negative(const Int64Array& values, const char* name) {
  require(values.ndim() == 1, std::string(name) + " must have one dimension");
  require(std::all_of(values.data(), values.data() + values.size(), [](std::int64_t value) { return value >= 0; }),
          std::string(name) + " must not be negative");
}

py::tuple mixture_draws(const UInt64Array& fractions, const Int32Array& children, const Int64Array& positions) {
  const MixtureTree tree(fractions, children);
  require_not_negative(positions, "positions");
  const auto count = positions.size();
  Int32Array leaves(count);
  Int64Array draws(count);
  const std::int64_t* from = positions.data();
  std::int32_t* leaf = leaves.mutable_data();
  std::int64_t* draw = draws.mutable_data();
  {
    py::gil_scoped_release without_gil;
    for (py::ssize_t i = 0; i < count; ++i) {
      auto position = static_cast<std::uint64_t>(from[i]);
      leaf[i] = tree.leaf(position);
      draw[i] = static_cast<std::int64_t>(position);
    }
  }
  return py::make_tuple(leaves, draws);
}

// Examples of one dataset, in another order in each of its epochs.
class ShuffledDataset {
 public:
  ShuffledDataset(std::int64_t size, std::uint64_t key)
      : size_(size), key_(key), permutation_(static_cast<std::uint64_t>(size)) {}

  std::int64_t example(std::int64_t draw) {
    const std::int64_t epoch = draw / size_;
    if (epoch != epoch_) permutation_.set_key(megatron::derive(key_, static_cast<std::uint64_t>(epoch)));
    epoch_ = epoch;
    return static_cast<std::int64_t>(permutation_(static_cast<std::uint64_t>(draw - epoch * size_)));
  }

 private:
  std::int64_t size_;
  std::uint64_t key_;
  megatron::Permutation permutation_;
  std::int64_t epoch_ = -1;
};

void require_datasets(const Int32Array& datasets, py::ssize_t count, std::size_t num_datasets) {
  require(datasets.ndim() == 1 && datasets.size() == count, "there must be one dataset for each draw or example");
  require(std::all_of(datasets.data(), datasets.data() + count,
                      [&](std::int32_t dataset) {
                        return dataset >= 0 && static_cast<std::size_t>(dataset) < num_datasets;
                      }),
          "there is no such dataset");
}

Int64Array shuffled(const Int32Array& datasets, const Int64Array& draws, const Int64Array& sizes,
                    const UInt64Array& keys) {
  require(sizes.ndim() == 1 && keys.ndim() == 1 && sizes.size() == keys.size(), "sizes and keys must be [d]");
  require_not_negative(draws, "draws");
  std::vector<ShuffledDataset> shuffles;
  for (py::ssize_t n = 0; n < sizes.size(); ++n) {
    require(sizes.at(n) >= 1, "sizes must be at least 1");
    shuffles.emplace_back(sizes.at(n), keys.at(n));
  }
  const auto count = draws.size();
  require_datasets(datasets, count, shuffles.size());
  Int64Array examples(count);
  const std::int32_t* dataset = datasets.data();
  const std::int64_t* draw = draws.data();
  std::int64_t* example = examples.mutable_data();
  {
    py::gil_scoped_release without_gil;
    for (py::ssize_t i = 0; i < count; ++i) {
      example[i] = shuffles[static_cast<std::size_t>(dataset[i])].example(draw[i]);
    }
  }
  return examples;
}

// ---------------------------------------------------------------------------------------------------------
// Documents

// Pieces of `longest` tokens, the last one shorter; where one token would be left, the piece before gives one up.
// Documents of fewer than two tokens have none.
py::tuple cut_documents(const Int64Array& starts, const Int64Array& bounds, std::int64_t longest) {
  require(longest >= 3 && longest <= std::numeric_limits<std::int32_t>::max(), "longest must be int32 and at least 3");
  require(starts.ndim() == 1 && starts.size() >= 1, "starts must be [m + 1]");
  const std::int64_t* start = starts.data();
  const auto num_documents = starts.size() - 1;
  require(start[0] >= 0 && std::is_sorted(start, start + starts.size()), "starts must ascend from 0 or later");
  const std::vector<std::int64_t> limits(bounds.data(), bounds.data() + bounds.size());
  require(bounds.ndim() == 1 && !limits.empty() && limits.front() == 0 && limits.back() == num_documents &&
              std::is_sorted(limits.begin(), limits.end()),
          "bounds must ascend from 0 to the number of documents");
  const auto pieces_of = [&](std::int64_t tokens) { return tokens < 2 ? 0 : (tokens - 1) / longest + 1; };
  std::int64_t num_pieces = 0;
  for (py::ssize_t d = 0; d < num_documents; ++d) num_pieces += pieces_of(start[d + 1] - start[d]);
  Int64Array piece_starts(num_pieces), first_pieces(bounds.size());
  Int32Array piece_lengths(num_pieces);
  std::int64_t* piece_start = piece_starts.mutable_data();
  std::int64_t* first_piece = first_pieces.mutable_data();
  std::int32_t* piece_length = piece_lengths.mutable_data();
  {
    py::gil_scoped_release without_gil;
    std::int64_t piece = 0;
    first_piece[0] = 0;
    for (std::size_t block = 0; block + 1 < limits.size(); ++block) {
      for (std::int64_t d = limits[block]; d < limits[block + 1]; ++d) {
        std::int64_t from = start[d];
        for (std::int64_t left = start[d + 1] - from; left >= 2; ++piece) {
          const std::int64_t length = left - longest == 1 ? longest - 1 : std::min(left, longest);
          piece_start[piece] = from;
          piece_length[piece] = static_cast<std::int32_t>(length);
          from += length;
          left -= length;
        }
      }
      first_piece[block + 1] = piece;
    }
  }
  return py::make_tuple(piece_starts, piece_lengths, first_pieces);
}

// ---------------------------------------------------------------------------------------------------------
// First fit

// Rows with room along each axis. Room is counted in steps of a 64th of the capacity or finer; for each number of steps a
// bitmap has the rows with at least so many left. The rows of all axes' bitmaps are those worth a look, 64 at a time. A
// tree of maxima would not do: with two axes most rows end up with room along one of them, and it leads to all of those.
template <std::size_t kAxes>
class OpenRows {
 public:
  using Room = std::array<std::int32_t, kAxes>;

  explicit OpenRows(const Room& capacity) : capacity_(capacity) {
    for (std::size_t axis = 0; axis < kAxes; ++axis) {
      while (capacity[axis] >> shifts_[axis] >= 128) ++shifts_[axis];
    }
  }

  void reset(std::size_t max_rows) {
    words_ = (max_rows + 63) / 64;
    room_.assign(64 * words_, capacity_);
    for (std::size_t axis = 0; axis < kAxes; ++axis) {
      bitmaps_[axis].assign((steps(capacity_[axis], axis) + 1) * words_, ~std::uint64_t{0});
    }
  }

  // Puts an example of these lengths, which fit an empty row, into the first row with room for it.
  std::size_t place(const Room& lengths) {
    std::array<const std::uint64_t*, kAxes> enough;
    for (std::size_t axis = 0; axis < kAxes; ++axis) {
      enough[axis] = &bitmaps_[axis][steps(lengths[axis], axis) * words_];
    }
    for (std::size_t word = 0; word < words_; ++word) {
      std::uint64_t rows = enough[0][word];
      for (std::size_t axis = 1; axis < kAxes; ++axis) rows &= enough[axis][word];
      for (; rows != 0; rows &= rows - 1) {
        const auto bit = static_cast<std::size_t>(__builtin_ctzll(rows));
        if (!fits(lengths, room_[64 * word + bit])) continue;  // by less than a step
        take(word, bit, lengths);
        return 64 * word + bit;
      }
    }
    throw std::logic_error("there are more rows than examples");
  }

 private:
  static bool fits(const Room& lengths, const Room& room) {
    bool enough = true;
    for (std::size_t axis = 0; axis < kAxes; ++axis) enough &= lengths[axis] <= room[axis];
    return enough;
  }

  std::size_t steps(std::int32_t length, std::size_t axis) const {
    return static_cast<std::size_t>(length >> shifts_[axis]);
  }

  void take(std::size_t word, std::size_t bit, const Room& lengths) {
    Room& room = room_[64 * word + bit];
    for (std::size_t axis = 0; axis < kAxes; ++axis) {
      const std::size_t before = steps(room[axis], axis);
      room[axis] -= lengths[axis];
      for (std::size_t step = steps(room[axis], axis) + 1; step <= before; ++step) {
        bitmaps_[axis][step * words_ + word] &= ~(std::uint64_t{1} << bit);
      }
    }
  }

  const Room capacity_;
  std::array<int, kAxes> shifts_ = {};
  std::size_t words_ = 0;
  std::vector<Room> room_;
  std::array<std::vector<std::uint64_t>, kAxes> bitmaps_;
};

template <std::size_t kAxes>
void fit_windows(const std::int32_t* lengths, const std::vector<std::int64_t>& starts, const std::int64_t* capacities,
                 std::int32_t* rows, std::int64_t* counts) {
  typename OpenRows<kAxes>::Room capacity, example;
  std::copy_n(capacities, kAxes, capacity.begin());
  OpenRows<kAxes> open(capacity);
  for (std::size_t window = 0; window + 1 < starts.size(); ++window) {
    open.reset(static_cast<std::size_t>(starts[window + 1] - starts[window]));
    std::int32_t num_rows = 0;
    for (std::int64_t i = starts[window]; i < starts[window + 1]; ++i) {
      std::copy_n(lengths + i * static_cast<std::int64_t>(kAxes), kAxes, example.begin());
      rows[i] = static_cast<std::int32_t>(open.place(example));
      num_rows = std::max(num_rows, rows[i] + 1);
    }
    counts[window] = num_rows;
  }
}

py::tuple first_fit(const Int32Array& lengths, const Int64Array& window_starts, const Int64Array& capacities) {
  require(capacities.ndim() == 1 && (capacities.size() == 1 || capacities.size() == 2),
          "capacities must be for one axis or two");
  const auto axes = capacities.size();
  require(lengths.ndim() == 2 && lengths.shape(1) == axes, "lengths must be [m, axes]");
  for (py::ssize_t axis = 0; axis < axes; ++axis) {
    const std::int64_t capacity = capacities.at(axis);
    require(capacity >= 1 && capacity <= std::numeric_limits<std::int32_t>::max(), "capacities must be positive int32");
    for (py::ssize_t i = 0; i < lengths.shape(0); ++i) {
      const std::int64_t length = lengths.data()[i * axes + axis];
      if (length < 0 || length > capacity) {
        throw std::invalid_argument("example " + std::to_string(i) + " has a length of " + std::to_string(length) +
                                    ", a row holds " + std::to_string(capacity));
      }
    }
  }
  const std::vector<std::int64_t> starts(window_starts.data(), window_starts.data() + window_starts.size());
  require(window_starts.ndim() == 1 && !starts.empty() && starts.front() == 0 && starts.back() == lengths.shape(0) &&
              std::is_sorted(starts.begin(), starts.end()),
          "window_starts must ascend from 0 to the number of examples");
  Int32Array rows(lengths.shape(0));
  Int64Array counts(static_cast<py::ssize_t>(starts.size()) - 1);
  const std::int32_t* from = lengths.data();
  const std::int64_t* most = capacities.data();
  std::int32_t* row = rows.mutable_data();
  std::int64_t* count = counts.mutable_data();
  {
    py::gil_scoped_release without_gil;
    (axes == 1 ? fit_windows<1> : fit_windows<2>)(from, starts, most, row, count);
  }
  return py::make_tuple(rows, counts);
}

// ---------------------------------------------------------------------------------------------------------
// Rows

// The ids of one dataset, uint16 or int32.
struct Tokens {
  explicit Tokens(const py::array& array) : data(array.data()), size(array.size()), wide(array.itemsize() == 4) {
    require(array.ndim() == 1 && (array.flags() & py::array::c_style) &&
                (py::isinstance<py::array_t<std::uint16_t>>(array) || py::isinstance<py::array_t<std::int32_t>>(array)),
            "tokens must be contiguous vectors of uint16 or int32");
  }

  void copy(std::int64_t begin, std::int64_t count, std::int32_t* to) const {
    if (wide) {
      std::copy_n(static_cast<const std::int32_t*>(data) + begin, count, to);
    } else {
      std::copy_n(static_cast<const std::uint16_t*>(data) + begin, count, to);
    }
  }

  const void* data;
  std::int64_t size;
  bool wide;
};

// Where the tokens of an example's inputs and targets lie in its dataset.
struct Span {
  std::int64_t inputs_begin, inputs_length, targets_begin, targets_length;
};

Int64Array example_spans(const std::vector<Int64Array>& boundaries, const Int32Array& datasets,
                         const Int64Array& examples, const std::array<std::int64_t, 2>& most) {
  const auto count = examples.size();
  require_datasets(datasets, count, boundaries.size());
  std::vector<const std::int64_t*> bounds;
  for (const auto& array : boundaries) bounds.push_back(array.data());
  Int64Array spans({count, py::ssize_t{4}});
  const std::int32_t* dataset = datasets.data();
  const std::int64_t* example = examples.data();
  auto* span = reinterpret_cast<Span*>(spans.mutable_data());
  for (py::ssize_t i = 0; i < count; ++i) {
    require(example[i] >= 0 && 2 * example[i] + 2 < boundaries[static_cast<std::size_t>(dataset[i])].size(),
            "an example lies outside its dataset");
  }
  {
    py::gil_scoped_release without_gil;
    for (py::ssize_t i = 0; i < count; ++i) {
      const std::int64_t* ends = bounds[static_cast<std::size_t>(dataset[i])] + 2 * example[i];
      span[i] = {ends[0], std::min(ends[1] - ends[0], most[0]), ends[1], std::min(ends[2] - ends[1], most[1])};
    }
  }
  return spans;
}

// A side of the model: rows of ids and of segment ids, and how far each row is filled.
struct Side {
  Side(Int32Array& ids_array, Int32Array& segments_array, std::int64_t pad_id)
      : num_rows(ids_array.shape(0)), columns(ids_array.shape(1)), ids(ids_array.mutable_data()),
        segments(segments_array.mutable_data()), filled(static_cast<std::size_t>(num_rows)) {
    std::fill_n(ids, num_rows * columns, static_cast<std::int32_t>(pad_id));
    std::fill_n(segments, num_rows * columns, 0);
  }

  std::int64_t num_rows, columns;
  std::int32_t *ids, *segments;
  std::vector<std::int64_t> filled;
};

// An example and the row that it goes to.
struct Placement {
  std::int64_t row, dataset;
  Span span;
};
static_assert(sizeof(Placement) == 6 * sizeof(std::int64_t));

// Copies a part of a dataset, its last token replaced by EOS, to where the row ends so far; returns that place in `ids`.
std::int64_t append(const Tokens& tokens, std::int64_t begin, std::int64_t length, std::int64_t eos_id, Side& side,
                    std::int64_t row, std::int32_t segment, std::int32_t* ids) {
  std::int64_t& filled = side.filled[static_cast<std::size_t>(row)];
  require(begin >= 0 && length >= 1 && begin + length <= tokens.size, "an example lies outside its dataset");
  require(filled + length <= side.columns, "a row has no room for its examples");
  const std::int64_t place = row * side.columns + filled;
  tokens.copy(begin, length, ids + place);
  ids[place + length - 1] = static_cast<std::int32_t>(eos_id);
  std::fill_n(side.segments + place, length, segment);
  filled += length;
  return place;
}

void fill_packed_rows(const std::vector<py::array>& sources, const Int64Array& placements, std::int64_t pad_id,
                      std::int64_t eos_id, std::int64_t decoder_start_id, Int32Array encoder_input_ids,
                      Int32Array decoder_input_ids, Int32Array labels, Int32Array encoder_segment_ids,
                      Int32Array decoder_segment_ids) {
  const std::vector<Tokens> tokens(sources.begin(), sources.end());
  require(placements.ndim() == 2 && placements.shape(1) == 6, "placements must be [m, 6]");
  for (const py::array* array : {&encoder_input_ids, &decoder_input_ids, &labels, &encoder_segment_ids,
                                 &decoder_segment_ids}) {
    require(array->ndim() == 2 && array->shape(0) == labels.shape(0) && array->writeable(),
            "the output arrays must have two dimensions and as many rows");
  }
  require(encoder_segment_ids.shape(1) == encoder_input_ids.shape(1) &&
              decoder_segment_ids.shape(1) == labels.shape(1) && decoder_input_ids.shape(1) == labels.shape(1),
          "the arrays of a side must have as many columns");
  const auto* placement = reinterpret_cast<const Placement*>(placements.data());
  const auto count = placements.shape(0);
  const auto num_datasets = static_cast<std::int64_t>(tokens.size());
  Side encoder(encoder_input_ids, encoder_segment_ids, pad_id);
  Side decoder(decoder_input_ids, decoder_segment_ids, pad_id);
  std::int32_t* label = labels.mutable_data();
  py::gil_scoped_release without_gil;
  std::fill_n(label, decoder.num_rows * decoder.columns, kIgnoredLabel);
  std::vector<std::int32_t> segments(static_cast<std::size_t>(decoder.num_rows));
  for (py::ssize_t i = 0; i < count; ++i) {
    const Placement& p = placement[i];
    require(p.row >= 0 && p.row < decoder.num_rows && p.dataset >= 0 && p.dataset < num_datasets,
            "an example has no such row or dataset");
    const Tokens& source = tokens[static_cast<std::size_t>(p.dataset)];
    const std::int32_t segment = ++segments[static_cast<std::size_t>(p.row)];
    append(source, p.span.inputs_begin, p.span.inputs_length, eos_id, encoder, p.row, segment, encoder.ids);
    const auto place =
        append(source, p.span.targets_begin, p.span.targets_length, eos_id, decoder, p.row, segment, label);
    // Shifted right within the example: its decoder starts anew.
    decoder.ids[place] = static_cast<std::int32_t>(decoder_start_id);
    std::copy_n(label + place, p.span.targets_length - 1, decoder.ids + place + 1);
  }
}

}  // namespace

PYBIND11_MODULE(packing_helpers, module, py::mod_gil_not_used()) {
  module.doc() = "Mixing datasets and packing their examples into rows.";
  module.def("mixture_draws", &mixture_draws, py::arg("fractions").noconvert(), py::arg("children").noconvert(),
             py::arg("positions").noconvert());
  module.def("shuffled", &shuffled, py::arg("datasets").noconvert(), py::arg("draws").noconvert(),
             py::arg("sizes").noconvert(), py::arg("keys").noconvert());
  module.def("example_spans", &example_spans, py::arg("boundaries"), py::arg("datasets").noconvert(),
             py::arg("examples").noconvert(), py::arg("most"));
  module.def("cut_documents", &cut_documents, py::arg("starts").noconvert(), py::arg("bounds").noconvert(),
             py::arg("longest"));
  module.def("first_fit", &first_fit, py::arg("lengths").noconvert(), py::arg("window_starts").noconvert(),
             py::arg("capacities").noconvert());
  module.def("fill_packed_rows", &fill_packed_rows, py::arg("sources"), py::arg("placements").noconvert(),
             py::arg("pad_id"), py::arg("eos_id"), py::arg("decoder_start_id"),
             py::arg("encoder_input_ids").noconvert(), py::arg("decoder_input_ids").noconvert(),
             py::arg("labels").noconvert(), py::arg("encoder_segment_ids").noconvert(),
             py::arg("decoder_segment_ids").noconvert());
}
