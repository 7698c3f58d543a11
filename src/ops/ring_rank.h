// One rank of a ring call, from its checked problem to its results.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "annulus/ring.h"
#include "base/aligned_buffer.h"
#include "base/executor.h"
#include "ops/backward_pass.h"
#include "ops/forward_pass.h"
#include "ops/rank.h"
#include "ops/ring_call.h"
#include "ops/ring_walk.h"

namespace annulus {

class ForwardRank {
 public:
  ForwardRank(Communicator& comm, const RingCall& call, const RingOptions& options,
              Executor& executor, const RowDeltas& deltas);
  CallSummary run();

 private:
  [[nodiscard]] std::int64_t block_bytes(int owner) const;
  Parcel pack();
  void attend(ForwardPass& pass, RingWalk::Arrival arrival, bool first, bool last);
  [[nodiscard]] CallSummary summary(int blocks) const;

  const int world_size_;
  const Problem& problem_;
  const Deal& deal_;
  const Topology topology_;
  const ForwardKernel& kernel_;
  const TermKernel& terms_;
  Executor& executor_;
  const RowDeltas deltas_;
  RingWalk walk_;
  RankCosts costs_;
  std::int64_t pairs_computed_ = 0;
};

const BackwardKernel& backward_kernel(DType q_dtype, DType dout_dtype, const std::string& isa);
// What goes round the ring.
bool queries_travel(const BackwardSizes& sizes, const Problem& problem, const Deal& deal,
                    RingBackward asked);
// Visible pairs of one rank's queries and another's keys, by the mask alone.
std::int64_t count_pairs(const Problem& problem, const Deal& deal, int query_rank, int key_rank);
// The ranks that compute with a block, along each of its ways from its owner.
std::vector<std::vector<int>> ways_of(const std::vector<RankSchedule>& schedules, int owner);

// The side that travels carries its gradients: from one rank that adds to them to the next, and
// home from the last. The other side stays, and so do its gradients.
class BackwardRank {
 public:
  // dbias_sum as in BackwardPass.
  BackwardRank(Communicator& comm, const RingCall& call, const RingOptions& options,
               Executor& executor, const RowStatistics& statistics,
               const MutableTensorView& dbias_sum);
  CallSummary run();

 private:
  // A block's gradients on their way: the ranks that add to them, in order. With two directions a
  // block has two ways.
  struct Place {
    std::size_t way = 0;
    std::size_t index = 0;
  };

  void plan();
  [[nodiscard]] QueryBlock query_block(int owner) const;
  [[nodiscard]] KeyBlock key_block(int owner) const;
  [[nodiscard]] std::int64_t block_bytes(int owner) const;
  [[nodiscard]] std::int64_t gradient_bytes(int owner) const;
  void add(RingWalk::Arrival arrival);
  std::shared_ptr<AlignedBuffer> take_gradients(int owner, const Place& place);
  void pass_gradients(int owner, const Place& place, const std::shared_ptr<AlignedBuffer>& sum);
  void gather_home();
  void write_gradients() const;
  void write_query_gradients(const float* dq) const;
  void write_key_gradients(const float* dkv) const;
  void write_sinks();
  [[nodiscard]] CallSummary summary() const;

  Communicator& comm_;
  const Problem& problem_;
  const Deal& deal_;
  const RingOptions& options_;
  const BackwardKernel& kernel_;
  Executor& executor_;
  const RowStatistics statistics_;
  const BackwardSizes sizes_;
  RingWalk walk_;
  BackwardPass pass_;
  const bool queries_travel_;
  std::vector<std::int64_t> pairs_;  // visible, by owner of the block that visits
  // ways_[owner]
  std::vector<std::vector<std::vector<int>>> ways_;
  QueryBlock own_queries_;
  KeyBlock own_keys_;
  std::shared_ptr<AlignedBuffer> resident_;  // gradients of the side that stays
  std::shared_ptr<AlignedBuffer> home_;      // of the own block that travelled
  std::int64_t pairs_computed_ = 0;
};

// What the tiles held against what the mask says. A hop dropped, doubled or stale shows here.
void check_ledger(const char* operation, int rank, std::int64_t computed, std::int64_t visible);

}  // namespace annulus
