// annulus run: one call, from tensors of a file or made ones to out and lse.

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>

#include "annulus/report.h"
#include "annulus/targets.h"
#include "call.h"
#include "failure.h"
#include "oracle_check.h"
#include "outputs.h"
#include "picture.h"
#include "process.h"
#include "progress.h"
#include "run_options.h"
#include "text.h"
#include "verbs.h"

namespace annulus::tools {
namespace {

constexpr const char* kExamples = R"(Examples:
  annulus run in.safetensors -o out.safetensors --causal
  annulus run in.safetensors -o out.safetensors --workers=4 --partition=zigzag --causal --check=64
  annulus run --tokens=65536 --heads=2 --head-dim=128 --causal --workers=4 --report=run.html
  annulus run in.safetensors -o gradients.safetensors --backward --causal --workers=4 --check=16
  annulus run in.safetensors --layout=bhsd --sliding-window=1024,0 --out-dtype=float32 -o out.safetensors

INPUT holds q, k, v [batch, seq, heads, dim] and, if wanted, q_segment_ids, kv_segment_ids, softmax_aux, bias,
attention_mask, kv_lengths, positions, kv_positions. OUTPUT receives out and lse [batch, heads, seq]. With --backward
INPUT holds dout, too, and OUTPUT receives dq, dk, dv, dsoftmax_aux where there is softmax_aux, and dbias with --dbias.
Without INPUT the inputs are made; without -o nothing is written. Exit status 1: the check failed.
)";

struct Measured {
  std::vector<double> seconds;
  std::vector<CallSummary> ranks;      // of the last repetition
  std::vector<CallSummary> backward;   // with --backward, of the last repetition
  std::unique_ptr<Recorder> recorder;  // of the last repetition, if one was needed

  [[nodiscard]] double median() const {
    std::vector<double> sorted = seconds;
    std::sort(sorted.begin(), sorted.end());
    const std::size_t n = sorted.size();
    return (sorted[(n - 1) / 2] + sorted[n / 2]) / 2;
  }
};

struct Result {
  std::int64_t planned_bytes = 0;
  Measured measured;
  std::optional<CheckOutcome> check;
};

// The backward computes every pair again, for 2.5 times the forward's FLOP.
double share_done(const Options& options, const Call& call, const Recorder& recorder) {
  if (!options.backward) return share_computed(recorder, call.plan.pairs_visible);
  const double passes = 2 * share_computed(recorder, 2 * call.plan.pairs_visible);
  return passes <= 1 ? passes / 3.5 : (1 + 2.5 * (passes - 1)) / 3.5;
}

void call_once(const Inputs& inputs, const Call& call, const Outputs& outputs, Measured& measured) {
  if (!inputs.dout) {
    measured.ranks = ring_attention(call.workers, inputs.q, inputs.k, inputs.v, outputs.out,
                                    outputs.lse, call.ring);
    return;
  }
  measured.ranks.clear(), measured.backward.clear();
  for (const TrainingSummary& rank :
       ring_attention_with_gradients(call.workers, *inputs.dout, inputs.q, inputs.k, inputs.v,
                                     outputs.out, outputs.lse, outputs.gradients, call.ring)) {
    measured.ranks.push_back(rank.forward);
    measured.backward.push_back(rank.backward);
  }
}

// attention() is a ring of one. It is called by its ring's name, because that form can be stopped.
Measured compute(const Options& options, const Inputs& inputs, Call& call, const Outputs& outputs) {
  using Clock = std::chrono::steady_clock;
  const bool visible = progress_is_visible(options.quiet);
  const bool recorded = visible || !options.report.empty() || !options.trace.empty();
  Measured measured;
  for (int repetition = 0; repetition < options.repeat; ++repetition) {
    if (recorded) measured.recorder = std::make_unique<Recorder>();
    Recorder* recorder = measured.recorder.get();
    call.ring.attention.recorder = recorder;
    const std::string what =
        options.repeat == 1 ? "computing"
                            : fmt::format("computing {} of {}", repetition + 1, options.repeat);
    const Progress progress(visible, what, [&] { return share_done(options, call, *recorder); });
    const auto begin = Clock::now();
    call_once(inputs, call, outputs, measured);
    measured.seconds.push_back(std::chrono::duration<double>(Clock::now() - begin).count());
    call.ring.attention.recorder = nullptr;
    check_stop();
  }
  return measured;
}

// The gradients of the call are those of the float32 out before it was rounded. The library, which
// gives the same bits each time, is asked for it again. With lse, too, sampled rows cost no more
// than they are.
reference::GradientCheck check_gradients(const Options& options, const Inputs& inputs,
                                         const Call& call, const Measured& measured,
                                         const Outputs& outputs) {
  const Progress progress(progress_is_visible(options.quiet), "checking gradients", {});
  reference::BackwardInputs backward{.dout = *inputs.dout};
  Storage memory;
  const std::int64_t rows = rows_of_check(options);
  backward.out = outputs.out;
  if (rows > 0) backward.lse = outputs.lse;
  if (call.out_dtype != DType::kFloat32) {
    const Shape shape = out_shape(inputs);
    memory = Storage(checked_bytes("out", shape, DType::kFloat32));
    const MutableTensorView out{memory.data(), DType::kFloat32, shape, dense_strides(shape)};
    ring_attention(call.workers, inputs.q, inputs.k, inputs.v, out, {}, call.ring);
    backward.out = out;
  }
  reference::GradientCheckOptions how;
  how.bf16_products = measured.backward.front().bf16_probabilities;
  how.rows_per_head = rows;
  return reference::check_gradients(inputs.q, inputs.k, inputs.v, backward, call.ring.attention,
                                    outputs.gradients, how);
}

reference::CheckResult check_forward(const Options& options, const Inputs& inputs, const Call& call,
                                     const Outputs& outputs) {
  OracleCheck check;
  check.q = inputs.q, check.k = inputs.k, check.v = inputs.v;
  check.out = outputs.out, check.lse = outputs.lse;
  check.options = call.ring.attention;
  check.bf16_probabilities = rounds_probabilities(call.plan.target);
  check.rows_per_head = rows_of_check(options);
  check.threads = allowed_cpus();
  std::atomic<std::int64_t> done{0};
  const auto rows = static_cast<double>(rows_to_check(check));
  const Progress progress(progress_is_visible(options.quiet), "checking",
                          [&] { return static_cast<double>(done) / rows; });
  return check_against_oracle(check, [&](std::int64_t n) { done = n; });
}

void write_pictures(const Options& options, const Inputs& inputs, const Call& call,
                    const Result& result) {
  if (options.report.empty() && options.trace.empty()) return;
  ReportInput report = report_input(options, inputs, call);
  report.events = result.measured.recorder->events();
  report.events_dropped = result.measured.recorder->dropped();
  report.seconds = result.measured.seconds.back();
  report.facts.emplace_back("peak memory, planned",
                            byte_text(static_cast<double>(result.planned_bytes)));
  report.facts.emplace_back("peak memory, measured",
                            byte_text(static_cast<double>(peak_resident_bytes())));
  if (result.check) {
    report.check = check_facts(*result.check);
    report.check_passed = result.check->passed();
  }
  if (!options.trace.empty())
    write_text_atomically(options.trace, trace_json(report.events, report.title));
  if (!options.report.empty()) write_text_atomically(options.report, html_report(report));
}

std::vector<std::int64_t> bytes_sent_by(const Measured& measured) {
  std::vector<std::int64_t> bytes;
  for (std::size_t rank = 0; rank < measured.ranks.size(); ++rank) {
    bytes.push_back(measured.ranks[rank].bytes_sent);
    if (!measured.backward.empty()) bytes.back() += measured.backward[rank].bytes_sent;
  }
  return bytes;
}

Json result_json(const Options& options, const Inputs& inputs, const Call& call,
                 const Result& result) {
  std::int64_t visible = 0, computed = 0;
  for (const CallSummary& rank : result.measured.ranks) {
    visible += rank.pairs_visible;
    computed += rank.pairs_computed;
  }
  return {{"op", options.op},
          {"shapes", shapes_json(options, inputs)},
          {"dtype", short_name(name(inputs.q.dtype))},
          {"target", call.plan.target},
          {"workers", call.workers},
          {"partition", options.partition},
          {"seconds", result.measured.median()},
          {"flops", flops_of(call)},
          {"bytes_sent_per_rank", bytes_sent_by(result.measured)},
          {"pairs_visible", visible},
          {"pairs_computed", computed},
          {"peak_bytes_planned", result.planned_bytes},
          {"peak_bytes_measured", peak_resident_bytes()},
          {"check", result.check ? check_json(*result.check) : Json(nullptr)}};
}

void print_sent(const char* label, const std::vector<CallSummary>& ranks, const char* what) {
  std::int64_t sent = 0, skipped = 0;
  for (const CallSummary& rank : ranks) sent += rank.bytes_sent, skipped += rank.steps_skipped;
  fmt::print("{:<9}{} in all, {} of {} steps skipped{}\n", label,
             byte_text(static_cast<double>(sent)), skipped, ranks.size() * ranks.size(), what);
}

void print_result(const Options& options, const Call& call, const Result& result) {
  const std::vector<double>& seconds = result.measured.seconds;
  const double median = result.measured.median();
  std::string time = fmt::format("{}, {}", time_text(median), flops_text(flops_of(call) / median));
  if (seconds.size() > 1) {
    const auto [least, most] = std::minmax_element(seconds.begin(), seconds.end());
    time += fmt::format(" (median of {}, {} to {})", seconds.size(), time_text(*least),
                        time_text(*most));
  }
  fmt::print("{:<9}{}\n", "time", time);
  if (call.workers > 1) {
    print_sent("sent", result.measured.ranks, options.backward ? " in the forward" : "");
    if (options.backward) {
      print_sent("", result.measured.backward,
                 result.measured.backward.front().queries_travelled
                     ? " in the backward: q, dout and dq travelled"
                     : " in the backward: k, v, dk and dv travelled");
    }
  }
  fmt::print("{:<9}{} at the peak, {} planned\n", "memory",
             byte_text(static_cast<double>(peak_resident_bytes())),
             byte_text(static_cast<double>(result.planned_bytes)));
  if (result.check) fmt::print("{:<9}{}\n", "check", check_text(*result.check, 9));
  for (const std::string* path : {&options.output, &options.report, &options.trace}) {
    if (!path->empty()) fmt::print("{:<9}{}\n", "wrote", printable(*path));
  }
}

}  // namespace

int run_main(int argc, char** argv) {
  Options options;
  if (!parse_run_options(options, "annulus run",
                         "Computes attention for the tensors of INPUT, or for made ones.",
                         kExamples, argc, argv)) {
    return kOk;
  }
  refuse_absent_features(options);
  refuse_launchers();
  require_writable(options);
  install_stop_handler();
  return_freed_memory();

  const std::int64_t at_start = resident_bytes();
  const bool talks = !options.json && !options.quiet;
  Inputs inputs = open_inputs(options);
  require_memory((inputs.file ? 0 : inputs.bytes) +
                 output_bytes(options, inputs));  // plans grow with the tokens
  Call call = make_call(options, inputs);
  Result result;
  result.planned_bytes = planned_bytes(at_start, options, inputs, call);
  if (talks) {
    fmt::print("{}{:<9}{} planned\n", describe_call(options, inputs, call), "memory",
               byte_text(static_cast<double>(result.planned_bytes)));
    std::fflush(stdout);
  }
  require_memory(result.planned_bytes - resident_bytes());

  const Outputs outputs = make_outputs(options, inputs);
  if (!inputs.file) {
    const Progress progress(progress_is_visible(options.quiet), "making inputs", {});
    make_inputs(inputs, options.seed, allowed_cpus());
  }
  result.measured = compute(options, inputs, call, outputs);
  if (wants_check(options)) {
    result.check = {check_forward(options, inputs, call, outputs), {}};
    if (options.backward)
      result.check->backward = check_gradients(options, inputs, call, result.measured, outputs);
  }
  if (!options.output.empty()) write_outputs(options, call, outputs);
  write_pictures(options, inputs, call, result);
  if (options.json) fmt::print("{}\n", to_text(result_json(options, inputs, call, result)));
  if (talks) print_result(options, call, result);
  return result.check && !result.check->passed() ? kCheckFailed : kOk;
}

}  // namespace annulus::tools
