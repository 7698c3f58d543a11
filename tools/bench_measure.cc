#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <memory>
#include <tuple>

#include "annulus/targets.h"
#include "bench_rows.h"
#include "call.h"
#include "inputs.h"
#include "numbers.h"
#include "oracle_check.h"
#include "outputs.h"
#include "parallel.h"
#include "process.h"

namespace annulus::tools {
namespace {

constexpr double kPeakSeconds = 0.005;
constexpr std::int64_t kCheckedRows = 8;  // per head: the first, the last, and some between

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t n = values.size();
  return n == 0 ? 0 : (values[(n - 1) / 2] + values[n / 2]) / 2;
}

// q is all ones; the score of key j is 4096 (j + 1) / kv_len: by each tile of 64 keys it grows by
// 16 at 16,384 tokens, which no threshold of a lazy rescaling lets pass. v stays normal.
void make_rising(Inputs& inputs) {
  constexpr double kLargest = 4096;
  const auto fill = [](const TensorView& view, auto value_at) {
    const auto [batch, seq, heads, dim] = view.shape;
    for (std::int64_t b = 0; b < batch; ++b) {
      for (std::int64_t s = 0; s < seq; ++s) {
        for (std::int64_t h = 0; h < heads; ++h) {
          for (std::int64_t d = 0; d < dim; ++d) {
            // The bytes belong to inputs.made.
            store_number(const_cast<std::byte*>(view.at(b, s, h, d)), view.dtype, value_at(s));
          }
        }
      }
    }
  };
  const auto dim = static_cast<double>(inputs.q.shape[3]);
  const auto kv_len = static_cast<double>(inputs.k.shape[1]);
  fill(inputs.q, [](std::int64_t) { return 1.0F; });
  fill(inputs.k, [&](std::int64_t j) {
    return static_cast<float>(kLargest * static_cast<double>(j + 1) / kv_len / std::sqrt(dim));
  });
}

using InputsKey = std::tuple<bool, DType, BenchInputs, Shape, Shape, std::int64_t, std::uint64_t>;

InputsKey key_of(const BenchRow& row) {
  return {row.backward,
          row.dtype,
          row.inputs,
          {row.batch, row.tokens, row.heads, row.head_dim},
          {row.batch, row.kv_tokens, row.kv_heads, row.v_head_dim},
          row.kv_heads,
          row.seed};
}

Options options_of(const BenchRow& row) {
  Options options;
  options.batch = row.batch, options.tokens = row.tokens, options.kv_tokens = row.kv_tokens;
  options.heads = row.heads, options.kv_heads = row.kv_heads;
  options.head_dim = row.head_dim, options.v_head_dim = row.v_head_dim;
  options.dtype = std::string(name(row.dtype));
  options.backward = row.backward;
  return options;
}

// Rows of equal shape share q, k, v and dout.
class InputsCache {
 public:
  const Inputs& of(const BenchRow& row) {
    std::unique_ptr<Inputs>& inputs = cache_[key_of(row)];
    if (!inputs) inputs = make(row);
    return *inputs;
  }

 private:
  static std::unique_ptr<Inputs> make(const BenchRow& row) {
    auto inputs = std::make_unique<Inputs>(open_inputs(options_of(row)));
    make_inputs(*inputs, row.seed, allowed_cpus());
    if (row.inputs == BenchInputs::kRising) make_rising(*inputs);
    return inputs;
  }

  std::map<InputsKey, std::unique_ptr<Inputs>> cache_;
};

// A row ready to be called.
class Bench {
 public:
  Bench(const BenchRow& row, const Inputs& inputs)
      : row_(row), inputs_(inputs), outputs_(make_outputs(options_of(row), inputs)) {
    ring_.attention = row.options;
    ring_.attention.isa = row.target;
    ring_.attention.threads = row.threads_per_worker;
    ring_.partition = Partition::from_name(row.partition);
    ring_.topology = row.topology;
    ring_.fused_backward = row.fused, ring_.ring_backward = row.ring_backward;
    if (row.segments > 0) make_segments();
    if (row.bias) make_bias();
    flops_ = explain(row.workers, inputs.q, inputs.k, inputs.v, row.dtype, ring_).flops;
    if (!row.backward) return;
    flops_ *= 2.5;
    forward();
  }

  [[nodiscard]] double flops() const { return flops_; }
  [[nodiscard]] const std::string& target() const { return summary_.target; }

  double call() {
    const auto begin = std::chrono::steady_clock::now();
    summary_ = row_.backward ? backward() : forward();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }

  [[nodiscard]] CheckOutcome check() const {
    OracleCheck check;
    check.q = inputs_.q, check.k = inputs_.k, check.v = inputs_.v, check.out = outputs_.out,
    check.lse = outputs_.lse;
    check.options = ring_.attention;
    check.bf16_probabilities = rounds_probabilities(row_.target);
    check.rows_per_head = kCheckedRows;
    CheckOutcome outcome{check_against_oracle(check), {}};
    if (!row_.backward) return outcome;
    const reference::BackwardInputs given{*inputs_.dout, outputs_.out, outputs_.lse};
    reference::GradientCheckOptions how;
    how.bf16_products = summary_.bf16_probabilities;
    how.rows_per_head = kCheckedRows;
    outcome.backward = reference::check_gradients(inputs_.q, inputs_.k, inputs_.v, given,
                                                  ring_.attention, outputs_.gradients, how);
    return outcome;
  }

  // Of all threads, as if each ran alone.
  [[nodiscard]] double peak() const {
    return measure_peak_flops(summary_.target, row_.dtype, kPeakSeconds) * row_.threads();
  }

 private:
  CallSummary forward() {
    const auto& [q, k, v] = std::tie(inputs_.q, inputs_.k, inputs_.v);
    if (row_.workers == 1) return attention(q, k, v, outputs_.out, outputs_.lse, ring_.attention);
    return ring_attention(row_.workers, q, k, v, outputs_.out, outputs_.lse, ring_).front();
  }

  CallSummary backward() {
    const auto& [q, k, v] = std::tie(inputs_.q, inputs_.k, inputs_.v);
    if (row_.workers == 1 && row_.fused) {
      return attention_backward(*inputs_.dout, q, k, v, outputs_.out, outputs_.lse,
                                outputs_.gradients, ring_.attention);
    }
    return ring_attention_backward(row_.workers, *inputs_.dout, q, k, v, outputs_.out, outputs_.lse,
                                   outputs_.gradients, ring_)
        .front();
  }

  void make_segments() {
    for (std::int64_t b = 0; b < row_.batch; ++b) {
      for (std::int64_t i = 0; i < row_.tokens; ++i) {
        segments_.push_back(static_cast<std::int32_t>(i * row_.segments / row_.tokens));
      }
    }
    const Shape shape{row_.batch, row_.tokens, 1, 1};
    ring_.attention.q_segment_ids = {segments_.data(), DType::kInt32, shape,
                                     row_major_strides(shape)};
  }

  void make_bias() {
    constexpr std::uint64_t kStream = 4;  // q, k, v and dout come before
    const Shape shape{1, 1, row_.tokens, row_.kv_tokens};
    bias_ = Storage(checked_bytes("bias", shape, DType::kFloat32));
    fill_normal(bias_.data(), DType::kFloat32, row_.tokens * row_.kv_tokens, row_.seed, kStream,
                allowed_cpus());
    ring_.attention.bias = {bias_.data(), DType::kFloat32, shape, row_major_strides(shape)};
  }

  const BenchRow& row_;
  const Inputs& inputs_;
  const Outputs outputs_;
  std::vector<std::int32_t> segments_;
  Storage bias_;
  RingOptions ring_;
  CallSummary summary_;
  double flops_ = 0;
};

struct Samples {
  std::vector<double> seconds, peaks, shares;
};

// All rows in turn, forwards and backwards alternately, so that a drift of the machine hits
// partners alike.
std::vector<Samples> take_samples(std::vector<std::unique_ptr<Bench>>& benches, int repetitions) {
  std::vector<Samples> samples(benches.size());
  for (int repetition = 0; repetition < repetitions; ++repetition) {
    for (std::size_t n = 0; n < benches.size(); ++n) {
      const std::size_t i = repetition % 2 == 0 ? n : benches.size() - 1 - n;
      check_stop();
      const double before = benches[i]->peak();
      const double seconds = benches[i]->call();
      const double peak = (before + benches[i]->peak()) / 2;
      samples[i].seconds.push_back(seconds);
      samples[i].peaks.push_back(peak);
      samples[i].shares.push_back(benches[i]->flops() / seconds / peak);
    }
  }
  return samples;
}

// Median of the ratios of each repetition; `work` is the ratio of what the two had to do.
std::optional<double> ratio(const std::vector<Samples>& samples, int above, int below,
                            double work = 1) {
  if (above < 0 || below < 0) return {};
  std::vector<double> ratios;
  const std::vector<double>& a = samples[static_cast<std::size_t>(above)].seconds;
  const std::vector<double>& b = samples[static_cast<std::size_t>(below)].seconds;
  for (std::size_t i = 0; i < a.size(); ++i) ratios.push_back(a[i] / b[i] * work);
  return median(ratios);
}

}  // namespace

std::vector<BenchResult> measure(const BenchGroup& group, int repetitions) {
  InputsCache inputs;
  std::vector<std::unique_ptr<Bench>> benches;
  std::vector<BenchResult> results(group.size());
  for (std::size_t i = 0; i < group.size(); ++i) {
    check_stop();
    benches.push_back(std::make_unique<Bench>(group[i], inputs.of(group[i])));
    benches[i]->call();  // also the warm-up
    results[i].target = benches[i]->target();
  }
  const auto count = static_cast<std::int64_t>(group.size());
  parallel_for(count, allowed_cpus(), [&](std::int64_t i) {
    check_stop();
    const auto n = static_cast<std::size_t>(i);
    const CheckOutcome check = benches[n]->check();
    results[n].check_passed = check.passed();
    results[n].verdict = check.verdict();
  });
  const std::vector<Samples> samples = take_samples(benches, repetitions);
  for (std::size_t i = 0; i < group.size(); ++i) {
    const BenchRow& row = group[i];
    const int self = static_cast<int>(i);
    BenchResult& result = results[i];
    result.seconds = median(samples[i].seconds);
    result.flops = benches[i]->flops();
    result.peak_flops = median(samples[i].peaks);
    result.share_of_peak = median(samples[i].shares);
    result.ratio_to_full = ratio(samples, self, row.full);
    result.ratio_to_one_thread = ratio(samples, row.one_thread, self);
    result.ratio_to_single_pass = ratio(samples, row.single_pass, self);
    if (row.plain >= 0) {
      const double work = result.flops / benches[static_cast<std::size_t>(row.plain)]->flops();
      result.ratio_to_plain = ratio(samples, row.plain, self, work);
    }
  }
  return results;
}

}  // namespace annulus::tools
