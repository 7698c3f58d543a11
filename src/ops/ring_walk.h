// How blocks go round the ring: the only ring loop. What is done with a block is the operation's
// business.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "annulus/communicator.h"
#include "annulus/record.h"
#include "annulus/ring.h"
#include "core/ring_schedule.h"

namespace annulus {

// Times one activity for the recorder, if there is one.
class Stopwatch {
 public:
  Stopwatch(Recorder* recorder, EventKind kind, int rank, int step = -1, int peer = -1);
  void stop(std::int64_t bytes = 0, std::int64_t pairs = 0);

 private:
  Recorder* recorder_;
  Event event_;
};

class RingWalk {
 public:
  RingWalk(Communicator& comm, Recorder* recorder);

  // All ranks say whose blocks they need and get the same schedule. The result is this rank's.
  const RankSchedule& agree(const std::vector<bool>& mine, Topology topology);
  [[nodiscard]] const std::vector<RankSchedule>& schedules() const { return schedules_; }

  // Blocks arrive, travel on, and those that are needed here go to `compute`.
  // bytes_of(owner) is what a block must measure.
  struct Arrival {
    int owner = 0;
    int step = 0;
    Parcel block;
  };
  void run(const Parcel& own, const std::function<std::int64_t(int owner)>& bytes_of,
           const std::function<void(Arrival)>& compute);

  // A message outside the walk, timed and counted like the blocks.
  void send(int to, const Tag& tag, const Parcel& parcel);
  Parcel receive(int from, const Tag& tag);

  [[nodiscard]] std::int64_t call() const { return call_; }
  [[nodiscard]] int rank() const { return comm_.rank(); }
  [[nodiscard]] std::int64_t bytes_sent() const { return bytes_sent_; }
  // Polled once per work item: a sign of life, and a look for others' errors.
  void tick() const;
  [[nodiscard]] Stopwatch time(EventKind kind, int step = -1, int peer = -1) const;

 private:
  Communicator& comm_;
  Recorder* recorder_;
  const std::int64_t call_;
  std::vector<RankSchedule> schedules_;
  std::int64_t bytes_sent_ = 0;
};

}  // namespace annulus
