// bfloat16 and float16 as bits. Narrowing rounds to nearest even and keeps NaN; Highway 1.0.3
// truncates bfloat16, which biases sums, so nothing here goes through it.
#pragma once

#include <bit>
#include <cstdint>

#include "annulus/tensor.h"

namespace annulus {

inline float bf16_to_float(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

// All of these select instead of branching, so that loops over them become vector code.
inline std::uint16_t float_to_bf16(float value) {
  const auto u = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = u + 0x7fffU + ((u >> 16) & 1U);
  const bool nan = (u & 0x7fffffffU) > 0x7f800000U;  // stays one
  return static_cast<std::uint16_t>((nan ? u | 0x400000U : rounded) >> 16);
}

inline float f16_to_float(std::uint16_t bits) {
  constexpr std::uint32_t kBiasGap = (127U - 15U) << 23, kInfinity = 0x7f800000U;
  const std::uint32_t sign = (bits & 0x8000U) << 16, u = (bits & 0x7fffU) << 13;
  // Below the least normal number, 2^-14: beside a leading one of that weight the bits are a normal
  // float, so no mode that flushes denormals meets one.
  const auto subnormal =
      std::bit_cast<std::uint32_t>(std::bit_cast<float>(u + kBiasGap + (1U << 23)) - 0x1p-14F);
  const std::uint32_t exponent = bits & 0x7c00U;
  const std::uint32_t finite = exponent == 0 ? subnormal : u + kBiasGap;
  return std::bit_cast<float>(sign | (exponent == 0x7c00U ? u | kInfinity : finite));
}

inline std::uint16_t float_to_f16(float value) {
  constexpr std::uint32_t kBiasGap = (127U - 15U) << 23, kInfinity = 0x7f800000U;
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000U, u = bits & 0x7fffffffU;
  const std::uint32_t normal = (u - kBiasGap + 0xfffU + ((u >> 13) & 1U)) >> 13;
  // One unit in the last place of 0.5f is 2^-24, the spacing of subnormal float16: the addition
  // itself rounds.
  const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(std::bit_cast<float>(u) + 0.5F) -
                                  std::bit_cast<std::uint32_t>(0.5F);
  const std::uint32_t finite = u < 0x38800000U ? subnormal : normal;  // 2^-14
  const std::uint32_t beyond = u > kInfinity ? 0x7e00U | ((u >> 13) & 0x3ffU) : 0x7c00U;
  return static_cast<std::uint16_t>(sign | (u >= 0x477ff000U ? beyond : finite));  // 65520
}

// One element of a float tensor (float32, bfloat16, float16) or an integer one, as a number.
double load_element(DType dtype, const void* element);
// Rounds once to float32, then to dtype (float32, bfloat16, float16).
void store_element(DType dtype, void* element, double value);

}  // namespace annulus
