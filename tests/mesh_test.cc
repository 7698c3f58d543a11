// Groups of ranks and meshes: each ring is exactly a world of its own, whatever else its ranks do,
// and every fault names a rank of the whole world.

#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "annulus/error.h"
#include "annulus/mesh.h"
#include "testing.h"
#include "training_testing.h"

namespace annulus::testing {
namespace {

using Bytes = std::vector<std::byte>;

// Forward and backward of one rank, whose rows depend on the seed and its place in the ring.
std::vector<Bytes> train(Communicator& comm, unsigned seed, const RingOptions& options = {},
                         DType dtype = DType::kFloat32, std::int64_t len = 26) {
  const std::int64_t rows = options.partition.local_len(comm.rank(), comm.world_size(), len);
  Training t(dtype, {1, rows, rows, 2, 1, 16, 16}, seed + 10 * static_cast<unsigned>(comm.rank()));
  RingOptions o = options;
  o.attention.causal = true, o.attention.threads = 1;
  (void)ring_attention(comm, t.in.q, t.in.k, t.in.v, t.in.out.mutable_view(),
                       t.in.lse.mutable_view(), o);
  (void)ring_attention_backward(comm, t.dout, t.in.q, t.in.k, t.in.v, t.in.out, t.in.lse,
                                t.gradients(), o);
  return {t.in.out.bytes(), t.in.lse.bytes(), t.dq.bytes(), t.dk.bytes(), t.dv.bytes()};
}

// The same on a world of its own, by rank.
std::vector<std::vector<Bytes>> train_alone(int world_size, unsigned seed,
                                            const RingOptions& options = {},
                                            DType dtype = DType::kFloat32, std::int64_t len = 26) {
  std::vector<std::vector<Bytes>> results(static_cast<std::size_t>(world_size));
  run_workers(world_size, [&](Communicator& comm) {
    results[static_cast<std::size_t>(comm.rank())] = train(comm, seed, options, dtype, len);
  });
  return results;
}

std::vector<MeshAxis> two_by_three() { return {{"dp", 2}, {"sp", 3}}; }

TEST(Mesh, RanksAndCoordinates) {
  std::atomic<int> ranks{0};
  run_workers(12, [&](Communicator& comm) {
    Mesh mesh(comm, {{"dp", 2}, {"one", 1}, {"sp", 3}, {"tp", 2}});
    const int r = comm.rank();
    EXPECT_EQ(mesh.coordinates(), (std::vector<int>{r / 6, 0, r / 2 % 3, r % 2}));
    const int strides[] = {6, 6, 2, 1};
    for (std::size_t i = 0; i < 4; ++i) {
      Communicator& ring = mesh.ring(mesh.axes()[i].name);
      EXPECT_EQ(ring.rank(), mesh.coordinates()[i]);
      EXPECT_EQ(ring.world_size(), mesh.axes()[i].size);
      for (int at = 0; at < ring.world_size(); ++at)
        EXPECT_EQ(ring.world_rank(at), r + (at - ring.rank()) * strides[i]);
    }
    ++ranks;
  });
  EXPECT_EQ(ranks, 12);
}

TEST(Mesh, RingsAreWorldsOfTheirOwn) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (int variant = 0; variant < 4; ++variant) {
      RingOptions o;
      o.partition = variant % 2 == 0 ? Partition::zigzag() : Partition::contiguous();
      o.ring_backward = variant < 2 ? RingBackward::kKeys : RingBackward::kQueries;
      o.topology = variant % 3 == 0 ? Topology::kRing : Topology::kLinear;
      const auto first = train_alone(3, 100, o, dtype), second = train_alone(3, 200, o, dtype);
      for (const bool lend : {true, false}) {
        run_workers(6,
                    [&](Communicator& comm) {
                      Mesh mesh(comm, two_by_three());
                      const bool is_first = mesh.coordinates()[0] == 0;
                      const auto got = train(mesh.ring("sp"), is_first ? 100 : 200, o, dtype);
                      const auto& alone = is_first ? first : second;
                      EXPECT_EQ(got == alone[static_cast<std::size_t>(mesh.coordinates()[1])], true)
                          << name(dtype) << " variant " << variant << " rank " << comm.rank();
                    },
                    {.lend = lend, .stop = {}});
      }
    }
  }
}

TEST(Mesh, AnAxisOfOneIsARingOfOne) {
  const auto alone = train_alone(1, 300);
  run_workers(3, [&](Communicator& comm) {
    Mesh mesh(comm, {{"sp", 3}, {"one", 1}});
    EXPECT_EQ(train(mesh.ring("one"), 300) == alone[0], true);
    EXPECT_EQ(mesh.ring("one").all_gather(Bytes(3)).size(), 1U);
  });
  run_workers(1, [&](Communicator& comm) {
    Mesh mesh(comm, {});
    EXPECT_TRUE(mesh.coordinates().empty());
    EXPECT_NE(message_of<InvalidArgument>([&] { (void)mesh.ring("sp"); }).find("'sp'"),
              std::string::npos);
  });
}

// What rank r of a communicator says in a round: as many bytes as it likes, often none.
Bytes words(int world_rank, int round) {
  const int size = (world_rank * 7 + round * 5) % 4 * ((world_rank + round) % 3) * 50;
  return Bytes(static_cast<std::size_t>(size), static_cast<std::byte>(world_rank * 16 + round));
}

void gather_and_check(Communicator& comm, int round) {
  const auto parts = comm.all_gather(words(comm.world_rank(comm.rank()), round));
  ASSERT_EQ(parts.size(), static_cast<std::size_t>(comm.world_size()));
  for (int r = 0; r < comm.world_size(); ++r) {
    const auto bytes = parts[static_cast<std::size_t>(r)].bytes;
    EXPECT_EQ(Bytes(bytes.begin(), bytes.end()) == words(comm.world_rank(r), round), true);
  }
}

// Calls on both axes, on the whole and on a group across the axes, in an order that only the seed
// knows.
TEST(Mesh, CallsInterleave) {
  std::map<int, std::vector<std::vector<Bytes>>> alone;
  for (const int size : {2, 3, 4, 6}) alone[size] = train_alone(size, 400, {}, DType::kFloat32, 9);
  for (const bool lend : {true, false}) {
    run_workers(6,
                [&](Communicator& comm) {
                  Mesh mesh(comm, two_by_three());
                  std::unique_ptr<Communicator> across;  // in an order that is not theirs
                  if (comm.rank() % 5 != 0) across = sub_communicator(comm, {4, 1, 3, 2}, 7);
                  Communicator* all[] = {&comm, &mesh.ring("dp"), &mesh.ring("sp"), across.get()};
                  std::mt19937 order(5);
                  for (int round = 0; round < 300 / kTestScale; ++round) {
                    Communicator* at = all[order() % 4];
                    const bool gathers = order() % 2 == 0;
                    if (at == nullptr) continue;
                    if (gathers) {
                      gather_and_check(*at, round);
                    } else {
                      EXPECT_EQ(
                          train(*at, 400, {}, DType::kFloat32, 9) ==
                              alone.at(at->world_size())[static_cast<std::size_t>(at->rank())],
                          true)
                          << "round " << round << " rank " << comm.rank();
                    }
                  }
                },
                {.lend = lend, .stop = {}});
  }
}

TEST(Mesh, ManySmallCallsOnRingsThatDoNotWaitForEachOther) {
  run_workers(6, [](Communicator& comm) {
    Mesh mesh(comm, two_by_three());
    for (int round = 0; round < 500; ++round) gather_and_check(mesh.ring("sp"), round);
    for (int round = 0; round < 500; ++round) gather_and_check(mesh.ring("dp"), round);
    for (int round = 0; round < 100; ++round) {
      Mesh again(comm, {{"a", 3}, {"b", 2}});
      gather_and_check(again.ring(round % 2 == 0 ? "a" : "b"), round);
    }
  });
}

TEST(Mesh, AMeshWithinAMesh) {
  const auto alone = train_alone(3, 500);
  run_workers(12, [&](Communicator& comm) {
    Mesh outer(comm, {{"dp", 2}, {"rest", 6}});
    Mesh inner(outer.ring("rest"), two_by_three());
    Communicator& ring = inner.ring("sp");
    EXPECT_EQ(ring.world_rank(ring.rank()), comm.rank());
    EXPECT_EQ(train(ring, 500) == alone[static_cast<std::size_t>(ring.rank())], true);
    gather_and_check(inner.ring("dp"), 3);
  });
}

// Calls of any two communicators that share two ranks differ in number.
TEST(SubCommunicator, NumbersAreItsOwn) {
  std::mutex mutex;
  std::map<std::string, std::set<std::int64_t>> numbers;  // of rank 0 and 1 together
  run_workers(4, [&](Communicator& comm) {
    Mesh mesh(comm, {{"x", 2}, {"y", 2}}), twin(comm, {{"x", 2}, {"y", 2}});
    Mesh inner(mesh.ring("y"), {{"z", 2}});
    if (comm.rank() > 1) return;
    const auto one = sub_communicator(comm, {0, 1}, 1), two = sub_communicator(comm, {0, 1}, 2);
    const std::lock_guard lock(mutex);
    for (int i = 0; i < 3; ++i) {
      numbers["world"].insert(comm.next_call()), numbers["mesh"].insert(mesh.ring("y").next_call());
      numbers["twin"].insert(twin.ring("y").next_call()), numbers["one"].insert(one->next_call());
      numbers["inner"].insert(inner.ring("z").next_call()), numbers["two"].insert(two->next_call());
    }
  });
  std::set<std::int64_t> all;
  for (const auto& [name, own] : numbers) {
    EXPECT_EQ(own.size(), 3U) << name << ": the ranks' numbers differ";
    all.insert(own.begin(), own.end());
  }
  EXPECT_EQ(all.size(), 18U);
}

TEST(Mesh, Refusals) {
  const std::pair<std::vector<MeshAxis>, const char*> meshes[] = {
      {{{"dp", 2}, {"sp", 2}}, "axes 'dp=2 x sp=2' hold fewer ranks than the communicator's 6"},
      {{{"dp", 2}, {"sp", 4}}, "hold more ranks"},
      {{{"dp", 1 << 30}, {"sp", 1 << 30}, {"tp", 1 << 30}}, "hold more ranks"},
      {{}, "hold fewer ranks"},
      {{{"sp", 2}, {"sp", 3}}, "two axes have the name 'sp'"},
      {{{"dp", 2}, {"", 3}}, "axis 1 has no name"},
      {{{"dp", 6}, {"sp", 0}}, "axis 'sp' has size 0"},
      {{{"dp", -2}, {"sp", -3}}, "axis 'dp' has size -2"},
  };
  run_workers(6, [&](Communicator& comm) {
    for (const auto& [axes, expected] : meshes) {
      const std::string message = message_of<InvalidArgument>([&, &a = axes] { Mesh(comm, a); });
      EXPECT_NE(message.find(expected), std::string::npos) << message;
    }
    Mesh mesh(comm, two_by_three());
    const std::string message = message_of<InvalidArgument>([&] { (void)mesh.ring("tp"); });
    EXPECT_NE(message.find("no axis 'tp', expected one of: dp, sp"), std::string::npos) << message;
  });
}

TEST(SubCommunicator, Refusals) {
  struct Refused {
    std::vector<int> ranks;
    int id;
    const char* expected;
  };
  const Refused groups[] = {
      {{}, 1, "lacks 0"},       {{1, 2}, 1, "lacks 0"},     {{0, 1, 0}, 1, "has 0 twice"},
      {{0, 3}, 1, "has 3"},     {{-1, 0}, 1, "has -1"},     {{0, 1}, 0, "id is 0"},
      {{0, 1}, -4, "id is -4"}, {{0, 1}, 1 << 30, "id is"},
  };
  ThreadWorld world(3);
  for (const auto& [ranks, id, expected] : groups) {
    const std::string message = message_of<InvalidArgument>(
        [&, &r = ranks, i = id] { (void)sub_communicator(world.rank(0), r, i); });
    EXPECT_NE(message.find(expected), std::string::npos) << message;
  }
}

TEST(MeshFaults, AThrowingRankStopsAllWithItsError) {
  for (int culprit = 0; culprit < 6; ++culprit) {
    std::atomic<int> stopped{0};
    const std::string message = message_of<std::runtime_error>([&] {
      run_workers(6, [&](Communicator& comm) {
        if (comm.rank() == culprit) {
          Mesh mesh(comm, two_by_three());
          throw std::runtime_error("out of luck");
        }
        try {
          Mesh mesh(comm, two_by_three());
          for (;;) (void)train(mesh.ring("sp"), 600);  // one ring never meets the culprit
        } catch (const std::runtime_error&) {
          ++stopped;
          throw;
        }
      });
    });
    EXPECT_EQ(message, "out of luck");
    EXPECT_EQ(stopped, 5);
  }
}

void stay_silent(const Communicator& comm) {
  for (;;) {
    comm.check_alive();
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

TEST(MeshFaults, ASilentRankIsNamedByItsNumberInTheWorld) {
  for (const int silent : {1, 3, 5}) {
    for (const bool backward : {false, true}) {
      const auto begin = std::chrono::steady_clock::now();
      int named = -1;
      const std::string message = message_of<CommError>([&] {
        try {
          run_workers(6,
                      [&](Communicator& comm) {
                        Mesh mesh(comm, two_by_three());
                        if (backward) (void)train(mesh.ring("sp"), 700);
                        if (comm.rank() == silent) stay_silent(mesh.ring("sp"));
                        (void)train(mesh.ring("sp"), 700);
                      },
                      {.timeout_s = 0.5, .stop = {}});
        } catch (const CommError& error) {
          named = error.rank();
          throw;
        }
      });
      const std::string expected = "rank " + std::to_string(silent) + " is silent";
      EXPECT_NE(message.find(expected), std::string::npos) << message;
      EXPECT_EQ(named, silent);
      EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(10));
    }
  }
}

TEST(MeshFaults, WhoHasLeftIsNamed) {
  const std::string message = message_of<CommError>([] {
    run_workers(6, [](Communicator& comm) {
      Mesh mesh(comm, two_by_three());
      if (comm.rank() != 4) (void)train(mesh.ring("sp"), 800);
    });
  });
  EXPECT_NE(message.find("rank 4 has left"), std::string::npos) << message;
}

TEST(MeshFaults, RanksThatDisagree) {
  std::string message = message_of<CommError>([] {
    run_workers(6, [](Communicator& comm) {
      Mesh mesh(comm,
                comm.rank() == 3 ? std::vector<MeshAxis>{{"dp", 3}, {"sp", 2}} : two_by_three());
    });
  });
  EXPECT_NE(message.find("rank 0 has axes 'dp=2 x sp=3', rank 3 'dp=3 x sp=2'"), std::string::npos)
      << message;
  message = message_of<CommError>([] {
    run_workers(6, [](Communicator& comm) {
      Mesh mesh(comm, two_by_three());
      RingOptions o;
      if (comm.rank() == 5) o.attention.logits_soft_cap = 2;
      (void)train(mesh.ring("sp"), 900, o);
    });
  });
  EXPECT_NE(message.find("rank 3: "), std::string::npos) << message;
  EXPECT_NE(message.find(", rank 5: "), std::string::npos) << message;
}

TEST(MeshFaults, GroupsInAnotherOrderAreNamed) {
  const std::string message = message_of<CommError>([] {
    run_workers(2, [](Communicator& comm) {
      const auto one = sub_communicator(comm, {0, 1}, 1), two = sub_communicator(comm, {0, 1}, 2);
      (void)(comm.rank() == 0 ? one : two)->all_gather(Bytes(4));
    });
  });
  EXPECT_NE(message.find("gathering 1 of group 1"), std::string::npos) << message;
  EXPECT_NE(message.find("gathering 1 of group 2"), std::string::npos) << message;
}

}  // namespace
}  // namespace annulus::testing
