#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "annulus/error.h"
#include "annulus/reference.h"

namespace annulus {
namespace {

using reference::DenseGradients;
using Shape = std::array<std::int64_t, 4>;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

template <class T>
TensorView view(const std::vector<T>& x, const Shape& shape, DType dtype = DType::kFloat32) {
  return {x.data(), dtype, shape, row_major_strides(shape)};
}

// Multiples of 2^-10, so that steps of 2^-6 are exact in float32.
std::vector<float> normals(const Shape& shape, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3]));
  for (float& element : x) element = std::round(normal(random) * 1024) / 1024;
  return x;
}

struct Sizes {
  std::int64_t batch = 2, q_len = 5, kv_len = 5, heads = 2, kv_heads = 2, dim = 3, v_dim = 3;
};

struct Problem {
  explicit Problem(Sizes sizes = {})
      : n(sizes),
        q(normals(q_shape(), 1)),
        k(normals(k_shape(), 2)),
        v(normals(v_shape(), 3)),
        dout(normals(out_shape(), 4)) {}

  [[nodiscard]] Shape q_shape() const { return {n.batch, n.q_len, n.heads, n.dim}; }
  [[nodiscard]] Shape k_shape() const { return {n.batch, n.kv_len, n.kv_heads, n.dim}; }
  [[nodiscard]] Shape v_shape() const { return {n.batch, n.kv_len, n.kv_heads, n.v_dim}; }
  [[nodiscard]] Shape lse_shape() const { return {n.batch, n.q_len, n.heads, 1}; }
  [[nodiscard]] Shape out_shape() const { return {n.batch, n.q_len, n.heads, n.v_dim}; }

  Problem& with_sinks(std::int64_t rows, std::int64_t columns, std::vector<float> values) {
    aux = std::move(values);
    options.softmax_aux = {aux.data(),
                           DType::kFloat32,
                           {rows, columns, 1, 1},
                           {std::max<std::int64_t>(columns, 1), columns > 0 ? 1 : 0, 0, 0}};
    return *this;
  }
  Problem& with_bias(std::int64_t batch, std::int64_t heads) {
    const Shape shape{batch, heads, n.q_len, n.kv_len};
    bias = normals(shape, 5);
    options.bias = view(bias, shape);
    return *this;
  }

  Problem& with_dlse() {
    dlse = normals(lse_shape(), 6);
    return *this;
  }

  [[nodiscard]] std::vector<double> forward() const {
    std::vector<double> out;
    reference::attention(view(q, q_shape()), view(k, k_shape()), view(v, v_shape()), options, out,
                         lse_);
    return out;
  }
  [[nodiscard]] double loss() const {
    const std::vector<double> out = forward();
    double sum = 0;
    for (std::size_t i = 0; i < out.size(); ++i) sum += out[i] * static_cast<double>(dout[i]);
    // [batch, q_len, heads] as dlse; -inf stays -inf whatever its inputs do.
    for (std::size_t i = 0; i < dlse.size(); ++i)
      if (std::isfinite(lse_[i])) sum += lse_[i] * static_cast<double>(dlse[i]);
    return sum;
  }
  [[nodiscard]] DenseGradients backward(const TensorView& out = {}) const {
    return reference::attention_backward(view(dout, out_shape()), view(q, q_shape()),
                                         view(k, k_shape()), view(v, v_shape()), out, options,
                                         dlse.empty() ? TensorView{} : view(dlse, lse_shape()));
  }

  Sizes n;
  std::vector<float> q, k, v, dout, aux, bias, dlse;
  AttentionOptions options;

 private:
  mutable std::vector<double> lse_;
};

// Central differences of sixth order: the truncation, 2^-36 / 140 of the seventh derivative, and
// the oracle's own rounding, 1e-16 / 2^-6, are both far below the tolerance.
double numeric_derivative(Problem& problem, float& x) {
  constexpr float kStep = 0x1p-6F;
  const float before = x;
  const auto difference = [&](float steps) {
    x = before + steps * kStep;
    const double above = problem.loss();
    x = before - steps * kStep;
    const double below = problem.loss();
    x = before;
    return above - below;
  };
  return (45 * difference(1) - 9 * difference(2) + difference(3)) / (60 * 0x1p-6);
}

void expect_derivatives(Problem& problem, std::vector<float>& primal,
                        const std::vector<double>& gradient, const std::string& what) {
  ASSERT_EQ(primal.size(), gradient.size()) << what;
  double largest = 0;
  for (const double x : gradient) largest = std::max(largest, std::abs(x));
  for (std::size_t i = 0; i < primal.size(); ++i) {
    ASSERT_NEAR(gradient[i], numeric_derivative(problem, primal[i]), 1e-9 * std::max(1.0, largest))
        << what << "[" << i << "]";
  }
}

// `problem` must own the arrays that its options refer to.
void expect_gradients(Problem& problem, const std::string& name) {
  const DenseGradients gradients = problem.backward();
  expect_derivatives(problem, problem.q, gradients.dq, name + " dq");
  expect_derivatives(problem, problem.k, gradients.dk, name + " dk");
  expect_derivatives(problem, problem.v, gradients.dv, name + " dv");
  expect_derivatives(problem, problem.aux, gradients.dsoftmax_aux, name + " dsoftmax_aux");
  expect_derivatives(problem, problem.bias, gradients.dbias, name + " dbias");
}

void expect_gradients(const AttentionOptions& options, const std::string& name,
                      const Sizes& sizes = {}) {
  Problem problem(sizes);
  problem.options = options;
  expect_gradients(problem, name);
}

TEST(Backward, PlainAndScaled) {
  expect_gradients({}, "plain");
  expect_gradients({.softmax_scale = 0.25}, "scale");
  expect_gradients({.softmax_scale = -0.75}, "negative scale");
  expect_gradients({.logits_soft_cap = 1.5}, "cap");
}

TEST(Backward, PositionalMasks) {
  const Sizes fewer{.q_len = 3, .kv_len = 7};
  const Sizes more{.q_len = 7, .kv_len = 3};
  for (const Sizes& sizes : {Sizes{}, fewer, more}) {
    for (const CausalAlignment at : {CausalAlignment::kBottomRight, CausalAlignment::kTopLeft}) {
      expect_gradients({.causal = true, .causal_alignment = at}, "causal", sizes);
      expect_gradients({.causal_alignment = at, .sliding_window = {1, 2}}, "window", sizes);
    }
    expect_gradients({.chunk_size = 2}, "chunk", sizes);
  }
}

TEST(Backward, MasksByData) {
  const std::vector<std::int32_t> ids = {-1, 4, 4, 5, 5, 4, 4, 4, -1, 5};
  const TensorView id_view = view(ids, {2, 5, 1, 1}, DType::kInt32);
  expect_gradients({.q_segment_ids = id_view, .padding_segment_id = -1}, "segments");
  const std::vector<std::int32_t> lengths = {3, 0};
  expect_gradients({.kv_lengths = view(lengths, {2, 1, 1, 1}, DType::kInt32)}, "lengths");
  std::vector<std::uint8_t> mask;
  for (int i = 0; i < 50; ++i) mask.push_back(i * i % 7 < 3 ? 1 : 0);
  expect_gradients({.attention_mask = view(mask, {1, 2, 5, 5}, DType::kBool)}, "mask");
  AttentionOptions built;
  built.mask_builder = [](auto, auto, auto, std::int64_t head, auto) {
    return head == 0 ? Mask::prefix(2) : Mask::full();
  };
  expect_gradients(built, "builder");
}

TEST(Backward, HeadsShareKeysAndWidthsDiffer) {
  expect_gradients({}, "gqa", {.heads = 4, .kv_heads = 2});
  expect_gradients({}, "mqa", {.heads = 3, .kv_heads = 1});
  expect_gradients({}, "wide v", {.dim = 2, .v_dim = 4});
}

TEST(Backward, BiasIsSummedOverWhatItIsBroadcastTo) {
  for (const std::int64_t batch : {1, 2}) {
    for (const std::int64_t heads : {1, 2}) {
      Problem problem;
      problem.with_bias(batch, heads);
      expect_gradients(problem, "bias");
      problem.options.logits_soft_cap = 2;
      expect_gradients(problem, "bias after cap");
    }
  }
}

TEST(Backward, SinksInEveryShape) {
  Problem per_head;
  expect_gradients(per_head.with_sinks(2, 0, {5, -1}), "per head");
  Problem shared;
  expect_gradients(shared.with_sinks(3, 0, {0.5F, -kInf, 5}), "shared");
  Problem several;
  expect_gradients(several.with_sinks(2, 3, {0.5F, -kInf, 5, 1, 2, -3}), "several");
  Problem blind({.q_len = 5, .kv_len = 2});
  blind.options.causal = true;
  expect_gradients(blind.with_sinks(2, 1, {0.5F, 1}), "rows without a key");
}

TEST(Backward, Dropout) {
  expect_gradients({.dropout_prob = 0.4, .dropout_seed = 11}, "dropout");
  expect_gradients({.causal = true, .dropout_prob = 0.4, .dropout_seed = 12}, "dropout",
                   {.q_len = 3});
}

TEST(Backward, OfLse) {
  Problem plain;
  expect_gradients(plain.with_dlse(), "plain");
  Problem capped({.q_len = 4, .kv_len = 6, .heads = 4, .kv_heads = 2, .v_dim = 2});
  capped.options = {.causal = true, .logits_soft_cap = 2, .dropout_prob = 0.4, .dropout_seed = 3};
  expect_gradients(capped.with_bias(1, 4).with_sinks(4, 1, {0.5F, 5, -1, 0}).with_dlse(), "capped");
  Problem blind({.q_len = 5, .kv_len = 2});
  blind.options.causal = true;
  expect_gradients(blind.with_sinks(2, 2, {0.5F, 1, -kInf, 2}).with_dlse(), "rows without a key");
  Problem nothing({.q_len = 5, .kv_len = 2});
  nothing.options.causal = true;
  expect_gradients(nothing.with_dlse(), "rows without anything");
}

TEST(Backward, EverythingTogether) {
  for (const std::uint64_t seed : {1, 2}) {
    Problem problem({.q_len = 6, .kv_len = 7, .heads = 4, .kv_heads = 2, .dim = 3, .v_dim = 2});
    const std::vector<std::int32_t> q_ids = {1, 1, 1, 2, 2, 0, 1, 2, 2, 2, 2, 2};
    const std::vector<std::int32_t> kv_ids = {1, 1, 1, 1, 2, 2, 0, 1, 2, 2, 2, 2, 2, 2};
    problem.options = {.causal = true,
                       .sliding_window = {4, -1},
                       .q_segment_ids = view(q_ids, {2, 6, 1, 1}, DType::kInt32),
                       .kv_segment_ids = view(kv_ids, {2, 7, 1, 1}, DType::kInt32),
                       .padding_segment_id = 0,
                       .softmax_scale = -0.8,
                       .logits_soft_cap = 2,
                       .dropout_prob = 0.3,
                       .dropout_seed = seed};
    problem.with_bias(1, 4).with_sinks(4, 2, {0, 1, 5, -kInf, -2, 2, 1, 1});
    expect_gradients(problem, "everything");
  }
}

double sum_abs(const std::vector<double>& x) {
  double sum = 0;
  for (const double element : x) sum += std::abs(element);
  return sum;
}

// Adding a constant to every key shifts all scores of a row alike: without sinks the softmax does
// not see it, so the gradient along that direction, the sum of dk over keys, is zero.
TEST(BackwardIdentities, DkSumsToZeroOverKeys) {
  Problem problem({.batch = 1, .heads = 1, .kv_heads = 1});
  problem.options.causal = true;
  const DenseGradients gradients = problem.backward();
  for (std::size_t d = 0; d < 3; ++d) {
    double sum = 0;
    for (std::size_t j = 0; j < 5; ++j) sum += gradients.dk[j * 3 + d];
    EXPECT_NEAR(sum, 0, 1e-14);
  }
}

TEST(BackwardIdentities, DbiasAndSinksSumToZeroOverARow) {
  Problem problem({.batch = 1, .q_len = 1, .heads = 1, .kv_heads = 1});
  problem.with_bias(1, 1).with_sinks(1, 2, {0.5F, 5});
  const DenseGradients gradients = problem.backward();
  double sum = gradients.dsoftmax_aux[0] + gradients.dsoftmax_aux[1];
  for (const double ds : gradients.dbias) sum += ds;
  EXPECT_NEAR(sum, 0, 1e-14);
}

TEST(BackwardIdentities, EqualValuesLeaveNoGradientOfTheScores) {
  Problem problem;
  problem.v.assign(problem.v.size(), 0.75F);
  const DenseGradients gradients = problem.backward();
  EXPECT_LT(sum_abs(gradients.dq) + sum_abs(gradients.dk), 1e-12);
  double sum_dv = 0;
  double sum_dout = 0;
  for (const double x : gradients.dv) sum_dv += x;
  for (const float x : problem.dout) sum_dout += static_cast<double>(x);
  EXPECT_NEAR(sum_dv, sum_dout, 1e-12);
}

TEST(BackwardIdentities, DeltaIsMadeOfTheGivenOut) {
  Problem problem;
  const std::vector<double> exact = problem.forward();
  std::vector<float> out(exact.begin(), exact.end());
  const DenseGradients own = problem.backward();
  const DenseGradients given = problem.backward(view(out, problem.out_shape()));
  for (std::size_t i = 0; i < own.dq.size(); ++i) EXPECT_NEAR(own.dq[i], given.dq[i], 1e-5);
  for (float& x : out) x += 1;
  EXPECT_GT(std::abs(problem.backward(view(out, problem.out_shape())).dk[0] - own.dk[0]), 1e-3);
}

// Rows 0 and 1 see nothing, key 2 is seen by row 4 only.
TEST(BackwardSpecialValues, WhatIsNotSeenNeverArrives) {
  const Sizes sizes{.batch = 1, .q_len = 5, .kv_len = 3, .heads = 1, .kv_heads = 1};
  Problem clean(sizes);
  clean.options.causal = true;
  clean.with_bias(1, 1).with_sinks(1, 0, {0.5F});
  Problem dirty = clean;
  dirty.options.bias.data = dirty.bias.data();
  dirty.options.softmax_aux.data = dirty.aux.data();
  const std::vector<double> exact = clean.forward();
  std::vector<float> out(exact.begin(), exact.end());
  for (std::size_t i = 0; i < 6; ++i)
    dirty.q[i] = dirty.dout[i] = out[i] = i % 2 == 0 ? kNaN : kInf;
  for (std::size_t i = 0; i < 9; ++i) dirty.bias[i] = i == 6 ? dirty.bias[i] : kNaN;
  const DenseGradients expected = clean.backward();
  const DenseGradients found = dirty.backward();
  EXPECT_EQ(expected.dq, found.dq);
  EXPECT_EQ(expected.dk, found.dk);
  EXPECT_EQ(expected.dv, found.dv);
  EXPECT_EQ(expected.dbias, found.dbias);
  EXPECT_EQ(expected.dsoftmax_aux, found.dsoftmax_aux);
  for (std::size_t i = 0; i < 6; ++i) EXPECT_EQ(found.dq[i], 0);
  EXPECT_TRUE(std::isfinite(sum_abs(dirty.backward(view(out, clean.out_shape())).dsoftmax_aux)));

  dirty.k[8] = dirty.v[8] = kNaN;
  const DenseGradients tail = dirty.backward();
  for (std::size_t i = 0; i < 12; ++i) EXPECT_EQ(tail.dq[i], expected.dq[i]);
  EXPECT_TRUE(std::isnan(tail.dq[12]));
}

TEST(BackwardSpecialValues, ADroppedValueMayBeNaN) {
  Problem problem({.batch = 1, .q_len = 1, .kv_len = 16, .heads = 1, .kv_heads = 1});
  problem.options.dropout_prob = 0.5;
  const DenseGradients expected = problem.backward();
  int dropped = 0;
  for (std::size_t j = 0; j < 16; ++j) {
    if (expected.dv[3 * j] != 0) continue;
    problem.v[3 * j] = kNaN;
    ++dropped;
  }
  ASSERT_GT(dropped, 0);
  const DenseGradients found = problem.backward();
  EXPECT_EQ(expected.dq, found.dq);
  EXPECT_EQ(expected.dk, found.dk);
  EXPECT_EQ(expected.dv, found.dv);
}

TEST(BackwardSpecialValues, HugeScoresKeepTheirDigits) {
  Problem problem({.batch = 1, .q_len = 1, .kv_len = 2, .heads = 1, .kv_heads = 1, .dim = 1});
  problem.q = {1e19F};
  problem.k = {1e19F, 1e19F};
  problem.options.softmax_scale = 1;
  const DenseGradients gradients = problem.backward();
  EXPECT_DOUBLE_EQ(gradients.dv[0], 0.5 * static_cast<double>(problem.dout[0]));
}

TEST(BackwardArguments, WhatDoesNotFitIsRefused) {
  const Problem problem;
  const TensorView q = view(problem.q, problem.q_shape());
  const std::vector<float> other(1000);
  EXPECT_THROW((void)reference::attention_backward(view(other, {2, 4, 2, 3}), q, q, q, {}, {}),
               InvalidArgument);
  EXPECT_THROW((void)reference::attention_backward(q, q, q, q, view(other, {2, 5, 2, 4}), {}),
               InvalidArgument);
  EXPECT_THROW((void)reference::attention_backward({}, q, q, q, {}, {}), InvalidArgument);
}

TEST(BackwardArguments, EmptyTensorsGiveEmptyOrZeroGradients) {
  const Problem no_keys({.kv_len = 0});
  EXPECT_EQ(sum_abs(no_keys.backward().dq), 0);
  const Problem no_queries({.q_len = 0});
  const DenseGradients gradients = no_queries.backward();
  EXPECT_TRUE(gradients.dq.empty());
  EXPECT_EQ(gradients.dk.size(), no_queries.k.size());
  EXPECT_EQ(sum_abs(gradients.dk), 0);
}

}  // namespace
}  // namespace annulus
