// The oracle: attention by its formula in double precision, one query at a time, no tiles, no ring. Slow on purpose;
// tests compare everything with it, and so can users.
#pragma once

#include <cstdint>
#include <vector>

#include "annulus/attention.h"
#include "annulus/tensor.h"

namespace annulus {
inline namespace v1 {
namespace reference {

// One row of the result. `weight_sum` is sum over visible keys of p * |v|, which error bounds are made of.
struct Row {
  std::vector<double> out;         // [v_head_dim]
  double lse = 0;
  std::vector<double> abs_out;     // [v_head_dim] sum of p * |v|
  std::int64_t visible = 0;        // keys seen
};

// Row (batch, query, head) of attention(q, k, v) with the same meaning of every option; positions are row indices.
Row attention_row(const TensorView& q, const TensorView& k, const TensorView& v, const AttentionOptions& options,
                  std::int64_t batch, std::int64_t query, std::int64_t head);

// All rows: out [batch, q_len, num_heads, v_head_dim] and lse [batch, q_len, num_heads], dense, in that order.
void attention(const TensorView& q, const TensorView& k, const TensorView& v, const AttentionOptions& options,
               std::vector<double>& out, std::vector<double>& lse);

}  // namespace reference
}  // namespace v1
}  // namespace annulus
