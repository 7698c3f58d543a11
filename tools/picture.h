// What the report shows of a call beside its plan and events.
#pragma once

#include "annulus/mask.h"
#include "annulus/report.h"
#include "call.h"

namespace annulus::tools {

// Which keys the queries of one head see, by the same rules as the call, looked at pair by pair.
class SampledMask {
 public:
  explicit SampledMask(const AttentionOptions& options, std::int64_t q_len, std::int64_t kv_len);
  // Head 0 of batch row 0.
  [[nodiscard]] bool visible(std::int64_t query, std::int64_t key) const;
  // Share of visible pairs in each of rows x columns cells, row-major, from evenly spaced samples.
  [[nodiscard]] std::vector<double> density(int rows, int columns) const;

 private:
  [[nodiscard]] bool same_segment(std::int64_t query, std::int64_t key) const;

  const AttentionOptions& options_;
  std::int64_t q_len_;
  std::int64_t kv_len_;
  Mask mask_;
};

ReportInput report_input(const Options& options, const Inputs& inputs, const Call& call);

}  // namespace annulus::tools
