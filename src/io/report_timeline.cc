#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <set>
#include <vector>

#include "io/report_parts.h"
#include "io/svg.h"
#include "io/units.h"

namespace annulus {
namespace {

constexpr double kNames = 52;
constexpr double kWidth = 980;                // of the time axis
constexpr double kRight = 40;                 // room for the last label
constexpr double kTop = 24;
constexpr double kLeastNumbered = 14;         // height of a bar that holds a number
constexpr std::size_t kMaxMarks = 12000;      // 300 KB of path data
constexpr std::size_t kMaxTitledMarks = 4000;  // 700 KB with their tool tips
constexpr std::size_t kMaxArrows = 64;        // more hide what they point at
constexpr std::size_t kMaxTableRows = 300;

// What is drawn later lies above: a wait shows through where the worker had nothing to compute.
constexpr std::array<EventKind, kEventKinds> kDrawOrder{EventKind::kWait, EventKind::kSend,   EventKind::kPlan,
                                                        EventKind::kPack, EventKind::kFinish, EventKind::kCompute,
                                                        EventKind::kSkip};

const char* css_class(EventKind kind) {
  switch (kind) {
    case EventKind::kPlan: return "plan-work";
    case EventKind::kPack: return "pack";
    case EventKind::kSend: return "send";
    case EventKind::kWait: return "wait";
    case EventKind::kCompute: return "compute";
    case EventKind::kSkip: return "skip";
    case EventKind::kFinish: return "finish";
  }
  return "other";
}

double narrowest(EventKind kind) {
  if (kind == EventKind::kSkip) return 10;
  return kind == EventKind::kSend ? 4 : 1;
}

// One bar: an event, or several of one kind too close to tell apart.
struct Mark {
  double begin = 0;  // px
  double end = 0;
  const Event* first = nullptr;
  const Event* last = nullptr;
  std::int64_t events = 0;
  std::int64_t ns = 0;
};

struct Lane {
  int rank = 0;
  std::array<std::vector<const Event*>, kEventKinds> events;
  std::array<std::vector<Mark>, kEventKinds> marks;
};

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

class Timeline {
 public:
  explicit Timeline(const PageData& data) : data_(data) {
    span_ns_ = std::max<double>(1, static_cast<double>(data.end_ns - data.begin_ns));
    std::set<int> ranks;
    for (int rank = 0; rank < std::min(data.workers, kMaxDrawnWorkers); ++rank) ranks.insert(rank);
    for (const auto& [rank, activity] : data.activity) ranks.insert(rank);
    std::map<int, std::size_t> lane_of;
    for (const int rank : ranks) {
      if (lanes_.size() == static_cast<std::size_t>(kMaxDrawnWorkers)) break;
      lane_of[rank] = lanes_.size();
      lanes_.push_back({.rank = rank, .events = {}, .marks = {}});
    }
    for (const Event& event : data.input.events) {
      const auto lane = lane_of.find(event.rank);
      if (lane == lane_of.end() || !known(event.kind)) continue;
      lanes_[lane->second].events[static_cast<std::size_t>(event.kind)].push_back(&event);
    }
    shape_ = shape_for(lanes_.size());
    make_marks();
  }

  [[nodiscard]] std::size_t lanes() const { return lanes_.size(); }
  [[nodiscard]] bool has_numbers() const { return shape_.bar >= kLeastNumbered; }
  [[nodiscard]] double merged_ns() const { return marks_ < events_ ? span_ns_ * resolution_ / kWidth : 0; }

  std::string draw(const std::string& label) {
    const double height = kTop + static_cast<double>(lanes_.size()) * shape_.pitch() + 22;
    Svg names(kNames, height, {}, "names");
    names.text("quiet", 0, 14, "worker");
    Svg svg(kWidth + kRight, height, label);
    draw_axis(svg, height);
    for (std::size_t n = 0; n < lanes_.size(); ++n) {
      names.text(shape_.bar < 12 ? "small" : "name", 0, top(n) + shape_.bar / 2 + 4, std::to_string(lanes_[n].rank));
      svg.line("rule", 0, top(n) + shape_.bar + 0.5, kWidth, top(n) + shape_.bar + 0.5);
    }
    if (lanes_.size() <= 8) draw_messages(svg);  // below the bars: arrows across lanes must not hide numbers
    for (std::size_t n = 0; n < lanes_.size(); ++n) {
      for (const EventKind kind : kDrawOrder) draw_marks(svg, n, kind);
    }
    return "<div class=\"chart\">" + names.finish() + svg.finish() + "</div>";
  }

 private:
  [[nodiscard]] double x(std::int64_t ns) const {
    return kWidth * static_cast<double>(ns - data_.begin_ns) / span_ns_;
  }
  [[nodiscard]] double top(std::size_t lane) const { return kTop + static_cast<double>(lane) * shape_.pitch() + 4; }

  // Coarsens until the picture is small enough to load at once.
  void make_marks() {
    do {
      marks_ = 0;
      events_ = 0;
      for (Lane& lane : lanes_) {
        for (std::size_t kind = 0; kind < kEventKinds; ++kind) {
          lane.marks[kind] = merged(lane.events[kind], narrowest(static_cast<EventKind>(kind)));
          marks_ += lane.marks[kind].size();
          events_ += lane.events[kind].size();
        }
      }
      if (marks_ > kMaxMarks) resolution_ *= 2;
    } while (marks_ > kMaxMarks && resolution_ < 2 * kWidth);
  }

  // Events in time order; neighbours closer than the resolution become one mark unless both are wide.
  [[nodiscard]] std::vector<Mark> merged(std::vector<const Event*>& events, double least) const {
    std::stable_sort(events.begin(), events.end(), [](const Event* a, const Event* b) { return a->begin_ns < b->begin_ns; });
    const double narrow = std::max(least, resolution_);
    std::vector<Mark> marks;
    for (const Event* event : events) {
      const std::int64_t ns = std::max<std::int64_t>(0, event->end_ns - event->begin_ns);
      const double begin = x(event->begin_ns);
      const double end = std::max(begin + least, x(event->end_ns));
      const bool joins = !marks.empty() && begin < marks.back().end + (resolution_ > 1 ? resolution_ : 0) &&
                         (end - begin <= narrow || marks.back().end - marks.back().begin <= narrow);
      if (joins) {
        Mark& mark = marks.back();
        mark = {mark.begin, std::max(mark.end, end), mark.first, event, mark.events + 1, mark.ns + ns};
      } else {
        marks.push_back({begin, end, event, event, 1, ns});
      }
    }
    return marks;
  }

  void draw_axis(Svg& svg, double height) const {
    const double span = span_ns_ * 1e-9;
    const double step = tick_step(span / 8);
    Unit unit = time_unit(span);
    unit.decimals = std::max(0, static_cast<int>(std::ceil(-std::log10(step / unit.size) - 1e-9)));
    for (int n = 0; n * step <= span * (1 + 1e-9); ++n) {
      const double at = kWidth * n * step / span;
      svg.line("rule", at, kTop - 4, at, height - 20);
      const std::string words = n == 0 ? "0" : with_unit(n * step, unit);
      svg.text("quiet mid", std::max(at, 4.0), 14, words);
      if (lanes_.size() > 12) svg.text("quiet mid", std::max(at, 4.0), height - 6, words);
    }
  }

  [[nodiscard]] std::string when(std::int64_t ns) const {
    return time_text(static_cast<double>(ns - data_.begin_ns) * 1e-9);
  }

  [[nodiscard]] std::string title_of(const Mark& mark) const {
    const Event& event = *mark.first;
    const std::string lasted = time_text(static_cast<double>(mark.ns) * 1e-9);
    if (mark.events > 1) {
      return fmt::format("worker {}: {} times {}, steps {} to {}, {} together, from {}", event.rank, mark.events,
                         name(event.kind), event.step, mark.last->step, lasted, when(event.begin_ns));
    }
    std::string text = fmt::format("worker {}", event.rank);
    if (event.step >= 0) text += fmt::format(", step {}", event.step);
    text += fmt::format(": {}", name(event.kind));
    if (event.peer >= 0) text += fmt::format(" {} worker {}", preposition(event.kind), event.peer);
    if (event.bytes > 0) text += ", " + byte_text(static_cast<double>(event.bytes));
    if (event.pairs > 0) text += ", " + count_text(static_cast<double>(event.pairs)) + " pairs";
    return text + ", " + lasted + ", from " + when(event.begin_ns);
  }

  static const char* preposition(EventKind kind) {
    if (kind == EventKind::kSend) return "to";
    return kind == EventKind::kWait ? "for" : "with keys of";
  }

  [[nodiscard]] std::string shape_of(const Mark& mark, std::size_t lane, EventKind kind) const {
    const double width = mark.end - mark.begin;
    const double seam = width > 3 && kind != EventKind::kSkip ? 0.6 : 0;  // keeps neighbours apart
    if (kind == EventKind::kSend) {
      const double strip = top(lane) + shape_.bar + 2;
      if (width > 5 || shape_.sent < 5) return outline({mark.begin, strip, width - seam, shape_.sent});
      return fmt::format("M{} {}v{}l6-{}z", px(mark.begin), px(strip), px(shape_.sent), px(shape_.sent / 2));
    }
    if (kind == EventKind::kSkip) return lozenge(mark, top(lane) + shape_.bar / 2, std::min(5.0, shape_.bar / 2 - 1));
    return outline({mark.begin, top(lane), width - seam, shape_.bar});
  }

  // Skipping takes no time worth a bar, so it is a sign: one lozenge, drawn out over the time of several.
  static std::string lozenge(const Mark& mark, double middle, double half) {
    return fmt::format("M{0} {1}l{2}-{2}H{3}l{2} {2}l-{2} {2}H{4}z", px(mark.begin), px(middle), px(half),
                       px(std::max(mark.begin, mark.end - 2 * half) + half), px(mark.begin + half));
  }

  void draw_marks(Svg& svg, std::size_t lane, EventKind kind) const {
    const std::vector<Mark>& marks = lanes_[lane].marks[static_cast<std::size_t>(kind)];
    if (marks_ > kMaxTitledMarks) {
      std::string data;
      for (const Mark& mark : marks) data += shape_of(mark, lane, kind);
      svg.path(css_class(kind), data, fmt::format("worker {}: {}", lanes_[lane].rank, name(kind)));
      return;
    }
    for (const Mark& mark : marks) {
      svg.path(css_class(kind), shape_of(mark, lane, kind), title_of(mark));
      if (kind == EventKind::kCompute) label(svg, mark, top(lane) + shape_.bar / 2 + 4);
    }
  }

  void label(Svg& svg, const Mark& mark, double y) const {
    const double width = mark.end - mark.begin;
    if (mark.events > 1 || mark.first->step < 0 || !has_numbers()) return;
    std::string words = std::to_string(mark.first->step);
    if (width < 10 + 7.0 * static_cast<double>(words.size())) return;
    if (width >= 60) words = "step " + words;
    svg.text("on hint", (mark.begin + mark.end) / 2, y, words);
  }

  // From the strip of the sender to the end of the wait.
  void draw_messages(Svg& svg) const {
    const std::vector<Message> messages = match_messages(data_.input.events);
    if (messages.size() > kMaxArrows) return;
    std::string data;
    for (const Message& message : messages) {
      const auto from = find(message.send->rank);
      const auto to = find(message.wait->rank);
      if (from == lanes_.size() || to == lanes_.size()) continue;
      const bool down = to > from;
      const double start_y = top(from) + (down ? shape_.bar + 2 + shape_.sent : shape_.bar + 2);
      const double end_y = top(to) + (down ? 0 : shape_.bar);
      const double end_x = x(message.wait->end_ns);
      const double way = down ? -1 : 1;
      data += fmt::format("M{} {}L{} {}m-3 {}l3 {}l3 {}", px(x(message.send->begin_ns)), px(start_y), px(end_x), px(end_y),
                          px(way * 5), px(-way * 5), px(way * 5));
    }
    svg.path("message", data);
  }

  [[nodiscard]] std::size_t find(int rank) const {
    std::size_t lane = 0;
    while (lane < lanes_.size() && lanes_[lane].rank != rank) ++lane;
    return lane;
  }

  const PageData& data_;
  double span_ns_ = 1;
  std::vector<Lane> lanes_;
  LaneShape shape_;
  double resolution_ = 1;  // px
  std::size_t marks_ = 0;
  std::size_t events_ = 0;
};

const char* meaning(EventKind kind) {
  switch (kind) {
    case EventKind::kPlan: return "plan";
    case EventKind::kPack: return "pack";
    case EventKind::kSend: return "send (strip below)";
    case EventKind::kWait: return "wait for keys";
    case EventKind::kCompute: return "compute";
    case EventKind::kSkip: return "skip a step";
    case EventKind::kFinish: return "finish";
  }
  return "other";
}

std::string legend(const PageData& data) {
  constexpr std::array<EventKind, kEventKinds> kOrder{EventKind::kCompute, EventKind::kWait, EventKind::kSend, EventKind::kSkip,
                                                      EventKind::kPlan, EventKind::kPack, EventKind::kFinish};
  const double all = data.seconds * 1e9 * static_cast<double>(std::max<std::size_t>(1, data.activity.size()));
  std::string text = "<ul class=\"legend\">";
  for (const EventKind kind : kOrder) {
    std::int64_t ns = 0;
    std::int64_t count = 0;
    for (const auto& [rank, activity] : data.activity) {
      ns += activity.ns_of(kind);
      count += activity.count_of(kind);
    }
    if (count == 0) continue;
    const std::string share = kind == EventKind::kSkip ? grouped(count) + " times" : percent(static_cast<double>(ns) / all);
    const std::string words = fmt::format("{} <b>{}</b>", meaning(kind), escape(share));
    text += kind == EventKind::kSkip ? legend_item("skip", words, "M6 6l5-5l5 5l-5 5z") : legend_item(css_class(kind), words);
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
    return "<p class=\"note\">The table of workers below has the sums; the trace has every event.</p>\n";
  }
  const Unit time = time_unit(static_cast<double>(most.compute_ns) * 1e-9);
  const Unit bytes = byte_unit(static_cast<double>(most.bytes));
  const Unit pairs = count_unit(static_cast<double>(most.pairs));
  Table table{.caption = "What each worker did in each step"};
  table.head = {"worker, step", fmt::format("compute, {}", time.name), fmt::format("wait, {}", time.name),
                fmt::format("sent, {}", bytes.name), pairs.name.empty() ? "pairs" : fmt::format("pairs, {}", pairs.name)};
  for (const auto& [key, step] : sums) {
    table.rows.push_back({key.second < 0 ? fmt::format("{}, outside", key.first) : fmt::format("{}, {}", key.first, key.second),
                          number(static_cast<double>(step.compute_ns) * 1e-9, time),
                          number(static_cast<double>(step.wait_ns) * 1e-9, time),
                          number(static_cast<double>(step.bytes), bytes), number(static_cast<double>(step.pairs), pairs)});
  }
  return details("Numbers of this picture", markup(table));
}

}  // namespace

std::string timeline_section(const PageData& data) {
  std::string text = "<section>\n<h2>Timeline</h2>\n";
  if (data.input.events_dropped > 0) {
    text += fmt::format("<p><strong>Incomplete:</strong> the recorder was full and dropped {}. Times and sums on this page "
                        "cover the {} it kept.</p>\n",
                        counted(data.input.events_dropped, "event"),
                        grouped(static_cast<std::int64_t>(data.input.events.size())));
  }
  if (data.input.events.empty()) {
    return text + "<p>No events were recorded, so there is nothing to draw.</p>\n</section>\n";
  }
  Timeline timeline(data);
  text += "<p>One lane per worker, time runs to the right.";
  text += timeline.has_numbers() ? " A number in a bar is the ring step.</p>\n" : "</p>\n";
  const std::string label = fmt::format("Timeline of {} over {}: when each computed, waited, sent and skipped.",
                                        counted(static_cast<std::int64_t>(timeline.lanes()), "worker"),
                                        time_text(static_cast<double>(data.end_ns - data.begin_ns) * 1e-9));
  text += "<figure><div class=\"scroll\">" + timeline.draw(label) + "</div>\n" + legend(data);
  text += "<figcaption>Shares are of the workers' time; what overlaps counts twice.";
  if (timeline.merged_ns() > 0) {
    text += escape(fmt::format(" Bars closer than {} are drawn as one.", time_text(timeline.merged_ns() * 1e-9)));
  }
  text += "</figcaption></figure>\n" + word_table(data);
  return text + "</section>\n";
}

}  // namespace annulus
