// The numeric bars of the backward as code; see bars.h, which judges the forward.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "annulus/attention.h"
#include "annulus/bars.h"
#include "annulus/tensor.h"

namespace annulus {
inline namespace v1 {
namespace reference {

// What the backward was given beside q, k, v and the options.
struct BackwardInputs {
  TensorView dout;
  // The out that delta is made of, used as given; empty: the oracle's own, in double precision.
  TensorView out{};
  // Empty: the oracle's own. Given: p = exp(s - lse) from these float32 numbers, which lets single
  // rows of dk and dv be checked without a forward over all rows; the bars then allow for lse's own
  // error.
  TensorView lse{};
  TensorView dlse{};  // the gradient of lse; empty: zeros
};

struct GradientCheckOptions {
  bool bf16_products = false;      // p and ds are rounded to bfloat16 before they multiply
  bool strict = false;             // see CheckOptions
  std::int64_t rows_per_head = 0;  // sampled rows of dq, dk, dv and dbias; 0: all
};

// One gradient against the oracle. Errors as in CheckResult.
struct GradientResult {
  std::string name;  // "dq"
  CheckResult result;
};

struct GradientCheck {
  std::vector<GradientResult> gradients;  // those that were given
  bool passed = true;
  std::string verdict;  // "passed", or every bar that was missed, by gradient, with numbers
};

// Bar N2: bfloat16 and float16 gradients at most 1.05 x rounding with float32 products, at most 3.5
// x rounding in the largest error and 1.7 x in rms with bfloat16 products; never above the naive
// same-dtype computation. float32 gradients: at most naive float32 + 2 ulp of the largest; with
// bfloat16 products judged as if they were bfloat16. dsoftmax_aux is never made of bfloat16
// products.
//
// Unless strict, the largest errors are also allowed what independent roundings of the terms come
// to by chance, and rms errors always are: 0.42 * 2^-8 sqrt(sum of squared terms) for bfloat16
// products; float32's part follows from the sums of |q k|, |dout v| and |dout out|. In units of the
// same standard deviations every element has a bound of its own (N5, bound_ratio), so that a wrong
// tile does not hide where gradients are small. Equal p round alike, and so do equal ds: beside the
// independent roundings that bound allows what rounding these very p and ds once comes to, either
// way where float32's errors decide; and the rms bar is 1.1 times what that and one rounding of the
// result come to, where that is more.
//
// 0 where the formula has no term; NaN and Inf where the oracle has them. `computed` holds the
// gradients to judge; what has no view is left out. Costs O(tokens * rows * dim) per head for
// sampled rows if out and lse are given, else a forward over all rows. Throws InvalidArgument.
GradientCheck check_gradients(const TensorView& q, const TensorView& k, const TensorView& v,
                              const BackwardInputs& inputs, const AttentionOptions& options,
                              const Gradients& computed, const GradientCheckOptions& check);

}  // namespace reference
}  // namespace v1
}  // namespace annulus
