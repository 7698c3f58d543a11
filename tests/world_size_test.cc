// The same gradients whatever the number of workers and threads.

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "testing.h"
#include "training_testing.h"

namespace annulus::testing {
namespace {

// rms and largest error of out, lse, dq, dk and dv, and whether the bars hold.
struct Accuracy {
  std::map<std::string, double> rms, largest;
  std::string verdict;
};

Accuracy accuracy(DType dtype, int workers, RingBackward travel) {
  // Enough rows that their rms errors are no matter of luck, and none that outweighs the others.
  const std::int64_t len = 448;
  Training t(dtype, {1, len, len, 2, 1, 64, 64}, 31);
  RingOptions options;
  options.attention.sliding_window = {300, 300}, options.attention.threads = 1;
  options.partition = Partition::zigzag(), options.ring_backward = travel;
  const auto check = t.run_and_check(options, workers);
  const bool bf16 = dtype == DType::kBFloat16 &&
                    explain(workers, t.in.q, t.in.k, t.in.v, dtype, options).bf16_probabilities;
  const auto forward = reference::check_attention(t.in.q, t.in.k, t.in.v, options.attention,
                                                  t.in.out, t.in.lse, bf16, 200);
  Accuracy result;
  result.rms["out"] = forward.rms_err, result.largest["out"] = forward.max_abs_err;
  result.largest["lse"] = forward.lse_max_err;
  for (const auto& gradient : check.gradients) {
    result.rms[gradient.name] = gradient.result.rms_err;
    result.largest[gradient.name] = gradient.result.max_abs_err;
  }
  if (!check.passed) result.verdict = check.verdict;
  if (!forward.passed) result.verdict += forward.verdict;
  return result;
}

// N4. The largest of many errors is luck where it is a few float32 roundings.
TEST(WorldSize, GradientErrorsDoNotGrow) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const Accuracy alone = accuracy(dtype, 1, RingBackward::kAuto);
    EXPECT_EQ(alone.verdict, "");
    for (const int workers : {2, 3, 5, 7, 8, 16, 32, 64}) {
      if (kTestScale > 1 && workers != 5) continue;
      for (const RingBackward travel : {RingBackward::kKeys, RingBackward::kQueries}) {
        SCOPED_TRACE(::testing::Message()
                     << name(dtype) << " P " << workers << " travel " << static_cast<int>(travel));
        const Accuracy ring = accuracy(dtype, workers, travel);
        EXPECT_EQ(ring.verdict, "");
        for (const auto& [what, rms] : ring.rms) EXPECT_LE(rms, 1.1 * alone.rms.at(what)) << what;
        for (const auto& [what, largest] : ring.largest) {
          const double luck = dtype == DType::kFloat32 || what == "lse" ? 2 * 0x1p-23 * 8 : 0;
          EXPECT_LE(largest, 1.1 * alone.largest.at(what) + luck) << what;
        }
      }
    }
  }
}

Training with_options(DType dtype, RingOptions& options) {
  Training t(dtype, {2, 300, 300, 4, 2, 48, 32}, 33);
  t.softmax_aux = Tensor(DType::kFloat32, {4, 1, 1, 1});
  t.softmax_aux.fill([](std::int64_t h, auto...) { return 1.0 + static_cast<double>(h); });
  t.dsoftmax_aux = t.softmax_aux;
  t.bias = Tensor(DType::kFloat32, {1, 4, 300, 300}).normal(34);
  t.dbias = t.bias;
  options.attention.causal = true, options.attention.bias = t.bias;
  options.attention.softmax_aux = t.softmax_aux, options.attention.dropout_prob = 0.2;
  options.partition = Partition::striped();
  return t;
}

std::vector<std::vector<std::byte>> gradient_bits(Training& t, const RingOptions& options,
                                                  int workers) {
  ring_attention_with_gradients(workers, t.dout, t.in.q, t.in.k, t.in.v, t.in.out.mutable_view(),
                                t.in.lse.mutable_view(), t.gradients(), options);
  return {t.in.out.bytes(), t.in.lse.bytes(),       t.dq.bytes(),   t.dk.bytes(),
          t.dv.bytes(),     t.dsoftmax_aux.bytes(), t.dbias.bytes()};
}

// D1 and D2.
TEST(WorldSize, SameBitsForAnyThreadsAndEveryTime) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const bool fused : {true, false}) {
      for (const RingBackward travel : {RingBackward::kKeys, RingBackward::kQueries}) {
        RingOptions options;
        Training t = with_options(dtype, options);
        options.fused_backward = fused, options.ring_backward = travel;
        std::vector<std::vector<std::byte>> first;
        for (const int threads : {1, 2, 3, 5, 8, 1, 2, 3}) {
          options.attention.threads = threads;
          const auto bits = gradient_bits(t, options, 3);
          if (first.empty()) first = bits;
          EXPECT_EQ(bits == first, true) << name(dtype) << " threads " << threads << " fused "
                                         << fused << " travel " << static_cast<int>(travel);
        }
      }
    }
  }
}

TEST(WorldSize, FusedAndTwoPassMeetTheSameBars) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const bool fused : {true, false}) {
      RingOptions options;
      Training t = with_options(dtype, options);
      options.fused_backward = fused;
      const auto check = t.run_and_check(options, 4);
      EXPECT_TRUE(check.passed) << name(dtype) << " fused " << fused << ": " << check.verdict;
    }
  }
}

TEST(WorldSize, EveryRankHasTheSameSinkGradient) {
  for (const int workers : {2, 3, 8}) {
    std::mutex mutex;
    std::vector<std::vector<std::byte>> parts;
    run_workers(workers, [&](Communicator& comm) {
      const Shape s{1, 40, 40, 4, 2, 32, 32};
      Training t(DType::kBFloat16, s, static_cast<unsigned>(50 + comm.rank()));
      t.softmax_aux = Tensor(DType::kFloat32, {4, 2, 1, 1});
      t.softmax_aux.fill([](std::int64_t h, std::int64_t n, auto...) { return 1.0 * (h + n); });
      t.dsoftmax_aux = t.softmax_aux;
      RingOptions options;
      options.attention.softmax_aux = t.softmax_aux, options.attention.causal = true;
      (void)ring_attention(comm, t.in.q, t.in.k, t.in.v, t.in.out.mutable_view(),
                           t.in.lse.mutable_view(), options);
      (void)ring_attention_backward(comm, t.dout, t.in.q, t.in.k, t.in.v, t.in.out, t.in.lse,
                                    t.gradients(), options);
      const std::lock_guard lock(mutex);
      parts.push_back(t.dsoftmax_aux.bytes());
    });
    for (const auto& part : parts) EXPECT_EQ(part == parts[0], true) << workers;
  }
}

}  // namespace
}  // namespace annulus::testing
