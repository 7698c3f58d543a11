// Who holds whose keys when, and who sends them where, as data. Pure, so its test can be complete.
#pragma once

#include <cstdint>
#include <vector>

namespace annulus {

// A block of keys that is at one rank during one step.
struct Visit {
  int owner = 0;  // whose keys
  int from = -1;  // rank it was received from in this step; -1: own keys
  int to = -1;    // rank it is sent on to, for that rank's step + 1; -1: nobody downstream needs it
  bool compute = false;  // this rank has visible pairs with it; false: it only passes through
};

// steps[s] of one rank: the blocks at hand in step s, in the order in which they are received, sent
// and computed.
using RankSchedule = std::vector<std::vector<Visit>>;

struct Direction {
  int step = 1;      // +1: to the next rank, -1: to the previous one
  bool wrap = true;  // rank world_size - 1 and rank 0 are neighbours
};

// needs[r][o]: rank r has visible pairs with the keys of rank o. Each block visits every rank that
// needs it exactly once, travels no further than the last one that does, and the ranks in between
// forward it unread. With two directions a block goes both ways at once: with wrap-around each rank
// is reached by the shorter way (ties by the first direction), without it by the only one. Own keys
// are step 0 of the first direction; where the second one sends them too, step 0 has another visit
// for that, which computes nothing. All ranks have the same number of steps, as many as the block
// that travels farthest takes; a step in which a rank holds nothing is empty.
std::vector<RankSchedule> make_ring_schedule(int world_size,
                                             const std::vector<std::vector<bool>>& needs,
                                             const std::vector<Direction>& directions);

}  // namespace annulus
