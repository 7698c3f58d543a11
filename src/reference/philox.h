// Philox 4x32-10, the counter-based generator behind dropout, from its definition. The kernels have
// a vectorised one; the oracle keeps its own, so that a mistake in either shows.
#pragma once

#include <array>
#include <cstdint>

namespace annulus {
inline namespace v1 {
namespace reference {

// Ten rounds of two 32 x 32 -> 64 bit products; the key grows by a Weyl constant between rounds.
inline std::array<std::uint32_t, 4> philox4x32_10(std::array<std::uint32_t, 4> counter,
                                                  std::array<std::uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53U} * counter[0];
    const std::uint64_t b = std::uint64_t{0xCD9E8D57U} * counter[2];
    counter = {
        static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(b),
        static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(a)};
    key[0] += 0x9E3779B9U;
    key[1] += 0xBB67AE85U;
  }
  return counter;
}

}  // namespace reference
}  // namespace v1
}  // namespace annulus
