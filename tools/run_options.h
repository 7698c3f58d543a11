// The options that `run` and `explain` share: all of them.
#pragma once

#include <string>

#include "options.h"

namespace annulus::tools {

// False if help was asked for and printed.
bool parse_run_options(Options& options, const std::string& program, const std::string& summary,
                       const std::string& examples, int argc, char** argv);

bool wants_check(const Options& options);
std::int64_t rows_of_check(const Options& options);  // 0: all
int check_threads(const Options& options);           // 0 without a check

}  // namespace annulus::tools
