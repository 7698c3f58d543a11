// A checked call: what the caller asked, with defaults filled in and every contradiction refused.
// Nothing behind this point checks arguments.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "annulus/attention.h"
#include "core/visibility.h"
#include "kernels/kernel_table.h"

namespace annulus {

struct Problem {
  TensorView q, k, v;
  MutableTensorView out, lse;  // lse may be empty
  std::int64_t batch = 0;
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t group = 1;  // query heads per KV head
  std::int64_t q_len = 0;  // of the whole sequence; q.shape[1] is what is at hand
  std::int64_t kv_len = 0;
  Dims dims{};
  Visibility visibility;
  TensorView q_segment_ids, kv_segment_ids;  // both or none
  ScoreRule rule{};
  TensorView bias;
  std::vector<float> sinks;  // [num_heads] logsumexp of the head's sinks, -inf without

  [[nodiscard]] bool empty() const { return batch == 0 || num_heads == 0; }
};

// What a call reads and writes; lse may be empty.
struct CallTensors {
  TensorView q, k, v;
  MutableTensorView out, lse;
};

// Throws InvalidArgument naming `operation`. q_len and kv_len are global lengths; the tensors' own
// lengths are the rows at hand. `writes` is false for plans, which need no tensors' memory.
Problem make_problem(const std::string& operation, const CallTensors& tensors,
                     const AttentionOptions& options, std::int64_t q_len, std::int64_t kv_len,
                     bool writes = true);

// The rules of positions in words: "causal & window(128, 0) & segments".
std::string describe_mask(const Problem& problem);

// What all ranks must agree on, one "name=value" per entry.
std::vector<std::string> signature(const Problem& problem, const AttentionOptions& options);

}  // namespace annulus
