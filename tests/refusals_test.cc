// No option is ever ignored: what contradicts is refused before anything is written, on every rank,
// and everything else changes the result as the oracle says.

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "annulus/error.h"
#include "grid_run.h"
#include "training_testing.h"

namespace annulus::testing {
namespace {

// One rank's call with room for what spoils it.
struct Call {
  Training t{DType::kFloat32, {1, 10, 10, 4, 2, 8, 8}};
  RingOptions options;
  Gradients g = t.gradients();
  TensorView dout = t.dout, lse = t.in.lse;
  MutableTensorView out = t.in.out.mutable_view(), forward_lse = t.in.lse.mutable_view();
  Tensor extra, extra2;

  Call() {
    for (Tensor* written : {&t.in.out, &t.in.lse, &t.dq, &t.dk, &t.dv})
      written->fill([](auto...) { return 77; });
  }
  TensorView with(DType dtype, std::array<std::int64_t, 4> shape, double value = 0) {
    return (extra = Tensor(dtype, shape)).fill([&](auto...) { return value; });
  }
  [[nodiscard]] bool untouched() const {
    bool same = true;
    for (const Tensor* written : {&t.in.out, &t.in.lse, &t.dq, &t.dk, &t.dv})
      for_each_index(written->shape(), [&](auto... at) { same &= written->get(at...) == 77; });
    return same;
  }
};

struct Refusal {
  std::string expected;  // in the message
  std::function<void(Call&)> spoil;
  bool forward = true;  // false: of the backward alone
};

std::vector<Refusal> option_refusals() {
  const double kInf = std::numeric_limits<double>::infinity();
  const auto o = [](auto set) { return [set](Call& c) { set(c, c.options.attention); }; };
  using A = AttentionOptions;
  std::vector<Refusal> list{
      {"padding_segment_id", o([](Call&, A& a) { a.padding_segment_id = 3; })},
      {"q_segment_ids", o([](Call& c, A& a) {
         a.q_segment_ids = c.with(DType::kInt64, {1, 10, 1, 1});
       })},
      {"segment_ids", o([](Call& c, A& a) {
         a.kv_segment_ids = c.with(DType::kInt32, {1, 9, 1, 1});
       })},
      {"kv_lengths", o([](Call& c, A& a) {
         a.kv_lengths = c.with(DType::kInt32, {1, 1, 1, 1}, -1);
       })},
      {"kv_lengths", o([](Call& c, A& a) {
         a.kv_lengths = c.with(DType::kInt32, {2, 1, 1, 1}, 4);
       })},
      {"attention_mask", o([](Call& c, A& a) {
         a.attention_mask = c.with(DType::kFloat32, {1, 1, 10, 10});
       })},
      {"attention_mask", o([](Call& c, A& a) {
         a.attention_mask = c.with(DType::kBool, {1, 2, 10, 10});
       })},
      {"bias", o([](Call& c, A& a) {
         a.bias = c.with(DType::kFloat32, {1, 4, 10, 9});
       })},
      {"bias", o([](Call& c, A& a) {
         a.bias = c.with(DType::kFloat16, {1, 4, 10, 10});
       })},
      {"softmax_aux", o([](Call& c, A& a) {
         a.softmax_aux = c.with(DType::kFloat32, {3, 2, 1, 1});
       })},
      {"softmax_aux", o([](Call& c, A& a) {
         a.softmax_aux = c.with(DType::kFloat16, {4, 2, 1, 1});
       })},
      {"chunk_size", o([](Call&, A& a) { a.chunk_size = -1; })},
      {"sliding_window", o([](Call&, A& a) {
         a.sliding_window = {3, -2};
       })},
      {"softmax_scale", o([=](Call&, A& a) { a.softmax_scale = kInf; })},
      {"softmax_scale", o([](Call&, A& a) { a.softmax_scale = kNan; })},
      {"logits_soft_cap", o([](Call&, A& a) { a.logits_soft_cap = kNan; })},
      {"logits_soft_cap", o([=](Call&, A& a) { a.logits_soft_cap = kInf; })},
      {"dropout_prob", o([](Call&, A& a) { a.dropout_prob = 1; })},
      {"dropout_prob", o([](Call&, A& a) { a.dropout_prob = -0.1; })},
      {"dropout_prob", o([](Call&, A& a) { a.dropout_prob = kNan; })},
      {"threads", o([](Call&, A& a) { a.threads = -1; })},
      {"forward_blocks.q", o([](Call&, A& a) { a.forward_blocks.q = -1; })},
      {"forward_blocks.kv", o([](Call&, A& a) { a.forward_blocks.kv = -1; })},
      {"backward_blocks.q", o([](Call&, A& a) { a.backward_blocks.q = -128; })},
      {"backward_blocks.kv", o([](Call&, A& a) { a.backward_blocks.kv = INT64_MIN; })},
      {"isa", o([](Call&, A& a) { a.isa = "sse9"; })},
      {"head_dim",
       [](Call& c) {
         c.t.in.q = Tensor(DType::kFloat32, {1, 10, 4, 0});
         c.t.in.k = Tensor(DType::kFloat32, {1, 10, 2, 0});
       }},
      {"k has",
       [](Call& c) {
         c.t.in.k = Tensor(DType::kFloat32, {1, 10, 2, 9});
       }},
      {"v has", [](Call& c) { c.t.in.v = Tensor(DType::kBFloat16, c.t.in.v.shape()); }},
      {"num_heads",
       [](Call& c) {
         c.t.in.q = Tensor(DType::kFloat32, {1, 10, 3, 8});
       }},
  };
  return list;
}

// Of what only the backward has.
void add_backward_refusals(std::vector<Refusal>& list) {
  const auto backward = [&](const char* expected, std::function<void(Call&)> spoil) {
    list.push_back({expected, std::move(spoil), false});
  };
  backward("dsoftmax_aux", [](Call& c) {
    c.extra = Tensor(DType::kFloat32, {4, 1, 1, 1});
    c.g.dsoftmax_aux = c.extra.mutable_view();
  });
  backward("dbias", [](Call& c) {
    c.extra = Tensor(DType::kFloat32, {1, 4, 10, 10});
    c.g.dbias = c.extra.mutable_view();
  });
  backward("dbias", [](Call& c) {
    c.options.attention.bias = c.with(DType::kFloat32, {1, 4, 10, 10});
    c.extra2 = Tensor(DType::kFloat32, {1, 1, 10, 10}), c.g.dbias = c.extra2.mutable_view();
  });
  backward("dq", [](Call& c) {
    c.extra = Tensor(DType::kFloat16, c.t.dq.shape());
    c.g.dq = c.extra.mutable_view();
  });
  backward("dq", [](Call& c) { c.g.dq = {}; });
  backward("dv", [](Call& c) { c.g.dv = {}; });
  backward("dk", [](Call& c) { c.g.dk.strides[1] = 0; });
  backward("overlaps", [](Call& c) { c.g.dv = c.g.dk; });
  backward("overlaps", [](Call& c) { c.g.dq = c.t.in.q.mutable_view(); });
  backward("dout", [](Call& c) { c.dout = c.with(DType::kFloat32, {1, 9, 4, 8}); });
  backward("dout", [](Call& c) { c.dout = c.with(DType::kBFloat16, {1, 10, 4, 8}); });
  backward("dout", [](Call& c) { c.dout = {}; });
}

std::vector<Refusal> refusals() {
  std::vector<Refusal> list = option_refusals();
  add_backward_refusals(list);
  return list;
}

// The message of the refusal; "" if there was none.
std::string refused(const std::function<void()>& call) {
  try {
    call();
  } catch (const InvalidArgument& error) {
    return error.what();
  } catch (const Unsupported& error) {
    return error.what();
  }
  return "";
}

void expect_refused(const Refusal& refusal, const std::string& form,
                    const std::function<void(Call&)>& run) {
  Call call;
  refusal.spoil(call);
  const bool fits = call.untouched();  // not if a tensor was replaced
  const std::string message = refused([&] { run(call); });
  EXPECT_NE(message.find(refusal.expected), std::string::npos) << form << ": " << message;
  EXPECT_EQ(call.untouched(), fits) << form << ": " << refusal.expected << " wrote";
}

TEST(Refusals, WholeTensors) {
  for (const Refusal& refusal : refusals()) {
    for (const int workers : {1, 3}) {
      if (refusal.forward) {
        expect_refused(refusal, "forward", [&](Call& c) {
          ring_attention(workers, c.t.in.q, c.t.in.k, c.t.in.v, c.out, c.forward_lse, c.options);
        });
      }
      expect_refused(refusal, "backward", [&](Call& c) {
        ring_attention_backward(workers, c.dout, c.t.in.q, c.t.in.k, c.t.in.v, c.t.in.out, c.lse,
                                c.g, c.options);
      });
      expect_refused(refusal, "both", [&](Call& c) {
        ring_attention_with_gradients(workers, c.dout, c.t.in.q, c.t.in.k, c.t.in.v, c.out,
                                      c.forward_lse, c.g, c.options);
      });
    }
  }
}

// Every rank passes ten rows of its own.
TEST(Refusals, ShardsOnEveryRank) {
  for (const Refusal& refusal : refusals()) {
    for (const bool backward : {false, true}) {
      if (!backward && !refusal.forward) continue;
      std::mutex mutex;
      int refusing = 0;
      run_workers(3, [&](Communicator& comm) {
        Call c;
        // Masks and bias have all columns: those that fit one rank's keys alone do not here, which
        // is a refusal of the same field.
        refusal.spoil(c);
        const std::string message = refused([&] {
          if (backward) {
            ring_attention_backward(comm, c.dout, c.t.in.q, c.t.in.k, c.t.in.v, c.t.in.out, c.lse,
                                    c.g, c.options);
          } else {
            ring_attention(comm, c.t.in.q, c.t.in.k, c.t.in.v, c.out, c.forward_lse, c.options);
          }
        });
        const std::lock_guard lock(mutex);
        if (!message.empty()) ++refusing;
        const bool named =
            message.find(refusal.expected) != std::string::npos ||
            (refusal.expected == "dbias" && message.find("bias") != std::string::npos);
        EXPECT_TRUE(named) << refusal.expected << ": " << message;
      });
      EXPECT_EQ(refusing, 3) << refusal.expected;
    }
  }
}

TEST(Refusals, OneSpoiledRankStopsAll) {
  for (const Refusal& refusal : refusals()) {
    const std::string message = refused([&] {
      try {
        run_workers(3, [&](Communicator& comm) {
          Call c;
          if (comm.rank() == 1) refusal.spoil(c);
          ring_attention_backward(comm, c.dout, c.t.in.q, c.t.in.k, c.t.in.v, c.t.in.out, c.lse,
                                  c.g, c.options);
        });
      } catch (const CommError& error) {  // what fits alone may still differ from the others
        throw InvalidArgument(error.what());
      }
    });
    EXPECT_NE(message, "") << refusal.expected;
  }
}

TEST(Refusals, QueriesDoNotTravelAwayFromTheirRows) {
  for (const bool bias : {true, false}) {
    run_workers(3, [&](Communicator& comm) {
      Call c;
      c.options.ring_backward = RingBackward::kQueries;
      if (bias) {
        c.options.attention.bias = c.with(DType::kFloat32, {1, 4, 10, 30});
      } else {
        c.options.attention.attention_mask = c.with(DType::kBool, {1, 4, 10, 30}, 1);
      }
      const std::string message = refused([&] {
        ring_attention_backward(comm, c.dout, c.t.in.q, c.t.in.k, c.t.in.v, c.t.in.out, c.lse, c.g,
                                c.options);
      });
      EXPECT_NE(message.find(bias ? "bias" : "attention_mask"), std::string::npos) << message;
      EXPECT_NE(message.find("ring_attention_backward"), std::string::npos) << message;
      EXPECT_TRUE(c.untouched());
    });
  }
}

TEST(Refusals, PartitionsAndWorkersThatDoNotFit) {
  const auto message_with = [](int workers, const auto& set) {
    Call c;
    set(c.options);
    const std::string message = refused([&] {
      ring_attention_with_gradients(workers, c.dout, c.t.in.q, c.t.in.k, c.t.in.v, c.out,
                                    c.forward_lse, c.g, c.options);
    });
    EXPECT_TRUE(c.untouched());
    return message;
  };
  EXPECT_NE(message_with(0, [](RingOptions&) {}), "");
  EXPECT_NE(message_with(2,
                         [](RingOptions& o) {
                           o.partition = Partition::custom({{{0, 10, 1}}});
                         }),
            "");
  EXPECT_NE(message_with(2,
                         [](RingOptions& o) {
                           o.partition = Partition::from_positions({{0, 1}, {2}});
                         }),
            "");
  EXPECT_NE(message_with(2,
                         [](RingOptions& o) {
                           o.kv_partition = Partition::custom({{{0, 6, 1}}, {{5, 5, 1}}});
                         }),
            "");
  EXPECT_NE(message_with(2, [](RingOptions& o) { o.workers.timeout_s = 0; }), "");
  EXPECT_NE(message_with(2, [](RingOptions& o) { o.workers.timeout_s = kNan; }), "");
  for (const Target& target : targets()) {
    if (target.available) continue;
    EXPECT_NE(
        message_with(2, [&](RingOptions& o) { o.attention.isa = target.name; }).find(target.name),
        std::string::npos);
  }
}

// With the option results differ from those without, and are the oracle's.
TEST(Options, NoneIsIgnored) {
  const char* with[] = {"mask=causal",        "mask=window_left",
                        "mask=window_right",  "mask=window",
                        "mask=causal_window", "mask=chunked",
                        "mask=prefix",        "mask=per_head",
                        "mask=block_sparse",  "mask=attention_mask",
                        "segments=one",       "segments=padding",
                        "segments=documents", "kv_lengths=some_zero",
                        "sinks=per_head",     "sinks=shared",
                        "sinks=several",      "cap=3",
                        "bias=full",          "bias=one_batch",
                        "bias=one_head",      "bias=one",
                        "bias=narrow",        "dropout=0.1",
                        "scale=0.05",         "scale=-0.2"};
  for (const std::string dtype : {"float32", "bfloat16"}) {
    for (const std::string& target :
         targets_for(dtype == "float32" ? DType::kFloat32 : DType::kBFloat16)) {
      for (const char* workers : {"1", "3"}) {
        const std::string base = "dtype=" + dtype + " target=" + target + " workers=" + workers +
                                 " batch=2 heads=4/1 dims=33/7 seed=5 ";
        GridProblem plain(parse_cell(base));
        run_calls(plain);
        for (const char* option : with) {
          const Cell cell = parse_cell(base + option);
          GridProblem p(cell);
          run_calls(p);
          EXPECT_FALSE(p.out.bytes() == plain.out.bytes()) << describe(cell);
          EXPECT_FALSE(p.dq.bytes() == plain.dq.bytes()) << describe(cell);
          EXPECT_FALSE(p.dk.bytes() == plain.dk.bytes()) << describe(cell);
          EXPECT_FALSE(p.dv.bytes() == plain.dv.bytes()) << describe(cell);
          EXPECT_EQ(run_cell(cell), "") << describe(cell);
        }
      }
    }
  }
}

}  // namespace
}  // namespace annulus::testing
