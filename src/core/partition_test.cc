#include "annulus/partition.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "annulus/error.h"
#include "core/rows.h"
#include "core/visibility_testing.h"

namespace annulus {
namespace {

using testing::holds;
using testing::pick;
using testing::pick_length;
using Positions = std::vector<std::int64_t>;

Positions expand(const std::vector<Range>& ranges) {
  Positions positions;
  for (const Range& range : ranges) {
    for (std::int64_t t = 0; t < range.count; ++t) {
      positions.push_back(range.begin + t * range.stride);
    }
  }
  return positions;
}

std::vector<Positions> deal(const Partition& partition, int world_size, std::int64_t seq_len) {
  std::vector<Positions> ranks;
  for (int rank = 0; rank < world_size; ++rank) {
    ranks.push_back(expand(partition.ranges(rank, world_size, seq_len)));
  }
  return ranks;
}

// Neighbours in `parts` runs, token by token: the first seq_len mod parts runs hold one more.
std::vector<Positions> cut(std::int64_t parts, std::int64_t seq_len) {
  std::vector<Positions> runs(static_cast<std::size_t>(parts));
  std::int64_t position = 0;
  for (std::int64_t run = 0; run < parts; ++run) {
    const std::int64_t count = seq_len / parts + (run < seq_len % parts ? 1 : 0);
    for (std::int64_t t = 0; t < count; ++t) {
      runs[static_cast<std::size_t>(run)].push_back(position++);
    }
  }
  return runs;
}

// A permutation of the sequence cut at random places.
std::vector<Positions> any_deal(int world_size, std::int64_t seq_len) {
  std::vector<Positions> ranks(static_cast<std::size_t>(world_size));
  for (std::int64_t position = 0; position < seq_len; ++position) {
    Positions& rank = ranks[static_cast<std::size_t>(pick(0, world_size - 1))];
    rank.insert(rank.begin() + pick(0, static_cast<std::int64_t>(rank.size())), position);
  }
  return ranks;
}

std::string refusal(const Partition& partition, int world_size, std::int64_t seq_len) {
  try {
    partition.check(world_size, seq_len);
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "";
}

TEST(Partition, NamedOnesAreTheirDefinitions) {
  for (const std::int64_t seq_len : {0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 64, 100, 127, 128, 200}) {
    for (const int world_size : {1, 2, 3, 4, 5, 7, 8, 16, 64}) {
      const auto runs = cut(2 * world_size, seq_len);
      std::vector<Positions> striped(static_cast<std::size_t>(world_size));
      std::vector<Positions> zigzag(striped.size());
      for (std::int64_t i = 0; i < seq_len; ++i) {
        striped[static_cast<std::size_t>(i % world_size)].push_back(i);
      }
      for (std::size_t rank = 0; rank < zigzag.size(); ++rank) {
        zigzag[rank] = runs[rank];
        const Positions& second = runs[runs.size() - 1 - rank];
        zigzag[rank].insert(zigzag[rank].end(), second.begin(), second.end());
      }
      EXPECT_EQ(deal(Partition::contiguous(), world_size, seq_len), cut(world_size, seq_len));
      EXPECT_EQ(deal(Partition::striped(), world_size, seq_len), striped);
      EXPECT_EQ(deal(Partition::zigzag(), world_size, seq_len), zigzag);
    }
  }
}

TEST(Partition, LocalLenCountsTheRanges) {
  ASSERT_TRUE(holds(300, [] {
    const int world_size = static_cast<int>(pick(1, 64));
    const std::int64_t seq_len = pick_length(1000);
    for (const char* name : {"contiguous", "striped", "zigzag"}) {
      const Partition partition = Partition::from_name(name);
      partition.check(world_size, seq_len);
      for (int rank = 0; rank < world_size; ++rank) {
        const auto ranges = partition.ranges(rank, world_size, seq_len);
        RC_ASSERT(partition.local_len(rank, world_size, seq_len) ==
                  static_cast<std::int64_t>(expand(ranges).size()));
      }
    }
  }));
}

TEST(Partition, FromPositionsKeepsOrder) {
  ASSERT_TRUE(holds(500, [] {
    const int world_size = static_cast<int>(pick(1, 8));
    const std::int64_t seq_len = pick_length(60);
    const std::vector<Positions> ranks =
        *rc::gen::exec([=] { return any_deal(world_size, seq_len); });
    std::vector<Positions> padded = ranks;
    for (Positions& positions : padded) positions.resize(static_cast<std::size_t>(seq_len), -1);
    for (const Partition& partition :
         {Partition::from_positions(ranks), Partition::from_positions(padded)}) {
      RC_ASSERT(deal(partition, world_size, seq_len) == ranks);
      partition.check(world_size, seq_len);
    }
  }));
}

TEST(Partition, FromPositionsFindsStrides) {
  const Partition partition =
      Partition::from_positions({{0, 3, 6, 9, -1}, {10, 8, 7, -1, -1}, {1, 2, 4, 5, -1}, {}});
  const auto striped = partition.ranges(0, 4, 11);
  ASSERT_EQ(striped.size(), 1U);
  EXPECT_EQ(striped[0].stride, 3);
  EXPECT_EQ(partition.ranges(1, 4, 11).size(), 2U);
  EXPECT_EQ(partition.ranges(2, 4, 11).size(), 2U);
  EXPECT_TRUE(partition.ranges(3, 4, 11).empty());
  EXPECT_EQ(refusal(partition, 4, 11), "");
}

TEST(Partition, HasNames) {
  for (const char* name : {"contiguous", "striped", "zigzag"}) {
    EXPECT_EQ(Partition::from_name(name).name(), name);
  }
  EXPECT_EQ(Partition().name(), "contiguous");
  EXPECT_EQ(Partition::custom({}).name(), "custom");
  EXPECT_THROW(Partition::from_name("Zigzag"), InvalidArgument);
  EXPECT_THROW(Partition::from_name("custom"), InvalidArgument);
}

TEST(Partition, RefusesWhatIsNoRank) {
  EXPECT_THROW(static_cast<void>(Partition().ranges(2, 2, 8)), InvalidArgument);
  EXPECT_THROW(static_cast<void>(Partition().ranges(-1, 2, 8)), InvalidArgument);
  EXPECT_THROW(static_cast<void>(Partition().ranges(0, 0, 8)), InvalidArgument);
  EXPECT_THROW(static_cast<void>(Partition().ranges(0, 1, -1)), InvalidArgument);
  EXPECT_THROW(Partition().check(0, 8), InvalidArgument);
  EXPECT_THROW(static_cast<void>(Partition::custom({{}, {}}).ranges(0, 3, 8)), InvalidArgument);
  EXPECT_THROW(Partition::from_positions({{0, -2}}), InvalidArgument);
}

TEST(Partition, CheckNamesRankAndPosition) {
  const std::int64_t huge = std::numeric_limits<std::int64_t>::max();
  using Ranges = std::vector<std::vector<Range>>;
  const auto text = [](Ranges ranges) {
    const int world_size = static_cast<int>(ranges.size());
    return refusal(Partition::custom(std::move(ranges)), world_size, 8);
  };
  EXPECT_EQ(text({{{0, 4}}, {{4, 4}}}), "");
  EXPECT_EQ(text({{{7, 4, -2}}, {{0, 4, 2}}}), "");
  EXPECT_EQ(
      text({{{0, 4}}, {{5, 3}}}),
      "Partition::check: position 4 of 8 has no owner; every position needs exactly one rank");
  EXPECT_EQ(text({{{0, 4}}, {{3, 5}}}),
            "Partition::check: position 3 is owned by rank 0 and again by rank 1; every position "
            "needs exactly one rank");
  EXPECT_EQ(text({{{0, 4}}, {{4, 5}}}), "Partition::check: rank 1 owns position 8, outside [0, 8)");
  EXPECT_EQ(text({{{-1, 4}}}), "Partition::check: rank 0 owns position -1, outside [0, 8)");
  EXPECT_EQ(text({{{0, -1}}}), "Partition::check: rank 0 has a range of -1 positions");
  EXPECT_NE(text({{{1, huge, huge}}}), "");
  EXPECT_NE(text({{{1, huge, std::numeric_limits<std::int64_t>::min()}}}), "");
  EXPECT_NE(text({{{1, huge, 0}}}), "");
  EXPECT_NE(refusal(Partition::custom({{{0, 8}}}), 2, 8), "");
}

TEST(Rows, RiseAndPointToTheirTokens) {
  ASSERT_TRUE(holds(300, [] {
    const std::int64_t seq_len = pick_length(60);
    const std::vector<Positions> ranks = *rc::gen::exec([=] { return any_deal(2, seq_len); });
    const auto ranges = Partition::from_positions(ranks).ranges(0, 2, seq_len);
    const Rows shard = shard_rows(ranges);
    const Rows global = global_rows(ranges);
    RC_ASSERT(shard.size() == static_cast<std::int64_t>(ranks[0].size()));
    RC_ASSERT(std::is_sorted(shard.position.begin(), shard.position.end()));
    RC_ASSERT(global.position == shard.position);
    RC_ASSERT(global.row == global.position);
    for (std::size_t n = 0; n < shard.row.size(); ++n) {
      RC_ASSERT(ranks[0][static_cast<std::size_t>(shard.row[n])] == shard.position[n]);
    }
  }));
}

}  // namespace
}  // namespace annulus
