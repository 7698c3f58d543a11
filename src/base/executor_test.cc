#include "base/executor.h"

#include <gtest/gtest.h>

#include <atomic>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <vector>

namespace annulus {
namespace {

TEST(Executor, CallsEveryBodyOnce) {
  for (const int threads : {1, 2, 3, 7, 64}) {
    Executor executor(threads);
    EXPECT_EQ(executor.threads(), threads);
    std::vector<std::atomic<int>> calls(static_cast<std::size_t>(threads));
    executor.run([&](int i) { ++calls[static_cast<std::size_t>(i)]; });
    for (const auto& count : calls) EXPECT_EQ(count, 1) << threads << " threads";
  }
}

TEST(Executor, TreatsFewerThanOneThreadAsOne) {
  for (const int threads : {0, -3}) {
    Executor executor(threads);
    int calls = 0;
    executor.run([&](int i) { calls += i == 0 ? 1 : 100; });
    EXPECT_EQ(executor.threads(), 1);
    EXPECT_EQ(calls, 1);
  }
}

TEST(Executor, RunsAgain) {
  Executor executor(2);
  std::atomic<int> sum = 0;
  for (int round = 0; round < 100; ++round) executor.run([&](int i) { sum += i + 1; });
  EXPECT_EQ(sum, 300);
}

TEST(Executor, SharesWorkThroughACounter) {
  Executor executor(4);
  constexpr int kItems = 10000;
  std::vector<int> visits(kItems);
  std::atomic<int> next = 0;
  executor.run([&](int) {
    for (int item = next++; item < kItems; item = next++) ++visits[static_cast<std::size_t>(item)];
  });
  EXPECT_EQ(std::accumulate(visits.begin(), visits.end(), 0), kItems);
}

TEST(Executor, RethrowsAnExceptionAndRunsAgain) {
  for (const int threads : {1, 4}) {
    Executor executor(threads);
    EXPECT_THROW(executor.run([&](int i) {
      if (i == threads - 1) throw std::out_of_range("body");
    }),
                 std::out_of_range);
    EXPECT_THROW(executor.run([](int) { throw std::range_error("all bodies"); }), std::range_error);
    std::atomic<int> calls = 0;
    executor.run([&](int) { ++calls; });
    EXPECT_EQ(calls, threads);
  }
}

TEST(Executor, WorkersDoNotMixTheirBodies) {
  constexpr int kWorkers = 4;
  std::vector<int> wrong(kWorkers);
  {
    std::vector<std::jthread> workers;
    workers.reserve(kWorkers);
    for (int worker = 0; worker < kWorkers; ++worker) {
      workers.emplace_back([&wrong, worker] {
        Executor executor(2);
        for (int round = 0; round < 200; ++round) {
          std::atomic<int> sum = 0;
          executor.run([&](int i) { sum += worker * 10 + i; });
          if (sum != worker * 20 + 1) ++wrong[static_cast<std::size_t>(worker)];
        }
      });
    }
  }
  EXPECT_EQ(std::accumulate(wrong.begin(), wrong.end(), 0), 0);
}

TEST(Executor, SaysNothingWhenAskedForManyThreads) {
  testing::internal::CaptureStderr();
  Executor executor(512);
  std::atomic<int> calls = 0;
  executor.run([&](int) { ++calls; });
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "");
  EXPECT_EQ(calls, 512);
}

}  // namespace
}  // namespace annulus
