// annulus bench: rows that are verified, then measured beside the peak of the same instruction.

#include <fmt/format.h>

#include <chrono>

#include "annulus/targets.h"
#include "annulus/version.h"
#include "bench_rows.h"
#include "call.h"
#include "failure.h"
#include "inputs.h"
#include "option_group.h"
#include "process.h"
#include "progress.h"
#include "text.h"
#include "verbs.h"

namespace annulus::tools {
namespace {

constexpr const char* kExamples = R"(Examples:
  annulus bench
  annulus bench --suite=kernels --isa=avx512 --json
  annulus bench --tokens=8192 --head-dim=128 --causal --dtype=f32 --threads=2
  annulus bench --tokens=8192 --head-dim=128 --backward --dropout-prob=0.1

Every row is checked against the oracle on sampled rows, then called 10 times in turn with its partners; figures are
medians. peak is a register-only loop of the row's instruction, timed before and after each call, times the threads.
  t/full     time over the time of the same row without a mask
  x1thread   speed over the speed on one thread
  x1pass     speed of a ring over the speed of one pass on all allowed CPUs
  xplain     speed over the speed of the plain partner
Forward rows compute out and lse, backward rows the gradients alone, at 2.5 times the forward's FLOP.
quick takes about three minutes on two fast CPUs: the forward of every path of this CPU for bf16 and f32, and the
backward of the best one for each (--isa chooses one alone). kernels adds the others' backward, grouped heads, packed
sequences, tails, odd head sizes, inputs in which every key moves the maximum, and gradients with dropout, with a bias,
in two passes and in float16; ring adds partitions and numbers of workers. Exit status 1: a row failed its check.
)";

struct BenchArguments {
  Options options;
  std::string suite;
  std::optional<int> threads;
  int repeat = 10;
};

bool parse_bench(BenchArguments& arguments, int argc, char** argv) {
  Options& options = arguments.options;
  CLI::App app("Verifies, then measures: a suite, or one row of the asked shape.", "annulus bench");
  app.footer(kExamples);
  OptionGroup group(app, "Benchmark");
  group.value("--suite", arguments.suite, "NAME", "quick (default), kernels, ring, decode or all",
              one_of({"quick", "kernels", "ring", "decode", "all"}));
  group.value("--threads", arguments.threads, "N",
              "of the rows with several threads [2]; of the one row [1]", at_least_one());
  group.value("--repeat", arguments.repeat, "N", "calls per row, at least 10 [10]", at_least_ten());
  add_isa_option(app, options);
  add_shape_options(app, options);
  add_operation_options(app, options);
  add_mask_options(app, options);
  add_arithmetic_options(app, options);
  add_ring_options(app, options);
  add_json_option(app, options.json);
  add_quiet_option(app, options.quiet);
  return parse(app, argc, argv, &options);
}

// Anything that describes one row.
bool describes_row(const Options& options) {
  const std::vector<std::string> suite{"--suite", "--threads", "--repeat",
                                       "--isa",   "--json",    "--quiet"};
  return std::any_of(options.given.begin(), options.given.end(), [&](const auto& given) {
    return std::find(suite.begin(), suite.end(), given.first) == suite.end();
  });
}

BenchRow row_from(const BenchArguments& arguments) {
  const Options& options = arguments.options;
  if (arguments.threads && options.threads_per_worker > 0) {
    fail("leave one of them out", "--threads and --threads-per-worker say the same for one row");
  }
  if (options.partition == "positions") {
    fail("use contiguous, striped or zigzag",
         "--partition=positions needs an INPUT, which annulus bench has not");
  }
  BenchRow row;
  row.dtype = dtype_from_name(options.dtype);
  row.target = chosen_target(row.dtype, options.isa);
  row.batch = options.batch;
  row.tokens = options.tokens;
  row.kv_tokens = options.kv_tokens.value_or(options.tokens);
  row.heads = options.heads;
  row.kv_heads = options.kv_heads.value_or(options.heads);
  row.head_dim = options.head_dim;
  row.v_head_dim = options.v_head_dim.value_or(options.head_dim);
  row.workers = options.workers.value_or(1);
  row.threads_per_worker = std::max(options.threads_per_worker, arguments.threads.value_or(1));
  row.partition = options.partition;
  row.topology = options.topology == "linear" ? Topology::kLinear : Topology::kRing;
  row.seed = options.seed;
  row.backward = options.backward, row.fused = !options.no_fused_backward;
  row.ring_backward = ring_backward_from_name(options.ring_backward);
  const Inputs inputs = open_inputs(options);
  row.options = attention_options(options, inputs);
  row.mask = make_call(options, inputs).plan.mask;
  return row;
}

Json machine_json() {
  Json names = Json::array();
  for (const Target& target : targets()) {
    if (target.available) names.push_back(target.name);
  }
  return {
      {"cpu", cpu_name()}, {"targets", names}, {"cores", allowed_cpus()}, {"version", kVersion}};
}

// At once, not at the end: a suite takes minutes.
void print_group(const BenchGroup& group, const std::vector<BenchResult>& results) {
  Table table(row_heading());
  for (std::size_t i = 0; i < results.size(); ++i) table.add(row_cells(group[i], results[i]));
  fmt::print("\n{}", table.text());
  for (const BenchResult& result : results) {
    if (!result.check_passed) fmt::print("FAILED: {}\n", result.verdict);
  }
  std::fflush(stdout);
}

}  // namespace

int bench_main(int argc, char** argv) {
  BenchArguments arguments;
  if (!parse_bench(arguments, argc, argv)) return kOk;
  const Options& options = arguments.options;
  const bool one_row = describes_row(options);
  if (one_row && !arguments.suite.empty()) {
    fail("leave out --suite, or the options of the row",
         "--suite has rows of its own, found options of one row");
  }
  refuse_absent_features(options);
  refuse_launchers();
  install_stop_handler();
  const auto begin = std::chrono::steady_clock::now();
  const std::vector<BenchGroup> groups =
      one_row ? std::vector<BenchGroup>{{row_from(arguments)}}
              : suite(arguments.suite.empty() ? "quick" : arguments.suite,
                      {options.isa, !options.isa.empty() || environment_limits_isa(),
                       arguments.threads});
  if (!options.json) {
    fmt::print("{}, {} allowed CPUs, annulus {}\n", cpu_name(), allowed_cpus(), kVersion);
  }
  Json rows = Json::array();
  bool passed = true;
  for (std::size_t g = 0; g < groups.size(); ++g) {
    std::vector<BenchResult> results;
    {
      const Progress progress(progress_is_visible(options.quiet),
                              fmt::format("group {} of {}", g + 1, groups.size()), {});
      results = measure(groups[g], arguments.repeat);
    }
    for (std::size_t i = 0; i < results.size(); ++i) {
      rows.push_back(row_json(groups[g][i], results[i]));
      passed &= results[i].check_passed;
    }
    if (!options.json) print_group(groups[g], results);
  }
  if (options.json) {
    fmt::print("{}\n", to_text(Json{{"machine", machine_json()}, {"rows", rows}}));
  } else {
    if (arguments.suite == "all") fmt::print("decode is not in this build yet\n");
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    fmt::print("{} in all\n", time_text(seconds.count()));
  }
  return passed ? kOk : kCheckFailed;
}

}  // namespace annulus::tools
