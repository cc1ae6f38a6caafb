// Denoising objectives: windows or documents of token streams in, T5 batches out.
//
//   WindowLayouts  which tokens sample n reads, and with which denoiser  (window_layouts.h)
//   TokenSources   those tokens, from corpora in one piece or several    (token_sources.h)
//   Denoisers      inputs and targets of them                            (denoising.h)
//   fill_rows      rows of a batch, of one example or several each
//
// Nothing here may change the samples of an existing seed: checkpoints count on it, and a test pins them. The classes do
// not change once they are made, so that threads can share them. Wrong arguments throw std::invalid_argument.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "arrays.h"
#include "denoising.h"
#include "token_sources.h"
#include "window_layouts.h"

namespace py = pybind11;

namespace {

using namespace megatron;

constexpr std::int32_t kIgnoredLabel = -100;  // what the loss leaves out

// ---------------------------------------------------------------------------------------------------------
// Rows

// One side of the model: rows of ids and perhaps of segment ids, C order, and how far each row is filled.
struct Side {
  std::int64_t rows, columns;
  std::int32_t *ids, *segments;
  std::vector<std::int64_t> filled;

  // Where the next example of a row goes.
  std::int64_t place(std::int64_t row) const { return row * columns + filled[static_cast<std::size_t>(row)]; }

  void append(std::int64_t row, const std::int32_t* from, std::int64_t count, std::int32_t segment) {
    std::copy_n(from, count, ids + place(row));
    if (segments != nullptr) std::fill_n(segments + place(row), count, segment);
    filled[static_cast<std::size_t>(row)] += count;
  }

  // Fills what is left of each row.
  void pad(std::int32_t pad_id) {
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::int64_t left = columns - filled[static_cast<std::size_t>(row)];
      if (left == 0) continue;
      std::fill_n(ids + place(row), left, pad_id);
      if (segments != nullptr) std::fill_n(segments + place(row), left, 0);
    }
  }
};

// The rows of a batch: encoder inputs, and labels with the decoder inputs beside them.
class Rows {
 public:
  Rows(Int32Array& encoder_input_ids, Int32Array& decoder_input_ids, Int32Array& labels,
       std::optional<Int32Array>& encoder_segment_ids, std::optional<Int32Array>& decoder_segment_ids)
      : encoder_(side(encoder_input_ids, encoder_segment_ids)),
        decoder_(side(labels, decoder_segment_ids)),
        decoder_inputs_(checked(decoder_input_ids, decoder_.rows, decoder_.columns)) {
    require(encoder_.rows == decoder_.rows, "the output arrays must have as many rows");
    require(encoder_segment_ids.has_value() == decoder_segment_ids.has_value(),
            "segment ids must be given for both sides or for none");
  }

  std::int64_t size() const { return encoder_.rows; }
  bool has_segments() const { return encoder_.segments != nullptr; }

  // Takes room for an example, to check all of them before the first is written.
  void take(std::int64_t row, const Lengths& lengths) {
    std::int64_t& inputs = encoder_.filled[static_cast<std::size_t>(row)];
    std::int64_t& targets = decoder_.filled[static_cast<std::size_t>(row)];
    require(has_segments() || inputs == 0, "several examples in a row need segment ids");
    inputs += lengths.inputs;
    targets += lengths.targets;
    if (inputs > encoder_.columns || targets > decoder_.columns) {
      throw std::invalid_argument("the rows must hold at least " + std::to_string(inputs) + " encoder and " +
                                  std::to_string(targets) + " decoder tokens");
    }
  }

  // Forgets what `take` took.
  void release() {
    std::fill(encoder_.filled.begin(), encoder_.filled.end(), 0);
    std::fill(decoder_.filled.begin(), decoder_.filled.end(), 0);
    segments_.assign(static_cast<std::size_t>(encoder_.rows), 0);
  }

  void append(std::int64_t row, const Lengths& lengths, const Emitter& example, std::int32_t decoder_start_id) {
    const std::int32_t segment = ++segments_[static_cast<std::size_t>(row)];
    encoder_.append(row, example.inputs(), lengths.inputs, segment);
    // The decoder never reads the last target: its inputs are shifted right by one, within the example.
    std::int32_t* inputs = decoder_inputs_ + decoder_.place(row);
    *inputs = decoder_start_id;
    std::copy_n(example.targets(), lengths.targets - 1, inputs + 1);
    decoder_.append(row, example.targets(), lengths.targets, segment);
  }

  void pad(std::int32_t pad_id) {
    encoder_.pad(pad_id);
    for (std::int64_t row = 0; row < decoder_.rows; ++row) {
      std::fill(decoder_inputs_ + decoder_.place(row), decoder_inputs_ + (row + 1) * decoder_.columns, pad_id);
    }
    decoder_.pad(kIgnoredLabel);
  }

 private:
  static std::int32_t* checked(Int32Array& array, py::ssize_t rows, py::ssize_t columns) {
    require(array.ndim() == 2 && array.shape(0) == rows && array.shape(1) == columns,
            "the output arrays must have two dimensions, as many rows, and those of a side as many columns");
    require(array.writeable(), "the output arrays must be writeable");
    require_aligned(array, "an output array");
    return array.mutable_data();
  }

  static Side side(Int32Array& ids, std::optional<Int32Array>& segments) {
    require(ids.ndim() == 2, "the output arrays must have two dimensions");
    const py::ssize_t rows = ids.shape(0);
    const py::ssize_t columns = ids.shape(1);
    return {rows, columns, checked(ids, rows, columns), segments ? checked(*segments, rows, columns) : nullptr,
            std::vector<std::int64_t>(static_cast<std::size_t>(rows))};
  }

  Side encoder_, decoder_;  // the ids of the decoder's are the labels
  std::int32_t* decoder_inputs_;
  std::vector<std::int32_t> segments_;
};

// An example whose numbers are checked.
struct Plan {
  Example example;
  Lengths lengths;
  std::uint64_t key;
};

Plan checked_plan(Example example, std::uint64_t key, const TokenSources& sources, const Denoisers& denoisers) {
  require(example.dataset >= 0 && example.dataset < sources.size(), "an example has no such dataset");
  denoisers.check(example.denoiser, example.length, example.cut);
  require(sources.contains(example.dataset, example.start, example.length),
          "an example lies outside the token range of its dataset");
  if (example.cut == kNoCut) example.cut = denoisers.random_cut(example.denoiser, example.length, key);
  const Lengths lengths = denoisers.lengths(example.denoiser, example.length, example.cut);
  if (lengths.spans > static_cast<std::int64_t>(denoisers.sentinel_ids.size())) {
    throw std::invalid_argument(std::to_string(lengths.spans) + " spans need as many sentinels, not " +
                                std::to_string(denoisers.sentinel_ids.size()));
  }
  return {example, lengths, key};
}

void fill_rows(const TokenSources& sources, const Int64Array& examples, const UInt64Array& keys,
               const Denoisers& denoisers, Int32Array encoder_input_ids, Int32Array decoder_input_ids,
               Int32Array labels, std::optional<Int32Array> encoder_segment_ids,
               std::optional<Int32Array> decoder_segment_ids) {
  require(sources.vocab_size() == denoisers.vocab_size, "sources and denoisers have other vocabularies");
  const auto numbers = table_of(examples, 6, "examples");
  const auto example_keys = vector_of(keys, "keys");
  require(numbers.size() == 6 * example_keys.size(), "there must be one key for each example");
  Rows rows(encoder_input_ids, decoder_input_ids, labels, encoder_segment_ids, decoder_segment_ids);
  py::gil_scoped_release without_gil;
  Emitter emitter(denoisers);
  std::vector<Plan> plans;
  plans.reserve(example_keys.size());
  for (std::size_t i = 0; i < example_keys.size(); ++i) {
    Example example;
    std::memcpy(&example, numbers.data() + 6 * i, sizeof(example));
    plans.push_back(checked_plan(example, example_keys[i], sources, denoisers));
    require(example.row >= 0 && example.row < rows.size(), "an example has no such row");
    rows.take(example.row, plans.back().lengths);
    emitter.reserve(plans.back().lengths);
  }
  rows.release();
  for (std::size_t i = 0; i < plans.size(); ++i) {
    if (i + 1 < plans.size()) {
      const Example& next = plans[i + 1].example;
      sources.prefetch(next.dataset, next.start, next.length);
    }
    const auto& [example, lengths, key] = plans[i];
    sources.read(example.dataset, example.start, example.length, emitter.tokens());
    emitter.emit(example.denoiser, lengths, key);
    rows.append(example.row, lengths, emitter, denoisers.decoder_start_id);
  }
  rows.pad(denoisers.pad_id);
}

// ---------------------------------------------------------------------------------------------------------
// Python interface

py::tuple window_examples(const WindowLayouts& layouts, const Int32Array& datasets, const Int64Array& draws,
                          bool whole_blocks) {
  const auto dataset_list = vector_of(datasets, "datasets");
  const auto draw_list = vector_of(draws, "draws");
  require(dataset_list.size() == draw_list.size(), "there must be one dataset for each draw");
  py::ssize_t count = 0;
  for (std::size_t i = 0; i < draw_list.size(); ++i) {
    require(dataset_list[i] >= 0 && dataset_list[i] < layouts.size(), "there is no such dataset");
    require(draw_list[i] >= kPaddingSample, "draws must be at least -1");
    count += draw_list[i] != kPaddingSample;
  }
  Int64Array examples({count, py::ssize_t{6}});
  UInt64Array keys(count);
  auto* example = reinterpret_cast<Example*>(examples.mutable_data());
  auto* key = keys.mutable_data();
  {
    py::gil_scoped_release without_gil;
    layouts.windows(dataset_list, draw_list, whole_blocks, example, key);
  }
  return py::make_tuple(examples, keys);
}

Int64Array windows_per_epoch(const WindowLayouts& layouts) {
  const auto windows = layouts.windows_per_epoch();
  return Int64Array(static_cast<py::ssize_t>(windows.size()), windows.data());
}

Int32Array denoised_lengths(const Denoisers& denoisers, const Int32Array& kinds, const Int32Array& raw,
                            const Int32Array& cuts) {
  const auto kind_list = vector_of(kinds, "denoisers");
  const auto raw_list = vector_of(raw, "raw");
  const auto cut_list = vector_of(cuts, "cuts");
  require(kind_list.size() == raw_list.size() && kind_list.size() == cut_list.size(),
          "denoisers, raw and cuts must be of one size");
  Int32Array result({static_cast<py::ssize_t>(kind_list.size()), py::ssize_t{2}});
  std::int32_t* out = result.mutable_data();
  {
    py::gil_scoped_release without_gil;
    for (std::size_t i = 0; i < kind_list.size(); ++i) {
      denoisers.check(kind_list[i], raw_list[i], cut_list[i]);
      const Lengths lengths = denoisers.lengths(kind_list[i], raw_list[i], cut_list[i]);
      *out++ = static_cast<std::int32_t>(lengths.inputs);
      *out++ = static_cast<std::int32_t>(lengths.targets);
    }
  }
  return result;
}

Int32Array random_cuts(const Denoisers& denoisers, const Int32Array& kinds, const Int32Array& raw,
                       const UInt64Array& keys) {
  const auto kind_list = vector_of(kinds, "denoisers");
  const auto raw_list = vector_of(raw, "raw");
  const auto key_list = vector_of(keys, "keys");
  require(kind_list.size() == raw_list.size() && kind_list.size() == key_list.size(),
          "denoisers, raw and keys must be of one size");
  Int32Array cuts(static_cast<py::ssize_t>(kind_list.size()));
  std::int32_t* out = cuts.mutable_data();
  {
    py::gil_scoped_release without_gil;
    for (std::size_t i = 0; i < kind_list.size(); ++i) {
      denoisers.check(kind_list[i], raw_list[i], kNoCut);
      *out++ = static_cast<std::int32_t>(denoisers.random_cut(kind_list[i], raw_list[i], key_list[i]));
    }
  }
  return cuts;
}

Int32Array read_tokens(const TokenSources& sources, std::int64_t dataset, std::int64_t start, std::int64_t length) {
  require(dataset >= 0 && dataset < sources.size(), "there is no such dataset");
  require(length >= 0 && length <= kMaxWindow && sources.contains(dataset, start, length),
          "the tokens lie outside the token range of the dataset");
  Int32Array tokens(length);
  std::int32_t* to = tokens.mutable_data();
  {
    py::gil_scoped_release without_gil;
    sources.read(dataset, start, length, to);
  }
  return tokens;
}

void will_need(const TokenSources& sources, const Int64Array& examples) {
  const auto numbers = table_of(examples, 6, "examples");
  py::gil_scoped_release without_gil;
  for (std::size_t i = 0; i < numbers.size(); i += 6) {
    const std::int64_t dataset = numbers[i + 1], start = numbers[i + 2], length = numbers[i + 3];
    require(dataset >= 0 && dataset < sources.size(), "an example has no such dataset");
    require(length >= 0 && sources.contains(dataset, start, length),
            "an example lies outside the token range of its dataset");
    sources.will_need(dataset, start, length);
  }
}

UInt64Array derived_keys(std::uint64_t key, const Int64Array& values) {
  const auto value_list = vector_of(values, "values");
  UInt64Array keys(static_cast<py::ssize_t>(value_list.size()));
  std::uint64_t* out = keys.mutable_data();
  py::gil_scoped_release without_gil;
  for (const std::int64_t value : value_list) *out++ = derive(key, static_cast<std::uint64_t>(value));
  return keys;
}

}  // namespace

PYBIND11_MODULE(helpers, module, py::mod_gil_not_used()) {
  module.doc() = "Denoising of token streams into T5 batches.";
  py::register_exception<TokenOutOfVocabulary>(module, "TokenOutOfVocabularyError", PyExc_ValueError);
  py::class_<TokenSources>(module, "TokenSources")
      .def(py::init<const std::vector<std::vector<py::array>>&, const Int64Array&, std::int64_t,
                    std::vector<std::string>>(),
           py::arg("corpora").noconvert(), py::arg("ranges").noconvert(), py::arg("vocab_size"),
           py::arg("names") = std::vector<std::string>{})
      .def("read", &read_tokens, py::arg("dataset"), py::arg("start"), py::arg("length"))
      .def("will_need", &will_need, py::arg("examples").noconvert())
      .def("expect_random_reads", &TokenSources::expect_random_reads);
  py::class_<WindowLayouts>(module, "WindowLayouts")
      .def(py::init<const Int64Array&, const UInt64Array&, const Int64Array&, const UInt64Array&, const Int32Array&,
                    std::int64_t>(),
           py::arg("ranges").noconvert(), py::arg("keys").noconvert(), py::arg("window_lengths").noconvert(),
           py::arg("fractions").noconvert(), py::arg("children").noconvert(), py::arg("block_windows") = 1)
      .def_property_readonly("windows_per_epoch", &windows_per_epoch)
      .def("examples", &window_examples, py::arg("datasets").noconvert(), py::arg("draws").noconvert(),
           py::arg("whole_blocks") = false);
  py::class_<Denoisers>(module, "Denoisers")
      .def(py::init<const Array<double>&, const std::vector<Int32Array>&, const Int32Array&, std::int64_t,
                    std::int64_t, std::int64_t, std::int64_t>(),
           py::arg("table").noconvert(), py::arg("mode_ids").noconvert(), py::arg("sentinel_ids").noconvert(),
           py::arg("eos_id"), py::arg("pad_id"), py::arg("decoder_start_id"), py::arg("vocab_size"))
      .def("lengths", &denoised_lengths, py::arg("denoisers").noconvert(), py::arg("raw").noconvert(),
           py::arg("cuts").noconvert())
      .def("cuts", &random_cuts, py::arg("denoisers").noconvert(), py::arg("raw").noconvert(),
           py::arg("keys").noconvert());
  module.def("fill_rows", &fill_rows, py::arg("sources"), py::arg("examples").noconvert(), py::arg("keys").noconvert(),
             py::arg("denoisers"), py::arg("encoder_input_ids").noconvert(), py::arg("decoder_input_ids").noconvert(),
             py::arg("labels").noconvert(), py::arg("encoder_segment_ids").noconvert() = py::none(),
             py::arg("decoder_segment_ids").noconvert() = py::none());
  module.def("derived_keys", &derived_keys, py::arg("key"), py::arg("values").noconvert());
}
