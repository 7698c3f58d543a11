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
  int waits_for = -1;  // rank; -1: computing
  std::string phase = "start";
  std::int64_t call = 0;
};

Parcel parcel_of(std::vector<std::byte> bytes) {
  const auto owned = std::make_shared<const std::vector<std::byte>>(std::move(bytes));
  return {std::span<const std::byte>(*owned), owned};
}

// Copies blocks to where kernels can read them.
Parcel aligned_copy(std::span<const std::byte> bytes) {
  const auto size = static_cast<std::int64_t>(bytes.size());
  const auto owned = std::make_shared<const AlignedBuffer>(size);
  if (size > 0) std::memcpy(owned->data(), bytes.data(), bytes.size());
  return parcel_of(owned);
}

struct Gathering {
  std::vector<Parcel> parts;
  int arrived = 0;
  int left = 0;
};

class World {
 public:
  World(int size, WorkerOptions options) : options_(std::move(options)), ranks_(size) {}

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
    wait(lock, rank, from, concat("step ", want.step), [&] { return !box.empty(); });
    Message message = std::move(box.front());
    box.pop_front();
    const Tag& got = message.tag;
    if (got.call != want.call || got.step != want.step || got.owner != want.owner ||
        got.bytes != want.bytes ||
        static_cast<std::int64_t>(message.parcel.bytes.size()) != want.bytes) {
      throw CommError(ErrorCode::kPeerMismatch,
                      concat("ring: rank ", rank, " expected call ", want.call, " step ", want.step,
                             " block ", want.owner, " of ", want.bytes, " bytes from rank ", from,
                             ", found call ", got.call, " step ", got.step, " block ", got.owner,
                             " of ", message.parcel.bytes.size(), " bytes"),
                      from, "make the same calls in the same order on every rank");
    }
    return std::move(message.parcel);
  }

  std::vector<Parcel> all_gather(int rank, std::vector<std::byte> mine) {
    std::unique_lock lock(mutex_);
    // A rank may be one gathering ahead of the others, never two.
    wait(lock, rank, -1, "gather", [&] { return gathering_.left == 0; });
    if (gathering_.arrived == 0) gathering_.parts.assign(ranks_.size(), {});
    gathering_.parts[static_cast<std::size_t>(rank)] = parcel_of(std::move(mine));
    gathering_.arrived += 1;
    here_.resize(ranks_.size());
    here_[static_cast<std::size_t>(rank)] = true;
    if (gathering_.arrived == size())
      gathering_.left = size(), gathering_.arrived = 0, here_.assign(ranks_.size(), false);
    moved_.notify_all();
    wait(lock, rank, -1, "gather", [&] { return gathering_.left > 0; });
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

  void finish(int rank) {
    const std::lock_guard lock(mutex_);
    ranks_[static_cast<std::size_t>(rank)].phase = "returned";
    ranks_[static_cast<std::size_t>(rank)].waits_for = rank;
  }

  [[nodiscard]] std::exception_ptr error() const { return error_; }

 private:
  void throw_if_failed() {
    if (!error_ && options_.stop && options_.stop()) {
      error_ = std::make_exception_ptr(Interrupted("ring: stopped by the caller"));
      moved_.notify_all();
    }
    if (error_) std::rethrow_exception(error_);
  }

  // Waits for `ready`. `from` is the rank waited for, -1 for everybody. Looks up every 50 ms: for a
  // stop, and whether the chain of waits ends at a rank that has been silent for the whole timeout.
  template <class Ready>
  void wait(std::unique_lock<std::mutex>& lock, int rank, int from, const std::string& phase,
            Ready ready) {
    RankState& me = ranks_[static_cast<std::size_t>(rank)];
    throw_if_failed();
    me.waits_for = from, me.phase = phase, me.last_progress = Clock::now();
    const auto begin = Clock::now();
    while (!ready()) {
      moved_.wait_for(lock, std::chrono::milliseconds(50));
      throw_if_failed();
      if (!ready() && seconds_since(begin) > options_.timeout_s) blame(rank);
    }
    me.waits_for = -1, me.phase = "compute", me.last_progress = Clock::now();
  }

  static double seconds_since(Clock::time_point time) {
    return std::chrono::duration<double>(Clock::now() - time).count();
  }

  // Follows who waits for whom from `rank` to the end; throws if the rank there has not moved for
  // the timeout. Slow is not dead: a rank that made progress ends the search and the wait goes on.
  void blame(int rank) {
    std::string chain = concat("rank ", rank);
    int at = rank;
    for (int hops = 0; hops < size(); ++hops) {
      const int next = culprit_of(at);
      if (next < 0 || next == at) break;
      at = next;
      chain += concat(" waits for rank ", at);
    }
    const RankState& state = ranks_[static_cast<std::size_t>(at)];
    const bool returned = state.phase == "returned";
    if (!returned && seconds_since(state.last_progress) <= options_.timeout_s) return;
    throw CommError(
        ErrorCode::kPeerTimeout,
        concat("ring: rank ", at, returned ? " has left without taking part" : " is silent",
               " in phase '", state.phase, "' for ", seconds_since(state.last_progress), " s (",
               chain, ")"),
        at, "look at that rank; a larger timeout helps only if it is slow, not stuck");
  }

  int culprit_of(int rank) const {
    const RankState& state = ranks_[static_cast<std::size_t>(rank)];
    if (state.waits_for >= 0) return state.waits_for;
    if (state.phase != "gather") return -1;
    for (int r = 0; r < size(); ++r) {
      const bool here = !here_.empty() && here_[static_cast<std::size_t>(r)];
      if (!here) return r;
    }
    return -1;
  }

  const WorkerOptions options_;
  std::mutex mutex_;
  std::condition_variable moved_;
  std::map<std::tuple<int, int, Channel>, std::deque<Message>> boxes_;
  Gathering gathering_;
  std::vector<bool> here_;
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

}  // namespace

inline namespace v1 {

void run_workers(int world_size, const std::function<void(Communicator&)>& body,
                 const WorkerOptions& options) {
  if (world_size < 1) fail("run_workers", "world_size is ", world_size, ", expected at least 1");
  if (!(options.timeout_s > 0))
    fail("run_workers", "timeout_s is ", options.timeout_s, ", expected a positive number");
  World world(world_size, options);
  const auto run_rank = [&](int rank) {
    ThreadCommunicator comm(world, rank);
    try {
      body(comm);
      world.finish(rank);
    } catch (...) {
      world.abort(std::current_exception());
    }
  };
  {
    std::vector<std::jthread> threads;
    try {
      for (int rank = 1; rank < world_size; ++rank) threads.emplace_back(run_rank, rank);
    } catch (...) {  // no more threads: those that run must not wait for the rest
      world.abort(std::make_exception_ptr(OutOfMemory(
          concat("run_workers: the system grants no thread for rank ", threads.size() + 1))));
    }
    run_rank(0);
  }
  if (world.error()) std::rethrow_exception(world.error());
}

}  // namespace v1
}  // namespace annulus
