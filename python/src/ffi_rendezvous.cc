#include "ffi_rendezvous.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <thread>
#include <utility>
#include <vector>

#include "annulus/error.h"

namespace annulus::python {
namespace {

using Clock = std::chrono::steady_clock;

// One rank's part, in a thread of its own: what XLA does when the promise is kept may itself wait
// for other ranks.
void take_part(std::shared_ptr<ThreadWorld> world, int rank, Arrival arrival) {
  try {
    arrival.work(world->rank(rank));
    world->leave(rank);
  } catch (...) {
    const std::exception_ptr error = std::current_exception();
    world->rank(rank).abort(error);
    world.reset(), arrival.work = nullptr;
    return arrival.promise.failed(error);
  }
  world.reset(), arrival.work = nullptr;
  arrival.promise.done();
}

void start(const MeetingTerms& terms, std::vector<Arrival> arrivals) {
  WorkerOptions options;
  options.timeout_s = terms.timeout_s;
  auto world = std::make_shared<ThreadWorld>(terms.world_size, options);
  for (int rank = 0; rank < terms.world_size; ++rank) {
    Arrival& arrival = arrivals[static_cast<std::size_t>(rank)];
    try {
      std::thread(take_part, world, rank, arrival).detach();
    } catch (...) {
      world->rank(rank).abort(std::current_exception());
      arrival.promise.failed(std::current_exception());
    }
  }
}

struct Meeting {
  MeetingTerms terms;
  std::vector<std::deque<Arrival>> waiting;  // by rank
  std::optional<Clock::time_point> deadline;

  [[nodiscard]] bool complete() const {
    return std::none_of(waiting.begin(), waiting.end(), [](const auto& q) { return q.empty(); });
  }
  [[nodiscard]] bool over() const {
    return std::all_of(waiting.begin(), waiting.end(), [](const auto& q) { return q.empty(); });
  }
};

std::exception_ptr absence(const Meeting& meeting) {
  std::string missing;
  int count = 0, first = -1;
  for (int rank = 0; rank < meeting.terms.world_size; ++rank) {
    if (!meeting.waiting[static_cast<std::size_t>(rank)].empty()) continue;
    missing += (count++ == 0 ? "" : ", ") + std::to_string(rank);
    if (first < 0) first = rank;
  }
  std::ostringstream text;
  text << meeting.terms.operation << ": " << (count == 1 ? "rank " : "ranks ") << missing
       << " of axis '" << meeting.terms.axis << "' did not come within " << meeting.terms.timeout_s
       << " s";
  return std::make_exception_ptr(
      CommError(ErrorCode::kPeerTimeout, text.str(), first,
                "every device of the axis must make the call, equally often"));
}

class Rendezvous {
 public:
  void meet(const MeetingPlace& place, const MeetingTerms& terms, int rank, Arrival arrival) {
    std::vector<Arrival> everybody;
    {
      const std::lock_guard lock(mutex_);
      if (const auto failure = failures_.find(place); failure != failures_.end()) {
        everybody.push_back(std::move(arrival));
        return fail_later(std::move(everybody), failure->second);
      }
      Meeting& meeting = meetings_[place];
      if (meeting.waiting.empty()) {
        meeting.terms = terms, meeting.waiting.resize(static_cast<std::size_t>(terms.world_size));
        set_deadline(meeting);
      }
      meeting.waiting[static_cast<std::size_t>(rank)].push_back(std::move(arrival));
      if (!meeting.complete()) return;
      for (auto& queue : meeting.waiting)
        everybody.push_back(std::move(queue.front())), queue.pop_front();
      if (meeting.over()) meetings_.erase(place);
    }
    start(terms, std::move(everybody));
  }

 private:
  void set_deadline(Meeting& meeting) {
    // A century is for ever; the clock counts nanoseconds in 64 bits.
    if (!(meeting.terms.timeout_s < 3e9)) return;
    meeting.deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                          std::chrono::duration<double>(meeting.terms.timeout_s));
    if (!watched_) std::thread([this] { watch(); }).detach();
    watched_ = true;
    wake_.notify_one();
  }

  // Only for errors: programs end there and wait for nobody.
  static void fail_later(std::vector<Arrival> arrivals, std::exception_ptr error) {
    std::thread([arrivals = std::move(arrivals), error = std::move(error)] {
      for (const Arrival& arrival : arrivals) arrival.promise.failed(error);
    }).detach();
  }

  void watch() {
    std::unique_lock lock(mutex_);
    for (;;) {
      std::optional<Clock::time_point> next;
      for (auto it = meetings_.begin(); it != meetings_.end();) {
        const auto& deadline = it->second.deadline;
        if (deadline && *deadline <= Clock::now()) {
          give_up(it->first, it->second);
          it = meetings_.erase(it);
          continue;
        }
        if (deadline && (!next || *deadline < *next)) next = deadline;
        ++it;
      }
      if (next) {
        wake_.wait_until(lock, *next);
      } else {
        wake_.wait(lock);
      }
    }
  }

  void give_up(const MeetingPlace& place, Meeting& meeting) {
    const std::exception_ptr error = absence(meeting);
    std::vector<Arrival> arrivals;
    for (auto& queue : meeting.waiting)
      for (Arrival& arrival : queue) arrivals.push_back(std::move(arrival));
    // Who comes late hears at once; who comes that late is few.
    if (failures_.size() >= 256) failures_.erase(failures_.begin());
    failures_.emplace(place, error);
    fail_later(std::move(arrivals), error);
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::map<MeetingPlace, Meeting> meetings_;
  std::map<MeetingPlace, std::exception_ptr> failures_;
  bool watched_ = false;
};

}  // namespace

void meet(const MeetingPlace& place, const MeetingTerms& terms, int rank, Arrival arrival) {
  // Of the process, since its devices are; never destroyed, since their threads may outlive main().
  static auto* const rendezvous = new Rendezvous;
  rendezvous->meet(place, terms, rank, std::move(arrival));
}

}  // namespace annulus::python
