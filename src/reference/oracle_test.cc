#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "annulus/error.h"
#include "annulus/reference.h"
#include "base/half.h"

namespace annulus {
namespace {

using Shape = std::array<std::int64_t, 4>;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

template <class T>
TensorView view(const std::vector<T>& x, const Shape& shape, DType dtype) {
  return {x.data(), dtype, shape, row_major_strides(shape)};
}
TensorView floats(const std::vector<float>& x, const Shape& shape) {
  return view(x, shape, DType::kFloat32);
}
TensorView ints(const std::vector<std::int32_t>& x) {
  return view(x, {1, static_cast<std::int64_t>(x.size()), 1, 1}, DType::kInt32);
}

std::vector<float> powers_of_two(std::int64_t n) {
  std::vector<float> x;
  for (std::int64_t j = 0; j < n; ++j) x.push_back(std::ldexp(1.0F, static_cast<int>(j)));
  return x;
}

// One head of width 1. Scores are q_i k_j, and q_i = 1 unless a test says otherwise, so k are the
// scores. Value j is 2^j: with equal scores, out * visible spells the visible keys in binary.
struct Small {
  Small(std::int64_t queries, std::int64_t keys)
      : q_len(queries),
        kv_len(keys),
        q(static_cast<std::size_t>(queries), 1.0F),
        k(static_cast<std::size_t>(keys), 0.0F),
        v(powers_of_two(keys)) {}

  [[nodiscard]] reference::Row row(std::int64_t query, const AttentionOptions& options = {}) const {
    return reference::attention_row(floats(q, {1, q_len, 1, 1}), floats(k, {1, kv_len, 1, 1}),
                                    floats(v, {1, kv_len, 1, 1}), options, 0, query, 0);
  }
  // Bit j: key j is visible.
  [[nodiscard]] unsigned seen(std::int64_t query, const AttentionOptions& options) const {
    const reference::Row r = row(query, options);
    return static_cast<unsigned>(std::lround(r.out[0] * static_cast<double>(r.visible)));
  }

  std::int64_t q_len, kv_len;
  std::vector<float> q, k, v;
};

TEST(Reference, UniformScoresAverageTheValues) {
  const reference::Row row = Small(1, 4).row(0);
  EXPECT_EQ(row.visible, 4);
  EXPECT_DOUBLE_EQ(row.out[0], 15.0 / 4);
  EXPECT_DOUBLE_EQ(row.lse, std::log(4.0));
}

TEST(Reference, OneKeyGivesItsValueAndItsScore) {
  Small x(1, 1);
  x.q = {3};
  x.k = {0.5F};
  x.v = {-7};
  const reference::Row row = x.row(0, {.softmax_scale = 2.0});
  EXPECT_DOUBLE_EQ(row.out[0], -7);
  EXPECT_DOUBLE_EQ(row.lse, 3);
  EXPECT_DOUBLE_EQ(row.abs_out[0], 7);
  EXPECT_DOUBLE_EQ(row.spread_out[0], 7);
  EXPECT_DOUBLE_EQ(row.q_norm, 3);
  EXPECT_DOUBLE_EQ(row.max_k_norm, 0.5);
  EXPECT_DOUBLE_EQ(row.max_abs_v, 7);
  EXPECT_DOUBLE_EQ(row.max_abs_score, 3);
}

TEST(Reference, WeightsAreTheSoftmaxOfTheScores) {
  Small x(1, 3);
  x.k = {0, 1, -2};
  x.v = {1, -10, 100};
  const double sum = 1 + std::exp(1.0) + std::exp(-2.0);
  const reference::Row row = x.row(0);
  EXPECT_DOUBLE_EQ(row.out[0], (1 - 10 * std::exp(1.0) + 100 * std::exp(-2.0)) / sum);
  EXPECT_DOUBLE_EQ(row.abs_out[0], (1 + 10 * std::exp(1.0) + 100 * std::exp(-2.0)) / sum);
  EXPECT_DOUBLE_EQ(row.lse, std::log(sum));
}

TEST(Reference, DefaultScaleIsTheInverseRootOfHeadDim) {
  const std::vector<float> ones(4, 1.0F);
  const TensorView x = floats(ones, {1, 1, 1, 4});
  EXPECT_DOUBLE_EQ(reference::attention_row(x, x, x, {}, 0, 0, 0).lse, 2);
}

TEST(Reference, HugeScoresDoNotOverflow) {
  Small x(1, 2);
  x.q = {1e19F};
  x.k = {1e19F, 1e19F};
  const reference::Row row = x.row(0);
  EXPECT_DOUBLE_EQ(row.out[0], 1.5);
  EXPECT_NEAR(row.lse / 1e38, 1, 1e-6);
}

TEST(Reference, LongSumsKeepTheirDigits) {
  Small x(1, 100000);
  x.v.assign(100000, 0.1F);
  const reference::Row row = x.row(0);
  EXPECT_NEAR(row.out[0] / static_cast<double>(0.1F), 1, 3e-16);
  EXPECT_NEAR(row.lse, std::log(1e5), 4e-15);
}

TEST(Reference, NothingVisibleGivesZeroAndMinusInfinity) {
  const std::vector<std::int32_t> length = {0};
  const reference::Row row = Small(1, 3).row(0, {.kv_lengths = ints(length)});
  EXPECT_EQ(row.visible, 0);
  EXPECT_EQ(row.out, std::vector<double>{0});
  EXPECT_EQ(row.lse, -kInf);
}

TEST(Reference, NoKeysAtAllAndNoQueriesAtAll) {
  const reference::Row row = Small(2, 0).row(1);
  EXPECT_EQ(row.out, std::vector<double>{0});
  EXPECT_EQ(row.lse, -kInf);

  const TensorView none = floats({}, {1, 0, 1, 1});
  const std::vector<float> one = {1};
  const TensorView key = floats(one, {1, 1, 1, 1});
  std::vector<double> out = {5};
  std::vector<double> lse = {5};
  reference::attention(none, key, key, {}, out, lse);
  EXPECT_TRUE(out.empty());
  EXPECT_TRUE(lse.empty());
}

TEST(ReferenceMasks, CausalIsAlignedAtTheBottomRight) {
  const Small x(3, 5);
  const AttentionOptions options{.causal = true};
  EXPECT_EQ(x.seen(0, options), 0b00111U);
  EXPECT_EQ(x.seen(1, options), 0b01111U);
  EXPECT_EQ(x.seen(2, options), 0b11111U);
}

TEST(ReferenceMasks, CausalAtTheTopLeftTakesPositionsAsTheyAre) {
  const Small x(3, 5);
  const AttentionOptions options{.causal = true, .causal_alignment = CausalAlignment::kTopLeft};
  EXPECT_EQ(x.seen(0, options), 0b00001U);
  EXPECT_EQ(x.seen(2, options), 0b00111U);
}

TEST(ReferenceMasks, MoreQueriesThanKeysLeaveTheFirstOnesBlind) {
  const Small x(5, 2);
  const AttentionOptions options{.causal = true};
  EXPECT_EQ(x.row(2, options).visible, 0);
  EXPECT_EQ(x.row(2, options).lse, -kInf);
  EXPECT_EQ(x.seen(3, options), 0b01U);
  EXPECT_EQ(x.seen(4, options), 0b11U);
}

TEST(ReferenceMasks, WindowIncludesBothEnds) {
  const Small x(6, 6);
  EXPECT_EQ(x.seen(3, {.sliding_window = {2, 1}}), 0b011110U);
  EXPECT_EQ(x.seen(3, {.sliding_window = {0, 0}}), 0b001000U);
  EXPECT_EQ(x.seen(3, {.sliding_window = {-1, 1}}), 0b011111U);
  EXPECT_EQ(x.seen(3, {.sliding_window = {2, -1}}), 0b111110U);
}

TEST(ReferenceMasks, WindowIsShiftedLikeCausalAndJoinsIt) {
  const Small x(2, 6);
  EXPECT_EQ(x.seen(0, {.sliding_window = {1, 1}}), 0b111000U);
  EXPECT_EQ(x.seen(0, {.causal = true, .sliding_window = {1, 1}}), 0b011000U);
  EXPECT_EQ(x.seen(1, {.causal_alignment = CausalAlignment::kTopLeft, .sliding_window = {1, 1}}),
            0b000111U);
}

TEST(ReferenceMasks, ChunksAreCausalInsideAndNeverShifted) {
  const Small x(6, 8);
  EXPECT_EQ(x.seen(2, {.chunk_size = 3}), 0b00000111U);
  EXPECT_EQ(x.seen(3, {.chunk_size = 3}), 0b00001000U);
  EXPECT_EQ(x.seen(4, {.chunk_size = 3}), 0b00011000U);
}

TEST(ReferenceMasks, SegmentsSeeTheirOwnKind) {
  const std::vector<std::int32_t> q_ids = {7, 8, 9};
  const std::vector<std::int32_t> kv_ids = {8, 7, 7, 8};
  const Small x(3, 4);
  const AttentionOptions options{.q_segment_ids = ints(q_ids), .kv_segment_ids = ints(kv_ids)};
  EXPECT_EQ(x.seen(0, options), 0b0110U);
  EXPECT_EQ(x.seen(1, options), 0b1001U);
  EXPECT_EQ(x.row(2, options).visible, 0);
}

TEST(ReferenceMasks, OneSideOfSegmentIdsServesBothIfLengthsAreEqual) {
  const std::vector<std::int32_t> ids = {0, 1, 0};
  EXPECT_EQ(Small(3, 3).seen(2, {.q_segment_ids = ints(ids)}), 0b101U);
  EXPECT_EQ(Small(3, 3).seen(2, {.kv_segment_ids = ints(ids)}), 0b101U);
  EXPECT_THROW((void)Small(3, 4).row(2, {.q_segment_ids = ints(ids)}), InvalidArgument);
}

TEST(ReferenceMasks, PaddingSeesNothingAndIsSeenByNothing) {
  const std::vector<std::int32_t> ids = {-1, 4, 4, -1};
  const AttentionOptions options{.q_segment_ids = ints(ids), .padding_segment_id = -1};
  const Small x(4, 4);
  EXPECT_EQ(x.row(0, options).visible, 0);
  EXPECT_EQ(x.row(3, options).visible, 0);
  EXPECT_EQ(x.seen(1, options), 0b0110U);
}

TEST(ReferenceMasks, LengthsCutKeysPerBatchRow) {
  const std::vector<float> q = {1, 1};
  const std::vector<float> k(6, 0.0F);
  const std::vector<float> v = {1, 2, 4, 1, 2, 4};
  const std::vector<std::int32_t> lengths = {2, 9};
  const AttentionOptions options{.kv_lengths = view(lengths, {2, 1, 1, 1}, DType::kInt32)};
  std::vector<double> out;
  std::vector<double> lse;
  reference::attention(floats(q, {2, 1, 1, 1}), floats(k, {2, 3, 1, 1}), floats(v, {2, 3, 1, 1}),
                       options, out, lse);
  EXPECT_DOUBLE_EQ(out[0], 1.5);
  EXPECT_DOUBLE_EQ(out[1], 7.0 / 3);
}

TEST(ReferenceMasks, DenseMaskCountsAnyNonzeroByteAsVisible) {
  const std::vector<std::uint8_t> mask = {1, 0, 255, 0, 0, 1};
  const Small x(2, 3);
  for (const DType dtype : {DType::kBool, DType::kUInt8}) {
    const AttentionOptions options{.attention_mask = view(mask, {1, 1, 2, 3}, dtype)};
    EXPECT_EQ(x.seen(0, options), 0b101U);
    EXPECT_EQ(x.seen(1, options), 0b100U);
  }
}

TEST(ReferenceMasks, BuilderIsAskedPerHeadWithGlobalLengths) {
  const std::vector<float> q(4, 1.0F);
  const std::vector<float> k(3, 0.0F);
  const std::vector<float> v = {1, 2, 4};
  std::vector<std::int64_t> heads;
  AttentionOptions options;
  options.mask_builder = [&](std::int64_t q_len, std::int64_t kv_len, std::int64_t num_heads,
                             std::int64_t head, std::int64_t num_reps) {
    EXPECT_EQ(q_len, 2);
    EXPECT_EQ(kv_len, 3);
    EXPECT_EQ(num_heads, 2);
    EXPECT_EQ(num_reps, 2);
    heads.push_back(head);
    return head == 0 ? Mask::prefix(1) : Mask::full();
  };
  std::vector<double> out;
  std::vector<double> lse;
  reference::attention(floats(q, {1, 2, 2, 1}), floats(k, {1, 3, 1, 1}), floats(v, {1, 3, 1, 1}),
                       options, out, lse);
  EXPECT_EQ(heads, (std::vector<std::int64_t>{0, 1}));
  EXPECT_DOUBLE_EQ(out[0], 1);
  EXPECT_DOUBLE_EQ(out[1], 7.0 / 3);
}

TEST(ReferenceMasks, AllRulesMustAgree) {
  const std::vector<std::uint8_t> mask = {1, 1, 1, 0, 1, 1};
  AttentionOptions options{.causal = true,
                           .sliding_window = {3, -1},
                           .attention_mask = view(mask, {1, 1, 1, 6}, DType::kBool)};
  options.mask_builder = [](auto, auto, auto, auto, auto) { return Mask::prefix(5); };
  // Query 5 of 6 keys: the window leaves 2..5, the dense mask takes 3, the builder takes 5.
  EXPECT_EQ(Small(1, 6).seen(0, options), 0b010100U);
}

TEST(ReferenceSinks, OneSinkPerHead) {
  const std::vector<float> sink = {5};
  const reference::Row row = Small(1, 2).row(0, {.softmax_aux = floats(sink, {1, 1, 1, 1})});
  EXPECT_DOUBLE_EQ(row.lse, std::log(2 + std::exp(5.0)));
  EXPECT_DOUBLE_EQ(row.out[0], 3 / (2 + std::exp(5.0)));
  EXPECT_EQ(row.sinks, 1);
}

TensorView rank_one(const std::vector<float>& x, std::int64_t n) {
  return {x.data(), DType::kFloat32, {n, 0, 1, 1}, {1, 0, 0, 0}};
}

// Two query heads, two keys of score 0; the sinks tell the layouts apart.
double lse_with_sinks(const TensorView& softmax_aux, std::int64_t head) {
  const std::vector<float> zeros(4, 0.0F);
  return reference::attention_row(floats(zeros, {1, 1, 2, 1}), floats(zeros, {1, 2, 2, 1}),
                                  floats(zeros, {1, 2, 2, 1}), {.softmax_aux = softmax_aux}, 0, 0,
                                  head)
      .lse;
}

TEST(ReferenceSinks, LayoutsPerHeadSharedAndSeveralPerHead) {
  const std::vector<float> aux = {1, 2, 3, 4};
  const auto e = [](double x) { return std::exp(x); };
  EXPECT_DOUBLE_EQ(lse_with_sinks(rank_one(aux, 2), 1), std::log(2 + e(2)));
  EXPECT_DOUBLE_EQ(lse_with_sinks(rank_one(aux, 1), 1), std::log(2 + e(1)));
  EXPECT_DOUBLE_EQ(lse_with_sinks(rank_one(aux, 3), 1), std::log(2 + e(1) + e(2) + e(3)));
  EXPECT_DOUBLE_EQ(lse_with_sinks(floats(aux, {2, 2, 1, 1}), 1), std::log(2 + e(3) + e(4)));
  EXPECT_DOUBLE_EQ(lse_with_sinks(floats(aux, {2, 1, 1, 1}), 1), std::log(2 + e(2)));
  EXPECT_THROW(lse_with_sinks(floats(aux, {4, 1, 1, 1}), 1), InvalidArgument);
}

TEST(ReferenceSinks, MinusInfinityCountsNothing) {
  const std::vector<float> sink = {-kInf};
  const AttentionOptions options{.softmax_aux = floats(sink, {1, 1, 1, 1})};
  const reference::Row row = Small(1, 2).row(0, options);
  EXPECT_DOUBLE_EQ(row.lse, std::log(2.0));
  EXPECT_DOUBLE_EQ(row.out[0], 1.5);
  EXPECT_EQ(Small(1, 0).row(0, options).lse, -kInf);
}

TEST(ReferenceSinks, WithoutAKeyTheSinksAreTheRow) {
  const std::vector<float> sinks = {1, 2};
  const reference::Row row = Small(1, 0).row(0, {.softmax_aux = floats(sinks, {1, 2, 1, 1})});
  EXPECT_EQ(row.out, std::vector<double>{0});
  EXPECT_DOUBLE_EQ(row.lse, std::log(std::exp(1.0) + std::exp(2.0)));
}

TEST(ReferenceScores, CapSquashesBeforeTheBias) {
  Small x(1, 1);
  x.k = {3};
  const std::vector<float> bias = {10};
  EXPECT_DOUBLE_EQ(x.row(0, {.logits_soft_cap = 2, .bias = floats(bias, {1, 1, 1, 1})}).lse,
                   2 * std::tanh(1.5) + 10);
}

TEST(ReferenceScores, BiasIsBroadcastOverBatchAndHeads) {
  const std::vector<float> zeros(8, 0.0F);
  const TensorView x = floats(zeros, {2, 2, 2, 1});
  const std::vector<float> shared = {0, 1, 2, 3};
  const AttentionOptions one{.bias = floats(shared, {1, 1, 2, 2})};
  EXPECT_DOUBLE_EQ(reference::attention_row(x, x, x, one, 1, 1, 1).lse,
                   std::log(std::exp(2.0) + std::exp(3.0)));
  const std::vector<float> per_head = {0, 1, 2, 3, 4, 5, 6, 7};
  const AttentionOptions heads{.bias = floats(per_head, {1, 2, 2, 2})};
  EXPECT_DOUBLE_EQ(reference::attention_row(x, x, x, heads, 1, 0, 1).lse,
                   std::log(std::exp(4.0) + std::exp(5.0)));
  const AttentionOptions batches{.bias = floats(per_head, {2, 1, 2, 2})};
  EXPECT_DOUBLE_EQ(reference::attention_row(x, x, x, batches, 1, 0, 1).lse,
                   std::log(std::exp(4.0) + std::exp(5.0)));
}

TEST(ReferenceScores, BiasOfMinusInfinityEverywhereIsNothingVisible) {
  const std::vector<float> bias = {-kInf, -kInf};
  Small x(1, 2);
  x.v = {1, kNaN};
  const reference::Row row = x.row(0, {.bias = floats(bias, {1, 1, 1, 2})});
  EXPECT_EQ(row.visible, 2);
  EXPECT_EQ(row.out, std::vector<double>{0});
  EXPECT_EQ(row.lse, -kInf);
}

TEST(ReferenceHeads, QueryHeadsShareKeyHeadsInRuns) {
  const std::vector<float> q(6, 1.0F);
  const std::vector<float> k = {0, 0};
  const std::vector<float> v = {10, 20};
  std::vector<double> out;
  std::vector<double> lse;
  reference::attention(floats(q, {1, 1, 6, 1}), floats(k, {1, 1, 2, 1}), floats(v, {1, 1, 2, 1}),
                       {}, out, lse);
  EXPECT_EQ(out, (std::vector<double>{10, 10, 10, 20, 20, 20}));
  EXPECT_THROW(reference::attention(floats(q, {1, 1, 3, 1}), floats(k, {1, 1, 2, 1}),
                                    floats(v, {1, 1, 2, 1}), {}, out, lse),
               InvalidArgument);
}

TEST(ReferenceHeads, ValuesMayHaveAnotherWidth) {
  const std::vector<float> q = {1, 2};
  const std::vector<float> k = {3, 4};
  const std::vector<float> v = {5, 6, 7};
  const reference::Row row =
      reference::attention_row(floats(q, {1, 1, 1, 2}), floats(k, {1, 1, 1, 2}),
                               floats(v, {1, 1, 1, 3}), {.softmax_scale = 1.0}, 0, 0, 0);
  EXPECT_EQ(row.out, (std::vector<double>{5, 6, 7}));
  EXPECT_DOUBLE_EQ(row.lse, 11);
}

TEST(ReferenceLayouts, StridesAreFollowed) {
  // Two heads, two keys, width 2, stored [heads, dim, seq].
  const std::vector<float> k = {1, 2, 3, 4, 5, 6, 7, 8};
  const Shape shape = {1, 2, 2, 2};
  const TensorView kv = {k.data(), DType::kFloat32, shape, dense_strides(shape, Layout::kBhds)};
  const std::vector<float> q(4, 0.0F);
  const reference::Row row = reference::attention_row(floats(q, {1, 1, 2, 2}), kv, kv, {}, 0, 0, 1);
  EXPECT_EQ(row.out, (std::vector<double>{5.5, 7.5}));
}

TEST(ReferenceLayouts, HalfPrecisionInputsAreReadExactly) {
  const std::vector<std::uint16_t> bf16 = {float_to_bf16(1.5F), float_to_bf16(-0.25F)};
  const std::vector<std::uint16_t> f16 = {float_to_f16(1.5F), float_to_f16(-0.25F)};
  for (const auto& [bits, dtype] :
       {std::pair{&bf16, DType::kBFloat16}, std::pair{&f16, DType::kFloat16}}) {
    const TensorView x = view(*bits, {1, 1, 1, 2}, dtype);
    const reference::Row row = reference::attention_row(x, x, x, {.softmax_scale = 1.0}, 0, 0, 0);
    EXPECT_EQ(row.out, (std::vector<double>{1.5, -0.25}));
    EXPECT_DOUBLE_EQ(row.lse, 1.5 * 1.5 + 0.25 * 0.25);
  }
}

TEST(ReferenceSpecialValues, MaskedNaNNeverArrives) {
  Small x(3, 3);
  x.k = {0, 0, kNaN};
  x.v = {1, 2, kNaN};
  const std::vector<float> bias = {0, 0, 0, 0, 0, kNaN, 0, 0, 0};
  const reference::Row row = x.row(1, {.causal = true, .bias = floats(bias, {1, 1, 3, 3})});
  EXPECT_DOUBLE_EQ(row.out[0], 1.5);
  EXPECT_DOUBLE_EQ(row.lse, std::log(2.0));
  EXPECT_DOUBLE_EQ(row.max_abs_v, 2);
}

TEST(ReferenceSpecialValues, VisibleNaNInAKeyTakesTheRow) {
  Small x(1, 2);
  x.k = {0, kNaN};
  const reference::Row row = x.row(0);
  EXPECT_TRUE(std::isnan(row.out[0]));
  EXPECT_TRUE(std::isnan(row.lse));
}

TEST(ReferenceSpecialValues, VisibleNaNInAValueTakesOneElement) {
  const std::vector<float> q = {0};
  const std::vector<float> k = {0, 0};
  const std::vector<float> v = {1, 2, kNaN, 4};
  const reference::Row row = reference::attention_row(
      floats(q, {1, 1, 1, 1}), floats(k, {1, 2, 1, 1}), floats(v, {1, 2, 1, 2}), {}, 0, 0, 0);
  EXPECT_TRUE(std::isnan(row.out[0]));
  EXPECT_DOUBLE_EQ(row.out[1], 3);
  EXPECT_DOUBLE_EQ(row.lse, std::log(2.0));
}

TEST(ReferenceSpecialValues, InfiniteScoreGivesWhatTheFormulaGives) {
  Small x(1, 2);
  x.k = {0, kInf};
  const reference::Row row = x.row(0);
  EXPECT_EQ(row.lse, kInf);
  EXPECT_TRUE(std::isnan(row.out[0]));
}

TEST(ReferenceSpecialValues, MinusInfiniteScoreWeighsNothing) {
  Small x(1, 2);
  x.k = {0, -kInf};
  const reference::Row row = x.row(0);
  EXPECT_EQ(row.lse, 0);
  EXPECT_EQ(row.out[0], 1);
}

TEST(ReferenceSpecialValues, InfiniteValueGivesAnInfiniteElement) {
  Small x(1, 2);
  x.v = {1, -kInf};
  const reference::Row row = x.row(0);
  EXPECT_EQ(row.out[0], -kInf);
  EXPECT_DOUBLE_EQ(row.lse, std::log(2.0));
}

TEST(ReferenceArguments, WhatDoesNotFitIsRefused) {
  const std::vector<float> x(8, 0.0F);
  const TensorView good = floats(x, {1, 2, 1, 2});
  const auto refused = [&](const TensorView& k, const TensorView& v,
                           const AttentionOptions& options) {
    EXPECT_THROW((void)reference::attention_row(good, k, v, options, 0, 0, 0), InvalidArgument);
  };
  refused(floats(x, {2, 2, 1, 2}), good, {});
  refused(floats(x, {1, 2, 1, 4}), good, {});
  refused(good, floats(x, {1, 4, 1, 2}), {});
  refused(good, good, {.chunk_size = -1});
  refused(good, good, {.logits_soft_cap = -1});
  refused(good, good, {.bias = floats(x, {1, 1, 2, 3})});
  refused(good, good, {.attention_mask = floats(x, {1, 1, 2, 2})});
  refused(good, good, {.kv_lengths = floats(x, {1, 1, 1, 1})});
  EXPECT_THROW((void)reference::attention_row(good, good, good, {}, 0, 2, 0), InvalidArgument);
}

}  // namespace
}  // namespace annulus
