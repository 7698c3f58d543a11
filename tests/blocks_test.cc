// Block sizes of the caller: plans show them as calls use them, and results meet the bars whatever
// they are.

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "annulus/ring.h"
#include "training_testing.h"

namespace annulus::testing {
namespace {

constexpr std::int64_t kHuge = std::int64_t{1} << 40;
constexpr BlockSizes kSizes[] = {{1, 1}, {100, 300}, {0, 70}, {70, 0}, {kHuge, kHuge}};

std::int64_t round_up(std::int64_t n, std::int64_t step) { return (n + step - 1) / step * step; }

RingOptions options_of(const std::string& target, const BlockSizes& blocks, int threads = 2) {
  RingOptions options;
  options.attention.isa = target, options.attention.threads = threads;
  options.attention.forward_blocks = options.attention.backward_blocks = blocks;
  return options;
}

template <class Visit>
void for_each_target(const Visit& visit) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const std::string& target : targets_for(dtype)) {
      SCOPED_TRACE(std::string(name(dtype)) + " " + target);
      visit(dtype, target);
    }
  }
}

TEST(Blocks, PlansShowWhatIsAsked) {
  for_each_target([](DType dtype, const std::string& target) {
    const Inputs in(dtype, {1, 700, 900, 4, 2, 64, 64});
    const auto plan = [&](const BlockSizes& blocks) {
      return explain(1, in.q, in.k, in.v, dtype, options_of(target, blocks));
    };
    const auto backward = [&](const BlockSizes& blocks) {
      return explain_backward(1, in.q, in.k, in.v, dtype, options_of(target, blocks));
    };
    const Plan choice = plan({});
    const std::int64_t strip = choice.strip_rows, tile = choice.tile_keys;
    // Panels of AMX are whole blocks of keys.
    const std::int64_t step = plan({1, 1}).panel_keys;
    EXPECT_EQ(step % tile, 0);
    EXPECT_LE(step, 128);
    EXPECT_EQ(plan({1, 1}).item_rows, strip);
    EXPECT_EQ(plan({100, 300}).item_rows, round_up(100, strip));
    EXPECT_EQ(plan({100, 300}).panel_keys, round_up(300, step));
    EXPECT_EQ(plan({kHuge, INT64_MAX}).item_rows, round_up(1400, strip));
    EXPECT_EQ(plan({kHuge, INT64_MAX}).panel_keys, round_up(900, step));
    EXPECT_EQ(plan({100, 0}).panel_keys, choice.panel_keys);
    EXPECT_EQ(plan({0, 300}).item_rows, choice.item_rows);

    EXPECT_EQ(backward({1, 1}).block_rows, strip);
    EXPECT_EQ(backward({1, 1}).panel_keys, tile);
    EXPECT_EQ(backward({100, 300}).block_rows, round_up(100, strip));
    EXPECT_EQ(backward({100, 300}).panel_keys, round_up(300, tile));
    const bool amx = target.starts_with("amx");  // its block() takes 1024 of each
    EXPECT_EQ(backward({kHuge, INT64_MAX}).block_rows, amx ? 1024 : round_up(1400, strip));
    EXPECT_EQ(backward({kHuge, INT64_MAX}).panel_keys, round_up(900, tile));
  });
}

// Neither for no rows nor for none on some ranks.
TEST(Blocks, PlansOfFewRowsAreClamped) {
  const Inputs in(DType::kFloat32, {1, 3, 0, 1, 1, 8, 8});
  const Plan plan = explain(4, in.q, in.k, in.v, DType::kFloat32, options_of("", {kHuge, kHuge}));
  EXPECT_EQ(plan.item_rows, plan.strip_rows);
  EXPECT_EQ(plan.panel_keys, plan.tile_keys);
}

// What a thread keeps grows with the blocks, and no further than the rows at hand.
TEST(Blocks, PlannedMemoryFollows) {
  for (const bool bias : {false, true}) {
    const Inputs in(DType::kFloat32, {1, 2048, 2048, 1, 1, 64, 64});
    Tensor terms(DType::kFloat32, {1, 1, 2048, 2048});
    const auto options = [&](const BlockSizes& blocks) {
      RingOptions o = options_of("", blocks, 1);
      if (bias) o.attention.bias = terms;
      return o;
    };
    const auto forward = [&](const BlockSizes& blocks) {
      return explain(1, in.q, in.k, in.v, DType::kFloat32, options(blocks)).peak_bytes;
    };
    const auto backward = [&](const BlockSizes& blocks) {
      return explain_backward(1, in.q, in.k, in.v, DType::kFloat32, options(blocks)).peak_bytes;
    };
    EXPECT_LT(forward({1, 1}), forward({}));
    EXPECT_LT(forward({}), forward({2048, 2048}));
    EXPECT_EQ(forward({kHuge, kHuge}), forward({2048, 2048}));
    EXPECT_LT(backward({1, 1}), backward({}));
    EXPECT_LT(backward({}), backward({2048, 2048}));
    EXPECT_EQ(backward({kHuge, kHuge}), backward({2048, 2048}));
    // Bits of all pairs; P and dS.
    EXPECT_GE(forward({kHuge, kHuge}), 2048 * 2048 / 8);
    EXPECT_GE(backward({kHuge, kHuge}), 2048 * 2048 * 8);
  }
}

TEST(Blocks, ResultsMeetTheBars) {
  for_each_target([](DType dtype, const std::string& target) {
    for (const BlockSizes& blocks : kSizes) {
      SCOPED_TRACE(::testing::Message() << "q " << blocks.q << " kv " << blocks.kv);
      const Shape shape{1, 200, 350, 2, 1, 40, 72};
      Inputs in(dtype, shape);
      RingOptions options = options_of(target, blocks);
      options.attention.causal = true;
      const auto forward = run_and_check(in, options, 1);
      EXPECT_TRUE(forward.passed) << forward.verdict;
      Training t(dtype, shape);
      const auto backward = t.run_and_check(options, 1);
      EXPECT_TRUE(backward.passed) << backward.verdict;
    }
  });
}

// Panels end where blocks of other ranks do, and rows come with bias, dropout and gradients of
// both.
TEST(Blocks, ResultsOfRingsMeetTheBars) {
  for_each_target([](DType dtype, const std::string& target) {
    for (const BlockSizes& blocks : kSizes) {
      for (const bool fused : {true, false}) {
        SCOPED_TRACE(::testing::Message()
                     << "q " << blocks.q << " kv " << blocks.kv << " fused " << fused);
        Training t(dtype, {1, 301, 301, 2, 2, 32, 32});
        t.bias = Tensor(DType::kFloat32, {1, 2, 301, 301}), t.bias.normal(9);
        t.dbias = Tensor(DType::kFloat32, {1, 2, 301, 301});
        RingOptions options = options_of(target, blocks);
        options.attention.bias = t.bias, options.attention.dropout_prob = 0.2;
        options.attention.sliding_window = {120, 60};
        options.partition = Partition::zigzag(), options.fused_backward = fused;
        const auto check = t.run_and_check(options, 3);
        EXPECT_TRUE(check.passed) << check.verdict;
      }
    }
  });
}

// The longest sums of single tiles: over many keys for out, lse and dq, over many queries for dk
// and dv.
TEST(Blocks, ManyOfTheSmallestMeetTheBars) {
  for_each_target([](DType dtype, const std::string& target) {
    const RingOptions options = options_of(target, {1, 1});
    for (const auto& [q_len, kv_len] : {std::pair{40, 6000}, std::pair{6000, 40}}) {
      SCOPED_TRACE(::testing::Message() << q_len << " x " << kv_len);
      Training t(dtype, {1, q_len, kv_len, 1, 1, 64, 64});
      const auto forward = run_and_check(t.in, options, 1);
      EXPECT_TRUE(forward.passed) << forward.verdict;
      const auto backward = t.run_and_check(options, 1);
      EXPECT_TRUE(backward.passed) << backward.verdict;
    }
  });
}

// Rows of a forward's items decide who computes, not what.
TEST(Blocks, RowsOfItemsKeepTheBits) {
  for_each_target([](DType dtype, const std::string& target) {
    Inputs in(dtype, {1, 400, 400, 2, 1, 64, 64});
    std::vector<std::byte> out, lse;
    for (const std::int64_t rows : {std::int64_t{0}, std::int64_t{1}, std::int64_t{100}, kHuge}) {
      attention(in.q, in.k, in.v, in.out.mutable_view(), in.lse.mutable_view(),
                options_of(target, {rows, 0}).attention);
      if (out.empty()) out = in.out.bytes(), lse = in.lse.bytes();
      EXPECT_EQ(in.out.bytes(), out);
      EXPECT_EQ(in.lse.bytes(), lse);
    }
  });
}

// What travels does not depend on blocks: each rank may have its own.
TEST(Blocks, RanksMayDiffer) {
  for_each_target([](DType dtype, const std::string& target) {
    constexpr std::int64_t kRows = 90;
    constexpr int kWorkers = 3;
    Training t(dtype, {1, kWorkers * kRows, kWorkers * kRows, 2, 1, 64, 64});
    const auto shard = [](MutableTensorView view, int rank) {
      view.data = view.at(0, rank * kRows, 0, 0), view.shape[1] = kRows;
      return view;
    };
    bool bf16_forward = false, bf16_backward = false;
    run_workers(kWorkers, [&](Communicator& comm) {
      const int rank = comm.rank();
      RingOptions options = options_of(target, kSizes[rank], 1);
      const auto q = shard(t.in.q.mutable_view(), rank), k = shard(t.in.k.mutable_view(), rank),
                 v = shard(t.in.v.mutable_view(), rank), out = shard(t.in.out.mutable_view(), rank),
                 lse = shard(t.in.lse.mutable_view(), rank);
      const auto forward = ring_attention(comm, q, k, v, out, lse, options);
      const Gradients g{shard(t.dq.mutable_view(), rank),
                        shard(t.dk.mutable_view(), rank),
                        shard(t.dv.mutable_view(), rank),
                        {},
                        {}};
      const auto backward = ring_attention_backward(comm, shard(t.dout.mutable_view(), rank), q, k,
                                                    v, out, lse, g, options);
      if (rank > 0) return;
      bf16_forward = forward.bf16_probabilities, bf16_backward = backward.bf16_probabilities;
    });
    const auto forward =
        reference::check_attention(t.in.q, t.in.k, t.in.v, {}, t.in.out, t.in.lse, bf16_forward);
    EXPECT_TRUE(forward.passed) << forward.verdict;
    reference::BackwardInputs inputs;
    inputs.dout = t.dout, inputs.out = t.in.out;
    reference::GradientCheckOptions check;
    check.bf16_products = bf16_backward;
    const auto backward =
        reference::check_gradients(t.in.q, t.in.k, t.in.v, inputs, {}, t.gradients(), check);
    EXPECT_TRUE(backward.passed) << backward.verdict;
  });
}

}  // namespace
}  // namespace annulus::testing
