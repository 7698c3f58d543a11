#include "core/ring_schedule.h"

#include <algorithm>
#include <cassert>

namespace annulus {
namespace {

class Router {
 public:
  Router(int world_size, const std::vector<std::vector<bool>>& needs,
         const std::vector<Direction>& directions)
      : world_size_(world_size), needs_(needs), directions_(directions) {}

  // Hops until a block of `owner` has to travel in direction `way`: as far as the last rank that
  // needs it.
  [[nodiscard]] int reach(std::size_t way, int owner) const {
    int farthest = 0;
    for (int rank = 0; rank < world_size_; ++rank) {
      if (computes(way, owner, rank)) farthest = std::max(farthest, hops(way, owner, rank));
    }
    return farthest;
  }

  [[nodiscard]] bool computes(std::size_t way, int owner, int rank) const {
    const auto row = static_cast<std::size_t>(rank);
    return needs_[row][static_cast<std::size_t>(owner)] && way_to(owner, rank) == way;
  }

  [[nodiscard]] int neighbour(std::size_t way, int rank, int distance) const {
    const int moved = (rank + distance * directions_[way].step) % world_size_;
    return moved < 0 ? moved + world_size_ : moved;
  }

 private:
  // -1: this direction does not lead there.
  [[nodiscard]] int hops(std::size_t way, int owner, int rank) const {
    const int ahead = (rank - owner) * directions_[way].step;
    if (ahead >= 0) return ahead;
    return directions_[way].wrap ? ahead + world_size_ : -1;
  }

  [[nodiscard]] std::size_t way_to(int owner, int rank) const {
    std::size_t best = directions_.size();
    for (std::size_t way = 0; way < directions_.size(); ++way) {
      const int distance = hops(way, owner, rank);
      if (distance < 0) continue;
      if (best == directions_.size() || distance < hops(best, owner, rank)) best = way;
    }
    assert(best < directions_.size() && "a rank is out of reach in every direction");
    return best;
  }

  int world_size_;
  const std::vector<std::vector<bool>>& needs_;
  const std::vector<Direction>& directions_;
};

}  // namespace

std::vector<RankSchedule> make_ring_schedule(int world_size,
                                             const std::vector<std::vector<bool>>& needs,
                                             const std::vector<Direction>& directions) {
  const Router router(world_size, needs, directions);
  const auto ranks = static_cast<std::size_t>(world_size);
  std::vector<RankSchedule> schedules(ranks, RankSchedule(ranks));  // no block makes more hops
  int steps = 1;
  for (std::size_t way = 0; way < directions.size(); ++way) {
    assert(directions[way].step == 1 || directions[way].step == -1);
    for (int owner = 0; owner < world_size; ++owner) {
      const int reach = router.reach(way, owner);
      if (way > 0 && reach == 0) continue;  // own keys are at hand once already
      steps = std::max(steps, reach + 1);
      for (int hop = 0; hop <= reach; ++hop) {
        const int rank = router.neighbour(way, owner, hop);
        const int from = hop == 0 ? -1 : router.neighbour(way, rank, -1);
        const int to = hop == reach ? -1 : router.neighbour(way, rank, 1);
        schedules[static_cast<std::size_t>(rank)][static_cast<std::size_t>(hop)].push_back(
            {owner, from, to, router.computes(way, owner, rank)});
      }
    }
  }
  for (RankSchedule& schedule : schedules) schedule.resize(static_cast<std::size_t>(steps));
  return schedules;
}

}  // namespace annulus
