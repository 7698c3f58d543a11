// The backward on every target, against the oracle by the bars of gradient_bars.h.

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "annulus/gradient_bars.h"
#include "annulus/ring.h"
#include "testing.h"
#include "training_testing.h"

namespace annulus::testing {
namespace {

TEST(Backward, Plain) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const std::string& target : targets_for(dtype)) {
      SCOPED_TRACE(std::string(name(dtype)) + " " + target);
      Training t(dtype, {.q_len = 150,
                         .kv_len = 150,
                         .heads = 2,
                         .kv_heads = 1,
                         .head_dim = 40,
                         .v_head_dim = 24});
      RingOptions options;
      options.attention.isa = target;
      const auto check = t.run_and_check(options, 1);
      EXPECT_TRUE(check.passed) << check.verdict;
    }
  }
}

TEST(Backward, CausalRing) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const RingBackward travel : {RingBackward::kKeys, RingBackward::kQueries}) {
      for (const int workers : {1, 2, 3, 5}) {
        for (const bool fused : {true, false}) {
          for (const Topology topology : {Topology::kRing, Topology::kLinear}) {
            SCOPED_TRACE(::testing::Message()
                         << name(dtype) << " workers " << workers << " fused " << fused
                         << " topology " << int(topology) << " travel " << int(travel));
            Training t(dtype, {.q_len = 210,
                               .kv_len = 210,
                               .heads = 2,
                               .kv_heads = 2,
                               .head_dim = 32,
                               .v_head_dim = 32});
            RingOptions options;
            options.attention.causal = true;
            options.attention.sliding_window = {100, -1};
            options.partition = Partition::zigzag();
            options.topology = topology, options.ring_backward = travel,
            options.fused_backward = fused;
            const auto check = t.run_and_check(options, workers);
            EXPECT_TRUE(check.passed) << check.verdict;
          }
        }
      }
    }
  }
}

// What a row sees reaches its gradients, NaN and all; what no row sees reaches nobody.
TEST(Backward, VisibleNanPropagatesAsInTheOracle) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const std::string& target : targets_for(dtype)) {
      for (const char* where : {"q", "k", "v", "dout"}) {
        for (const bool causal : {false, true}) {
          SCOPED_TRACE(std::string(name(dtype)) + " " + target + " " + where +
                       (causal ? " causal" : ""));
          Training t(dtype, {.q_len = 70,
                             .kv_len = 70,
                             .heads = 2,
                             .kv_heads = 1,
                             .head_dim = 24,
                             .v_head_dim = 40});
          const std::string tensor = where;
          Tensor& hit = tensor == "q"   ? t.in.q
                        : tensor == "k" ? t.in.k
                        : tensor == "v" ? t.in.v
                                        : t.dout;
          hit.set(0, 41, 0, 5, kNan);
          RingOptions options;
          options.attention.isa = target, options.attention.causal = causal;
          const auto check = t.run_and_check(options, 1);
          EXPECT_TRUE(check.passed) << check.verdict;
        }
      }
    }
  }
}

// One key far above the others, wherever the scores lie: float32 knows its weight exactly.
TEST(Backward, ScoresOfAnySize) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const std::string& target : targets_for(dtype)) {
      for (const double size : {1e5, 2e6, 1e9, 1e12, 1e20, 3.4e38}) {
        for (const double sign : {1.0, -1.0}) {
          SCOPED_TRACE(::testing::Message() << name(dtype) << " " << target << " " << sign * size);
          const Shape shape{.q_len = 70,
                            .kv_len = 90,
                            .heads = 2,
                            .kv_heads = 1,
                            .head_dim = 24,
                            .v_head_dim = 40};
          Training t(dtype, shape);
          t.bias = Tensor(DType::kFloat32, {1, 2, shape.q_len, shape.kv_len});
          t.dbias = Tensor(DType::kFloat32, t.bias.shape());
          t.bias.fill([&](auto, auto, std::int64_t i, std::int64_t j) {
            const bool top = j == (7 * i + 3) % shape.kv_len;
            if (i % 3 == 0) return 0.1 * static_cast<double>(j % 5);  // a row like any other
            return sign * size * (top == (sign > 0) ? 1.0 : 0.5);
          });
          RingOptions options;
          options.attention.isa = target, options.attention.bias = t.bias;
          const auto check = t.run_and_check(options, 1);
          EXPECT_TRUE(check.passed) << check.verdict;
        }
      }
    }
  }
}

// Equal keys round alike, and so do the rows of their gradients: an error counts many times.
TEST(Backward, RepeatedKeys) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const std::string& target : targets_for(dtype)) {
      for (const std::int64_t keys : {2, 40, 300}) {
        for (const std::int64_t different : {1, 2}) {
          for (unsigned seed = 1; seed <= 5; ++seed) {
            SCOPED_TRACE(::testing::Message() << name(dtype) << " " << target << " keys " << keys
                                              << " different " << different << " seed " << seed);
            Training t(dtype,
                       {.q_len = 70,
                        .kv_len = keys,
                        .heads = 2,
                        .kv_heads = 1,
                        .head_dim = 24,
                        .v_head_dim = 40},
                       seed);
            for (Tensor* x : {&t.in.k, &t.in.v}) {
              const Tensor before = *x;
              x->fill([&](std::int64_t b, std::int64_t j, std::int64_t h, std::int64_t d) {
                return before.get(b, j % different, h, d);
              });
            }
            RingOptions options;
            options.attention.isa = target;
            const auto check = t.run_and_check(options, 1);
            EXPECT_TRUE(check.passed) << check.verdict;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace annulus::testing
