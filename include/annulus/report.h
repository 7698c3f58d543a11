// Pictures of a call: one self-contained HTML page, and a trace for the Perfetto viewer.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "annulus/record.h"
#include "annulus/ring.h"

namespace annulus {
inline namespace v1 {

// What the page shows beside the plan. Text is escaped by the writer.
struct ReportInput {
  std::string title;  // "attention, 4 workers"
  Plan plan;
  std::vector<Event> events;
  std::int64_t events_dropped = 0;
  double seconds = 0;  // wall time of the call
  // Numbers for the table at the top, in order: {"tokens", "65 536"}.
  std::vector<std::pair<std::string, std::string>> facts;
  std::vector<std::pair<std::string, std::string>>
      check;  // rows of the check's table; empty: not checked
  bool check_passed = false;
  // Share of visible pairs in each cell of a coarse picture of the mask, 0..1, row-major, rows are
  // queries.
  int mask_rows = 0;
  int mask_columns = 0;
  std::vector<double> mask_density;
};

std::string html_report(const ReportInput& input);
// Trace Event JSON: one process per rank, one thread per activity, arrows from each send to its
// receive.
std::string trace_json(const std::vector<Event>& events, const std::string& title);
// Writes text to path through a temporary file and a rename, mode 0600. Throws IoError.
void write_text_atomically(const std::string& path, const std::string& text);

}  // namespace v1
}  // namespace annulus
