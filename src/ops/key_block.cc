#include "ops/key_block.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "base/aligned_buffer.h"
#include "comm/parcel.h"

namespace annulus {

std::span<const std::int32_t> KeyBlock::segments_of_row(std::int64_t batch) const {
  if (segments.empty()) return {};
  const auto count = static_cast<std::size_t>(num_keys());
  return std::span(segments).subspan(static_cast<std::size_t>(batch) * count, count);
}

SegmentRange KeyBlock::segment_range(std::int64_t batch, std::int64_t begin,
                                     std::int64_t count) const {
  if (segments.empty()) return {};
  const std::int64_t tiles = ceil_div(num_keys(), tile_keys);
  const SegmentRange* tile = tile_segments.data() + batch * tiles + begin / tile_keys;
  SegmentRange range = *tile;
  for (std::int64_t t = 1; t < ceil_div(count, tile_keys); ++t) {
    range.lo = std::min(range.lo, tile[t].lo), range.hi = std::max(range.hi, tile[t].hi);
  }
  return range;
}

KeyBlock describe_keys(std::int64_t tile_keys, std::int64_t head_bytes, const Problem& problem,
                       Rows rows, std::vector<std::int32_t> segments) {
  KeyBlock block;
  block.rows = std::move(rows), block.segments = std::move(segments);
  block.tile_keys = tile_keys, block.head_bytes = head_bytes;
  if (block.segments.empty()) return block;
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    const std::span<const std::int32_t> ids = block.segments_of_row(b);
    for (std::int64_t k = 0; k < block.num_keys(); k += block.tile_keys) {
      const auto tile =
          ids.subspan(static_cast<std::size_t>(k),
                      static_cast<std::size_t>(std::min(block.tile_keys, block.num_keys() - k)));
      const auto [lo, hi] = std::minmax_element(tile.begin(), tile.end());
      block.tile_segments.push_back({*lo, *hi});
    }
  }
  return block;
}

std::vector<std::int32_t> segments_of(const Problem& problem, const TensorView& ids,
                                      const Rows& rows) {
  std::vector<std::int32_t> segments;
  if (!problem.visibility.rules().segments) return segments;
  segments.reserve(static_cast<std::size_t>(problem.batch * rows.size()));
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    for (const std::int64_t row : rows.row) {
      std::int32_t id = 0;
      std::memcpy(&id, ids.at(b, row, 0, 0), sizeof id);
      segments.push_back(id);
    }
  }
  return segments;
}

Parcel pack_keys(const KeyPacking& packing, const Problem& problem, const Rows& rows,
                 Executor& executor) {
  const std::int64_t keys = rows.size(), heads = problem.kv_heads(), bytes = packing.head_bytes;
  const auto buffer = std::make_shared<AlignedBuffer>(heads * bytes);
  const std::int64_t piece = packing.piece_keys, pieces = ceil_div(keys, piece);
  const auto source = [&](const TensorView& t, std::int64_t b, std::int64_t h) {
    const std::int64_t size = size_bytes(t.dtype);
    return RowSource{t.at(b, 0, h, 0), rows.row.data(), t.strides[1] * size, t.strides[3] * size,
                     static_cast<Element>(t.dtype)};
  };
  std::atomic<std::int64_t> next{0};
  executor.run([&](int) {
    for (std::int64_t i = next++; i < heads * pieces; i = next++) {
      const std::int64_t head = i / pieces, begin = i % pieces * piece;
      const auto [b, h] = problem.head_at(head);
      packing.pack(buffer->data() + head * bytes, source(problem.k, b, h), source(problem.v, b, h),
                   problem.dims, keys, begin, std::min(keys, begin + piece));
    }
  });
  return parcel_of(buffer);
}

}  // namespace annulus
