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

// A batch row and a KV head: what one packed head of keys belongs to.
struct Head {
  std::int64_t batch = 0;
  std::int64_t kv_head = 0;
};

struct Problem {
  struct Dropout {
    std::uint64_t seed = 0;
    std::uint64_t threshold = 0;  // dropped iff the word is below
  };

  TensorView q, k, v;
  MutableTensorView out, lse;       // of a forward; lse may be empty
  TensorView given_out, given_lse;  // of a backward alone
  TensorView dout;
  Gradients gradients;
  std::int64_t batch = 0;
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t group = 1;  // query heads per KV head
  std::int64_t q_len = 0;  // of the whole sequence; q.shape[1] is what is at hand
  std::int64_t kv_len = 0;
  Dims dims{};
  BlockSizes forward_blocks, backward_blocks;  // as asked for; see forward_blocking()
  Visibility visibility;
  TensorView q_segment_ids, kv_segment_ids;  // both or none
  ScoreRule rule{};
  Dropout dropout;
  TensorView bias;
  TensorView softmax_aux;
  std::vector<float> sinks;  // [num_heads] logsumexp of the head's sinks, -inf without

  [[nodiscard]] bool empty() const { return batch == 0 || num_heads == 0; }
  // Heads of all batch rows, and their order in packed blocks.
  [[nodiscard]] std::int64_t kv_heads() const { return batch * num_kv_heads; }
  [[nodiscard]] Head head_at(std::int64_t index) const {
    return {index / num_kv_heads, index % num_kv_heads};
  }
  [[nodiscard]] std::int64_t index_of(const Head& head) const {
    return head.batch * num_kv_heads + head.kv_head;
  }
};

// What a call reads and writes.
struct CallTensors {
  TensorView q, k, v;
  // A forward writes out, and lse if wanted.
  bool forward = true;
  MutableTensorView out{}, lse{};
  // A backward reads dout and, alone, what a forward wrote before.
  bool backward = false;
  TensorView dout{};
  TensorView given_out{}, given_lse{};
  Gradients gradients{};

  [[nodiscard]] bool backward_alone() const { return backward && !forward; }
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
