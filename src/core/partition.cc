#include "annulus/partition.h"

#include <algorithm>

#include "base/fail.h"

namespace annulus {
inline namespace v1 {
namespace {

// Run `index` of `parts` runs of neighbours; the first seq_len mod parts runs hold one more.
Range cut(std::int64_t index, std::int64_t parts, std::int64_t seq_len) {
  const std::int64_t base = seq_len / parts;
  const std::int64_t extra = seq_len % parts;
  return {index * base + std::min(index, extra), base + (index < extra ? 1 : 0), 1};
}

Range stripe(std::int64_t rank, std::int64_t world_size, std::int64_t seq_len) {
  const std::int64_t count = seq_len / world_size + (rank < seq_len % world_size ? 1 : 0);
  return {rank, count, world_size};
}

// Joins positions into ranges greedily: a range grows while the step stays what it was.
std::vector<Range> compress(const std::vector<std::int64_t>& positions, std::size_t rank) {
  std::vector<Range> ranges;
  for (const std::int64_t position : positions) {
    if (position == -1) continue;  // the rank has fewer tokens than the array has columns
    if (position < 0) {
      fail("Partition::from_positions", "rank ", rank, " has position ", position,
           ", positions are >= 0 or -1 for none");
    }
    Range* last = ranges.empty() ? nullptr : &ranges.back();
    if (last != nullptr && last->count == 1) last->stride = position - last->begin;
    if (last != nullptr && position - last->begin == last->count * last->stride) {
      ++last->count;
    } else {
      ranges.push_back({position, 1, 1});
    }
  }
  return ranges;
}

// Which positions of a custom partition are taken, checked one by one.
class Cover {
 public:
  Cover(const std::vector<std::vector<Range>>& ranges, std::int64_t seq_len)
      : ranges_(ranges), seq_len_(seq_len), taken_(static_cast<std::size_t>(seq_len)) {}

  void check() {
    for (std::size_t rank = 0; rank < ranges_.size(); ++rank) {
      for (const Range& range : ranges_[rank]) take(rank, range);
    }
    const auto gap = std::find(taken_.begin(), taken_.end(), false);
    if (gap != taken_.end()) {
      fail("Partition::check", "position ", gap - taken_.begin(), " of ", seq_len_,
           " has no owner; every position needs exactly one rank");
    }
  }

 private:
  void take(std::size_t rank, const Range& range) {
    if (range.count < 0) {
      fail("Partition::check", "rank ", rank, " has a range of ", range.count, " positions");
    }
    // Longer strides leave the sequence with the second position; refusing them keeps sums in
    // range.
    if (range.count > 1 && (range.stride > seq_len_ || range.stride < -seq_len_)) {
      fail("Partition::check", "rank ", rank, " has a range of stride ", range.stride,
           " in a sequence of ", seq_len_, " positions");
    }
    std::int64_t position = range.begin;
    for (std::int64_t t = 0; t < range.count; ++t, position += range.stride) {
      take_one(rank, position);
    }
  }

  void take_one(std::size_t rank, std::int64_t position) {
    if (position < 0 || position >= seq_len_) {
      fail("Partition::check", "rank ", rank, " owns position ", position, ", outside [0, ",
           seq_len_, ")");
    }
    const auto index = static_cast<std::size_t>(position);
    if (taken_[index]) {
      fail("Partition::check", "position ", position, " is owned by rank ", first_owner(position),
           " and again by rank ", rank, "; every position needs exactly one rank");
    }
    taken_[index] = true;
  }

  // Only for the error text, hence slow and small.
  [[nodiscard]] std::size_t first_owner(std::int64_t position) const {
    for (std::size_t rank = 0; rank < ranges_.size(); ++rank) {
      for (const Range& range : ranges_[rank]) {
        for (std::int64_t t = 0; t < range.count; ++t) {
          if (range.begin + t * range.stride == position) return rank;
        }
      }
    }
    return ranges_.size();
  }

  const std::vector<std::vector<Range>>& ranges_;
  std::int64_t seq_len_;
  std::vector<bool> taken_;
};

void check_sizes(int world_size, std::int64_t seq_len) {
  if (world_size < 1) fail("Partition", "world_size (", world_size, ") is less than 1");
  if (seq_len < 0) fail("Partition", "seq_len (", seq_len, ") is negative");
}

void check_custom_ranks(std::size_t ranks, int world_size) {
  if (ranks != static_cast<std::size_t>(world_size)) {
    fail("Partition", "the custom partition is for ", ranks, " ranks, world_size is ", world_size);
  }
}

}  // namespace

Partition Partition::striped() {
  Partition partition;
  partition.kind_ = Kind::kStriped;
  return partition;
}

Partition Partition::zigzag() {
  Partition partition;
  partition.kind_ = Kind::kZigzag;
  return partition;
}

Partition Partition::custom(std::vector<std::vector<Range>> ranges_per_rank) {
  Partition partition;
  partition.kind_ = Kind::kCustom;
  partition.custom_ = std::move(ranges_per_rank);
  return partition;
}

Partition Partition::from_positions(
    const std::vector<std::vector<std::int64_t>>& positions_per_rank) {
  std::vector<std::vector<Range>> ranges;
  ranges.reserve(positions_per_rank.size());
  for (const auto& positions : positions_per_rank) {
    ranges.push_back(compress(positions, ranges.size()));
  }
  return custom(std::move(ranges));
}

Partition Partition::from_name(std::string_view name) {
  for (const Partition& partition : {contiguous(), striped(), zigzag()}) {
    if (partition.name() == name) return partition;
  }
  fail("Partition", "unknown name \"", name, "\", expected contiguous, striped or zigzag");
}

std::string_view Partition::name() const {
  switch (kind_) {
    case Kind::kContiguous:
      return "contiguous";
    case Kind::kStriped:
      return "striped";
    case Kind::kZigzag:
      return "zigzag";
    case Kind::kCustom:
      return "custom";
  }
  return "unknown";
}

std::vector<Range> Partition::ranges(int rank, int world_size, std::int64_t seq_len) const {
  check_sizes(world_size, seq_len);
  if (rank < 0 || rank >= world_size) {
    fail("Partition", "rank (", rank, ") is outside [0, ", world_size, ")");
  }
  const std::int64_t parts = world_size;
  std::vector<Range> found;
  switch (kind_) {
    case Kind::kContiguous:
      found = {cut(rank, parts, seq_len)};
      break;
    case Kind::kStriped:
      found = {stripe(rank, parts, seq_len)};
      break;
    case Kind::kZigzag:
      found = {cut(rank, 2 * parts, seq_len), cut(2 * parts - 1 - rank, 2 * parts, seq_len)};
      break;
    case Kind::kCustom:
      check_custom_ranks(custom_.size(), world_size);
      found = custom_[static_cast<std::size_t>(rank)];
      break;
  }
  std::erase_if(found, [](const Range& range) { return range.count == 0; });
  return found;
}

std::int64_t Partition::local_len(int rank, int world_size, std::int64_t seq_len) const {
  std::int64_t count = 0;
  for (const Range& range : ranges(rank, world_size, seq_len)) count += range.count;
  return count;
}

void Partition::check(int world_size, std::int64_t seq_len) const {
  check_sizes(world_size, seq_len);
  if (kind_ != Kind::kCustom) return;  // exact by construction
  check_custom_ranks(custom_.size(), world_size);
  Cover(custom_, seq_len).check();
}

}  // namespace v1
}  // namespace annulus
