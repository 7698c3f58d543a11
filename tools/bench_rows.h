// The rows of a benchmark: what is measured against what, and what came out.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "annulus/attention.h"
#include "annulus/ring.h"
#include "annulus/tensor.h"
#include "json.h"

namespace annulus::tools {

enum class BenchInputs : std::uint8_t {
  kNormal,  // N(0,1)
  kRising,  // every key scores higher than all before it: each one moves the maximum
};

struct BenchRow {
  bool backward = false;  // the gradients alone: out and lse are there before
  DType dtype = DType::kBFloat16;
  std::string target;
  std::string mask = "full";
  std::int64_t batch = 1;
  std::int64_t tokens = 16384;
  std::int64_t kv_tokens = 16384;
  std::int64_t heads = 1;
  std::int64_t kv_heads = 1;
  std::int64_t head_dim = 128;
  std::int64_t v_head_dim = 128;
  int workers = 1;
  int threads_per_worker = 1;
  std::string partition = "contiguous";
  Topology topology = Topology::kRing;
  BenchInputs inputs = BenchInputs::kNormal;
  std::uint64_t seed = 0;
  AttentionOptions options;   // visibility and arithmetic
  std::int64_t segments = 0;  // > 0: that many packed sequences of equal length
  bool bias = false;          // N(0,1), one for all
  bool fused = true;          // see RingOptions
  RingBackward ring_backward = RingBackward::kAuto;
  std::string variant{};  // what of the above makes this row special, in words

  // Partners: indices into the rows of the same group, measured in turn with this row.
  int full = -1;  // the same without a mask
  int one_thread = -1;
  int single_pass = -1;  // the same without a ring
  int plain = -1;        // the same, or nearly, without what makes this row special

  // CPUs that compute: workers may be more than that.
  [[nodiscard]] int threads() const;
};

// Rows that are measured in turns, so that their ratios compare within the same moments.
using BenchGroup = std::vector<BenchRow>;

struct BenchResult {
  std::string target;  // that ran: a backward may have no kernel of its row's
  double seconds = 0;
  double flops = 0;
  double peak_flops = 0;  // of all threads
  double share_of_peak = 0;
  std::optional<double> ratio_to_full;        // time over time
  std::optional<double> ratio_to_one_thread;  // speed over speed, as the next two
  std::optional<double> ratio_to_single_pass;
  std::optional<double> ratio_to_plain;
  bool check_passed = false;
  std::string verdict;
};

// Checks each row against the oracle on sampled rows, then measures all of them `repetitions` times
// in turns.
std::vector<BenchResult> measure(const BenchGroup& group, int repetitions);

struct SuiteChoice {
  std::string isa;             // as chosen_target() takes it
  bool one_path = false;       // per dtype: the chosen target; else all that the suite has
  std::optional<int> threads;  // of the rows with several threads; 2 if not given
};

// quick, kernels, ring or all. Throws Unsupported for decode.
std::vector<BenchGroup> suite(const std::string& name, const SuiteChoice& choice);

Json row_json(const BenchRow& row, const BenchResult& result);
std::vector<std::string> row_heading();
std::vector<std::string> row_cells(const BenchRow& row, const BenchResult& result);

}  // namespace annulus::tools
