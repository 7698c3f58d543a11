#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "annulus/bars.h"
#include "annulus/error.h"
#include "annulus/reference.h"
#include "reference/philox.h"

namespace annulus {
namespace {

using reference::Oracle;
using reference::philox4x32_10;

using Words = std::array<std::uint32_t, 4>;

// The known answers published with the generator.
TEST(Philox, GivesThePublishedAnswers) {
  EXPECT_EQ(philox4x32_10({0, 0, 0, 0}, {0, 0}),
            (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  constexpr std::uint32_t kOnes = 0xffffffff;
  EXPECT_EQ(philox4x32_10({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(
      philox4x32_10({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
      (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

// Two batch rows, two heads, equal scores; value j is 2^j, so that a row spells its kept keys.
struct Spelled {
  explicit Spelled(std::int64_t keys) : kv_len(keys) {
    for (std::int64_t j = 0; j < 2 * keys; ++j) {
      v.push_back(std::ldexp(1.0F, static_cast<int>(j % keys)));
    }
  }
  [[nodiscard]] Oracle oracle(const AttentionOptions& options) const {
    return {view(zeros, {2, 3, 2, 1}), view(zeros, {2, kv_len, 1, 1}), view(v, {2, kv_len, 1, 1}),
            options};
  }
  [[nodiscard]] TensorView view(const std::vector<float>& x,
                                const std::array<std::int64_t, 4>& shape) const {
    return {x.data(), DType::kFloat32, shape, row_major_strides(shape)};
  }

  std::int64_t kv_len;
  std::vector<float> zeros = std::vector<float>(256);
  std::vector<float> v;
};

TEST(OracleDropout, PairsAreDrawnByPositionAndTheRestScaled) {
  const Spelled x(16);
  constexpr std::uint64_t kSeed = 0x123456789abcdef0U;
  const Oracle oracle = x.oracle({.dropout_prob = 0.25, .dropout_seed = kSeed});
  for (std::uint32_t b = 0; b < 2; ++b) {
    for (std::uint32_t h = 0; h < 2; ++h) {
      for (std::uint32_t i = 0; i < 3; ++i) {
        double expected = 0;
        for (std::uint32_t j = 0; j < 16; ++j) {
          const std::uint32_t drawn = philox4x32_10({b, h, i, j}, {0x9abcdef0U, 0x12345678U})[0];
          if (drawn >= 0x40000000U) expected += std::ldexp(1.0, static_cast<int>(j)) / 16 / 0.75;
        }
        const reference::Row row = oracle.row({b, i, h});
        EXPECT_NEAR(row.out[0] / expected, 1, 1e-15);
        EXPECT_NEAR(row.abs_out[0] / expected, 1, 1e-15);
        EXPECT_DOUBLE_EQ(row.lse, std::log(16.0));
        EXPECT_EQ(row.visible, 16);
      }
    }
  }
}

TEST(OracleDropout, TheThresholdIsExact) {
  const Spelled x(1);
  const std::uint32_t drawn = philox4x32_10({0, 0, 0, 0}, {7, 0})[0];
  const auto out = [&](double words) {
    return x.oracle({.dropout_prob = std::ldexp(words, -32), .dropout_seed = 7})
        .row({0, 0, 0})
        .out[0];
  };
  EXPECT_GT(out(drawn), 0);
  EXPECT_GT(out(drawn - 0.5), 0);
  EXPECT_EQ(out(drawn + 0.5), 0);
  EXPECT_EQ(out(drawn + 1.0), 0);
}

TEST(OracleDropout, AsManyAreDroppedAsAskedFor) {
  const std::vector<float> x(4096);
  const TensorView k{x.data(), DType::kFloat32, {1, 4096, 1, 1}, {0, 1, 1, 1}};
  const TensorView q{x.data(), DType::kFloat32, {1, 16, 1, 1}, {0, 1, 1, 1}};
  const Oracle oracle(q, k, k, {.dropout_prob = 0.1, .dropout_seed = 3});
  double dropped = 0;
  for (std::int64_t i = 0; i < 16; ++i) {
    for (const std::uint8_t kept : oracle.inputs({0, i, 0}).kept) dropped += kept == 0 ? 1 : 0;
  }
  EXPECT_NEAR(dropped / 65536, 0.1, 5 * std::sqrt(0.09 / 65536));
}

TEST(OracleDropout, ADroppedNaNDoesNotArrive) {
  Spelled x(16);
  const AttentionOptions options{.dropout_prob = 0.5, .dropout_seed = 1};
  const std::vector<std::uint8_t> kept = x.oracle(options).inputs({0, 1, 0}).kept;
  const double before = x.oracle(options).row({0, 1, 0}).out[0];
  for (std::size_t j = 0; j < kept.size(); ++j) {
    if (kept[j] == 0) x.v[j] = std::numeric_limits<float>::quiet_NaN();
  }
  EXPECT_EQ(x.oracle(options).row({0, 1, 0}).out[0], before);
  EXPECT_TRUE(std::isfinite(naive_row(x.oracle(options), {0, 1, 0}, DType::kFloat32).out[0]));
}

TEST(OracleDropout, ProbabilityMustBeBelowOne) {
  const Spelled x(2);
  for (const double prob : {-0.1, 1.0, std::numeric_limits<double>::quiet_NaN()}) {
    EXPECT_THROW((void)x.oracle({.dropout_prob = prob}), InvalidArgument);
  }
}

// Naive float32 with dropout stays inside the forward bars, and forgetting the scale does not.
TEST(OracleDropout, ForwardBarsHold) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<float> x(3 * 200 * 32);
  for (float& element : x) element = normal(random);
  const std::array<std::int64_t, 4> shape{1, 200, 1, 32};
  const auto view = [&](std::size_t n) {
    return TensorView{x.data() + n * 200 * 32, DType::kFloat32, shape, row_major_strides(shape)};
  };
  const Oracle oracle(view(0), view(1), view(2), {.dropout_prob = 0.9, .dropout_seed = 2});
  for (const float factor : {1.0F, 0.1F}) {
    reference::Checker checker(check_options(oracle, DType::kFloat32, false));
    for (std::int64_t i = 0; i < 200; ++i) {
      const reference::NaiveRow naive = naive_row(oracle, {0, i, 0}, DType::kFloat32);
      std::vector<float> out = naive.out;
      for (float& element : out) element *= factor;
      checker.add(oracle.row({0, i, 0}), out, naive.lse, {.float32 = naive, .same_dtype = {}});
    }
    EXPECT_EQ(checker.result().passed, factor == 1.0F) << checker.result().verdict;
  }
}

}  // namespace
}  // namespace annulus
