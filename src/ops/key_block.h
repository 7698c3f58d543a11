// The keys and values of one rank as they travel: packed once by their owner in the kernel's form,
// read by everybody.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "annulus/communicator.h"
#include "base/executor.h"
#include "core/rows.h"
#include "core/visibility.h"
#include "kernels/kernel_table.h"
#include "ops/problem.h"

namespace annulus {

struct KeyBlock {
  Rows rows;
  std::vector<std::int32_t> segments;       // [batch][key]; empty without segment ids
  std::vector<SegmentRange> tile_segments;  // [batch][tile]
  std::int64_t tile_keys = 1;
  std::int64_t head_bytes = 0;  // of one (batch row, KV head)
  Parcel packed;                // [batch][num_kv_heads][head_bytes]

  [[nodiscard]] std::int64_t num_keys() const { return rows.size(); }
  [[nodiscard]] TokenSide side() const { return {&rows, segments}; }
  // Segment ids of one batch row; empty without segment ids.
  [[nodiscard]] std::span<const std::int32_t> segments_of_row(std::int64_t batch) const;
  // Of keys [begin, begin + count), begin a multiple of tile_keys.
  [[nodiscard]] SegmentRange segment_range(std::int64_t batch, std::int64_t begin,
                                           std::int64_t count) const;
};

// Everything but the packed keys; segments as a dense [batch][key] in the order of rows.
KeyBlock describe_keys(std::int64_t tile_keys, std::int64_t head_bytes, const Problem& problem,
                       Rows rows, std::vector<std::int32_t> segments);

// Segment ids [batch][row] of some rows of a view, in their order; empty without segment ids.
std::vector<std::int32_t> segments_of(const Problem& problem, const TensorView& ids,
                                      const Rows& rows);

// How a kernel packs one head of keys.
struct KeyPacking {
  std::int64_t head_bytes;
  std::int64_t piece_keys;  // packed at once: the kernel's own panel, whatever the call's
  void (*pack)(void* packed, const RowSource& k, const RowSource& v, Dims dims,
               std::int64_t num_keys, std::int64_t key_begin, std::int64_t key_end);
};
// Packs the problem's k and v on the executor's threads: [batch][num_kv_heads][head_bytes].
Parcel pack_keys(const KeyPacking& packing, const Problem& problem, const Rows& rows,
                 Executor& executor);

}  // namespace annulus
