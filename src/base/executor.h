// Runs the work of one worker on its threads. oneTBB in products, plain threads in TSan builds
// (which cannot see into oneTBB); CMake picks the file.
#pragma once

#include <functional>
#include <memory>

namespace annulus {

class Executor {
 public:
  explicit Executor(int threads);
  ~Executor();
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  [[nodiscard]] int threads() const { return threads_; }
  // Calls body(0) ... body(threads - 1), perhaps one after the other, and returns when all are
  // done. Bodies take their work from a shared counter, so any number of real threads is right. The
  // first exception is rethrown. A body may wait only for work that another body has already taken.
  void run(const std::function<void(int)>& body);

 private:
  int threads_;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace annulus
