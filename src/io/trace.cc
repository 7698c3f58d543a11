#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "annulus/report.h"
#include "io/activity.h"

namespace annulus {
namespace {

using Json = nlohmann::ordered_json;

enum class Lane : std::uint8_t { kCompute, kComm };

Lane lane_of(EventKind kind) {
  const bool traffic = kind == EventKind::kSend || kind == EventKind::kWait;
  return traffic ? Lane::kComm : Lane::kCompute;
}

// A slice without length cannot hold the end of an arrow, so a message takes a nanosecond at least.
std::int64_t length_ns(const Event& event) {
  const std::int64_t least = lane_of(event.kind) == Lane::kComm ? 1 : 0;
  return std::max(least, event.end_ns - event.begin_ns);
}

const char* peer_word(EventKind kind) {
  if (kind == EventKind::kSend) return "to";
  return kind == EventKind::kWait ? "from" : "keys_of";
}

// Viewers give pid 0 and tid 0 to the idle task, so both count from 1.
std::int64_t process_id(int rank) { return std::int64_t{rank} + 1; }

// Writes line by line: the tree of a full recording would take a gigabyte.
class TraceWriter {
 public:
  explicit TraceWriter(const std::vector<Event>& events)
      : events_(events), start_ns_(std::numeric_limits<std::int64_t>::max()) {
    for (const Event& event : events) start_ns_ = std::min(start_ns_, event.begin_ns);
  }

  std::string write() {
    std::vector<std::size_t> in_time(events_.size());
    for (std::size_t n = 0; n < events_.size(); ++n) in_time[n] = n;
    std::stable_sort(in_time.begin(), in_time.end(), [&](std::size_t a, std::size_t b) {
      return events_[a].begin_ns < events_[b].begin_ns;
    });
    threads_.resize(events_.size());
    for (const std::size_t n : in_time) add_slice(n);
    for (const Message& message : match_messages(events_)) add_arrow(message);
    return std::move(lines_);
  }

 private:
  void add(const Json& entry) {
    if (!lines_.empty()) lines_ += ",\n";
    lines_ += entry.dump();
  }

  void add_metadata(int rank, std::int64_t thread, const char* what, const Json& args) {
    add({{"ph", "M"}, {"name", what}, {"pid", process_id(rank)}, {"tid", thread}, {"args", args}});
  }

  // Slices of one thread must nest, so what overlaps goes to a further thread of the same lane.
  std::int64_t thread_for(const Event& event) {
    if (lanes_.count(event.rank) == 0) {
      add_metadata(event.rank, 1, "process_name", {{"name", "rank " + std::to_string(event.rank)}});
      add_metadata(event.rank, 1, "process_sort_index", {{"sort_index", event.rank}});
    }
    const Lane lane = lane_of(event.kind);
    std::vector<std::int64_t>& ends = lanes_[event.rank][static_cast<std::size_t>(lane)];
    const auto is_free = [&](std::int64_t end_ns) { return end_ns <= event.begin_ns; };
    const auto index = std::find_if(ends.begin(), ends.end(), is_free) - ends.begin();
    const std::int64_t thread = 1 + 2 * index + static_cast<std::int64_t>(lane);
    if (index == std::ssize(ends)) {
      ends.push_back(0);
      add_metadata(event.rank, thread, "thread_name",
                   {{"name", lane == Lane::kComm ? "comm" : "compute"}});
    }
    ends[static_cast<std::size_t>(index)] = event.begin_ns + length_ns(event);
    return thread;
  }

  void add_slice(std::size_t n) {
    const Event& event = events_[n];
    threads_[n] = thread_for(event);
    Json args = Json::object();
    if (event.step >= 0) args["step"] = event.step;
    if (event.peer >= 0) args[peer_word(event.kind)] = event.peer;
    if (lane_of(event.kind) == Lane::kComm) args["bytes"] = event.bytes;
    if (event.kind == EventKind::kCompute) args["pairs"] = event.pairs;
    std::string title(name(event.kind));
    if (event.step >= 0) title += " " + std::to_string(event.step);
    add({{"ph", "X"},
         {"name", title},
         {"cat", name(event.kind)},
         {"pid", process_id(event.rank)},
         {"tid", threads_[n]},
         {"ts", microseconds(event.begin_ns)},
         {"dur", static_cast<double>(length_ns(event)) / 1000.0},
         {"args", args}});
  }

  void add_arrow(const Message& message) {
    ++arrows_;
    add_arrow_end("s", *message.send, message.send->begin_ns);
    // The last nanosecond of the wait is inside its slice and never before the send began.
    const Event& wait = *message.wait;
    add_arrow_end("f", wait, wait.begin_ns + length_ns(wait) - 1);
  }

  void add_arrow_end(const char* phase, const Event& event, std::int64_t at_ns) {
    const auto n = static_cast<std::size_t>(&event - events_.data());
    Json entry = {{"ph", phase},
                  {"name", "keys and values"},
                  {"cat", "ring"},
                  {"id", arrows_},
                  {"pid", process_id(event.rank)},
                  {"tid", threads_[n]},
                  {"ts", microseconds(at_ns)}};
    if (*phase == 'f') entry["bp"] = "e";  // bind to the slice around it, not to the next one
    add(entry);
  }

  [[nodiscard]] double microseconds(std::int64_t ns) const {
    return static_cast<double>(ns - start_ns_) / 1000.0;
  }

  const std::vector<Event>& events_;
  std::int64_t start_ns_;
  std::int64_t arrows_ = 0;
  std::map<int, std::array<std::vector<std::int64_t>, 2>> lanes_;  // end of each thread of a lane
  std::vector<std::int64_t> threads_;                              // of each event
  std::string lines_;
};

}  // namespace

inline namespace v1 {

std::string trace_json(const std::vector<Event>& events, const std::string& title) {
  // A title that is not UTF-8 must not cost the trace.
  const std::string head = Json(title).dump(-1, ' ', false, Json::error_handler_t::replace);
  return "{\"displayTimeUnit\":\"ns\",\"otherData\":{\"title\":" + head + "},\"traceEvents\":[\n" +
         TraceWriter(events).write() + "\n]}\n";
}

}  // namespace v1
}  // namespace annulus
