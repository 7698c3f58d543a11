// Ranks in threads that are somebody else's: the same results as workers, and no rank waits for one
// that is gone.

#include <array>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "annulus/error.h"
#include "testing.h"

namespace annulus::testing {
namespace {

using Bytes = std::vector<std::byte>;

// One rank's call on rows of its own.
Bytes attend(Communicator& comm, std::int64_t rows = 9) {
  Inputs in(DType::kFloat32, {1, rows, rows, 2, 1, 16, 16},
            static_cast<unsigned>(40 + 3 * comm.rank()));
  RingOptions o;
  o.attention.causal = true, o.attention.threads = 1;
  (void)ring_attention(comm, in.q, in.k, in.v, in.out.mutable_view(), in.lse.mutable_view(), o);
  return in.out.bytes();
}

std::string message_of(const std::exception_ptr& error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const std::exception& e) {
    return e.what();
  }
  return "no error";
}

// Threads as a caller has them, who follows the rules. What each rank met, by rank.
std::vector<std::string> meet(ThreadWorld& world, int size,
                              const std::function<void(Communicator&)>& body) {
  std::vector<std::string> messages(static_cast<std::size_t>(size), "no error");
  std::vector<std::jthread> threads;
  threads.reserve(messages.size());
  for (int r = 0; r < size; ++r) {
    threads.emplace_back([&, r] {
      try {
        body(world.rank(r));
        world.leave(r);
      } catch (...) {
        messages[static_cast<std::size_t>(r)] = message_of(std::current_exception());
        world.rank(r).abort(std::current_exception());
      }
    });
  }
  threads.clear();
  return messages;
}

TEST(ThreadWorld, GivesTheBitsOfWorkers) {
  std::array<Bytes, 3> workers, threads;
  run_workers(3, [&](Communicator& comm) {
    workers[static_cast<std::size_t>(comm.rank())] = attend(comm);
  });
  ThreadWorld world(3);
  for (int calls = 0; calls < 2; ++calls) {  // threads may change from call to call
    std::vector<std::jthread> pool;
    pool.reserve(3);
    for (int r = 0; r < 3; ++r)
      pool.emplace_back([&, r] { threads[static_cast<std::size_t>(r)] = attend(world.rank(r)); });
    pool.clear();
    EXPECT_EQ(threads == workers, true);
  }
  EXPECT_EQ(world.error(), nullptr);
}

TEST(ThreadWorld, ManyShortWorlds) {
  for (int round = 0; round < 300 / kTestScale; ++round) {
    ThreadWorld world(1 + round % 4);
    const int size = world.rank(0).world_size();
    const auto messages = meet(world, size, [](Communicator& comm) {
      for (const std::size_t bytes : {0, 5, 1}) (void)comm.all_gather(Bytes(bytes));
      (void)attend(comm, 2);
    });
    for (const std::string& message : messages) EXPECT_EQ(message, "no error");
  }
}

TEST(ThreadWorld, AnErrorOfOneRankStopsAll) {
  ThreadWorld world(4);
  const auto messages = meet(world, 4, [](Communicator& comm) {
    if (comm.rank() == 2) throw std::runtime_error("out of luck");
    (void)attend(comm);
  });
  EXPECT_EQ(messages, std::vector<std::string>(4, "out of luck"));
  EXPECT_EQ(message_of(world.error()), "out of luck");
}

// Even without a deadline.
TEST(ThreadWorld, WhoHasLeftIsNamedAtOnce) {
  for (int leaver = 0; leaver < 3; ++leaver) {
    ThreadWorld world(3, {.timeout_s = std::numeric_limits<double>::infinity(), .stop = {}});
    const auto messages = meet(world, 3, [&](Communicator& comm) {
      (void)attend(comm);
      if (comm.rank() != leaver) (void)attend(comm);
    });
    const std::string expected = "rank " + std::to_string(leaver) + " has left";
    EXPECT_NE(message_of(world.error()).find(expected), std::string::npos)
        << message_of(world.error());
    for (int r = 0; r < 3; ++r) {
      const std::string& message = messages[static_cast<std::size_t>(r)];
      EXPECT_EQ(message.find(expected) != std::string::npos, r != leaver) << message;
    }
  }
}

// What a rank has sent before it left is not lost.
TEST(ThreadWorld, MessagesOutliveTheirSender) {
  ThreadWorld world(2, {.timeout_s = 5, .stop = {}});
  const auto bytes = std::make_shared<const Bytes>(16, std::byte{7});
  const Tag tag{1, Channel::kBlocks, 1, 0, 16};
  world.rank(0).send(1, tag, {*bytes, bytes});
  world.leave(0);
  EXPECT_EQ(world.rank(1).receive(0, tag).bytes[15], std::byte{7});
  EXPECT_THROW((void)world.rank(1).receive(0, tag), CommError);
}

TEST(ThreadWorld, ARankThatNeverComesIsNamed) {
  ThreadWorld world(3, {.timeout_s = 0.2, .stop = {}});
  const auto messages = meet(world, 2, [](Communicator& comm) { (void)attend(comm); });
  for (const std::string& message : messages)
    EXPECT_NE(message.find("rank 2 is silent in phase 'start'"), std::string::npos) << message;
}

TEST(ThreadWorld, Refusals) {
  EXPECT_THROW(ThreadWorld(0), InvalidArgument);
  EXPECT_THROW(ThreadWorld(2, {.timeout_s = 0, .stop = {}}), InvalidArgument);
  EXPECT_THROW(ThreadWorld(2, {.timeout_s = NAN, .stop = {}}), InvalidArgument);
  ThreadWorld world(2);
  EXPECT_THROW((void)world.rank(2), InvalidArgument);
  EXPECT_THROW((void)world.rank(-1), InvalidArgument);
  EXPECT_THROW(world.leave(2), InvalidArgument);
}

}  // namespace
}  // namespace annulus::testing
