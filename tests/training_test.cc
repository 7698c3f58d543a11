// The backward on every target, against the oracle by the bars of gradient_bars.h.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
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

// The largest error of dv, as a share of the sum of |dout| that flows into a row of it.
double worst_dv(const Training& t, const std::function<double(std::int64_t, std::int64_t)>& p) {
  const auto [rows, heads, dim] =
      std::array{t.dout.shape()[1], t.dout.shape()[2], t.dout.shape()[3]};
  double worst = 0;
  for (std::int64_t j = 0; j < t.dv.shape()[1]; ++j) {
    for (std::int64_t d = 0; d < dim; ++d) {
      double exact = 0, magnitude = 0;
      for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t h = 0; h < heads; ++h) {
          exact += p(i, j) * t.dout.get(0, i, h, d), magnitude += std::abs(t.dout.get(0, i, h, d));
        }
      }
      worst = std::max(worst, std::abs(t.dv.get(0, j, 0, d) - exact) / magnitude);
      if (std::isnan(t.dv.get(0, j, 0, d))) return INFINITY;
    }
  }
  return worst;
}

// One key far above the others, wherever the scores lie: its weight is 1. With a bias it is another
// key in every row and a third of the rows are like any other; without one, q k makes the scores.
TEST(Backward, ScoresOfAnySize) {
  constexpr std::int64_t kRows = 40, kKeys = 60;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const std::string& target : targets_for(dtype)) {
      for (const double size : {1e5, 2e6, 1e9, 1e20, 3.3e38}) {
        for (const double sign : {1.0, -1.0}) {
          for (const bool biased : {true, false}) {
            if (!biased && size > 6e37) continue;  // the dot product would overflow
            SCOPED_TRACE(::testing::Message() << name(dtype) << " " << target << " " << sign * size
                                              << (biased ? " bias" : ""));
            Training t(dtype, {.q_len = kRows,
                               .kv_len = kKeys,
                               .heads = 2,
                               .kv_heads = 1,
                               .head_dim = 24,
                               .v_head_dim = 40});
            const auto top = [&](std::int64_t i) { return biased ? (7 * i + 3) % kKeys : 5; };
            const auto like_any = [&](std::int64_t i) { return biased && i % 3 == 0; };
            const auto score = [&](std::int64_t i, std::int64_t j) {
              if (like_any(i)) return 0.25 * static_cast<double>(j % 5);
              return sign * ((j == top(i)) == (sign > 0) ? 1.0 : 0.5) * size;
            };
            const double root = std::sqrt(size / std::sqrt(24.0));  // of a score, per dimension
            t.in.q.fill([&](auto...) { return biased ? 0 : sign * root; });
            t.in.k.fill([&](auto, std::int64_t j, auto, std::int64_t d) {
              return biased ? 0.5 + 0.01 * static_cast<double>(d)
                            : root * score(0, j) / (sign * size);
            });
            t.bias = Tensor(DType::kFloat32, {1, 2, kRows, kKeys});
            t.dbias = Tensor(DType::kFloat32, t.bias.shape());
            t.bias.fill([&](auto, auto, std::int64_t i, std::int64_t j) { return score(i, j); });
            RingOptions options;
            options.attention.isa = target;
            if (biased) options.attention.bias = t.bias;
            if (!biased) t.dbias = {};
            const auto check = t.run_and_check(options, 1);
            EXPECT_TRUE(check.passed) << check.verdict;
            const auto p = [&](std::int64_t i, std::int64_t j) {
              if (!like_any(i)) return j == top(i) ? 1.0 : 0.0;
              double sum = 0;
              for (std::int64_t n = 0; n < kKeys; ++n) sum += std::exp(score(i, n));
              return std::exp(score(i, j)) / sum;
            };
            EXPECT_LE(worst_dv(t, p), dtype == DType::kFloat32 ? 1e-5 : 0x1p-8);
          }
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
