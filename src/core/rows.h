// The tokens of one rank: which position each has, and in which row of the caller's tensor it lies.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "annulus/partition.h"

namespace annulus {

// In rising order of position, so that a run of neighbours here covers a narrow interval of
// positions and the lanes of a tile are sorted.
struct Rows {
  std::vector<std::int64_t> position;
  std::vector<std::int64_t> row;

  [[nodiscard]] std::int64_t size() const { return static_cast<std::int64_t>(position.size()); }
};

// Rows of a shard: row t of the tensor is the t-th token in the order of the ranges.
Rows shard_rows(std::span<const Range> ranges);
// Rows of a whole tensor in which the row is the position.
Rows global_rows(std::span<const Range> ranges);

}  // namespace annulus
