#include "core/visibility.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "core/visibility_testing.h"

namespace annulus {
namespace {

using testing::holds;
using testing::pick;
using testing::pick_length;
using testing::pick_scene;
using testing::Scene;
using testing::segment_ids;
using testing::StagedScene;

constexpr std::size_t kMostLanes = 32;

Scene any_scene(std::int64_t most) {
  return *rc::gen::exec([=] { return pick_scene(pick_length(most), pick_length(most)); });
}

// Some tokens of [0, n) in the order of a shard: rising positions, rows in another order.
Rows any_rows(std::int64_t n) {
  return *rc::gen::exec([=] {
    const std::int64_t stride = pick(1, 3);
    const std::int64_t begin = pick(0, std::max<std::int64_t>(0, n - 1));
    const std::int64_t late = std::max<std::int64_t>(0, (n - begin + stride - 1) / stride);
    const std::int64_t split = pick(0, late);
    return shard_rows(
        std::vector<Range>{{begin + split * stride, late - split, stride}, {begin, split, stride}});
  });
}

// A side of a rank with all that it points to.
struct Side {
  Rows rows;
  std::vector<std::int32_t> ids;

  Side(const Scene& scene, const testing::Segments& segments, Rows tokens)
      : rows(std::move(tokens)), ids(segment_ids(scene, segments, rows)) {}
  [[nodiscard]] TokenSide view() const { return {&rows, ids}; }
  [[nodiscard]] std::span<const std::int32_t> batch_ids(std::int64_t b) const {
    const auto size = rows.position.size();
    return ids.empty() ? std::span<const std::int32_t>{}
                       : std::span(ids).subspan(static_cast<std::size_t>(b) * size, size);
  }
};

// Positions in the order of the tensor's rows.
std::vector<std::int64_t> by_row(const Rows& rows) {
  std::vector<std::int64_t> positions(rows.position.size());
  for (std::size_t n = 0; n < positions.size(); ++n) {
    positions[static_cast<std::size_t>(rows.row[n])] = rows.position[n];
  }
  return positions;
}

SegmentRange range_of(std::span<const std::int32_t> ids) {
  if (ids.empty()) return {};
  const auto [lo, hi] = std::minmax_element(ids.begin(), ids.end());
  return {*lo, *hi};
}

struct Case {
  Scene scene;
  Side queries;
  Side keys;
  StagedScene staged;
  std::int64_t batch;

  explicit Case(const Scene& s)
      : scene(s),
        queries(s, s.q_segments, any_rows(s.q_len)),
        keys(s, s.kv_segments, any_rows(s.kv_len)),
        staged(s, by_row(queries.rows)),
        batch(pick(0, s.batch - 1)) {}

  [[nodiscard]] std::int64_t brute(std::int64_t head_first, std::int64_t head_last,
                                   std::span<const std::int64_t> is,
                                   std::span<const std::int64_t> js) const {
    std::int64_t count = 0;
    for (std::int64_t h = head_first; h <= head_last; ++h) {
      for (const std::int64_t i : is) {
        for (const std::int64_t j : js) count += scene.visible(batch, h, i, j) ? 1 : 0;
      }
    }
    return count;
  }
};

// Neighbouring tokens of a side.
struct Stretch {
  std::size_t begin = 0;
  std::size_t count = 0;
};

Stretch any_stretch(std::size_t size, std::size_t most) {
  const auto begin = static_cast<std::size_t>(pick(0, static_cast<std::int64_t>(size)));
  const std::size_t longest = std::min(most, size - begin);
  return {begin, static_cast<std::size_t>(pick(0, static_cast<std::int64_t>(longest)))};
}

TEST(Visibility, EmptyAndFullAreExact) {
  ASSERT_TRUE(holds(4000, [] {
    const Case c(any_scene(60));
    const Stretch q = any_stretch(c.queries.rows.position.size(), 60);
    const Stretch k = any_stretch(c.keys.rows.position.size(), 60);
    RC_PRE(q.count > 0 && k.count > 0);
    const auto is = std::span(c.queries.rows.position).subspan(q.begin, q.count);
    const auto js = std::span(c.keys.rows.position).subspan(k.begin, k.count);
    TileBox box{.batch = c.batch,
                .head_first = static_cast<int>(pick(0, c.scene.heads - 1)),
                .head_last = 0,
                .queries = {is.front(), is.back()},
                .keys = {js.front(), js.back()},
                .query_segments = {},
                .key_segments = {}};
    box.head_last = static_cast<int>(pick(box.head_first, c.scene.heads - 1));
    if (c.scene.segments) {
      box.query_segments = range_of(c.queries.batch_ids(c.batch).subspan(q.begin, q.count));
      box.key_segments = range_of(c.keys.batch_ids(c.batch).subspan(k.begin, k.count));
    }
    const std::int64_t visible = c.brute(box.head_first, box.head_last, is, js);
    const auto pairs =
        static_cast<std::int64_t>(q.count * k.count) * (box.head_last - box.head_first + 1);
    const TileClass found = c.staged.visibility().classify(box);
    if (found == TileClass::kEmpty) RC_ASSERT(visible == 0);
    if (found == TileClass::kFull) RC_ASSERT(visible == pairs);
    if (c.scene.attention_mask) RC_ASSERT(found != TileClass::kFull);
  }));
}

// Lanes as operations build them: (token, head) with positions rising.
Lanes any_lanes(const Case& c, Stretch q, int head_first, int head_count) {
  Lanes lanes;
  for (std::size_t n = q.begin; n < q.begin + q.count; ++n) {
    for (int h = head_first; h < head_first + head_count; ++h, ++lanes.count) {
      lanes.position[lanes.count] = c.queries.rows.position[n];
      lanes.row[lanes.count] = c.queries.rows.row[n];
      lanes.head[lanes.count] = h;
      lanes.segment[lanes.count] = c.scene.segments ? c.queries.batch_ids(c.batch)[n] : 0;
    }
  }
  return lanes;
}

TEST(Visibility, LaneBitsAreTheDefinition) {
  ASSERT_TRUE(holds(3000, [] {
    const Case c(any_scene(150));
    const int head_first = static_cast<int>(pick(0, c.scene.heads - 1));
    const int head_count = static_cast<int>(pick(1, c.scene.heads - head_first));
    const Stretch q = any_stretch(c.queries.rows.position.size(),
                                  kMostLanes / static_cast<std::size_t>(head_count));
    const Stretch k = any_stretch(c.keys.rows.position.size(), 150);
    const Lanes lanes = any_lanes(c, q, head_first, head_count);
    const Keys keys{std::span(c.keys.rows.position).subspan(k.begin, k.count),
                    c.scene.segments ? c.keys.batch_ids(c.batch).subspan(k.begin).data() : nullptr};
    std::vector<std::uint32_t> bits(k.count, 0xdeadbeefU);
    c.staged.visibility().lane_bits(c.batch, lanes, keys, bits.data());
    for (std::size_t t = 0; t < k.count; ++t) {
      std::uint32_t expected = 0;
      for (int n = 0; n < lanes.count; ++n) {
        const bool seen =
            c.scene.visible(c.batch, lanes.head[n], lanes.position[n], keys.position[t]);
        if (seen) expected |= 1U << n;
      }
      RC_ASSERT(bits[t] == expected);
    }
  }));
}

TEST(Visibility, CountsAreTheDefinition) {
  ASSERT_TRUE(holds(2000, [] {
    const Case c(any_scene(200));
    const int head_first = static_cast<int>(pick(0, c.scene.heads - 1));
    const int head_last = static_cast<int>(pick(head_first - 1, c.scene.heads - 1));
    const Stretch q = any_stretch(c.queries.rows.position.size(), 200);
    const auto end = static_cast<std::int64_t>(q.begin + q.count);
    const std::int64_t found =
        count_visible(c.staged.visibility(), c.batch, head_first, head_last, c.queries.view(),
                      static_cast<std::int64_t>(q.begin), end, c.keys.view());
    const std::int64_t expected =
        c.brute(head_first, head_last, std::span(c.queries.rows.position).subspan(q.begin, q.count),
                c.keys.rows.position);
    RC_ASSERT(found == expected);
  }));
}

TEST(Visibility, AnyVisibleIsCountAboveZero) {
  ASSERT_TRUE(holds(2000, [] {
    const Case c(any_scene(120));
    const int head_first = static_cast<int>(pick(0, c.scene.heads - 1));
    const int head_last = static_cast<int>(pick(head_first, c.scene.heads - 1));
    const bool found = any_visible(c.staged.visibility(), c.batch, head_first, head_last,
                                   c.queries.view(), c.keys.view());
    RC_ASSERT(found ==
              (c.brute(head_first, head_last, c.queries.rows.position, c.keys.rows.position) > 0));
  }));
}

TEST(Visibility, KnowsWhenHeadsDiffer) {
  const std::vector<std::uint8_t> entries(6, 1);
  Visibility::Rules rules;
  EXPECT_FALSE(Visibility(rules).per_head());
  rules.masks = {Mask::causal()};
  rules.attention_mask = {entries.data(), DType::kBool, {2, 1, 1, 3}, {3, 3, 3, 1}};
  EXPECT_FALSE(Visibility(rules).per_head());
  rules.attention_mask.shape = {1, 2, 1, 3};
  EXPECT_TRUE(Visibility(rules).per_head());
  rules.attention_mask = {};
  rules.masks.push_back(Mask::causal(1));
  EXPECT_TRUE(Visibility(rules).per_head());
}

TEST(Visibility, PaddingSeesNothingAndIsNotSeen) {
  Visibility::Rules rules;
  rules.segments = true;
  rules.padding_segment_id = 7;
  const Visibility visibility(rules);
  TileBox box{.queries = {0, 3}, .keys = {0, 3}, .query_segments = {7, 7}, .key_segments = {5, 9}};
  EXPECT_EQ(visibility.classify(box), TileClass::kEmpty);
  std::swap(box.query_segments, box.key_segments);
  EXPECT_EQ(visibility.classify(box), TileClass::kEmpty);
  box.query_segments = box.key_segments = {6, 6};
  EXPECT_EQ(visibility.classify(box), TileClass::kFull);
  box.key_segments = {8, 9};
  EXPECT_EQ(visibility.classify(box), TileClass::kEmpty);
}

TEST(Visibility, RepeatedRowsOfAnAttentionMaskMayShareMemory) {
  // One row of entries for all queries: a stride of zero.
  const std::vector<std::uint8_t> entries{1, 0, 2, 0};
  Visibility::Rules rules;
  rules.attention_mask = {entries.data(), DType::kUInt8, {1, 1, 100, 4}, {0, 0, 0, 1}};
  const Rows queries = global_rows(std::vector<Range>{{0, 100, 1}});
  const Rows keys = global_rows(std::vector<Range>{{0, 4, 1}});
  EXPECT_EQ(count_visible(Visibility(rules), 0, 0, 2, {&queries, {}}, 0, 100, {&keys, {}}), 600);
}

// Cost grows with the edge of the mask: looking at each of 2^42 pairs would take hours.
TEST(Visibility, CountsAMillionSquared) {
  constexpr std::int64_t kLength = 1 << 20;
  constexpr std::int64_t kDocument = 1000;
  Visibility::Rules rules;
  rules.masks = {Mask::causal()};
  const Rows rows = shard_rows(Partition::zigzag().ranges(0, 1, kLength));
  EXPECT_EQ(count_visible(Visibility(rules), 0, 0, 31, {&rows, {}}, 0, kLength, {&rows, {}}),
            32 * (kLength * (kLength + 1) / 2));

  rules.segments = true;
  std::vector<std::int32_t> ids(kLength);
  for (std::size_t n = 0; n < ids.size(); ++n) {
    ids[n] = static_cast<std::int32_t>(n / static_cast<std::size_t>(kDocument));
  }
  const std::int64_t tail = kLength % kDocument;
  EXPECT_EQ(count_visible(Visibility(rules), 0, 0, 0, {&rows, ids}, 0, kLength, {&rows, ids}),
            kLength / kDocument * (kDocument * (kDocument + 1) / 2) + tail * (tail + 1) / 2);
}

}  // namespace
}  // namespace annulus
