// The queries of one rank against the keys of another, backwards: the one place where backward
// tiles are run.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/executor.h"
#include "ops/key_block.h"
#include "ops/query_side.h"

namespace annulus {

// What the forward knew of rows: float32 [batch, rows, num_heads, 1] of the tensors at hand.
struct RowStatistics {
  TensorView lse;
  TensorView delta;
};

// The strips of one rank's queries and dout as they travel: packed once by their owner.
struct QueryBlock {
  QuerySide side;
  std::int64_t strip_bytes = 0;
  Parcel packed;  // [batch][num_kv_heads][strip]

  [[nodiscard]] std::int64_t strips() const { return side.strips_per_head(); }
};

// Sizes of packed blocks and of their float32 gradients, in bytes.
struct BackwardSizes {
  BackwardSizes(const BackwardKernel& kernel, const Problem& problem);
  [[nodiscard]] std::int64_t keys(std::int64_t num_keys) const;
  [[nodiscard]] std::int64_t key_gradients(std::int64_t num_keys) const;
  [[nodiscard]] std::int64_t queries(std::int64_t tokens) const;
  [[nodiscard]] std::int64_t query_gradients(std::int64_t tokens) const;

  // Floats of one head's gradients: dq [strip][dq_rows][strip_rows], and dk [key][k_row] before dv
  // [key][v_row], keys padded to whole tiles.
  [[nodiscard]] std::int64_t padded_keys(std::int64_t num_keys) const;
  [[nodiscard]] std::int64_t strips(std::int64_t tokens) const;
  [[nodiscard]] std::int64_t strip_floats() const;
  std::int64_t k_row = 0, v_row = 0;

 private:
  const BackwardKernel& kernel_;
  const Problem& problem_;
};

Parcel pack_queries(const BackwardKernel& kernel, const QuerySide& side,
                    const RowStatistics& statistics, Executor& executor);
Parcel pack_backward_keys(const BackwardKernel& kernel, const Problem& problem, const Rows& rows,
                          Executor& executor);

class BackwardPass {
 public:
  struct Options {
    BackwardBlocking blocking{};
    bool fused = true;
    MutableTensorView dbias_sum{};  // float32, stride 0 where broadcast; empty: not wanted
  };
  BackwardPass(const BackwardKernel& kernel, const TermKernel& terms, const Problem& problem,
               Executor& executor, const Options& options, std::function<void()> tick);

  // Adds to dq of the queries' heads and dkv of the keys' heads. The sum of every element is taken
  // in one order, whatever the number of threads. Returns the visible pairs that the tiles held.
  std::int64_t run(const QueryBlock& queries, const KeyBlock& keys, float* dq, float* dkv);

  // Scratch of one thread.
  static std::int64_t thread_bytes(const BackwardKernel& kernel, const Problem& problem,
                                   const BackwardBlocking& blocking, bool with_dbias);

 private:
  struct Work;
  struct ThreadMemory;
  struct NeededBlock;
  struct Prepared;

  void run_keys(const Work& work, bool want_dq);
  void run_queries(const Work& work);
  void key_unit(const Work& work, std::size_t set, std::int64_t panel, bool want_dq,
                std::byte* memory, std::atomic<std::int64_t>* progress);
  void wait_turn(const std::atomic<std::int64_t>* progress, std::int64_t panel, std::int64_t at,
                 std::int64_t& lowest) const;
  [[nodiscard]] std::vector<NeededBlock> needed_blocks(const Work& work, const Head& head,
                                                       const KeyRange& range) const;
  void find_blocks(const Work& work, const Head& head, const KeyRange& range, std::int64_t first,
                   std::int64_t end, std::vector<NeededBlock>& found) const;
  std::int64_t prepare(const Work& work, const Head& head, const NeededBlock& block,
                       const KeyRange& range, const ThreadMemory& memory, Prepared& prepared) const;
  void call(const Work& work, const Head& head, const KeyRange& range,
            const std::vector<BackwardStrip>& strips, const NeededBlock* next, bool want_dq,
            bool want_dkv, const ThreadMemory& memory) const;
  void add_dbias(const Work& work, const Head& head, const KeyRange& range,
                 const Prepared& prepared) const;
  [[nodiscard]] std::vector<std::vector<Head>> head_sets() const;

  const BackwardKernel& kernel_;
  const TermKernel& terms_;
  const Problem& problem_;
  const BackwardSizes sizes_;
  Executor& executor_;
  const Options options_;
  const std::function<void()> tick_;
  const std::int64_t block_strips_;
  // Heads that share elements of dbias are one unit of work, in order.
  const std::vector<std::vector<Head>> sets_;
  std::vector<AlignedBuffer> thread_memory_;
  std::atomic<std::int64_t> pairs_{0};
  std::atomic<bool> failed_{false};
};

}  // namespace annulus
