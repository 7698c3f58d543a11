#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <functional>
#include <vector>

#include "io/report_parts.h"
#include "io/svg.h"
#include "io/units.h"

namespace annulus {
namespace {

constexpr int kMaxOpenRows = 16;  // more workers are summed up and listed on demand

std::int64_t at_or_zero(const std::vector<std::int64_t>& values, int rank) {
  const auto index = static_cast<std::size_t>(rank);
  return index < values.size() ? values[index] : 0;
}

double seconds(std::int64_t ns) { return static_cast<double>(ns) * 1e-9; }

// One worker's line of the table, in base units.
struct WorkerRow {
  std::int64_t q_rows = 0;
  std::int64_t kv_rows = 0;
  std::int64_t pairs = 0;
  std::int64_t bytes = 0;
  std::int64_t skipped = 0;
  std::int64_t compute_ns = 0;
  std::int64_t wait_ns = 0;
};

constexpr std::array kColumns{&WorkerRow::q_rows, &WorkerRow::kv_rows, &WorkerRow::pairs,
                              &WorkerRow::bytes,  &WorkerRow::skipped, &WorkerRow::compute_ns,
                              &WorkerRow::wait_ns};

// Of the run where it was recorded, else of the plan.
std::vector<WorkerRow> worker_rows(const PageData& data) {
  std::vector<WorkerRow> rows(static_cast<std::size_t>(data.workers));
  if (data.blocks_total > 0) {
    for (WorkerRow& row : rows) row.skipped = data.workers;
  }
  for (const PlannedStep& step : data.plan.steps) {
    if (step.rank < 0 || step.rank >= data.workers || step.pairs <= 0) continue;
    WorkerRow& row = rows[static_cast<std::size_t>(step.rank)];
    row.pairs += step.pairs;
    --row.skipped;
  }
  for (int rank = 0; rank < data.workers; ++rank) {
    WorkerRow& row = rows[static_cast<std::size_t>(rank)];
    row.q_rows = at_or_zero(data.plan.q_rows, rank);
    row.kv_rows = at_or_zero(data.plan.kv_rows, rank);
    row.bytes = at_or_zero(data.plan.bytes_sent_per_rank, rank);
    const auto found = data.activity.find(rank);
    if (found == data.activity.end()) continue;
    const Activity& activity = found->second;
    if (activity.pairs > 0) row.pairs = activity.pairs;
    if (activity.bytes_sent > 0) row.bytes = activity.bytes_sent;
    if (data.blocks_total == 0) row.skipped = activity.count_of(EventKind::kSkip);
    row.compute_ns = activity.ns_of(EventKind::kCompute);
    row.wait_ns = activity.ns_of(EventKind::kWait);
  }
  return rows;
}

std::string unit_head(std::string_view words, const Unit& unit) {
  return unit.name.empty() ? std::string(words) : fmt::format("{}, {}", words, unit.name);
}

double largest(const std::vector<WorkerRow>& rows, std::int64_t WorkerRow::*value) {
  std::int64_t most = 0;
  for (const WorkerRow& row : rows) most = std::max(most, row.*value);
  return static_cast<double>(most);
}

WorkerRow total(const std::vector<WorkerRow>& rows) {
  WorkerRow sum;
  for (const WorkerRow& row : rows) {
    for (const auto value : kColumns) sum.*value += row.*value;
  }
  return sum;
}

// Column by column the least or the greatest value.
template <class Before>
WorkerRow extreme(const std::vector<WorkerRow>& rows, Before before) {
  WorkerRow found = rows.front();
  for (const WorkerRow& row : rows) {
    for (const auto value : kColumns) {
      if (before(row.*value, found.*value)) found.*value = row.*value;
    }
  }
  return found;
}

double ratio(std::int64_t part, std::int64_t whole) {
  return whole > 0 ? static_cast<double>(part) / static_cast<double>(whole) : 0;
}

// The one number that says whether the deal was fair.
std::string balance(const std::vector<WorkerRow>& rows) {
  const WorkerRow sum = total(rows);
  if (rows.size() < 2 || sum.pairs == 0) return {};
  const double mean = static_cast<double>(sum.pairs) / static_cast<double>(rows.size());
  return fmt::format("The busiest worker has {:.2f} times the mean work.",
                     largest(rows, &WorkerRow::pairs) / mean);
}

class WorkerTable {
 public:
  explicit WorkerTable(const PageData& data)
      : rows_(worker_rows(data)),
        sum_(total(rows_)),
        pairs_(count_unit(largest(rows_, &WorkerRow::pairs))),
        bytes_(byte_unit(largest(rows_, &WorkerRow::bytes))),
        time_(time_unit(seconds(static_cast<std::int64_t>(std::max(
            largest(rows_, &WorkerRow::compute_ns), largest(rows_, &WorkerRow::wait_ns)))))),
        timed_(!data.activity.empty()) {}

  [[nodiscard]] std::string draw() const {
    const int listed = std::min(static_cast<int>(rows_.size()), kMaxDrawnWorkers);
    Table all = table();
    for (int rank = 0; rank < listed; ++rank) {
      const WorkerRow& row = rows_[static_cast<std::size_t>(rank)];
      all.rows.push_back(cells(std::to_string(rank), row, share_bar(row)));
    }
    if (rows_.size() > 1) all.foot = cells("all", sum_, kNoBar);
    if (listed <= kMaxOpenRows) return markup(all);
    Table extremes = table();
    const WorkerRow least = extreme(rows_, std::less<>());
    const WorkerRow most = extreme(rows_, std::greater<>());
    extremes.rows = {cells("least", least, share_bar(least)), cells("most", most, share_bar(most))};
    extremes.foot = all.foot;
    all.caption.clear();
    if (listed < std::ssize(rows_)) {
      all.caption = fmt::format("The first {} workers; the last line counts all.", listed);
    }
    return markup(extremes) + details("Every worker", markup(all));
  }

 private:
  static constexpr std::string_view kNoBar =
      "<span class=\"bar\" style=\"background:none\"></span>";

  [[nodiscard]] Table table() const {
    Table table{.caption = balance(rows_)};
    table.head = {"worker", "query rows", "key rows", unit_head("visible pairs", pairs_),
                  "share of work, %"};
    if (timed_) {
      table.head.insert(table.head.end(), {unit_head("compute", time_), unit_head("wait", time_)});
    }
    table.head.insert(table.head.end(), {unit_head("sent", bytes_), "blocks skipped"});
    return table;
  }

  // As wide as the busiest worker's, so that small differences show.
  [[nodiscard]] std::string share_bar(const WorkerRow& row) const {
    const double most = std::max(1.0, largest(rows_, &WorkerRow::pairs));
    return fmt::format("<span class=\"bar\"><i style=\"width:{}%\"></i></span>",
                       px(100 * static_cast<double>(row.pairs) / most));
  }

  [[nodiscard]] std::vector<std::string> cells(const std::string& name, const WorkerRow& row,
                                               std::string_view bar) const {
    const double share = 100 * ratio(row.pairs, sum_.pairs);
    std::vector<std::string> cells{name, grouped(row.q_rows), grouped(row.kv_rows),
                                   number(static_cast<double>(row.pairs), pairs_),
                                   number(share, {.decimals = 1}).append(bar)};
    if (timed_) {
      cells.push_back(number(seconds(row.compute_ns), time_));
      cells.push_back(number(seconds(row.wait_ns), time_));
    }
    cells.push_back(number(static_cast<double>(row.bytes), bytes_));
    cells.push_back(grouped(row.skipped));
    return cells;
  }

  std::vector<WorkerRow> rows_;
  WorkerRow sum_;
  Unit pairs_;
  Unit bytes_;
  Unit time_;
  bool timed_ = false;
};

// The page in a sentence or three.
std::string lead(const PageData& data) {
  const WorkerRow sum = total(worker_rows(data));
  const std::int64_t pairs = data.plan.pairs_visible > 0 ? data.plan.pairs_visible : sum.pairs;
  std::string text =
      fmt::format("{} {} {} visible {}", counted(data.workers, "worker"),
                  data.computed ? "computed" : "would compute",
                  count_text(static_cast<double>(pairs)), pairs == 1 ? "pair" : "pairs");
  if (data.plan.pairs_total > 0) {
    text += fmt::format(", {} of all", percent(ratio(pairs, data.plan.pairs_total)));
  }
  if (data.seconds > 0) text += ", in " + time_text(data.seconds);
  text += ".";
  if (!data.activity.empty() && data.seconds > 0) {
    const double all = data.seconds * static_cast<double>(data.activity.size());
    const std::string busy = percent(seconds(sum.compute_ns) / all);
    const std::string idle = percent(seconds(sum.wait_ns) / all);
    text += data.workers == 1 ? fmt::format(" It computed {} of the time.", busy)
                              : fmt::format(
                                    " On average a worker computed {} of the time and "
                                    "waited {}.",
                                    busy, idle);
  }
  if (data.blocks_total <= 1) return text;
  const std::int64_t skipped = data.blocks_total - data.blocks_used;
  if (skipped <= 0) return text + " Every worker needs the keys of every other.";
  return text + fmt::format(" {} of {} blocks of keys hold nothing visible and are skipped.",
                            grouped(skipped), grouped(data.blocks_total));
}

std::string badge(const PageData& data) {
  if (!data.computed) return element("span", "badge unchecked", "PLAN, NOT RUN");
  if (data.input.check.empty()) return element("span", "badge unchecked", "NOT CHECKED");
  return data.input.check_passed ? element("span", "badge passed", "CHECK PASSED")
                                 : element("span", "badge failed", "CHECK FAILED");
}

std::string description(std::string_view term, const std::string& value) {
  return value.empty() ? std::string() : element("dt", {}, term) + element("dd", {}, value) + "\n";
}

std::string positive(std::int64_t value, std::string_view words) {
  return value > 0 ? fmt::format("{} {}", grouped(value), words) : std::string();
}

std::string joined(const std::vector<std::string>& parts) {
  std::string text;
  for (const std::string& part : parts) {
    if (part.empty()) continue;
    text += (text.empty() ? "" : ", ") + part;
  }
  return text;
}

std::string cost(const PageData& data) {
  if (!(data.plan.flops > 0)) return {};
  std::string text = fmt::format("{}FLOP", count_text(data.plan.flops));
  if (data.seconds > 0) {
    text += fmt::format(", {}FLOP/s", count_text(data.plan.flops / data.seconds));
  }
  return text;
}

}  // namespace

std::string header_section(const PageData& data) {
  std::string text = "<header>\n";
  text += element("h1", {}, data.input.title.empty() ? "Annulus report" : data.input.title) + "\n";
  text += element("p", "lead", lead(data)) + "\n";
  text += "<p>" + badge(data) + "</p>\n";
  if (!data.input.facts.empty()) {
    text += "<dl class=\"facts\">\n";
    for (const auto& [term, value] : data.input.facts) {
      text += "<div>" + element("dt", {}, term) + element("dd", {}, value) + "</div>\n";
    }
    text += "</dl>\n";
  }
  return text + "</header>\n";
}

std::string worker_section(const PageData& data) {
  return "<section>\n<h2>Workers</h2>\n" + WorkerTable(data).draw() + "</section>\n";
}

std::string check_section(const PageData& data) {
  std::string text = "<section>\n<h2>Check</h2>\n<p>" + badge(data) + "</p>\n";
  if (data.input.check.empty()) {
    const char* reason = data.computed ? "The result was not compared with the reference."
                                       : "There is no result to check.";
    return text + element("p", {}, reason) + "\n</section>\n";
  }
  Table table{.caption = "The result against the reference in double precision",
              .css_class = "words"};
  table.head = {"measure", "value"};
  for (const auto& [measure, value] : data.input.check) {
    table.rows.push_back({escape(measure), escape(value)});
  }
  return text + markup(table) + "</section>\n";
}

std::string plan_section(const PageData& data) {
  const Plan& plan = data.plan;
  std::string text = "<section>\n<h2>Plan</h2>\n<dl class=\"plan\">\n";
  text += description("target", plan.target);
  text += description("arithmetic", plan.arithmetic);
  text += description("mask", plan.mask);
  text += description("partition", plan.partition);
  text += description("workers", fmt::format("{}, {} each", grouped(data.workers),
                                             counted(plan.threads_per_worker, "thread")));
  text += description("cost", cost(data));
  text += description("tiles", joined({positive(plan.strip_rows, "query rows to a strip"),
                                       positive(plan.tile_keys, "keys to a tile"),
                                       positive(plan.panel_keys, "keys to a panel"),
                                       positive(plan.item_rows, "rows to a work item")}));
  if (plan.peak_bytes > 0) {
    text += description("memory at peak", byte_text(static_cast<double>(plan.peak_bytes)) +
                                              " beside the caller's tensors");
  }
  text += "</dl>\n";
  if (!plan.notes.empty()) {
    text += "<ul class=\"notes\">\n";
    for (const std::string& note : plan.notes) text += element("li", {}, note) + "\n";
    text += "</ul>\n";
  }
  return text + "</section>\n";
}

}  // namespace annulus
