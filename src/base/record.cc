#include "annulus/record.h"

#include <algorithm>
#include <chrono>
#include <tuple>

namespace annulus {
inline namespace v1 {

std::string_view name(EventKind kind) {
  switch (kind) {
    case EventKind::kPlan:
      return "plan";
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
  return "unknown";
}

void Recorder::add(const Event& event) {
  const std::lock_guard lock(mutex_);
  if (static_cast<std::int64_t>(events_.size()) < kCapacity) {
    events_.push_back(event);
  } else {
    ++dropped_;
  }
}

std::vector<Event> Recorder::events() const {
  std::vector<Event> sorted;
  {
    const std::lock_guard lock(mutex_);
    sorted = events_;
  }
  std::stable_sort(sorted.begin(), sorted.end(), [](const Event& a, const Event& b) {
    return std::tie(a.rank, a.begin_ns) < std::tie(b.rank, b.begin_ns);
  });
  return sorted;
}

std::int64_t Recorder::dropped() const {
  const std::lock_guard lock(mutex_);
  return dropped_;
}

std::int64_t Recorder::now_ns() {
  const auto since_start = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since_start).count();
}

}  // namespace v1
}  // namespace annulus
