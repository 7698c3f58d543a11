#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "annulus/attention.h"
#include "base/fail.h"
#include "base/half.h"

namespace annulus {
namespace {

constexpr double kNothing = -std::numeric_limits<double>::infinity();

void require_shapes(const TensorView& out_a, const TensorView& lse_a, const TensorView& out_b,
                    const TensorView& lse_b, const MutableTensorView& out,
                    const MutableTensorView& lse) {
  const auto require = [](bool ok, const char* what, const TensorView& t, const TensorView& like) {
    if (!ok)
      fail("merge", what, " has shape ", to_string(t.shape), " and type ", name(t.dtype),
           ", expected ", to_string(like.shape), " ", name(like.dtype));
  };
  require(out_b.shape == out_a.shape && out_b.dtype == out_a.dtype, "out_b", out_b, out_a);
  require(out.shape == out_a.shape && (out.dtype == out_a.dtype || out.dtype == DType::kFloat32),
          "out", out, out_a);
  TensorView rows = out_a;
  rows.shape[3] = 1, rows.dtype = DType::kFloat32;
  for (const auto& [what, t] :
       {std::pair<const char*, TensorView>{"lse_a", lse_a}, {"lse_b", lse_b}, {"lse", lse}}) {
    require(t.shape == rows.shape && t.dtype == DType::kFloat32, what, t, rows);
  }
}

float load_float(const TensorView& t, std::int64_t b, std::int64_t s, std::int64_t h) {
  float value = 0;
  std::memcpy(&value, t.at(b, s, h, 0), sizeof value);
  return value;
}

}  // namespace

inline namespace v1 {

void merge(const TensorView& out_a, const TensorView& lse_a, const TensorView& out_b,
           const TensorView& lse_b, const MutableTensorView& out, const MutableTensorView& lse) {
  require_shapes(out_a, lse_a, out_b, lse_b, out, lse);
  const auto [batch, seq, heads, dim] = out_a.shape;
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t s = 0; s < seq; ++s) {
      for (std::int64_t h = 0; h < heads; ++h) {
        const double a = load_float(lse_a, b, s, h), c = load_float(lse_b, b, s, h);
        const double top = std::isnan(a)   ? a
                           : std::isnan(c) ? c
                                           : std::max(a, c),
                     low = std::min(a, c);
        const double total = std::isinf(top) ? top : top + std::log1p(std::exp(low - top));
        // A part without weight is not read: what it holds is nobody's result.
        const double weight_a = a == kNothing ? 0 : std::exp(a - total),
                     weight_b = c == kNothing ? 0 : std::exp(c - total);
        for (std::int64_t d = 0; d < dim; ++d) {
          const double from_a =
              a == kNothing ? 0 : weight_a * load_element(out_a.dtype, out_a.at(b, s, h, d));
          const double from_b =
              c == kNothing ? 0 : weight_b * load_element(out_b.dtype, out_b.at(b, s, h, d));
          store_element(out.dtype, out.at(b, s, h, d), from_a + from_b);
        }
        const auto result = static_cast<float>(total);
        std::memcpy(lse.at(b, s, h, 0), &result, sizeof result);
      }
    }
  }
}

}  // namespace v1
}  // namespace annulus
