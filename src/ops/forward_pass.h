// One rank's queries on their way through all blocks of keys: attend_block, the one place where
// tiles are run.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/executor.h"
#include "core/rows.h"
#include "core/visibility.h"
#include "kernels/kernel_table.h"
#include "ops/key_block.h"
#include "ops/problem.h"
#include "ops/query_side.h"
#include "ops/row.h"

namespace annulus {

// How the rank's query rows are cut. A row is (token, query head of the KV head's group), the head
// varying faster; a strip is the kernel's strip_rows of them, counted from the rank's first row, so
// that results do not depend on how strips are dealt to items and threads. An item is some strips
// of one (batch row, KV head).
struct ForwardLayout {
  std::int64_t rows_per_head = 0;  // tokens * group
  std::int64_t strips_per_head = 0;
  std::int64_t strips_per_item = 1;
  std::int64_t items_per_head = 0;
  std::int64_t items = 0;
  std::int64_t panel_keys = 0;
  std::int64_t strip_bytes = 0;
  std::int64_t thread_bytes =
      0;  // scratch of one thread, the state of one item included if states do not stay
  std::int64_t state_bytes = 0;  // states of all items if they must outlive a step, else 0
  std::int64_t out_stride = 0;   // floats of a finished row in scratch
};

// keep_states: more than one block will be attended to.
ForwardLayout make_forward_layout(const ForwardKernel& kernel, const Problem& problem,
                                  const Blocking& blocking, std::int64_t tokens, int threads,
                                  bool keep_states);

struct Item {
  Head head;
  std::int64_t strip_begin = 0;
  std::int64_t strip_end = 0;
  std::int64_t row_begin = 0;  // rows of the item, group-interleaved
  std::int64_t row_end = 0;
};

std::vector<Item> make_items(const ForwardLayout& layout, const Problem& problem,
                             const ForwardKernel& kernel);

// Visible pairs of each item with the keys, by the mask alone.
std::vector<std::int64_t> count_item_pairs(const Problem& problem, const std::vector<Item>& items,
                                           const TokenSide& queries, const KeyBlock& keys);

class ForwardPass {
 public:
  // `tick` is called after every item and may throw to stop the call.
  ForwardPass(const ForwardKernel& kernel, const TermKernel& terms, const Blocking& blocking,
              QuerySide queries, Executor& executor, bool keep_states, const RowDeltas& deltas,
              std::function<void()> tick);

  [[nodiscard]] const std::vector<Item>& items() const { return items_; }
  // All items against a block, longest first by item_pairs; keys may be null (nothing is visible).
  // `first` starts the states, `last` writes out and lse. Returns the visible pairs that the tiles
  // held.
  std::int64_t attend_block(const KeyBlock* keys, const std::vector<std::int64_t>& item_pairs,
                            bool first, bool last);

 private:
  struct ThreadMemory;
  struct Panel;

  [[nodiscard]] std::vector<Panel> needed_panels(const Item& item, const KeyBlock& keys) const;
  std::int64_t run_item(const Item& item, const KeyBlock& keys, std::byte* states,
                        const ThreadMemory& memory) const;
  // Classes, bits and terms of a strip and a panel; false if nothing is visible.
  bool prepare(const Item& item, std::int64_t strip, const KeyBlock& keys, const Panel& panel,
               const ThreadMemory& memory, StripWork& work, std::int64_t& pairs) const;
  void start_item(const Item& item, std::byte* states) const;
  void finish_item(const Item& item, const std::byte* states, const ThreadMemory& memory) const;

  const ForwardKernel& kernel_;
  const TermKernel& terms_;
  const QuerySide queries_;
  const Problem& problem_;
  Executor& executor_;
  const RowDeltas deltas_;
  const std::function<void()> tick_;
  const ForwardLayout layout_;
  const std::vector<Item> items_;
  AlignedBuffer states_;
  std::vector<AlignedBuffer> thread_memory_;
};

}  // namespace annulus
