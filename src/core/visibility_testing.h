// Random rules of visibility for the tests of core, with the meaning of each written down a second
// time: slow, and straight from the definitions.
#pragma once

#include <rapidcheck.h>

#include <algorithm>
#include <cstdint>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "core/visibility.h"

namespace annulus::testing {

// Checks a property on many random cases; a failing one is shrunk and printed. RC_PARAMS repeats
// it.
template <class Property>
bool holds(int cases, Property&& property) {
  rc::detail::TestParams params = rc::detail::configuration().testParams;
  params.maxSuccess = cases;
  params.maxDiscardRatio = 1000;
  const auto result = rc::detail::checkTestable(std::forward<Property>(property),
                                                rc::detail::TestMetadata(), params);
  if (result.template is<rc::detail::SuccessResult>()) return true;
  rc::detail::printResultMessage(result, std::cerr);
  std::cerr << std::endl;
  return false;
}

// A number in [first, last], all alike from the first case on.
inline std::int64_t pick(std::int64_t first, std::int64_t last) {
  return *rc::gen::resize(rc::kNominalSize, rc::gen::inRange<std::int64_t>(first, last + 1));
}

// A number in [0, most], small in the first cases.
inline std::int64_t pick_length(std::int64_t most) {
  return *rc::gen::inRange<std::int64_t>(0, most + 1);
}

// A bit per pair without storing any: true for `eighths` of 8.
inline bool coin(std::int64_t seed, std::int64_t eighths, std::int64_t i, std::int64_t j) {
  std::uint64_t x = static_cast<std::uint64_t>(seed) * 0x9e3779b97f4a7c15U + 1;
  for (const std::int64_t word : {i, j}) {
    x = (x ^ static_cast<std::uint64_t>(word)) * 0xbf58476d1ce4e5b9U;
    x ^= x >> 31;
  }
  return static_cast<std::int64_t>(x >> 20 & 7U) < eighths;
}

enum class RuleKind : std::uint8_t {
  kFull,
  kCausal,
  kWindow,
  kChunked,
  kPrefix,
  kDense,
  kBlockSparse,
  kAnd,
  kOr
};

// A mask that knows its own definition.
struct Rule {
  RuleKind kind = RuleKind::kFull;
  std::int64_t a = 0, b = 0, c = 0;  // in the order of the Mask function's arguments
  std::int64_t seed = 0, eighths = 0;
  std::vector<Rule> parts = {};

  [[nodiscard]] bool visible(std::int64_t i, std::int64_t j) const {
    switch (kind) {
      case RuleKind::kFull:
        return true;
      case RuleKind::kCausal:
        return j <= i + a;
      case RuleKind::kWindow:
        return (a == -1 || i + c - a <= j) && (b == -1 || j <= i + c + b);
      case RuleKind::kChunked:
        return i / a == j / a && j <= i;
      case RuleKind::kPrefix:
        return j < a;
      case RuleKind::kDense:
        return i < a && j < b && coin(seed, eighths, i, j);
      case RuleKind::kBlockSparse:
        return i / a < b && j / a < c && coin(seed, eighths, i / a, j / a);
      case RuleKind::kAnd:
        return parts[0].visible(i, j) && parts[1].visible(i, j);
      case RuleKind::kOr:
        return parts[0].visible(i, j) || parts[1].visible(i, j);
    }
    return false;
  }

  [[nodiscard]] Mask mask() const {
    switch (kind) {
      case RuleKind::kFull:
        return Mask::full();
      case RuleKind::kCausal:
        return Mask::causal(a);
      case RuleKind::kWindow:
        return Mask::sliding_window(a, b, c);
      case RuleKind::kChunked:
        return Mask::chunked(a);
      case RuleKind::kPrefix:
        return Mask::prefix(a);
      case RuleKind::kDense:
        return Mask::dense(a, b, bitmap(a, b));
      case RuleKind::kBlockSparse:
        return Mask::block_sparse(a, b, c, bitmap(b, c));
      case RuleKind::kAnd:
        return parts[0].mask() & parts[1].mask();
      case RuleKind::kOr:
        return parts[0].mask() | parts[1].mask();
    }
    return Mask::full();
  }

 private:
  [[nodiscard]] std::vector<std::uint8_t> bitmap(std::int64_t rows, std::int64_t columns) const {
    std::vector<std::uint8_t> entries;
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t column = 0; column < columns; ++column) {
        entries.push_back(coin(seed, eighths, row, column) ? 255 : 0);
      }
    }
    return entries;
  }
};

inline std::ostream& operator<<(std::ostream& text, const Rule& rule) {
  return text << rule.mask().describe() << " seed " << rule.seed << " eighths " << rule.eighths;
}

// One rule that means something on sequences of about n tokens.
inline Rule pick_simple_rule(std::int64_t n) {
  Rule rule;
  rule.kind = static_cast<RuleKind>(pick(0, static_cast<int>(RuleKind::kBlockSparse)));
  rule.seed = pick(0, 1000);
  rule.eighths = pick(0, 8);
  switch (rule.kind) {
    case RuleKind::kCausal:
      rule.a = pick(-n, n);
      break;
    case RuleKind::kWindow:
      rule.a = pick(-1, n);
      rule.b = pick(-1, n);
      rule.c = pick(-n, n);
      break;
    case RuleKind::kChunked:
      rule.a = pick(1, n + 1);
      break;
    case RuleKind::kPrefix:
      rule.a = pick(0, n + 1);
      break;
    case RuleKind::kDense:
      rule.a = pick(0, n + 2);
      rule.b = pick(0, n + 2);
      break;
    case RuleKind::kBlockSparse:
      rule.a = pick(1, n / 2 + 1);
      rule.b = pick(0, 8);
      rule.c = pick(0, 8);
      break;
    default:
      break;
  }
  return rule;
}

// A tree of rules, at most `depth` operators deep.
inline Rule pick_rule(std::int64_t n, int depth) {
  if (depth == 0 || pick(0, 2) == 0) return pick_simple_rule(n);
  Rule rule;
  rule.kind = pick(0, 1) == 0 ? RuleKind::kAnd : RuleKind::kOr;
  rule.parts = {pick_rule(n, depth - 1), pick_rule(n, depth - 1)};
  return rule;
}

// Segment ids as a function of the position: runs as in packed sequences, or any order.
struct Segments {
  std::int64_t run = 1;
  std::int64_t seed = 0;
  bool sorted = true;

  [[nodiscard]] std::int32_t id(std::int64_t batch, std::int64_t position) const {
    const std::int64_t index = (position + batch) / run;
    const std::int64_t id = sorted ? index : (index * 7 + seed) % 5;
    return static_cast<std::int32_t>(id - 1);
  }
};

// Everything that decides about visibility in one call.
struct Scene {
  std::int64_t q_len = 0, kv_len = 0, batch = 1;
  int heads = 1;
  std::vector<Rule> rules;            // none, one, or one per head
  std::vector<std::int64_t> lengths;  // none, or one per batch row
  bool segments = false;
  Segments q_segments, kv_segments;
  int padding = -100;  // -100: none
  bool attention_mask = false;
  std::int64_t mask_batch = 1, mask_heads = 1, mask_seed = 0, mask_eighths = 4;
  bool keys_first = false;  // strides of the attention mask

  [[nodiscard]] bool mask_entry(std::int64_t b, std::int64_t h, std::int64_t i,
                                std::int64_t j) const {
    const std::int64_t of = (b % mask_batch) * 10 + h % mask_heads;
    return coin(mask_seed + of, mask_eighths, i, j);
  }

  [[nodiscard]] bool visible(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
    const auto head = rules.size() == 1 ? 0 : static_cast<std::size_t>(h);
    if (!rules.empty() && !rules[head].visible(i, j)) return false;
    if (!lengths.empty() && j >= lengths[static_cast<std::size_t>(b)]) return false;
    if (segments) {
      const std::int32_t id = q_segments.id(b, i);
      if (id != kv_segments.id(b, j) || id == padding) return false;
    }
    return !attention_mask || mask_entry(b, h, i, j);
  }
};

inline std::ostream& operator<<(std::ostream& text, const Scene& s) {
  text << "q_len " << s.q_len << " kv_len " << s.kv_len << " batch " << s.batch << " heads "
       << s.heads;
  for (const Rule& rule : s.rules) text << "\n  mask " << rule;
  for (const std::int64_t length : s.lengths) text << "\n  length " << length;
  if (s.segments) {
    for (const Segments& ids : {s.q_segments, s.kv_segments}) {
      text << "\n  segments of run " << ids.run << " seed " << ids.seed << " sorted " << ids.sorted;
    }
    text << "\n  padding " << s.padding;
  }
  if (s.attention_mask) {
    text << "\n  attention_mask [" << s.mask_batch << ", " << s.mask_heads << "] seed "
         << s.mask_seed << " eighths " << s.mask_eighths << " keys_first " << s.keys_first;
  }
  return text;
}

inline Segments pick_segments(std::int64_t n, bool sorted) {
  return {pick(1, n + 1), pick(0, 4), sorted};
}

// Each rule is absent as often as not, so that shrinking and rare combinations both have a chance.
inline Scene pick_scene(std::int64_t q_len, std::int64_t kv_len) {
  Scene s;
  s.q_len = q_len;
  s.kv_len = kv_len;
  s.batch = pick(1, 2);
  s.heads = static_cast<int>(pick(1, 3));
  const std::int64_t n = std::max(q_len, kv_len);
  const std::int64_t masks = pick(0, 3) == 3 ? s.heads : pick(0, 1);
  for (std::int64_t m = 0; m < masks; ++m) s.rules.push_back(pick_rule(n, 3));
  if (pick(0, 2) == 2) {
    for (std::int64_t b = 0; b < s.batch; ++b) s.lengths.push_back(pick(0, kv_len));
  }
  s.segments = pick(0, 2) == 2;
  if (s.segments) {
    const bool sorted = pick(0, 1) == 0;
    s.q_segments = pick_segments(n, sorted);
    s.kv_segments = pick(0, 1) == 0 ? s.q_segments : pick_segments(n, sorted);
    if (pick(0, 1) == 1) s.padding = static_cast<int>(pick(-1, 3));
  }
  s.attention_mask = pick(0, 3) == 3;
  if (s.attention_mask) {
    s.mask_batch = pick(0, 1) == 0 ? 1 : s.batch;
    s.mask_heads = pick(0, 1) == 0 ? 1 : s.heads;
    s.mask_seed = pick(0, 1000);
    s.mask_eighths = pick(0, 8);
    s.keys_first = pick(0, 1) == 1;
  }
  return s;
}

// The Visibility under test, with the tensors that it looks into. Row t of them is the query at
// positions[t].
class StagedScene {
 public:
  StagedScene(const Scene& scene, const std::vector<std::int64_t>& positions) {
    Visibility::Rules rules;
    for (const Rule& rule : scene.rules) rules.masks.push_back(rule.mask());
    rules.kv_lengths = scene.lengths;
    rules.segments = scene.segments;
    if (scene.padding != -100) rules.padding_segment_id = scene.padding;
    if (scene.attention_mask) rules.attention_mask = store_mask(scene, positions);
    visibility_ = Visibility(std::move(rules));
  }
  StagedScene(const StagedScene&) = delete;
  StagedScene& operator=(const StagedScene&) = delete;

  [[nodiscard]] const Visibility& visibility() const { return visibility_; }

 private:
  TensorView store_mask(const Scene& scene, const std::vector<std::int64_t>& positions) {
    const auto rows = static_cast<std::int64_t>(positions.size());
    TensorView view{
        nullptr, DType::kBool, {scene.mask_batch, scene.mask_heads, rows, scene.kv_len}, {}};
    // Memory order of the last two axes either way; rows a little longer than needed, as in a
    // slice.
    const std::int64_t slice = (rows + 3) * (scene.kv_len + 3);
    view.strides = {scene.mask_heads * slice, slice, scene.keys_first ? 1 : scene.kv_len + 3,
                    scene.keys_first ? rows + 3 : 1};
    storage_.assign(static_cast<std::size_t>(scene.mask_batch * scene.mask_heads * slice + 1), 1);
    view.data = storage_.data();
    for (std::int64_t b = 0; b < scene.mask_batch; ++b) {
      for (std::int64_t h = 0; h < scene.mask_heads; ++h) {
        for (std::int64_t t = 0; t < rows; ++t) {
          for (std::int64_t j = 0; j < scene.kv_len; ++j) {
            const auto at =
                view.at(b, h, t, j) - reinterpret_cast<const std::byte*>(storage_.data());
            storage_[static_cast<std::size_t>(at)] =
                scene.mask_entry(b, h, positions[static_cast<std::size_t>(t)], j) ? 1 : 0;
          }
        }
      }
    }
    return view;
  }

  std::vector<std::uint8_t> storage_;
  Visibility visibility_;
};

// Segment ids of the rows of a side, dense [batch][rows].
inline std::vector<std::int32_t> segment_ids(const Scene& scene, const Segments& segments,
                                             const Rows& rows) {
  std::vector<std::int32_t> ids;
  if (!scene.segments) return ids;
  for (std::int64_t b = 0; b < scene.batch; ++b) {
    for (const std::int64_t position : rows.position) ids.push_back(segments.id(b, position));
  }
  return ids;
}

}  // namespace annulus::testing
