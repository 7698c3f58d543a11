// Comparing results with the oracle, on several threads.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "annulus/attention.h"
#include "annulus/bars.h"
#include "annulus/gradient_bars.h"
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

// out of every row of check by the oracle, rounded to float32; needs no out and lse.
void compute_with_oracle(const OracleCheck& check, const MutableTensorView& out);

// out and lse, and gradients where there are some.
struct CheckOutcome {
  reference::CheckResult forward;
  std::optional<reference::GradientCheck> backward;
  [[nodiscard]] bool passed() const { return forward.passed && (!backward || backward->passed); }
  [[nodiscard]] std::string verdict() const;  // "passed", or every bar that was missed
};

// The object of the contract.
Json check_json(const CheckOutcome& outcome);
// "passed: 64 rows, error max 1.2e-03 ...", and a line for each gradient, indented like this.
std::string check_text(const CheckOutcome& outcome, int indent);
// Rows for the report's table.
std::vector<std::pair<std::string, std::string>> check_facts(const CheckOutcome& outcome);

}  // namespace annulus::tools
