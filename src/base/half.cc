#include "base/half.h"

#include <cassert>
#include <cstring>

namespace annulus {
namespace {

constexpr std::uint32_t kF32Infinity = 0x7f800000U;
constexpr std::uint32_t kF16Overflow = 0x477ff000U;   // 65520: halfway between 65504 and 65536
constexpr std::uint32_t kF16MinNormal = 0x38800000U;  // 2^-14
constexpr std::uint32_t kBiasGap = (127U - 15U) << 23;

// Bits of the positive float16 nearest to a positive float below 65520.
std::uint32_t round_magnitude(std::uint32_t u) {
  // One unit in the last place of 0.5f is 2^-24, the spacing of subnormal float16: the addition
  // itself rounds.
  if (u < kF16MinNormal) {
    return std::bit_cast<std::uint32_t>(std::bit_cast<float>(u) + 0.5F) -
           std::bit_cast<std::uint32_t>(0.5F);
  }
  return (u - kBiasGap + 0xfffU + ((u >> 13) & 1U)) >> 13;
}

template <class T>
T load(const void* element) {
  T value;
  std::memcpy(&value, element, sizeof value);
  return value;
}

}  // namespace

float f16_to_float(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000U) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1fU;
  const std::uint32_t mantissa = bits & 0x3ffU;
  std::uint32_t magnitude = 0;
  if (exponent == 0) {
    magnitude = std::bit_cast<std::uint32_t>(static_cast<float>(mantissa) * 0x1p-24F);
  } else if (exponent == 31) {
    magnitude = kF32Infinity | (mantissa << 13);
  } else {
    magnitude = ((exponent << 23) + kBiasGap) | (mantissa << 13);
  }
  return std::bit_cast<float>(sign | magnitude);
}

std::uint16_t float_to_f16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000U;
  const std::uint32_t u = bits & 0x7fffffffU;
  if (u > kF32Infinity) return static_cast<std::uint16_t>(sign | 0x7e00U | ((u >> 13) & 0x3ffU));
  if (u >= kF16Overflow) return static_cast<std::uint16_t>(sign | 0x7c00U);
  return static_cast<std::uint16_t>(sign | round_magnitude(u));
}

double load_element(DType dtype, const void* element) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<double>(load<float>(element));
    case DType::kBFloat16:
      return static_cast<double>(bf16_to_float(load<std::uint16_t>(element)));
    case DType::kFloat16:
      return static_cast<double>(f16_to_float(load<std::uint16_t>(element)));
    case DType::kInt64:
      return static_cast<double>(load<std::int64_t>(element));
    case DType::kInt32:
      return load<std::int32_t>(element);
    case DType::kInt8:
      return load<std::int8_t>(element);
    case DType::kUInt8:
      return load<std::uint8_t>(element);
    case DType::kBool:
      return load<std::uint8_t>(element) != 0 ? 1 : 0;
  }
  return 0;
}

void store_element(DType dtype, void* element, double value) {
  const auto narrow = static_cast<float>(value);
  if (dtype == DType::kFloat32) {
    std::memcpy(element, &narrow, sizeof narrow);
    return;
  }
  assert(dtype == DType::kBFloat16 || dtype == DType::kFloat16);
  const std::uint16_t bits =
      dtype == DType::kBFloat16 ? float_to_bf16(narrow) : float_to_f16(narrow);
  std::memcpy(element, &bits, sizeof bits);
}

}  // namespace annulus
