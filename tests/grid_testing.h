// The grid of tests: what a cell is, which cells make sense, and lists of cells in which every pair
// of values occurs. grid_problem.h turns a cell into tensors and calls.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "annulus/targets.h"

namespace annulus::testing {

enum Factor : std::size_t {
  kMask,
  kAlignment,
  kSegments,
  kKvLengths,
  kSinks,
  kCap,
  kBias,
  kDropout,
  kWantDBias,
  kWantDSinks,
  kWithDLse,
  kScale,
  kPartition,
  kKvPartition,
  kWorkers,
  kTopology,
  kTravel,
  kFused,
  kThreads,
  kForwardBlocks,
  kBackwardBlocks,
  kHeads,
  kDims,
  kDType,
  kOutDType,
  kGradientDType,
  kDoutDType,
  kTarget,
  kLengths,
  kBatch,
  kLayout,
  kInput,
  kTransfer,
  kCall,
  kFactors,
};

struct FactorValues {
  std::string name;
  std::vector<std::string> values;  // the simplest first: failing cells shrink towards it
};

// "default", then what this CPU runs, the AMX kernel on simulated tiles included.
inline std::vector<std::string> grid_targets() {
  std::vector<std::string> names{"default"};
  for (const Target& target : targets()) {
    if (target.available) names.push_back(target.name);
  }
  if (std::find(names.begin(), names.end(), "avx512") != names.end())
    names.emplace_back("amx_simulated");
  return names;
}

inline const std::array<FactorValues, kFactors>& grid_factors() {
  static const std::array<FactorValues, kFactors> factors{{
      {"mask",
       {"full", "causal", "window_left", "window_right", "window", "causal_window", "chunked",
        "causal_chunked", "prefix", "per_head", "block_sparse", "attention_mask"}},
      {"alignment", {"bottom_right", "top_left"}},
      {"segments", {"none", "one", "padding", "documents"}},
      {"kv_lengths", {"none", "some_zero", "some_full"}},
      {"sinks", {"none", "per_head", "shared", "several"}},
      {"cap", {"none", "3"}},
      {"bias", {"none", "full", "one_batch", "one_head", "one", "narrow"}},
      {"dropout", {"0", "0.1", "0.5"}},
      {"dbias", {"no", "yes"}},
      {"dsinks", {"no", "yes"}},
      {"dlse", {"no", "yes"}},
      {"scale", {"default", "0.05", "-0.2", "0"}},
      {"partition", {"contiguous", "striped", "zigzag", "random"}},
      {"kv_partition", {"same", "contiguous", "striped", "zigzag", "random"}},
      {"workers", {"1", "2", "3", "4", "5", "8", "16", "64"}},
      {"topology", {"ring", "linear"}},
      {"travel", {"auto", "keys", "queries"}},
      {"fused", {"yes", "no"}},
      {"threads", {"1", "2", "3"}},
      {"forward_blocks", {"0/0", "1/1", "37/50", "0/17", "1099511627776/1099511627776"}},
      {"backward_blocks", {"0/0", "1/1", "37/50", "40/0", "1099511627776/1099511627776"}},
      {"heads", {"1/1", "4/1", "6/2", "5/5"}},
      {"dims", {"64/64", "80/80", "128/128", "192/128", "33/7", "1/1", "96/160"}},
      {"dtype", {"float32", "bfloat16", "float16"}},
      {"out", {"same", "float32"}},
      {"gradients", {"same", "float32"}},
      {"dout", {"same", "float32"}},
      {"target", grid_targets()},
      {"lengths", {"odd", "even", "q_short", "q_long", "few", "no_queries", "no_keys", "one"}},
      {"batch", {"1", "2", "3"}},
      {"layout", {"bshd", "bhsd", "bhds", "mixed", "embedded"}},
      {"input", {"normal", "outliers", "large", "growing", "hidden_nan", "hidden_inf"}},
      {"transfer", {"lend", "copy"}},
      {"call", {"global", "spmd", "attention", "with_gradients"}},
  }};
  return factors;
}

// One value per factor, -1 while it is open.
struct Cell {
  std::array<int, kFactors> value{};
  std::uint64_t seed = 1;

  [[nodiscard]] const std::string& get(Factor f) const {
    return grid_factors()[f].values[static_cast<std::size_t>(value[f])];
  }
  [[nodiscard]] bool is(Factor f, std::string_view name) const {
    return value[f] >= 0 && get(f) == name;
  }
  [[nodiscard]] bool is_not(Factor f, std::string_view name) const {
    return value[f] >= 0 && get(f) != name;
  }
  [[nodiscard]] std::int64_t number(Factor f) const { return std::stoll(get(f)); }
  // "6/2" -> {6, 2}
  [[nodiscard]] std::pair<std::int64_t, std::int64_t> numbers(Factor f) const {
    const std::string& text = get(f);
    return {std::stoll(text), std::stoll(text.substr(text.find('/') + 1))};
  }
};

inline Cell open_cell() {
  Cell cell;
  cell.value.fill(-1);
  return cell;
}

// "mask=causal workers=3 ... seed=7"; what has its simplest value is left out.
inline std::string describe(const Cell& cell) {
  std::string text;
  for (std::size_t f = 0; f < kFactors; ++f) {
    if (cell.value[f] != 0)
      text += grid_factors()[f].name + "=" + cell.get(static_cast<Factor>(f)) + " ";
  }
  return text + "seed=" + std::to_string(cell.seed);
}

inline Cell parse_cell(const std::string& text) {
  Cell cell;
  std::istringstream words(text);
  for (std::string word; words >> word;) {
    const std::size_t equals = word.find('=');
    const std::string name = word.substr(0, equals), value = word.substr(equals + 1);
    if (name == "seed") {
      cell.seed = std::stoull(value);
      continue;
    }
    bool found = false;
    for (std::size_t f = 0; f < kFactors; ++f) {
      const FactorValues& factor = grid_factors()[f];
      const auto at = std::find(factor.values.begin(), factor.values.end(), value);
      if (factor.name != name || at == factor.values.end()) continue;
      cell.value[f] = static_cast<int>(at - factor.values.begin());
      found = true;
    }
    if (!found) throw std::invalid_argument("no such value of the grid: " + word);
  }
  return cell;
}

// Do the values so far exclude each other? attention() has no ring to configure.
inline bool contradicts(const Cell& c) {
  const bool unequal = c.is(kLengths, "q_short") || c.is(kLengths, "q_long") ||
                       c.is(kLengths, "few") || c.is(kLengths, "no_queries") ||
                       c.is(kLengths, "no_keys");
  const bool bf16_target =
      c.is(kTarget, "avx512_bf16") || c.is(kTarget, "amx_simulated") || c.is(kTarget, "amx");
  const bool ring = c.is_not(kWorkers, "1") || c.is_not(kPartition, "contiguous") ||
                    c.is_not(kKvPartition, "same") || c.is_not(kTopology, "ring") ||
                    c.is_not(kTravel, "auto") || c.is_not(kFused, "yes") ||
                    c.is_not(kTransfer, "lend");
  const bool rows_stay = c.is_not(kBias, "none") || c.is(kMask, "attention_mask");
  return (c.is(kWantDBias, "yes") && c.is(kBias, "none")) ||
         (c.is(kWantDSinks, "yes") && c.is(kSinks, "none")) ||
         (c.is(kSegments, "one") && unequal) || (bf16_target && c.is_not(kDType, "bfloat16")) ||
         (c.is(kCall, "attention") && ring) ||
         (c.is(kCall, "spmd") && c.is(kTravel, "queries") && rows_stay) ||
         (c.is(kPartition, "random") && c.is(kKvPartition, "same") && unequal);
}

// Which pairs of values have been seen.
class PairCoverage {
 public:
  PairCoverage() {
    for (std::size_t f = 0; f < kFactors; ++f) {
      first_[f] = values_;
      values_ += grid_factors()[f].values.size();
    }
    seen_.resize(values_ * values_);
  }
  [[nodiscard]] bool seen(std::size_t f, int a, std::size_t g, int b) const {
    return seen_[index(f, a, g, b)] != 0;
  }
  void add(const Cell& cell) {
    for (std::size_t f = 0; f < kFactors; ++f)
      for (std::size_t g = 0; g < kFactors; ++g)
        seen_[index(f, cell.value[f], g, cell.value[g])] = 1;
  }
  // Pairs of value a of factor f with the values that the cell has, not seen so far.
  [[nodiscard]] int gain(const Cell& cell, std::size_t f, int a) const {
    int gain = 0;
    for (std::size_t g = 0; g < kFactors; ++g) {
      if (g != f && cell.value[g] >= 0 && !seen(f, a, g, cell.value[g])) ++gain;
    }
    return gain;
  }

 private:
  [[nodiscard]] std::size_t index(std::size_t f, int a, std::size_t g, int b) const {
    return (first_[f] + static_cast<std::size_t>(a)) * values_ + first_[g] +
           static_cast<std::size_t>(b);
  }
  std::array<std::size_t, kFactors> first_{};
  std::size_t values_ = 0;
  std::vector<std::uint8_t> seen_;
};

// Calls visit(cell with only this pair) for every pair that makes sense.
template <class Visit>
void for_each_pair(const Visit& visit) {
  for (std::size_t f = 0; f < kFactors; ++f) {
    for (std::size_t g = f + 1; g < kFactors; ++g) {
      for (std::size_t a = 0; a < grid_factors()[f].values.size(); ++a) {
        for (std::size_t b = 0; b < grid_factors()[g].values.size(); ++b) {
          Cell cell = open_cell();
          cell.value[f] = static_cast<int>(a), cell.value[g] = static_cast<int>(b);
          if (!contradicts(cell)) visit(cell, f, g);
        }
      }
    }
  }
}

// Gives the open factors values in random order: those that cover most new pairs, or with
// coverage = nullptr any. False if no value fits some factor.
template <class Random>
bool complete(Cell& cell, const PairCoverage* coverage, Random& random) {
  std::array<std::size_t, kFactors> order{};
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::shuffle(order.begin(), order.end(), random);
  for (const std::size_t f : order) {
    if (cell.value[f] >= 0) continue;
    std::vector<int> values(grid_factors()[f].values.size());
    std::iota(values.begin(), values.end(), 0);
    std::shuffle(values.begin(), values.end(), random);
    int best = -1, best_gain = -1;
    for (const int value : values) {
      cell.value[f] = value;
      if (contradicts(cell)) continue;
      const int gain = coverage == nullptr ? 0 : coverage->gain(cell, f, value);
      if (gain > best_gain) best = value, best_gain = gain;
    }
    cell.value[f] = best;
    if (best < 0) return false;
  }
  return true;
}

// Appends cells in which every pair that makes sense occurs.
inline void add_covering(std::vector<Cell>& cells, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  PairCoverage coverage;
  std::vector<Cell> pairs;
  for_each_pair([&](const Cell& cell, std::size_t, std::size_t) { pairs.push_back(cell); });
  std::shuffle(pairs.begin(), pairs.end(), random);
  for (const Cell& pair : pairs) {
    std::vector<std::size_t> fixed;
    for (std::size_t f = 0; f < kFactors; ++f)
      if (pair.value[f] >= 0) fixed.push_back(f);
    if (coverage.seen(fixed[0], pair.value[fixed[0]], fixed[1], pair.value[fixed[1]])) continue;
    for (int attempt = 0; attempt < 100; ++attempt) {
      Cell cell = pair;
      if (!complete(cell, &coverage, random)) continue;
      cell.seed = random() % 1000000;
      coverage.add(cell);
      cells.push_back(cell);
      break;
    }
  }
}

// Coverings until there are `count` cells.
inline std::vector<Cell> covering_cells(std::size_t count) {
  std::vector<Cell> cells;
  for (std::uint64_t seed = 20250; cells.size() < count; ++seed) add_covering(cells, seed);
  return cells;
}

// A random cell, the same for the same index.
inline Cell random_cell(std::uint64_t index) {
  std::mt19937_64 random(index * 0x9e3779b97f4a7c15U + 1);
  for (;;) {
    Cell cell = open_cell();
    if (!complete(cell, nullptr, random)) continue;
    cell.seed = random() % 1000000;
    return cell;
  }
}

}  // namespace annulus::testing
