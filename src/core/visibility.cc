#include "core/visibility.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>

namespace annulus {
namespace {

constexpr int kMaxLanes = 32;
constexpr std::size_t kKeysAtOnce = 64;
constexpr std::int64_t kQueryLeaf = kMaxLanes;
constexpr std::int64_t kKeyLeaf = static_cast<std::int64_t>(kKeysAtOnce);

std::uint32_t low_bits(int count) {
  return static_cast<std::uint32_t>((std::uint64_t{1} << count) - 1);
}

TileClass meet(TileClass a, TileClass b) {
  if (a == TileClass::kEmpty || b == TileClass::kEmpty) return TileClass::kEmpty;
  return a == TileClass::kFull && b == TileClass::kFull ? TileClass::kFull : TileClass::kPartial;
}

TileClass classify_length(std::int64_t length, Interval keys) {
  if (keys.first >= length) return TileClass::kEmpty;
  return keys.last < length ? TileClass::kFull : TileClass::kPartial;
}

TileClass classify_segments(std::optional<std::int32_t> padding, SegmentRange q, SegmentRange k) {
  if (q.hi < k.lo || k.hi < q.lo) return TileClass::kEmpty;
  const auto only_padding = [&](SegmentRange range) {
    return padding.has_value() && range.lo == *padding && range.hi == *padding;
  };
  if (only_padding(q) || only_padding(k)) return TileClass::kEmpty;
  return q.lo == q.hi && k.lo == k.hi ? TileClass::kFull : TileClass::kPartial;
}

// One mask per head: full or empty only if every head agrees.
TileClass classify_heads(const std::vector<Mask>& masks, const TileBox& box) {
  const auto of_head = [&](int head) {
    return masks[static_cast<std::size_t>(head)].classify(box.queries, box.keys);
  };
  const TileClass found = of_head(box.head_first);
  if (found == TileClass::kPartial) return found;
  for (int head = box.head_first + 1; head <= box.head_last; ++head) {
    if (of_head(head) != found) return TileClass::kPartial;
  }
  return found;
}

// Lanes of one head, gathered because the heads of a token are neighbouring lanes.
struct HeadLanes {
  int count = 0;
  std::array<std::int64_t, kMaxLanes> position;
  std::array<std::uint32_t, kMaxLanes> bit;
};

HeadLanes lanes_of_head(const Lanes& lanes, std::int32_t head) {
  HeadLanes found;
  for (int n = 0; n < lanes.count; ++n) {
    if (lanes.head[n] != head) continue;
    const auto at = static_cast<std::size_t>(found.count++);
    found.position[at] = lanes.position[n];
    found.bit[at] = std::uint32_t{1} << n;
  }
  return found;
}

// Adds the bits of one head's mask to those of the other heads.
void add_head_bits(const Mask& mask, const HeadLanes& lanes, std::span<const std::int64_t> keys,
                   std::uint32_t* bits) {
  const std::span<const std::int64_t> queries(lanes.position.data(),
                                              static_cast<std::size_t>(lanes.count));
  std::array<std::uint32_t, kKeysAtOnce> packed;
  for (std::size_t begin = 0; begin < keys.size(); begin += kKeysAtOnce) {
    const auto some = keys.subspan(begin, std::min(kKeysAtOnce, keys.size() - begin));
    mask.lane_bits(queries, some, packed.data());
    for (std::size_t k = 0; k < some.size(); ++k) {
      for (std::uint32_t left = packed[k]; left != 0; left &= left - 1) {
        bits[begin + k] |= lanes.bit[static_cast<std::size_t>(std::countr_zero(left))];
      }
    }
  }
}

void mask_bits(const std::vector<Mask>& masks, const Lanes& lanes,
               std::span<const std::int64_t> keys, std::uint32_t* bits) {
  const std::span<const std::int64_t> queries(lanes.position,
                                              static_cast<std::size_t>(lanes.count));
  if (masks.empty()) {
    std::fill_n(bits, keys.size(), low_bits(lanes.count));
    return;
  }
  const auto mask_of = [&](std::int32_t head) -> const Mask& {
    return masks.size() == 1 ? masks[0] : masks[static_cast<std::size_t>(head)];
  };
  const auto other = [&](std::int32_t head) { return head != lanes.head[0]; };
  if (masks.size() == 1 || std::none_of(lanes.head, lanes.head + lanes.count, other)) {
    if (lanes.count > 0) return mask_of(lanes.head[0]).lane_bits(queries, keys, bits);
  }
  std::fill_n(bits, keys.size(), 0U);
  std::uint32_t done = 0;
  for (int n = 0; n < lanes.count; ++n) {
    if ((done >> n & 1U) != 0) continue;
    const HeadLanes same = lanes_of_head(lanes, lanes.head[n]);
    for (int s = 0; s < same.count; ++s) done |= same.bit[static_cast<std::size_t>(s)];
    add_head_bits(mask_of(lanes.head[n]), same, keys, bits);
  }
}

void keep_segments(std::optional<std::int32_t> padding, const Lanes& lanes, const Keys& keys,
                   std::uint32_t* bits) {
  std::uint32_t same = 0;
  for (std::size_t k = 0; k < keys.position.size(); ++k) {
    const std::int32_t segment = keys.segment[k];
    // Segments are runs nearly always, so most keys find their lanes known.
    if (k == 0 || segment != keys.segment[k - 1]) {
      same = 0;
      const int count = padding == segment ? 0 : lanes.count;
      for (int n = 0; n < count; ++n) {
        same |= static_cast<std::uint32_t>(lanes.segment[n] == segment) << n;
      }
    }
    bits[k] &= same;
  }
}

void keep_dense(const TensorView& mask, std::int64_t batch, const Lanes& lanes,
                std::span<const std::int64_t> keys, std::uint32_t* bits) {
  std::array<const std::byte*, kMaxLanes> entries;
  const std::int64_t batch_index = mask.shape[0] == 1 ? 0 : batch;
  for (int n = 0; n < lanes.count; ++n) {
    const std::int64_t head = mask.shape[1] == 1 ? 0 : lanes.head[n];
    entries[static_cast<std::size_t>(n)] = mask.at(batch_index, head, lanes.row[n], 0);
  }
  for (std::size_t k = 0; k < keys.size(); ++k) {
    const std::int64_t column = keys[k] * mask.strides[3];
    for (std::uint32_t left = bits[k]; left != 0; left &= left - 1) {
      const int n = std::countr_zero(left);
      if (entries[static_cast<std::size_t>(n)][column] == std::byte{0}) {
        bits[k] &= ~(std::uint32_t{1} << n);
      }
    }
  }
}

}  // namespace

bool Visibility::per_head() const {
  return rules_.masks.size() > 1 || (rules_.attention_mask && rules_.attention_mask.shape[1] > 1);
}

TileClass Visibility::classify(const TileBox& box) const {
  if (box.queries.last < box.queries.first || box.keys.last < box.keys.first) {
    return TileClass::kEmpty;
  }
  TileClass found = rules_.attention_mask ? TileClass::kPartial : TileClass::kFull;
  if (!rules_.kv_lengths.empty()) {
    const std::int64_t length = rules_.kv_lengths[static_cast<std::size_t>(box.batch)];
    found = meet(found, classify_length(length, box.keys));
  }
  if (rules_.segments && found != TileClass::kEmpty) {
    found = meet(
        found, classify_segments(rules_.padding_segment_id, box.query_segments, box.key_segments));
  }
  if (rules_.masks.empty() || found == TileClass::kEmpty) return found;
  return meet(found, rules_.masks.size() == 1 ? rules_.masks[0].classify(box.queries, box.keys)
                                              : classify_heads(rules_.masks, box));
}

void Visibility::lane_bits(std::int64_t batch, const Lanes& lanes, const Keys& keys,
                           std::uint32_t* bits) const {
  mask_bits(rules_.masks, lanes, keys.position, bits);
  if (!rules_.kv_lengths.empty()) {
    const std::int64_t length = rules_.kv_lengths[static_cast<std::size_t>(batch)];
    const auto end = std::lower_bound(keys.position.begin(), keys.position.end(), length);
    const auto seen = static_cast<std::size_t>(end - keys.position.begin());
    std::fill_n(bits + seen, keys.position.size() - seen, 0U);
  }
  if (rules_.segments) keep_segments(rules_.padding_segment_id, lanes, keys, bits);
  if (rules_.attention_mask) keep_dense(rules_.attention_mask, batch, lanes, keys.position, bits);
}

namespace {

// Tokens under halving: node `index` of level l holds the tokens [index, index + 1) * (leaf << l).
class TokenTree {
 public:
  struct Node {
    int level = 0;
    std::int64_t index = 0;
  };

  TokenTree(std::span<const std::int64_t> position, std::span<const std::int64_t> row,
            std::span<const std::int32_t> segment, std::int64_t leaf)
      : position_(position), row_(row), segment_(segment), leaf_(leaf) {
    if (!segment_.empty()) find_segment_ranges();
  }

  [[nodiscard]] std::int64_t size() const { return static_cast<std::int64_t>(position_.size()); }
  [[nodiscard]] Node root() const {
    Node node;
    while ((leaf_ << node.level) < size()) ++node.level;
    return node;
  }
  [[nodiscard]] std::int64_t begin(Node node) const { return node.index * (leaf_ << node.level); }
  [[nodiscard]] std::int64_t end(Node node) const {
    return std::min(size(), (node.index + 1) * (leaf_ << node.level));
  }
  [[nodiscard]] std::int64_t count(Node node) const {
    return std::max<std::int64_t>(0, end(node) - begin(node));
  }
  // Of a node that is not empty.
  [[nodiscard]] Interval interval(Node node) const {
    return {position_[index_of(begin(node))], position_[index_of(end(node) - 1)]};
  }
  [[nodiscard]] SegmentRange segments(Node node) const {
    if (segment_ranges_.empty()) return {};
    return segment_ranges_[static_cast<std::size_t>(node.level)][index_of(node.index)];
  }
  [[nodiscard]] Keys keys(Node node) const {
    const auto first = index_of(begin(node));
    return {position_.subspan(first, index_of(count(node))),
            segment_.empty() ? nullptr : segment_.data() + first};
  }
  [[nodiscard]] Lanes lanes(Node node, std::int32_t head) const;

 private:
  static std::size_t index_of(std::int64_t index) { return static_cast<std::size_t>(index); }
  void find_segment_ranges();

  std::span<const std::int64_t> position_;
  std::span<const std::int64_t> row_;
  std::span<const std::int32_t> segment_;
  std::int64_t leaf_;
  std::vector<std::vector<SegmentRange>> segment_ranges_;  // [level][index]
};

Lanes TokenTree::lanes(Node node, std::int32_t head) const {
  Lanes lanes;
  const auto first = index_of(begin(node));
  lanes.count = static_cast<int>(count(node));
  const auto size = index_of(lanes.count);
  std::copy_n(position_.begin() + begin(node), size, lanes.position);
  std::copy_n(row_.begin() + begin(node), size, lanes.row);
  std::fill_n(lanes.head, size, head);
  for (std::size_t n = 0; n < size; ++n) {
    lanes.segment[n] = segment_.empty() ? 0 : segment_[first + n];
  }
  return lanes;
}

void TokenTree::find_segment_ranges() {
  std::vector<SegmentRange> level;
  for (Node node; begin(node) < size(); ++node.index) {
    const auto own = segment_.subspan(index_of(begin(node)), index_of(count(node)));
    const auto [lo, hi] = std::minmax_element(own.begin(), own.end());
    level.push_back({*lo, *hi});
  }
  while (level.size() > 1) {
    std::vector<SegmentRange> upper((level.size() + 1) / 2);
    for (std::size_t n = 0; n < upper.size(); ++n) {
      const SegmentRange a = level[2 * n];
      const SegmentRange b = level[std::min(2 * n + 1, level.size() - 1)];
      upper[n] = {std::min(a.lo, b.lo), std::max(a.hi, b.hi)};
    }
    segment_ranges_.push_back(std::move(level));
    level = std::move(upper);
  }
  segment_ranges_.push_back(std::move(level));
}

// Counts visible pairs of one head by halving rectangles until their class says all.
class PairCounter {
 public:
  PairCounter(const Visibility& visibility, std::int64_t batch, const TokenTree& queries,
              const TokenTree& keys, bool stop_at_first)
      : visibility_(visibility),
        batch_(batch),
        queries_(queries),
        keys_(keys),
        stop_at_first_(stop_at_first) {}

  std::int64_t count(int head) {
    head_ = head;
    pairs_ = 0;
    visit(queries_.root(), keys_.root());
    return pairs_;
  }

 private:
  using Node = TokenTree::Node;

  void visit(Node q, Node k) {
    if (queries_.count(q) == 0 || keys_.count(k) == 0 || (stop_at_first_ && pairs_ > 0)) return;
    const TileClass found =
        visibility_.classify({batch_, head_, head_, queries_.interval(q), keys_.interval(k),
                              queries_.segments(q), keys_.segments(k)});
    if (found == TileClass::kEmpty) return;
    if (found == TileClass::kFull) {
      pairs_ += queries_.count(q) * keys_.count(k);
    } else if (q.level == 0 && k.level == 0) {
      count_leaf(q, k);
    } else if (q.level > 0 && (k.level == 0 || queries_.count(q) >= keys_.count(k))) {
      visit({q.level - 1, 2 * q.index}, k);
      visit({q.level - 1, 2 * q.index + 1}, k);
    } else {
      visit(q, {k.level - 1, 2 * k.index});
      visit(q, {k.level - 1, 2 * k.index + 1});
    }
  }

  void count_leaf(Node q, Node k) {
    std::array<std::uint32_t, kKeysAtOnce> bits;
    const Keys keys = keys_.keys(k);
    visibility_.lane_bits(batch_, queries_.lanes(q, head_), keys, bits.data());
    for (std::size_t n = 0; n < keys.position.size(); ++n) pairs_ += std::popcount(bits[n]);
  }

  const Visibility& visibility_;
  std::int64_t batch_;
  const TokenTree& queries_;
  const TokenTree& keys_;
  bool stop_at_first_;
  int head_ = 0;
  std::int64_t pairs_ = 0;
};

TokenTree tree_of(const TokenSide& side, std::int64_t batch, std::int64_t begin, std::int64_t end,
                  std::int64_t leaf) {
  const auto first = static_cast<std::size_t>(begin);
  const auto count = static_cast<std::size_t>(end - begin);
  const auto skipped = static_cast<std::size_t>(batch * side.rows->size()) + first;
  const std::span<const std::int64_t> position(side.rows->position);
  const std::span<const std::int64_t> row(side.rows->row);
  return {position.subspan(first, count), row.subspan(first, count),
          side.segments.empty() ? side.segments : side.segments.subspan(skipped, count), leaf};
}

std::int64_t count_pairs(const Visibility& visibility, std::int64_t batch, int head_first,
                         int head_last, const TokenTree& queries, const TokenTree& keys,
                         bool stop_at_first) {
  PairCounter counter(visibility, batch, queries, keys, stop_at_first);
  const int heads = head_last - head_first + 1;
  if (heads <= 0) return 0;
  if (!visibility.per_head()) return heads * counter.count(head_first);
  std::int64_t pairs = 0;
  for (int head = head_first; head <= head_last && !(stop_at_first && pairs > 0); ++head) {
    pairs += counter.count(head);
  }
  return pairs;
}

}  // namespace

std::int64_t count_visible(const Visibility& visibility, std::int64_t batch, int head_first,
                           int head_last, const TokenSide& queries, std::int64_t q_begin,
                           std::int64_t q_end, const TokenSide& keys) {
  assert(0 <= q_begin && q_begin <= q_end && q_end <= queries.rows->size());
  return count_pairs(visibility, batch, head_first, head_last,
                     tree_of(queries, batch, q_begin, q_end, kQueryLeaf),
                     tree_of(keys, batch, 0, keys.rows->size(), kKeyLeaf), false);
}

bool any_visible(const Visibility& visibility, std::int64_t batch, int head_first, int head_last,
                 const TokenSide& queries, const TokenSide& keys) {
  return count_pairs(visibility, batch, head_first, head_last,
                     tree_of(queries, batch, 0, queries.rows->size(), kQueryLeaf),
                     tree_of(keys, batch, 0, keys.rows->size(), kKeyLeaf), true) > 0;
}

}  // namespace annulus
