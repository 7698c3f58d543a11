#include <tbb/blocked_range.h>
#include <tbb/global_control.h>
#include <tbb/info.h>
#include <tbb/parallel_for.h>
#include <tbb/partitioner.h>
#include <tbb/task_arena.h>
#include <tbb/task_group.h>

#include <algorithm>

#include "base/executor.h"

namespace annulus {
namespace {

// oneTBB writes a warning to standard error when an arena asks for more slots than its pool has.
int slots_for(int threads) {
  const auto allowed =
      tbb::global_control::active_value(tbb::global_control::max_allowed_parallelism);
  const int pool = std::min(tbb::info::default_concurrency(),
                            static_cast<int>(std::min<std::size_t>(allowed, 1 << 16)));
  return std::clamp(threads, 1, std::max(pool, 1));
}

}  // namespace

struct Executor::Impl {
  explicit Impl(int threads) : slots(slots_for(threads)), arena(slots) {}
  int slots;
  tbb::task_arena arena;
};

Executor::Executor(int threads)
    : threads_(std::max(threads, 1)), impl_(std::make_unique<Impl>(threads_)) {}

Executor::~Executor() = default;

void Executor::run(const std::function<void(int)>& body) {
  if (impl_->slots == 1) {
    for (int i = 0; i < threads_; ++i) body(i);
    return;
  }
  const tbb::blocked_range<int> all(0, threads_, 1);
  const auto run_some = [&](const tbb::blocked_range<int>& some) {
    for (int i = some.begin(); i < some.end(); ++i) body(i);
  };
  impl_->arena.execute([&] {
    // Isolated: if the caller runs inside tasks of its own and cancels them, a bound context would
    // skip our bodies without a word.
    tbb::task_group_context context(tbb::task_group_context::isolated);
    tbb::parallel_for(all, run_some, tbb::simple_partitioner(), context);
  });
}

}  // namespace annulus
