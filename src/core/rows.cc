#include "core/rows.h"

#include <algorithm>
#include <numeric>

namespace annulus {
namespace {

std::vector<std::int64_t> positions_of(std::span<const Range> ranges) {
  std::vector<std::int64_t> positions;
  for (const Range& range : ranges) {
    for (std::int64_t t = 0; t < range.count; ++t) {
      positions.push_back(range.begin + t * range.stride);
    }
  }
  return positions;
}

}  // namespace

Rows shard_rows(std::span<const Range> ranges) {
  const std::vector<std::int64_t> positions = positions_of(ranges);
  Rows rows;
  rows.row.resize(positions.size());
  std::iota(rows.row.begin(), rows.row.end(), std::int64_t{0});
  const auto position_of = [&](std::int64_t row) {
    return positions[static_cast<std::size_t>(row)];
  };
  // Every named partition deals its tokens in rising order.
  if (!std::is_sorted(positions.begin(), positions.end())) {
    std::sort(rows.row.begin(), rows.row.end(),
              [&](std::int64_t a, std::int64_t b) { return position_of(a) < position_of(b); });
  }
  rows.position.resize(positions.size());
  std::transform(rows.row.begin(), rows.row.end(), rows.position.begin(), position_of);
  return rows;
}

Rows global_rows(std::span<const Range> ranges) {
  Rows rows;
  rows.position = positions_of(ranges);
  std::sort(rows.position.begin(), rows.position.end());
  rows.row = rows.position;
  return rows;
}

}  // namespace annulus
