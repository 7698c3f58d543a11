// Elements of tensors as numbers, and back.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "annulus/tensor.h"

namespace annulus::tools {

inline float from_bfloat16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

// To nearest, ties to even; NaN stays NaN.
inline std::uint16_t to_bfloat16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (std::isnan(value)) return static_cast<std::uint16_t>((bits >> 16) | 0x40U);
  return static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

inline float from_float16(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000U) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1fU;
  const std::uint32_t fraction = bits & 0x3ffU;
  if (exponent == 0) {
    const float magnitude = std::ldexp(static_cast<float>(fraction), -24);
    return sign != 0 ? -magnitude : magnitude;
  }
  const std::uint32_t widened = exponent == 31 ? 255U : exponent + 112U;
  return std::bit_cast<float>(sign | (widened << 23) | (fraction << 13));
}

inline std::uint16_t to_float16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000U);
  if (std::isnan(value)) return sign | 0x7e00U;
  const float magnitude = std::abs(value);
  if (magnitude >= 65520.0F) return sign | 0x7c00U;  // rounds beyond 65504, the largest
  if (magnitude < 0x1p-14F) {                        // subnormal: multiples of 2^-24
    return sign | static_cast<std::uint16_t>(std::nearbyint(magnitude * 0x1p24F));
  }
  const std::uint32_t rebiased = (bits & 0x7fffffffU) - (112U << 23);
  return sign | static_cast<std::uint16_t>((rebiased + 0xfffU + ((rebiased >> 13) & 1U)) >> 13);
}

template <class T>
T load(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

inline double number_at(const std::byte* from, DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return load<float>(from);
    case DType::kBFloat16:
      return from_bfloat16(load<std::uint16_t>(from));
    case DType::kFloat16:
      return from_float16(load<std::uint16_t>(from));
    case DType::kInt64:
      return static_cast<double>(load<std::int64_t>(from));
    case DType::kInt32:
      return load<std::int32_t>(from);
    case DType::kInt8:
      return load<std::int8_t>(from);
    case DType::kUInt8:
    case DType::kBool:
      return load<std::uint8_t>(from);
  }
  return 0;
}

inline void store_number(std::byte* to, DType dtype, float value) {
  if (dtype == DType::kFloat32) {
    std::memcpy(to, &value, sizeof(value));
    return;
  }
  const std::uint16_t bits = dtype == DType::kBFloat16 ? to_bfloat16(value) : to_float16(value);
  std::memcpy(to, &bits, sizeof(bits));
}

}  // namespace annulus::tools
