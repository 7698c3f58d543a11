#include "annulus/report.h"

#include <fmt/format.h>

#include <algorithm>

#include "annulus/version.h"
#include "io/report_parts.h"
#include "io/svg.h"
#include "io/units.h"

namespace annulus {
namespace {

int worker_count(const Plan& plan) {
  const std::size_t dealt = std::max(plan.q_rows.size(), plan.kv_rows.size());
  return std::max({1, plan.workers, static_cast<int>(dealt)});
}

// Side by side where the window is wide enough.
std::string pair(const std::string& left, const std::string& right) {
  return "<div class=\"pair\">\n" + left + right + "</div>\n";
}

}  // namespace

PageData::PageData(const ReportInput& report)
    : input(report),
      plan(report.plan),
      workers(worker_count(report.plan)),
      activity(activity_by_rank(report.events)),
      seconds(report.seconds) {
  for (const PlannedStep& step : plan.steps) {
    pairs_planned += step.pairs;
    if (step.owner >= 0 && step.pairs > 0) ++blocks_used;
  }
  if (!plan.steps.empty()) blocks_total = std::int64_t{workers} * workers;
  computed = !report.events.empty() || report.seconds > 0;
  if (report.events.empty()) return;
  begin_ns = report.events.front().begin_ns;
  end_ns = report.events.front().end_ns;
  for (const Event& event : report.events) {
    begin_ns = std::min(begin_ns, event.begin_ns);
    end_ns = std::max({end_ns, event.begin_ns, event.end_ns});
  }
  if (!(seconds > 0)) seconds = static_cast<double>(end_ns - begin_ns) * 1e-9;
}

std::string counted(std::int64_t count, std::string_view noun) {
  return fmt::format("{} {}{}", grouped(count), noun, count == 1 ? "" : "s");
}

std::string legend_item(std::string_view css_class, std::string_view meaning,
                        std::string_view swatch) {
  Svg svg(22, 12, {});
  svg.path(css_class, swatch);
  return fmt::format("<li>{} {}</li>", svg.finish(), meaning);
}

inline namespace v1 {

std::string html_report(const ReportInput& input) {
  const PageData data(input);
  const std::string title = input.title.empty() ? "Annulus report" : input.title;
  std::string page = fmt::format(
      "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
      "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src "
      "'unsafe-inline'\">\n"
      "{}\n<style>{}</style>\n</head>\n<body>\n{}<main>\n",
      element("title", {}, title), style_sheet(), pattern_definitions());
  page += header_section(data);
  const std::string plan = plan_section(data);
  const bool narrow = ring_is_narrow(data);
  page += pair(mask_section(data), narrow ? ring_section(data) : plan);
  if (!narrow) page += ring_section(data);
  page += timeline_section(data) + worker_section(data);
  page += narrow ? pair(check_section(data), plan) : check_section(data);
  page += fmt::format("</main>\n<footer>Annulus {}</footer>\n</body>\n</html>\n", kVersion);
  return page;
}

}  // namespace v1
}  // namespace annulus
