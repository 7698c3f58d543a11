// Ranks as threads of one process. Messages are hand-overs of parcels under one mutex: blocks are
// large and few, so the lock is never contended for long. All waits share one condition, one
// deadline rule and one way to fail.

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <thread>
#include <tuple>

#include "annulus/communicator.h"
#include "base/aligned_buffer.h"
#include "base/fail.h"
#include "comm/call_number.h"
#include "comm/parcel.h"

namespace annulus {
namespace {

using Clock = std::chrono::steady_clock;

struct Message {
  Tag tag;
  Parcel parcel;
};

// What a rank does, for the search of the culprit when nothing moves.
struct RankState {
  Clock::time_point last_progress = Clock::now();
  int waits_for = -1;  // rank; -1: computing, or everybody
  bool left = false;
  std::string phase = "start";
  std::int64_t call = 0;
};

// Copies blocks to where kernels can read them.
Parcel aligned_copy(std::span<const std::byte> bytes) {
  const auto size = static_cast<std::int64_t>(bytes.size());
  const auto owned = std::make_shared<const AlignedBuffer>(size);
  if (size > 0) std::memcpy(owned->data(), bytes.data(), bytes.size());
  return parcel_of(owned);
}

constexpr const char* kGather = "gather";  // phase of waiting for everybody

struct Gathering {
  std::vector<Parcel> parts;
  int arrived = 0;
  int left = 0;
};

class World {
 public:
  World(int size, WorkerOptions options)
      : options_(std::move(options)), here_(static_cast<std::size_t>(size)), ranks_(here_.size()) {}

  [[nodiscard]] int size() const { return static_cast<int>(ranks_.size()); }

  void send(int from, int to, const Tag& tag, Parcel parcel) {
    if (!options_.lend) parcel = aligned_copy(parcel.bytes);
    const std::lock_guard lock(mutex_);
    throw_if_failed();
    boxes_[{from, to, tag.channel}].push_back({tag, std::move(parcel)});
    moved_.notify_all();
  }

  Parcel receive(int rank, int from, const Tag& want) {
    std::unique_lock lock(mutex_);
    auto& box = boxes_[{from, rank, want.channel}];
    const std::string phase =
        want.channel == Channel::kGather ? kGather : concat("step ", want.step);
    wait(lock, rank, from, phase, [&] { return !box.empty(); });
    Message message = std::move(box.front());
    box.pop_front();
    const Tag& got = message.tag;
    if (got.call != want.call || got.step != want.step || got.owner != want.owner ||
        got.bytes != want.bytes ||
        static_cast<std::int64_t>(message.parcel.bytes.size()) != want.bytes) {
      throw CommError(
          ErrorCode::kPeerMismatch,
          concat("ring: rank ", rank, " expected ", call_name(want), " step ", want.step, " block ",
                 want.owner, " of ", want.bytes, " bytes from rank ", from, ", found ",
                 call_name(got), " step ", got.step, " block ", got.owner, " of ",
                 message.parcel.bytes.size(), " bytes"),
          from, "make the same calls in the same order on every rank");
    }
    return std::move(message.parcel);
  }

  std::vector<Parcel> all_gather(int rank, std::vector<std::byte> mine) {
    std::unique_lock lock(mutex_);
    // A rank may be one gathering ahead of the others, never two.
    wait(lock, rank, -1, kGather, [&] { return gathering_.left == 0; });
    if (gathering_.arrived == 0) gathering_.parts.assign(ranks_.size(), {});
    gathering_.parts[static_cast<std::size_t>(rank)] = parcel_of(std::move(mine));
    gathering_.arrived += 1;
    here_[static_cast<std::size_t>(rank)] = true;
    if (gathering_.arrived == size())
      gathering_.left = size(), gathering_.arrived = 0, here_.assign(ranks_.size(), false);
    moved_.notify_all();
    wait(lock, rank, -1, kGather, [&] { return gathering_.left > 0; });
    auto parts = gathering_.parts;
    if (--gathering_.left == 0) moved_.notify_all();
    return parts;
  }

  void progress(int rank) {
    const std::lock_guard lock(mutex_);
    ranks_[static_cast<std::size_t>(rank)].last_progress = Clock::now();
  }

  void abort(std::exception_ptr error) {
    const std::lock_guard lock(mutex_);
    if (!error_) error_ = std::move(error);
    moved_.notify_all();
  }

  void check_alive() {
    const std::lock_guard lock(mutex_);
    throw_if_failed();
  }

  std::int64_t next_call(int rank) {
    const std::lock_guard lock(mutex_);
    return ++ranks_[static_cast<std::size_t>(rank)].call;
  }

  void leave(int rank) {
    const std::lock_guard lock(mutex_);
    RankState& me = ranks_[static_cast<std::size_t>(rank)];
    me.left = true, me.waits_for = -1, me.phase = "left";
    moved_.notify_all();
  }

  [[nodiscard]] std::exception_ptr error() const {
    const std::lock_guard lock(mutex_);
    return error_;
  }

 private:
  void throw_if_failed() {
    if (!error_ && options_.stop && options_.stop()) {
      error_ = std::make_exception_ptr(Interrupted("ring: stopped by the caller"));
      moved_.notify_all();
    }
    if (error_) std::rethrow_exception(error_);
  }

  // Waits for `ready`. `from` is the rank waited for, -1 for everybody. A rank that is needed and
  // has left ends the wait at once. Looks up every 50 ms: for a stop, and whether the chain of
  // waits ends at a rank that has been silent for the whole timeout.
  template <class Ready>
  void wait(std::unique_lock<std::mutex>& lock, int rank, int from, const std::string& phase,
            Ready ready) {
    RankState& me = ranks_[static_cast<std::size_t>(rank)];
    throw_if_failed();
    me.waits_for = from, me.phase = phase, me.last_progress = Clock::now();
    const auto begin = Clock::now();
    while (!ready()) {
      throw_if_left(rank);
      moved_.wait_for(lock, std::chrono::milliseconds(50));
      throw_if_failed();
      if (!ready() && seconds_since(begin) > options_.timeout_s) blame(rank);
    }
    me.waits_for = -1, me.phase = "compute", me.last_progress = Clock::now();
  }

  static double seconds_since(Clock::time_point time) {
    return std::chrono::duration<double>(Clock::now() - time).count();
  }

  // Nothing is under way from a rank that `rank` waits for and that has left: it never will be.
  void throw_if_left(int rank) const {
    for (int other = 0; other < size(); ++other) {
      if (!ranks_[static_cast<std::size_t>(other)].left || !needs(rank, other)) continue;
      throw CommError(
          ErrorCode::kPeerTimeout,
          concat("ring: rank ", other, " has left without taking part; rank ", rank,
                 " waits for it in phase '", ranks_[static_cast<std::size_t>(rank)].phase, "'"),
          other, "make the same calls in the same order on every rank");
    }
  }

  // Whether a waiting rank waits for the other one.
  [[nodiscard]] bool needs(int rank, int other) const {
    const RankState& state = ranks_[static_cast<std::size_t>(rank)];
    if (state.waits_for >= 0) return state.waits_for == other;
    return state.phase == kGather && other != rank && !here_[static_cast<std::size_t>(other)];
  }

  // Follows who waits for whom from `rank` to the end; throws if the rank there has not moved for
  // the timeout. Slow is not dead: a rank that made progress ends the search and the wait goes on.
  void blame(int rank) {
    std::string chain = concat("rank ", rank);
    int at = rank;
    for (int hops = 0; hops < size(); ++hops) {
      int next = 0;
      while (next < size() && !needs(at, next)) ++next;
      if (next == size()) break;
      at = next;
      chain += concat(" waits for rank ", at);
    }
    const RankState& state = ranks_[static_cast<std::size_t>(at)];
    if (seconds_since(state.last_progress) <= options_.timeout_s) return;
    throw CommError(ErrorCode::kPeerTimeout,
                    concat("ring: rank ", at, " is silent in phase '", state.phase, "' for ",
                           seconds_since(state.last_progress), " s (", chain, ")"),
                    at, "look at that rank; a larger timeout helps only if it is slow, not stuck");
  }

  const WorkerOptions options_;
  mutable std::mutex mutex_;
  std::condition_variable moved_;
  std::map<std::tuple<int, int, Channel>, std::deque<Message>> boxes_;
  Gathering gathering_;
  std::vector<bool> here_;  // who has come to the gathering
  std::vector<RankState> ranks_;
  std::exception_ptr error_;
};

class ThreadCommunicator final : public Communicator {
 public:
  ThreadCommunicator(World& world, int rank) : world_(world), rank_(rank) {}
  [[nodiscard]] int rank() const override { return rank_; }
  [[nodiscard]] int world_size() const override { return world_.size(); }
  void send(int to, const Tag& tag, Parcel parcel) override {
    world_.send(rank_, to, tag, std::move(parcel));
  }
  Parcel receive(int from, const Tag& tag) override { return world_.receive(rank_, from, tag); }
  std::vector<Parcel> all_gather(std::vector<std::byte> mine) override {
    return world_.all_gather(rank_, std::move(mine));
  }
  void progress() override { world_.progress(rank_); }
  void abort(std::exception_ptr error) override { world_.abort(std::move(error)); }
  void check_alive() const override { world_.check_alive(); }
  std::int64_t next_call() override { return world_.next_call(rank_); }

 private:
  World& world_;
  int rank_;
};

void check_world(const char* operation, int size, const WorkerOptions& options) {
  if (size < 1) fail(operation, "world_size is ", size, ", expected at least 1");
  if (!(options.timeout_s > 0))
    fail(operation, "timeout_s is ", options.timeout_s, ", expected a positive number");
}

}  // namespace

inline namespace v1 {

struct ThreadWorld::Impl {
  World world;
  std::vector<ThreadCommunicator> ends;

  Impl(int size, WorkerOptions options) : world(size, std::move(options)) {
    for (int rank = 0; rank < size; ++rank) ends.emplace_back(world, rank);
  }
  ThreadCommunicator& end(int rank) {
    if (rank < 0 || rank >= world.size())
      fail("ThreadWorld", "rank is ", rank, ", expected 0 to ", world.size() - 1);
    return ends[static_cast<std::size_t>(rank)];
  }
};

ThreadWorld::ThreadWorld(int world_size, WorkerOptions options) {
  check_world("ThreadWorld", world_size, options);
  impl_ = std::make_unique<Impl>(world_size, std::move(options));
}
ThreadWorld::~ThreadWorld() = default;

Communicator& ThreadWorld::rank(int rank) { return impl_->end(rank); }
void ThreadWorld::leave(int rank) { impl_->world.leave(impl_->end(rank).rank()); }
std::exception_ptr ThreadWorld::error() const { return impl_->world.error(); }

void run_workers(int world_size, const std::function<void(Communicator&)>& body,
                 const WorkerOptions& options) {
  check_world("run_workers", world_size, options);
  ThreadWorld world(world_size, options);
  const auto run_rank = [&](int rank) {
    Communicator& comm = world.rank(rank);
    try {
      body(comm);
      world.leave(rank);
    } catch (...) {
      comm.abort(std::current_exception());
    }
  };
  {
    std::vector<std::jthread> threads;
    try {
      for (int rank = 1; rank < world_size; ++rank) threads.emplace_back(run_rank, rank);
    } catch (...) {  // no more threads: those that run must not wait for the rest
      world.rank(0).abort(std::make_exception_ptr(OutOfMemory(
          concat("run_workers: the system grants no thread for rank ", threads.size() + 1))));
    }
    run_rank(0);
  }
  if (const std::exception_ptr error = world.error()) std::rethrow_exception(error);
}

}  // namespace v1
}  // namespace annulus
