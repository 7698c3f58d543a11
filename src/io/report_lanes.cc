#include "io/report_lanes.h"

#include <algorithm>
#include <set>

namespace annulus {
namespace {

constexpr std::size_t kMaxMarks = 12000;  // 300 KB of path data

// Pixels below which a bar could not be seen, or its sign not be drawn.
double narrowest(EventKind kind) {
  if (kind == EventKind::kSkip) return 10;
  return kind == EventKind::kSend ? 4 : 1;
}

std::vector<Lane> sorted_lanes(const PageData& data) {
  std::set<int> ranks;
  for (int rank = 0; rank < std::min(data.workers, kMaxDrawnWorkers); ++rank) ranks.insert(rank);
  for (const auto& [rank, activity] : data.activity) ranks.insert(rank);
  std::vector<Lane> lanes;
  for (const int rank : ranks) {
    if (lanes.size() == static_cast<std::size_t>(kMaxDrawnWorkers)) break;
    lanes.push_back({.rank = rank, .events = {}, .marks = {}});
  }
  return lanes;
}

// Neighbours that overlap on the picture, or lie closer than its resolution, become one mark unless
// both are wide enough to be seen. Events are in time order.
std::vector<Mark> join(const std::vector<const Event*>& events, double least, const Lanes& lanes) {
  const double narrow = std::max(least, lanes.resolution);
  const double reach = lanes.resolution > 1 ? lanes.resolution : 0;
  std::vector<Mark> marks;
  for (const Event* event : events) {
    const std::int64_t ns = std::max<std::int64_t>(0, event->end_ns - event->begin_ns);
    const double begin = lanes.axis.x(event->begin_ns);
    const double end = std::max(begin + least, lanes.axis.x(event->end_ns));
    Mark* last = marks.empty() ? nullptr : &marks.back();
    if (last != nullptr && begin < last->end + reach &&
        (end - begin <= narrow || last->width() <= narrow)) {
      last->end = std::max(last->end, end);
      last->last = event;
      last->ns += ns;
      ++last->events;
    } else {
      marks.push_back({begin, end, event, event, 1, ns});
    }
  }
  return marks;
}

void make_marks(Lanes& lanes) {
  lanes.marks = 0;
  for (Lane& lane : lanes.lanes) {
    for (std::size_t kind = 0; kind < kEventKinds; ++kind) {
      const double least = narrowest(static_cast<EventKind>(kind));
      lane.marks[kind] = join(lane.events[kind], least, lanes);
      lanes.marks += lane.marks[kind].size();
    }
  }
}

}  // namespace

std::size_t Lanes::lane_of(int rank) const {
  const auto before = [](const Lane& lane, int value) { return lane.rank < value; };
  const auto found = std::lower_bound(lanes.begin(), lanes.end(), rank, before);
  if (found == lanes.end() || found->rank != rank) return lanes.size();
  return static_cast<std::size_t>(found - lanes.begin());
}

Lanes make_lanes(const PageData& data, double width) {
  Lanes lanes;
  lanes.axis.begin_ns = data.begin_ns;
  lanes.axis.span_ns = std::max(1.0, static_cast<double>(data.end_ns - data.begin_ns));
  lanes.axis.width = width;
  lanes.lanes = sorted_lanes(data);
  for (const Event& event : data.input.events) {
    const std::size_t lane = lanes.lane_of(event.rank);
    if (lane == lanes.lanes.size() || !known(event.kind)) continue;
    lanes.lanes[lane].events[static_cast<std::size_t>(event.kind)].push_back(&event);
    ++lanes.events;
  }
  for (Lane& lane : lanes.lanes) {
    for (auto& events : lane.events) {
      std::stable_sort(events.begin(), events.end(),
                       [](const Event* a, const Event* b) { return a->begin_ns < b->begin_ns; });
    }
  }
  make_marks(lanes);
  while (lanes.marks > kMaxMarks && lanes.resolution < width) {
    lanes.resolution *= 2;
    make_marks(lanes);
  }
  return lanes;
}

}  // namespace annulus
