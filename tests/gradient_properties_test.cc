// What must hold of gradients whatever the numbers: random problems, shrunk to small ones where
// they fail.

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "core/visibility_testing.h"
#include "grid_run.h"
#include "training_testing.h"

namespace annulus::testing {
namespace {

// Any cell of the grid; failing ones shrink towards the simplest values.
Cell any_cell() {
  Cell cell = open_cell();
  for (std::size_t f = 0; f < kFactors; ++f) {
    const auto values = static_cast<std::int64_t>(grid_factors()[f].values.size());
    cell.value[f] = static_cast<int>(pick(0, values - 1));
    if (contradicts(cell)) cell.value[f] = 0;
    RC_PRE(!contradicts(cell));
  }
  cell.seed = static_cast<std::uint64_t>(pick(1, 1000000));
  return cell;
}

TEST(GradientProperties, RandomProblemsAreRight) {
  EXPECT_TRUE(holds(static_cast<int>(200 / kTestScale), [] {
    const Cell cell = any_cell();
    const std::string wrong = run_cell(cell);
    if (!wrong.empty()) RC_FAIL(describe(cell) + ": " + wrong);
  }));
}

struct Random {
  Shape shape;
  RingOptions options;
  int workers = 1;
  unsigned seed = 1;
  DType dtype = DType::kFloat32;
};

Random any_ring(bool narrow) {
  Random r;
  r.shape.batch = pick(1, 2), r.shape.kv_heads = pick(1, 2);
  r.shape.heads = r.shape.kv_heads * pick(1, 3);
  r.shape.q_len = r.shape.kv_len = pick(1, 50);
  r.shape.head_dim = pick(1, 40), r.shape.v_head_dim = pick(1, 40);
  r.workers = static_cast<int>(pick(1, 5)), r.seed = static_cast<unsigned>(pick(1, 100000));
  static const Partition kPartitions[] = {Partition::contiguous(), Partition::striped(),
                                          Partition::zigzag()};
  r.options.partition = kPartitions[pick(0, 2)];
  r.options.topology = pick(0, 1) == 0 ? Topology::kRing : Topology::kLinear;
  r.options.ring_backward = static_cast<RingBackward>(pick(0, 2));
  r.options.fused_backward = pick(0, 1) == 0;
  r.options.attention.threads = 1;
  if (narrow && pick(0, 1) == 1) r.dtype = DType::kBFloat16;
  return r;
}

void run(Training& t, const Random& r) {
  (void)ring_attention(r.workers, t.in.q, t.in.k, t.in.v, t.in.out.mutable_view(),
                       t.in.lse.mutable_view(), r.options);
  (void)ring_attention_backward(r.workers, t.dout, t.in.q, t.in.k, t.in.v, t.in.out, t.in.lse,
                                t.gradients(), r.options);
}

// Largest |a - b|, with b's element looked up by `at`.
template <class At>
double difference(const Tensor& a, const At& at) {
  double worst = 0;
  for_each_index(a.shape(), [&](auto... i) {
    const double error = std::abs(a.get(i...) - at(i...));
    worst = std::isnan(error) ? INFINITY : std::max(worst, error);
  });
  return worst;
}
double largest(const Tensor& a) {
  return difference(a, [](auto...) { return 0.0; });
}

TEST(GradientProperties, PowersOfTwoInDoutAreExact) {
  EXPECT_TRUE(holds(static_cast<int>(200 / kTestScale), [] {
    Random r = any_ring(true);
    r.options.attention.causal = pick(0, 1) == 0;
    r.options.attention.dropout_prob = 0.25 * static_cast<double>(pick(0, 2));
    Training t(r.dtype, r.shape, r.seed);
    run(t, r);
    const Training once = t;
    const double factor = std::exp2(static_cast<double>(pick(-9, 9)));
    t.dout.fill([&](auto... at) { return factor * once.dout.get(at...); });
    run(t, r);
    for (const auto& [a, b] : {std::pair{&t.dq, &once.dq}, {&t.dk, &once.dk}, {&t.dv, &once.dv}})
      RC_ASSERT(difference(*a, [&, &b = b](auto... at) { return factor * b->get(at...); }) == 0);
  }));
}

// Every row of p sums to one, so that dp - delta vanishes.
TEST(GradientProperties, ConstantValuesLeaveScoresWithoutGradient) {
  EXPECT_TRUE(holds(static_cast<int>(200 / kTestScale), [] {
    Random r = any_ring(false);
    r.options.attention.causal = pick(0, 1) == 0;
    Training t(r.dtype, r.shape, r.seed);
    t.in.v.fill([](auto...) { return 1.5; });
    run(t, r);
    const double unit = 0x1p-24 * static_cast<double>(r.shape.q_len * r.shape.heads *
                                                      (r.shape.v_head_dim + 4) * 40);
    RC_ASSERT(largest(t.dq) <= unit);
    RC_ASSERT(largest(t.dk) <= unit);
  }));
}

TEST(GradientProperties, KeysHaveNoOrder) {
  EXPECT_TRUE(holds(static_cast<int>(200 / kTestScale), [] {
    const Random r = any_ring(false);
    Training t(r.dtype, r.shape, r.seed);
    run(t, r);
    Training moved = t;
    const std::int64_t n = r.shape.kv_len, by = pick(0, n - 1);
    const auto from = [&](std::int64_t j) { return (n - 1 - j + by) % n; };
    const auto rows_of = [&](const Tensor& whole) {
      return [&](std::int64_t b, std::int64_t j, std::int64_t h, std::int64_t d) {
        return whole.get(b, from(j), h, d);
      };
    };
    moved.in.k.fill(rows_of(t.in.k)), moved.in.v.fill(rows_of(t.in.v));
    run(moved, r);
    RC_ASSERT(difference(moved.dq, [&](auto... at) { return t.dq.get(at...); }) <=
              4e-5 * std::max(1.0, largest(t.dq)));
    RC_ASSERT(difference(moved.dk, rows_of(t.dk)) <= 4e-5 * std::max(1.0, largest(t.dk)));
    RC_ASSERT(difference(moved.dv, rows_of(t.dv)) <= 4e-5 * std::max(1.0, largest(t.dv)));
  }));
}

TEST(GradientProperties, TwoDocumentsAreTwoCalls) {
  EXPECT_TRUE(holds(static_cast<int>(200 / kTestScale), [] {
    Random r = any_ring(false);
    const std::int64_t n = r.shape.q_len, cut = pick(0, n);
    Training both(r.dtype, r.shape, r.seed);
    Tensor ids(DType::kInt32, {r.shape.batch, n, 1, 1});
    ids.fill([&](std::int64_t, std::int64_t i, auto...) { return i < cut ? 4 : 9; });
    r.options.attention.causal = true;
    Random part = r;
    r.options.attention.q_segment_ids = ids;
    run(both, r);
    for (const auto& [begin, end] : {std::pair{std::int64_t{0}, cut}, {cut, n}}) {
      part.shape.q_len = part.shape.kv_len = end - begin;
      Training one(r.dtype, part.shape, r.seed);
      const auto rows_of = [&, &begin = begin](const Tensor& whole) {
        return [&](std::int64_t b, std::int64_t j, std::int64_t h, std::int64_t d) {
          return whole.get(b, begin + j, h, d);
        };
      };
      one.in.q.fill(rows_of(both.in.q)), one.in.k.fill(rows_of(both.in.k));
      one.in.v.fill(rows_of(both.in.v)), one.dout.fill(rows_of(both.dout));
      run(one, part);
      RC_ASSERT(difference(one.in.out, rows_of(both.in.out)) <= 1e-5);
      RC_ASSERT(difference(one.dq, rows_of(both.dq)) <= 4e-5 * std::max(1.0, largest(both.dq)));
      RC_ASSERT(difference(one.dk, rows_of(both.dk)) <= 4e-5 * std::max(1.0, largest(both.dk)));
      RC_ASSERT(difference(one.dv, rows_of(both.dv)) <= 4e-5 * std::max(1.0, largest(both.dv)));
    }
  }));
}

TEST(GradientProperties, SharedHeadsAddUpTheirGradients) {
  EXPECT_TRUE(holds(static_cast<int>(200 / kTestScale), [] {
    Random r = any_ring(false);
    r.options.attention.causal = true;
    Training shared(r.dtype, r.shape, r.seed);
    run(shared, r);
    const std::int64_t group = r.shape.heads / r.shape.kv_heads;
    Random repeated = r;
    repeated.shape.kv_heads = r.shape.heads;
    Training t(r.dtype, repeated.shape, r.seed);
    const auto copies_of = [&](const Tensor& whole) {
      return [&](std::int64_t b, std::int64_t j, std::int64_t h, std::int64_t d) {
        return whole.get(b, j, h / group, d);
      };
    };
    t.in.q = shared.in.q, t.dout = shared.dout;
    t.in.k.fill(copies_of(shared.in.k)), t.in.v.fill(copies_of(shared.in.v));
    run(t, repeated);
    const auto sums_of = [&](const Tensor& parts) {
      return [&](std::int64_t b, std::int64_t j, std::int64_t h, std::int64_t d) {
        double sum = 0;
        for (std::int64_t n = 0; n < group; ++n) sum += parts.get(b, j, h * group + n, d);
        return sum;
      };
    };
    RC_ASSERT(difference(shared.dk, sums_of(t.dk)) <= 4e-5 * std::max(1.0, largest(shared.dk)));
    RC_ASSERT(difference(shared.dv, sums_of(t.dv)) <= 4e-5 * std::max(1.0, largest(shared.dv)));
  }));
}

// With the unit matrix as v, out is the matrix of weights: zero where a pair is dropped. With the
// unit matrix as dout, so is dv.
TEST(GradientProperties, DropoutIsTheSameEverywhere) {
  const std::int64_t n = 45;
  const Shape s{2, n, n, 4, 2, 16, n};
  const auto zeros = [](const Tensor& t) {
    std::vector<bool> zero;
    for_each_index(t.shape(), [&](auto... at) { zero.push_back(t.get(at...) == 0); });
    return zero;
  };
  const auto unit = [](std::int64_t, std::int64_t j, std::int64_t, std::int64_t d) {
    return j == d ? 1.0 : 0.0;
  };
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    std::vector<bool> out, dv;
    for (const std::string& target : targets_for(dtype)) {
      for (const int workers : {1, 2, 3, 5, 8}) {
        for (const char* partition : {"contiguous", "striped", "zigzag"}) {
          Random r;
          r.workers = workers, r.options.partition = Partition::from_name(partition);
          r.options.attention.dropout_prob = 0.3, r.options.attention.dropout_seed = 1234567890123;
          r.options.attention.isa = target, r.options.attention.threads = 1;
          Training t(dtype, s, 3);
          t.in.v.fill(unit), t.dout.fill(unit);
          run(t, r);
          if (out.empty()) out = zeros(t.in.out), dv = zeros(t.dv);
          EXPECT_TRUE(out == zeros(t.in.out)) << target << " P " << workers << " " << partition;
          EXPECT_TRUE(dv == zeros(t.dv)) << target << " P " << workers << " " << partition;
        }
      }
    }
    const auto dropped = std::count(out.begin(), out.end(), true);
    EXPECT_NEAR(static_cast<double>(dropped) / static_cast<double>(out.size()), 0.3, 0.02);
  }
}

}  // namespace
}  // namespace annulus::testing
