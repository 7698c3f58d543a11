#include "reference/pair_gradients.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "base/fail.h"
#include "reference/formula.h"

namespace annulus {
inline namespace v1 {
namespace reference {
namespace {

constexpr const char* kOperation = "reference::attention_backward";

struct Dot {
  double value = 0;
  double magnitude = 0;  // sum of |a * b|
};

Dot dot_and_magnitude(std::span<const double> a, std::span<const double> b) {
  Sum sum;
  double magnitude = 0;
  for (std::size_t d = 0; d < a.size(); ++d) {
    const double product = a[d] * b[d];
    sum.add(product);
    magnitude += std::abs(product);
  }
  return {sum.value(), magnitude};
}

float naive_dot(std::span<const float> a, std::span<const float> b) {
  float sum = 0;
  for (std::size_t d = 0; d < a.size(); ++d) {
    const float product = a[d] * b[d];
    sum += product;
  }
  return sum;
}

std::vector<double> vector_at(const TensorView& t, RowIndex at) {
  std::vector<double> x(static_cast<std::size_t>(t.shape[3]));
  load(t, at.batch, at.query, at.head, x);
  return x;
}

std::vector<float> floats(std::span<const double> x) { return {x.begin(), x.end()}; }

// Rounding and doubt of a coefficient that is `factor` times x, for an x known to `error`.
void round_once(Coefficient& coefficient, double x, double error, double factor) {
  const auto round = [](double number) { return rounded(DType::kBFloat16, number); };
  coefficient.rounding = (round(x) - x) * factor;
  coefficient.doubt = (round(x + error) - round(x - error)) * std::abs(factor);
}

double number_at(const TensorView& lse, RowIndex at) {
  return load_element(lse.dtype, lse.at(at.batch, at.query, at.head, 0));
}

}  // namespace

void check_backward(const Oracle& oracle, const BackwardInputs& inputs) {
  const auto check = [&](const char* what, const TensorView& t, std::int64_t width) {
    const std::array<std::int64_t, 4> expected{oracle.batch(), oracle.q_len(), oracle.num_heads(),
                                               width};
    const bool is_float =
        t.dtype == DType::kFloat32 || t.dtype == DType::kBFloat16 || t.dtype == DType::kFloat16;
    if (t.shape != expected || !is_float) {
      fail(kOperation, what, " is ", name(t.dtype), " ", to_string(t.shape), ", expected floats ",
           to_string(expected));
    }
  };
  check("dout", inputs.dout, oracle.v_head_dim());
  if (inputs.out) check("out", inputs.out, oracle.v_head_dim());
  if (inputs.lse) check("lse", inputs.lse, 1);
  if (inputs.dlse) check("dlse", inputs.dlse, 1);
}

ExactPairs::ExactPairs(const Oracle& oracle, const BackwardInputs& inputs)
    : oracle_(oracle),
      inputs_(inputs),
      cap_(oracle.options().logits_soft_cap),
      keep_prob_(1 - oracle.options().dropout_prob) {}

ExactPairs::Row ExactPairs::row(RowIndex at) const {
  Row row;
  std::vector<double> out;
  if (inputs_.lse) {
    row.lse = row.shift = number_at(inputs_.lse, at);
  }
  if (!inputs_.lse || !inputs_.out) {
    const reference::Row forward = oracle_.row(at);
    out = forward.out;
    if (!inputs_.lse) row.lse = forward.lse;
    if (!inputs_.lse) row.shift = forward.max_score, row.sum = forward.weight_sum;
  }
  row.contributes = row.lse != -kInfinity;
  if (!row.contributes) return row;
  if (inputs_.out) out = vector_at(inputs_.out, at);
  row.q.resize(static_cast<std::size_t>(oracle_.head_dim()));
  oracle_.load_query(at, row.q);
  row.dout = vector_at(inputs_.dout, at);
  const Dot delta = dot_and_magnitude(row.dout, out);
  if (inputs_.dlse) row.dlse = number_at(inputs_.dlse, at);
  row.delta = delta.value - row.dlse;
  row.abs_delta = delta.magnitude + std::abs(row.dlse);
  return row;
}

ExactPairs::Row ExactPairs::without_out(Row row) {
  row.delta = -row.dlse, row.abs_delta = std::abs(row.dlse);
  return row;
}

// Errors in units of u = 2^-24, each counted twice so that one standard deviation suffices:
//   score   u (sum |q k| scale + |s| + |lse|): the dot product, s - lse and lse itself; with a cap
//   4
//           u |s| more, of tanh. All of it is a relative error of p, and so of what p multiplies.
//   dp      u sum |dout v|, delta: u sum |dout out|. Neither vanishes where dp - delta does.
//   cap     1 - (s / cap)^2 errs by 8 u however small it is.
//   sums    u |value x| each.
// And p may be 0 where it is below kExpFloor.
PairGradient<Coefficient> ExactPairs::pair(const Row& row, std::span<const double> k,
                                           std::span<const double> v, PairInputs inputs) const {
  const double scale = oracle_.softmax_scale();
  const Dot qk = dot_and_magnitude(row.q, k);
  double score = scale * qk.value;
  double score_error = std::abs(scale) * qk.magnitude + std::abs(row.lse);
  double slope = 1;
  if (cap_ > 0) {
    // 1 - tanh^2, without its cancellation.
    const double cosh = std::cosh(score / cap_);
    slope = 1 / (cosh * cosh);
    score = cap_ * std::tanh(score / cap_);
    score_error += 4 * std::abs(score);
  }
  score += inputs.bias;
  score_error = 2 * kUnit * (score_error + std::abs(score));
  const double p = std::exp(score - row.shift) / row.sum;

  Dot dp;  // a dropped pair adds nothing, whatever its v
  if (inputs.kept) dp = dot_and_magnitude(row.dout, v);
  const double ds = p * (dp.value / keep_prob_ - row.delta);
  const double reach = dp.magnitude / keep_prob_ + row.abs_delta;
  const double ds_noise = (2 * kUnit * p + kExpFloor) * reach;

  PairGradient<Coefficient> pair{.kept = inputs.kept};
  const double weight = p / keep_prob_;
  pair.weight = {weight, 2 * kUnit * weight + kExpFloor / keep_prob_, score_error * weight};
  pair.ds = {ds, 2 * kUnit * std::abs(ds) + ds_noise, score_error * ds};
  const double cap_noise = cap_ > 0 ? 8 * kUnit * std::abs(ds) : 0;
  const double ddot = scale * slope * ds;
  pair.ddot = {ddot, 2 * kUnit * std::abs(ddot) + std::abs(scale) * (slope * ds_noise + cap_noise),
               score_error * ddot};
  // Four standard deviations.
  const double ds_error = 4 * (pair.ds.noise + std::abs(pair.ds.spread));
  round_once(pair.weight, p, 4 * (2 * kUnit + score_error) * p, 1 / keep_prob_);
  round_once(pair.ds, ds, ds_error, 1);
  round_once(pair.ddot, slope * ds, slope * ds_error + 4 * cap_noise, scale);
  return pair;
}

Coefficient ExactPairs::sink(const Row& row, double sink) const {
  const double p = std::exp(sink - row.shift) / row.sum;
  const double value = -p * row.delta;
  const double score_error = 2 * kUnit * (std::abs(sink) + std::abs(row.lse));
  return {value, 2 * kUnit * std::abs(value) + (2 * kUnit * p + kExpFloor) * row.abs_delta,
          score_error * value};
}

NaivePairs::NaivePairs(const Oracle& oracle, const BackwardInputs& inputs, DType arithmetic)
    : oracle_(oracle),
      inputs_(inputs),
      dtype_(arithmetic),
      stored_(arithmetic),
      scale_(static_cast<float>(oracle.softmax_scale())),
      cap_(static_cast<float>(oracle.options().logits_soft_cap)),
      keep_scale_(static_cast<float>(1 / (1 - oracle.options().dropout_prob))) {}

NaivePairs::Row NaivePairs::row(RowIndex at) const {
  Row row;
  std::vector<float> out;
  if (inputs_.lse) row.lse = static_cast<float>(number_at(inputs_.lse, at));
  if (!inputs_.lse || !inputs_.out) {
    const NaiveRow forward = naive_row(oracle_, at, dtype_);
    out = forward.out;
    if (!inputs_.lse) row.lse = forward.lse;
  }
  row.contributes = row.lse != -std::numeric_limits<float>::infinity();
  if (!row.contributes) return row;
  if (inputs_.out) out = floats(vector_at(inputs_.out, at));
  std::vector<double> q(static_cast<std::size_t>(oracle_.head_dim()));
  oracle_.load_query(at, q);
  row.q = floats(q);
  row.dout = floats(vector_at(inputs_.dout, at));
  if (inputs_.dlse) row.dlse = static_cast<float>(number_at(inputs_.dlse, at));
  row.delta = naive_dot(row.dout, out) - row.dlse;
  return row;
}

NaivePairs::Row NaivePairs::without_out(Row row) {
  row.delta = -row.dlse;
  return row;
}

PairGradient<float> NaivePairs::pair(const Row& row, std::span<const float> k,
                                     std::span<const float> v, PairInputs inputs) const {
  float score = stored_(stored_(naive_dot(row.q, k)) * scale_);
  float slope = 1;
  if (cap_ > 0) {
    score = stored_(cap_ * std::tanh(score / cap_));
    slope = 1 - (score / cap_) * (score / cap_);
  }
  if (oracle_.options().bias) score = stored_(score + static_cast<float>(inputs.bias));
  const float p = stored_(std::exp(score - row.lse));
  float dp = inputs.kept ? stored_(naive_dot(row.dout, v)) : 0;
  float weight = p;
  if (keep_scale_ != 1) {
    weight = stored_(p * keep_scale_);
    dp = stored_(dp * keep_scale_);
  }
  const float ds = stored_(p * (dp - row.delta));
  float ddot = ds;
  if (cap_ > 0) ddot = stored_(ddot * slope);
  return {.kept = inputs.kept, .weight = weight, .ds = ds, .ddot = stored_(ddot * scale_)};
}

float NaivePairs::sink(const Row& row, double sink) const {
  return -std::exp(static_cast<float>(sink) - row.lse) * row.delta;
}

}  // namespace reference
}  // namespace v1
}  // namespace annulus
