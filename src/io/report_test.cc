#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <regex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "annulus/report.h"
#include "io/report_parts.h"
#include "io/svg.h"
#include "io/units.h"

namespace annulus {
namespace {

constexpr std::size_t kPageLimit = 2'000'000;
constexpr std::array<std::string_view, 7> kKindWords{"plan",    "pack", "send",  "wait",
                                                     "compute", "skip", "finish"};

Event event(EventKind kind, int rank, int step, int peer, std::int64_t begin_ns, std::int64_t ns) {
  return {kind,     rank,          step,    peer,
          begin_ns, begin_ns + ns, 1 << 20, kind == EventKind::kCompute ? 1000 : 0};
}

// A full ring; every third block holds nothing visible.
ReportInput ring(int workers) {
  ReportInput input;
  input.title = "a ring";
  input.plan.workers = workers;
  input.plan.partition = "zigzag";
  input.plan.mask = "causal";
  input.seconds = 0.002;
  for (int rank = 0; rank < workers; ++rank) {
    input.plan.q_rows.push_back(1024);
    input.plan.kv_rows.push_back(1024);
    std::int64_t now = 5'000'000 + rank * 100;
    input.events.push_back(event(EventKind::kPlan, rank, -1, -1, now, 900));
    input.events.push_back(event(EventKind::kPack, rank, -1, -1, now += 1000, 9000));
    now += 10000;
    for (int step = 0; step < workers; ++step) {
      const int owner = (rank - step + workers) % workers;
      const bool works = (rank + owner) % 3 != 2;
      const bool sends = step + 1 < workers;
      const int next = (rank + 1) % workers;
      input.plan.steps.push_back(
          {rank, step, owner, works ? 1000 : 0, sends ? next : -1, sends ? 1 << 20 : 0});
      if (step > 0)
        input.events.push_back(
            event(EventKind::kWait, rank, step, (rank + workers - 1) % workers, now, 3000));
      now += 4000;
      if (sends) input.events.push_back(event(EventKind::kSend, rank, step, next, now, 5000));
      input.events.push_back(event(works ? EventKind::kCompute : EventKind::kSkip, rank, step,
                                   owner, now, works ? 20000 : 0));
      now += 20000;
    }
    input.events.push_back(event(EventKind::kFinish, rank, -1, -1, now, 2000));
  }
  input.mask_rows = input.mask_columns = 32;
  for (int row = 0; row < 32; ++row) {
    for (int column = 0; column < 32; ++column) {
      input.mask_density.push_back(column < row ? 1.0 : column == row ? 0.5 : 0.0);
    }
  }
  input.facts = {{"tokens", "4 096"}};
  input.check = {{"largest error", "1e-3"}};
  input.check_passed = true;
  return input;
}

// Blocks arrive from both sides, as on a line of workers.
ReportInput line() {
  ReportInput input = ring(3);
  input.plan.steps = {{0, 0, 0, 10, 1, 8},  {1, 0, 1, 10, 2, 8},  {1, 0, 1, 0, 0, 8},
                      {2, 0, 2, 10, 1, 8},  {0, 1, 1, 10, -1, 0}, {1, 1, 0, 10, 2, 8},
                      {1, 1, 2, 10, 0, 8},  {2, 1, 1, 10, -1, 0}, {0, 2, 2, 10, -1, 0},
                      {1, 2, -1, 0, -1, 0}, {2, 2, 0, 10, -1, 0}};
  return input;
}

ReportInput plan_only() {
  ReportInput input = ring(4);
  input.events.clear();
  input.seconds = 0;
  input.check.clear();
  return input;
}

std::vector<std::pair<std::string, ReportInput>> all_inputs() {
  return {{"empty", {}},
          {"one worker", ring(1)},
          {"four workers", ring(4)},
          {"twelve workers", ring(12)},
          {"thirty", ring(30)},
          {"64 workers", ring(64)},
          {"100 workers", ring(100)},
          {"line", line()},
          {"plan", plan_only()}};
}

std::size_t count(std::string_view text, std::string_view part) {
  std::size_t found = 0;
  for (std::size_t at = text.find(part); at != std::string_view::npos; at = text.find(part, at + 1))
    ++found;
  return found;
}

bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

// Empty if every tag is closed in order, every attribute is quoted and no stray bracket is left,
// else what is wrong.
std::string tag_error(std::string_view page) {
  std::vector<std::string> open;
  std::size_t at = page.find("<html");
  while ((at = page.find('<', at)) != std::string_view::npos) {
    const bool closing = page[at + 1] == '/';
    const std::size_t begin = at + (closing ? 2 : 1);
    const std::size_t end_of_name = page.find_first_of(" />\n", begin);
    const std::string name(page.substr(begin, end_of_name - begin));
    bool quoted = false;
    std::size_t end = end_of_name;
    for (; end < page.size() && (quoted || page[end] != '>'); ++end) {
      if (page[end] == '"') quoted = !quoted;
      if (page[end] == '<') return "bracket inside <" + name + ">";
      if (!quoted && page[end] == '=' && page[end + 1] != '"')
        return "unquoted attribute of " + name;
    }
    if (end == page.size()) return "<" + name + "> has no end";
    if (closing) {
      if (open.empty() || open.back() != name)
        return "</" + name + "> closes " + (open.empty() ? "nothing" : open.back());
      open.pop_back();
    } else if (page[end - 1] != '/' && name != "meta") {
      open.push_back(name);
    }
    at = end;
    if (name == "style" && !closing) at = page.find("</style", end);
    const std::size_t next = page.find('<', at);
    if (name != "style" && contains(page.substr(at + 1, next - at - 1), ">"))
      return "stray > after " + name;
  }
  return open.empty() ? "" : "<" + open.back() + "> is never closed";
}

TEST(HtmlReport, IsWellFormed) {
  for (const auto& [name, input] : all_inputs())
    EXPECT_EQ(tag_error(html_report(input)), "") << name;
}

TEST(HtmlReport, CheckerFindsWhatIsBroken) {
  EXPECT_NE(tag_error("<html><p></html>"), "");
  EXPECT_NE(tag_error("<html><p class=a></p></html>"), "");
  EXPECT_NE(tag_error("<html>a > b</html>"), "");
  EXPECT_NE(tag_error("<html><p title=\"<b>\"></p></html>"), "");
}

TEST(HtmlReport, NeedsNothingFromOutside) {
  for (const auto& [name, input] : all_inputs()) {
    const std::string page = html_report(input);
    for (const std::string_view outside : {"<script", "http:", "https:", "//", "src=", "href",
                                           "@import", "<link", "<img", "javascript"}) {
      EXPECT_FALSE(contains(page, outside)) << name << " has " << outside;
    }
    EXPECT_EQ(count(page, "url("), count(page, "url(#")) << name;
  }
}

TEST(HtmlReport, EscapesEveryText) {
  const std::string turned{'\xe2', '\x80', '\xae'};  // reverses the direction of what follows
  const std::string hostile = "<script>\"'&\n\x1b[31m" + turned + "\xff</title></style>";
  ReportInput input = ring(2);
  input.title = hostile;
  input.facts = {{hostile, hostile}};
  input.check = {{hostile, hostile}};
  Plan& plan = input.plan;
  plan.target = plan.arithmetic = plan.mask = plan.partition = hostile;
  plan.notes = {hostile};
  const std::string page = html_report(input);
  EXPECT_EQ(tag_error(page), "");
  for (const std::string& raw : {std::string("<script"), std::string("\x1b"), turned}) {
    EXPECT_FALSE(contains(page, raw));
  }
  EXPECT_FALSE(contains(page, "\xff"));
  EXPECT_GE(count(page, "&lt;script&gt;&quot;&#39;&amp; "), 11U);
  EXPECT_EQ(count(page, "</title></style>"), 0U);
}

TEST(HtmlReport, IsDeterministic) {
  const ReportInput input = ring(8);
  EXPECT_EQ(html_report(input), html_report(input));
}

TEST(HtmlReport, StaysSmall) {
  EXPECT_LT(html_report(ring(64)).size(), kPageLimit);
  EXPECT_LT(html_report(ring(256)).size(), kPageLimit);
  ReportInput busy = ring(4);
  for (int n = 0; n < 200'000; ++n) {
    busy.events.push_back(event(n % 2 == 0 ? EventKind::kCompute : EventKind::kSend, n % 64, n, 0,
                                7'000'000 + n * 37 % 50'000'000, n % 991));
  }
  const std::string page = html_report(busy);
  EXPECT_LT(page.size(), kPageLimit);
  EXPECT_EQ(tag_error(page), "");
  EXPECT_TRUE(contains(page, "are drawn as one"));
}

TEST(HtmlReport, ShowsEveryKindOfEvent) {
  const std::string page = html_report(ring(4));
  const std::string timeline = page.substr(page.find("<h2>Timeline"));
  for (const std::string_view word : kKindWords) {
    EXPECT_TRUE(contains(timeline, ": " + std::string(word))) << word;       // a tool tip
    EXPECT_TRUE(contains(timeline, "</svg> " + std::string(word))) << word;  // the legend
  }
}

TEST(HtmlReport, HasAWordForEachFigure) {
  for (const auto& [name, input] : all_inputs()) {
    const std::string page = html_report(input);
    EXPECT_EQ(count(page, "<svg "),
              count(page, "role=\"img\" aria-label=\"") + count(page, "aria-hidden=\"true\""))
        << name;
    EXPECT_FALSE(contains(page, "aria-label=\"\"")) << name;
  }
  const std::string page = html_report(ring(4));
  EXPECT_EQ(count(page, "role=\"img\""), 3U);
  EXPECT_EQ(count(page, "<details>"), 3U);
}

// The colours of the style sheet by name; the dark ones are those of the second block.
std::map<std::string, std::string> colours(bool dark) {
  const std::string style(style_sheet());
  const std::size_t second = style.find("prefers-color-scheme:dark");
  std::map<std::string, std::string> found;
  const std::regex variable("--([a-z-]+):#([0-9a-f]{3,6});");
  for (auto match = std::sregex_iterator(style.begin(), style.end(), variable);
       match != std::sregex_iterator(); ++match) {
    if (!dark && static_cast<std::size_t>(match->position()) > second) break;
    std::string hex = (*match)[2];
    if (hex.size() == 3) hex = {hex[0], hex[0], hex[1], hex[1], hex[2], hex[2]};
    found[(*match)[1]] = hex;
  }
  return found;
}

// Relative luminance as the contrast rules define it.
double luminance(const std::string& hex) {
  const auto part = [&](std::size_t at) {
    const double value = std::stoi(hex.substr(at, 2), nullptr, 16) / 255.0;
    return value <= 0.03928 ? value / 12.92 : std::pow((value + 0.055) / 1.055, 2.4);
  };
  return 0.2126 * part(0) + 0.7152 * part(2) + 0.0722 * part(4);
}

double contrast(const std::string& a, const std::string& b) {
  const double one = luminance(a) + 0.05;
  const double other = luminance(b) + 0.05;
  return std::max(one, other) / std::min(one, other);
}

TEST(HtmlReport, HasContrastInBothSchemes) {
  using Pairs = std::vector<std::pair<std::string, std::string>>;
  const Pairs texts{{"ink", "paper"}, {"quiet", "paper"},       {"quiet", "wash"},
                    {"ink", "wash"},  {"ink", "line"},          {"good", "paper"},
                    {"paper", "bad"}, {"on-compute", "compute"}};
  const Pairs marks{{"compute", "paper"}, {"compute", "wash"},  {"compute", "line"},
                    {"mask", "paper"},    {"wait", "paper"},    {"wait", "wait-wash"},
                    {"send", "paper"},    {"pack", "pack-wash"}};
  for (const bool dark : {false, true}) {
    std::map<std::string, std::string> colour = colours(dark);
    for (const auto& [front, back] : texts)
      EXPECT_GE(contrast(colour.at(front), colour.at(back)), 4.5)
          << front << " on " << back << dark;
    for (const auto& [front, back] : marks)
      EXPECT_GE(contrast(colour.at(front), colour.at(back)), 3.0)
          << front << " on " << back << dark;
  }
}

TEST(HtmlReport, ShowsABlockThatLeavesBothWaysOnce) {
  const std::string page = html_report(line());
  EXPECT_TRUE(contains(page, "sent on to worker 2; 8\u202fB sent on to worker 0"));
  EXPECT_FALSE(contains(page, "nothing visible, skipped"));
}

TEST(HtmlReport, SaysWhatTheNumbersAre) {
  const std::string page = html_report(ring(4));
  EXPECT_TRUE(contains(page, "4 workers computed 11\u202f000 visible pairs"));
  EXPECT_TRUE(contains(page, "5 of 16 blocks of keys hold nothing visible"));
  EXPECT_TRUE(contains(page, "CHECK PASSED"));
}

TEST(HtmlReport, SaysWhatIsMissing) {
  EXPECT_TRUE(contains(html_report(plan_only()), "PLAN, NOT RUN"));
  ReportInput input = ring(4);
  input.check_passed = false;
  input.events_dropped = 12345;
  std::string page = html_report(input);
  EXPECT_TRUE(contains(page, "CHECK FAILED"));
  EXPECT_FALSE(contains(page, "CHECK PASSED"));
  EXPECT_TRUE(contains(page, "dropped 12\u202f345 events"));
  input.check.clear();
  input.events.clear();
  input.mask_density.clear();
  page = html_report(input);
  EXPECT_TRUE(contains(page, "NOT CHECKED"));
  EXPECT_TRUE(contains(page, "No events were recorded"));
  EXPECT_TRUE(contains(page, "No picture of it was given"));
}

TEST(HtmlReport, SurvivesOddData) {
  ReportInput input = ring(3);
  input.seconds = std::numeric_limits<double>::quiet_NaN();
  input.mask_density[5] = std::numeric_limits<double>::quiet_NaN();
  input.mask_density[6] = -3;
  input.mask_density[7] = 9;
  input.plan.steps.push_back({99, 99, 99, 99, 99, 99});
  input.plan.steps.push_back({-5, -5, -5, -5, -5, -5});
  input.plan.steps.push_back({0, std::numeric_limits<int>::max(), 0, 1, 0, 1});
  input.events.push_back({EventKind::kCompute, -7, -1, -1, 9'000'000, 1, 0, 0});
  input.events.push_back({static_cast<EventKind>(200), 0, 0, 0, 9'000'000, 9'000'001, 0, 0});
  const std::string page = html_report(input);
  EXPECT_EQ(tag_error(page), "");
  EXPECT_FALSE(contains(page, "nan"));
  EXPECT_FALSE(contains(page, "inf"));
}

TEST(Escape, ReplacesWhatIsNotPlainText) {
  EXPECT_EQ(escape("a<b>&\"'"), "a&lt;b&gt;&amp;&quot;&#39;");
  EXPECT_EQ(escape("a\r\n\tb"), "a   b");
  EXPECT_EQ(escape(std::string_view("\0\x1b\x7f", 3)), "\ufffd\ufffd\ufffd");
  EXPECT_EQ(escape("\xc2\x9b"), "\ufffd");  // the one-byte escape sequence introducer
  EXPECT_EQ(escape("é 中 😀"), "é 中 😀");
  EXPECT_EQ(escape("\xc0\xaf"), "\ufffd\ufffd");            // overlong
  EXPECT_EQ(escape("\xed\xa0\x80"), "\ufffd\ufffd\ufffd");  // a surrogate
  EXPECT_EQ(escape("\xe4\xb8"), "\ufffd\ufffd");            // cut off
}

TEST(Units, AreShortAndReadable) {
  EXPECT_EQ(time_text(0.0123456), "12.3\u202fms");
  EXPECT_EQ(time_text(0), "0\u202fns");
  EXPECT_EQ(byte_text(1536), "1.50\u202fKiB");
  EXPECT_EQ(count_text(65536), "65\u202f536");
  EXPECT_EQ(count_text(1.07e9), "1.07\u202fG");
  EXPECT_EQ(grouped(-1234567), "-1\u202f234\u202f567");
  EXPECT_EQ(percent(0.5), "50\u202f%");
  EXPECT_EQ(percent(0.0625, 2), "6.25\u202f%");
  EXPECT_EQ(percent(0.1254, 2), "12.5\u202f%");
  EXPECT_EQ(percent(0.0004), "<0.1\u202f%");
  EXPECT_EQ(percent(0.99999), ">99.9\u202f%");
  EXPECT_EQ(percent(1), "100\u202f%");
  EXPECT_EQ(px(-0.001), "0");
  EXPECT_EQ(px(1.5), "1.5");
}

}  // namespace
}  // namespace annulus
