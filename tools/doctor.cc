// annulus doctor: what this machine and this build can do, and whether they compute right.

#include <fmt/format.h>

#include <chrono>
#include <cmath>

#include "annulus/ring.h"
#include "annulus/targets.h"
#include "annulus/version.h"
#include "call.h"
#include "failure.h"
#include "inputs.h"
#include "json.h"
#include "option_group.h"
#include "oracle_check.h"
#include "outputs.h"
#include "process.h"
#include "text.h"
#include "verbs.h"

namespace annulus::tools {
namespace {

constexpr const char* kExamples = R"(Examples:
  annulus doctor
  annulus doctor --json

Exit status 1: the self-test failed, or the environment holds a bad value.
)";

constexpr DType kDTypes[] = {DType::kBFloat16, DType::kFloat16, DType::kFloat32};

struct SelfTest {
  std::string target;
  DType dtype = DType::kFloat32;
  int workers = 1;
  bool passed = false;
  std::string verdict;
};

struct Diagnosis {
  std::vector<Target> targets;
  std::vector<std::pair<std::string, std::string>> chosen;  // dtype, target
  Limits limits;
  std::vector<SelfTest> tests;
  double seconds = 0;  // of the self-test
  std::vector<std::string> problems;
};

// Small enough for the slowest target, off every tile size; causal, grouped heads.
Options test_shape(DType dtype) {
  Options options;
  options.tokens = 70;
  options.heads = 2;
  options.kv_heads = 1;
  options.head_dim = 40;
  options.dtype = std::string(name(dtype));
  options.causal = true;
  return options;
}

SelfTest self_test(const std::string& target, DType dtype, int workers) {
  SelfTest test{target, dtype, workers, false, {}};
  try {
    const Options shape = test_shape(dtype);
    Inputs inputs = open_inputs(shape);
    make_inputs(inputs, 1, 1);
    const Outputs outputs = make_outputs(shape, inputs);
    RingOptions ring;
    ring.attention.causal = true;
    ring.attention.isa = target;
    ring.attention.threads = 1;
    ring.partition = Partition::zigzag();
    ring_attention(workers, inputs.q, inputs.k, inputs.v, outputs.out, outputs.lse, ring);
    OracleCheck check;
    check.q = inputs.q, check.k = inputs.k, check.v = inputs.v, check.out = outputs.out,
    check.lse = outputs.lse;
    check.options = ring.attention;
    check.bf16_probabilities = rounds_probabilities(target);
    check.threads = allowed_cpus();
    const reference::CheckResult result = check_against_oracle(check);
    test.passed = result.passed;
    test.verdict = result.verdict;
  } catch (const std::exception& error) {
    test.verdict = error.what();
  }
  return test;
}

void run_self_tests(Diagnosis& diagnosis) {
  const auto begin = std::chrono::steady_clock::now();
  for (const Target& target : diagnosis.targets) {
    for (const DType dtype : kDTypes) {
      // A target without a kernel for the dtype hands over to a lower one, which has its own turn.
      if (!target.available || chosen_target(dtype, target.name) != target.name) continue;
      diagnosis.tests.push_back(self_test(target.name, dtype, 1));
    }
  }
  for (const auto& [dtype, target] : diagnosis.chosen) {
    diagnosis.tests.push_back(self_test(target, dtype_from_name(dtype), 3));
  }
  diagnosis.seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  for (const SelfTest& test : diagnosis.tests) {
    if (test.passed) continue;
    diagnosis.problems.push_back(fmt::format("self-test {} {} with {} worker{}: {}", test.target,
                                             short_name(name(test.dtype)), test.workers,
                                             test.workers == 1 ? "" : "s", test.verdict));
  }
}

Diagnosis diagnose() {
  Diagnosis diagnosis;
  diagnosis.targets = targets();
  diagnosis.limits = read_limits();
  try {
    for (const DType dtype : kDTypes)
      diagnosis.chosen.emplace_back(short_name(name(dtype)), chosen_target(dtype));
    static_cast<void>(workers_from_environment());
    static_cast<void>(timeout_from_environment());
  } catch (const Error& error) {
    diagnosis.problems.emplace_back(
        fmt::format("{}: {}; fix: {}", error_name(error.code()), error.what(), error.fix()));
  }
  try {
    refuse_launchers();
  } catch (const Error& error) {
    diagnosis.problems.emplace_back(fmt::format("{}; fix: {}", error.what(), error.fix()));
  }
  run_self_tests(diagnosis);
  return diagnosis;
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

std::vector<std::pair<std::string, std::string>> library_versions() {
  return {{"CLI11", CLI11_VERSION},
          {"fmt", fmt::format("{}.{}.{}", FMT_VERSION / 10000, FMT_VERSION / 100 % 100,
                              FMT_VERSION % 100)},
          {"nlohmann_json", fmt::format("{}.{}.{}", NLOHMANN_JSON_VERSION_MAJOR,
                                        NLOHMANN_JSON_VERSION_MINOR, NLOHMANN_JSON_VERSION_PATCH)}};
}

template <class T>
Json or_null(const std::optional<T>& value) {
  return value ? Json(*value) : Json(nullptr);
}

Json diagnosis_json(const Diagnosis& diagnosis) {
  Json known = Json::array(), chosen = Json::object(), tests = Json::array(),
       libraries = Json::object();
  for (const Target& target : diagnosis.targets) {
    known.push_back(
        {{"name", target.name}, {"available", target.available}, {"reason", target.reason}});
  }
  for (const auto& [dtype, target] : diagnosis.chosen) chosen[dtype] = target;
  for (const auto& [library, version] : library_versions()) libraries[library] = version;
  for (const SelfTest& test : diagnosis.tests) {
    tests.push_back({{"target", test.target},
                     {"dtype", short_name(name(test.dtype))},
                     {"workers", test.workers},
                     {"passed", test.passed},
                     {"verdict", test.verdict}});
  }
  const Limits& limits = diagnosis.limits;
  return {{"version", kVersion},
          {"compiler", compiler()},
          {"libraries", libraries},
          {"cpu", cpu_name()},
          {"allowed_cpus", allowed_cpus()},
          {"cgroup_cpus", or_null(limits.cgroup_cpus)},
          {"memory_total_bytes", limits.memory_total},
          {"memory_available_bytes", limits.memory_available},
          {"cgroup_memory_bytes", or_null(limits.cgroup_memory)},
          {"targets", known},
          {"chosen", chosen},
          {"transports", {{"inproc", true}, {"mpi", Json::array()}}},
          {"self_test", tests},
          {"self_test_seconds", diagnosis.seconds},
          {"problems", diagnosis.problems},
          {"passed", diagnosis.problems.empty()}};
}

void print_diagnosis(const Diagnosis& diagnosis) {
  const Limits& limits = diagnosis.limits;
  const auto line = [](const char* label, const std::string& text) {
    fmt::print("{:<11}{}\n", label, text);
  };
  std::string libraries, chosen;
  for (const auto& [library, version] : library_versions())
    libraries += fmt::format(", {} {}", library, version);
  for (const auto& [dtype, target] : diagnosis.chosen) {
    chosen += fmt::format("{}{}: {}", chosen.empty() ? "" : ", ", dtype, target);
  }
  line("annulus", fmt::format("{} ({}{})", kVersion, compiler(), libraries));
  line("CPU",
       fmt::format(
           "{}, {} allowed CPUs{}", cpu_name(), allowed_cpus(),
           limits.cgroup_cpus ? fmt::format(" (cgroup quota {:.3g})", *limits.cgroup_cpus) : ""));
  line("memory",
       fmt::format(
           "{} available of {}, cgroup limit {}",
           byte_text(static_cast<double>(limits.memory_available)),
           byte_text(static_cast<double>(limits.memory_total)),
           limits.cgroup_memory ? byte_text(static_cast<double>(*limits.cgroup_memory)) : "none"));
  line("transports", "threads of one process; MPI: none in this build");
  line("chosen", chosen.empty() ? "-" : chosen);
  for (const Target& target : diagnosis.targets) {
    line("", fmt::format("{:<12} {:<4} {}", target.name, target.available ? "yes" : "no",
                         target.reason));
  }
  std::int64_t passed = 0;
  for (const SelfTest& test : diagnosis.tests) passed += test.passed ? 1 : 0;
  line("self-test", fmt::format("{} of {} passed against the oracle, {}", passed,
                                diagnosis.tests.size(), time_text(diagnosis.seconds)));
  for (const std::string& problem : diagnosis.problems) line("PROBLEM", printable(problem));
  line("verdict", diagnosis.problems.empty() ? "ready" : "NOT READY");
}

}  // namespace

int doctor_main(int argc, char** argv) {
  bool json = false;
  CLI::App app("Says what this machine and this build can do, and tests it.", "annulus doctor");
  app.footer(kExamples);
  add_json_option(app, json);
  if (!parse(app, argc, argv)) return kOk;
  const Diagnosis diagnosis = diagnose();
  if (json) {
    fmt::print("{}\n", to_text(diagnosis_json(diagnosis)));
  } else {
    print_diagnosis(diagnosis);
  }
  return diagnosis.problems.empty() ? kOk : kCheckFailed;
}

}  // namespace annulus::tools
