#include "annulus/gradient_bars.h"

#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "annulus/error.h"
#include "base/half.h"

namespace annulus {
namespace {

using reference::BackwardInputs;
using reference::GradientCheck;
using reference::GradientCheckOptions;
using Shape = std::array<std::int64_t, 4>;

struct Tensor {
  explicit Tensor(const Shape& extents, DType type = DType::kFloat32)
      : shape(extents),
        dtype(type),
        bytes(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3] *
                                       size_bytes(type))) {}
  static Tensor normal(const Shape& shape, DType dtype, unsigned seed, double size = 1) {
    Tensor t(shape, dtype);
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (std::size_t i = 0; i < t.size(); ++i) t.set(i, size * normal(random));
    return t;
  }
  [[nodiscard]] std::size_t size() const {
    return bytes.size() / static_cast<std::size_t>(size_bytes(dtype));
  }
  [[nodiscard]] std::byte* at(std::size_t i) {
    return bytes.data() + i * static_cast<std::size_t>(size_bytes(dtype));
  }
  [[nodiscard]] float get(std::size_t i) const {
    return static_cast<float>(
        load_element(dtype, bytes.data() + i * static_cast<std::size_t>(size_bytes(dtype))));
  }
  void set(std::size_t i, double x) { store_element(dtype, at(i), x); }
  [[nodiscard]] TensorView view() const {
    return {bytes.data(), dtype, shape, row_major_strides(shape)};
  }
  [[nodiscard]] MutableTensorView mutable_view() {
    return {bytes.data(), dtype, shape, row_major_strides(shape)};
  }

  Shape shape;
  DType dtype;
  std::vector<std::byte> bytes;
};

enum class Fault {
  kNone,
  kNoCapDerivative,
  kTruncatedDq,
  kMissingTile,
  kMissingLastTile,  // where causal keys are seen by few
  kScaleTwice,
  kSinkTwice,
  kNoDropoutInDv,
};

struct Program {
  DType dtype = DType::kBFloat16;  // of the inputs and, unless float32_gradients, of the gradients
  bool bf16_products = false;
  bool float32_gradients = false;
  Fault fault = Fault::kNone;
  std::int64_t len = 160;
  double size = 1;  // of q
  AttentionOptions options{.causal = true};
  bool with_sink = false;
};

constexpr std::size_t kDim = 32;
constexpr std::size_t kTile = 16;

float dot(const Tensor& a, std::size_t i, const Tensor& b, std::size_t j) {
  float lanes[4] = {};
  for (std::size_t d = 0; d < kDim; ++d) lanes[d % 4] += a.get(i * kDim + d) * b.get(j * kDim + d);
  return lanes[0] + lanes[1] + (lanes[2] + lanes[3]);
}

// One head computed as a sound kernel would: float32, tiles of keys, one rounding of the gradients;
// p and ds optionally in bfloat16. Or with a fault.
class Simulated {
 public:
  explicit Simulated(const Program& program)
      : how(program),
        n(static_cast<std::size_t>(program.len)),
        shape{1, program.len, 1, kDim},
        gradient_dtype(program.float32_gradients ? DType::kFloat32 : program.dtype),
        q(Tensor::normal(shape, how.dtype, 1, how.size)),
        k(Tensor::normal(shape, how.dtype, 2)),
        v(Tensor::normal(shape, how.dtype, 3)),
        dout(Tensor::normal(shape, how.dtype, 4)),
        out(shape),
        lse({1, program.len, 1, 1}),
        dq(shape, gradient_dtype),
        dk(shape, gradient_dtype),
        dv(shape, gradient_dtype) {
    sink.set(0, 2);
    if (how.with_sink) how.options.softmax_aux = sink.view();
    const reference::Oracle oracle(q.view(), k.view(), v.view(), how.options);
    for (std::size_t i = 0; i < n; ++i) {
      const reference::Row row = oracle.row({0, static_cast<std::int64_t>(i), 0});
      lse.set(i, row.lse);
      for (std::size_t d = 0; d < kDim; ++d) out.set(i * kDim + d, row.out[d]);
    }
    run(oracle);
  }

  [[nodiscard]] GradientCheck check(GradientCheckOptions options = {}, bool given = true) {
    options.bf16_products = how.bf16_products;
    BackwardInputs inputs{.dout = dout.view()};
    if (given) inputs.out = out.view(), inputs.lse = lse.view();
    Gradients computed{.dq = dq.mutable_view(), .dk = dk.mutable_view(), .dv = dv.mutable_view()};
    if (how.with_sink) computed.dsoftmax_aux = dsink.mutable_view();
    return reference::check_gradients(q.view(), k.view(), v.view(), inputs, how.options, computed,
                                      options);
  }

  Program how;
  std::size_t n;
  Shape shape;
  DType gradient_dtype;
  Tensor q, k, v, dout, out, lse, dq, dk, dv;
  Tensor sink{Shape{1, 1, 1, 1}};
  Tensor dsink{Shape{1, 1, 1, 1}};

 private:
  [[nodiscard]] float product_input(float x) const {
    return how.bf16_products ? bf16_to_float(float_to_bf16(x)) : x;
  }
  [[nodiscard]] bool skipped(std::size_t i, std::size_t j) const {
    if (how.fault == Fault::kMissingTile) return i / kTile == n / kTile / 2 && j / kTile == 2;
    return how.fault == Fault::kMissingLastTile && j / kTile == i / kTile && j + kTile >= n;
  }

  void run(const reference::Oracle& oracle) {
    std::vector<float> dq_sum(n * kDim), dk_sum(n * kDim), dv_sum(n * kDim);
    float dsink_sum = 0;
    for (std::size_t i = 0; i < n; ++i) {
      float delta = 0;
      for (std::size_t d = 0; d < kDim; ++d)
        delta += dout.get(i * kDim + d) * out.get(i * kDim + d);
      dsink_sum -= std::exp(sink.get(0) - lse.get(i)) * delta;
      for (std::size_t j = 0; j < n; ++j) {
        const auto inputs =
            oracle.pair({0, static_cast<std::int64_t>(i), 0}, static_cast<std::int64_t>(j));
        if (inputs && !skipped(i, j)) add_pair(i, j, inputs->kept, delta, dq_sum, dk_sum, dv_sum);
      }
    }
    dsink.set(0, static_cast<double>(how.fault == Fault::kSinkTwice ? 2 * dsink_sum : dsink_sum));
    for (std::size_t e = 0; e < n * kDim; ++e) {
      dq.set(e, static_cast<double>(dq_sum[e]));
      dk.set(e, static_cast<double>(dk_sum[e]));
      dv.set(e, static_cast<double>(dv_sum[e]));
      if (how.fault != Fault::kTruncatedDq) continue;
      dq.set(e, static_cast<double>(
                    std::bit_cast<float>(std::bit_cast<std::uint32_t>(dq_sum[e]) & 0xffff0000U)));
    }
  }

  void add_pair(std::size_t i, std::size_t j, bool kept, float delta, std::vector<float>& dq_sum,
                std::vector<float>& dk_sum, std::vector<float>& dv_sum) const {
    const float scale = 1 / std::sqrt(static_cast<float>(kDim));
    const auto cap = static_cast<float>(how.options.logits_soft_cap);
    const auto keep_scale = static_cast<float>(1 / (1 - how.options.dropout_prob));
    float s = dot(q, i, k, j) * scale;
    float slope = 1;
    if (cap > 0) {
      s = cap * std::tanh(s / cap);
      slope = how.fault == Fault::kNoCapDerivative ? 1 : 1 - (s / cap) * (s / cap);
    }
    const float p = std::exp(s - lse.get(i));
    const float dp = kept ? dot(dout, i, v, j) * keep_scale : 0;
    const float ds = product_input(p * (dp - delta) * slope);
    const float in_dv = how.fault == Fault::kNoDropoutInDv ? 1 : kept ? keep_scale : 0;
    const float weight = product_input(p * in_dv);
    const float factor = how.fault == Fault::kScaleTwice ? scale * scale : scale;
    for (std::size_t d = 0; d < kDim; ++d) {
      dq_sum[i * kDim + d] += factor * (ds * k.get(j * kDim + d));
      dk_sum[j * kDim + d] += factor * (ds * q.get(i * kDim + d));
      dv_sum[j * kDim + d] += weight * dout.get(i * kDim + d);
    }
  }
};

std::vector<Program> right_programs() {
  std::vector<Program> programs;
  for (const bool products : {false, true}) {
    programs.push_back({.dtype = DType::kBFloat16, .bf16_products = products});
    programs.push_back(
        {.dtype = DType::kBFloat16, .bf16_products = products, .float32_gradients = true});
  }
  programs.push_back({.dtype = DType::kFloat16});
  programs.push_back({.dtype = DType::kFloat32});
  return programs;
}

std::string describe(const Program& program) {
  return std::string(name(program.dtype)) + (program.bf16_products ? ", bf16 products" : "") +
         (program.float32_gradients ? ", float32 gradients" : "");
}

TEST(GradientBars, RightProgramsPass) {
  for (Program program : right_programs()) {
    program.with_sink = true;
    for (const double size : {1.0, 8.0}) {
      program.size = size;
      for (const AttentionOptions& options :
           {AttentionOptions{.causal = true}, AttentionOptions{.logits_soft_cap = 3},
            AttentionOptions{.sliding_window = {9, 4}, .dropout_prob = 0.3, .dropout_seed = 5}}) {
        program.options = options;
        Simulated simulated(program);
        const GradientCheck result = simulated.check();
        EXPECT_TRUE(result.passed) << describe(program) << " x" << size << ": " << result.verdict;
        ASSERT_EQ(result.gradients.size(), 4U);
        EXPECT_EQ(result.gradients[0].name, "dq");
        EXPECT_GT(result.gradients[0].result.max_abs_err, 0);
        EXPECT_EQ(result.gradients[0].result.rows, 160);
        // Against the oracle's own out and lse, too.
        const GradientCheck own = simulated.check({}, false);
        EXPECT_TRUE(own.passed) << describe(program) << " x" << size << ": " << own.verdict;
      }
    }
  }
}

TEST(GradientBars, RightProgramsPassToTheLetterAndInSamples) {
  for (Program program : right_programs()) {
    program.len = 512;
    Simulated simulated(program);
    const GradientCheck strict = simulated.check({.strict = true});
    EXPECT_TRUE(strict.passed) << describe(program) << ": " << strict.verdict;
    for (const std::int64_t rows : {1, 3, 20}) {
      const GradientCheck sampled = simulated.check({.rows_per_head = rows});
      EXPECT_TRUE(sampled.passed) << describe(program) << ": " << sampled.verdict;
      EXPECT_EQ(sampled.gradients[1].result.rows, rows);
    }
  }
}

TEST(GradientBars, FaultsAreFound) {
  for (Program program : right_programs()) {
    program.with_sink = true;
    for (const Fault fault : {Fault::kNoCapDerivative, Fault::kMissingTile, Fault::kMissingLastTile,
                              Fault::kScaleTwice, Fault::kSinkTwice, Fault::kNoDropoutInDv}) {
      program.fault = fault;
      program.options = {.causal = true};
      if (fault == Fault::kNoCapDerivative) program.options.logits_soft_cap = 5;
      if (fault == Fault::kNoDropoutInDv) program.options.dropout_prob = 0.1;
      const GradientCheck result = Simulated(program).check();
      EXPECT_FALSE(result.passed) << describe(program) << ", fault " << static_cast<int>(fault);
    }
  }
}

TEST(GradientBars, TruncationIsNotRounding) {
  const GradientCheck result = Simulated({.fault = Fault::kTruncatedDq}).check();
  ASSERT_EQ(result.gradients.size(), 3U);
  EXPECT_FALSE(result.gradients[0].result.passed);
  EXPECT_TRUE(result.gradients[1].result.passed);
  EXPECT_NE(result.verdict.find("dq: N2"), std::string::npos) << result.verdict;
}

TEST(GradientBars, WhoClaimsFloat32ProductsIsHeldToThem) {
  Simulated simulated({.bf16_products = true});
  simulated.how.bf16_products = false;
  EXPECT_FALSE(simulated.check().passed);
}

TEST(GradientBars, WhatHasNoTermMustBeZero) {
  const std::vector<std::int32_t> length = {40};
  Program program;
  program.len = 64;
  program.options.kv_lengths = {length.data(), DType::kInt32, {1, 1, 1, 1}, {1, 1, 1, 1}};
  Simulated simulated(program);
  EXPECT_TRUE(simulated.check().passed);
  simulated.dk.set(41 * kDim, 1e-30);
  const GradientCheck result = simulated.check();
  EXPECT_FALSE(result.passed);
  EXPECT_NE(result.verdict.find("dk[0, 41, 0, 0]"), std::string::npos) << result.verdict;
}

TEST(GradientBars, NaNBelongsWhereTheOracleHasIt) {
  Program program;
  program.len = 64;
  Simulated clean(program);
  clean.dv.set(0, std::numeric_limits<double>::quiet_NaN());
  EXPECT_FALSE(clean.check().passed);
  // Visible to the last row alone; its dout takes dv of all keys along.
  Simulated dirty(program);
  dirty.dout.set(63 * kDim, std::numeric_limits<double>::quiet_NaN());
  EXPECT_FALSE(dirty.check().passed);
}

TEST(GradientBars, BiasIsJudgedWhereItIsGiven) {
  const Tensor bias({1, 1, 64, 64});
  Program program;
  program.len = 64;
  program.options.bias = bias.view();
  Simulated x(program);
  Tensor dbias({1, 1, 64, 64});
  const auto exact = reference::attention_backward(x.dout.view(), x.q.view(), x.k.view(),
                                                   x.v.view(), {}, program.options);
  for (std::size_t i = 0; i < dbias.size(); ++i) dbias.set(i, exact.dbias[i]);
  const auto check = [&] {
    return reference::check_gradients(x.q.view(), x.k.view(), x.v.view(), {.dout = x.dout.view()},
                                      program.options, {.dbias = dbias.mutable_view()},
                                      {.rows_per_head = 8});
  };
  EXPECT_TRUE(check().passed) << check().verdict;
  EXPECT_EQ(check().gradients.size(), 1U);
  dbias.set(63 * 64 + 5, 0.1);
  EXPECT_FALSE(check().passed);
  dbias.shape = {1, 1, 32, 128};
  EXPECT_THROW((void)check(), InvalidArgument);
}

}  // namespace
}  // namespace annulus
