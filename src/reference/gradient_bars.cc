#include "annulus/gradient_bars.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>

#include "base/fail.h"
#include "reference/backward.h"
#include "reference/formula.h"
#include "reference/rounding.h"

namespace annulus {
inline namespace v1 {
namespace reference {
namespace {

constexpr double kBf16Unit = 0x1p-8;

double finite_or_zero(double x) { return std::isfinite(x) ? x : 0; }

// An element of the exact gradient, and how far right programs stray from it.
class ExactElement {
 public:
  void add(const Coefficient& factor, double x) {
    const double term = factor.value * x;
    sum_.add(term);
    squares_ += term * term;
    noise_ += factor.noise * std::abs(x);
    spread_ += factor.spread * x * (factor.spread * x);
    rounding_ += factor.rounding * x;
    doubt_ += factor.doubt * std::abs(x);
  }
  [[nodiscard]] double value() const { return sum_.value(); }
  // No term, or only terms that are 0 in every arithmetic.
  [[nodiscard]] bool is_zero() const { return noise_ == 0; }
  // Standard deviations of the error. float32: see Coefficient.
  [[nodiscard]] double chance_float32() const {
    return finite_or_zero(noise_) + finite_or_zero(std::sqrt(spread_));
  }
  // bfloat16 p or ds: each term g_n of the sum gets a relative error of its own, at most 2^-8. The
  // rounding error is uniform within half a spacing, so its rms is the largest / sqrt(3); the
  // largest is 2^-8 / m relative to a mantissa m in [1, 2), the mean of 1 / m^2 is 1 / 2; together
  // 2^-8 / sqrt(6) = 0.41 * 2^-8. Errors of different pairs are independent, so for thousands of
  // terms of mixed sign they add up to 0.42 * 2^-8 * sqrt(sum g_n^2): far less than 2^-8 sum |g_n|,
  // and less than one missing tile whose terms add up in the same way.
  [[nodiscard]] double chance_bf16() const {
    return 0.42 * kBf16Unit * finite_or_zero(std::sqrt(squares_));
  }

  // The error if nothing but p, or ds, is rounded to bfloat16. Where terms are alike so are their
  // roundings, and this is more than independence lets expect: all p equal, up to 2^-9 of the
  // value.
  [[nodiscard]] double products_rounded() const { return finite_or_zero(rounding_); }
  // The most that it comes to where float32 decides what p, or ds, is rounded to.
  [[nodiscard]] double largest_products_rounded() const {
    return std::abs(products_rounded()) + finite_or_zero(doubt_);
  }

 private:
  Sum sum_;
  double squares_ = 0;
  double noise_ = 0;
  double spread_ = 0;
  double rounding_ = 0;
  double doubt_ = 0;
};

class NaiveElement {
 public:
  void add(float factor, float x) {
    const float product = factor * x;
    sum_ += product;
  }
  [[nodiscard]] float value() const { return sum_; }

 private:
  float sum_ = 0;
};

struct Errors {
  double max = 0;
  double squares = 0;
  void add(double error) {
    max = std::max(max, error);
    squares += error * error;
  }
};

// Standard deviations of the errors of a tensor's elements. The elements of a row share the errors
// of its weights, so the sum of their squares is known no better than rows are many; where a few
// rows carry most of it, only these count: (sum of V)^2 / sum of V^2 with V a row's sum of squares.
class Chances {
 public:
  void add(std::int64_t row, double deviation) {
    if (row != row_) close_row();
    row_ = row;
    row_squares_ += deviation * deviation;
    largest_ = std::max(largest_, deviation);
    ++elements_;
  }
  [[nodiscard]] double largest() const { return largest_; }
  [[nodiscard]] double rms() const { return reference::rms(squares_ + row_squares_, elements_); }
  // What rms() may come to. Five standard deviations: nightly runs make some 10^6 comparisons, of
  // which four would refuse thirty by chance and five less than one.
  [[nodiscard]] double reach() const { return 1 + 5 / std::sqrt(independent_rows()); }

 private:
  void close_row() {
    squares_ += row_squares_;
    fourths_ += row_squares_ * row_squares_;
    row_squares_ = 0;
  }
  [[nodiscard]] double independent_rows() const {
    const double squares = squares_ + row_squares_;
    const double fourths = fourths_ + row_squares_ * row_squares_;
    return fourths > 0 ? squares * squares / fourths : 1;
  }

  std::int64_t row_ = 0, elements_ = 0;
  double row_squares_ = 0, squares_ = 0, fourths_ = 0, largest_ = 0;
};

struct JudgeOptions {
  DType out_dtype = DType::kFloat32;
  bool bf16_products = false;  // and this gradient is made of them
  bool strict = false;
};

// float32 made of bfloat16 products is no better than bfloat16.
DType judged_dtype(const JudgeOptions& options) {
  return options.out_dtype == DType::kFloat32 && options.bf16_products ? DType::kBFloat16
                                                                       : options.out_dtype;
}

// Collects the elements of one gradient and judges them together.
class Judge {
 public:
  Judge(JudgeOptions options, std::int64_t rows) : options_(options), rows_(rows) {}

  // `where` makes the element's name, which only failures need.
  template <class Where>
  void add(std::int64_t row, const ExactElement& exact, float naive_float32, float naive,
           double computed, const Where& where) {
    const double expected = exact.value();
    if (std::isnan(expected) && std::isnan(computed)) return;
    const double once = rounded(judged_dtype(options_), expected);
    if (!std::isfinite(once) || !std::isfinite(computed)) {
      if (computed != rounded(options_.out_dtype, expected)) mismatch(where(), expected, computed);
      return;
    }
    if (exact.is_zero() && computed != 0) mismatch(where(), 0, computed);
    const double error = std::abs(computed - expected);
    ++elements_;
    error_.add(error);
    rounding_.add(std::abs(once - expected));
    largest_.add(std::abs(expected));
    chance_float32_.add(row, exact.chance_float32());
    chance_bf16_.add(row, exact.chance_bf16());
    const double all_rounded = rounded(judged_dtype(options_), expected + exact.products_rounded());
    all_rounded_.add(finite_or_zero(std::abs(all_rounded - expected)));
    const double error_float32 = naive_error(naive_float32, expected);
    naive_float32_.add(error_float32);
    naive_.add(naive_error(naive, expected));
    const double bound = element_bound(exact) + (std::isfinite(error_float32) ? error_float32 : 0);
    if (!(error > bound_ratio_ * bound)) return;
    bound_ratio_ = error / bound;
    bound_worst_ = concat(where(), ": error ", error, " against the bound ", bound);
  }

  [[nodiscard]] CheckResult result() const {
    CheckResult result;
    result.rows = rows_;
    result.max_abs_err = mismatches_ > 0 ? kInfinity : error_.max;
    result.rms_err = rms(error_.squares, elements_);
    result.rounding_max = rounding_.max;
    result.rounding_rms = rms(rounding_.squares, elements_);
    result.naive_max_err = naive_.max;
    result.bound_ratio = bound_ratio_;
    if (judged_dtype(options_) == DType::kFloat32) {
      judge_float32(result);
    } else {
      judge_rounding(result);
    }
    require(result, concat("N5 ", bound_worst_, ", ratio"), bound_ratio_, 1);
    require(result, concat("values that must match exactly (first: ", first_mismatch_, ")"),
            static_cast<double>(mismatches_), 0);
    if (result.passed) result.verdict = "passed";
    return result;
  }

 private:
  static double naive_error(float naive, double expected) {
    const double error = std::abs(static_cast<double>(naive) - expected);
    return std::isnan(error) ? kInfinity : error;
  }

  void mismatch(const std::string& where, double expected, double found) {
    if (mismatches_++ == 0) first_mismatch_ = concat(where, " is ", found, ", expected ", expected);
  }

  // What hides below the tensor's largest error: one rounding of the result; with bfloat16 products
  // those of these very p and ds (equal ones round alike) and eight standard deviations of
  // independent ones; eight of float32's.
  [[nodiscard]] double element_bound(const ExactElement& exact) const {
    const double value = std::abs(exact.value());
    const double products =
        options_.bf16_products ? exact.largest_products_rounded() + 8 * exact.chance_bf16() : 0;
    return std::max(unit_roundoff(options_.out_dtype) * value, spacing(options_.out_dtype, 0) / 2) +
           products + 8 * exact.chance_float32();
  }

  // What float32 itself errs by stands in `floor`: with scores of hundreds it is more than one
  // rounding to bfloat16. Where few elements are looked at, rounding_max may be small by luck, the
  // errors of the products are not.
  void judge_rounding(CheckResult& result) const {
    const bool bf16 = options_.bf16_products;
    const double floor = 1e-7 * largest_.max + naive_float32_.max +
                         (options_.strict ? 0 : chance_float32_.largest());
    const double chance = bf16 && !options_.strict ? 4 * chance_bf16_.largest() : 0;
    require(result, "N2 largest error against rounding", error_.max,
            std::max((bf16 ? 3.5 : 1.05) * rounding_.max, rounding_.max + chance) + floor);
    require(result, "N2 largest error against naive same-dtype", error_.max,
            std::max(naive_.max, rounding_.max + chance) + floor);
    const double chance_rms = bf16 ? reach(chance_bf16_) * chance_bf16_.rms() : 0;
    // The error that these very weights make when rounded once, and then their sum; the tenth is
    // for half-up kernels. Not from the rms of either: where rows repeat, the two are not
    // independent.
    const double all_rms = bf16 ? rms(all_rounded_.squares, elements_) : 0;
    require(result, "N2 rms error against rounding", result.rms_err,
            std::max({(bf16 ? 1.7 : 1.05) * result.rounding_rms,
                      std::hypot(result.rounding_rms, chance_rms), 1.1 * all_rms}) +
                floor);
  }

  [[nodiscard]] double reach(const Chances& chances) const {
    return options_.strict ? 0 : chances.reach();
  }

  void judge_float32(CheckResult& result) const {
    require(result, "N2 largest error against naive float32", error_.max,
            naive_.max + 2 * spacing(DType::kFloat32, largest_.max) +
                (options_.strict ? 0 : reach(chance_float32_) * chance_float32_.largest()));
    require(result, "N2 rms error against naive float32", result.rms_err,
            rms(naive_.squares, elements_) +
                2 * spacing(DType::kFloat32, rms(largest_.squares, elements_)) +
                reach(chance_float32_) * chance_float32_.rms());
  }

  JudgeOptions options_;
  std::int64_t rows_ = 0;
  std::int64_t elements_ = 0;
  Errors error_, rounding_, largest_, all_rounded_;
  Chances chance_float32_, chance_bf16_;
  Errors naive_float32_, naive_;
  double bound_ratio_ = 0;
  std::string bound_worst_;
  std::int64_t mismatches_ = 0;
  std::string first_mismatch_;
};

// A gradient to judge, with the place of its elements in the rows of a walk.
struct Target {
  std::string name;
  TensorView computed;
  std::array<std::int64_t, 4> shape{};
  std::size_t sampled_axis = 0;
  std::vector<std::int64_t> sampled;  // along that axis
  bool of_products = true;            // p or ds may have been rounded to bfloat16 on their way
};

// In the order of rows_of().
std::array<Target, 5> targets(const Oracle& oracle, const Gradients& computed,
                              const Sample& sample) {
  const TensorView& aux = oracle.options().softmax_aux;
  const std::int64_t b = oracle.batch();
  const std::int64_t hk = oracle.num_kv_heads();
  return {Target{"dq",
                 computed.dq,
                 {b, oracle.q_len(), oracle.num_heads(), oracle.head_dim()},
                 1,
                 sample.queries},
          Target{"dk", computed.dk, {b, oracle.kv_len(), hk, oracle.head_dim()}, 1, sample.keys},
          Target{"dv", computed.dv, {b, oracle.kv_len(), hk, oracle.v_head_dim()}, 1, sample.keys},
          Target{"dsoftmax_aux",
                 computed.dsoftmax_aux,
                 {aux.shape[0], std::max<std::int64_t>(aux.shape[1], 1), 1, 1},
                 0,
                 sampled_rows(aux.shape[0], 0),
                 false},
          Target{"dbias", computed.dbias, oracle.options().bias.shape, 2, sample.queries}};
}

template <class Element>
const std::vector<Element>& rows_of(const GradientRows<Element>& rows, std::size_t target) {
  const std::array<const std::vector<Element>*, 5> members = {&rows.dq, &rows.dk, &rows.dv,
                                                              &rows.dsoftmax_aux, &rows.dbias};
  return *members[target];
}

void check_target(const Target& target) {
  std::array<std::int64_t, 4> found = target.computed.shape;
  found[1] = std::max<std::int64_t>(found[1], target.name == "dsoftmax_aux" ? 1 : 0);
  const DType dtype = target.computed.dtype;
  const bool is_float =
      dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16;
  if (found != target.shape || !is_float) {
    fail("reference::check_gradients", target.name, " is ", name(dtype), " ", to_string(found),
         ", expected floats ", to_string(target.shape));
  }
}

CheckResult judge(const Target& target, const JudgeOptions& options,
                  const std::vector<ExactElement>& exact,
                  const std::vector<NaiveElement>& naive_float32,
                  const std::vector<NaiveElement>& naive) {
  const Arithmetic stored(judged_dtype(options));
  std::array<std::int64_t, 4> extents = target.shape;
  extents[target.sampled_axis] = static_cast<std::int64_t>(target.sampled.size());
  Judge judge(options, extents[0] * extents[1] * extents[2]);
  for (std::size_t n = 0; n < exact.size(); ++n) {
    std::array<std::int64_t, 4> at{};
    auto rest = static_cast<std::int64_t>(n);
    for (std::size_t axis = 4; axis-- > 0; rest /= extents[axis]) at[axis] = rest % extents[axis];
    std::int64_t& place = at[target.sampled_axis];
    place = target.sampled[static_cast<std::size_t>(place)];
    const double computed =
        load_element(target.computed.dtype, target.computed.at(at[0], at[1], at[2], at[3]));
    judge.add(static_cast<std::int64_t>(n) / extents[3], exact[n], naive_float32[n].value(),
              stored(naive[n].value()), computed,
              [&] { return concat(target.name, to_string(at)); });
  }
  return judge.result();
}

}  // namespace

GradientCheck check_gradients(const TensorView& q, const TensorView& k, const TensorView& v,
                              const BackwardInputs& inputs, const AttentionOptions& options,
                              const Gradients& computed, const GradientCheckOptions& check) {
  const Oracle oracle(q, k, v, options);
  check_backward(oracle, inputs);
  const Sample sample{.queries = sampled_rows(oracle.q_len(), check.rows_per_head),
                      .keys = sampled_rows(oracle.kv_len(), check.rows_per_head),
                      .with_bias = options.bias && computed.dbias};
  const std::array<Target, 5> all = targets(oracle, computed, sample);
  for (const Target& target : all) {
    if (target.computed) check_target(target);
  }
  const ExactPairs pairs(oracle, inputs);
  const auto exact = BackwardWalk<ExactElement, ExactPairs>(oracle, pairs, sample).run();
  std::map<DType, GradientRows<NaiveElement>> naive;
  const auto naive_rows = [&](DType dtype) -> const GradientRows<NaiveElement>& {
    if (const auto found = naive.find(dtype); found != naive.end()) return found->second;
    const NaivePairs naive_pairs(oracle, inputs, dtype);
    return naive[dtype] = BackwardWalk<NaiveElement, NaivePairs>(oracle, naive_pairs, sample).run();
  };

  GradientCheck result;
  for (std::size_t n = 0; n < all.size(); ++n) {
    if (!all[n].computed) continue;
    const JudgeOptions how{.out_dtype = all[n].computed.dtype,
                           .bf16_products = check.bf16_products && all[n].of_products,
                           .strict = check.strict};
    result.gradients.push_back(
        {all[n].name, judge(all[n], how, rows_of(exact, n), rows_of(naive_rows(DType::kFloat32), n),
                            rows_of(naive_rows(judged_dtype(how)), n))});
    const CheckResult& judged = result.gradients.back().result;
    if (judged.passed) continue;
    result.passed = false;
    if (!result.verdict.empty()) result.verdict += "; ";
    result.verdict += concat(all[n].name, ": ", judged.verdict);
  }
  if (result.passed) result.verdict = "passed";
  return result;
}

}  // namespace reference
}  // namespace v1
}  // namespace annulus
