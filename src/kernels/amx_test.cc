// The AMX kernel through its table against attention in double precision: over simulated tiles
// wherever there is AVX-512, over the hardware's where there is AMX.
#if defined(__x86_64__)
#include <gtest/gtest.h>
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/amx_test_harness.h"
#include "kernels/kernel_table.h"

namespace annulus {

const ForwardKernel* amx_bf16_forward();
const ForwardKernel* amx_simulated_forward();

namespace {

using namespace amx_test;

class AmxKernel : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    if (!__builtin_cpu_supports("avx512bw")) GTEST_SKIP() << "no AVX-512";
    if (GetParam() && !has_amx()) GTEST_SKIP() << "no AMX";
    kernel_ = GetParam() ? amx_bf16_forward() : amx_simulated_forward();
  }
  Result check(const Problem& p) const {
    const unsigned mode = _mm_getcsr();
    Result got = run(*kernel_, p);
    constexpr unsigned kFlags = 0x3f;  // only what happened, not how
    EXPECT_EQ(_mm_getcsr() & ~kFlags, mode & ~kFlags);
    expect_close(p, got);
    return got;
  }
  const ForwardKernel* kernel_ = nullptr;
};
INSTANTIATE_TEST_SUITE_P(Tiles, AmxKernel, testing::Bool(),
                         [](const auto& test) { return test.param ? "Hardware" : "Simulated"; });

TEST_P(AmxKernel, TableIsConsistent) {
  EXPECT_EQ(kernel_->strip_rows, 32);
  EXPECT_EQ(kernel_->tile_keys, 32);
  for (std::int64_t d = 1; d <= 600; ++d) {
    for (const Dims dims : {Dims{d, d}, Dims{d, 33}, Dims{33, d}}) {
      const Blocking blocking = kernel_->blocking(dims);
      EXPECT_GT(blocking.panel_keys, 0);
      EXPECT_EQ(blocking.panel_keys % kernel_->panel_step(dims), 0);
      EXPECT_EQ(kernel_->panel_step(dims) % 32, 0);
      EXPECT_GT(blocking.item_rows, 0);
      EXPECT_EQ(blocking.item_rows % 32, 0);
      EXPECT_EQ(kernel_->strip_bytes(dims) % 64, 0);
      EXPECT_EQ(kernel_->packed_bytes(dims, 1) % 64, 0);
    }
  }
  EXPECT_EQ(kernel_->peak_loop(100), 100.0 * 24 * 16384);
}

TEST_P(AmxKernel, EveryShape) {
  const Dims dims[] = {{1, 1},     {7, 7},    {32, 32},   {33, 33},   {64, 64},   {72, 72},
                       {80, 80},   {96, 96},  {128, 128}, {256, 256}, {192, 128}, {192, 192},
                       {128, 192}, {64, 128}, {40, 260},  {300, 20},  {64, 1}};
  for (const Dims d : dims) {
    for (const std::int64_t keys : {1, 15, 17, 31, 32, 33, 100, 549, 1100}) {
      for (const std::int64_t rows : {1, 64, 90}) {
        SCOPED_TRACE(testing::Message()
                     << d.head_dim << "," << d.v_head_dim << " keys " << keys << " rows " << rows);
        Problem p = normal_problem(d, keys, rows, static_cast<unsigned>(keys + rows));
        p.is_large_sample = keys > 500 && rows > 1 && d.v_head_dim >= 32;
        check(p);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(AmxKernel, EveryPanel) {
  for (const Dims d :
       {Dims{33, 33}, Dims{64, 64}, Dims{128, 128}, Dims{192, 128}, Dims{256, 256}}) {
    for (const std::int64_t steps : {1, 2, 3, 5, 100}) {
      SCOPED_TRACE(testing::Message() << d.head_dim << " steps " << steps);
      Problem p = normal_problem(d, 1100, 90);
      mask_random(p, 1);
      p.panel_steps = steps;
      check(p);
    }
  }
}

TEST_P(AmxKernel, ElementTypesAndStrides) {
  for (const Element element : {Element::kFloat32, Element::kBFloat16, Element::kFloat16}) {
    for (const std::int64_t step : {1, 3}) {
      Problem p = normal_problem({72, 50}, 150, 40);
      // float16 has no room for bf16's smallest numbers.
      for (auto* x : {&p.q, &p.k, &p.v})
        for (float& f : *x) f = std::abs(f) < 0x1p-6F ? 0 : f;
      p.element = element, p.dim_step = step;
      check(p);
    }
  }
}

TEST_P(AmxKernel, RoundsFloat32ToNearestEven) {
  Problem p = normal_problem({32, 32}, 1, 32);
  p.element = Element::kFloat32;
  for (std::int64_t d = 0; d < 32; ++d) {
    const std::uint32_t bits =
        0x3f800000U + static_cast<std::uint32_t>(d) * 0x4000U + (d % 3 == 0 ? 1 : 0);
    std::memcpy(&p.v[d], &bits, 4);
  }
  const Result got = run(*kernel_, p);
  for (std::int64_t d = 0; d < 32; ++d) EXPECT_EQ(rounded(got.out[d]), rounded(p.v[d])) << d;
}

TEST_P(AmxKernel, CausalAndWindows) {
  for (const Dims d : kMaskDims) {
    for (const std::int64_t shift : {0, 1, 31, 600, 1050}) {
      SCOPED_TRACE(testing::Message() << d.head_dim << " shift " << shift);
      Problem p = normal_problem(d, 1100, 90);
      mask_causal(p, shift);
      check(p);
      mask_window(p, shift, 45);
      check(p);
    }
  }
}

TEST_P(AmxKernel, RandomTiles) {
  for (const Dims d : kMaskDims) {
    for (unsigned seed = 0; seed < 12; ++seed) {
      SCOPED_TRACE(testing::Message() << d.head_dim << " seed " << seed);
      Problem p = normal_problem(d, seed % 2 == 0 ? 1100 : 700, 90, seed);
      mask_random(p, seed);
      check(p);
    }
  }
}

TEST_P(AmxKernel, FirstTilesHiddenFromSomeOrAll) {
  for (const Dims d : kMaskDims) {
    for (const std::int64_t first : {32, 70, 128, 500, 800}) {
      Problem p = normal_problem(d, 840, 64);
      for (std::int64_t i = 0; i < p.rows; ++i) {
        for (std::int64_t j = 0; j < (i % 3 == 0 ? first : i < 32 ? 64 : 0); ++j)
          p.visible[i * p.keys + j] = 0;
      }
      check(p);
    }
  }
}

TEST_P(AmxKernel, RowWithoutKeyIsZero) {
  Problem p = normal_problem({64, 64}, 200, 64);
  for (std::int64_t j = 0; j < p.keys; ++j) p.visible[5 * p.keys + j] = 0;
  for (std::int64_t i = 32; i < 64; ++i) std::fill_n(p.visible.begin() + i * p.keys, p.keys, 0);
  const Result got = check(p);
  for (const std::int64_t row : {5, 32, 63}) {
    EXPECT_EQ(got.lse[row], -kInf);
    for (std::int64_t d = 0; d < 64; ++d) EXPECT_EQ(got.out[row * 64 + d], 0);
  }
}

// Scores of key j that grow past the reference, before and behind the exponentials.
struct ScoreCase {
  const char* name;
  float (*score)(std::int64_t);
};
constexpr ScoreCase kScores[] = {
    {"zero", [](std::int64_t) { return 0.0F; }},
    {"grow 1 a key", [](std::int64_t j) { return static_cast<float>(j); }},
    {"grow 30 per 64 keys", [](std::int64_t j) { return static_cast<float>(30 * (j / 64)); }},
    {"grow 100 per 8 keys", [](std::int64_t j) { return static_cast<float>(100 * (j / 8)); }},
    {"fall 1 a key", [](std::int64_t j) { return static_cast<float>(-j); }},
    {"low first 64", [](std::int64_t j) { return j < 64 ? -5000 : static_cast<float>(j % 7); }},
    {"low first 40", [](std::int64_t j) { return j < 40 ? -1e9F : static_cast<float>(j % 7); }},
    {"one huge key", [](std::int64_t j) { return j == 777 ? 1e5F : static_cast<float>(j % 5); }},
    {"huge last key", [](std::int64_t j) { return j == 1099 ? 1e5F : static_cast<float>(j % 5); }},
    {"sawtooth", [](std::int64_t j) { return 3000.0F * static_cast<float>(j % 331) / 331; }},
    {"far below zero", [](std::int64_t j) { return -4000 - static_cast<float>(j); }},
    {"just below the guard",
     [](std::int64_t j) { return j < 32       ? 0
                                 : j % 9 == 0 ? 27.5F
                                              : 20.0F; }},
    {"2^39 by number", [](std::int64_t j) { return j < 32 ? 0 : 27.0F; }},
    {"equal and far", [](std::int64_t) { return -3e9F; }},
    {"grow 1e6 per 64 keys", [](std::int64_t j) { return 1e6F * static_cast<float>(j / 64); }},
    {"grow 1e6 per 8 keys", [](std::int64_t j) { return 1e6F * static_cast<float>(j / 8); }},
    {"fall from far", [](std::int64_t j) { return 1e12F - 1e10F * static_cast<float>(j / 3); }},
    {"far first 700",
     [](std::int64_t j) {
       return static_cast<float>(j < 700 ? -1000000000 * (9 - j / 90) : j % 7);
     }},
    {"far in turn",
     [](std::int64_t j) { return j % 331 == 5 ? 1e12F * static_cast<float>(1 + j / 331) : -1e9F; }},
};

TEST_P(AmxKernel, ScoresThatBeatTheReference) {
  for (const std::int64_t dim : {64, 128, 256, 80}) {
    for (const ScoreCase& c : kScores) {
      SCOPED_TRACE(testing::Message() << c.name << " dim " << dim);
      Problem p = score_problem(1100, c.score, dim);
      check(p);
      mask_causal(p, 1040);
      check(p);
      mask_random(p, 5);
      check(p);
      mask_causal(p, 0);
      check(p);
    }
  }
}

// p is divided by the sum of what V was multiplied by, so the only p is a weight of 1, however it
// was rounded.
TEST_P(AmxKernel, OneVisibleKeyIsItsValue) {
  for (const Dims d : kMaskDims) {
    for (const std::int64_t keys : {1, 1100}) {
      SCOPED_TRACE(testing::Message() << d.head_dim << " keys " << keys);
      Problem p = normal_problem(d, keys, 90, 11);
      const auto only_key = [&](std::int64_t row) { return row * 367 % keys; };
      for (std::int64_t i = 0; i < p.rows; ++i) {
        for (std::int64_t j = 0; j < keys; ++j) p.visible[i * keys + j] = j == only_key(i);
      }
      const Result got = check(p);
      for (std::int64_t i = 0; i < p.rows; ++i) {
        const float* value = &p.v[only_key(i) * d.v_head_dim];
        for (std::int64_t x = 0; x < d.v_head_dim; ++x)
          ASSERT_EQ(to_bf16(got.out[i * d.v_head_dim + x]), to_bf16(value[x])) << i << "," << x;
      }
    }
  }
}

// Values of 1 show the sum of the weights: 1 but for the additions, at most 200 in a row.
void expect_weights_of_one(const Problem& p, const Result& got) {
  for (std::int64_t i = 0; i < p.rows; ++i) {
    if (got.lse[i] == -kInf) continue;
    for (std::int64_t d = 0; d < p.dims.v_head_dim; ++d) {
      const float out = got.out[i * p.dims.v_head_dim + d];
      if (std::isnan(out)) continue;  // of a visible NaN
      ASSERT_NEAR(out, 1, 200 * 0x1p-24) << "row " << i << " d " << d;
    }
  }
}

TEST_P(AmxKernel, WeightsAddUpToOne) {
  for (const std::int64_t dim : {64, 128, 256, 80}) {
    for (const ScoreCase& c : kScores) {
      SCOPED_TRACE(testing::Message() << c.name << " dim " << dim);
      Problem p = score_problem(1100, c.score, dim);
      std::fill(p.v.begin(), p.v.end(), 1.0F);
      expect_weights_of_one(p, check(p));
      mask_causal(p, 0);
      expect_weights_of_one(p, check(p));
      mask_random(p, 5);
      for (const std::int64_t key : {40, 777}) {  // their tiles are added by selection
        p.v[key * dim + 3] = kNan;
        for (std::int64_t i = 0; i < p.rows; ++i) p.visible[i * p.keys + key] = i == 7 ? 1 : 0;
      }
      expect_weights_of_one(p, check(p));
    }
  }
}

// A lane whose reference is raised again and again, before and behind the exponentials, leaves the
// bits of the others: also of those whose own scores jump to where their reference is barely raised
// or barely not.
TEST_P(AmxKernel, NeighboursKeepTheirBits) {
  for (const Dims d : {Dims{64, 64}, Dims{128, 128}, Dims{256, 256}, Dims{80, 80}}) {
    for (const float growth : {0.03F, 0.3F, 3.0F, 40.0F}) {
      for (int shape = 0; shape < 3; ++shape) {
        Problem p = normal_problem(d, 1100, 90, 3);
        // The first dimension of K grows; only chosen queries look at it.
        for (std::int64_t j = 0; j < p.keys; ++j)
          p.k[j * d.head_dim] = rounded(growth * static_cast<float>(j + 1));
        for (std::int64_t i = 0; i < p.rows; ++i) p.q[i * d.head_dim] = 0;
        for (std::int64_t j = 0; j < p.keys; ++j) {
          p.k[j * d.head_dim + 1] =
              j < 500 ? 0 : rounded(40 * std::sqrt(static_cast<float>(d.head_dim)));
        }
        for (std::int64_t i = 0; i < p.rows; ++i) {
          p.q[i * d.head_dim + 1] = rounded(0.6F + 0.002F * static_cast<float>(i));
        }
        if (shape == 1) mask_causal(p, 1040);
        if (shape == 2) mask_random(p, 9);
        const Result calm = check(p);
        for (const std::int64_t row : {5, 30, 31, 64})
          p.q[row * d.head_dim] = row == 31 ? 100.0F : 10.0F;
        const Result raised = run(*kernel_, p);
        for (std::int64_t i = 0; i < p.rows; ++i) {
          if (i == 5 || i == 30 || i == 31 || i == 64) continue;
          EXPECT_EQ(std::memcmp(&calm.lse[i], &raised.lse[i], 4), 0) << "row " << i;
          EXPECT_EQ(std::memcmp(&calm.out[i * d.v_head_dim], &raised.out[i * d.v_head_dim],
                                d.v_head_dim * 4),
                    0)
              << i;
        }
      }
    }
  }
}

TEST_P(AmxKernel, HiddenNanAndInfReachNobody) {
  for (const Dims d : kMaskDims) {
    for (unsigned seed = 0; seed < 6; ++seed) {
      SCOPED_TRACE(testing::Message() << d.head_dim << " seed " << seed);
      Problem p = normal_problem(d, 700, 90, seed);
      seed < 3 ? mask_random(p, seed) : mask_causal(p, 600 + 5 * seed);
      // Each poisoned key is hidden from all rows but a few; those rows must show it, the others
      // must not.
      std::mt19937 gen(seed);
      for (const std::int64_t key : {3, 40, 77, 200, 389, 390, 640, 699}) {
        const float poison = gen() % 2 == 0 ? kNan : gen() % 2 == 0 ? kInf : -kInf;
        const bool in_value = gen() % 2 == 0;
        for (std::int64_t i = 0; i < p.rows; ++i)
          p.visible[i * p.keys + key] &= in_value ? i % 16 == 7 : 0;
        if (in_value) p.v[key * d.v_head_dim + gen() % d.v_head_dim] = poison;
        if (!in_value) p.k[key * d.head_dim + gen() % d.head_dim] = poison;
      }
      check(p);
      p.all_partial = true;
      check(p);
    }
  }
}

TEST_P(AmxKernel, VisibleNanStaysInItsRow) {
  for (const Dims d : {Dims{64, 64}, Dims{128, 128}, Dims{80, 80}}) {
    Problem p = normal_problem(d, 700, 64);
    p.q[9 * d.head_dim + 3] = kNan;
    p.v[333 * d.v_head_dim + 5] = kNan;  // a full tile: column 5 of all
    p.v[50 * d.v_head_dim + 6] = kInf;
    check(p);
    p = normal_problem(d, 700, 64);
    p.k[100 * d.head_dim + 3] = kNan;
    for (std::int64_t i = 0; i < p.rows; ++i) p.visible[i * p.keys + 100] = i == 20 ? 1 : 0;
    const Result got = check(p);
    EXPECT_TRUE(std::isnan(got.lse[20]));
    EXPECT_FALSE(std::isnan(got.lse[21]));
  }
}

// Rounding p up carries such a NaN into its sign: P is a zero.
TEST_P(AmxKernel, NanOfAllOnesStaysNan) {
  Problem p = normal_problem({64, 64}, 100, 32);
  p.rule.bias = true;
  p.bias.assign(p.rows * p.keys, 0);
  const std::uint32_t ones[] = {0x7fffffffU, 0xffffffffU};
  for (const std::int64_t row : {0, 1}) std::memcpy(&p.bias[row * p.keys + 70], &ones[row], 4);
  check(p);
}

// +inf: exp(inf) as the float32 formula has it. -inf: weight 0.
TEST_P(AmxKernel, InfiniteScores) {
  for (const std::int64_t at : {0, 40, 600}) {
    Problem p = normal_problem({64, 64}, 700, 64);
    for (std::int64_t i = 0; i < p.rows; ++i) p.q[i * 64] = i == 3 ? 1.0F : i == 4 ? -1.0F : 0.5F;
    p.k[at * 64] = kInf;
    for (std::int64_t i = 0; i < p.rows; ++i) p.visible[i * p.keys + at] = i == 3 || i == 4 ? 1 : 0;
    const Result got = run(*kernel_, p);
    EXPECT_EQ(got.lse[3], kInf);
    EXPECT_TRUE(std::isfinite(got.lse[4]));
    EXPECT_TRUE(std::isfinite(got.lse[5]));
    p.k[at * 64] = 0;
    for (const std::int64_t row : {3, 4}) p.visible[row * p.keys + at] = 0;
    const Result without = run(*kernel_, p);
    for (std::int64_t i = 0; i < p.rows; ++i) {
      if (i == 3) continue;
      EXPECT_EQ(got.lse[i], without.lse[i]) << i;
      for (std::int64_t d = 0; d < 64; ++d) EXPECT_EQ(got.out[i * 64 + d], without.out[i * 64 + d]);
    }
  }
}

TEST_P(AmxKernel, SoftCapAndBias) {
  for (const Dims d : {Dims{64, 64}, Dims{128, 128}, Dims{72, 40}}) {
    for (int kind = 1; kind < 4; ++kind) {
      for (const float scale : {0.1F, 4.0F, -0.2F}) {
        SCOPED_TRACE(testing::Message() << d.head_dim << " kind " << kind << " scale " << scale);
        Problem p = normal_problem(d, 700, 90);
        p.rule.scale = scale, p.rule.cap = (kind & 1) != 0 ? 20.0F : 0;
        p.rule.bias = (kind & 2) != 0;
        mask_random(p, 3);
        std::mt19937 gen(1);
        std::normal_distribution<float> normal(0, 5);
        if (p.rule.bias) {
          p.bias.resize(p.rows * p.keys);
          for (std::int64_t i = 0; i < p.rows * p.keys; ++i)
            p.bias[i] = p.visible[i] ? normal(gen) : kNan;
          p.bias[2] = p.visible[2] ? -kInf : kNan;
        }
        check(p);
      }
    }
  }
}

// Dropped pairs count in lse and in the sum that divides, not in out. References are raised, too,
// while P waits.
TEST_P(AmxKernel, Dropout) {
  for (const Dims d : kMaskDims) {
    for (const double probability : {0.0, 0.1, 0.7}) {
      for (unsigned seed = 0; seed < 3; ++seed) {
        SCOPED_TRACE(testing::Message()
                     << d.head_dim << " probability " << probability << " seed " << seed);
        Problem p = normal_problem(d, seed == 0 ? 33 : 1100, 90, seed);
        if (seed > 0) mask_random(p, seed);
        const Result whole = check(p);
        drop_pairs(p, probability, seed);
        const Result got = check(p);
        EXPECT_EQ(got.lse, whole.lse);
        if (probability == 0) {
          EXPECT_EQ(got.out, whole.out);
        }
        Problem growing = score_problem(
            1100, [](std::int64_t j) { return 0.5F * j; }, 64);
        drop_pairs(growing, probability, seed);
        check(growing);
      }
    }
  }
}

// What is hidden or dropped reaches nobody, also from tiles that are seen whole.
TEST_P(AmxKernel, DroppedNanAndInfReachNobody) {
  for (const Dims d : {Dims{64, 64}, Dims{128, 128}, Dims{80, 40}}) {
    for (const bool masked : {false, true}) {
      Problem p = normal_problem(d, 700, 64);
      if (masked) mask_random(p, 2);
      drop_pairs(p, 0.3, 4);
      for (const std::int64_t key : {0, 77, 390, 391, 699}) {
        p.v[key * d.v_head_dim + key % d.v_head_dim] = key % 2 == 0 ? kNan : kInf;
        for (std::int64_t i = 0; i < p.rows; ++i) p.kept[i * p.keys + key] = i % 16 == 7;
      }
      const Result got = check(p);
      EXPECT_TRUE(std::isfinite(got.out[0]));
    }
  }
}

TEST_P(AmxKernel, NegativeAndZeroScale) {
  for (const float scale : {-0.3F, 0.0F}) {
    Problem p = normal_problem({64, 64}, 700, 64);
    p.rule.scale = scale;
    mask_random(p, 4);
    check(p);
  }
}

// Small scores under a large cap: tanh must be right relative to its argument.
TEST_P(AmxKernel, SoftCapNearZeroIsTheIdentity) {
  Problem p = score_problem(1, [](std::int64_t) { return 0.75F; });
  for (const float cap : {0.5F, 1.0F, 1.5F, 30.0F, 1e4F, 1e8F}) {
    p.rule.cap = cap;
    const Result got = run(*kernel_, p);
    EXPECT_NEAR(got.lse[0], cap * std::tanh(0.75 / cap), 4e-6);
  }
}

TEST_P(AmxKernel, SinksFarAboveAndBelow) {
  Problem p = normal_problem({64, 64}, 300, 64);
  for (std::int64_t i = 0; i < p.rows; ++i) {
    const float sinks[] = {-kInf, 0, 5, 1000, -1000, 1e30F, 88};
    p.sinks[i] = sinks[i % 7];
    if (i % 5 == 0) std::fill_n(p.visible.begin() + i * p.keys, p.keys, 0);
  }
  const Result got = check(p);
  EXPECT_EQ(got.lse[10], 1000);  // sinks only
  EXPECT_EQ(got.out[10 * 64], 0);
}

}  // namespace
}  // namespace annulus
#endif
