// Who owns which tokens. A partition maps (rank, world_size, seq_len) to positions; nothing else in
// Annulus knows one partition from another.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace annulus {
inline namespace v1 {

// Positions begin, begin + stride, ... (count of them).
struct Range {
  std::int64_t begin = 0;
  std::int64_t count = 0;
  std::int64_t stride = 1;
};

class Partition {
 public:
  Partition() = default;  // contiguous

  // Runs of neighbouring tokens; the first seq_len mod P ranks hold one more.
  static Partition contiguous() { return {}; }
  // Token i on rank i mod P at local index i div P.
  static Partition striped();
  // 2P runs cut like contiguous; rank r holds runs r and 2P-1-r, in this order.
  static Partition zigzag();
  // Explicit ranges per rank. Together they must hold every position of the sequence exactly once.
  static Partition custom(std::vector<std::vector<Range>> ranges_per_rank);
  static Partition from_positions(const std::vector<std::vector<std::int64_t>>& positions_per_rank);
  // "contiguous", "striped", "zigzag". Throws InvalidArgument for another name.
  static Partition from_name(std::string_view name);

  [[nodiscard]] std::string_view name() const;
  [[nodiscard]] std::vector<Range> ranges(int rank, int world_size, std::int64_t seq_len) const;
  [[nodiscard]] std::int64_t local_len(int rank, int world_size, std::int64_t seq_len) const;
  // Throws InvalidArgument unless every position in [0, seq_len) has exactly one owner.
  void check(int world_size, std::int64_t seq_len) const;

 private:
  enum class Kind : std::uint8_t { kContiguous, kStriped, kZigzag, kCustom };
  Kind kind_ = Kind::kContiguous;
  std::vector<std::vector<Range>> custom_;
};

}  // namespace v1
}  // namespace annulus
