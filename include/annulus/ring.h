// Ring attention: exact attention over sequences dealt to several workers. Each worker keeps its
// queries; blocks of keys and values travel round the ring until everyone who can see them has used
// them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "annulus/attention.h"
#include "annulus/communicator.h"
#include "annulus/partition.h"

namespace annulus {
inline namespace v1 {

// How blocks travel. kRing: one way round. kLinear: both ways along a line, the wrap-around link is
// not used.
enum class Topology : std::uint8_t { kRing, kLinear };

// What travels in the backward: keys and values with their gradients, or queries and dout with
// theirs. kAuto takes what moves fewer bytes; keys where shards have rows of bias or
// attention_mask.
enum class RingBackward : std::uint8_t { kAuto, kKeys, kQueries };

struct RingOptions {
  AttentionOptions attention{};
  Partition partition{};  // of the queries, and of the keys unless kv_partition is given
  std::optional<Partition> kv_partition{};
  Topology topology = Topology::kRing;
  RingBackward ring_backward = RingBackward::kAuto;
  // true: dq, dk and dv in one pass over the tiles (5 products). false: two passes (7 products).
  bool fused_backward = true;
  WorkerOptions workers{};  // the global form only
};

// SPMD form: every rank passes its shard. Row t of the shard is the rank's t-th token in the order
// of Partition::ranges(). q_segment_ids and kv_segment_ids are the shard's rows; attention_mask and
// bias hold its own query rows by all kv columns in position order; kv_lengths are global. Shapes
// as in attention(), with local lengths. Causal alignment refers to the global lengths. Throws the
// same error on every rank, before anything is written.
CallSummary ring_attention(Communicator& comm, const TensorView& q, const TensorView& k,
                           const TensorView& v, const MutableTensorView& out,
                           const MutableTensorView& lse, const RingOptions& options = {});

// Global form: whole tensors, dealt to `workers` threads of this process, which read and write them
// in place. Returns every rank's summary.
std::vector<CallSummary> ring_attention(int workers, const TensorView& q, const TensorView& k,
                                        const TensorView& v, const MutableTensorView& out,
                                        const MutableTensorView& lse,
                                        const RingOptions& options = {});

// Gradients of ring_attention(), see attention_backward(). SPMD form: dout, out, lse, dq and dbias
// are shards like q, dk and dv like k; dsoftmax_aux is complete, and the same bits, on every rank.
CallSummary ring_attention_backward(Communicator& comm, const TensorView& dout, const TensorView& q,
                                    const TensorView& k, const TensorView& v, const TensorView& out,
                                    const TensorView& lse, const Gradients& gradients,
                                    const RingOptions& options = {});

// Global form.
std::vector<CallSummary> ring_attention_backward(int workers, const TensorView& dout,
                                                 const TensorView& q, const TensorView& k,
                                                 const TensorView& v, const TensorView& out,
                                                 const TensorView& lse, const Gradients& gradients,
                                                 const RingOptions& options = {});

struct TrainingSummary {
  CallSummary forward;
  CallSummary backward;
};

// Forward and backward in one call: delta comes from the float32 rows of out before they are
// rounded. Global form; lse may be empty.
std::vector<TrainingSummary> ring_attention_with_gradients(
    int workers, const TensorView& dout, const TensorView& q, const TensorView& k,
    const TensorView& v, const MutableTensorView& out, const MutableTensorView& lse,
    const Gradients& gradients, const RingOptions& options = {});

// One rank in one ring step: whose keys are here, what they cost, where they go next.
struct PlannedStep {
  int rank = 0;
  int step = 0;
  int owner = -1;          // whose keys; -1: none here
  std::int64_t pairs = 0;  // visible pairs of this rank's queries and these keys; 0: not computed
  int send_to = -1;        // -1: nobody downstream needs them
  std::int64_t bytes = 0;  // sent
};

// What a call will do, found without computing anything.
struct Plan {
  std::string target;
  std::string arithmetic;
  bool bf16_probabilities = false;  // probabilities are rounded to bfloat16 before they multiply v
  std::string mask;                 // in words
  std::vector<std::string> notes;   // copies made, ways refused, with reasons
  int workers = 1;
  int threads_per_worker = 1;
  std::string partition;
  std::vector<std::int64_t> q_rows;  // per rank
  std::vector<std::int64_t> kv_rows;
  std::vector<PlannedStep> steps;
  std::int64_t pairs_visible = 0;
  std::int64_t pairs_total = 0;  // batch * num_heads * q_len * kv_len
  double flops = 0;
  std::vector<std::int64_t> bytes_sent_per_rank;
  std::int64_t strip_rows = 0;  // rows of queries that share a tile
  std::int64_t tile_keys = 0;
  std::int64_t panel_keys = 0;  // AttentionOptions::forward_blocks as the call uses them
  std::int64_t item_rows = 0;
  std::int64_t peak_bytes =
      0;  // allocated by the call at its peak, the caller's tensors not counted
};

// The plan of the global form; q, k, v need valid shapes, their data is not read (masks, segment
// ids and lengths are).
Plan explain(int workers, const TensorView& q, const TensorView& k, const TensorView& v,
             DType out_dtype, const RingOptions& options = {});

// What a backward will do. Steps: `owner` is whose block is at hand, of keys or of queries; `bytes`
// counts its packed operands, not its gradients.
struct BackwardPlan {
  std::string target;
  std::string arithmetic;
  bool bf16_products = false;  // p and ds are rounded to bfloat16 before they multiply
  bool queries_travel = false;
  std::vector<PlannedStep> steps;
  std::int64_t pairs_visible = 0;
  double flops = 0;  // 2.5 times the forward's; two passes compute 3.5 times them
  std::vector<std::int64_t> bytes_sent_per_rank;  // gradients included
  std::int64_t panel_keys = 0;  // AttentionOptions::backward_blocks as the call uses them
  std::int64_t block_rows = 0;
  std::int64_t peak_bytes = 0;  // allocated by the call at its peak
};

// The plan of the global form of ring_attention_backward(). rounded_dbias: dbias is asked for, in a
// type other than float32.
BackwardPlan explain_backward(int workers, const TensorView& q, const TensorView& k,
                              const TensorView& v, DType dout_dtype,
                              const RingOptions& options = {}, bool rounded_dbias = false);

}  // namespace v1
}  // namespace annulus
