// Which dataset gives sample n of a blend, and its how-manieth sample that is, so that after any n samples each dataset
// has had its share of them rounded up or down.
//
// Draw j (from 0) of a dataset with share p may come at positions floor(j / p) to ceil((j + 1) / p) - 1: exactly then
// its draws before position k number floor(p k) or ceil(p k). These are the windows of Pfair scheduling (Baruah, Cohen,
// Plaxton and Varvel 1996); a sequence that keeps all of them exists, and taking the draw whose window closes first
// (earliest deadline first) finds it, one position after the other.
//
// To begin anywhere, positions are cut into blocks longer than any window, and the draws made before a block are chosen
// without looking further back than a window. Draws whose windows close by then are made; of those whose windows cross
// the boundary, at most one a dataset, a certain number is to be made, and which ones may be is a matroid: so many must
// find a position each among those that the others leave free. Its greedy base by deadline leaves as few draws with
// early deadlines as any choice can. Since some choice goes on without end, this one reaches any choice for the end of
// the block, where the same rule is applied again: no window touches both boundaries.
//
// Nothing here may change what given rates give: checkpoints count on it, and tests pin it. Whole numbers decide
// everything. Wrong arguments throw std::invalid_argument (ValueError in Python). The GIL is released.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <list>
#include <mutex>
#include <numeric>
#include <queue>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

using Int32Array = py::array_t<std::int32_t, py::array::c_style>;
using Int64Array = py::array_t<std::int64_t, py::array::c_style>;
__extension__ using Wide = unsigned __int128;

constexpr std::int64_t kMostWindow = std::int64_t{1} << 28;    // positions; such a block takes many seconds to walk
constexpr std::int64_t kMostPosition = std::int64_t{1} << 62;  // and sum of the rates: products fit 128 bits

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

// A point in time, whole + rest / rate positions after the beginning, for the dataset with this rate.
struct Time {
  std::int64_t whole;
  std::uint64_t rest;
};

// Rates of the datasets, and when their draws are due.
class Shares {
 public:
  explicit Shares(std::vector<std::uint64_t> rates) : rates_(std::move(rates)) {
    total_ = std::accumulate(rates_.begin(), rates_.end(), std::uint64_t{0});
    for (const std::uint64_t rate : rates_) {
      steps_.push_back({static_cast<std::int64_t>(total_ / rate), total_ % rate});
    }
    longest_window_ = static_cast<std::int64_t>(total_ / *std::min_element(rates_.begin(), rates_.end())) + 2;
  }

  std::size_t size() const { return rates_.size(); }

  // No window is longer.
  std::int64_t longest_window() const { return longest_window_; }

  // Draws of a dataset before `position` whose windows have closed by then; `rest` says whether another is under way.
  std::int64_t due(std::size_t dataset, std::int64_t position, bool& rest) const {
    const Wide product = static_cast<Wide>(rates_[dataset]) * static_cast<std::uint64_t>(position);
    rest = product % total_ != 0;
    return static_cast<std::int64_t>(product / total_);
  }

  // draw / share.
  Time start(std::size_t dataset, std::int64_t draw) const {
    const Wide product = static_cast<Wide>(total_) * static_cast<std::uint64_t>(draw);
    const std::uint64_t rate = rates_[dataset];
    return {static_cast<std::int64_t>(product / rate), static_cast<std::uint64_t>(product % rate)};
  }

  // From start(draw) to start(draw + 1).
  void advance(std::size_t dataset, Time& time) const {
    time.whole += steps_[dataset].whole;
    time.rest += steps_[dataset].rest;
    if (time.rest >= rates_[dataset]) {
      time.rest -= rates_[dataset];
      ++time.whole;
    }
  }

  // From start(draw) to start(draw - 1).
  void retreat(std::size_t dataset, Time& time) const {
    time.whole -= steps_[dataset].whole;
    if (time.rest < steps_[dataset].rest) {
      time.rest += rates_[dataset];
      --time.whole;
    }
    time.rest -= steps_[dataset].rest;
  }

 private:
  std::vector<std::uint64_t> rates_;
  std::uint64_t total_;
  std::vector<Time> steps_;  // 1 / share
  std::int64_t longest_window_;
};

// Sets of datasets by the time at which each is to be looked at, for a clock that ticks one by one. What lies beyond a
// turn of the wheel comes up early, once a turn, and is put in again.
class TimingWheel {
 public:
  static constexpr std::int32_t kNone = -1;

  explicit TimingWheel(std::size_t size) : heads_(kSlots, kNone), next_(size) {}

  void clear() { std::fill(heads_.begin(), heads_.end(), kNone); }

  // `time` is not before `now`; if it is `now`, that is not yet taken.
  void put(std::int32_t dataset, std::int64_t time, std::int64_t now) {
    std::int32_t& head = heads_[static_cast<std::size_t>(std::min(time, now + kSlots - 1) % kSlots)];
    next_[static_cast<std::size_t>(dataset)] = head;
    head = dataset;
  }

  // First of the datasets of this time, which leave the wheel.
  std::int32_t take(std::int64_t now) {
    return std::exchange(heads_[static_cast<std::size_t>(now % kSlots)], std::int32_t{kNone});
  }

  // The one after, as long as `dataset` was not put in again.
  std::int32_t after(std::int32_t dataset) const { return next_[static_cast<std::size_t>(dataset)]; }

 private:
  static constexpr std::int64_t kSlots = 4096;
  std::vector<std::int32_t> heads_, next_;
};

// The draws made before a boundary between blocks.
class Boundary {
 public:
  explicit Boundary(const Shares& shares) : shares_(shares), wheel_(shares.size()), starts_(shares.size()) {}

  void draws_before(std::int64_t position, std::vector<std::int64_t>& draws) {
    draws.resize(shares_.size());
    crossing_.clear();
    std::int64_t missing = position;
    for (std::size_t n = 0; n < shares_.size(); ++n) {
      bool crosses = false;
      draws[n] = shares_.due(n, position, crosses);
      missing -= draws[n];
      if (!crosses) continue;
      Time time = shares_.start(n, draws[n]);
      const std::int64_t opens = time.whole;
      shares_.advance(n, time);
      crossing_.push_back({time.whole + (time.rest != 0), static_cast<std::int32_t>(n), opens});
    }
    if (missing == 0) return;
    std::sort(crossing_.begin(), crossing_.end(), [](const Crossing& a, const Crossing& b) {
      return std::make_pair(a.closes, a.dataset) < std::make_pair(b.closes, b.dataset);
    });
    find_free(position, draws);
    place(missing, draws);
  }

 private:
  // A draw whose window has begun before the boundary and ends after it.
  struct Crossing {
    std::int64_t closes;  // first position after the window
    std::int32_t dataset;
    std::int64_t opens;
  };

  // Positions, descending, that are left when each draw which is due takes the first one that is still free after its
  // window opens: as many from any position on as can be.
  void find_free(std::int64_t position, const std::vector<std::int64_t>& draws) {
    std::int64_t first = position;
    for (const Crossing& crossing : crossing_) first = std::min(first, crossing.opens);
    const std::int64_t count = position - first;  // earlier positions make no difference
    // The clock of the wheel runs backwards from the boundary.
    const auto put = [&](std::size_t n, std::int64_t now) {
      const std::int64_t distance = position - 1 - starts_[n].whole;
      if (distance < count) wheel_.put(static_cast<std::int32_t>(n), distance, now);
    };
    wheel_.clear();
    for (std::size_t n = 0; n < shares_.size(); ++n) {
      if (draws[n] == 0) continue;
      starts_[n] = shares_.start(n, draws[n] - 1);
      put(n, 0);
    }
    free_.clear();
    for (std::int64_t now = 0; now < count; ++now) {
      free_.push_back(position - 1 - now);
      for (std::int32_t dataset = wheel_.take(now); dataset != TimingWheel::kNone;) {
        const auto n = static_cast<std::size_t>(dataset);
        dataset = wheel_.after(dataset);
        if (starts_[n].whole == position - 1 - now) {
          if (free_.empty()) throw std::logic_error("more draws are due than there are positions");
          free_.pop_back();
          const bool first_draw = starts_[n].whole == 0 && starts_[n].rest == 0;
          if (first_draw) continue;
          shares_.retreat(n, starts_[n]);
        }
        put(n, now);
      }
    }
  }

  // Adds `missing` of the crossing draws, in order of deadline, where a free position is left in their window: each
  // takes the first one, and later ones look on from there.
  void place(std::int64_t missing, std::vector<std::int64_t>& draws) {
    // Entry i leads to the next free position from the (i - 1)th on; entry 0 means there is none.
    leads_.resize(free_.size() + 1);
    std::iota(leads_.begin(), leads_.end(), std::size_t{0});
    for (const Crossing& crossing : crossing_) {
      const auto end = std::partition_point(free_.begin(), free_.end(),
                                            [&](std::int64_t position) { return position >= crossing.opens; });
      auto entry = static_cast<std::size_t>(end - free_.begin());
      while (leads_[entry] != entry) entry = leads_[entry] = leads_[leads_[entry]];
      if (entry == 0) continue;
      leads_[entry] = entry - 1;
      ++draws[static_cast<std::size_t>(crossing.dataset)];
      if (--missing == 0) return;
    }
    throw std::logic_error("fewer draws are possible than there are positions");
  }

  const Shares& shares_;
  TimingWheel wheel_;
  std::vector<Time> starts_;
  std::vector<Crossing> crossing_;
  std::vector<std::int64_t> free_;
  std::vector<std::size_t> leads_;
};

// A walk along the blend, position by position.
class Walk {
 public:
  Walk(const Shares& shares, std::int64_t block_length)
      : shares_(shares), block_length_(block_length), boundary_(shares), ends_(shares.size()), wheel_(shares.size()) {}

  // Goes to `position`: from the present one if that is before it in its block, else from the block's beginning.
  void seek(std::int64_t position) {
    const std::int64_t block = position / block_length_;
    if (block != block_ || position < now_) enter(block);
    while (now_ < position) next();
  }

  // About how many positions have to be walked to be at `position`.
  std::int64_t distance(std::int64_t position) const {
    const std::int64_t block = position / block_length_;
    if (block_ >= 0 && block == block_ && position >= now_) return position - now_;
    // Finding the draws before a boundary is at most as much again as a block; the next block's are known.
    return (block_ >= 0 && block == block_ + 1 ? 2 : 3) * block_length_;
  }

  // Draws of each dataset before the present position.
  const std::vector<std::int64_t>& draws() const { return draws_; }

  // Dataset of the present position, and its draws before; goes on by one.
  std::pair<std::int32_t, std::int64_t> next() {
    if (now_ == block_end()) enter(block_ + 1);
    for (std::int32_t dataset = wheel_.take(now_); dataset != TimingWheel::kNone;) {
      const std::int32_t following = wheel_.after(dataset);
      wait(dataset, opens(dataset), now_);
      dataset = following;
    }
    if (open_.empty()) throw std::logic_error("no draw is possible at a position of the blend");
    const std::uint64_t first = open_.top();
    open_.pop();
    if (static_cast<std::int64_t>(first >> 32) + block_ * block_length_ <= now_) {
      throw std::logic_error("a draw of the blend is late");
    }
    const auto n = static_cast<std::size_t>(first & 0xffffffff);
    const auto dataset = static_cast<std::int32_t>(n);
    const std::int64_t draw = draws_[n]++;
    ++now_;
    if (draws_[n] < limits_[n]) {
      const std::int64_t opens = ends_[n].whole;
      shares_.advance(n, ends_[n]);
      wait(dataset, opens, now_);
    }
    return {dataset, draw};
  }

 private:
  std::int64_t block_end() const { return (block_ + 1) * block_length_; }

  void enter(std::int64_t block) {
    const bool follows = block_ >= 0 && block == block_ + 1;
    block_ = -1;  // a walk that fails must not go on from a state in between
    if (follows) {
      std::swap(draws_, limits_);
    } else {
      boundary_.draws_before(block * block_length_, draws_);
    }
    boundary_.draws_before((block + 1) * block_length_, limits_);
    wheel_.clear();
    open_ = {};
    block_ = block;
    now_ = block * block_length_;
    for (std::size_t n = 0; n < shares_.size(); ++n) {
      if (draws_[n] == limits_[n]) continue;
      ends_[n] = shares_.start(n, draws_[n]);
      const std::int64_t opens = ends_[n].whole;
      shares_.advance(n, ends_[n]);
      wait(static_cast<std::int32_t>(n), opens, now_);
    }
  }

  // When the window of a dataset's next draw opens.
  std::int64_t opens(std::int32_t dataset) const {
    Time time = ends_[static_cast<std::size_t>(dataset)];
    shares_.retreat(static_cast<std::size_t>(dataset), time);
    return time.whole;
  }

  // Has a dataset's next draw wait until its window opens, or wait for its turn if that is so at `now`.
  void wait(std::int32_t dataset, std::int64_t opens, std::int64_t now) {
    if (opens > now) {
      wheel_.put(dataset, opens, now);
      return;
    }
    const Time& end = ends_[static_cast<std::size_t>(dataset)];
    const std::int64_t closes = std::min(end.whole + (end.rest != 0), block_end()) - block_ * block_length_;
    open_.push(static_cast<std::uint64_t>(closes) << 32 | static_cast<std::uint32_t>(dataset));
  }

  const Shares& shares_;
  const std::int64_t block_length_;
  Boundary boundary_;
  std::int64_t block_ = -1, now_ = 0;
  std::vector<std::int64_t> draws_, limits_;  // before the present position, and before the end of the block
  std::vector<Time> ends_;                    // of the window of the next draw
  TimingWheel wheel_;                         // datasets whose next window is not open yet
  // Draws that are possible, by when their windows close (in the block), then by dataset.
  std::priority_queue<std::uint64_t, std::vector<std::uint64_t>, std::greater<>> open_;
};

std::vector<std::uint64_t> checked_rates(const Int64Array& rates) {
  require(rates.ndim() == 1 && rates.size() >= 1 && rates.size() <= 0x7fffffff, "rates must be [d], at least one");
  std::int64_t total = 0, least = kMostPosition;
  for (py::ssize_t n = 0; n < rates.size(); ++n) {
    const std::int64_t rate = rates.data()[n];
    require(rate >= 1, "rates must be at least 1");
    require(rate <= kMostPosition - total, "rates must not add up to more than 2^62");
    total += rate;
    least = std::min(least, rate);
  }
  require(total / least <= kMostWindow, "the least rate must be at least 2^-28 of their sum");
  return {rates.data(), rates.data() + rates.size()};
}

class BlendOrder {
 public:
  BlendOrder(const Int64Array& rates, std::int64_t least_block)
      : shares_(checked_rates(rates)),
        // Blocks and their window-long surroundings are what finding a far position takes.
        block_length_(std::max(least_block, shares_.longest_window() + 1)) {
    require(least_block >= 1 && least_block <= kMostWindow, "least_block must lie between 1 and 2^28");
  }

  std::int64_t block_length() const { return block_length_; }

  py::tuple draws(const Int64Array& positions) {
    require(positions.ndim() == 1, "positions must have one dimension");
    const auto count = static_cast<std::size_t>(positions.size());
    const std::int64_t* from = positions.data();
    for (std::size_t i = 0; i < count; ++i) require_position(from[i]);
    Int32Array datasets(positions.size());
    Int64Array draws(positions.size());
    std::int32_t* dataset = datasets.mutable_data();
    std::int64_t* draw = draws.mutable_data();
    {
      py::gil_scoped_release without_gil;
      std::vector<std::size_t> order(count);
      std::iota(order.begin(), order.end(), std::size_t{0});
      if (!std::is_sorted(from, from + count)) {
        std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return from[a] < from[b]; });
      }
      const std::lock_guard<std::mutex> lock(mutex_);
      Walk* walk = count == 0 ? nullptr : &nearest(from[order.front()]);
      std::pair<std::int32_t, std::int64_t> found;
      for (std::size_t n = 0; n < count; ++n) {
        const std::size_t i = order[n];
        if (n == 0 || from[i] != from[order[n - 1]]) {
          walk->seek(from[i]);
          found = walk->next();
        }
        std::tie(dataset[i], draw[i]) = found;
      }
    }
    return py::make_tuple(datasets, draws);
  }

  Int64Array counts(std::int64_t position) {
    require_position(position);
    Int64Array result(static_cast<py::ssize_t>(shares_.size()));
    std::int64_t* to = result.mutable_data();
    {
      py::gil_scoped_release without_gil;
      const std::lock_guard<std::mutex> lock(mutex_);
      Walk& walk = nearest(position);
      walk.seek(position);
      std::copy(walk.draws().begin(), walk.draws().end(), to);
    }
    return result;
  }

 private:
  static void require_position(std::int64_t position) {
    require(position >= 0 && position < kMostPosition, "positions must lie between 0 and 2^62");
  }

  // The walk that is soonest at `position`; of equal ones that which was not used for longest. It becomes the first.
  Walk& nearest(std::int64_t position) {
    if (walks_.empty()) {
      for (int n = 0; n < kWalks; ++n) walks_.emplace_back(shares_, block_length_);
    }
    auto best = walks_.begin();
    for (auto walk = walks_.begin(); walk != walks_.end(); ++walk) {
      if (walk->distance(position) <= best->distance(position)) best = walk;
    }
    walks_.splice(walks_.begin(), walks_, best);
    return walks_.front();
  }

  // So that readers at several places (batches are made ahead, epochs are counted behind) do not send each other back.
  static constexpr int kWalks = 4;
  const Shares shares_;
  const std::int64_t block_length_;
  std::list<Walk> walks_;
  std::mutex mutex_;
};

}  // namespace

PYBIND11_MODULE(blending_helpers, module) {
  py::class_<BlendOrder>(module, "BlendOrder")
      .def(py::init<const Int64Array&, std::int64_t>(), py::arg("rates"), py::arg("least_block") = 4096)
      .def_property_readonly("block_length", &BlendOrder::block_length)
      .def("draws", &BlendOrder::draws, py::arg("positions"))
      .def("counts", &BlendOrder::counts, py::arg("position"));
}
