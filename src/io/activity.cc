#include "io/activity.h"

#include <algorithm>
#include <utility>

namespace annulus {

std::map<int, Activity> activity_by_rank(const std::vector<Event>& events) {
  std::map<int, Activity> by_rank;
  for (const Event& event : events) {
    if (!known(event.kind)) continue;
    Activity& activity = by_rank[event.rank];
    const auto kind = static_cast<std::size_t>(event.kind);
    activity.ns[kind] += std::max<std::int64_t>(0, event.end_ns - event.begin_ns);
    ++activity.count[kind];
    activity.pairs += event.pairs;
    if (event.kind == EventKind::kSend) activity.bytes_sent += event.bytes;
  }
  return by_rank;
}

std::vector<Message> match_messages(const std::vector<Event>& events) {
  using Link = std::pair<int, int>;  // from, to
  std::map<Link, std::vector<const Event*>> sends;
  std::map<Link, std::vector<const Event*>> waits;
  for (const Event& event : events) {
    if (event.peer < 0) continue;
    if (event.kind == EventKind::kSend) sends[{event.rank, event.peer}].push_back(&event);
    if (event.kind == EventKind::kWait) waits[{event.peer, event.rank}].push_back(&event);
  }
  const auto earlier = [](const Event* a, const Event* b) { return a->begin_ns < b->begin_ns; };
  std::vector<Message> messages;
  for (auto& [link, sent] : sends) {
    std::vector<const Event*>& received = waits[link];
    std::stable_sort(sent.begin(), sent.end(), earlier);
    std::stable_sort(received.begin(), received.end(), earlier);
    for (std::size_t n = 0; n < std::min(sent.size(), received.size()); ++n) {
      // A message cannot arrive before it left: such a pair comes from a recording that lost
      // events.
      if (received[n]->end_ns > sent[n]->begin_ns) messages.push_back({sent[n], received[n]});
    }
  }
  std::stable_sort(messages.begin(), messages.end(),
                   [&](const Message& a, const Message& b) { return earlier(a.send, b.send); });
  return messages;
}

}  // namespace annulus
