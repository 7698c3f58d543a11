#include "annulus/mask.h"

#include <gtest/gtest.h>

#include <limits>
#include <numeric>

#include "annulus/error.h"
#include "core/visibility_testing.h"

namespace annulus {
namespace {

using testing::holds;
using testing::pick;
using testing::pick_length;
using testing::pick_rule;
using testing::pick_simple_rule;
using testing::Rule;
using testing::RuleKind;

constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();
constexpr std::int64_t kMin = std::numeric_limits<std::int64_t>::min();

Rule any_rule(std::int64_t n, int depth) {
  return *rc::gen::exec([=] { return pick_rule(n, depth); });
}

Interval any_interval(std::int64_t n) {
  const std::int64_t first = pick(0, n);
  return {first, first + pick(-1, n)};
}

// What a look at every pair says.
TileClass look(const Rule& rule, Interval queries, Interval keys) {
  std::int64_t visible = 0;
  std::int64_t pairs = 0;
  for (std::int64_t i = queries.first; i <= queries.last; ++i) {
    for (std::int64_t j = keys.first; j <= keys.last; ++j, ++pairs) {
      visible += rule.visible(i, j) ? 1 : 0;
    }
  }
  if (visible == 0) return TileClass::kEmpty;
  return visible == pairs ? TileClass::kFull : TileClass::kPartial;
}

// Bits of the definition, one pair at a time.
std::vector<std::uint32_t> look_at_lanes(const Rule& rule, const std::vector<std::int64_t>& queries,
                                         const std::vector<std::int64_t>& keys) {
  std::vector<std::uint32_t> bits;
  for (const std::int64_t j : keys) {
    bits.push_back(0);
    for (std::size_t n = 0; n < queries.size(); ++n) {
      if (rule.visible(queries[n], j)) bits.back() |= 1U << n;
    }
  }
  return bits;
}

std::vector<std::int64_t> any_positions(std::int64_t count, std::int64_t n) {
  std::vector<std::int64_t> positions;
  const std::int64_t step = pick(0, 2);  // 0: any order, with repetitions
  std::int64_t next = pick(0, n);
  for (std::int64_t t = 0; t < count; ++t) {
    positions.push_back(step == 0 ? pick(0, n) : next);
    next += step;
  }
  return positions;
}

TEST(Mask, VisibleIsTheDefinition) {
  ASSERT_TRUE(holds(500, [] {
    const std::int64_t n = pick_length(40);
    const Rule rule = any_rule(n, 3);
    const Mask mask = rule.mask();
    for (std::int64_t i = 0; i < n + 5; ++i) {
      for (std::int64_t j = 0; j < n + 5; ++j) RC_ASSERT(mask.visible(i, j) == rule.visible(i, j));
    }
  }));
}

TEST(Mask, EmptyAndFullAreExact) {
  ASSERT_TRUE(holds(4000, [] {
    const std::int64_t n = pick_length(60);
    const Rule rule = any_rule(n, 3);
    const Interval queries = any_interval(n);
    const Interval keys = any_interval(n);
    const TileClass found = rule.mask().classify(queries, keys);
    if (found != TileClass::kPartial) RC_ASSERT(found == look(rule, queries, keys));
  }));
}

TEST(Mask, SimpleRulesAreNeverCautious) {
  ASSERT_TRUE(holds(4000, [] {
    const std::int64_t n = pick_length(60);
    const Rule rule = *rc::gen::exec([=] { return pick_simple_rule(n); });
    RC_PRE(rule.kind != RuleKind::kDense);
    const Interval queries = any_interval(n);
    const Interval keys = any_interval(n);
    RC_ASSERT(rule.mask().classify(queries, keys) == look(rule, queries, keys));
  }));
}

TEST(Mask, CausalWithWindowIsNeverCautious) {
  ASSERT_TRUE(holds(1000, [] {
    const std::int64_t n = pick_length(60);
    const Rule causal{.kind = RuleKind::kCausal, .a = pick(-n, n)};
    const Rule window{
        .kind = RuleKind::kWindow, .a = pick(-1, n), .b = pick(-1, n), .c = pick(-n, n)};
    const Rule rule{.kind = RuleKind::kAnd, .parts = {causal, window}};
    const Interval queries = any_interval(n);
    const Interval keys = any_interval(n);
    RC_ASSERT(rule.mask().classify(queries, keys) == look(rule, queries, keys));
  }));
}

TEST(Mask, DenseIsNotCautiousOnSquaresOf16) {
  ASSERT_TRUE(holds(300, [] {
    // 0 or 8 eighths in three of four cases: uniform squares are what this is about.
    const Rule rule{.kind = RuleKind::kDense,
                    .a = pick(0, 70),
                    .b = pick(0, 70),
                    .eighths = pick(0, 3) == 0 ? 4 : pick(0, 1) * 8};
    const std::int64_t i = 16 * pick(0, 4);
    const std::int64_t j = 16 * pick(0, 4);
    const Interval queries{i, i + 15};
    const Interval keys{j, j + 31};
    RC_ASSERT(rule.mask().classify(queries, keys) == look(rule, queries, keys));
  }));
}

TEST(Mask, LaneBitsAreTheDefinition) {
  ASSERT_TRUE(holds(3000, [] {
    const std::int64_t n = pick_length(100);
    const Rule rule = any_rule(n, 3);
    std::vector<std::int64_t> queries = any_positions(pick(0, 32), n);
    std::sort(queries.begin(), queries.end());
    const std::vector<std::int64_t> keys = any_positions(pick(0, 70), n);
    std::vector<std::uint32_t> bits(keys.size(), 0xdeadbeefU);
    rule.mask().lane_bits(queries, keys, bits.data());
    RC_ASSERT(bits == look_at_lanes(rule, queries, keys));
  }));
}

TEST(Mask, LaneBitsOfLongRunsOfKeys) {
  std::vector<std::int64_t> queries(32);
  std::iota(queries.begin(), queries.end(), 300);
  std::vector<std::int64_t> keys(1000);
  std::iota(keys.begin(), keys.end(), 0);
  const Rule window{.kind = RuleKind::kWindow, .a = 200, .b = 100};
  const Rule chunks{.kind = RuleKind::kChunked, .a = 150};
  const Rule blocks{.kind = RuleKind::kBlockSparse, .a = 33, .b = 20, .c = 40, .eighths = 4};
  const Rule any{.kind = RuleKind::kOr, .parts = {chunks, blocks}};
  const Rule rule{.kind = RuleKind::kAnd, .parts = {window, any}};
  std::vector<std::uint32_t> bits(keys.size());
  rule.mask().lane_bits(queries, keys, bits.data());
  EXPECT_EQ(bits, look_at_lanes(rule, queries, keys));
}

TEST(Mask, RectanglesWithoutPairsAreEmpty) {
  for (const Mask& mask : {Mask::full(), Mask::causal(), Mask::chunked(4), Mask::prefix(3)}) {
    EXPECT_EQ(mask.classify({0, -1}, {0, 3}), TileClass::kEmpty);
    EXPECT_EQ(mask.classify({0, 3}, {5, 4}), TileClass::kEmpty);
  }
}

TEST(Mask, HugeNumbersDoNotOverflow) {
  const Mask all = Mask::sliding_window(kMax, kMax);
  EXPECT_TRUE(all.visible(0, kMax));
  EXPECT_TRUE(all.visible(kMax, 0));
  EXPECT_EQ(all.classify({0, kMax}, {0, kMax}), TileClass::kFull);
  EXPECT_EQ(Mask::causal(kMax).classify({0, 9}, {0, kMax}), TileClass::kFull);
  EXPECT_EQ(Mask::causal(kMin).classify({0, kMax}, {0, kMax}), TileClass::kEmpty);
  EXPECT_EQ(Mask::sliding_window(kMax, 0, kMin).classify({0, kMax}, {0, 9}), TileClass::kEmpty);
  EXPECT_EQ(Mask::sliding_window(0, kMax, kMax).classify({0, 9}, {0, 9}), TileClass::kEmpty);
  EXPECT_EQ(Mask::chunked(kMax).classify({0, kMax - 1}, {0, 0}), TileClass::kFull);
  EXPECT_EQ(Mask::block_sparse(kMax, 1, 1, {1}).classify({0, kMax - 1}, {0, 9}), TileClass::kFull);

  const std::vector<std::int64_t> queries{0, 1, kMax - 1};
  const std::vector<std::int64_t> keys{kMax, 0, 1};
  std::vector<std::uint32_t> bits(3);
  Mask::sliding_window(kMax, 1, kMin + 5).lane_bits(queries, keys, bits.data());
  EXPECT_EQ(bits, (std::vector<std::uint32_t>{0, 4, 4}));
  Mask::sliding_window(5, kMax, -2).lane_bits(queries, keys, bits.data());
  EXPECT_EQ(bits, (std::vector<std::uint32_t>{4, 3, 3}));
  Mask::chunked(kMax).lane_bits(queries, keys, bits.data());
  EXPECT_EQ(bits, (std::vector<std::uint32_t>{0, 7, 6}));
}

TEST(Mask, FullJoinsNothing) {
  EXPECT_TRUE((Mask::full() & Mask()).is_full());
  EXPECT_TRUE((Mask::causal() | Mask::full()).is_full());
  EXPECT_TRUE(Mask::sliding_window(-1, -1).is_full());
  EXPECT_EQ((Mask::full() & Mask::causal()).describe(), "causal");
}

TEST(Mask, DescribesItself) {
  EXPECT_EQ(Mask().describe(), "full");
  EXPECT_EQ((Mask::causal() & Mask::sliding_window(128, 0)).describe(), "causal & window(128, 0)");
  EXPECT_EQ(Mask::causal(-3).describe(), "causal(shift -3)");
  EXPECT_EQ(Mask::sliding_window(4, -1, 2).describe(), "window(4, -1, shift 2)");
  const Mask joined = (Mask::causal() | Mask::prefix(10)) & Mask::chunked(64);
  EXPECT_EQ(joined.describe(), "(causal | prefix(10)) & chunked(64)");
  EXPECT_EQ((joined | Mask::dense(1, 2, {0, 1})).describe(),
            "(causal | prefix(10)) & chunked(64) | dense(1 x 2)");
  EXPECT_EQ(Mask::block_sparse(64, 1, 2, {0, 1}).describe(), "block_sparse(64, 1 x 2)");
}

TEST(Mask, RefusesSizesThatDoNotFit) {
  EXPECT_THROW(Mask::chunked(0), InvalidArgument);
  EXPECT_THROW(Mask::chunked(-4), InvalidArgument);
  EXPECT_THROW(Mask::prefix(-1), InvalidArgument);
  EXPECT_THROW(Mask::sliding_window(-2, 0), InvalidArgument);
  EXPECT_THROW(Mask::sliding_window(0, kMin), InvalidArgument);
  EXPECT_THROW(Mask::dense(2, 3, std::vector<std::uint8_t>(5)), InvalidArgument);
  EXPECT_THROW(Mask::dense(-2, -3, std::vector<std::uint8_t>(6)), InvalidArgument);
  EXPECT_THROW(Mask::dense(kMax, 2, {}), InvalidArgument);
  EXPECT_THROW(Mask::dense(std::int64_t{1} << 32, std::int64_t{1} << 32, {}), InvalidArgument);
  EXPECT_THROW(Mask::block_sparse(0, 1, 1, {1}), InvalidArgument);
  EXPECT_THROW(Mask::block_sparse(4, 2, 2, {1}), InvalidArgument);
}

TEST(Mask, BitmapsWithoutEntriesSeeNothing) {
  const Mask mask = Mask::dense(0, kMax, {}) | Mask::block_sparse(3, kMax, 0, {});
  EXPECT_FALSE(mask.visible(0, 0));
  EXPECT_EQ(mask.classify({0, 9}, {0, 9}), TileClass::kEmpty);
}

}  // namespace
}  // namespace annulus
