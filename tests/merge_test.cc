// merge(): the results over two sets of keys are the result over both, also where one of them or
// both see nothing.

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "annulus/attention.h"
#include "annulus/bars.h"
#include "annulus/error.h"
#include "testing.h"

namespace annulus::testing {
namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

// Tokens [begin, end) of k or v.
TensorView tokens(const TensorView& t, std::int64_t begin, std::int64_t end) {
  TensorView part = t;
  part.data = t.at(0, begin, 0, 0), part.shape[1] = end - begin;
  return part;
}

TEST(Merge, PartsMakeTheWhole) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const std::int64_t cut : {0, 1, 40, 64}) {
      SCOPED_TRACE(::testing::Message() << name(dtype) << " cut at " << cut);
      Inputs in(dtype, {.batch = 2, .q_len = 30, .kv_len = 64, .heads = 2, .kv_heads = 1});
      Tensor out_a(DType::kFloat32, in.out.shape()), out_b(DType::kFloat32, in.out.shape()),
          out(DType::kFloat32, in.out.shape());
      Tensor lse_a(DType::kFloat32, in.lse.shape()), lse_b(DType::kFloat32, in.lse.shape()),
          lse(DType::kFloat32, in.lse.shape());
      AttentionOptions options;
      options.sliding_window = {20, 60}, options.causal_alignment = CausalAlignment::kTopLeft;
      AttentionOptions behind = options;  // positions of the second part start at its cut
      behind.mask_builder = [cut](auto...) { return Mask::sliding_window(20, 60, -cut); };
      behind.sliding_window = {};
      bool rounded = false;
      for (const bool first : {true, false}) {
        const std::int64_t begin = first ? 0 : cut, end = first ? cut : 64;
        rounded |= attention(in.q, tokens(in.k, begin, end), tokens(in.v, begin, end),
                             (first ? out_a : out_b).mutable_view(),
                             (first ? lse_a : lse_b).mutable_view(), first ? options : behind)
                       .bf16_probabilities;
      }
      merge(out_a, lse_a, out_b, lse_b, out.mutable_view(), lse.mutable_view());
      const auto check =
          reference::check_attention(in.q, in.k, in.v, options, out, lse, rounded, 0);
      EXPECT_TRUE(check.passed) << check.verdict;
    }
  }
}

struct Row {
  float out, lse;
};
Row merged(Row a, Row b) {
  Tensor out_a(DType::kFloat32, {1, 1, 1, 1}), out_b = out_a, lse_a = out_a, lse_b = out_a;
  out_a.set(0, 0, 0, 0, a.out), out_b.set(0, 0, 0, 0, b.out);
  lse_a.set(0, 0, 0, 0, a.lse), lse_b.set(0, 0, 0, 0, b.lse);
  // In place: the result may be the first part.
  merge(out_a, lse_a, out_b, lse_b, out_a.mutable_view(), lse_a.mutable_view());
  return {static_cast<float>(out_a.get(0, 0, 0, 0)), static_cast<float>(lse_a.get(0, 0, 0, 0))};
}

TEST(Merge, AnEmptyPartChangesNothing) {
  const float garbage = std::numeric_limits<float>::quiet_NaN();
  for (const float lse : {0.5F, -300.0F, 3e38F}) {
    EXPECT_EQ(merged({2, lse}, {garbage, kNothing}).out, 2);
    EXPECT_EQ(merged({2, lse}, {garbage, kNothing}).lse, lse);
    EXPECT_EQ(merged({garbage, kNothing}, {2, lse}).out, 2);
    EXPECT_EQ(merged({garbage, kNothing}, {2, lse}).lse, lse);
  }
  EXPECT_EQ(merged({garbage, kNothing}, {garbage, kNothing}).out, 0);
  EXPECT_EQ(merged({garbage, kNothing}, {garbage, kNothing}).lse, kNothing);
}

TEST(Merge, WeightsByLse) {
  const Row row = merged({1, std::log(3.0F)}, {5, 0});  // weights 3/4 and 1/4, natural logarithm
  EXPECT_NEAR(row.out, 2, 1e-6);
  EXPECT_NEAR(row.lse, std::log(4.0), 1e-6);
  EXPECT_EQ(merged({1, 200}, {5, -200}).out, 1);
  EXPECT_TRUE(std::isnan(merged({1, std::nanf("")}, {5, 0}).lse));
}

TEST(Merge, ShapesThatDifferAreRefused) {
  Tensor a(DType::kFloat32, {1, 4, 2, 8}), b(DType::kFloat32, {1, 4, 2, 9});
  Tensor lse(DType::kFloat32, {1, 4, 2, 1});
  EXPECT_THROW(merge(a, lse, b, lse, a.mutable_view(), lse.mutable_view()), InvalidArgument);
  Tensor half(DType::kBFloat16, {1, 4, 2, 1});
  EXPECT_THROW(merge(a, half, a, lse, a.mutable_view(), lse.mutable_view()), InvalidArgument);
}

}  // namespace
}  // namespace annulus::testing
