// How the ranks of a ring reach each other. In one process the ranks are threads; other transports
// implement the same class. Every wait has a deadline and every failure reaches every rank: a rank
// that throws calls abort(), after which all waits of all ranks throw.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace annulus {
inline namespace v1 {

// Bytes on their way. The receiver may read them as long as it holds keep_alive. A transport that
// copies delivers parcels of send() 64-byte aligned: kernels read blocks in place.
struct Parcel {
  std::span<const std::byte> bytes;
  std::shared_ptr<const void> keep_alive;
};

// Kinds of messages between two ranks; each keeps its order, and one may overtake another.
enum class Channel : std::uint8_t {
  kBlocks,     // what travels round the ring
  kGradients,  // gradients of travelling blocks, from one rank that added to them to the next
  kHome,       // complete gradients, back to the block's owner
  kGather,     // bytes for everybody in a group of ranks
};

// What a message says of itself; sender and receiver must agree in every field.
struct Tag {
  std::int64_t call = 0;  // number of the call on this communicator
  Channel channel = Channel::kBlocks;
  int step = 0;   // ring step in which the block is used; gradients: place in the block's way
  int owner = 0;  // rank whose block this is
  std::int64_t bytes = 0;
};

class Communicator {
 public:
  virtual ~Communicator() = default;
  [[nodiscard]] virtual int rank() const = 0;
  [[nodiscard]] virtual int world_size() const = 0;
  // What errors call a rank: its number in the whole world where this is a part of one.
  [[nodiscard]] virtual int world_rank(int rank) const { return rank; }

  // Hands a parcel to rank `to`; returns at once. A transport that lends passes the memory itself,
  // one that copies copies it.
  virtual void send(int to, const Tag& tag, Parcel parcel) = 0;
  // Waits for the next parcel of the tag's channel from rank `from`, which must have this tag.
  // Throws CommError: PeerMismatch naming both tags, PeerTimeout naming the rank everyone waits
  // for.
  virtual Parcel receive(int from, const Tag& tag) = 0;
  // Everybody's bytes, by rank. All ranks call it; also a barrier.
  virtual std::vector<Parcel> all_gather(std::vector<std::byte> mine) = 0;

  // The calling rank got somewhere. Deadlines count from the last progress of the rank that is
  // waited for.
  virtual void progress() = 0;
  // Stops every rank: their waits throw the given error. The first abort wins.
  virtual void abort(std::exception_ptr error) = 0;
  // Throws if some rank aborted or the process was asked to stop. Cheap; polled once per work item.
  virtual void check_alive() const = 0;
  // Number of the next call, equal on all ranks that make the same calls.
  virtual std::int64_t next_call() = 0;
};

struct WorkerOptions {
  double timeout_s = 30;  // of silence; must be > 0; infinity for none
  bool lend = true;       // receivers read a neighbour's block in place instead of copying it
  std::function<bool()> stop{};  // polled; true ends the call with Interrupted
};

// Ranks that live in threads which the caller already has. The world must outlive their calls.
//
//   ThreadWorld world(2);
//   // in the thread that is rank r:
//   try {
//     ring_attention(world.rank(r), ...);
//     world.leave(r);
//   } catch (...) {
//     world.rank(r).abort(std::current_exception());  // the others stop with this error
//   }
//
// Throws InvalidArgument.
class ThreadWorld {
 public:
  explicit ThreadWorld(int world_size, WorkerOptions options = {});
  ~ThreadWorld();
  ThreadWorld(const ThreadWorld&) = delete;
  ThreadWorld& operator=(const ThreadWorld&) = delete;

  // What rank `rank` speaks through, one call at a time. Lives as long as the world.
  [[nodiscard]] Communicator& rank(int rank);
  // The rank takes no part any more. Who waits for it then or later gets a CommError that names it,
  // at once; what it has sent still arrives.
  void leave(int rank);
  // The error that stopped the ranks; null while none has.
  [[nodiscard]] std::exception_ptr error() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Runs body(comm) on world_size ranks, each a thread of this process, and returns when all are
// done. The first exception of any rank stops the others and is rethrown here.
void run_workers(int world_size, const std::function<void(Communicator&)>& body,
                 const WorkerOptions& options = {});

}  // namespace v1
}  // namespace annulus
