// annulus bench: rows that are verified, then measured beside the peak of the same instruction.

#include <fmt/format.h>

#include <chrono>

#include "annulus/targets.h"
#include "annulus/version.h"
#include "bench_rows.h"
#include "call.h"
#include "failure.h"
#include "inputs.h"
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

Every row is checked against the oracle on sampled rows, then called 10 times in turn with its partners; figures are
medians. peak is a register-only loop of the row's instruction, timed before and after each call, times the threads.
  t/full     time over the time of the same row without a mask
  x1thread   speed over the speed on one thread
  x1pass     speed of a ring over the speed of one pass on all allowed CPUs
  xplain     speed over the speed of the plain partner
quick takes under two minutes; kernels adds grouped heads, packed sequences, tails, odd head sizes and inputs in which
every key moves the maximum; ring adds partitions and numbers of workers. Exit status 1: a row failed its check.
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
  const std::string group = "Benchmark";
  app.add_option("--suite", arguments.suite, "quick (default), kernels, ring, decode or all")
      ->check(one_of({"quick", "kernels", "ring", "decode", "all"}))
      ->type_name("NAME")
      ->group(group);
  app.add_option("--threads", arguments.threads,
                 "of the rows with several threads [2]; of the one row [1]")
      ->check(at_least_one())
      ->type_name("N")
      ->group(group);
  app.add_option("--repeat", arguments.repeat, "calls per row, at least 10 [10]")
      ->check(at_least_ten())
      ->type_name("N")
      ->group(group);
  add_isa_option(app, options);
  add_shape_options(app, options);
  add_mask_options(app, options);
  add_arithmetic_options(app, options);
  add_ring_options(app, options);
  add_json_option(app, options.json);
  app.add_flag("--quiet", options.quiet, "no progress on standard error")->group("About the run");
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
                      {options.isa, arguments.threads});
  Json rows = Json::array();
  Table table(row_heading());
  std::vector<std::string> failures;
  for (std::size_t g = 0; g < groups.size(); ++g) {
    const Progress progress(progress_is_visible(options.quiet),
                            fmt::format("group {} of {}", g + 1, groups.size()), {});
    const std::vector<BenchResult> results = measure(groups[g], arguments.repeat);
    for (std::size_t i = 0; i < results.size(); ++i) {
      rows.push_back(row_json(groups[g][i], results[i]));
      table.add(row_cells(groups[g][i], results[i]));
      if (!results[i].check_passed) failures.push_back(results[i].verdict);
    }
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  if (options.json) {
    fmt::print("{}\n", to_text(Json{{"machine", machine_json()}, {"rows", rows}}));
  } else {
    fmt::print("{}, {} allowed CPUs, annulus {}\n\n{}", cpu_name(), allowed_cpus(), kVersion,
               table.text());
    for (const std::string& failure : failures) fmt::print("FAILED: {}\n", failure);
    if (arguments.suite == "all") fmt::print("decode is not in this build yet\n");
    fmt::print("\n{} in all\n", time_text(seconds));
  }
  return failures.empty() ? kOk : kCheckFailed;
}

}  // namespace annulus::tools
