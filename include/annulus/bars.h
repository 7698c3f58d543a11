// The numeric bars as code: which error of a forward pass is rounding, and which is a bug. Tests,
// the command line's check and the benchmarks all ask here, so that they cannot disagree.
//
// The bars compare with three things, each computed from the same inputs, row by row:
//   exact      the oracle in double precision
//   rounding   the error of the exact result rounded once to the output's dtype
//   naive      the error of the straightforward implementation in float32, or in the output's dtype
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "annulus/attention.h"
#include "annulus/mask.h"
#include "annulus/reference.h"
#include "annulus/tensor.h"

namespace annulus {
inline namespace v1 {
namespace reference {

struct RowIndex {
  std::int64_t batch = 0;
  std::int64_t query = 0;
  std::int64_t head = 0;
};

// What the formula reads beside q, k and v for one visible pair.
struct PairInputs {
  double bias = 0;
  bool kept = true;  // not dropped
};

struct SinkInput {
  double value = 0;
  std::int64_t index = 0;  // in softmax_aux, row-major
};

// What the formula reads beside q, k and v for one row.
struct RowInputs {
  std::vector<std::int64_t> keys;  // visible, rising
  std::vector<double> bias;        // one per visible key, or empty
  std::vector<std::uint8_t> kept;  // one per visible key, 0 if dropped; empty without dropout
  std::vector<double> sinks;       // without those that are -inf
};

// The oracle over one set of arguments. Asks the mask builder once per head, here; the views must
// outlive the oracle. Const calls may run side by side. Throws InvalidArgument.
class Oracle {
 public:
  Oracle(const TensorView& q, const TensorView& k, const TensorView& v, AttentionOptions options);

  [[nodiscard]] Row row(RowIndex at) const;
  [[nodiscard]] RowInputs inputs(RowIndex at) const;
  // Nothing if the row does not see the key.
  [[nodiscard]] std::optional<PairInputs> pair(RowIndex at, std::int64_t key) const;
  [[nodiscard]] bool sees_a_key(RowIndex at) const;
  // Without those that are -inf.
  [[nodiscard]] std::vector<SinkInput> sinks(std::int64_t head) const;

  [[nodiscard]] const AttentionOptions& options() const { return options_; }
  [[nodiscard]] double softmax_scale() const { return softmax_scale_; }
  [[nodiscard]] std::int64_t batch() const { return q_.shape[0]; }
  [[nodiscard]] std::int64_t q_len() const { return q_.shape[1]; }
  [[nodiscard]] std::int64_t kv_len() const { return k_.shape[1]; }
  [[nodiscard]] std::int64_t num_heads() const { return q_.shape[2]; }
  [[nodiscard]] std::int64_t num_kv_heads() const { return k_.shape[2]; }
  [[nodiscard]] std::int64_t kv_head(std::int64_t head) const;
  [[nodiscard]] std::int64_t head_dim() const { return q_.shape[3]; }
  [[nodiscard]] std::int64_t v_head_dim() const { return v_.shape[3]; }
  [[nodiscard]] DType dtype() const { return q_.dtype; }

  // Vectors of the tensors as numbers. `head` is the query head.
  void load_query(RowIndex at, std::span<double> to) const;
  void load_key(RowIndex at, std::int64_t key, std::span<double> to) const;
  void load_value(RowIndex at, std::int64_t key, std::span<double> to) const;

 private:
  [[nodiscard]] bool visible(RowIndex at, std::int64_t key) const;
  [[nodiscard]] bool visible_by_position(std::int64_t query, std::int64_t key) const;
  [[nodiscard]] bool visible_by_segment(RowIndex at, std::int64_t key) const;
  [[nodiscard]] bool kept(RowIndex at, std::int64_t key) const;
  void add_values(RowIndex at, const RowInputs& inputs, std::span<const double> p, Row& row) const;

  TensorView q_;
  TensorView k_;
  TensorView v_;
  AttentionOptions options_;
  double softmax_scale_ = 1;
  std::vector<Mask> masks_;  // one per query head, or none
};

// A row of a naive implementation, in the arithmetic it stands for.
struct NaiveRow {
  std::vector<float> out;  // [v_head_dim]
  float lse = 0;
};

// float32: scores, softmax, then values; one float32 accumulator per element, keys in order, no
// FMA. bfloat16 and float16: the same, but what a straightforward program stores between its steps
// is rounded to the dtype: the dot product (accumulated in float32), the score after each of scale,
// cap and bias, the normalized probability, and the output.
NaiveRow naive_row(const Oracle& oracle, RowIndex at, DType arithmetic);

struct CheckOptions {
  DType out_dtype = DType::kFloat32;
  // The implementation rounds probabilities to bfloat16 before it multiplies them with v.
  bool bf16_probabilities = false;
  // The bars to the letter. They compare largest errors, and among few rows these are a matter of
  // luck, so that right programs miss them in one case of thirty; by default chance_error() is
  // allowed for. Ask for strict with thousands of rows.
  bool strict = false;
  // Terms of the bound per element; check_options() takes them from a call.
  std::int64_t head_dim = 0;
  double softmax_scale = 1;
  bool capped = false;
  bool biased = false;
  bool dropout = false;
};

CheckOptions check_options(const Oracle& oracle, DType out_dtype, bool bf16_probabilities);

// Bar N5: the largest error that rounding can explain in element d,
//   u_out |O| + (2 g(n) scale |q| max|k| + g(N) + 8 u) sum p|v| + u_p (sum p|v| + |O|),
//   g(n) = n u / (1 - n u),
// with n = head_dim + 4: the scale's rounding, its product and the subtraction of the row's maximum
// (up to twice the score) are roundings of the score as well. N counts visible keys and sinks. Cap,
// bias and sinks add 2 c u max|score|: c = 8 for a cap (tanh within 4 ulp, three products), 3 for a
// bias and 3 for sinks (one sum, one subtraction of up to twice the score). Dropout adds 2 u: 1 /
// (1 - dropout_prob), made in double and rounded, and its product.
// Rounded p, p (1 + e) with |e| <= u_p, are divided by their own sum, 1 + mean e times the exact
// one: sum p (e - mean e) v is at most u_p (sum p|v| + |O|). With two keys of like weight and
// values of opposite sign it comes close. Last, 2^-80 max |v| per key: below that share of a row's
// largest weight an online softmax may lose one, which shows only if dropout takes out the others.
double element_bound(const Row& exact, std::size_t d, const CheckOptions& options);

// Standard deviation of element d's error in an implementation as good as the bars ask, from
// roundings that are independent of each other. bf16 probabilities: a relative error of at most
// 2^-8 per weight, 0.42 of that on average over a binade. float32: 2 u sum p|v| for the sums, and
// 2 u max|score| per weight.
double chance_error(const Row& exact, std::size_t d, const CheckOptions& options);

struct CheckResult {
  std::int64_t rows = 0;
  double max_abs_err = 0;
  double rms_err = 0;
  double rounding_max = 0;  // of the exact result rounded once to the dtype that the bars refer to
  double rounding_rms = 0;
  double lse_max_err = 0;
  // Of the naive implementation in the dtype that the bars refer to; NaN if not computed.
  double naive_max_err = std::numeric_limits<double>::quiet_NaN();
  double naive_lse_max_err = std::numeric_limits<double>::quiet_NaN();  // in float32
  double bound_ratio = 0;  // largest error / element_bound
  bool passed = true;
  std::string verdict;  // "passed", or every bar that was missed, with numbers
};

// Collects rows and judges them together.
//
//   out bf16, f16                  N1, N6 against rounding to that dtype, and naive same-dtype
//   out float32                    N3 against naive float32
//   out float32, bf16_probabilities   N1, N6 as if out were bfloat16: rounding p is like rounding
//   out lse, always                    4e-6 max(1, |lse|) + naive float32's own error every element
//   N5, NaN and Inf where the oracle has them, 0 without a key
//
// The naive comparisons need naive rows for every row; where some are missing they are left out.
class Checker {
 public:
  struct Naive {
    std::optional<NaiveRow> float32;
    std::optional<NaiveRow> same_dtype;
  };

  explicit Checker(CheckOptions options) : options_(options) {}

  // `out` holds the computed row (bf16 and f16 as the floats they stand for), `lse` is absent if
  // the call returned none.
  void add(const Row& exact, std::span<const float> out, std::optional<float> lse,
           const Naive& naive, RowIndex at = {});
  // Row `at` of computed tensors, against all of exact, rounding and naive. `lse` may be empty.
  void add(const Oracle& oracle, RowIndex at, const TensorView& out, const TensorView& lse);

  [[nodiscard]] CheckResult result() const;

 private:
  // Largest and squared errors.
  struct Errors {
    double max = 0;
    double squares = 0;
    std::int64_t rows = 0;
    void add(double error);
  };

  [[nodiscard]] DType rounding_dtype() const;
  [[nodiscard]] bool judged_by_rounding() const;
  [[nodiscard]] double few_rows() const;
  void add_element(const Row& exact, std::size_t d, double computed, RowIndex at);
  void add_lse(const Row& exact, float lse, RowIndex at);
  void add_naive(const Row& exact, const Naive& naive);
  void mismatch(const std::string& what, RowIndex at, double expected, double found);
  void judge_rounding(CheckResult& result) const;
  void judge_float32(CheckResult& result) const;
  void judge_everything_else(CheckResult& result) const;

  CheckOptions options_;
  Errors error_;
  Errors chance_;
  Errors rounding_;
  Errors naive_;  // same dtype as the bars refer to
  Errors naive_float32_;
  double naive_lse_max_ = 0;
  std::int64_t elements_ = 0;
  double max_abs_out_ = 0;
  double out_squares_ = 0;
  double max_abs_v_ = 0;
  double lse_max_ = 0;
  double lse_excess_ = -std::numeric_limits<double>::infinity();  // error - 4e-6 max(1, |lse|)
  double bound_ratio_ = 0;
  std::string bound_worst_;
  std::int64_t mismatches_ = 0;
  std::string first_mismatch_;
};

// Rows 0 .. q_len - 1 if `count` is 0 or not below q_len; else `count` of them, the first and the
// last among them, the others one from each of equal parts. The same for every call.
std::vector<std::int64_t> sampled_rows(std::int64_t q_len, std::int64_t count);

// Checks `rows_per_head` sampled rows (0: all) of every batch row and head.
CheckResult check_attention(const TensorView& q, const TensorView& k, const TensorView& v,
                            const AttentionOptions& options, const TensorView& out,
                            const TensorView& lse, bool bf16_probabilities,
                            std::int64_t rows_per_head = 0);

}  // namespace reference
}  // namespace v1
}  // namespace annulus
