// annulus: exact attention from files, without writing code.

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "annulus/version.h"
#include "failure.h"
#include "options.h"
#include "verbs.h"

namespace annulus::tools {
namespace {

struct Verb {
  const char* name;
  int (*main)(int, char**);  // null: not in this build
  const char* summary;
};

constexpr Verb kVerbs[] = {
    {"run", run_main, "compute attention for tensors of a file, or for made ones"},
    {"check", check_main, "compare the tensors of two files, or a result with the oracle"},
    {"explain", explain_main, "print the plan of a call, compute nothing"},
    {"bench", bench_main, "verify, then measure"},
    {"doctor", doctor_main, "CPU, targets, memory, versions, self-test"},
    {"prefill", nullptr, "feed tokens chunk by chunk through a paged cache (not in this build)"},
    {"launch", nullptr, "compose and run an MPI launcher's line (not in this build)"},
    {"convert", nullptr, "safetensors, npy, npz in both directions (not in this build)"},
};

std::string usage() {
  std::string text =
      "annulus: exact attention over sequences dealt to several workers\n\nusage: annulus VERB "
      "[options]\n\n";
  for (const Verb& verb : kVerbs) text += fmt::format("  {:<9}{}\n", verb.name, verb.summary);
  return text +
         "\nannulus VERB --help shows a verb's options with examples; annulus --version the "
         "version.\n"
         "\nExit status: 0 ok, 1 a check failed, 64 wrong argument, 65 bad file, 69 not in this "
         "build or on this\n"
         "machine, 70 a bug of ours, 71 out of memory, 74 file not readable or writable, 75..77 a "
         "worker was lost,\n"
         "78 bad environment variable, 130 interrupted.\n";
}

[[noreturn]] void refuse_verb(const std::string& name) {
  std::vector<std::string> names;
  for (const Verb& verb : kVerbs) names.emplace_back(verb.name);
  const std::string close = nearest(name, names);
  fail(close.empty() ? "annulus --help lists the verbs" : "did you mean annulus " + close + "?",
       "unknown verb '{}'; known are {}", name, fmt::join(names, ", "));
}

int dispatch(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  if (name.empty()) fail("annulus --help lists the verbs", "a verb is missing");
  if (name == "--help" || name == "-h" || name == "help") {
    fmt::print("{}", usage());
    return kOk;
  }
  if (name == "--version") {
    fmt::print("annulus {}\n", kVersion);
    return kOk;
  }
  for (const Verb& verb : kVerbs) {
    if (name != verb.name) continue;
    if (verb.main != nullptr) return verb.main(argc - 1, argv + 1);
    fail<Unsupported>("annulus --help lists the verbs of this build",
                      "annulus {} is not in this build yet", name);
  }
  refuse_verb(name);
}

bool asked_for_json(int argc, char** argv) {
  return std::any_of(argv, argv + argc, [](const char* argument) {
    return std::strcmp(argument, "--json") == 0 || std::strcmp(argument, "--json=true") == 0;
  });
}

// A result that did not reach its reader is no success.
int flushed(int status) {
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
    return report_failure(
        IoError(fmt::format("standard output: cannot write: {}", std::strerror(errno))), false);
  }
  return status;
}

}  // namespace
}  // namespace annulus::tools

int main(int argc, char** argv) {
  try {
    return annulus::tools::flushed(annulus::tools::dispatch(argc, argv));
  } catch (const std::exception& error) {
    return annulus::tools::report_failure(error, annulus::tools::asked_for_json(argc, argv));
  }
}
