// The gradient of one visible pair, twice: as the formula has it, with what bounds of another
// program's error are made of, and as a straightforward program computes it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "annulus/bars.h"
#include "annulus/gradient_bars.h"
#include "reference/rounding.h"

namespace annulus {
inline namespace v1 {
namespace reference {

// Throws InvalidArgument where the tensors do not fit the oracle's.
void check_backward(const Oracle& oracle, const BackwardInputs& inputs);

// What a vector is multiplied with on its way into a gradient. The next two say how far a right
// float32 program may be off:
//   noise   the standard deviation of the errors that do not shrink with `value`, and of those of
//           sums, per unit of |x|
//   spread  that of the errors of p, which are independent from pair to pair, per unit of x
// `rounding` is what it loses if p, or ds, is rounded to bfloat16 once, and `doubt` what it loses
// more or less where float32's errors decide which neighbour that is.
struct Coefficient {
  double value = 0;
  double noise = 0;
  double spread = 0;
  double rounding = 0;
  double doubt = 0;
};

// Scalar is Coefficient or float.
template <class Scalar>
struct PairGradient {
  bool kept = true;
  Scalar weight{};  // of dout in dv, if kept
  Scalar ds{};      // dbias
  Scalar ddot{};    // of k in dq, of q in dk
};

// The formula in double precision. Const calls may run side by side.
class ExactPairs {
 public:
  using Number = double;
  using Scalar = Coefficient;
  struct Row {
    std::vector<double> q, dout;
    bool contributes = false;  // has weights that do not vanish
    double shift = 0;          // p = exp(s - shift) / sum
    double sum = 1;
    double lse = 0;
    double dlse = 0;
    double delta = 0;      // less dlse
    double abs_delta = 0;  // sum of |dout * out|, and |dlse|
  };

  ExactPairs(const Oracle& oracle, const BackwardInputs& inputs);
  [[nodiscard]] Row row(RowIndex at) const;
  [[nodiscard]] PairGradient<Coefficient> pair(const Row& row, std::span<const double> k,
                                               std::span<const double> v, PairInputs inputs) const;
  [[nodiscard]] Coefficient sink(const Row& row, double sink) const;
  [[nodiscard]] static bool has_delta(const Row& row) { return row.abs_delta != 0; }
  [[nodiscard]] static Row without_out(Row row);

 private:
  const Oracle& oracle_;
  BackwardInputs inputs_;
  double cap_ = 0;
  double keep_prob_ = 1;
};

// One float32 accumulator per sum, in order, no FMA; what is stored between the steps is rounded to
// the dtype: the score after each step, p, dp, ds after each step.
class NaivePairs {
 public:
  using Number = float;
  using Scalar = float;
  struct Row {
    std::vector<float> q, dout;
    bool contributes = false;
    float lse = 0;
    float dlse = 0;
    float delta = 0;  // less dlse
  };

  NaivePairs(const Oracle& oracle, const BackwardInputs& inputs, DType arithmetic);
  [[nodiscard]] Row row(RowIndex at) const;
  [[nodiscard]] PairGradient<float> pair(const Row& row, std::span<const float> k,
                                         std::span<const float> v, PairInputs inputs) const;
  [[nodiscard]] float sink(const Row& row, double sink) const;
  [[nodiscard]] static bool has_delta(const Row& row) { return row.delta != 0; }
  [[nodiscard]] static Row without_out(Row row);

 private:
  const Oracle& oracle_;
  BackwardInputs inputs_;
  DType dtype_;
  Arithmetic stored_;
  float scale_ = 1;
  float cap_ = 0;
  float keep_scale_ = 1;
};

}  // namespace reference
}  // namespace v1
}  // namespace annulus
