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

// Keys that follow each other in the terms and, a constant stride apart, in the tensors.
struct TermRun {
  std::int64_t first;
  std::int64_t count;
  std::int64_t position;
  std::int64_t stride;
};

// Calls body(TermRun) for every run of keys in tiles that are not empty. Partitions are made of
// ranges, so runs are long.
template <class Body>
void for_runs(const TileTerms& terms, const Body& body) {
  const std::int64_t step = terms.keys.tile_keys;
  const std::int64_t* position = terms.keys.rows.position.data() + terms.range.begin;
  const auto hidden = [&](std::int64_t k) { return terms.tile_class[k / step] == kTileEmpty; };
  for (std::int64_t k = 0; k < terms.range.count;) {
    if (hidden(k)) {
      k += step;
      continue;
    }
    const std::int64_t first = k++;
    std::int64_t stride = 1;
    if (k < terms.range.count && !hidden(k)) stride = position[k] - position[first];
    while (k < terms.range.count && !hidden(k) && position[k] - position[k - 1] == stride) ++k;
    body(TermRun{first, k - first, position[first], stride});
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
  const std::int64_t element = view.strides[3] * size_bytes(view.dtype);
  const std::int64_t width = terms.kernel.strip_rows;
  for_runs(terms, [&](const TermRun& run) {
    const void* rows[32];
    for (int n = 0; n < terms.lanes.count; ++n)
      rows[n] = view.at(terms.head.batch, terms.lanes.head[n], terms.lanes.row[n], run.position);
    terms.kernel.gather(rows, terms.lanes.count, element * run.stride,
                        static_cast<Element>(view.dtype), run.count, bias + run.first * width);
  });
}

void gather_keep(const TileTerms& terms, std::uint32_t* keep) {
  const Problem::Dropout& dropout = terms.problem.dropout;
  const DropoutRows rows{
      dropout.seed,      dropout.threshold, static_cast<std::uint32_t>(terms.head.batch),
      terms.lanes.count, terms.lanes.head,  terms.lanes.position};
  const std::int64_t* position = terms.keys.rows.position.data() + terms.range.begin;
  for_runs(terms, [&](const TermRun& run) {
    terms.kernel.keep_bits(rows, position + run.first, run.count, keep + run.first);
  });
}

void scatter_dbias(const TileTerms& terms, const float* ds, const MutableTensorView& sum) {
  const std::int64_t width = terms.kernel.strip_rows;
  for_runs(terms, [&](const TermRun& run) {
    float* rows[32];
    for (int n = 0; n < terms.lanes.count; ++n) {
      rows[n] = reinterpret_cast<float*>(
          sum.at(terms.head.batch, terms.lanes.head[n], terms.lanes.row[n], run.position));
    }
    terms.kernel.scatter_add(rows, terms.lanes.count, sum.strides[3] * run.stride, run.count,
                             ds + run.first * width);
  });
}

}  // namespace annulus
