// All rules of visibility of one call, as one question per rectangle of pairs. The rules of
// positions live in Mask; what depends on the batch row or on the caller's tensors (segment ids,
// lengths, dense masks) is added here.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "annulus/mask.h"
#include "annulus/tensor.h"
#include "core/rows.h"

namespace annulus {

// Smallest and largest segment id of some tokens.
struct SegmentRange {
  std::int32_t lo = 0;
  std::int32_t hi = 0;
};

// Queries of one (batch row, KV head) that share a tile, at most 32, positions rising.
struct Lanes {
  int count = 0;
  std::int64_t position[32];
  std::int64_t row[32];      // in the caller's q-side tensors
  std::int32_t head[32];     // query head
  std::int32_t segment[32];  // 0 without segment ids
};

struct Keys {
  std::span<const std::int64_t> position;  // rising
  const std::int32_t* segment = nullptr;   // null without segment ids
};

// Rectangle for classification.
struct TileBox {
  std::int64_t batch = 0;
  int head_first = 0;  // query heads
  int head_last = 0;
  Interval queries;
  Interval keys;
  SegmentRange query_segments;
  SegmentRange key_segments;
};

class Visibility {
 public:
  // Empty views and vectors mean that the rule is absent.
  struct Rules {
    std::vector<Mask> masks;               // one for all heads, or one per query head
    std::vector<std::int64_t> kv_lengths;  // [batch]
    bool segments = false;
    std::optional<std::int32_t> padding_segment_id;
    TensorView attention_mask;  // [batch or 1, heads or 1, q rows, kv positions]
  };

  Visibility() = default;
  explicit Visibility(Rules rules) : rules_(std::move(rules)) {}

  [[nodiscard]] const Rules& rules() const { return rules_; }
  // True if two query heads may see different keys.
  [[nodiscard]] bool per_head() const;
  [[nodiscard]] TileClass classify(const TileBox& box) const;
  // bits[k]: bit n is set iff lane n sees key k.
  void lane_bits(std::int64_t batch, const Lanes& lanes, const Keys& keys,
                 std::uint32_t* bits) const;

 private:
  Rules rules_;
};

// The side of a rank that visibility is asked about: its rows and their segment ids (dense
// [batch][rows], in the order of Rows; empty without segment ids).
struct TokenSide {
  const Rows* rows = nullptr;
  std::span<const std::int32_t> segments;
};

// Number of visible (query head, query, key) triples of batch row `batch`, query heads
// head_first..head_last, queries [q_begin, q_end) of `queries` (indices into Rows) and all of
// `keys`. Exact, by halving rectangles until each is empty or full or small enough to look at: cost
// grows with the mask's edge, not with its area (dense masks excepted).
std::int64_t count_visible(const Visibility& visibility, std::int64_t batch, int head_first,
                           int head_last, const TokenSide& queries, std::int64_t q_begin,
                           std::int64_t q_end, const TokenSide& keys);
// True iff that count is not zero; stops at the first visible pair.
bool any_visible(const Visibility& visibility, std::int64_t batch, int head_first, int head_last,
                 const TokenSide& queries, const TokenSide& keys);

}  // namespace annulus
