// What a call's events say in sums, and which wait received which send.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <vector>

#include "annulus/record.h"

namespace annulus {

constexpr std::size_t kEventKinds = 7;

// The sums of one worker's events.
struct Activity {
  std::array<std::int64_t, kEventKinds> ns{};
  std::array<std::int64_t, kEventKinds> count{};
  std::int64_t bytes_sent = 0;
  std::int64_t pairs = 0;

  [[nodiscard]] std::int64_t ns_of(EventKind kind) const {
    return ns[static_cast<std::size_t>(kind)];
  }
  [[nodiscard]] std::int64_t count_of(EventKind kind) const {
    return count[static_cast<std::size_t>(kind)];
  }
};

inline bool known(EventKind kind) { return static_cast<std::size_t>(kind) < kEventKinds; }

std::map<int, Activity> activity_by_rank(const std::vector<Event>& events);

// One message: both ends point into the events it was found in.
struct Message {
  const Event* send = nullptr;
  const Event* wait = nullptr;
};

// Messages between two ranks arrive in the order in which they were sent, so the n-th send from a
// to b is what the n-th wait of b for a received. Ends without a partner (another process recorded
// it) are left out. In the order of the sends.
std::vector<Message> match_messages(const std::vector<Event>& events);

}  // namespace annulus
