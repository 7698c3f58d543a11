// The sections of the HTML report. Each draws from the same data and returns finished markup.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>

#include "annulus/report.h"
#include "io/activity.h"

namespace annulus {

// Above this the pictures and tables of workers stop growing and say so.
constexpr int kMaxDrawnWorkers = 256;

struct PageData {
  explicit PageData(const ReportInput& report);

  const ReportInput& input;
  const Plan& plan;
  int workers = 1;
  std::map<int, Activity> activity;  // by rank
  std::int64_t begin_ns = 0;         // of the first event
  std::int64_t end_ns = 0;           // of the last one
  double seconds = 0;                // of the call; where not given, of its events
  bool computed = false;             // false: the page shows a plan that was not run
  std::int64_t pairs_planned = 0;    // over the steps
  std::int64_t blocks_used = 0;      // (worker, owner) with visible pairs
  std::int64_t blocks_total = 0;     // 0: the plan has no ring
};

std::string header_section(const PageData& data);
std::string mask_section(const PageData& data);
bool ring_is_narrow(const PageData& data);  // fits beside another section
std::string ring_section(const PageData& data);
std::string timeline_section(const PageData& data);
std::string worker_section(const PageData& data);
std::string check_section(const PageData& data);
std::string plan_section(const PageData& data);

std::string_view style_sheet();
std::string_view pattern_definitions();  // the textures that the style sheet fills with

// "1 worker", "4 workers".
std::string counted(std::int64_t count, std::string_view noun);
// A swatch, path data within 22 x 12, and its meaning in markup.
std::string legend_item(std::string_view css_class, std::string_view meaning,
                        std::string_view swatch = "M1 1h20v10h-20z");

}  // namespace annulus
