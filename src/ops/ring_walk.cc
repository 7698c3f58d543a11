#include "ops/ring_walk.h"

#include <utility>

#include "ops/rank.h"

namespace annulus {

Stopwatch::Stopwatch(Recorder* recorder, EventKind kind, int rank, int step, int peer)
    : recorder_(recorder), event_{kind, rank, step, peer} {
  if (recorder_ != nullptr) event_.begin_ns = Recorder::now_ns();
}

void Stopwatch::stop(std::int64_t bytes, std::int64_t pairs) {
  if (recorder_ == nullptr) return;
  event_.end_ns = Recorder::now_ns(), event_.bytes = bytes, event_.pairs = pairs;
  recorder_->add(event_);
}

RingWalk::RingWalk(Communicator& comm, Recorder* recorder)
    : comm_(comm), recorder_(recorder), call_(comm.next_call()) {}

Stopwatch RingWalk::time(EventKind kind, int step, int peer) const {
  return {recorder_, kind, comm_.rank(), step, peer};
}

void RingWalk::tick() const {
  comm_.progress();
  comm_.check_alive();
}

const RankSchedule& RingWalk::agree(const std::vector<bool>& mine, Topology topology) {
  std::vector<std::byte> flags;
  flags.reserve(mine.size());
  for (const bool need : mine) flags.push_back(static_cast<std::byte>(need));
  std::vector<std::vector<bool>> needs;
  for (const Parcel& part : comm_.all_gather(std::move(flags))) {
    std::vector<bool> row;
    row.reserve(part.bytes.size());
    for (const std::byte b : part.bytes) row.push_back(b != std::byte{0});
    needs.push_back(std::move(row));
  }
  schedules_ = make_ring_schedule(comm_.world_size(), needs, directions_of(topology));
  return schedules_[static_cast<std::size_t>(rank())];
}

void RingWalk::send(int to, const Tag& tag, const Parcel& parcel) {
  Stopwatch sending = time(EventKind::kSend, tag.step, to);
  comm_.send(to, tag, parcel);
  sending.stop(tag.bytes);
  bytes_sent_ += tag.bytes;
}

Parcel RingWalk::receive(int from, const Tag& tag) {
  Stopwatch waiting = time(EventKind::kWait, tag.step, from);
  Parcel parcel = comm_.receive(from, tag);
  waiting.stop(tag.bytes);
  return parcel;
}

void RingWalk::run(const Parcel& own, const std::function<std::int64_t(int owner)>& bytes_of,
                   const std::function<void(Arrival)>& compute) {
  const RankSchedule& schedule = schedules_[static_cast<std::size_t>(rank())];
  for (std::size_t s = 0; s < schedule.size(); ++s) {
    const int step = static_cast<int>(s);
    for (const Visit& visit : schedule[s]) {
      const std::int64_t bytes = bytes_of(visit.owner);
      Parcel block = visit.from < 0
                         ? own
                         : receive(visit.from, {call_, Channel::kBlocks, step, visit.owner, bytes});
      if (visit.to >= 0)
        send(visit.to, {call_, Channel::kBlocks, step + 1, visit.owner, bytes}, block);
      if (!visit.compute) {
        time(EventKind::kSkip, step, visit.owner).stop();
        continue;
      }
      compute({visit.owner, step, std::move(block)});
    }
  }
}

}  // namespace annulus
