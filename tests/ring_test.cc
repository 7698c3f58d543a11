// Ring attention: every world size and partition gives the same exact attention, and every fault a
// named error.

#include <atomic>
#include <chrono>
#include <thread>

#include "annulus/error.h"
#include "testing.h"

namespace annulus::testing {
namespace {

Partition random_positions(int workers, std::int64_t len, unsigned seed) {
  std::mt19937 generator(seed);
  std::vector<std::vector<std::int64_t>> positions(static_cast<std::size_t>(workers));
  for (std::int64_t i = 0; i < len; ++i)
    positions[generator() % static_cast<unsigned>(workers)].push_back(i);
  for (auto& list : positions) std::shuffle(list.begin(), list.end(), generator);
  return Partition::from_positions(positions);
}

std::vector<Partition> partitions_for(int workers, std::int64_t len) {
  return {Partition::contiguous(), Partition::striped(), Partition::zigzag(),
          random_positions(workers, len, 5)};
}

class Ring : public ::testing::TestWithParam<DType> {};

TEST_P(Ring, EveryWorldSizeAndPartition) {
  for (const int workers : {1, 2, 3, 4, 5, 8, 16, 64}) {
    for (const std::int64_t len : {0, 1, 7, 61, 130}) {
      for (const Partition& partition : partitions_for(workers, len)) {
        for (const bool causal : {false, true}) {
          Inputs in(GetParam(), {1, len, len, 2, 1, 16, 16}, 21);
          RingOptions o;
          o.partition = partition, o.attention.causal = causal, o.attention.threads = 1;
          const auto result = run_and_check(in, o, workers, 30 / kTestScale);
          EXPECT_TRUE(result.passed) << result.verdict << " P " << workers << " len " << len << " "
                                     << partition.name() << causal;
        }
      }
    }
  }
}

// All options at once, on uneven lengths.
TEST_P(Ring, OptionsInCombination) {
  const Shape s{2, 70, 101, 6, 2, 24, 40};
  Tensor q_ids(DType::kInt32, {2, 70, 1, 1}), kv_ids(DType::kInt32, {2, 101, 1, 1}),
      lengths(DType::kInt32, {2, 1, 1, 1});
  q_ids.fill([](std::int64_t b, std::int64_t t, auto...) { return (t + b * 9) / 20; });
  kv_ids.fill([](std::int64_t b, std::int64_t t, auto...) { return (t + b * 5) / 29; });
  lengths.fill([](std::int64_t b, auto...) { return 60 + 30 * b; });
  Tensor mask(DType::kUInt8, {2, 1, 70, 101}), bias(DType::kFloat32, {1, 6, 70, 101}),
      sinks(DType::kFloat32, {6, 1, 1, 1});
  mask.fill([](std::int64_t b, std::int64_t, std::int64_t i, std::int64_t j) {
    return (i * 7 + j * 3 + b) % 5 != 0;
  });
  bias.normal(31);
  sinks.fill([](std::int64_t h, auto...) { return 5 - h; });
  for (unsigned rules = 0; rules < 256; rules += 1 + (rules * 7) % 3) {
    RingOptions o;
    AttentionOptions& a = o.attention;
    a.threads = 1;
    if (rules & 1) a.causal = true;
    if (rules & 2) a.sliding_window = {30, 12};
    if (rules & 4) a.q_segment_ids = q_ids, a.kv_segment_ids = kv_ids;
    if (rules & 8) a.kv_lengths = lengths;
    if (rules & 16) a.attention_mask = mask;
    if (rules & 32) a.bias = bias;
    if (rules & 64) a.softmax_aux = sinks, a.softmax_aux.shape[1] = 0;
    if (rules & 128) a.logits_soft_cap = 3;
    if (rules % 5 == 0) a.chunk_size = 33;
    if (rules % 7 == 0) a.causal_alignment = CausalAlignment::kTopLeft;
    const int workers = 1 + static_cast<int>(rules % 6);
    o.partition = partitions_for(workers, 70)[rules % 3];
    o.topology = rules % 2 == 0 ? Topology::kRing : Topology::kLinear;
    o.workers.lend = rules % 4 < 2;
    Inputs in(GetParam(), s, 22, true);
    const auto result = run_and_check(in, o, workers);
    EXPECT_TRUE(result.passed) << result.verdict << " rules " << rules << " P " << workers;
  }
}

INSTANTIATE_TEST_SUITE_P(Dtypes, Ring,
                         ::testing::Values(DType::kFloat32, DType::kBFloat16, DType::kFloat16),
                         [](const auto& instance) { return std::string(name(instance.param)); });

// N4: the error does not grow with the number of workers.
TEST(RingAccuracy, IndependentOfTheWorldSize) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    double alone = 0, alone_max = 0;
    for (const int workers : {1, 2, 3, 4, 5, 8, 16, 64}) {
      if (kTestScale > 1 && workers > 1 && workers != 5) continue;  // rows stay: few are luck
      Inputs in(dtype, {1, 4096, 4096, 1, 1, 64, 64}, 23, true);
      RingOptions o;
      o.attention.causal = true, o.attention.threads = 1, o.partition = Partition::zigzag();
      const auto result = run_and_check(in, o, workers, 300);
      EXPECT_TRUE(result.passed) << result.verdict;
      if (workers == 1) alone = result.rms_err, alone_max = result.max_abs_err;
      EXPECT_LE(result.rms_err, 1.1 * alone) << workers;
      // The largest of many float32 errors is luck, so N3's two ulp of the largest output are
      // allowed there.
      const double luck = dtype == DType::kFloat32 ? 2 * 0x1p-23 * 4 : 0;
      EXPECT_LE(result.max_abs_err, 1.1 * alone_max + luck) << workers;
    }
  }
}

// Every rank passes its shard; the result is that of the whole tensors.
TEST(RingShards, EqualWholeTensors) {
  const Shape s{2, 53, 53, 4, 2, 32, 32};
  for (const int workers : {1, 3, 4}) {
    for (const Partition& partition : partitions_for(workers, 53)) {
      Tensor ids(DType::kInt32, {2, 53, 1, 1}), bias(DType::kFloat32, {1, 4, 53, 53});
      ids.fill([](std::int64_t b, std::int64_t t, auto...) { return (t + b) / 17; });
      bias.normal(41);
      Inputs whole(DType::kFloat32, s, 24);
      RingOptions o;
      o.partition = partition, o.attention.causal = true, o.attention.threads = 1;
      o.attention.q_segment_ids = ids, o.attention.bias = bias;
      (void)ring_attention(workers, whole.q, whole.k, whole.v, whole.out.mutable_view(),
                           whole.lse.mutable_view(), o);

      std::vector<Tensor> outs(static_cast<std::size_t>(workers));
      run_workers(workers, [&](Communicator& comm) {
        std::vector<std::int64_t> positions;
        for (const Range& r : partition.ranges(comm.rank(), workers, 53)) {
          for (std::int64_t i = 0; i < r.count; ++i) positions.push_back(r.begin + i * r.stride);
        }
        const auto n = static_cast<std::int64_t>(positions.size());
        const auto shard = [&](const Tensor& t, std::size_t axis) {
          auto shape = t.shape();
          shape[axis] = n;
          Tensor part(t.view().dtype, shape);
          for (std::int64_t a = 0; a < shape[0]; ++a)
            for (std::int64_t b = 0; b < shape[1]; ++b)
              for (std::int64_t c = 0; c < shape[2]; ++c)
                for (std::int64_t d = 0; d < shape[3]; ++d) {
                  const std::int64_t at = positions[static_cast<std::size_t>(axis == 1 ? b : c)];
                  const double value = axis == 1
                                           ? (t.view().dtype == DType::kInt32 ? ids.get(a, at, c, d)
                                                                              : t.get(a, at, c, d))
                                           : t.get(a, b, at, d);
                  part.set(a, b, c, d, value);
                }
          return part;
        };
        const Tensor q = shard(whole.q, 1), k = shard(whole.k, 1), v = shard(whole.v, 1),
                     my_ids = shard(ids, 1), my_bias = shard(bias, 2);
        Tensor out = shard(whole.out, 1).fill([](auto...) { return 3; }),
               lse(DType::kFloat32, {2, n, 4, 1});
        RingOptions mine = o;
        mine.attention.q_segment_ids = my_ids, mine.attention.bias = my_bias;
        (void)ring_attention(comm, q, k, v, out.mutable_view(), lse.mutable_view(), mine);
        for (std::int64_t t = 0; t < n; ++t) {
          for (std::int64_t h = 0; h < 4; ++h) {
            const std::int64_t at = positions[static_cast<std::size_t>(t)];
            EXPECT_EQ(lse.get(1, t, h, 0), whole.lse.get(1, at, h, 0));
            EXPECT_EQ(out.get(1, t, h, 5), whole.out.get(1, at, h, 5));
          }
        }
      });
    }
  }
}

TEST(RingFaults, RanksThatDisagree) {
  const std::string message = message_of<CommError>([] {
    run_workers(3, [](Communicator& comm) {
      Inputs in(DType::kFloat32, {1, 4, 4, 1, 1, 8, 8});
      RingOptions o;
      o.attention.causal = comm.rank() == 2;
      (void)ring_attention(comm, in.q, in.k, in.v, in.out.mutable_view(), in.lse.mutable_view(), o);
    });
  });
  EXPECT_NE(message.find("mask=causal"), std::string::npos) << message;
  EXPECT_NE(message.find("rank 2"), std::string::npos) << message;
}

TEST(RingFaults, AThrowingRankStopsTheOthersWithItsError) {
  for (int culprit = 0; culprit < 4; ++culprit) {
    const std::string message = message_of<std::runtime_error>([&] {
      run_workers(4, [&](Communicator& comm) {
        if (comm.rank() == culprit) throw std::runtime_error("out of luck");
        Inputs in(DType::kFloat32, {1, 4, 4, 1, 1, 8, 8});
        (void)ring_attention(comm, in.q, in.k, in.v, in.out.mutable_view(), in.lse.mutable_view());
      });
    });
    EXPECT_EQ(message, "out of luck");
  }
}

TEST(RingFaults, ASilentRankIsNamed) {
  std::atomic<bool> release{false};
  std::string message = message_of<CommError>([&] {
    std::jthread releaser([&] {
      std::this_thread::sleep_for(std::chrono::seconds(3));
      release = true;
    });
    run_workers(
        3,
        [&](Communicator& comm) {
          while (comm.rank() == 1 && !release)
            std::this_thread::sleep_for(std::chrono::milliseconds(10));
          Inputs in(DType::kFloat32, {1, 4, 4, 1, 1, 8, 8});
          (void)ring_attention(comm, in.q, in.k, in.v, in.out.mutable_view(),
                               in.lse.mutable_view());
        },
        WorkerOptions{.timeout_s = 0.5, .stop = {}});
  });
  EXPECT_NE(message.find("rank 1 is silent"), std::string::npos) << message;
}

TEST(RingFaults, ARankThatSkipsACallIsNamed) {
  const std::string message = message_of<CommError>([&] {
    run_workers(
        3,
        [&](Communicator& comm) {
          if (comm.rank() == 2) return;
          Inputs in(DType::kFloat32, {1, 4, 4, 1, 1, 8, 8});
          (void)ring_attention(comm, in.q, in.k, in.v, in.out.mutable_view(),
                               in.lse.mutable_view());
        },
        WorkerOptions{.timeout_s = 0.3, .stop = {}});
  });
  EXPECT_NE(message.find("rank 2 has left"), std::string::npos) << message;
}

TEST(RingFaults, StopEndsTheCall) {
  Inputs in(DType::kFloat32, {1, 2000, 2000, 4, 4, 64, 64});
  RingOptions o;
  std::atomic<int> polls{0};
  o.workers.stop = [&] { return ++polls > 40; };
  EXPECT_THROW(
      (void)ring_attention(2, in.q, in.k, in.v, in.out.mutable_view(), in.lse.mutable_view(), o),
      Interrupted);
}

struct Refusal {
  const char* expected;
  std::function<void(Inputs&, RingOptions&)> spoil;
};

TEST(RingFaults, BadArgumentsAreRefusedBeforeAnythingIsWritten) {
  static Tensor ids(DType::kInt32, {1, 9, 1, 1}), floats(DType::kFloat32, {1, 1, 10, 10}),
      wrong(DType::kFloat32, {1, 1, 10, 9});
  static Tensor lengths(DType::kInt32, {1, 1, 1, 1});
  lengths.fill([](auto...) { return -1; });
  const Refusal refusals[] = {
      {"k has type",
       [](Inputs& in, RingOptions&) { in.k = Tensor(DType::kBFloat16, in.k.shape()); }},
      {"v has shape",
       [](Inputs& in, RingOptions&) {
         in.v = Tensor(DType::kFloat32, {1, 9, 2, 8});
       }},
      {"num_heads (3)",
       [](Inputs& in, RingOptions&) {
         in.q = Tensor(DType::kFloat32, {1, 10, 3, 8});
       }},
      {"out has shape",
       [](Inputs& in, RingOptions&) {
         in.out = Tensor(DType::kFloat32, {1, 10, 4, 9});
       }},
      {"out has type",
       [](Inputs& in, RingOptions&) { in.out = Tensor(DType::kFloat16, in.out.shape()); }},
      {"lse has shape",
       [](Inputs& in, RingOptions&) {
         in.lse = Tensor(DType::kFloat32, {1, 10, 3, 1});
       }},
      {"q_segment_ids has shape", [](Inputs&, RingOptions& o) { o.attention.q_segment_ids = ids; }},
      {"q_segment_ids has type",
       [](Inputs&, RingOptions& o) { o.attention.q_segment_ids = floats; }},
      {"padding_segment_id", [](Inputs&, RingOptions& o) { o.attention.padding_segment_id = 3; }},
      {"kv_lengths[0] is -1", [](Inputs&, RingOptions& o) { o.attention.kv_lengths = lengths; }},
      {"attention_mask has type",
       [](Inputs&, RingOptions& o) { o.attention.attention_mask = floats; }},
      {"bias has shape", [](Inputs&, RingOptions& o) { o.attention.bias = wrong; }},
      {"chunk_size is -4", [](Inputs&, RingOptions& o) { o.attention.chunk_size = -4; }},
      {"sliding_window",
       [](Inputs&, RingOptions& o) {
         o.attention.sliding_window = {-2, 3};
       }},
      {"logits_soft_cap", [](Inputs&, RingOptions& o) { o.attention.logits_soft_cap = -1; }},
      {"softmax_scale", [](Inputs&, RingOptions& o) { o.attention.softmax_scale = NAN; }},
      {"softmax_aux", [](Inputs&, RingOptions& o) { o.attention.softmax_aux = wrong; }},
      {"not a known target", [](Inputs&, RingOptions& o) { o.attention.isa = "sse9"; }},
  };
  for (const Refusal& refusal : refusals) {
    for (const int workers : {1, 3}) {
      Inputs in(DType::kFloat32, {1, 10, 10, 4, 2, 8, 8});
      RingOptions o;
      refusal.spoil(in, o);
      const Tensor before = in.out;
      const std::string message = message_of<InvalidArgument>([&] {
        (void)ring_attention(workers, in.q, in.k, in.v, in.out.mutable_view(),
                             in.lse.mutable_view(), o);
      });
      EXPECT_NE(message.find(refusal.expected), std::string::npos) << message;
      EXPECT_EQ(before.bytes(), in.out.bytes()) << refusal.expected;
    }
  }
  Inputs in(DType::kFloat32, {1, 10, 10, 4, 4, 8, 8});
  EXPECT_THROW((void)attention(in.q, in.k, in.v, in.q.mutable_view(), in.lse.mutable_view()),
               InvalidArgument);
}

TEST(RingPlan, TellsWhatTheCallDoes) {
  for (const Topology topology : {Topology::kRing, Topology::kLinear}) {
    Inputs in(DType::kBFloat16, {1, 1000, 1000, 4, 2, 64, 64}, 25);
    RingOptions o;
    o.partition = Partition::contiguous(), o.topology = topology, o.attention.threads = 1;
    o.attention.causal = true, o.attention.sliding_window = {150, -1};
    const Plan plan = explain(5, in.q, in.k, in.v, DType::kBFloat16, o);
    const auto summaries =
        ring_attention(5, in.q, in.k, in.v, in.out.mutable_view(), in.lse.mutable_view(), o);
    std::int64_t computed = 0;
    for (std::size_t r = 0; r < 5; ++r) {
      computed += summaries[r].pairs_computed;
      EXPECT_EQ(summaries[r].bytes_sent, plan.bytes_sent_per_rank[r]);
    }
    EXPECT_EQ(computed, plan.pairs_visible);
    EXPECT_EQ(plan.pairs_visible, 4 * (151 * 152 / 2 + (1000 - 151) * 151));
    // A window shorter than a shard: each block travels one hop.
    for (const PlannedStep& step : plan.steps) EXPECT_LE(step.step, 1);
    EXPECT_EQ(plan.bytes_sent_per_rank[4], 0);
  }
}

}  // namespace
}  // namespace annulus::testing
