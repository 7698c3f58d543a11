// What happened during a call, for pictures and traces. Recording costs two clock reads per event;
// without a Recorder nothing is recorded.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

namespace annulus {
inline namespace v1 {

enum class EventKind : std::uint8_t { kPlan, kPack, kSend, kWait, kCompute, kSkip, kFinish };

std::string_view name(EventKind kind);  // "plan", "pack", ...

// One thing one worker did. Times are nanoseconds of one steady clock shared by all workers of the
// process.
struct Event {
  EventKind kind = EventKind::kCompute;
  int rank = 0;
  int step = -1;  // of the ring; -1 outside
  int peer = -1;  // kSend: to whom; kWait: from whom; kCompute, kSkip: whose keys
  std::int64_t begin_ns = 0;
  std::int64_t end_ns = 0;
  std::int64_t bytes = 0;  // kSend, kWait
  std::int64_t pairs = 0;  // kCompute: visible pairs computed
};

// Thread-safe sink of events. Keeps at most kCapacity of them and counts the rest.
class Recorder {
 public:
  static constexpr std::int64_t kCapacity = 1 << 20;

  void add(const Event& event);
  [[nodiscard]] std::vector<Event> events() const;  // sorted by rank, then begin_ns
  [[nodiscard]] std::int64_t dropped() const;
  static std::int64_t now_ns();

 private:
  mutable std::mutex mutex_;
  std::vector<Event> events_;
  std::int64_t dropped_ = 0;
};

}  // namespace v1
}  // namespace annulus
