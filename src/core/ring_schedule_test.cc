#include "core/ring_schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>

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

using Needs = std::vector<std::vector<bool>>;

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

const std::vector<std::vector<Direction>> kWays = {
    {{1, true}},               // ring, one way
    {{1, true}, {-1, true}},   // ring, both ways
    {{1, false}, {-1, false}}  // line
};

// Every token to a random rank: uneven shards, and shards without tokens.
Partition any_custom(int world_size, std::int64_t seq_len) {
  std::vector<std::vector<std::int64_t>> ranks(at(world_size));
  for (std::int64_t position = 0; position < seq_len; ++position) {
    ranks[at(pick(0, world_size - 1))].push_back(position);
  }
  if (pick(0, 1) == 1) std::reverse(ranks[0].begin(), ranks[0].end());
  return Partition::from_positions(ranks);
}

Partition any_partition(int world_size, std::int64_t seq_len) {
  switch (pick(0, 3)) {
    case 0:
      return Partition::contiguous();
    case 1:
      return Partition::striped();
    case 2:
      return Partition::zigzag();
    default:
      return any_custom(world_size, seq_len);
  }
}

std::vector<Rows> deal(const Partition& partition, int world_size, std::int64_t seq_len) {
  partition.check(world_size, seq_len);
  std::vector<Rows> ranks;
  for (int rank = 0; rank < world_size; ++rank) {
    ranks.push_back(global_rows(partition.ranges(rank, world_size, seq_len)));
  }
  return ranks;
}

std::vector<std::int64_t> all_positions(std::int64_t seq_len) {
  return global_rows(std::vector<Range>{{0, seq_len, 1}}).position;
}

// A scene dealt to ranks.
struct Ring {
  int world_size;
  Scene scene;
  std::vector<Rows> queries;
  std::vector<Rows> keys;

  Ring(int size, const Scene& s)
      : world_size(size),
        scene(s),
        queries(deal(any_partition(size, s.q_len), size, s.q_len)),
        keys(deal(any_partition(size, s.kv_len), size, s.kv_len)) {}
};

// What the library says: does a rank see any key of an owner, in any batch row and head?
Needs needs_of(const Ring& ring) {
  const StagedScene staged(ring.scene, all_positions(ring.scene.q_len));
  Needs needs(at(ring.world_size), std::vector<bool>(at(ring.world_size)));
  for (int rank = 0; rank < ring.world_size; ++rank) {
    const Rows& queries = ring.queries[at(rank)];
    const auto q_ids = segment_ids(ring.scene, ring.scene.q_segments, queries);
    for (int owner = 0; owner < ring.world_size; ++owner) {
      const Rows& keys = ring.keys[at(owner)];
      const auto kv_ids = segment_ids(ring.scene, ring.scene.kv_segments, keys);
      for (std::int64_t b = 0; b < ring.scene.batch && !needs[at(rank)][at(owner)]; ++b) {
        needs[at(rank)][at(owner)] = any_visible(staged.visibility(), b, 0, ring.scene.heads - 1,
                                                 {&queries, q_ids}, {&keys, kv_ids});
      }
    }
  }
  return needs;
}

// The pairs that some head sees in some batch row, by the definition.
std::vector<std::vector<bool>> visible_pairs(const Scene& scene) {
  std::vector<std::vector<bool>> pairs(at(scene.q_len), std::vector<bool>(at(scene.kv_len)));
  for (std::int64_t i = 0; i < scene.q_len; ++i) {
    for (std::int64_t j = 0; j < scene.kv_len; ++j) {
      bool seen = false;
      for (std::int64_t b = 0; b < scene.batch && !seen; ++b) {
        for (int h = 0; h < scene.heads && !seen; ++h) seen = scene.visible(b, h, i, j);
      }
      pairs[at(i)][at(j)] = seen;
    }
  }
  return pairs;
}

// Walks all ranks through all steps and says what is wrong, or nothing.
class Walk {
 public:
  Walk(int world_size, const Needs& needs, const std::vector<Direction>& directions)
      : world_size_(world_size),
        needs_(needs),
        directions_(directions),
        schedules_(make_ring_schedule(world_size, needs, directions)),
        computed_(at(world_size), std::vector<int>(at(world_size))) {}

  std::string errors() {
    if (schedules_.size() != at(world_size_)) return "wrong number of ranks";
    for (int rank = 0; rank < world_size_; ++rank) {
      const RankSchedule& schedule = schedules_[at(rank)];
      if (schedule.size() != schedules_[0].size()) return "ranks differ in their number of steps";
      for (std::size_t step = 0; step < schedule.size(); ++step) check_step(rank, step);
    }
    check_coverage();
    return errors_;
  }

  // How often a rank computed with the keys of an owner.
  [[nodiscard]] const std::vector<std::vector<int>>& computed() const { return computed_; }

 private:
  template <class... Parts>
  void complain(const Parts&... parts) {
    ((errors_ += parts), ...);
    errors_ += "\n";
  }

  void check_step(int rank, std::size_t step) {
    const std::vector<Visit>& visits = schedules_[at(rank)][step];
    if (visits.size() > directions_.size()) complain("more blocks at hand than directions");
    if (step == 0 && (visits.empty() || visits[0].owner != rank)) complain("no own keys in step 0");
    for (const Visit& visit : visits) {
      const std::string where = "rank " + std::to_string(rank) + " step " + std::to_string(step) +
                                " owner " + std::to_string(visit.owner) + ": ";
      computed_[at(rank)][at(visit.owner)] += visit.compute ? 1 : 0;
      if (visit.compute && step != 0 && static_cast<int>(step) != distance(visit.owner, rank)) {
        complain(where, "not the shorter way");
      }
      if ((visit.from == -1) != (step == 0) || (visit.from == -1) != (visit.owner == rank)) {
        complain(where, "appears from nowhere or comes home");
      }
      if (visit.from != -1) check_receive(rank, step, visit, where);
      if (visit.to != -1) check_send(rank, step, visit, where);
    }
  }

  // Exactly one visit of the neighbour one step earlier sends this block here.
  void check_receive(int rank, std::size_t step, const Visit& visit, const std::string& where) {
    const auto& earlier = schedules_[at(visit.from)][step - 1];
    const auto sends = [&](const Visit& v) { return v.owner == visit.owner && v.to == rank; };
    if (std::count_if(earlier.begin(), earlier.end(), sends) != 1) {
      complain(where, "receive without its send");
    }
    if (visit.to == -1 && !visit.compute) complain(where, "sent here though nobody needs it");
  }

  // Exactly one visit of the neighbour one step later takes it, over a link that exists.
  void check_send(int rank, std::size_t step, const Visit& visit, const std::string& where) {
    const auto& schedule = schedules_[at(visit.to)];
    const auto takes = [&](const Visit& v) { return v.owner == visit.owner && v.from == rank; };
    if (step + 1 >= schedule.size() ||
        std::count_if(schedule[step + 1].begin(), schedule[step + 1].end(), takes) != 1) {
      complain(where, "send without its receive");
    }
    const auto leads = [&](const Direction& direction) {
      const int next = rank + direction.step;
      const bool wraps = next < 0 || next >= world_size_;
      return (direction.wrap || !wraps) && (next + world_size_) % world_size_ == visit.to;
    };
    if (std::none_of(directions_.begin(), directions_.end(), leads))
      complain(where, "no such link");
  }

  void check_coverage() {
    for (int rank = 0; rank < world_size_; ++rank) {
      for (int owner = 0; owner < world_size_; ++owner) {
        if (computed_[at(rank)][at(owner)] != (needs_[at(rank)][at(owner)] ? 1 : 0)) {
          complain("rank ", std::to_string(rank), " computes ",
                   std::to_string(computed_[at(rank)][at(owner)]), " times with the keys of ",
                   std::to_string(owner));
        }
      }
    }
  }

  // Hops from owner to rank by the shortest way that the links allow.
  [[nodiscard]] int distance(int owner, int rank) const {
    if (!directions_[0].wrap) return std::abs(rank - owner);
    const int ahead = (rank - owner + world_size_) % world_size_;
    return directions_.size() == 1 ? ahead : std::min(ahead, world_size_ - ahead);
  }

  int world_size_;
  const Needs& needs_;
  const std::vector<Direction>& directions_;
  std::vector<RankSchedule> schedules_;
  std::vector<std::vector<int>> computed_;
  std::string errors_;
};

// How often each pair is computed when the ranks compute these blocks.
std::vector<std::vector<int>> computed_pairs(const Ring& ring,
                                             const std::vector<std::vector<int>>& computed) {
  std::vector<std::vector<int>> pairs(at(ring.scene.q_len),
                                      std::vector<int>(at(ring.scene.kv_len)));
  for (int rank = 0; rank < ring.world_size; ++rank) {
    for (int owner = 0; owner < ring.world_size; ++owner) {
      for (const std::int64_t i : ring.queries[at(rank)].position) {
        for (const std::int64_t j : ring.keys[at(owner)].position) {
          pairs[at(i)][at(j)] += computed[at(rank)][at(owner)];
        }
      }
    }
  }
  return pairs;
}

// A block is computed only where it has a visible pair, so that each visible pair occurs once and
// each block is justified by one.
void expect_exact_cover(const Ring& ring, const std::vector<std::vector<bool>>& visible,
                        const Needs& needs, const std::vector<std::vector<int>>& computed) {
  const auto pairs = computed_pairs(ring, computed);
  for (std::size_t i = 0; i < visible.size(); ++i) {
    for (std::size_t j = 0; j < visible[i].size(); ++j) {
      if (visible[i][j]) RC_ASSERT(pairs[i][j] == 1);
    }
  }
  for (std::size_t rank = 0; rank < needs.size(); ++rank) {
    for (std::size_t owner = 0; owner < needs.size(); ++owner) {
      bool justified = false;
      for (const std::int64_t i : ring.queries[rank].position) {
        for (const std::int64_t j : ring.keys[owner].position) {
          justified = justified || visible[at(i)][at(j)];
        }
      }
      RC_ASSERT(justified == needs[rank][owner]);
    }
  }
}

int any_world_size() { return static_cast<int>(pick(0, 39) == 39 ? 64 : pick(1, 16)); }

TEST(RingSchedule, CoversEachVisiblePairOnce) {
  ASSERT_TRUE(holds(3000, [] {
    const int world_size = any_world_size();
    const Scene scene = *rc::gen::exec([] {
      const std::int64_t most = pick(0, 9) == 9 ? 200 : 60;
      const std::int64_t q_len = pick_length(most);
      return pick_scene(q_len, pick(0, 1) == 0 ? q_len : pick_length(most));
    });
    const Ring ring(world_size, scene);
    const auto visible = visible_pairs(scene);
    const Needs needs = needs_of(ring);
    for (const auto& directions : kWays) {
      Walk walk(world_size, needs, directions);
      const std::string errors = walk.errors();
      RC_LOG() << errors;
      RC_ASSERT(errors.empty());
      expect_exact_cover(ring, visible, needs, walk.computed());
    }
  }));
}

TEST(RingSchedule, ServesAnyNeeds) {
  ASSERT_TRUE(holds(3000, [] {
    const int world_size = any_world_size();
    const std::int64_t seed = pick(0, 100000);
    const std::int64_t eighths = pick(0, 8);
    Needs needs(at(world_size), std::vector<bool>(at(world_size)));
    for (int rank = 0; rank < world_size; ++rank) {
      for (int owner = 0; owner < world_size; ++owner) {
        needs[at(rank)][at(owner)] = testing::coin(seed, eighths, rank, owner);
      }
    }
    for (const auto& directions : kWays) {
      const std::string errors = Walk(world_size, needs, directions).errors();
      RC_LOG() << errors;
      RC_ASSERT(errors.empty());
    }
  }));
}

Needs every_rank(int world_size) {
  return Needs(at(world_size), std::vector<bool>(at(world_size), true));
}

// Visits as text: owner, who it came from, where it goes, * if it is computed.
std::string text_of(const RankSchedule& schedule) {
  std::string text;
  for (const auto& step : schedule) {
    if (!text.empty()) text += " | ";
    for (const Visit& visit : step) {
      text += "(" + std::to_string(visit.owner) + (visit.compute ? "*" : "") + " " +
              std::to_string(visit.from) + ">" + std::to_string(visit.to) + ")";
    }
  }
  return text;
}

TEST(RingSchedule, FullMaskOneWay) {
  const auto schedules = make_ring_schedule(3, every_rank(3), kWays[0]);
  EXPECT_EQ(text_of(schedules[0]), "(0* -1>1) | (2* 2>1) | (1* 2>-1)");
  EXPECT_EQ(text_of(schedules[2]), "(2* -1>0) | (1* 1>0) | (0* 1>-1)");
}

TEST(RingSchedule, FullMaskBothWaysTakesHalfTheSteps) {
  const auto schedules = make_ring_schedule(4, every_rank(4), kWays[1]);
  EXPECT_EQ(text_of(schedules[0]), "(0* -1>1)(0 -1>3) | (3* 3>1)(1* 1>-1) | (2* 3>-1)");
  EXPECT_EQ(make_ring_schedule(16, every_rank(16), kWays[1])[0].size(), 9U);
}

TEST(RingSchedule, CausalRunsOnALineTravelForwardOnly) {
  Needs needs = every_rank(3);
  needs[0][1] = needs[0][2] = needs[1][2] = false;
  const auto schedules = make_ring_schedule(3, needs, kWays[2]);
  EXPECT_EQ(text_of(schedules[0]), "(0* -1>1) |  | ");
  EXPECT_EQ(text_of(schedules[1]), "(1* -1>2) | (0* 0>2) | ");
  EXPECT_EQ(text_of(schedules[2]), "(2* -1>-1) | (1* 1>-1) | (0* 1>-1)");
}

TEST(RingSchedule, BlocksPassUnreadThroughRanksThatDoNotNeedThem) {
  Needs needs(4, std::vector<bool>(4));
  needs[2][0] = true;
  const auto schedules = make_ring_schedule(4, needs, kWays[0]);
  EXPECT_EQ(text_of(schedules[0]), "(0 -1>1) |  | ");
  EXPECT_EQ(text_of(schedules[1]), "(1 -1>-1) | (0 0>2) | ");
  EXPECT_EQ(text_of(schedules[2]), "(2 -1>-1) |  | (0* 1>-1)");
  EXPECT_EQ(text_of(schedules[3]), "(3 -1>-1) |  | ");
}

TEST(RingSchedule, NothingIsSentWhenEveryRankNeedsItsOwnOnly) {
  Needs needs(5, std::vector<bool>(5));
  for (std::size_t rank = 0; rank < 5; ++rank) needs[rank][rank] = true;
  for (const auto& directions : kWays) {
    EXPECT_EQ(text_of(make_ring_schedule(5, needs, directions)[3]), "(3* -1>-1)");
  }
}

TEST(RingSchedule, OneRankKeepsItsKeys) {
  for (const auto& directions : kWays) {
    const auto schedules = make_ring_schedule(1, every_rank(1), directions);
    ASSERT_EQ(schedules.size(), 1U);
    EXPECT_EQ(text_of(schedules[0]), "(0* -1>-1)");
  }
}

}  // namespace
}  // namespace annulus
