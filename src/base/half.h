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

inline std::uint16_t float_to_bf16(float value) {
  const auto u = std::bit_cast<std::uint32_t>(value);
  if ((u & 0x7fffffffU) > 0x7f800000U)
    return static_cast<std::uint16_t>((u >> 16) | 0x40U);  // NaN stays NaN
  return static_cast<std::uint16_t>((u + 0x7fffU + ((u >> 16) & 1U)) >> 16);
}

float f16_to_float(std::uint16_t bits);
std::uint16_t float_to_f16(float value);

// One element of a float tensor (float32, bfloat16, float16) or an integer one, as a number.
double load_element(DType dtype, const void* element);
// Rounds once to float32, then to dtype (float32, bfloat16, float16).
void store_element(DType dtype, void* element, double value);

}  // namespace annulus
