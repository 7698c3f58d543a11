// What the oracle's forward and backward share: sums that keep their digits, and vectors of tensors
// as numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <span>

#include "annulus/tensor.h"
#include "base/half.h"

namespace annulus {
inline namespace v1 {
namespace reference {

// A sum that carries the rounding error of each addition (two-sum), so that the oracle errs by
// about one unit in the last place however many terms there are. The plain sum decides what is NaN
// or Inf: of those the carried error says nothing.
class Sum {
 public:
  void add(double x) {
    const double next = plain_ + x;
    const double added = next - plain_;
    error_ += (plain_ - (next - added)) + (x - added);
    plain_ = next;
  }
  [[nodiscard]] double value() const { return std::isfinite(plain_) ? plain_ + error_ : plain_; }

 private:
  double plain_ = 0;
  double error_ = 0;
};

// Views may be misaligned, so elements are copied out. One loop per dtype keeps the switch outside.
template <class Bits, class Convert>
void load_vector(const TensorView& t, const std::byte* first, std::span<double> to,
                 Convert convert) {
  const std::int64_t step = t.strides[3] * static_cast<std::int64_t>(sizeof(Bits));
  for (double& element : to) {
    Bits bits;
    std::memcpy(&bits, first, sizeof bits);
    element = static_cast<double>(convert(bits));
    first += step;
  }
}

inline void load(const TensorView& t, std::int64_t b, std::int64_t s, std::int64_t h,
                 std::span<double> to) {
  if (to.empty()) return;
  const std::byte* first = t.at(b, s, h, 0);
  switch (t.dtype) {
    case DType::kFloat32:
      return load_vector<float>(t, first, to, [](float x) { return x; });
    case DType::kBFloat16:
      return load_vector<std::uint16_t>(t, first, to, bf16_to_float);
    default:
      return load_vector<std::uint16_t>(t, first, to, f16_to_float);
  }
}

inline double dot(std::span<const double> a, std::span<const double> b) {
  Sum sum;
  for (std::size_t d = 0; d < a.size(); ++d) sum.add(a[d] * b[d]);
  return sum.value();
}

}  // namespace reference
}  // namespace v1
}  // namespace annulus
