#include "annulus/bars.h"

#include <algorithm>
#include <cmath>

#include "base/fail.h"
#include "reference/rounding.h"

namespace annulus {
inline namespace v1 {
namespace reference {
namespace {

// Without a key, or with weights that are all exp(-inf).
bool is_zero_row(const Row& row) { return row.visible == 0 || row.lse == -kInfinity; }

std::vector<float> naive_scores(const Oracle& oracle, RowIndex at, const RowInputs& inputs,
                                Arithmetic stored) {
  std::vector<double> query(static_cast<std::size_t>(oracle.head_dim()));
  std::vector<double> key(query.size());
  oracle.load_query(at, query);
  const auto scale = static_cast<float>(oracle.softmax_scale());
  const auto cap = static_cast<float>(oracle.options().logits_soft_cap);
  std::vector<float> scores;
  for (std::size_t n = 0; n < inputs.keys.size(); ++n) {
    oracle.load_key(at, inputs.keys[n], key);
    float sum = 0;
    for (std::size_t d = 0; d < key.size(); ++d) {
      const float product = static_cast<float>(query[d]) * static_cast<float>(key[d]);
      sum += product;
    }
    float s = stored(stored(sum) * scale);
    if (cap > 0) s = stored(cap * std::tanh(s / cap));
    if (!inputs.bias.empty()) s = stored(s + static_cast<float>(inputs.bias[n]));
    scores.push_back(s);
  }
  return scores;
}

}  // namespace

NaiveRow naive_row(const Oracle& oracle, RowIndex at, DType arithmetic) {
  const Arithmetic stored(arithmetic);
  const RowInputs inputs = oracle.inputs(at);
  std::vector<float> weights = naive_scores(oracle, at, inputs, stored);
  std::vector<float> sinks(inputs.sinks.begin(), inputs.sinks.end());
  NaiveRow row;
  row.out.resize(static_cast<std::size_t>(oracle.v_head_dim()));
  float max = -std::numeric_limits<float>::infinity();
  for (const float s : weights) max = std::isnan(s) || s > max ? s : max;
  for (const float s : sinks) max = std::isnan(s) || s > max ? s : max;
  row.lse = max;
  if (max == -std::numeric_limits<float>::infinity()) return row;

  float sum = 0;
  for (float& s : weights) {
    s = std::exp(s - max);
    sum += s;
  }
  for (const float s : sinks) sum += std::exp(s - max);
  row.lse = max + std::log(sum);
  const auto keep_scale = static_cast<float>(1 / (1 - oracle.options().dropout_prob));
  std::vector<double> value(row.out.size());
  for (std::size_t n = 0; n < weights.size(); ++n) {
    oracle.load_value(at, inputs.keys[n], value);
    if (!inputs.kept.empty() && inputs.kept[n] == 0) continue;
    float p = stored(weights[n] / sum);
    if (!inputs.kept.empty()) p = stored(p * keep_scale);
    for (std::size_t d = 0; d < value.size(); ++d) {
      const float product = p * static_cast<float>(value[d]);
      row.out[d] += product;
    }
  }
  for (float& x : row.out) x = stored(x);
  return row;
}

CheckOptions check_options(const Oracle& oracle, DType out_dtype, bool bf16_probabilities) {
  return {.out_dtype = out_dtype,
          .bf16_probabilities = bf16_probabilities,
          .head_dim = oracle.head_dim(),
          .softmax_scale = oracle.softmax_scale(),
          .capped = oracle.options().logits_soft_cap > 0,
          .biased = static_cast<bool>(oracle.options().bias),
          .dropout = oracle.options().dropout_prob > 0};
}

double element_bound(const Row& exact, std::size_t d, const CheckOptions& options) {
  const double out = exact.out[d];
  const double largest_score = std::abs(options.softmax_scale) * exact.q_norm * exact.max_k_norm;
  const int extra = (options.capped ? 8 : 0) + (options.biased ? 3 : 0) + (exact.sinks > 0 ? 3 : 0);
  const auto terms = static_cast<double>(exact.visible + exact.sinks);
  const double weights = 2 * roundings(static_cast<double>(options.head_dim + 4)) * largest_score +
                         2 * extra * kUnit * exact.max_abs_score + roundings(terms) + 8 * kUnit +
                         (options.dropout ? 2 * kUnit : 0);
  const double rounded_weights = options.bf16_probabilities ? unit_roundoff(DType::kBFloat16) *
                                                                  (exact.abs_out[d] + std::abs(out))
                                                            : 0;
  const double output =
      std::max(unit_roundoff(options.out_dtype) * std::abs(out), spacing(options.out_dtype, 0) / 2);
  return output + rounded_weights + weights * exact.abs_out[d] +
         terms * kWeightFloor * exact.max_abs_v;
}

double chance_error(const Row& exact, std::size_t d, const CheckOptions& options) {
  if (options.bf16_probabilities) {
    return 0.42 * unit_roundoff(DType::kBFloat16) * exact.spread_out[d];
  }
  return 2 * kUnit * (exact.abs_out[d] + exact.max_abs_score * exact.spread_out[d]);
}

void Checker::Errors::add(double error) {
  max = std::max(max, error);
  squares += error * error;
}

// With bf16 probabilities a float32 output is no better than a bfloat16 one.
DType Checker::rounding_dtype() const {
  return options_.out_dtype == DType::kFloat32 && options_.bf16_probabilities ? DType::kBFloat16
                                                                              : options_.out_dtype;
}

// Standard deviations by which the rms error of a right program may exceed its expectation: the
// elements of a row share the errors of its weights, so rows count.
double Checker::few_rows() const {
  return options_.strict
             ? 0
             : 1 + 4 / std::sqrt(static_cast<double>(std::max<std::int64_t>(error_.rows, 1)));
}

bool Checker::judged_by_rounding() const { return rounding_dtype() != DType::kFloat32; }

void Checker::mismatch(const std::string& what, RowIndex at, double expected, double found) {
  if (mismatches_++ > 0) return;
  first_mismatch_ = concat(what, " of row (batch ", at.batch, ", query ", at.query, ", head ",
                           at.head, ") is ", found, ", expected ", expected);
}

void Checker::add_element(const Row& exact, std::size_t d, double computed, RowIndex at) {
  const double expected = exact.out[d];
  const double once = rounded(rounding_dtype(), expected);
  const bool same = computed == rounded(options_.out_dtype, expected);
  if (std::isnan(expected) && std::isnan(computed)) return;
  if (!std::isfinite(once) || !std::isfinite(computed)) {
    if (!same) mismatch(concat("out[", d, "]"), at, expected, computed);
    return;
  }
  if (is_zero_row(exact) && computed != 0) mismatch(concat("out[", d, "]"), at, 0, computed);
  const double error = std::abs(computed - expected);
  ++elements_;
  error_.add(error);
  rounding_.add(std::abs(once - expected));
  chance_.add(is_zero_row(exact) ? 0 : chance_error(exact, d, options_));
  max_abs_out_ = std::max(max_abs_out_, std::abs(expected));
  out_squares_ += expected * expected;
  const double bound = element_bound(exact, d, options_);
  if (!(error > bound_ratio_ * bound)) return;
  bound_ratio_ = error / bound;
  bound_worst_ = concat("out[", d, "] of row (batch ", at.batch, ", query ", at.query, ", head ",
                        at.head, "): error ", error, " against the bound ", bound);
}

void Checker::add_lse(const Row& exact, float lse, RowIndex at) {
  const double found = lse;
  if (std::isnan(exact.lse) && std::isnan(found)) return;
  if (!std::isfinite(exact.lse) || !std::isfinite(found)) {
    if (found != rounded(DType::kFloat32, exact.lse)) mismatch("lse", at, exact.lse, found);
    return;
  }
  const double error = std::abs(found - exact.lse);
  lse_max_ = std::max(lse_max_, error);
  lse_excess_ = std::max(lse_excess_, error - 4e-6 * std::max(1.0, std::abs(exact.lse)));
}

void Checker::add_naive(const Row& exact, const Naive& naive) {
  const auto add = [&](Errors& errors, const std::optional<NaiveRow>& row) {
    if (!row) return;
    ++errors.rows;
    for (std::size_t d = 0; d < exact.out.size(); ++d) {
      if (!std::isfinite(exact.out[d])) continue;
      // Where naive arithmetic overflows it sets no bar; the bound per element remains.
      const double error = std::abs(static_cast<double>(row->out[d]) - exact.out[d]);
      errors.add(std::isnan(error) ? kInfinity : error);
    }
  };
  add(naive_float32_, naive.float32);
  add(naive_, judged_by_rounding() ? naive.same_dtype : naive.float32);
  if (!naive.float32 || !std::isfinite(exact.lse)) return;
  const double error = std::abs(static_cast<double>(naive.float32->lse) - exact.lse);
  naive_lse_max_ = std::max(naive_lse_max_, std::isnan(error) ? kInfinity : error);
}

void Checker::add(const Row& exact, std::span<const float> out, std::optional<float> lse,
                  const Naive& naive, RowIndex at) {
  if (out.size() != exact.out.size()) {
    fail("Checker", "the row has ", out.size(), " elements, expected ", exact.out.size());
  }
  ++error_.rows;
  max_abs_v_ = std::max(max_abs_v_, exact.max_abs_v);
  for (std::size_t d = 0; d < out.size(); ++d) {
    add_element(exact, d, static_cast<double>(out[d]), at);
  }
  if (lse) add_lse(exact, *lse, at);
  add_naive(exact, naive);
}

void Checker::add(const Oracle& oracle, RowIndex at, const TensorView& out, const TensorView& lse) {
  std::vector<float> row;
  for (std::int64_t d = 0; d < oracle.v_head_dim(); ++d) {
    row.push_back(
        static_cast<float>(load_element(out.dtype, out.at(at.batch, at.query, at.head, d))));
  }
  std::optional<float> row_lse;
  if (lse) {
    row_lse = static_cast<float>(load_element(lse.dtype, lse.at(at.batch, at.query, at.head, 0)));
  }
  Naive naive;
  naive.float32 = naive_row(oracle, at, DType::kFloat32);
  if (judged_by_rounding()) naive.same_dtype = naive_row(oracle, at, rounding_dtype());
  add(oracle.row(at), row, row_lse, naive, at);
}

// N1 and N6. What float32 itself errs by stands in `floor`. With bf16 probabilities rounding_max
// says little about small samples: the exact results may happen to lie close to representable
// numbers, the weights' errors do not vanish there. The naive error has the same weakness.
void Checker::judge_rounding(CheckResult& result) const {
  const bool bf16 = options_.bf16_probabilities;
  const double naive_float32 = naive_float32_.rows == error_.rows ? naive_float32_.max : 0;
  const double floor = 1e-7 * max_abs_v_ + naive_float32;
  const double chance = bf16 && !options_.strict ? 4 * chance_.max : 0;
  require(result, "N1 largest error against rounding", error_.max,
          std::max((bf16 ? 2.0 : 1.05) * rounding_.max, rounding_.max + chance) + floor);
  if (naive_.rows == error_.rows) {
    require(result, "N1 largest error against naive same-dtype", error_.max,
            std::max(naive_.max, rounding_.max + chance) + floor);
  }
  const double chance_rms = bf16 ? few_rows() * rms(chance_.squares, elements_) : 0;
  require(result, "N6 rms error against rounding", result.rms_err,
          std::max((bf16 ? 1.6 : 1.05) * result.rounding_rms,
                   std::hypot(result.rounding_rms, chance_rms)) +
              floor);
}

void Checker::judge_float32(CheckResult& result) const {
  if (naive_.rows != error_.rows) return;
  const double floor = kWeightFloor * max_abs_v_;
  require(result, "N3 largest error against naive float32", error_.max,
          naive_.max + 2 * spacing(DType::kFloat32, max_abs_out_) +
              (options_.strict ? 0 : chance_.max) + floor);
  require(result, "N6 rms error against naive float32", result.rms_err,
          rms(naive_.squares, elements_) +
              2 * spacing(DType::kFloat32, rms(out_squares_, elements_)) +
              few_rows() * rms(chance_.squares, elements_) + floor);
}

void Checker::judge_everything_else(CheckResult& result) const {
  const double naive_lse = naive_float32_.rows == error_.rows ? naive_lse_max_ : 0;
  require(result, "N3 lse error beyond 4e-6 max(1, |lse|)", lse_excess_, naive_lse);
  require(result, concat("N5 ", bound_worst_, ", ratio"), bound_ratio_, 1);
  require(result, concat("values that must match exactly (first: ", first_mismatch_, ")"),
          static_cast<double>(mismatches_), 0);
}

CheckResult Checker::result() const {
  CheckResult result;
  result.rows = error_.rows;
  result.max_abs_err = mismatches_ > 0 ? kInfinity : error_.max;
  result.rms_err = rms(error_.squares, elements_);
  result.rounding_max = rounding_.max;
  result.rounding_rms = rms(rounding_.squares, elements_);
  result.lse_max_err = lse_max_;
  if (error_.rows > 0 && naive_.rows == error_.rows) result.naive_max_err = naive_.max;
  if (error_.rows > 0 && naive_float32_.rows == error_.rows) {
    result.naive_lse_max_err = naive_lse_max_;
  }
  result.bound_ratio = bound_ratio_;
  if (judged_by_rounding()) {
    judge_rounding(result);
  } else {
    judge_float32(result);
  }
  judge_everything_else(result);
  if (result.passed) result.verdict = "passed";
  return result;
}

std::vector<std::int64_t> sampled_rows(std::int64_t q_len, std::int64_t count) {
  std::vector<std::int64_t> rows;
  const bool all = count <= 0 || count >= q_len;
  const std::int64_t parts = all ? q_len : count;
  std::uint64_t state = 0x9e3779b97f4a7c15U;
  for (std::int64_t n = 0; n < parts; ++n) {
    const std::int64_t begin = q_len / parts * n + std::min(n, q_len % parts);
    const std::int64_t length = q_len / parts + (n < q_len % parts ? 1 : 0);
    state = state * 6364136223846793005U + 1442695040888963407U;
    std::int64_t inside =
        static_cast<std::int64_t>((state >> 33) % static_cast<std::uint64_t>(length));
    if (n == 0) inside = 0;
    if (n == parts - 1 && parts > 1) inside = length - 1;
    rows.push_back(begin + inside);
  }
  return rows;
}

CheckResult check_attention(const TensorView& q, const TensorView& k, const TensorView& v,
                            const AttentionOptions& options, const TensorView& out,
                            const TensorView& lse, bool bf16_probabilities,
                            std::int64_t rows_per_head) {
  const Oracle oracle(q, k, v, options);
  Checker checker(check_options(oracle, out.dtype, bf16_probabilities));
  for (std::int64_t b = 0; b < oracle.batch(); ++b) {
    for (std::int64_t h = 0; h < oracle.num_heads(); ++h) {
      for (const std::int64_t i : sampled_rows(oracle.q_len(), rows_per_head)) {
        checker.add(oracle, {b, i, h}, out, lse);
      }
    }
  }
  return checker.result();
}

}  // namespace reference
}  // namespace v1
}  // namespace annulus
