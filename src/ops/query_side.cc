#include "ops/query_side.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/aligned_buffer.h"
#include "base/half.h"

namespace annulus {

std::int64_t QuerySide::strips_per_head() const { return ceil_div(rows_per_head(), strip_rows); }

std::int64_t QuerySide::strip_end(std::int64_t strip) const {
  return std::min((strip + 1) * strip_rows, rows_per_head());
}

Lanes QuerySide::lanes(const Head& head, std::int64_t strip) const {
  Lanes lanes;
  const std::int64_t begin = strip * strip_rows, end = strip_end(strip), group = problem->group;
  lanes.count = static_cast<int>(end - begin);
  for (std::int64_t row = begin; row < end; ++row) {
    const auto n = static_cast<std::size_t>(row - begin),
               token = static_cast<std::size_t>(row / group);
    lanes.position[n] = rows.position[token], lanes.row[n] = rows.row[token];
    lanes.head[n] = static_cast<std::int32_t>(head.kv_head * group + row % group);
    lanes.segment[n] =
        segments.empty() ? 0 : segments[static_cast<std::size_t>(head.batch * rows.size()) + token];
  }
  return lanes;
}

TileBox QuerySide::box(const Head& head, std::int64_t row_begin, std::int64_t row_end) const {
  const std::int64_t group = problem->group;
  const std::int64_t first = row_begin / group, end = ceil_div(row_end, group);
  TileBox box;
  box.batch = head.batch;
  box.head_first = static_cast<int>(head.kv_head * group);
  box.head_last = static_cast<int>(box.head_first + group - 1);
  box.queries = {rows.position[static_cast<std::size_t>(first)],
                 rows.position[static_cast<std::size_t>(end - 1)]};
  if (!segments.empty()) {
    const auto ids = segments.begin() + head.batch * rows.size();
    const auto [lo, hi] = std::minmax_element(ids + first, ids + end);
    box.query_segments = {*lo, *hi};
  }
  return box;
}

TileClass classify(const Problem& problem, TileBox& box, const KeyBlock& keys,
                   const KeyRange& range) {
  box.keys = {keys.rows.position[static_cast<std::size_t>(range.begin)],
              keys.rows.position[static_cast<std::size_t>(range.begin + range.count - 1)]};
  box.key_segments = keys.segment_range(box.batch, range.begin, range.count);
  return problem.visibility.classify(box);
}

namespace {

class StripTiles {
 public:
  StripTiles(const QuerySide& queries, const Head& head, std::int64_t strip, const KeyBlock& keys,
             const KeyRange& range, std::uint8_t* tile_class, std::uint32_t* lane_bits)
      : queries_(queries),
        head_(head),
        strip_(strip),
        keys_(keys),
        range_(range),
        box_(queries.box(head, strip * queries.strip_rows, queries.strip_end(strip))),
        step_(keys.tile_keys),
        tile_class_(tile_class),
        lane_bits_(lane_bits),
        lane_count_(queries.strip_end(strip) - strip * queries.strip_rows) {
    lanes_.count = 0;
  }

  std::int64_t find(TileClass shade) {
    const std::int64_t tiles = ceil_div(range_.count, step_);
    return shade == TileClass::kFull ? fill(0, tiles) : find(0, tiles);
  }

 private:
  std::int64_t find(std::int64_t first, std::int64_t end) {
    const TileClass shade = classify(*queries_.problem, box_, keys_,
                                     {range_.begin + first * step_, keys_in(first, end)});
    if (shade == TileClass::kFull) return fill(first, end);
    if (shade == TileClass::kEmpty) {
      std::memset(tile_class_ + first, kTileEmpty, static_cast<std::size_t>(end - first));
      return 0;
    }
    if (end - first == 1) return look_at(first);
    const std::int64_t middle = first + (end - first) / 2;
    const std::int64_t left = find(first, middle);
    return left + find(middle, end);
  }

  [[nodiscard]] std::int64_t keys_in(std::int64_t first, std::int64_t end) const {
    return std::min(end * step_, range_.count) - first * step_;
  }

  std::int64_t fill(std::int64_t first, std::int64_t end) {
    std::memset(tile_class_ + first, kTileFull, static_cast<std::size_t>(end - first));
    const std::int64_t count = keys_in(first, end);
    if (count % step_ != 0) {  // the padding keys behind the last one are hidden
      tile_class_[end - 1] = kTilePartial;
      const auto all = static_cast<std::uint32_t>((std::uint64_t{1} << lane_count_) - 1);
      for (std::int64_t k = (end - 1) * step_; k < end * step_; ++k) {
        lane_bits_[k] = k < range_.count ? all : 0;
      }
    }
    return lane_count_ * count;
  }

  // A tile that is partial as far as its edges tell: every pair of it.
  std::int64_t look_at(std::int64_t tile) {
    if (lanes_.count == 0) lanes_ = queries_.lanes(head_, strip_);
    const std::int64_t begin = range_.begin + tile * step_, count = keys_in(tile, tile + 1);
    const std::span<const std::int32_t> ids = keys_.segments_of_row(head_.batch);
    const auto some =
        std::span(keys_.rows.position)
            .subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(count));
    std::uint32_t* bits = lane_bits_ + tile * step_;
    queries_.problem->visibility.lane_bits(
        head_.batch, lanes_, {some, ids.empty() ? nullptr : ids.data() + begin}, bits);
    std::fill(bits + count, bits + step_, 0U);  // padding keys
    std::int64_t seen = 0;
    for (std::int64_t k = 0; k < count; ++k) seen += std::popcount(bits[k]);
    tile_class_[tile] = seen == 0                     ? kTileEmpty
                        : seen == lane_count_ * step_ ? kTileFull
                                                      : kTilePartial;
    return seen;
  }

  const QuerySide& queries_;
  const Head& head_;
  const std::int64_t strip_;
  const KeyBlock& keys_;
  const KeyRange& range_;
  TileBox box_;
  const std::int64_t step_;
  std::uint8_t* tile_class_;
  std::uint32_t* lane_bits_;
  const std::int64_t lane_count_;
  Lanes lanes_;
};

// Calls body(first key, one past the last) for every run of tiles that are not empty.
template <class Body>
void for_runs(const TileTerms& terms, const Body& body) {
  const std::int64_t step = terms.keys.tile_keys, tiles = ceil_div(terms.range.count, step);
  for (std::int64_t t = 0; t < tiles; ++t) {
    const std::int64_t first = t;
    while (t < tiles && terms.tile_class[t] != kTileEmpty) ++t;
    if (t > first) body(first * step, std::min(t * step, terms.range.count));
  }
}

}  // namespace

std::int64_t classify_tiles(const QuerySide& queries, const Head& head, std::int64_t strip,
                            const KeyBlock& keys, const KeyRange& range, TileClass shade,
                            std::uint8_t* tile_class, std::uint32_t* lane_bits) {
  return StripTiles(queries, head, strip, keys, range, tile_class, lane_bits).find(shade);
}

void gather_bias(const TileTerms& terms, float* bias) {
  const TensorView& view = terms.problem.bias;
  const std::int64_t width = terms.strip_rows, stride = view.strides[3] * size_bytes(view.dtype);
  const std::int64_t* position = terms.keys.rows.position.data() + terms.range.begin;
  for (int n = 0; n < terms.lanes.count; ++n) {
    const std::byte* row = view.at(terms.head.batch, terms.lanes.head[n], terms.lanes.row[n], 0);
    for_runs(terms, [&](std::int64_t first, std::int64_t end) {
      for (std::int64_t k = first; k < end; ++k) {
        float& to = bias[k * width + n];
        const std::byte* from = row + position[k] * stride;
        if (view.dtype == DType::kFloat32) {
          std::memcpy(&to, from, 4);
        } else {
          to = static_cast<float>(load_element(view.dtype, from));
        }
      }
    });
  }
}

void gather_keep(const TileTerms& terms, DropoutBits rule, std::uint32_t* keep) {
  const Problem::Dropout& dropout = terms.problem.dropout;
  const DropoutRows rows{
      dropout.seed,      dropout.threshold, static_cast<std::uint32_t>(terms.head.batch),
      terms.lanes.count, terms.lanes.head,  terms.lanes.position};
  const std::int64_t* position = terms.keys.rows.position.data() + terms.range.begin;
  for_runs(terms, [&](std::int64_t first, std::int64_t end) {
    rule(rows, position + first, end - first, keep + first);
  });
}

void scatter_dbias(const TileTerms& terms, const std::uint32_t* lane_bits, const float* ds,
                   const MutableTensorView& sum) {
  const std::int64_t width = terms.strip_rows, step = terms.keys.tile_keys;
  const std::int64_t stride = sum.strides[3] * 4;
  const std::int64_t* position = terms.keys.rows.position.data() + terms.range.begin;
  for (int n = 0; n < terms.lanes.count; ++n) {
    std::byte* row = sum.at(terms.head.batch, terms.lanes.head[n], terms.lanes.row[n], 0);
    for_runs(terms, [&](std::int64_t first, std::int64_t end) {
      for (std::int64_t k = first; k < end; ++k) {
        if (terms.tile_class[k / step] == kTilePartial && (lane_bits[k] >> n & 1U) == 0) continue;
        float total = 0;
        std::byte* at = row + position[k] * stride;
        std::memcpy(&total, at, 4);
        total += ds[k * width + n];
        std::memcpy(at, &total, 4);
      }
    });
  }
}

}  // namespace annulus
