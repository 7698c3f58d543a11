// attention() on every target this CPU has, against the oracle and the numeric bars.

#include "testing.h"

namespace annulus::testing {
namespace {

struct Case {
  std::string name;
  Shape shape;
  std::function<void(AttentionOptions&)> options = [](AttentionOptions&) {};
};

std::vector<Case> shape_cases() {
  std::vector<Case> cases;
  const auto add = [&](
                       const std::string& name, Shape s,
                       std::function<void(AttentionOptions&)> o = [](AttentionOptions&) {}) {
    cases.push_back({name, s, std::move(o)});
  };
  const auto causal = [](AttentionOptions& o) { o.causal = true; };
  for (const std::int64_t d : {1, 7, 32, 64, 72, 80, 128, 129})
    add("dim" + std::to_string(d), {1, 37, 83, 2, 1, d, d});
  add("v_dim_smaller", {1, 40, 70, 2, 2, 192, 128});
  add("v_dim_larger", {1, 40, 70, 2, 2, 40, 100});
  add("wide_dim", {1, 33, 65, 1, 1, 600, 520});
  for (const std::int64_t n : {1, 2, 3, 7, 8, 9, 15, 17, 31, 33, 63, 255, 257, 511, 513, 1029}) {
    add("keys" + std::to_string(n), {1, 5, n, 1, 1, 16, 16});
    add("causal" + std::to_string(n), {1, n, n, 1, 1, 16, 16}, causal);
  }
  add("bottom_right", {2, 17, 90, 2, 2, 32, 32}, causal);
  add("bottom_right_short_keys", {2, 90, 17, 2, 2, 32, 32}, causal);
  add("top_left", {1, 17, 90, 2, 2, 32, 32},
      [](AttentionOptions& o) { o.causal = true, o.causal_alignment = CausalAlignment::kTopLeft; });
  for (const std::int64_t group : {2, 3, 5, 8, 40})
    add("group" + std::to_string(group), {2, 21, 45, 2 * group, 2, 24, 24}, causal);
  add("window", {1, 300, 300, 1, 1, 32, 32}, [](AttentionOptions& o) {
    o.sliding_window = {40, 9};
  });
  add("window_left_only", {1, 300, 300, 1, 1, 32, 32}, [](AttentionOptions& o) {
    o.sliding_window = {40, -1};
  });
  add("window_zero", {1, 100, 100, 1, 1, 32, 32}, [](AttentionOptions& o) {
    o.sliding_window = {0, 0};
  });
  add("window_causal", {1, 300, 300, 1, 1, 32, 32}, [](AttentionOptions& o) {
    o.causal = true, o.sliding_window = {40, 9};
  });
  add("chunk", {1, 300, 300, 1, 1, 32, 32}, [](AttentionOptions& o) { o.chunk_size = 37; });
  add("soft_cap", {1, 100, 200, 2, 1, 64, 64}, [](AttentionOptions& o) { o.logits_soft_cap = 2; });
  add("soft_cap_causal", {1, 200, 200, 2, 1, 64, 64},
      [](AttentionOptions& o) { o.logits_soft_cap = 30, o.causal = true; });
  add("scale", {1, 50, 60, 1, 1, 64, 64}, [](AttentionOptions& o) { o.softmax_scale = 0.3; });
  add("scale_negative", {1, 50, 60, 1, 1, 64, 64},
      [](AttentionOptions& o) { o.softmax_scale = -0.2; });
  add("scale_zero", {1, 50, 60, 1, 1, 64, 64}, [](AttentionOptions& o) { o.softmax_scale = 0; });
  add("no_keys", {1, 9, 0, 1, 1, 16, 16});
  add("no_queries", {1, 0, 9, 1, 1, 16, 16});
  add("no_batch", {0, 4, 9, 1, 1, 16, 16});
  return cases;
}

std::string first_failure(const reference::CheckResult& result) {
  return result.passed ? "" : result.verdict;
}

class EveryTarget : public ::testing::TestWithParam<std::tuple<DType, std::string>> {
 protected:
  [[nodiscard]] DType dtype() const { return std::get<0>(GetParam()); }
  AttentionOptions options() const {
    AttentionOptions o;
    o.isa = std::get<1>(GetParam()), o.threads = 1;
    return o;
  }
  static RingOptions ring(AttentionOptions o) {
    RingOptions r;
    r.attention = std::move(o);
    return r;
  }
};

TEST_P(EveryTarget, ShapesAndRules) {
  for (const Case& c : shape_cases()) {
    for (const Layout layout : {Layout::kBshd, Layout::kBhsd, Layout::kBhds}) {
      if (layout != Layout::kBshd && c.shape.q_len > 64) continue;
      Inputs in(dtype(), c.shape, 3, true, layout);
      AttentionOptions o = options();
      c.options(o);
      EXPECT_EQ(first_failure(run_and_check(in, ring(o), 1)), "") << c.name;
    }
  }
}

TEST_P(EveryTarget, SegmentsLengthsAndMasks) {
  const Shape s{3, 130, 130, 4, 2, 32, 32};
  Tensor ids(DType::kInt32, {3, 130, 1, 1}), lengths(DType::kInt32, {3, 1, 1, 1});
  ids.fill([](std::int64_t b, std::int64_t t, auto...) { return (t + 7 * b) / 31 % 4; });
  lengths.fill([](std::int64_t b, auto...) { return b == 0 ? 0 : 40 * b; });
  Tensor mask(DType::kBool, {1, 4, 130, 130});
  mask.fill([](std::int64_t, std::int64_t h, std::int64_t i, std::int64_t j) {
    return (i * 31 + j * 17 + h * 5) % 11 < 4;
  });
  for (int rules = 1; rules < 32; ++rules) {
    AttentionOptions o = options();
    if (rules & 1) o.q_segment_ids = ids;
    if (rules & 2) o.kv_lengths = lengths;
    if (rules & 4) o.attention_mask = mask;
    if (rules & 8) o.causal = true;
    if (rules & 16) {
      if (!(rules & 1)) continue;
      o.padding_segment_id = 2;
    }
    Inputs in(dtype(), s, 5);
    EXPECT_EQ(first_failure(run_and_check(in, ring(o), 1)), "") << "rules " << rules;
  }
}

TEST_P(EveryTarget, MaskBuilderPerHead) {
  const Shape s{2, 90, 90, 6, 3, 16, 16};
  AttentionOptions o = options();
  o.mask_builder = [](std::int64_t q_len, std::int64_t kv_len, std::int64_t heads,
                      std::int64_t head, std::int64_t reps) {
    EXPECT_EQ(std::vector<std::int64_t>({q_len, kv_len, heads, reps}),
              std::vector<std::int64_t>({90, 90, 6, 2}));
    switch (head) {
      case 0:
        return Mask::causal();
      case 1:
        return Mask::sliding_window(5, 3) | Mask::prefix(4);
      case 2:
        return Mask::chunked(16);
      case 3:
        return Mask::block_sparse(16, 6, 6, std::vector<std::uint8_t>(36, 1)) & Mask::causal();
      case 4:
        return Mask::prefix(0);
      default:
        return Mask::full();
    }
  };
  Inputs in(dtype(), s, 6);
  EXPECT_EQ(first_failure(run_and_check(in, ring(o), 1)), "");
}

TEST_P(EveryTarget, SinksAndBias) {
  const Shape s{2, 70, 90, 4, 2, 32, 32};
  Tensor per_head(DType::kFloat32, {4, 1, 1, 1}), several(DType::kFloat32, {4, 3, 1, 1}),
      shared(DType::kFloat32, {3, 1, 1, 1});
  per_head.fill([](std::int64_t h, auto...) { return h == 3 ? -INFINITY : 5 + h; });
  several.fill([](std::int64_t h, std::int64_t n, auto...) {
    return h == 0 ? 200.0 : static_cast<double>(n) - static_cast<double>(h);
  });
  shared.fill([](std::int64_t n, auto...) { return 4.0 + static_cast<double>(n); });
  const auto rank_one = [](const Tensor& t) {
    TensorView view = t;
    view.shape[1] = 0;
    return view;
  };
  Tensor bias(dtype(), {1, 4, 70, 90}), wide(DType::kFloat32, {2, 1, 70, 90});
  bias.normal(9), wide.normal(10);
  for (const TensorView& sinks :
       {rank_one(per_head), TensorView(several), rank_one(shared), TensorView{}}) {
    for (const TensorView& b : {TensorView{}, TensorView(bias), TensorView(wide)}) {
      AttentionOptions o = options();
      o.softmax_aux = sinks, o.bias = b, o.causal = true;
      Inputs in(dtype(), s, 7);
      EXPECT_EQ(first_failure(run_and_check(in, ring(o), 1)), "");
    }
  }
}

// Scores that grow or fall, dominate or vanish: what breaks a softmax without a maximum pass.
TEST_P(EveryTarget, HostileScores) {
  const std::pair<const char*, std::function<double(std::int64_t)>> cases[] = {
      {"zero", [](std::int64_t) { return 0.0; }},
      {"growing", [](std::int64_t j) { return static_cast<double>(j); }},
      {"growing 30 per 64", [](std::int64_t j) { return 30.0 * static_cast<double>(j / 64); }},
      {"growing 100 per 8", [](std::int64_t j) { return 100.0 * static_cast<double>(j / 8); }},
      {"falling", [](std::int64_t j) { return -static_cast<double>(j); }},
      {"low start", [](std::int64_t j) { return j < 64 ? -5000.0 : static_cast<double>(j % 7); }},
      {"one huge last key",
       [](std::int64_t j) { return j == 699 ? 1e5 : static_cast<double>(j % 5); }},
      {"sawtooth", [](std::int64_t j) { return 3000.0 * static_cast<double>(j % 331) / 331; }},
      {"all large", [](std::int64_t j) { return 1e4 + static_cast<double>(j % 3); }},
  };
  for (const auto& [name, score] : cases) {
    for (const bool causal : {false, true}) {
      Inputs in(dtype(), {1, 700, 700, 1, 1, 16, 16}, 8);
      in.q.fill([](auto...) { return 1; });
      in.k.fill(
          [&, &value = score](std::int64_t, std::int64_t j, auto...) { return value(j) / 4; });
      AttentionOptions o = options();
      o.causal = causal;
      EXPECT_EQ(first_failure(run_and_check(in, ring(o), 1, 60 / kTestScale)), "")
          << name << (causal ? " causal" : "");
    }
  }
}

// What a row does not see never reaches it; what it sees reaches it elementwise.
// Values are unit vectors, so that out holds the weights themselves. Scores jump by hundreds: what
// the largest key leaves of the others must not depend on the order in which they come.
TEST_P(EveryTarget, SmallWeightsKeepTheirDigits) {
  constexpr std::int64_t kKeys = 60;
  std::mt19937_64 random(7);
  Tensor q(dtype(), {1, 1, 1, 4}), k(dtype(), {1, kKeys, 1, 4}), v(dtype(), {1, kKeys, 1, kKeys});
  q.fill([](auto, auto, auto, std::int64_t d) { return d == 0 ? 1.0 : 0.0; });
  v.fill([](auto, std::int64_t j, auto, std::int64_t d) { return j == d ? 1.0 : 0.0; });
  Tensor out(DType::kFloat32, {1, 1, 1, kKeys}), lse(DType::kFloat32, {1, 1, 1, 1});
  for (int draw = 0; draw < 200; ++draw) {
    std::normal_distribution<double> normal(0, std::array{10, 25, 40, 60}[draw % 4]);
    k.fill([&](auto, auto, auto, std::int64_t d) {
      return d == 0 ? std::clamp(std::round(normal(random)), -250.0, 250.0) : 0.0;
    });
    AttentionOptions o = options();
    o.softmax_scale = 1;
    const std::vector<double> exact = reference::attention_row(q, k, v, o, 0, 0, 0).out;
    for (const int workers : {1, 3}) {
      ring_attention(workers, q, k, v, out.mutable_view(), lse.mutable_view(), ring(o));
      for (std::int64_t j = 0; j < kKeys; ++j) {
        const double weight = exact[static_cast<std::size_t>(j)];
        // bfloat16 probabilities: one rounding of the weight, one of their sum.
        ASSERT_NEAR(out.get(0, 0, 0, j), weight, 0x1p-7 * weight + 0x1p-80)
            << "draw " << draw << ", key " << j << ", workers " << workers;
      }
    }
  }
}

// As large as float32 gets, and in any order: additive masks hold the lowest number, for whole rows
// too.
TEST_P(EveryTarget, ScoresOfAnySize) {
  constexpr std::int64_t kKeys = 40;
  const AttentionOptions plain = options();
  Tensor q(dtype(), {1, 1, 1, 4}), k(dtype(), {1, kKeys, 1, 4}), v(dtype(), {1, kKeys, 1, kKeys});
  v.fill([](auto, std::int64_t j, auto, std::int64_t d) { return j == d ? 1.0 : 0.0; });
  Tensor bias(DType::kFloat32, {1, 1, 1, kKeys});
  Tensor out(DType::kFloat32, {1, 1, 1, kKeys}), lse(DType::kFloat32, {1, 1, 1, 1});
  const std::vector<std::function<double(std::int64_t)>> shapes{
      [](std::int64_t) { return 1.0; },
      [](std::int64_t j) { return 0.5 + 0.0125 * static_cast<double>(j); },
      [](std::int64_t j) { return 1.0 - 0.0125 * static_cast<double>(j); },
      [](std::int64_t j) { return j < 25 ? 1.0 : 1e-39 * static_cast<double>(j); },
      [](std::int64_t j) { return j >= 9 && j % 3 != 0 ? 1.0 : 1e-39 * static_cast<double>(j); }};
  for (const double size : {1e5, 2e6, 1e9, 1e12, 1e20, 3.4e38}) {
    for (const double sign : {1.0, -1.0}) {
      for (std::size_t n = 0; n < shapes.size(); ++n) {
        bias.fill([&](auto, auto, auto, std::int64_t j) { return sign * size * shapes[n](j); });
        AttentionOptions o = plain;
        o.bias = bias;
        const reference::Row exact = reference::attention_row(q, k, v, o, 0, 0, 0);
        for (const int workers : {1, 3}) {
          ring_attention(workers, q, k, v, out.mutable_view(), lse.mutable_view(), ring(o));
          ASSERT_NEAR(lse.get(0, 0, 0, 0), exact.lse, 4e-6 * std::max(1.0, std::abs(exact.lse)))
              << sign * size << ", shape " << n;
          for (std::int64_t j = 0; j < kKeys; ++j) {
            const double weight = exact.out[static_cast<std::size_t>(j)];
            ASSERT_NEAR(out.get(0, 0, 0, j), weight, 0x1p-7 * weight + 1e-20)
                << sign * size << ", shape " << n << ", key " << j << ", workers " << workers;
          }
        }
      }
    }
  }
}

// Scores that cross what a kernel calls far, where what came before may still count, and that lie
// further apart than the largest number. q is 0, so that the bias is the score. Without FMA an
// exponent of 2^16 is rounded to 2^-8.
TEST_P(EveryTarget, ScoresBeyondEachOther) {
  constexpr std::int64_t kKeys = 512;
  const std::vector<std::function<double(std::int64_t)>> shapes{
      [](std::int64_t j) {
        return j == 0 ? 45410.0 : j == 256 ? 45437 : j == 400 ? 45439 : 44610;
      },
      [](std::int64_t j) { return j < 256    ? 45410.0
                                  : j == 400 ? 45439
                                             : 45437; },
      [](std::int64_t j) { return 45310 + 0.25 * static_cast<double>(j); },
      [](std::int64_t j) { return 45310 + 20.0 * static_cast<double>(j / 16); },
      [](std::int64_t j) { return -45310 - 0.25 * static_cast<double>(j); },
      [](std::int64_t j) { return j == 400 ? 1e38 : -3e38; },
      [](std::int64_t j) { return j == 100   ? 1e38
                                  : j == 400 ? 3.0
                                             : -3e38; },
      [](std::int64_t j) { return j % 90 == 17 ? 3.4e38 : -3.4e38; }};
  for (std::size_t n = 0; n < shapes.size(); ++n) {
    Inputs in(dtype(), {1, 40, kKeys, 1, 1, 16, 16}, 15);
    in.q.fill([](auto...) { return 0.0; });
    Tensor bias(DType::kFloat32, {1, 1, 40, kKeys});
    bias.fill([&](auto, auto, auto, std::int64_t j) { return shapes[n](j); });
    RingOptions o = ring(options());
    o.attention.bias = bias;
    const reference::Row exact = reference::attention_row(in.q, in.k, in.v, o.attention, 0, 0, 0);
    for (const int workers : {1, 3}) {
      ring_attention(workers, in.q, in.k, in.v, in.out.mutable_view(), in.lse.mutable_view(), o);
      for (const std::int64_t i : {0, 17, 39}) {
        EXPECT_NEAR(in.lse.get(0, i, 0, 0), exact.lse, 1e-6 * std::abs(exact.lse)) << "shape " << n;
        for (std::int64_t d = 0; d < 16; ++d) {
          const auto at = static_cast<std::size_t>(d);
          ASSERT_NEAR(in.out.get(0, i, 0, d), exact.out[at], 0x1p-6 * exact.abs_out[at])
              << "shape " << n << ", workers " << workers;
        }
      }
    }
  }
}

TEST_P(EveryTarget, NotFiniteInputs) {
  const double kNan = std::numeric_limits<double>::quiet_NaN();
  for (const double poison :
       {kNan, static_cast<double>(INFINITY), -static_cast<double>(INFINITY)}) {
    Inputs in(dtype(), {1, 80, 80, 1, 1, 16, 16}, 11);
    for (const std::int64_t j : {7, 30, 31, 63, 79}) in.v.set(0, j, 0, j % 16, poison);
    for (const std::int64_t j : {50, 51, 70}) in.k.set(0, j, 0, 3, poison);
    AttentionOptions o = options();
    o.causal = true;
    EXPECT_EQ(first_failure(run_and_check(in, ring(o), 1)), "") << "causal " << poison;

    Tensor lengths(DType::kInt32, {1, 1, 1, 1});
    lengths.fill([](auto...) { return 29; });
    Inputs again(dtype(), {1, 80, 80, 1, 1, 16, 16}, 12);
    for (std::int64_t j = 29; j < 80; ++j) {
      for (std::int64_t d = 0; d < 16; ++d)
        again.k.set(0, j, 0, d, poison), again.v.set(0, j, 0, d, poison);
    }
    AttentionOptions with_length = options();
    with_length.kv_lengths = lengths;
    EXPECT_EQ(first_failure(run_and_check(again, ring(with_length), 1)), "")
        << "lengths " << poison;
  }
}

TEST_P(EveryTarget, MaskedBiasIsNeverRead) {
  Inputs in(dtype(), {1, 50, 50, 1, 1, 16, 16}, 13);
  Tensor bias(DType::kFloat32, {1, 1, 50, 50});
  bias.fill([](std::int64_t, std::int64_t, std::int64_t i, std::int64_t j) {
    return j > i ? std::nan("") : 0.01 * static_cast<double>(i - j);
  });
  AttentionOptions o = options();
  o.causal = true, o.bias = bias;
  EXPECT_EQ(first_failure(run_and_check(in, ring(o), 1)), "");
}

// Rows are independent: one that raises its reference leaves its neighbours' bits alone.
TEST_P(EveryTarget, NeighboursKeepTheirBits) {
  Inputs in(dtype(), {1, 128, 600, 1, 1, 32, 32}, 14);
  (void)attention(in.q, in.k, in.v, in.out.mutable_view(), in.lse.mutable_view(), options());
  const std::vector<std::byte> before = in.out.bytes();
  const Tensor first = in.out;
  for (std::int64_t i = 5; i < 128; i += 32) {
    for (std::int64_t d = 0; d < 32; ++d) in.q.set(0, i, 0, d, 300 * in.q.get(0, i, 0, d));
  }
  (void)attention(in.q, in.k, in.v, in.out.mutable_view(), in.lse.mutable_view(), options());
  for (std::int64_t i = 0; i < 128; ++i) {
    if (i % 32 == 5) continue;
    for (std::int64_t d = 0; d < 32; ++d)
      ASSERT_EQ(first.get(0, i, 0, d), in.out.get(0, i, 0, d)) << i;
  }
}

TEST_P(EveryTarget, SameBitsForAnyNumberOfThreads) {
  const Shape s{2, 700, 700, 4, 2, 32, 32};
  std::vector<std::byte> first;
  for (const int threads : {1, 2, 3, 4}) {
    Inputs in(dtype(), s, 15);
    AttentionOptions o = options();
    o.causal = true, o.threads = threads;
    (void)attention(in.q, in.k, in.v, in.out.mutable_view(), in.lse.mutable_view(), o);
    if (first.empty()) first = in.out.bytes();
    EXPECT_EQ(first, in.out.bytes()) << threads << " threads";
  }
}

TEST_P(EveryTarget, Float32OutputOfNarrowInputs) {
  Inputs in(dtype(), {1, 60, 200, 2, 2, 64, 64}, 16);
  in.out = Tensor(DType::kFloat32, in.out.shape());
  EXPECT_EQ(first_failure(run_and_check(in, ring(options()), 1)), "");
}

std::vector<std::tuple<DType, std::string>> all_targets() {
  std::vector<std::tuple<DType, std::string>> params;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const std::string& target : targets_for(dtype)) params.emplace_back(dtype, target);
  }
  return params;
}

INSTANTIATE_TEST_SUITE_P(Attention, EveryTarget, ::testing::ValuesIn(all_targets()),
                         [](const auto& instance) {
                           return std::string(name(std::get<0>(instance.param))) + "_" +
                                  std::get<1>(instance.param);
                         });

TEST(Attention, LongInputsMeetTheBarsStrictly) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const bool causal : {false, true}) {
      Inputs in(dtype, {1, 3000, 3000, 1, 1, 64, 64}, 17, true);
      RingOptions o;
      o.attention.causal = causal;
      const reference::CheckResult result = run_and_check(in, o, 1, 400 / kTestScale);
      EXPECT_TRUE(result.passed) << result.verdict;
    }
  }
}

}  // namespace
}  // namespace annulus::testing
