// The forward on a ring. attention() is a ring of one.

#include "annulus/ring.h"

#include <limits>

#include "annulus/attention.h"
#include "base/fail.h"
#include "kernels/dispatch.h"
#include "ops/ring_call.h"
#include "ops/ring_rank.h"

namespace annulus {

ForwardRank::ForwardRank(Communicator& comm, const RingCall& call, const RingOptions& options,
                         Executor& executor, const RowDeltas& deltas)
    : world_size_(comm.world_size()),
      problem_(call.problem),
      deal_(call.deal),
      topology_(options.topology),
      kernel_(choose_forward(problem_.q.dtype, options.attention.isa)),
      terms_(choose_terms(problem_.q.dtype, options.attention.isa)),
      executor_(executor),
      deltas_(deltas),
      walk_(comm, options.attention.recorder) {}

CallSummary ForwardRank::run() {
  Stopwatch planning = walk_.time(EventKind::kPlan);
  const int rank = walk_.rank();
  costs_ = rank_costs(kernel_, problem_, deal_, rank, executor_.threads());
  std::vector<bool> needs;
  for (const std::int64_t pairs : costs_.pairs) needs.push_back(pairs > 0);
  const int blocks = computed_blocks(walk_.agree(needs, topology_));
  planning.stop();

  const Parcel own = pack();
  Rows rows = deal_.q_rows(rank);
  std::vector<std::int32_t> segments = deal_.q_segments(rank, rows);
  ForwardPass pass(kernel_, terms_, forward_blocking(kernel_, problem_, deal_),
                   {&problem_, std::move(rows), std::move(segments), kernel_.strip_rows}, executor_,
                   blocks > 1, deltas_, [this] { walk_.tick(); });
  if (blocks == 0) {  // nothing is visible from here
    Stopwatch finishing = walk_.time(EventKind::kFinish);
    pass.attend_block(nullptr, {}, true, true);
    finishing.stop();
  }
  int left = blocks;
  walk_.run(
      own, [this](int owner) { return block_bytes(owner); },
      [&](RingWalk::Arrival arrival) {
        const bool first = left == blocks, last = --left == 0;
        attend(pass, std::move(arrival), first, last);
      });
  return summary(blocks);
}

std::int64_t ForwardRank::block_bytes(int owner) const {
  return problem_.kv_heads() * kernel_.packed_bytes(problem_.dims, deal_.num_keys(owner));
}

Parcel ForwardRank::pack() {
  Stopwatch packing = walk_.time(EventKind::kPack);
  const Rows rows = deal_.kv_rows(walk_.rank());
  Parcel own = pack_keys({kernel_.packed_bytes(problem_.dims, rows.size()),
                          kernel_.blocking(problem_.dims).panel_keys, kernel_.pack},
                         problem_, rows, executor_);
  packing.stop(static_cast<std::int64_t>(own.bytes.size()));
  return own;
}

void ForwardRank::attend(ForwardPass& pass, RingWalk::Arrival arrival, bool first, bool last) {
  Stopwatch computing = walk_.time(EventKind::kCompute, arrival.step, arrival.owner);
  Rows rows = deal_.kv_rows(arrival.owner);
  std::vector<std::int32_t> segments = deal_.kv_segments(arrival.owner, rows);
  const std::int64_t head_bytes = kernel_.packed_bytes(problem_.dims, rows.size());
  KeyBlock keys =
      describe_keys(kernel_.tile_keys, head_bytes, problem_, std::move(rows), std::move(segments));
  keys.packed = std::move(arrival.block);
  const std::int64_t pairs = pass.attend_block(
      &keys, costs_.item_pairs[static_cast<std::size_t>(arrival.owner)], first, last);
  pairs_computed_ += pairs;
  computing.stop(0, pairs);
}

CallSummary ForwardRank::summary(int blocks) const {
  check_ledger("ring_attention", walk_.rank(), pairs_computed_, costs_.total());
  CallSummary result;
  result.target = kernel_.target, result.arithmetic = kernel_.arithmetic;
  result.bf16_probabilities = kernel_.compute == Element::kBFloat16;
  result.pairs_visible = costs_.total(), result.pairs_computed = pairs_computed_;
  result.bytes_sent = walk_.bytes_sent(), result.steps_skipped = world_size_ - blocks;
  return result;
}

void check_ledger(const char* operation, int rank, std::int64_t computed, std::int64_t visible) {
  if (computed == visible) return;
  fail<InternalError>(operation, "rank ", rank, " computed ", computed,
                      " visible pairs, the mask has ", visible, "; please report this");
}

inline namespace v1 {

CallSummary ring_attention(Communicator& comm, const TensorView& q, const TensorView& k,
                           const TensorView& v, const MutableTensorView& out,
                           const MutableTensorView& lse, const RingOptions& options) {
  const auto call =
      spmd_call("ring_attention", comm, {.q = q, .k = k, .v = v, .out = out, .lse = lse}, options);
  Executor executor(threads_of(options.attention, call->problem, comm.world_size()));
  return ForwardRank(comm, *call, options, executor, {}).run();
}

std::vector<CallSummary> ring_attention(int workers, const TensorView& q, const TensorView& k,
                                        const TensorView& v, const MutableTensorView& out,
                                        const MutableTensorView& lse, const RingOptions& options) {
  const auto call = global_call("ring_attention", workers,
                                {.q = q, .k = k, .v = v, .out = out, .lse = lse}, options);
  std::vector<CallSummary> summaries(static_cast<std::size_t>(workers));
  run_workers(
      workers,
      [&](Communicator& comm) {
        Executor executor(threads_of(options.attention, call->problem, workers));
        summaries[static_cast<std::size_t>(comm.rank())] =
            ForwardRank(comm, *call, options, executor, {}).run();
      },
      options.workers);
  return summaries;
}

CallSummary attention(const TensorView& q, const TensorView& k, const TensorView& v,
                      const MutableTensorView& out, const MutableTensorView& lse,
                      const AttentionOptions& options) {
  RingOptions ring;
  ring.attention = options;
  ring.workers.timeout_s = std::numeric_limits<double>::infinity();  // nobody to wait for
  return ring_attention(1, q, k, v, out, lse, ring).front();
}

}  // namespace v1
}  // namespace annulus
