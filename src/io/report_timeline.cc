#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "io/report_lanes.h"
#include "io/report_parts.h"
#include "io/svg.h"
#include "io/units.h"

namespace annulus {
namespace {

constexpr double kNames = 52;
constexpr double kWidth = 980;  // of the time axis
constexpr double kRight = 40;   // room for the last label
constexpr double kTop = 24;
constexpr double kLeastNumbered = 14;          // height of a bar that holds a number
constexpr std::size_t kMaxTitledMarks = 4000;  // 700 KB with their tool tips
constexpr std::size_t kMaxArrows = 64;         // more hide what they point at
constexpr double kLeastArrowGap = 12;          // between lanes
constexpr std::size_t kOneScreen = 12;         // lanes; more get a second axis below
constexpr std::size_t kMaxTableRows = 300;

// What is drawn later lies above: a wait shows through where the worker had nothing to compute.
constexpr std::array<EventKind, kEventKinds> kDrawOrder{
    EventKind::kWait,   EventKind::kSend,    EventKind::kPlan, EventKind::kPack,
    EventKind::kFinish, EventKind::kCompute, EventKind::kSkip};

const char* css_class(EventKind kind) {
  switch (kind) {
    case EventKind::kPlan:
      return "plan-work";
    case EventKind::kPack:
      return "pack";
    case EventKind::kSend:
      return "send";
    case EventKind::kWait:
      return "wait";
    case EventKind::kCompute:
      return "compute";
    case EventKind::kSkip:
      return "skip";
    case EventKind::kFinish:
      return "finish";
  }
  return "other";
}

struct LaneShape {
  double bar = 0;   // height of the worker's own activity
  double sent = 0;  // height of the strip of sends below it
  double gap = 0;
  [[nodiscard]] double pitch() const { return bar + 2 + sent + gap; }
};

LaneShape shape_for(std::size_t lanes) {
  if (lanes <= 8) return {28, 8, 12};
  if (lanes <= 24) return {16, 6, 6};
  return {8, 3, 2};
}

// The smallest of 1, 2, 5, 10, ... that is at least `least`.
double tick_step(double least) {
  const double power = std::pow(10, std::floor(std::log10(least)));
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (factor * power >= least) return factor * power;
  }
  return 10 * power;
}

const char* preposition(EventKind kind) {
  if (kind == EventKind::kSend) return "to";
  return kind == EventKind::kWait ? "for" : "with keys of";
}

std::string title_of(const Mark& mark, std::int64_t start_ns) {
  const Event& event = *mark.first;
  std::string text = fmt::format("worker {}", event.rank);
  if (mark.events > 1) {
    text += fmt::format(": {} {} times", name(event.kind), grouped(mark.events));
    if (event.step >= 0) text += fmt::format(", steps {} to {}", event.step, mark.last->step);
  } else {
    if (event.step >= 0) text += fmt::format(", step {}", event.step);
    text += fmt::format(": {}", name(event.kind));
    if (event.peer >= 0) text += fmt::format(" {} worker {}", preposition(event.kind), event.peer);
    if (event.bytes > 0) text += ", " + byte_text(static_cast<double>(event.bytes));
    if (event.pairs > 0) text += ", " + count_text(static_cast<double>(event.pairs)) + " pairs";
  }
  return text + ", " + time_text(static_cast<double>(mark.ns) * 1e-9) + ", from " +
         time_text(static_cast<double>(event.begin_ns - start_ns) * 1e-9);
}

// Skipping takes no time worth a bar, so it is a sign: a lozenge, drawn out over the time of
// several.
std::string lozenge(const Mark& mark, double middle, double half) {
  return fmt::format("M{0} {1}l{2}-{2}H{3}l{2} {2}l-{2} {2}H{4}z", px(mark.begin), px(middle),
                     px(half), px(std::max(mark.begin, mark.end - 2 * half) + half),
                     px(mark.begin + half));
}

class Timeline {
 public:
  explicit Timeline(const PageData& data)
      : data_(data), lanes_(make_lanes(data, kWidth)), shape_(shape_for(lanes_.lanes.size())) {}

  [[nodiscard]] std::size_t size() const { return lanes_.lanes.size(); }
  [[nodiscard]] bool has_numbers() const {
    return std::any_of(lanes_.lanes.begin(), lanes_.lanes.end(), [&](const Lane& lane) {
      const auto& marks = lane.marks[static_cast<std::size_t>(EventKind::kCompute)];
      return std::any_of(marks.begin(), marks.end(),
                         [&](const Mark& mark) { return !number_in(mark).empty(); });
    });
  }
  // 0: every event has its own bar.
  [[nodiscard]] double joined_ns() const {
    return lanes_.marks < lanes_.events ? lanes_.axis.span_ns * lanes_.resolution / kWidth : 0;
  }

  [[nodiscard]] std::string draw(const std::string& label) const {
    const double height = kTop + static_cast<double>(size()) * shape_.pitch() + 22;
    Svg names(kNames, height, {}, "names");
    names.text("quiet", 0, 14, "worker");
    Svg svg(kWidth + kRight, height, label);
    draw_axis(svg, height);
    for (std::size_t n = 0; n < size(); ++n) {
      names.text(is_roomy() ? "name" : "small", 0, top(n) + shape_.bar / 2 + 4,
                 std::to_string(lanes_.lanes[n].rank));
      svg.line("rule", 0, top(n) + shape_.bar + 0.5, kWidth, top(n) + shape_.bar + 0.5);
    }
    draw_messages(svg);  // below the bars, whose numbers they must not hide
    for (std::size_t n = 0; n < size(); ++n) {
      for (const EventKind kind : kDrawOrder) draw_marks(svg, n, kind);
    }
    return "<div class=\"chart\">" + names.finish() + svg.finish() + "</div>";
  }

 private:
  [[nodiscard]] bool is_roomy() const { return shape_.bar >= kLeastNumbered; }
  [[nodiscard]] double top(std::size_t lane) const {
    return kTop + static_cast<double>(lane) * shape_.pitch() + 4;
  }

  void draw_axis(Svg& svg, double height) const {
    const double span = lanes_.axis.span_ns * 1e-9;
    const double step = tick_step(span / 8);
    Unit unit = time_unit(span);
    unit.decimals = std::max(0, static_cast<int>(std::ceil(-std::log10(step / unit.size) - 1e-9)));
    for (int n = 0; n * step <= span * (1 + 1e-9); ++n) {
      const double at = kWidth * n * step / span;
      svg.line("rule", at, kTop - 4, at, height - 20);
      const std::string words = n == 0 ? "0" : with_unit(n * step, unit);
      svg.text("quiet mid", std::max(at, 4.0), 14, words);
      if (size() > kOneScreen) svg.text("quiet mid", std::max(at, 4.0), height - 6, words);
    }
  }

  [[nodiscard]] std::string shape_of(const Mark& mark, std::size_t lane) const {
    const EventKind kind = mark.first->kind;
    if (kind == EventKind::kSkip) {
      return lozenge(mark, top(lane) + shape_.bar / 2, std::min(5.0, shape_.bar / 2 - 1));
    }
    const double width = mark.width() - (mark.width() > 3 ? 0.6 : 0);  // keeps neighbours apart
    if (kind != EventKind::kSend) return outline({mark.begin, top(lane), width, shape_.bar});
    const double strip = top(lane) + shape_.bar + 2;
    const bool wide = mark.width() > 5 || !is_roomy();
    if (wide) return outline({mark.begin, strip, width, shape_.sent});
    return fmt::format("M{} {}v{}l6-{}z", px(mark.begin), px(strip), px(shape_.sent),
                       px(shape_.sent / 2));
  }

  void draw_marks(Svg& svg, std::size_t lane, EventKind kind) const {
    const auto& marks = lanes_.lanes[lane].marks[static_cast<std::size_t>(kind)];
    if (lanes_.marks > kMaxTitledMarks) {
      std::string data;
      for (const Mark& mark : marks) data += shape_of(mark, lane);
      const int rank = lanes_.lanes[lane].rank;
      svg.path(css_class(kind), data, fmt::format("worker {}: {}", rank, name(kind)));
      return;
    }
    for (const Mark& mark : marks) {
      svg.path(css_class(kind), shape_of(mark, lane), title_of(mark, data_.begin_ns));
      const std::string number = kind == EventKind::kCompute ? number_in(mark) : std::string();
      if (number.empty()) continue;
      svg.text("on hint", (mark.begin + mark.end) / 2, top(lane) + shape_.bar / 2 + 4, number);
    }
  }

  // The step, where the bar has room for it.
  [[nodiscard]] std::string number_in(const Mark& mark) const {
    if (mark.events > 1 || mark.first->step < 0 || !is_roomy()) return {};
    std::string words = std::to_string(mark.first->step);
    if (mark.width() < 10 + 7.0 * static_cast<double>(words.size())) return {};
    return mark.width() >= 60 ? "step " + words : words;
  }

  // From the strip of the sender to the end of the wait.
  void draw_messages(Svg& svg) const {
    if (shape_.gap < kLeastArrowGap) return;
    const std::vector<Message> messages = match_messages(data_.input.events);
    if (messages.size() > kMaxArrows) return;
    std::string data;
    for (const Message& message : messages) {
      const std::size_t from = lanes_.lane_of(message.send->rank);
      const std::size_t to = lanes_.lane_of(message.wait->rank);
      const bool down = to > from;
      const double start_y = top(from) + shape_.bar + 2 + (down ? shape_.sent : 0);
      const double end_y = top(to) + (down ? 0 : shape_.bar);
      const double back = down ? -5 : 5;
      data += fmt::format("M{} {}L{} {}m-3 {}l3 {}l3 {}", px(lanes_.axis.x(message.send->begin_ns)),
                          px(start_y), px(lanes_.axis.x(message.wait->end_ns)), px(end_y), px(back),
                          px(-back), px(back));
    }
    svg.path("message", data);
  }

  const PageData& data_;
  Lanes lanes_;
  LaneShape shape_;
};

const char* meaning(EventKind kind) {
  switch (kind) {
    case EventKind::kPlan:
      return "plan";
    case EventKind::kPack:
      return "pack";
    case EventKind::kSend:
      return "send (strip below)";
    case EventKind::kWait:
      return "wait for keys";
    case EventKind::kCompute:
      return "compute";
    case EventKind::kSkip:
      return "skip a step";
    case EventKind::kFinish:
      return "finish";
  }
  return "other";
}

std::string legend(const PageData& data) {
  constexpr std::array<EventKind, kEventKinds> kOrder{
      EventKind::kCompute, EventKind::kWait, EventKind::kSend,  EventKind::kSkip,
      EventKind::kPlan,    EventKind::kPack, EventKind::kFinish};
  const double all =
      data.seconds * 1e9 * static_cast<double>(std::max<std::size_t>(1, data.activity.size()));
  std::string text = "<ul class=\"legend\">";
  for (const EventKind kind : kOrder) {
    std::int64_t ns = 0;
    std::int64_t count = 0;
    for (const auto& [rank, activity] : data.activity) {
      ns += activity.ns_of(kind);
      count += activity.count_of(kind);
    }
    if (count == 0) continue;
    const std::string share = kind == EventKind::kSkip ? grouped(count) + " times"
                                                       : percent(static_cast<double>(ns) / all);
    const std::string words = fmt::format("{} <b>{}</b>", meaning(kind), escape(share));
    text += kind == EventKind::kSkip ? legend_item("skip", words, "M6 6l5-5l5 5l-5 5z")
                                     : legend_item(css_class(kind), words);
  }
  return text + "</ul>\n";
}

// Sums of one worker in one step.
struct StepSums {
  std::int64_t compute_ns = 0;
  std::int64_t wait_ns = 0;
  std::int64_t bytes = 0;
  std::int64_t pairs = 0;
};

std::string word_table(const PageData& data) {
  std::map<std::pair<int, int>, StepSums> sums;
  StepSums most;
  for (const Event& event : data.input.events) {
    StepSums& step = sums[{event.rank, event.step}];
    const std::int64_t ns = std::max<std::int64_t>(0, event.end_ns - event.begin_ns);
    if (event.kind == EventKind::kCompute) step.compute_ns += ns;
    if (event.kind == EventKind::kWait) step.wait_ns += ns;
    if (event.kind == EventKind::kSend) step.bytes += event.bytes;
    step.pairs += event.pairs;
    most.compute_ns = std::max({most.compute_ns, step.compute_ns, step.wait_ns});
    most.bytes = std::max(most.bytes, step.bytes);
    most.pairs = std::max(most.pairs, step.pairs);
  }
  if (sums.size() > kMaxTableRows) {
    return element("p", "note", "The table of workers below has the sums.") + "\n";
  }
  const Unit time = time_unit(static_cast<double>(most.compute_ns) * 1e-9);
  const Unit bytes = byte_unit(static_cast<double>(most.bytes));
  const Unit pairs = count_unit(static_cast<double>(most.pairs));
  Table table{.caption = "What each worker did in each step"};
  table.head = {"worker, step", fmt::format("compute, {}", time.name),
                fmt::format("wait, {}", time.name), fmt::format("sent, {}", bytes.name),
                pairs.name.empty() ? "pairs" : fmt::format("pairs, {}", pairs.name)};
  for (const auto& [key, step] : sums) {
    table.rows.push_back({key.second < 0 ? fmt::format("{}, outside", key.first)
                                         : fmt::format("{}, {}", key.first, key.second),
                          number(static_cast<double>(step.compute_ns) * 1e-9, time),
                          number(static_cast<double>(step.wait_ns) * 1e-9, time),
                          number(static_cast<double>(step.bytes), bytes),
                          number(static_cast<double>(step.pairs), pairs)});
  }
  return details("Numbers of this picture", markup(table));
}

}  // namespace

std::string timeline_section(const PageData& data) {
  std::string text = "<section>\n<h2>Timeline</h2>\n";
  const std::vector<Event>& events = data.input.events;
  if (data.input.events_dropped > 0) {
    text += fmt::format(
        "<p><strong>Incomplete:</strong> the recorder was full and dropped {}. "
        "Times and sums on this page cover the {} it kept.</p>\n",
        counted(data.input.events_dropped, "event"), grouped(std::ssize(events)));
  }
  if (events.empty()) {
    const char* reason = data.computed ? "No events were recorded, so there is nothing to draw."
                                       : "Nothing ran yet.";
    return text + element("p", {}, reason) + "\n</section>\n";
  }
  const Timeline timeline(data);
  text += "<p>One lane per worker, time runs to the right.";
  text += timeline.has_numbers() ? " A number in a bar is the ring step.</p>\n" : "</p>\n";
  const std::string label =
      fmt::format("Timeline of {} over {}: when each computed, waited, sent and skipped.",
                  counted(static_cast<std::int64_t>(timeline.size()), "worker"),
                  time_text(static_cast<double>(data.end_ns - data.begin_ns) * 1e-9));
  text += "<figure><div class=\"scroll\">" + timeline.draw(label) + "</div>\n" + legend(data);
  std::string caption = "Shares are of the workers' time; what overlaps counts twice.";
  if (timeline.joined_ns() > 0) {
    caption += " Bars closer than " + time_text(timeline.joined_ns() * 1e-9) + " are drawn as one.";
  }
  text += element("figcaption", {}, caption) + "</figure>\n" + word_table(data);
  return text + "</section>\n";
}

}  // namespace annulus
