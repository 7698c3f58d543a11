#include <algorithm>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "base/executor.h"

namespace annulus {

struct Executor::Impl {};

Executor::Executor(int threads) : threads_(std::max(threads, 1)) {}

Executor::~Executor() = default;

void Executor::run(const std::function<void(int)>& body) {
  std::mutex mutex;
  std::exception_ptr first_error;
  const auto guarded = [&](int i) {
    try {
      body(i);
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!first_error) first_error = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> others;
    others.reserve(static_cast<std::size_t>(threads_ - 1));
    for (int i = 1; i < threads_; ++i) others.emplace_back(guarded, i);
    guarded(0);
  }
  if (first_error) std::rethrow_exception(first_error);
}

}  // namespace annulus
