// annulus explain: what a run would do, found without computing.

#include <fmt/format.h>

#include <algorithm>

#include "call.h"
#include "failure.h"
#include "outputs.h"
#include "process.h"
#include "run_options.h"
#include "text.h"
#include "verbs.h"

namespace annulus::tools {
namespace {

constexpr const char* kExamples = R"(Examples:
  annulus explain --tokens=1048576 --head-dim=128 --causal --workers=8 --partition=zigzag
  annulus explain in.safetensors --sliding-window=1024,0 --workers=4 --json

Takes every option of annulus run, so that a line can be tried by changing its verb. INPUT is read for its shapes and
masks. Nothing is computed, checked or written, so --output, --report, --trace, --check, --repeat and --timeout-s have
nothing to act on.
)";

Json plan_json(const Options& options, const Inputs& inputs, const Call& call,
               std::int64_t planned) {
  const Plan& plan = call.plan;
  Json steps = Json::array();
  for (const PlannedStep& step : plan.steps) {
    steps.push_back({{"rank", step.rank},
                     {"step", step.step},
                     {"owner", step.owner},
                     {"pairs", step.pairs},
                     {"send_to", step.send_to},
                     {"bytes", step.bytes}});
  }
  Json json{{"op", options.op},
            {"shapes", shapes_json(options, inputs)},
            {"dtype", short_name(name(inputs.q.dtype))},
            {"out_dtype", short_name(name(call.out_dtype))},
            {"target", plan.target},
            {"arithmetic", plan.arithmetic},
            {"mask", plan.mask},
            {"workers", plan.workers},
            {"threads_per_worker", plan.threads_per_worker},
            {"partition", options.partition},
            {"topology", options.topology},
            {"q_rows", plan.q_rows},
            {"kv_rows", plan.kv_rows},
            {"pairs_visible", plan.pairs_visible},
            {"pairs_total", plan.pairs_total},
            {"flops", flops_of(call)},
            {"bytes_sent_per_rank", plan.bytes_sent_per_rank},
            {"strip_rows", plan.strip_rows},
            {"tile_keys", plan.tile_keys},
            {"panel_keys", plan.panel_keys},
            {"item_rows", plan.item_rows},
            {"peak_bytes_of_call", plan.peak_bytes},
            {"peak_bytes_planned", planned},
            {"notes", plan.notes},
            {"steps", steps}};
  if (options.backward) {
    json["backward"] = {{"flops", call.backward->flops},
                        {"fused", !options.no_fused_backward},
                        {"ring_backward", call.backward->queries_travel ? "q" : "kv"},
                        {"bytes_sent_per_rank", call.backward->bytes_sent_per_rank},
                        {"peak_bytes_of_call", call.backward->peak_bytes}};
  }
  return json;
}

struct RankTotals {
  std::int64_t pairs = 0;
  std::int64_t computed = 0;
  std::int64_t skipped = 0;
};

std::vector<RankTotals> totals_of(const Plan& plan) {
  std::vector<RankTotals> totals(static_cast<std::size_t>(plan.workers));
  for (const PlannedStep& step : plan.steps) {
    RankTotals& rank = totals[static_cast<std::size_t>(step.rank)];
    rank.pairs += step.pairs;
    if (step.owner >= 0) ++(step.pairs > 0 ? rank.computed : rank.skipped);
  }
  return totals;
}

// One line per rank; `load` is its pairs over the mean, so 100 % everywhere is a ring without
// waiting.
std::string rank_table(const Plan& plan) {
  const std::vector<RankTotals> totals = totals_of(plan);
  const double mean = static_cast<double>(plan.pairs_visible) / plan.workers;
  Table table({"rank", "q rows", "kv rows", "pairs", "load", "blocks", "skipped", "sends"});
  for (std::size_t rank = 0; rank < totals.size(); ++rank) {
    const auto pairs = static_cast<double>(totals[rank].pairs);
    table.add({std::to_string(rank), grouped(plan.q_rows[rank]), grouped(plan.kv_rows[rank]),
               count_text(pairs), percent_text(mean > 0 ? pairs / mean : 0),
               std::to_string(totals[rank].computed), std::to_string(totals[rank].skipped),
               byte_text(static_cast<double>(plan.bytes_sent_per_rank[rank]))});
  }
  return table.text();
}

// Whose keys each rank has in each step; "." where nothing is computed.
std::string step_table(const Plan& plan) {
  int steps = 0;
  for (const PlannedStep& step : plan.steps) steps = std::max(steps, step.step + 1);
  std::vector<std::string> heading{"step"};
  for (int rank = 0; rank < plan.workers; ++rank) heading.push_back(fmt::format("rank {}", rank));
  Table table(heading);
  for (int s = 0; s < steps; ++s) {
    std::vector<std::string> row(heading.size());
    row[0] = std::to_string(s);
    for (const PlannedStep& step : plan.steps) {
      if (step.step != s || step.owner < 0) continue;
      std::string& cell = row[static_cast<std::size_t>(step.rank) + 1];
      const std::string keys = step.pairs > 0 ? fmt::format("{}", step.owner) : std::string(".");
      cell += (cell.empty() ? "" : " ") + keys;
    }
    table.add(row);
  }
  return "keys of which rank are used when (. = arrive or pass, nothing visible):\n" + table.text();
}

void print_plan(const Options& options, const Inputs& inputs, const Call& call,
                std::int64_t planned) {
  constexpr int kWidest = 16;  // ranks that fit a terminal
  const Plan& plan = call.plan;
  fmt::print("{}", describe_call(options, inputs, call));
  fmt::print("{:<9}strips of {} rows, tiles of {} keys, panels of {} keys, items of {} rows\n",
             "tiles", plan.strip_rows, plan.tile_keys, plan.panel_keys, plan.item_rows);
  fmt::print("{:<9}{} for the call, {} for the process\n", "memory",
             byte_text(static_cast<double>(plan.peak_bytes)),
             byte_text(static_cast<double>(planned)));
  if (options.backward) {
    fmt::print("{:<9}{} for the backward; the lines below are the forward's\n", "",
               byte_text(static_cast<double>(call.backward->peak_bytes)));
  }
  for (const std::string& note : plan.notes) fmt::print("{:<9}{}\n", "note", note);
  if (plan.workers == 1) return;
  fmt::print("\n{}", rank_table(plan));
  if (plan.workers <= kWidest) fmt::print("\n{}", step_table(plan));
}

}  // namespace

int explain_main(int argc, char** argv) {
  Options options;
  if (!parse_run_options(options, "annulus explain", "Prints the plan of a run; computes nothing.",
                         kExamples, argc, argv)) {
    return kOk;
  }
  refuse_absent_features(options);
  const std::int64_t at_start = resident_bytes();
  const Inputs inputs = open_inputs(options);
  const Call call = make_call(options, inputs);
  const std::int64_t planned = planned_bytes(at_start, options, inputs, call);
  if (options.json) {
    fmt::print("{}\n", to_text(plan_json(options, inputs, call, planned)));
  } else if (!options.quiet) {
    print_plan(options, inputs, call, planned);
  }
  return kOk;
}

}  // namespace annulus::tools
