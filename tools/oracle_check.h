// Comparing results with the oracle, on several threads.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "annulus/attention.h"
#include "annulus/bars.h"
#include "annulus/tensor.h"
#include "json.h"

namespace annulus::tools {

struct OracleCheck {
  TensorView q, k, v, out, lse;  // lse may be empty
  AttentionOptions options;
  bool bf16_probabilities = false;
  std::int64_t rows_per_head = 0;  // 0: all
  int threads = 1;
};

std::int64_t rows_to_check(const OracleCheck& check);
// `progress` is told how many rows are done. Throws Interrupted when the program is asked to stop.
reference::CheckResult check_against_oracle(const OracleCheck& check,
                                            const std::function<void(std::int64_t)>& progress = {});

// The object of the contract.
Json check_json(const reference::CheckResult& result);
// "passed: 64 rows, max error 1.2e-03 (rounding alone 1.1e-03), ..."
std::string check_text(const reference::CheckResult& result);
// Rows for the report's table.
std::vector<std::pair<std::string, std::string>> check_facts(const reference::CheckResult& result);

}  // namespace annulus::tools
