// The oracle: attention by its formula in double precision, one query at a time, no tiles, no ring.
// Slow on purpose; tests compare everything with it, and so can users.
#pragma once

#include <cstdint>
#include <vector>

#include "annulus/attention.h"
#include "annulus/tensor.h"

namespace annulus {
inline namespace v1 {
namespace reference {

// One row of the result, and what bounds of another implementation's rounding error are made of.
// Maxima and norms run over the visible keys; values that are not finite are left out of max_abs_v.
// With dropout, p in what follows is p * keep / (1 - dropout_prob), and max_abs_v is the largest of
// keep / (1 - dropout_prob) * |v|.
struct Row {
  std::vector<double> out;  // [v_head_dim]
  double lse = 0;
  // The probability of a score s is p = exp(s - max_score) / weight_sum, and
  // lse = max_score + log(weight_sum). Unlike exp(s - lse) this keeps its digits for huge scores.
  double max_score = 0;
  double weight_sum = 1;
  std::vector<double> abs_out;  // [v_head_dim] sum of p * |v|
  // [v_head_dim] root of the sum of (p * v)^2: what independent errors of the weights add up to
  std::vector<double> spread_out;
  std::int64_t visible = 0;  // keys seen
  std::int64_t sinks = 0;    // sinks counted
  double q_norm = 0;         // Euclidean
  double max_k_norm = 0;
  double max_abs_v = 0;
  // Largest |score| (scaled, capped, biased; sinks too) among those within 32 of the largest score.
  // What lies lower weighs less than 2^-46, so that even its rounding is invisible.
  double max_abs_score = 0;
};

// Row (batch, query, head) of attention(q, k, v) with the same meaning of every option; positions
// are row indices. Throws InvalidArgument.
Row attention_row(const TensorView& q, const TensorView& k, const TensorView& v,
                  const AttentionOptions& options, std::int64_t batch, std::int64_t query,
                  std::int64_t head);

// All rows: out [batch, q_len, num_heads, v_head_dim] and lse [batch, q_len, num_heads], dense, in
// that order. Throws InvalidArgument.
void attention(const TensorView& q, const TensorView& k, const TensorView& v,
               const AttentionOptions& options, std::vector<double>& out, std::vector<double>& lse);

// Gradients in the shape and order of what they are gradients of, dense.
struct DenseGradients {
  std::vector<double> dq, dk, dv;
  std::vector<double> dsoftmax_aux;  // empty without softmax_aux
  std::vector<double> dbias;         // empty without bias
};

// Gradients of attention() for dout. `out` empty: delta is made of the oracle's own rows; else of
// the given ones. `dlse` empty: zeros. Throws InvalidArgument.
DenseGradients attention_backward(const TensorView& dout, const TensorView& q, const TensorView& k,
                                  const TensorView& v, const TensorView& out,
                                  const AttentionOptions& options, const TensorView& dlse = {});

}  // namespace reference
}  // namespace v1
}  // namespace annulus
