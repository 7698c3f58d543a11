// The queries of one rank as kernels see them: strips of rows. A row is (token, query head of the
// KV head's group), the head varying faster.
#pragma once

#include <cstdint>
#include <vector>

#include "core/rows.h"
#include "core/visibility.h"
#include "kernels/kernel_table.h"
#include "ops/key_block.h"
#include "ops/problem.h"

namespace annulus {

struct QuerySide {
  const Problem* problem = nullptr;
  Rows rows;
  std::vector<std::int32_t> segments;  // [batch][token]; empty without segment ids
  std::int64_t strip_rows = 1;

  [[nodiscard]] std::int64_t rows_per_head() const { return rows.size() * problem->group; }
  [[nodiscard]] std::int64_t strips_per_head() const;
  // One past the last row of a strip.
  [[nodiscard]] std::int64_t strip_end(std::int64_t strip) const;
  [[nodiscard]] TokenSide side() const { return {&rows, segments}; }
  [[nodiscard]] Lanes lanes(const Head& head, std::int64_t strip) const;
  // Everything but the keys.
  [[nodiscard]] TileBox box(const Head& head, std::int64_t row_begin, std::int64_t row_end) const;
};

// Some keys of a block that follow each other; begin is a multiple of tile_keys.
struct KeyRange {
  std::int64_t begin = 0;
  std::int64_t count = 0;
};

// Sets the box's keys and their segments, and asks the mask.
TileClass classify(const Problem& problem, TileBox& box, const KeyBlock& keys,
                   const KeyRange& range);

// Finds the classes of one strip's tiles by halving the range until a piece is empty, full or one
// tile: most ranges are one piece, and the edge of a mask crosses few tiles of the others.
// `lane_bits` is written for partial tiles. `shade` is what is known of the whole range. Returns
// the visible pairs.
std::int64_t classify_tiles(const QuerySide& queries, const Head& head, std::int64_t strip,
                            const KeyBlock& keys, const KeyRange& range, TileClass shade,
                            std::uint8_t* tile_class, std::uint32_t* lane_bits);

// What options hold for a strip and a range of keys, run by run of tiles that are not empty.
struct TileTerms {
  const TermKernel& kernel;
  const Problem& problem;
  const Head& head;
  const Lanes& lanes;
  const KeyBlock& keys;
  const KeyRange& range;
  const std::uint8_t* tile_class;
};
// bias[key][lane].
void gather_bias(const TileTerms& terms, float* bias);
// Bit n of keep[key]: dropout keeps the pair of lane n.
void gather_keep(const TileTerms& terms, std::uint32_t* keep);
// sum[b][h][query][key] += ds[key][lane]. `sum` is float32 with stride 0 where it is broadcast.
void scatter_dbias(const TileTerms& terms, const float* ds, const MutableTensorView& sum);

}  // namespace annulus
