#include "annulus/mask.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <limits>

#include "base/fail.h"

namespace annulus {
inline namespace v1 {
namespace {

constexpr std::int64_t kMin = std::numeric_limits<std::int64_t>::min();
constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();
constexpr std::size_t kMaxLanes = 32;
constexpr std::size_t kKeysAtOnce = 128;  // the operands of & and | meet in 512 bytes of stack

using Positions = std::span<const std::int64_t>;

std::int64_t saturating_add(std::int64_t a, std::int64_t b) {
  if (b > 0 && a > kMax - b) return kMax;
  if (b < 0 && a < kMin - b) return kMin;
  return a + b;
}

// Bits 0 .. count-1, count <= 32.
std::uint32_t low_bits(std::size_t count) {
  return static_cast<std::uint32_t>((std::uint64_t{1} << count) - 1);
}

// Number of leading lanes for which `before` holds. `hint` is the answer for the key before:
// neighbours among the keys differ by a lane or two, so walking from there beats a search.
template <class Before>
std::size_t walk(Positions queries, std::size_t hint, Before before) {
  while (hint < queries.size() && before(queries[hint])) ++hint;
  while (hint > 0 && !before(queries[hint - 1])) --hint;
  return hint;
}

TileClass both(TileClass a, TileClass b) {
  if (a == TileClass::kEmpty || b == TileClass::kEmpty) return TileClass::kEmpty;
  return a == TileClass::kFull && b == TileClass::kFull ? TileClass::kFull : TileClass::kPartial;
}

TileClass either(TileClass a, TileClass b) {
  if (a == TileClass::kFull || b == TileClass::kFull) return TileClass::kFull;
  return a == TileClass::kEmpty && b == TileClass::kEmpty ? TileClass::kEmpty : TileClass::kPartial;
}

// lo <= j - i <= hi. Differences of positions >= 0 never overflow, whatever the window.
struct Band {
  std::int64_t lo = kMin;
  std::int64_t hi = kMax;

  [[nodiscard]] bool visible(std::int64_t i, std::int64_t j) const {
    return lo <= j - i && j - i <= hi;
  }

  [[nodiscard]] TileClass classify(Interval queries, Interval keys) const {
    const std::int64_t nearest = keys.first - queries.last;
    const std::int64_t farthest = keys.last - queries.first;
    if (lo > hi || farthest < lo || nearest > hi) return TileClass::kEmpty;
    return nearest >= lo && farthest <= hi ? TileClass::kFull : TileClass::kPartial;
  }

  void lane_bits(Positions queries, Positions keys, std::uint32_t* bits) const {
    std::size_t begin = 0;
    std::size_t end = 0;
    for (std::size_t k = 0; k < keys.size(); ++k) {
      const std::int64_t j = keys[k];
      begin = walk(queries, begin, [&](std::int64_t i) { return j - i > hi; });
      end = walk(queries, end, [&](std::int64_t i) { return j - i >= lo; });
      bits[k] = low_bits(end) & ~low_bits(begin);
    }
  }
};

// i div size == j div size and j <= i.
struct Chunks {
  std::int64_t size = 1;

  [[nodiscard]] bool visible(std::int64_t i, std::int64_t j) const {
    return j <= i && i / size == j / size;
  }

  [[nodiscard]] TileClass classify(Interval queries, Interval keys) const {
    // A position common to both sees itself; without one, the nearest pair decides.
    if (queries.last < keys.first) return TileClass::kEmpty;
    const bool apart = queries.first > keys.last;
    if (apart && queries.first / size != keys.last / size) return TileClass::kEmpty;
    const bool behind = keys.last <= queries.first;
    const bool one_chunk = behind && queries.last / size == keys.first / size;
    return one_chunk ? TileClass::kFull : TileClass::kPartial;
  }

  void lane_bits(Positions queries, Positions keys, std::uint32_t* bits) const {
    std::size_t begin = 0;
    std::size_t end = 0;
    for (std::size_t k = 0; k < keys.size(); ++k) {
      const std::int64_t j = keys[k];
      const std::int64_t left = size - 1 - j % size;  // positions of the chunk after j
      begin = walk(queries, begin, [&](std::int64_t i) { return i < j; });
      end = walk(queries, end, [&](std::int64_t i) { return i - j <= left; });
      bits[k] = low_bits(end) & ~low_bits(begin);
    }
  }
};

// j < length.
struct Prefix {
  std::int64_t length = 0;

  [[nodiscard]] TileClass classify(Interval keys) const {
    if (keys.first >= length) return TileClass::kEmpty;
    return keys.last < length ? TileClass::kFull : TileClass::kPartial;
  }

  void lane_bits(Positions queries, Positions keys, std::uint32_t* bits) const {
    const std::uint32_t all = low_bits(queries.size());
    for (std::size_t k = 0; k < keys.size(); ++k) bits[k] = keys[k] < length ? all : 0;
  }
};

// Blocks of positions, each visible or not; a dense bitmap has blocks of one. Positions outside see
// nothing.
class Grid {
 public:
  Grid() = default;
  Grid(std::int64_t block, std::int64_t rows, std::int64_t columns, std::int64_t cell,
       std::vector<std::uint8_t> entries)
      : block_(block), rows_(rows), columns_(columns), cell_(cell), entries_(std::move(entries)) {
    if (entries_.empty()) rows_ = columns_ = 0;  // one of them may be any number
    sum_cells();
  }

  [[nodiscard]] bool visible(std::int64_t i, std::int64_t j) const {
    return entry(i / block_, j / block_);
  }

  [[nodiscard]] TileClass classify(Interval queries, Interval keys) const;
  void lane_bits(Positions queries, Positions keys, std::uint32_t* bits) const;

 private:
  // Inclusive ranges of cells, and the entries in them.
  struct Cells {
    std::int64_t row_first, row_last, column_first, column_last;
  };

  [[nodiscard]] bool entry(std::int64_t row, std::int64_t column) const {
    const bool inside = row >= 0 && row < rows_ && column >= 0 && column < columns_;
    return inside && entries_[static_cast<std::size_t>(row * columns_ + column)] != 0;
  }
  [[nodiscard]] std::int64_t sum_width() const { return (columns_ + cell_ - 1) / cell_ + 1; }
  [[nodiscard]] std::int64_t sum_at(std::int64_t row, std::int64_t column) const {
    return sums_[static_cast<std::size_t>(row * sum_width() + column)];
  }
  void sum_cells();
  [[nodiscard]] std::int64_t visible_entries(const Cells& cells) const;
  [[nodiscard]] std::int64_t all_entries(const Cells& cells) const;

  std::int64_t block_ = 1;
  std::int64_t rows_ = 0;
  std::int64_t columns_ = 0;
  std::int64_t cell_ = 1;  // entries on a side of the squares that sums_ tells apart
  std::vector<std::uint8_t> entries_;
  std::vector<std::int64_t> sums_;  // visible entries above and left of each corner of the cells
};

void Grid::sum_cells() {
  const std::int64_t width = sum_width();
  const std::int64_t height = (rows_ + cell_ - 1) / cell_ + 1;
  sums_.assign(static_cast<std::size_t>(width * height), 0);
  const auto at = [&](std::int64_t row, std::int64_t column) -> std::int64_t& {
    return sums_[static_cast<std::size_t>(row * width + column)];
  };
  for (std::int64_t row = 0; row < rows_; ++row) {
    for (std::int64_t column = 0; column < columns_; ++column) {
      at(row / cell_ + 1, column / cell_ + 1) += entry(row, column) ? 1 : 0;
    }
  }
  for (std::int64_t row = 1; row < height; ++row) {
    for (std::int64_t column = 1; column < width; ++column) {
      at(row, column) += at(row - 1, column) + at(row, column - 1) - at(row - 1, column - 1);
    }
  }
}

std::int64_t Grid::visible_entries(const Cells& cells) const {
  return sum_at(cells.row_last + 1, cells.column_last + 1) -
         sum_at(cells.row_first, cells.column_last + 1) -
         sum_at(cells.row_last + 1, cells.column_first) +
         sum_at(cells.row_first, cells.column_first);
}

std::int64_t Grid::all_entries(const Cells& cells) const {
  const std::int64_t row_end = std::min(rows_, (cells.row_last + 1) * cell_);
  const std::int64_t column_end = std::min(columns_, (cells.column_last + 1) * cell_);
  return (row_end - cells.row_first * cell_) * (column_end - cells.column_first * cell_);
}

TileClass Grid::classify(Interval queries, Interval keys) const {
  const std::int64_t row_first = queries.first / block_;
  const std::int64_t row_last = std::min(queries.last / block_, rows_ - 1);
  const std::int64_t column_first = keys.first / block_;
  const std::int64_t column_last = std::min(keys.last / block_, columns_ - 1);
  if (row_first > row_last || column_first > column_last) return TileClass::kEmpty;
  const Cells cells{row_first / cell_, row_last / cell_, column_first / cell_, column_last / cell_};
  const std::int64_t found = visible_entries(cells);
  if (found == 0) return TileClass::kEmpty;
  const bool inside = queries.last / block_ < rows_ && keys.last / block_ < columns_;
  return inside && found == all_entries(cells) ? TileClass::kFull : TileClass::kPartial;
}

void Grid::lane_bits(Positions queries, Positions keys, std::uint32_t* bits) const {
  struct Run {
    std::int64_t row;
    std::uint32_t lanes;
  };
  std::array<Run, kMaxLanes> runs;  // lanes in the same row of blocks
  std::size_t run_count = 0;
  for (std::size_t n = 0; n < queries.size(); ++n) {
    const std::int64_t row = queries[n] / block_;
    if (run_count == 0 || runs[run_count - 1].row != row) runs[run_count++] = {row, 0};
    runs[run_count - 1].lanes |= std::uint32_t{1} << n;
  }
  std::int64_t column = -1;
  for (std::size_t k = 0; k < keys.size(); ++k) {
    if (k > 0 && keys[k] / block_ == column) {
      bits[k] = bits[k - 1];
      continue;
    }
    column = keys[k] / block_;
    bits[k] = 0;
    for (std::size_t r = 0; r < run_count; ++r) {
      if (entry(runs[r].row, column)) bits[k] |= runs[r].lanes;
    }
  }
}

void check_entries(const char* operation, std::int64_t rows, std::int64_t columns,
                   std::size_t entries) {
  if (rows < 0 || columns < 0) {
    fail(operation, "negative size ", rows, " x ", columns);
  }
  const auto found = static_cast<std::int64_t>(entries);
  const bool fits =
      rows == 0 || columns == 0 ? found == 0 : found % rows == 0 && found / rows == columns;
  if (!fits) fail(operation, "the bitmap has ", found, " entries, expected ", rows, " x ", columns);
}

}  // namespace

// One rule, or two joined. A kind instead of virtual functions: classify() and lane_bits() run for
// every tile.
class Mask::Node {
 public:
  enum class Kind : std::uint8_t { kBand, kChunks, kPrefix, kGrid, kAnd, kOr };

  [[nodiscard]] bool visible(std::int64_t i, std::int64_t j) const;
  [[nodiscard]] TileClass classify(Interval queries, Interval keys) const;
  void lane_bits(Positions queries, Positions keys, std::uint32_t* bits) const;
  [[nodiscard]] std::string describe() const;

  Kind kind = Kind::kBand;
  Band band;
  Chunks chunks;
  Prefix prefix;
  Grid grid;
  std::string text;                  // of a rule
  std::shared_ptr<const Node> a, b;  // of two joined, and of a band that is the meet of two bands

 private:
  void joined_bits(Positions queries, Positions keys, std::uint32_t* bits) const;
};

bool Mask::Node::visible(std::int64_t i, std::int64_t j) const {
  switch (kind) {
    case Kind::kBand:
      return band.visible(i, j);
    case Kind::kChunks:
      return chunks.visible(i, j);
    case Kind::kPrefix:
      return j < prefix.length;
    case Kind::kGrid:
      return grid.visible(i, j);
    case Kind::kAnd:
      return a->visible(i, j) && b->visible(i, j);
    case Kind::kOr:
      return a->visible(i, j) || b->visible(i, j);
  }
  return false;
}

TileClass Mask::Node::classify(Interval queries, Interval keys) const {
  switch (kind) {
    case Kind::kBand:
      return band.classify(queries, keys);
    case Kind::kChunks:
      return chunks.classify(queries, keys);
    case Kind::kPrefix:
      return prefix.classify(keys);
    case Kind::kGrid:
      return grid.classify(queries, keys);
    case Kind::kAnd: {
      const TileClass first = a->classify(queries, keys);
      if (first == TileClass::kEmpty) return first;
      return both(first, b->classify(queries, keys));
    }
    case Kind::kOr: {
      const TileClass first = a->classify(queries, keys);
      if (first == TileClass::kFull) return first;
      return either(first, b->classify(queries, keys));
    }
  }
  return TileClass::kPartial;
}

void Mask::Node::lane_bits(Positions queries, Positions keys, std::uint32_t* bits) const {
  switch (kind) {
    case Kind::kBand:
      band.lane_bits(queries, keys, bits);
      break;
    case Kind::kChunks:
      chunks.lane_bits(queries, keys, bits);
      break;
    case Kind::kPrefix:
      prefix.lane_bits(queries, keys, bits);
      break;
    case Kind::kGrid:
      grid.lane_bits(queries, keys, bits);
      break;
    case Kind::kAnd:
    case Kind::kOr:
      joined_bits(queries, keys, bits);
      break;
  }
}

void Mask::Node::joined_bits(Positions queries, Positions keys, std::uint32_t* bits) const {
  std::array<std::uint32_t, kKeysAtOnce> other;
  for (std::size_t begin = 0; begin < keys.size(); begin += kKeysAtOnce) {
    const Positions some = keys.subspan(begin, std::min(kKeysAtOnce, keys.size() - begin));
    a->lane_bits(queries, some, bits + begin);
    b->lane_bits(queries, some, other.data());
    for (std::size_t k = 0; k < some.size(); ++k) {
      const std::uint32_t mine = bits[begin + k];
      bits[begin + k] = kind == Kind::kAnd ? mine & other[k] : mine | other[k];
    }
  }
}

std::string Mask::Node::describe() const {
  if (a == nullptr) return text;
  const auto operand = [&](const Node& node) {
    const bool parentheses = kind != Kind::kOr && node.kind == Kind::kOr;
    return parentheses ? "(" + node.describe() + ")" : node.describe();
  };
  return operand(*a) + (kind == Kind::kOr ? " | " : " & ") + operand(*b);
}

namespace {

std::string shift_text(std::int64_t shift, const char* separator) {
  return shift == 0 ? "" : concat(separator, "shift ", shift);
}

}  // namespace

Mask Mask::causal(std::int64_t shift) {
  auto node = std::make_shared<Node>();
  node->band.hi = shift;
  node->text = shift == 0 ? "causal" : concat("causal(", shift_text(shift, ""), ")");
  return Mask(std::move(node));
}

Mask Mask::sliding_window(std::int64_t left, std::int64_t right, std::int64_t shift) {
  if (left < -1 || right < -1) {
    fail("Mask::sliding_window", "window (", left, ", ", right,
         ") has a side below -1; sides are >= 0, or -1 for unlimited");
  }
  if (left == -1 && right == -1) return full();
  auto node = std::make_shared<Node>();
  if (left >= 0) node->band.lo = saturating_add(shift, -left);
  if (right >= 0) node->band.hi = saturating_add(shift, right);
  node->text = concat("window(", left, ", ", right, shift_text(shift, ", "), ")");
  return Mask(std::move(node));
}

Mask Mask::chunked(std::int64_t chunk_size) {
  if (chunk_size <= 0) fail("Mask::chunked", "chunk_size (", chunk_size, ") must be positive");
  auto node = std::make_shared<Node>();
  node->kind = Node::Kind::kChunks;
  node->chunks.size = chunk_size;
  node->text = concat("chunked(", chunk_size, ")");
  return Mask(std::move(node));
}

Mask Mask::prefix(std::int64_t length) {
  if (length < 0) fail("Mask::prefix", "length (", length, ") is negative");
  auto node = std::make_shared<Node>();
  node->kind = Node::Kind::kPrefix;
  node->prefix.length = length;
  node->text = concat("prefix(", length, ")");
  return Mask(std::move(node));
}

Mask Mask::dense(std::int64_t q_len, std::int64_t kv_len, std::vector<std::uint8_t> visible) {
  check_entries("Mask::dense", q_len, kv_len, visible.size());
  auto node = std::make_shared<Node>();
  node->kind = Node::Kind::kGrid;
  node->text = concat("dense(", q_len, " x ", kv_len, ")");
  // Sums of squares of 16 cost a thirty-second of the bitmap's bytes and tell aligned strips and
  // tiles exactly.
  node->grid = Grid(1, q_len, kv_len, 16, std::move(visible));
  return Mask(std::move(node));
}

Mask Mask::block_sparse(std::int64_t block, std::int64_t q_blocks, std::int64_t kv_blocks,
                        std::vector<std::uint8_t> visible) {
  if (block <= 0) fail("Mask::block_sparse", "block (", block, ") must be positive");
  check_entries("Mask::block_sparse", q_blocks, kv_blocks, visible.size());
  auto node = std::make_shared<Node>();
  node->kind = Node::Kind::kGrid;
  node->text = concat("block_sparse(", block, ", ", q_blocks, " x ", kv_blocks, ")");
  node->grid = Grid(block, q_blocks, kv_blocks, 1, std::move(visible));
  return Mask(std::move(node));
}

Mask operator&(const Mask& a, const Mask& b) {
  if (a.is_full()) return b;
  if (b.is_full()) return a;
  using Kind = Mask::Node::Kind;
  auto node = std::make_shared<Mask::Node>();
  node->kind = Kind::kAnd;
  // Causal with a window, the most common mask of all, is again a band: exact classes at the price
  // of one rule.
  if (a.node_->kind == Kind::kBand && b.node_->kind == Kind::kBand) {
    node->kind = Kind::kBand;
    node->band = {std::max(a.node_->band.lo, b.node_->band.lo),
                  std::min(a.node_->band.hi, b.node_->band.hi)};
  }
  node->a = a.node_;
  node->b = b.node_;
  return Mask(std::move(node));
}

Mask operator|(const Mask& a, const Mask& b) {
  if (a.is_full() || b.is_full()) return Mask::full();
  auto node = std::make_shared<Mask::Node>();
  node->kind = Mask::Node::Kind::kOr;
  node->a = a.node_;
  node->b = b.node_;
  return Mask(std::move(node));
}

bool Mask::visible(std::int64_t query, std::int64_t key) const {
  return node_ == nullptr || node_->visible(query, key);
}

TileClass Mask::classify(Interval queries, Interval keys) const {
  if (queries.last < queries.first || keys.last < keys.first) return TileClass::kEmpty;
  return node_ == nullptr ? TileClass::kFull : node_->classify(queries, keys);
}

void Mask::lane_bits(std::span<const std::int64_t> queries, std::span<const std::int64_t> keys,
                     std::uint32_t* bits) const {
  assert(queries.size() <= kMaxLanes);
  if (node_ != nullptr) return node_->lane_bits(queries, keys, bits);
  std::fill_n(bits, keys.size(), low_bits(queries.size()));
}

std::string Mask::describe() const { return node_ == nullptr ? "full" : node_->describe(); }

}  // namespace v1
}  // namespace annulus
