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

template <class Value>
Value at_or_zero(const std::vector<Value>& values, int rank) {
  return static_cast<std::size_t>(rank) < values.size() ? values[static_cast<std::size_t>(rank)] : Value{};
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

constexpr std::array kColumns{&WorkerRow::q_rows,  &WorkerRow::kv_rows,    &WorkerRow::pairs,  &WorkerRow::bytes,
                              &WorkerRow::skipped, &WorkerRow::compute_ns, &WorkerRow::wait_ns};

// Of the run where it was recorded, else of the plan.
std::vector<WorkerRow> worker_rows(const PageData& data) {
  std::vector<WorkerRow> rows(static_cast<std::size_t>(data.workers));
  for (const PlannedStep& step : data.plan.steps) {
    if (step.rank < 0 || step.rank >= data.workers) continue;
    WorkerRow& row = rows[static_cast<std::size_t>(step.rank)];
    row.pairs += step.pairs;
    if (step.owner >= 0 && step.pairs > 0) ++row.skipped;  // used, for now
  }
  for (int rank = 0; rank < data.workers; ++rank) {
    WorkerRow& row = rows[static_cast<std::size_t>(rank)];
    row.q_rows = at_or_zero(data.plan.q_rows, rank);
    row.kv_rows = at_or_zero(data.plan.kv_rows, rank);
    row.bytes = at_or_zero(data.plan.bytes_sent_per_rank, rank);
    row.skipped = data.blocks_total > 0 ? data.workers - row.skipped : 0;
    const auto activity = data.activity.find(rank);
    if (activity == data.activity.end()) continue;
    if (activity->second.pairs > 0) row.pairs = activity->second.pairs;
    if (activity->second.bytes_sent > 0) row.bytes = activity->second.bytes_sent;
    if (data.blocks_total == 0) row.skipped = activity->second.count_of(EventKind::kSkip);
    row.compute_ns = activity->second.ns_of(EventKind::kCompute);
    row.wait_ns = activity->second.ns_of(EventKind::kWait);
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

// "...; the busiest has 1.02 times the mean": the one number that says whether the deal was fair.
std::string balance(const std::vector<WorkerRow>& rows) {
  const WorkerRow sum = total(rows);
  if (rows.size() < 2 || sum.pairs == 0) return {};
  const double mean = static_cast<double>(sum.pairs) / static_cast<double>(rows.size());
  return fmt::format("The busiest worker has {:.2f} times the mean work.", largest(rows, &WorkerRow::pairs) / mean);
}

class WorkerTable {
 public:
  explicit WorkerTable(const PageData& data)
      : rows_(worker_rows(data)),
        sum_(total(rows_)),
        pairs_(count_unit(largest(rows_, &WorkerRow::pairs))),
        bytes_(byte_unit(largest(rows_, &WorkerRow::bytes))),
        time_(time_unit(seconds(static_cast<std::int64_t>(
            std::max(largest(rows_, &WorkerRow::compute_ns), largest(rows_, &WorkerRow::wait_ns)))))),
        timed_(!data.activity.empty()) {}

  std::string draw() {
    Table all = table();
    const int listed = std::min(static_cast<int>(rows_.size()), kMaxDrawnWorkers);
    for (int rank = 0; rank < listed; ++rank) {
      all.rows.push_back(cells(std::to_string(rank), rows_[static_cast<std::size_t>(rank)]));
    }
    if (rows_.size() > 1) all.foot = cells("all", sum_);
    if (listed <= kMaxOpenRows) return markup(all);
    Table extremes = table();
    extremes.rows = {cells("least", extreme(rows_, std::less<>())), cells("most", extreme(rows_, std::greater<>()))};
    extremes.foot = all.foot;
    const bool cut = listed < std::ssize(rows_);
    all.caption = cut ? fmt::format("The first {}; the last line counts all.", counted(listed, "worker")) : "";
    return markup(extremes) + details("Every worker", markup(all));
  }

 private:
  [[nodiscard]] Table table() const {
    Table table;
    table.caption = balance(rows_);
    table.head = {"worker", "query rows", "key rows", unit_head("visible pairs", pairs_), "share of work, %"};
    if (timed_) table.head.insert(table.head.end(), {unit_head("compute", time_), unit_head("wait", time_)});
    table.head.insert(table.head.end(), {unit_head("sent", bytes_), "blocks skipped"});
    return table;
  }

  [[nodiscard]] std::vector<std::string> cells(const std::string& worker, const WorkerRow& row) const {
    const double share = ratio(row.pairs, sum_.pairs);
    // Full width is the busiest worker, as differences between near-equal shares must show.
    const double width = &row == &sum_ ? 0 : 100.0 * static_cast<double>(row.pairs) / std::max(1.0, largest(rows_, &WorkerRow::pairs));
    std::string bar = number(100 * share, {.size = 1, .name = {}, .decimals = 1});
    bar += &row == &sum_ ? "<span class=\"bar\" style=\"background:none\"></span>"
                         : fmt::format("<span class=\"bar\"><i style=\"width:{}%\"></i></span>", px(width));
    std::vector<std::string> cells{worker, grouped(row.q_rows), grouped(row.kv_rows),
                                   number(static_cast<double>(row.pairs), pairs_), bar};
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

std::string lead(const PageData& data) {
  const WorkerRow sum = total(worker_rows(data));
  const std::int64_t pairs = data.plan.pairs_visible > 0 ? data.plan.pairs_visible : sum.pairs;
  std::string text = fmt::format("{} {} {} visible {}", counted(data.workers, "worker"), data.computed ? "computed" : "would compute",
                                 count_text(static_cast<double>(pairs)), pairs == 1 ? "pair" : "pairs");
  if (data.plan.pairs_total > 0) text += fmt::format(", {} of all", percent(ratio(pairs, data.plan.pairs_total)));
  if (data.seconds > 0) text += ", in " + time_text(data.seconds);
  text += ".";
  if (!data.activity.empty() && data.seconds > 0) {
    const double all = data.seconds * static_cast<double>(data.activity.size());
    text += fmt::format(" On average a worker computed {} of the time and waited {}.", percent(seconds(sum.compute_ns) / all),
                        percent(seconds(sum.wait_ns) / all));
  }
  if (data.blocks_total > 1) {
    const std::int64_t skipped = data.blocks_total - data.blocks_used;
    text += skipped <= 0 ? std::string(" Every worker needs the keys of every other.")
                         : fmt::format(" {} of {} blocks of keys hold nothing visible and are skipped.", grouped(skipped),
                                       grouped(data.blocks_total));
  }
  return text;
}

std::string badge(const ReportInput& input) {
  if (input.check.empty()) return element("span", "badge unchecked", "NOT CHECKED");
  return input.check_passed ? element("span", "badge passed", "CHECK PASSED") : element("span", "badge failed", "CHECK FAILED");
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
  if (data.seconds > 0 && data.computed) text += fmt::format(", {}FLOP/s", count_text(data.plan.flops / data.seconds));
  return text;
}

}  // namespace

std::string header_section(const PageData& data) {
  std::string text = "<header>\n";
  text += element("h1", {}, data.input.title.empty() ? "Annulus report" : data.input.title) + "\n";
  text += element("p", "lead", lead(data)) + "\n";
  text += "<p>" + badge(data.input) + "</p>\n";
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
  std::string text = "<section>\n<h2>Check</h2>\n<p>" + badge(data.input) + "</p>\n";
  if (data.input.check.empty()) return text + "<p>The result was not compared with the reference.</p>\n</section>\n";
  Table table{.caption = "The result against the reference in double precision", .css_class = "words"};
  table.head = {"measure", "value"};
  for (const auto& [measure, value] : data.input.check) table.rows.push_back({escape(measure), escape(value)});
  return text + markup(table) + "</section>\n";
}

std::string plan_section(const PageData& data) {
  const Plan& plan = data.plan;
  std::string text = "<section>\n<h2>Plan</h2>\n<dl class=\"plan\">\n";
  text += description("target", plan.target);
  text += description("arithmetic", plan.arithmetic);
  text += description("mask", plan.mask);
  text += description("partition", plan.partition);
  text += description("workers", fmt::format("{}, {} each", grouped(data.workers), counted(plan.threads_per_worker, "thread")));
  text += description("cost", cost(data));
  text += description("tiles", joined({positive(plan.strip_rows, "query rows to a strip"), positive(plan.tile_keys, "keys to a tile"),
                                       positive(plan.panel_keys, "keys to a panel"), positive(plan.item_rows, "rows to a work item")}));
  if (plan.peak_bytes > 0) {
    text += description("memory at peak", byte_text(static_cast<double>(plan.peak_bytes)) + " beside the caller's tensors");
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
