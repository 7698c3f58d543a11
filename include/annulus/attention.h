// Exact attention on one machine in one pass, and what every operation of Annulus shares: the
// options, the plan and the summary of a call.
//
//   s   = softmax_scale * dot(q, k), capped, plus bias
//   L   = log(sum over visible keys exp(s) + sum over sinks exp(a))
//   out = sum over visible keys exp(s - L) v
//   lse = L, natural logarithm, sinks included
//
// A row that sees nothing: out = 0 and lse = -inf (lse = logsumexp(sinks) with sinks). What is
// masked never reaches a result, NaN and Inf included.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "annulus/mask.h"
#include "annulus/partition.h"
#include "annulus/record.h"
#include "annulus/tensor.h"

namespace annulus {
inline namespace v1 {

enum class CausalAlignment : std::uint8_t {
  kBottomRight,  // query i sees keys up to i + kv_len - q_len, global lengths
  kTopLeft,      // query i sees keys up to i
};

// Keys i - left .. i + right, both ends inclusive; -1 is unlimited. Shifted like causal.
struct SlidingWindow {
  std::int64_t left = -1;
  std::int64_t right = -1;
};

// Rows of queries and keys that one work item shares, at most; 0: the kernel's own choice. Rounded
// up to whole strips and tiles, lowered to the longest shard and to what a kernel can hold. They
// change speed and memory, never results beyond the numeric bars.
struct BlockSizes {
  std::int64_t q = 0;
  std::int64_t kv = 0;
};

// A flat aggregate: name what differs from the default. All rules compose; a pair is visible iff
// every rule says so.
struct AttentionOptions {
  // Visibility.
  bool causal = false;
  CausalAlignment causal_alignment = CausalAlignment::kBottomRight;
  SlidingWindow sliding_window{};
  std::int64_t chunk_size = 0;  // > 0: i div c == j div c and j <= i, never shifted
  TensorView
      q_segment_ids{};  // int32 [batch, q_len]; one of the two serves both when q_len == kv_len
  TensorView kv_segment_ids{};  // int32 [batch, kv_len]
  std::optional<std::int32_t>
      padding_segment_id{};     // such a token sees nothing and is seen by nothing
  TensorView kv_lengths{};      // int32 [batch]: keys at positions >= the length are not visible
  TensorView attention_mask{};  // bool or uint8 [batch or 1, heads or 1, q_len, kv_len]
  MaskBuilder mask_builder{};

  // Arithmetic.
  std::optional<double> softmax_scale{};  // default head_dim^-0.5
  double logits_soft_cap = 0;             // > 0: s = cap * tanh(s / cap)
  // Sinks, in the scaled unit: float32 [num_heads], [num_sinks] seen by every head, or [num_heads,
  // n]. In the view: shape {num_heads, n, 1, 1} or, rank one, {num, 0, 1, 1} with 0 for "no second
  // axis".
  TensorView softmax_aux{};
  TensorView bias{};  // float32 or the dtype of q, [batch or 1, heads or 1, q_len, kv_len]
  // A dropped pair adds nothing to out, the others are divided by 1 - dropout_prob; lse does not
  // depend on it. Pair (batch, query head, query position, key position) is dropped iff the first
  // word of Philox 4x32-10 with these four as counter and the seed as key is below dropout_prob *
  // 2^32: the same pairs for every number of workers, partition and target.
  double dropout_prob = 0;  // [0, 1)
  std::uint64_t dropout_seed = 0;

  // How to run. None of these changes a result beyond the numeric bars.
  int threads = 0;              // per worker; 0: the allowed CPUs divided by the workers
  std::string isa{};            // a name of targets(); empty: $ANNULUS_ISA, else the best one
  BlockSizes forward_blocks{};  // explain() tells the sizes in use
  BlockSizes backward_blocks{};
  Recorder* recorder = nullptr;  // receives events while the call runs; not owned
};

// What a call did. pairs_computed is counted while the tiles run, pairs_visible by the mask alone;
// a call whose two counts differ throws InternalError rather than return a wrong result.
struct CallSummary {
  std::string target;               // "avx512_bf16"
  std::string arithmetic;           // "bf16 products, float32 accumulation"
  bool bf16_probabilities = false;  // probabilities are rounded to bfloat16 before they multiply v
  std::int64_t pairs_visible = 0;   // (batch, query head, query, key)
  std::int64_t pairs_computed = 0;
  std::int64_t bytes_sent = 0;     // K and V to the next rank, this rank
  std::int64_t steps_skipped = 0;  // ranks whose keys this rank does not see
  bool queries_travelled = false;  // of a backward: what went round the ring
};

// out = attention(q, k, v).
//
//   q    [batch, q_len,  num_heads,    head_dim]     float32, bfloat16 or float16
//   k    [batch, kv_len, num_kv_heads, head_dim]     the dtype of q, and so is v
//   v    [batch, kv_len, num_kv_heads, v_head_dim]   num_heads is a multiple of num_kv_heads
//   out  [batch, q_len,  num_heads,    v_head_dim]   the dtype of q, or float32
//   lse  [batch, q_len,  num_heads,    1]            float32, or an empty view
//
// Cost 2 * pairs * (head_dim + v_head_dim) FLOP; allocates a packed copy of k and v and, per
// thread, one block of rows. Throws InvalidArgument before anything is written, Unsupported for an
// isa this CPU lacks.
CallSummary attention(const TensorView& q, const TensorView& k, const TensorView& v,
                      const MutableTensorView& out, const MutableTensorView& lse,
                      const AttentionOptions& options = {});

// Where gradients go: each the shape of what it is the gradient of, in its dtype or float32. dq, dk
// and dv are always written; dsoftmax_aux and dbias only where a view is given, and their primals
// must then be given too. A gradient of what was broadcast is the sum over its uses.
struct Gradients {
  MutableTensorView dq{}, dk{}, dv{};
  MutableTensorView dsoftmax_aux{};
  MutableTensorView dbias{};
  // Comes in: the gradient of lse, float32 [batch, q_len, num_heads, 1], where the caller went on
  // with lse too (merge() does). Empty: zeros.
  TensorView dlse{};
};

// Gradients of attention() at q, k, v for the gradient dout of out (same shape, dtype of q or
// float32). out and lse are what attention() returned for the same arguments; lse is read as
// float32 [batch, q_len, num_heads, 1].
//
//   delta = sum of dout * out over v_head_dim, less dlse
//   dp    = dout v^T
//   ds    = p * (keep / (1 - dropout_prob) * dp - delta)
//   dbias = ds
//   da    = -exp(a - lse) * delta, summed over rows
//   dv    = (p * keep / (1 - dropout_prob))^T dout
//   dq    = softmax_scale * ds k, dk likewise; with a cap ds is first multiplied by
//           1 - (s / cap)^2
//
// Every sum is float32, rounded once at the end. The same arguments give the same bits whatever the
// number of threads. Cost 2.5 times the forward's FLOP; allocates float32 gradients and packed
// copies of q, k, v and dout. Throws InvalidArgument before anything is written.
CallSummary attention_backward(const TensorView& dout, const TensorView& q, const TensorView& k,
                               const TensorView& v, const TensorView& out, const TensorView& lse,
                               const Gradients& gradients, const AttentionOptions& options = {});

// Joins two attention results over disjoint sets of keys into the result over their union:
// lse = log(e^lse_a + e^lse_b), out likewise weighted. Exact for -inf on either or both sides. out
// may be out_a or out_b; all shapes as in attention(); lse float32. Sinks must have been counted in
// one of the two only.
void merge(const TensorView& out_a, const TensorView& lse_a, const TensorView& out_b,
           const TensorView& lse_b, const MutableTensorView& out, const MutableTensorView& lse);

}  // namespace v1
}  // namespace annulus
