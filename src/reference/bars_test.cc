#include "annulus/bars.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "base/half.h"

namespace annulus {
namespace {

using reference::CheckResult;
using reference::NaiveRow;
using reference::Oracle;
using reference::RowIndex;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

float stored(DType dtype, double x) {
  std::uint32_t bits = 0;
  store_element(dtype, &bits, x);
  return static_cast<float>(load_element(dtype, &bits));
}

// Normal numbers of a dtype, kept as floats.
struct Tensor {
  Tensor(std::array<std::int64_t, 4> extents, DType dtype, unsigned seed, float size = 1)
      : shape(extents) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const std::int64_t n = shape[0] * shape[1] * shape[2] * shape[3];
    for (std::int64_t i = 0; i < n; ++i) values.push_back(stored(dtype, size * normal(random)));
  }
  [[nodiscard]] TensorView view() const {
    return {values.data(), DType::kFloat32, shape, dense_strides(shape)};
  }

  std::array<std::int64_t, 4> shape;
  std::vector<float> values;
};

// One head; the query rows are what the bars judge together.
struct Problem {
  explicit Problem(DType dtype, std::int64_t q_len = 1000, float logits = 1)
      : q({1, q_len, 1, 32}, dtype, 1, logits),
        k({1, 64, 1, 32}, dtype, 2),
        v({1, 64, 1, 24}, dtype, 3) {}
  [[nodiscard]] Oracle oracle(const AttentionOptions& options = {}) const {
    return {q.view(), k.view(), v.view(), options};
  }

  Tensor q, k, v;
};

// What a sound kernel computes: tiles of 16 keys, running maximum and sum, float32, one rounding of
// the output; probabilities optionally in bfloat16.
NaiveRow tiled_row(const Oracle& oracle, RowIndex at, DType out_dtype, bool bf16_probabilities) {
  const std::vector<std::int64_t> keys = oracle.inputs(at).keys;
  std::vector<double> q(static_cast<std::size_t>(oracle.head_dim()));
  std::vector<double> k(q.size());
  std::vector<double> v(static_cast<std::size_t>(oracle.v_head_dim()));
  oracle.load_query(at, q);
  NaiveRow row{.out = std::vector<float>(v.size()), .lse = -kInf};
  float max = -kInf;
  float sum = 0;
  for (std::size_t begin = 0; begin < keys.size(); begin += 16) {
    const std::size_t end = std::min(keys.size(), begin + 16);
    std::vector<float> scores;
    for (std::size_t n = begin; n < end; ++n) {
      oracle.load_key(at, keys[n], k);
      float lanes[4] = {};
      for (std::size_t d = 0; d < k.size(); ++d) lanes[d % 4] += static_cast<float>(q[d] * k[d]);
      scores.push_back((lanes[0] + lanes[1] + (lanes[2] + lanes[3])) *
                       static_cast<float>(oracle.softmax_scale()));
    }
    const float before = max;
    for (const float s : scores) max = std::max(max, s);
    sum *= std::exp(before - max);
    for (float& x : row.out) x *= std::exp(before - max);
    for (std::size_t n = begin; n < end; ++n) {
      float p = std::exp(scores[n - begin] - max);
      sum += p;
      if (bf16_probabilities) p = stored(DType::kBFloat16, p);
      oracle.load_value(at, keys[n], v);
      for (std::size_t d = 0; d < v.size(); ++d) row.out[d] += p * static_cast<float>(v[d]);
    }
  }
  if (sum > 0) row.lse = max + std::log(sum);
  for (float& x : row.out) x = sum > 0 ? stored(out_dtype, x / sum) : 0;
  return row;
}

struct Judged {
  DType out = DType::kBFloat16;
  bool bf16_probabilities = false;
  bool strict = false;
  bool with_naive = true;
};

// Judges `compute` on every row against `truth`.
CheckResult judge(const Oracle& truth, const Judged& how,
                  const std::function<NaiveRow(RowIndex)>& compute) {
  reference::CheckOptions options = check_options(truth, how.out, how.bf16_probabilities);
  options.strict = how.strict;
  reference::Checker checker(options);
  for (std::int64_t i = 0; i < truth.q_len(); ++i) {
    const RowIndex at{0, i, 0};
    const NaiveRow row = compute(at);
    reference::Checker::Naive naive;
    if (how.with_naive) {
      naive.float32 = naive_row(truth, at, DType::kFloat32);
      const bool as_bf16 = how.out == DType::kFloat32 && how.bf16_probabilities;
      naive.same_dtype = naive_row(truth, at, as_bf16 ? DType::kBFloat16 : how.out);
    }
    checker.add(truth.row(at), row.out, row.lse, naive, at);
  }
  return checker.result();
}

CheckResult judge_tiled(const Oracle& truth, const Oracle& computed, const Judged& how) {
  return judge(truth, how, [&](RowIndex at) {
    return tiled_row(computed, at, how.out, how.bf16_probabilities);
  });
}

// Applies a mistake to the rows of a sound bf16 kernel.
CheckResult judge_mistake(const std::function<void(const Oracle&, RowIndex, NaiveRow&)>& mistake,
                          DType out = DType::kBFloat16) {
  const Problem problem(out);
  const Oracle oracle = problem.oracle();
  return judge(oracle, {.out = out}, [&](RowIndex at) {
    NaiveRow row = tiled_row(oracle, at, out, false);
    mistake(oracle, at, row);
    return row;
  });
}

bool mentions(const CheckResult& result, const char* bar) {
  return result.verdict.find(bar) != std::string::npos;
}

TEST(Bars, SoundKernelsPassToTheLetter) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const Problem problem(dtype);
    const Oracle oracle = problem.oracle({.causal = true});
    const CheckResult result = judge_tiled(oracle, oracle, {.out = dtype, .strict = true});
    EXPECT_TRUE(result.passed) << name(dtype) << ": " << result.verdict;
    EXPECT_EQ(result.verdict, "passed");
    EXPECT_EQ(result.rows, 1000);
    EXPECT_LE(result.bound_ratio, 1);
    EXPECT_GT(result.max_abs_err, 0);
    EXPECT_GE(result.naive_max_err, result.rounding_max);
  }
}

TEST(Bars, Bf16ProbabilitiesHaveBarsOfTheirOwn) {
  const Problem problem(DType::kBFloat16);
  const Oracle oracle = problem.oracle();
  for (const DType out : {DType::kBFloat16, DType::kFloat32}) {
    const auto compute = [&](RowIndex at) { return tiled_row(oracle, at, out, true); };
    const Judged honest{.out = out, .bf16_probabilities = true, .strict = true};
    const CheckResult passed = judge(oracle, honest, compute);
    EXPECT_TRUE(passed.passed) << passed.verdict;
    // Who claims float32 probabilities is held to them.
    const CheckResult failed = judge(oracle, {.out = out}, compute);
    EXPECT_FALSE(failed.passed);
    EXPECT_TRUE(mentions(failed, "N6")) << failed.verdict;
  }
}

TEST(Bars, LargeLogitsPass) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const Problem problem(dtype, 300, 16);
    const Oracle oracle = problem.oracle();
    const CheckResult result = judge_tiled(oracle, oracle, {.out = dtype});
    EXPECT_TRUE(result.passed) << result.verdict;
  }
}

TEST(Bars, NaiveFloat32PassesAsItself) {
  const Problem problem(DType::kFloat32, 50);
  const Oracle oracle = problem.oracle();
  const CheckResult result =
      judge(oracle, {.out = DType::kFloat32, .strict = true},
            [&](RowIndex at) { return naive_row(oracle, at, DType::kFloat32); });
  EXPECT_TRUE(result.passed) << result.verdict;
  EXPECT_EQ(result.max_abs_err, result.naive_max_err);
  EXPECT_EQ(result.lse_max_err, result.naive_lse_max_err);
}

TEST(Bars, BoundPerElementStandsWithoutNaiveRows) {
  const Problem problem(DType::kFloat32, 50);
  const Oracle oracle = problem.oracle();
  const Judged how{.out = DType::kFloat32, .with_naive = false};
  const CheckResult result = judge_tiled(oracle, oracle, how);
  EXPECT_TRUE(result.passed) << result.verdict;
  EXPECT_TRUE(std::isnan(result.naive_max_err));
  const CheckResult wrong = judge(
      oracle, how, [&](RowIndex at) { return tiled_row(oracle, at, DType::kBFloat16, false); });
  EXPECT_FALSE(wrong.passed);
  EXPECT_TRUE(mentions(wrong, "N5")) << wrong.verdict;
}

TEST(Bars, FewRowsAreNoLottery) {
  for (unsigned seed = 0; seed < 200; ++seed) {
    const bool bf16 = seed % 2 == 1;
    const DType dtype = bf16 ? DType::kBFloat16 : DType::kFloat32;
    const std::int64_t kv_len = 1 + seed % 7;
    const Tensor q({1, 2, 1, 8}, dtype, 3 * seed, 4);
    const Tensor k({1, kv_len, 1, 8}, dtype, 3 * seed + 1);
    const Tensor v({1, kv_len, 1, 3}, dtype, 3 * seed + 2);
    const Oracle oracle(q.view(), k.view(), v.view(), {});
    const CheckResult result =
        judge_tiled(oracle, oracle, {.out = dtype, .bf16_probabilities = bf16});
    EXPECT_TRUE(result.passed) << "seed " << seed << ": " << result.verdict;
  }
}

TEST(BarsCatch, WindowOffByOne) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const Problem problem(dtype, 64);
    const Oracle truth = problem.oracle({.sliding_window = {20, 0}});
    const Oracle computed = problem.oracle({.sliding_window = {19, 0}});
    EXPECT_FALSE(judge_tiled(truth, computed, {.out = dtype}).passed);
  }
}

TEST(BarsCatch, CapThatIsIgnored) {
  const Problem problem(DType::kBFloat16, 64);
  const Oracle truth = problem.oracle({.logits_soft_cap = 5});
  EXPECT_FALSE(judge_tiled(truth, problem.oracle(), {}).passed);
}

TEST(BarsCatch, Bf16Truncation) {
  const Problem problem(DType::kBFloat16);
  const Oracle oracle = problem.oracle();
  for (const bool bf16_probabilities : {false, true}) {
    const CheckResult result =
        judge(oracle, {.bf16_probabilities = bf16_probabilities}, [&](RowIndex at) {
          NaiveRow row = tiled_row(oracle, at, DType::kFloat32, bf16_probabilities);
          for (float& x : row.out) {
            x = std::bit_cast<float>(std::bit_cast<std::uint32_t>(x) & 0xffff0000U);
          }
          return row;
        });
    EXPECT_FALSE(result.passed);
    EXPECT_TRUE(mentions(result, "N6")) << result.verdict;
  }
}

TEST(BarsCatch, LseInBaseTwo) {
  const CheckResult result =
      judge_mistake([](const Oracle&, RowIndex, NaiveRow& row) { row.lse *= 1.442695F; });
  EXPECT_FALSE(result.passed);
  EXPECT_TRUE(mentions(result, "lse")) << result.verdict;
}

TEST(BarsCatch, OneWrongRowAmongAThousand) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const CheckResult result = judge_mistake(
        [&](const Oracle& oracle, RowIndex at, NaiveRow& row) {
          if (at.query == 617) row = tiled_row(oracle, {0, 616, 0}, dtype, false);
        },
        dtype);
    EXPECT_FALSE(result.passed);
    EXPECT_TRUE(mentions(result, "query 617")) << result.verdict;
  }
}

TEST(BarsCatch, OneSlightlyWrongElement) {
  const CheckResult result = judge_mistake([](const Oracle&, RowIndex at, NaiveRow& row) {
    if (at.query == 3) row.out[5] += 2 * std::abs(row.out[5]) / 128;
  });
  EXPECT_FALSE(result.passed);
  EXPECT_TRUE(mentions(result, "out[5] of row (batch 0, query 3, head 0)")) << result.verdict;
}

TEST(BarsCatch, NaNThatAppears) {
  const CheckResult result = judge_mistake([](const Oracle&, RowIndex at, NaiveRow& row) {
    if (at.query == 9) row.out[2] = kNaN;
  });
  EXPECT_FALSE(result.passed);
  EXPECT_TRUE(mentions(result, "out[2] of row (batch 0, query 9, head 0) is nan"))
      << result.verdict;
}

TEST(BarsCatch, NaNThatDisappears) {
  Problem problem(DType::kBFloat16, 20);
  problem.v.values[7] = kNaN;  // key 0, element 7
  const Oracle oracle = problem.oracle();
  const auto sound = [&](RowIndex at) { return tiled_row(oracle, at, DType::kBFloat16, false); };
  EXPECT_TRUE(judge(oracle, {}, sound).passed) << judge(oracle, {}, sound).verdict;
  const CheckResult result = judge(oracle, {}, [&](RowIndex at) {
    NaiveRow row = sound(at);
    if (at.query == 4) row.out[7] = 0;
    return row;
  });
  EXPECT_FALSE(result.passed);
  EXPECT_TRUE(mentions(result, "expected nan")) << result.verdict;
}

TEST(BarsCatch, RowsWithoutAKeyThatAreNotZero) {
  const Problem problem(DType::kFloat32, 70);  // 64 keys: the first six causal rows see none
  const Oracle oracle = problem.oracle({.causal = true});
  const Judged how{.out = DType::kFloat32};
  EXPECT_TRUE(judge_tiled(oracle, oracle, how).passed);
  for (const bool wrong_lse : {false, true}) {
    const CheckResult result = judge(oracle, how, [&](RowIndex at) {
      NaiveRow row = tiled_row(oracle, at, DType::kFloat32, false);
      if (at.query == 5 && wrong_lse) row.lse = -1e30F;
      if (at.query == 5 && !wrong_lse) row.out[0] = 1e-30F;
      return row;
    });
    EXPECT_FALSE(result.passed);
    EXPECT_TRUE(mentions(result, "query 5")) << result.verdict;
  }
}

TEST(NaiveRows, Bf16IsWorseThanFloat32) {
  const Problem problem(DType::kBFloat16, 1);
  const Oracle oracle = problem.oracle();
  const reference::Row exact = oracle.row({0, 0, 0});
  const auto error = [&](DType dtype) {
    const NaiveRow row = naive_row(oracle, {0, 0, 0}, dtype);
    double largest = 0;
    for (std::size_t d = 0; d < row.out.size(); ++d) {
      largest = std::max(largest, std::abs(static_cast<double>(row.out[d]) - exact.out[d]));
    }
    return largest;
  };
  EXPECT_LT(error(DType::kFloat32), 1e-6);
  EXPECT_LT(error(DType::kFloat16), 2e-3);
  EXPECT_GT(error(DType::kBFloat16), error(DType::kFloat16));
  EXPECT_LT(error(DType::kBFloat16), 2e-2);
}

TEST(NaiveRows, SinksCapAndBiasCountAsInTheOracle) {
  const Problem problem(DType::kFloat32, 40);
  const std::vector<float> sinks = {1, 2, -kInf};
  const Tensor bias({1, 1, 40, 64}, DType::kFloat32, 9);
  const Oracle oracle = problem.oracle(
      {.logits_soft_cap = 3,
       .softmax_aux = {sinks.data(), DType::kFloat32, {1, 3, 1, 1}, {3, 1, 1, 1}},
       .bias = {bias.values.data(), DType::kFloat32, bias.shape, row_major_strides(bias.shape)}});
  for (std::int64_t i = 0; i < 40; ++i) {
    const reference::Row exact = oracle.row({0, i, 0});
    const NaiveRow naive = naive_row(oracle, {0, i, 0}, DType::kFloat32);
    EXPECT_EQ(exact.sinks, 2);
    EXPECT_NEAR(naive.lse, exact.lse, 2e-6);
    for (std::size_t d = 0; d < exact.out.size(); ++d) {
      EXPECT_NEAR(naive.out[d], exact.out[d], 1e-6);
      EXPECT_LE(std::abs(static_cast<double>(naive.out[d]) - exact.out[d]),
                element_bound(exact, d, check_options(oracle, DType::kFloat32, false)));
    }
  }
}

TEST(ElementBound, IsTheFormula) {
  reference::Row row;
  row.out = {0.5};
  row.abs_out = {2};
  row.visible = 10;
  row.q_norm = 3;
  row.max_k_norm = 4;
  row.max_abs_score = 1;
  reference::CheckOptions options{.head_dim = 16, .softmax_scale = 0.25};
  const double u = std::ldexp(1.0, -24);
  const auto g = [&](double n) { return n * u / (1 - n * u); };
  EXPECT_DOUBLE_EQ(element_bound(row, 0, options),
                   u * 0.5 + (2 * g(20) * 0.25 * 12 + g(10) + 8 * u) * 2);
  options.out_dtype = DType::kBFloat16;
  options.bf16_probabilities = true;
  EXPECT_NEAR(element_bound(row, 0, options), 0.5 / 256 + (2.0 + 0.5) / 256, 2e-5);
  row.sinks = 1;
  options = {.head_dim = 16, .softmax_scale = 0.25, .capped = true, .biased = true};
  EXPECT_DOUBLE_EQ(element_bound(row, 0, options),
                   u * 0.5 + (2 * g(20) * 0.25 * 12 + 28 * u + g(11) + 8 * u) * 2);
}

TEST(SampledRows, AreSortedDistinctAndHoldBothEnds) {
  EXPECT_TRUE(reference::sampled_rows(0, 5).empty());
  EXPECT_EQ(reference::sampled_rows(3, 0), (std::vector<std::int64_t>{0, 1, 2}));
  EXPECT_EQ(reference::sampled_rows(3, 3), (std::vector<std::int64_t>{0, 1, 2}));
  EXPECT_EQ(reference::sampled_rows(9, 1), (std::vector<std::int64_t>{0}));
  const std::vector<std::int64_t> rows = reference::sampled_rows(1000, 7);
  EXPECT_EQ(rows.size(), 7U);
  EXPECT_EQ(rows.front(), 0);
  EXPECT_EQ(rows.back(), 999);
  for (std::size_t n = 1; n < rows.size(); ++n) EXPECT_LT(rows[n - 1], rows[n]);
  EXPECT_EQ(rows, reference::sampled_rows(1000, 7));
}

TEST(CheckAttention, WalksEveryBatchRowAndHead) {
  const Tensor q({2, 5, 4, 8}, DType::kBFloat16, 1);
  const Tensor k({2, 7, 2, 8}, DType::kBFloat16, 2);
  const Tensor v({2, 7, 2, 6}, DType::kBFloat16, 3);
  const AttentionOptions options{.causal = true};
  std::vector<double> out;
  std::vector<double> lse;
  reference::attention(q.view(), k.view(), v.view(), options, out, lse);
  std::vector<std::uint16_t> bits(out.size());
  for (std::size_t n = 0; n < out.size(); ++n) {
    store_element(DType::kBFloat16, &bits[n], out[n]);
  }
  const std::vector<float> lse32(lse.begin(), lse.end());
  const std::array<std::int64_t, 4> shape = {2, 5, 4, 6};
  const TensorView out_view = {bits.data(), DType::kBFloat16, shape, dense_strides(shape)};
  const TensorView lse_view = {lse32.data(), DType::kFloat32, {2, 5, 4, 1}, {20, 4, 1, 1}};
  const auto check = [&](const TensorView& lse_given, std::int64_t rows_per_head) {
    return reference::check_attention(q.view(), k.view(), v.view(), options, out_view, lse_given,
                                      false, rows_per_head);
  };
  EXPECT_EQ(check(lse_view, 0).rows, 40);
  EXPECT_TRUE(check(lse_view, 0).passed) << check(lse_view, 0).verdict;
  EXPECT_EQ(check({}, 2).rows, 16);
  EXPECT_TRUE(check({}, 2).passed);
  bits.back() = static_cast<std::uint16_t>(bits.back() ^ 0x8000U);
  EXPECT_FALSE(check({}, 2).passed);
}

}  // namespace
}  // namespace annulus
