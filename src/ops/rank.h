// What one rank needs to know before it computes: who owns which rows, what each block costs it,
// how blocks travel. Found in the same way by a running rank and by explain().
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "annulus/ring.h"
#include "core/ring_schedule.h"
#include "ops/forward_pass.h"
#include "ops/key_block.h"
#include "ops/problem.h"

namespace annulus {

// Rows of every rank, and the segment ids of their keys.
struct Deal {
  int world_size = 1;
  const Partition* q_partition = nullptr;
  const Partition* kv_partition = nullptr;
  std::int64_t q_len = 0;
  std::int64_t kv_len = 0;
  bool whole_tensors = true;  // rows of the tensors are positions; false: rows of a shard
  // Segment ids [batch][token] of a rank's queries and keys in the order of its Rows.
  std::function<std::vector<std::int32_t>(int rank, const Rows& rows)> q_segments;
  std::function<std::vector<std::int32_t>(int rank, const Rows& rows)> kv_segments;

  [[nodiscard]] Rows q_rows(int rank) const;
  [[nodiscard]] Rows kv_rows(int rank) const;
  [[nodiscard]] std::int64_t num_queries(int rank) const {
    return q_partition->local_len(rank, world_size, q_len);
  }
  [[nodiscard]] std::int64_t num_keys(int rank) const {
    return kv_partition->local_len(rank, world_size, kv_len);
  }
};

std::vector<Direction> directions_of(Topology topology);
// Per worker; fewer than asked of the environment where there is too little to do.
int threads_of(const AttentionOptions& options, const Problem& problem, int workers);

// The blocks in which a call runs: what its caller asks for, else what the kernel chooses, in whole
// strips and panel steps, no longer than the longest shard. The same on every rank that asks alike.
Blocking forward_blocking(const ForwardKernel& kernel, const Problem& problem, const Deal& deal);
BackwardBlocking backward_blocking(const BackwardKernel& kernel, const Problem& problem,
                                   const Deal& deal);

// One rank's queries against everybody's keys: visible pairs per item, by owner.
struct RankCosts {
  std::vector<std::vector<std::int64_t>> item_pairs;  // [owner][item]
  std::vector<std::int64_t> pairs;                    // [owner]
  [[nodiscard]] std::int64_t total() const;
};
RankCosts rank_costs(const ForwardKernel& kernel, const Problem& problem, const Deal& deal,
                     int rank, int threads);

// Number of blocks that a rank computes with.
int computed_blocks(const RankSchedule& schedule);

}  // namespace annulus
