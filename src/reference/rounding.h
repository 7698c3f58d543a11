// Roundings and errors, as the bars of the forward and of the backward see them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "annulus/bars.h"
#include "base/fail.h"
#include "base/half.h"

namespace annulus {
inline namespace v1 {
namespace reference {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline constexpr double kUnit = 0x1p-24;  // unit roundoff of float32

// Exponentials of float32 are good down to exp(-80) and may be 0 below, so a weight errs by this
// much of the row's largest whatever it is.
inline constexpr double kExpFloor = 0x1p-115;
// Online softmaxes keep a reference that may be far above the largest score so far, and lose
// weights far below it: by this much of the row's largest a weight of the forward may be off. It
// shows only where dropout takes out everything heavier.
inline constexpr double kWeightFloor = 0x1p-80;

// Smallest distance between neighbours.
inline double spacing(DType dtype, double x) {
  const int digits = dtype == DType::kFloat32 ? 24 : dtype == DType::kBFloat16 ? 8 : 11;
  const int lowest = dtype == DType::kFloat16 ? -24 : dtype == DType::kBFloat16 ? -133 : -149;
  const int exponent = x == 0 || !std::isfinite(x) ? lowest : std::ilogb(x) - digits + 1;
  return std::ldexp(1.0, std::max(exponent, lowest));
}

inline double unit_roundoff(DType dtype) { return spacing(dtype, 1.0) / 2; }

inline double rounded(DType dtype, double x) {
  std::uint32_t bits = 0;
  store_element(dtype, &bits, x);
  return load_element(dtype, &bits);
}

// g(n) of the bounds: n roundings one after the other.
inline double roundings(double n) { return n * kUnit / (1 - n * kUnit); }

inline double rms(double squares, std::int64_t count) {
  return count == 0 ? 0 : std::sqrt(squares / static_cast<double>(count));
}

inline void require(CheckResult& result, const std::string& bar, double found, double allowed) {
  if (found <= allowed) return;
  if (!result.verdict.empty()) result.verdict += "; ";
  result.verdict += concat(bar, ": ", found, " exceeds ", allowed);
  result.passed = false;
}

// What a program that stores its intermediate results in `dtype` stores.
class Arithmetic {
 public:
  explicit Arithmetic(DType dtype) : dtype_(dtype) {}
  [[nodiscard]] float operator()(float x) const {
    if (dtype_ == DType::kBFloat16) return bf16_to_float(float_to_bf16(x));
    return dtype_ == DType::kFloat16 ? f16_to_float(float_to_f16(x)) : x;
  }

 private:
  DType dtype_;
};

}  // namespace reference
}  // namespace v1
}  // namespace annulus
