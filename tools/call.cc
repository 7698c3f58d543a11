#include "call.h"

#include <algorithm>
#include <cmath>

#include "annulus/targets.h"
#include "failure.h"
#include "process.h"
#include "text.h"

namespace annulus::tools {
namespace {

void refuse_what_belongs_elsewhere(const Options& options) {
  if (options.op == "chunked" && options.was_given("--partition")) {
    fail("leave out --partition; with --workers the pages are dealt",
         "--op=chunked takes no --partition");
  }
  if (options.op == "joint") return;
  for (const char* name : {"--logical-n", "--logical-l"}) {
    if (!options.was_given(name)) continue;
    fail("store int32 'kv_lengths' [batch] in INPUT: it says the same for --op=" + options.op,
         "{} belongs to --op=joint, found --op={}", name, options.op);
  }
  if (options.was_given("--joint-strategy")) {
    fail("leave it out, or pass --op=joint",
         "--joint-strategy belongs to --op=joint, found --op={}", options.op);
  }
}

void refuse_without_backward(const Options& options) {
  if (options.backward) return;
  const std::pair<const char*, bool> about_gradients[] = {
      {"--dbias", options.dbias},
      {"--no-fused-backward", options.no_fused_backward},
      {"--ring-backward", options.was_given("--ring-backward")}};
  for (const auto& [name, asked] : about_gradients) {
    if (asked) fail("add --backward, or leave it out", "{} is about gradients", name);
  }
}

Partition partition_of(const Options& options, const Inputs& inputs, int workers) {
  if (options.partition != "positions") return Partition::from_name(options.partition);
  const auto ranks = static_cast<int>(inputs.positions->size());
  if (ranks != workers) {
    fail(fmt::format("pass --workers={}", ranks),
         "tensor 'positions' has rows for {} ranks, expected {} (--workers)", ranks, workers);
  }
  return Partition::from_positions(*inputs.positions);
}

std::optional<Partition> kv_partition_of(const Options& options, const Inputs& inputs,
                                         int workers) {
  if (options.partition != "positions") return {};
  if (!inputs.kv_positions) {
    if (inputs.q.shape[1] == inputs.k.shape[1]) return {};
    return Partition::contiguous();
  }
  const auto ranks = static_cast<int>(inputs.kv_positions->size());
  if (ranks != workers) {
    fail("give both tensors one row per worker",
         "tensor 'kv_positions' has rows for {} ranks, expected {} (--workers)", ranks, workers);
  }
  return Partition::from_positions(*inputs.kv_positions);
}

double timeout_of(const Options& options, int workers) {
  if (!options.timeout_s.empty()) return seconds_from_text(options.timeout_s);
  if (workers == 1) return std::numeric_limits<double>::infinity();  // nobody to wait for
  return timeout_from_environment().value_or(WorkerOptions{}.timeout_s);
}

std::string line(const std::string& label, const std::string& text) {
  return fmt::format("{:<9}{}\n", label, text);
}

std::string plural(std::int64_t count, const char* noun) {
  return fmt::format("{} {}{}", count, noun, count == 1 ? "" : "s");
}

std::string backward_line(const Options& options, const Call& call) {
  if (!call.backward) return {};
  std::string text = fmt::format("{:.4g} of these GFLOP, {}", call.backward->flops * 1e-9,
                                 options.no_fused_backward ? "two passes" : "one pass");
  if (call.workers > 1) {
    text += call.backward->queries_travel ? ", q, dout and dq travel" : ", k, v, dk and dv travel";
  }
  return line("backward", text);
}

}  // namespace

void refuse_absent_features(const Options& options) {
  refuse_what_belongs_elsewhere(options);
  if (!(options.dropout_prob >= 0 && options.dropout_prob < 1)) {
    fail("choose a probability", "--dropout-prob is {}, expected at least 0 and less than 1",
         options.dropout_prob);
  }
  refuse_without_backward(options);
  const std::string later = "is not in this build yet";
  if (options.op != "attention") {
    fail<Unsupported>("use --op=attention, which --workers turns into a ring", "--op={} {}",
                      options.op, later);
  }
  if (options.num_links > 1) {
    fail<Unsupported>("leave it out: workers of one process read each other's blocks in place",
                      "--num-links={}: splitting messages into channels {}", options.num_links,
                      later);
  }
  if (options.all_gather) {
    fail<Unsupported>("leave it out: the ring needs no gathered copy of the keys",
                      "--all-gather: this form {}", later);
  }
}

AttentionOptions attention_options(const Options& options, const Inputs& inputs) {
  AttentionOptions attention;
  attention.causal = options.causal;
  attention.causal_alignment = options.causal_alignment == "top-left"
                                   ? CausalAlignment::kTopLeft
                                   : CausalAlignment::kBottomRight;
  attention.sliding_window = window_from_text(options.sliding_window);
  attention.chunk_size = options.chunk_size;
  attention.q_segment_ids = inputs.q_segment_ids;
  attention.kv_segment_ids = inputs.kv_segment_ids;
  attention.padding_segment_id = options.padding_segment_id;
  attention.kv_lengths = inputs.kv_lengths;
  attention.attention_mask = inputs.attention_mask;
  attention.softmax_scale = options.softmax_scale;
  attention.logits_soft_cap = options.logits_soft_cap;
  attention.softmax_aux = inputs.softmax_aux;
  attention.bias = inputs.bias;
  attention.dropout_prob = options.dropout_prob;
  attention.dropout_seed = options.dropout_seed;
  if (options.softmax_scale && !std::isfinite(*options.softmax_scale)) {
    fail("choose a finite scale", "--softmax-scale is {}, expected a finite number",
         *options.softmax_scale);
  }
  if (!std::isfinite(options.logits_soft_cap)) {
    fail("leave it out for no cap", "--logits-soft-cap is {}, expected a finite number",
         options.logits_soft_cap);
  }
  return attention;
}

Call make_call(const Options& options, const Inputs& inputs) {
  // A plan holds position, row and segment of every query and key once while it counts a rank's
  // pairs.
  constexpr std::int64_t kPlanPerToken = 24;
  require_memory((inputs.q.shape[1] + inputs.k.shape[1]) * kPlanPerToken);
  Call call;
  call.workers = options.workers ? *options.workers : workers_from_environment().value_or(1);
  call.out_dtype = out_dtype_of(options, inputs.q.dtype);
  call.ring.attention = attention_options(options, inputs);
  call.ring.attention.threads = options.threads_per_worker;
  call.ring.attention.isa = options.isa;
  call.ring.partition = partition_of(options, inputs, call.workers);
  call.ring.kv_partition = kv_partition_of(options, inputs, call.workers);
  call.ring.topology = options.topology == "linear" ? Topology::kLinear : Topology::kRing;
  call.ring.ring_backward = ring_backward_from_name(options.ring_backward);
  call.ring.fused_backward = !options.no_fused_backward;
  call.ring.workers.timeout_s = timeout_of(options, call.workers);
  call.ring.workers.stop = stop_requested;
  call.plan = explain(call.workers, inputs.q, inputs.k, inputs.v, call.out_dtype, call.ring);
  if (options.backward) {
    const bool rounded_dbias =
        options.dbias && inputs.bias.dtype != DType::kFloat32 && call.out_dtype != DType::kFloat32;
    call.backward = explain_backward(call.workers, inputs.q, inputs.k, inputs.v, inputs.dout->dtype,
                                     call.ring, rounded_dbias);
  }
  return call;
}

DType out_dtype_of(const Options& options, DType of_q) {
  if (options.out_dtype.empty()) return of_q;
  const DType asked = dtype_from_name(options.out_dtype);
  if (asked != of_q && asked != DType::kFloat32) {
    fail("use --out-dtype=float32, or leave it out",
         "--out-dtype: found {}, expected float32 or the dtype of q, {}", name(asked), name(of_q));
  }
  return asked;
}

bool rounds_probabilities(const std::string& target) {
  return target.rfind("amx", 0) == 0 || target == "avx512_bf16";
}

Shape out_shape(const Inputs& inputs) {
  return {inputs.q.shape[0], inputs.q.shape[1], inputs.q.shape[2], inputs.v.shape[3]};
}

double flops_of(const Call& call) {
  return call.plan.flops + (call.backward ? call.backward->flops : 0);
}

std::string describe_call(const Options& options, const Inputs& inputs, const Call& call) {
  const Plan& plan = call.plan;
  const std::string what =
      fmt::format("{}{}, {}, q {}, k {}, v {}", options.op,
                  options.backward ? " and its gradients" : "", short_name(name(inputs.q.dtype)),
                  to_string(inputs.q.shape), to_string(inputs.k.shape), to_string(inputs.v.shape));
  std::string where =
      fmt::format("{} ({}), {} x {}", plan.target, plan.arithmetic, plural(plan.workers, "worker"),
                  plural(plan.threads_per_worker, "thread"));
  if (plan.workers > 1) where += fmt::format(", {}, {}", options.partition, options.topology);
  const double share = plan.pairs_total > 0 ? static_cast<double>(plan.pairs_visible) /
                                                  static_cast<double>(plan.pairs_total)
                                            : 0;
  return line("call", what) + line("mask", plan.mask) + line("target", where) +
         line("work", fmt::format("{} of {} pairs visible ({}), {:.4g} GFLOP",
                                  count_text(static_cast<double>(plan.pairs_visible)),
                                  count_text(static_cast<double>(plan.pairs_total)),
                                  percent_text(share), flops_of(call) * 1e-9)) +
         backward_line(options, call);
}

}  // namespace annulus::tools
