// Which key does which query see? A Mask answers for global positions, so the same mask serves
// every partition and every number of workers. Masks are values: cheap to copy, immutable, safe to
// share between threads.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace annulus {
inline namespace v1 {

// Positions first..last, both inclusive. Empty when last < first.
struct Interval {
  std::int64_t first = 0;
  std::int64_t last = -1;
};

// What a mask does to a rectangle of (query, key) pairs. kPartial is the cautious answer: it may
// turn out to be nothing or everything once the pairs are looked at one by one; kEmpty and kFull
// are always exact.
enum class TileClass : std::uint8_t { kEmpty = 0, kFull = 1, kPartial = 2 };

class Mask {
 public:
  Mask() = default;  // full

  static Mask full() { return {}; }
  static Mask causal(std::int64_t shift = 0);  // j <= i + shift
  // i + shift - left <= j <= i + shift + right; -1 on a side is unlimited.
  static Mask sliding_window(std::int64_t left, std::int64_t right, std::int64_t shift = 0);
  static Mask chunked(std::int64_t chunk_size);  // i div c == j div c and j <= i
  static Mask prefix(std::int64_t length);       // j < length
  // visible[i * kv_len + j] != 0; positions outside see nothing.
  static Mask dense(std::int64_t q_len, std::int64_t kv_len, std::vector<std::uint8_t> visible);
  // visible[(i div block) * kv_blocks + j div block] != 0, q_blocks x kv_blocks entries.
  static Mask block_sparse(std::int64_t block, std::int64_t q_blocks, std::int64_t kv_blocks,
                           std::vector<std::uint8_t> visible);

  friend Mask operator&(const Mask& a, const Mask& b);
  friend Mask operator|(const Mask& a, const Mask& b);

  [[nodiscard]] bool visible(std::int64_t query, std::int64_t key) const;
  [[nodiscard]] TileClass classify(Interval queries, Interval keys) const;
  // bits[k]: bit n is set iff queries[n] sees keys[k]. At most 32 queries, in rising order; any
  // order of keys.
  void lane_bits(std::span<const std::int64_t> queries, std::span<const std::int64_t> keys,
                 std::uint32_t* bits) const;
  [[nodiscard]] bool is_full() const { return node_ == nullptr; }
  [[nodiscard]] std::string describe() const;  // "causal & window(128, 0)"

  class Node;

 private:
  explicit Mask(std::shared_ptr<const Node> node) : node_(std::move(node)) {}
  std::shared_ptr<const Node> node_;
};

// Asked once per query head with global lengths; num_reps = num_heads / num_kv_heads.
using MaskBuilder =
    std::function<Mask(std::int64_t q_len, std::int64_t kv_len, std::int64_t num_heads,
                       std::int64_t head, std::int64_t num_reps)>;

}  // namespace v1
}  // namespace annulus
