// Ctrl-C during a call: the calling thread runs tiles like any other, and looks for signals
// between two of them.
#pragma once

#include <nanobind/nanobind.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "annulus/error.h"

namespace annulus::python {

class SignalWatch {
 public:
  // Runs the call without the GIL; raises what a signal handler raised meanwhile.
  template <class Call>
  void run(const Call& call) {
    try {
      const nanobind::gil_scoped_release unlocked;
      call();
    } catch (const Interrupted&) {
      if (stopped_) throw nanobind::python_error();
      throw;
    }
  }

  // Asked by every thread of the call, often. Python runs handlers in its main thread only, so the
  // caller's thread alone has a say; the handler's exception stays with that thread.
  bool stop() {
    if (stopped_ || std::this_thread::get_id() != caller_) return stopped_;
    const auto now = Clock::now();
    if (now - last_look_ < std::chrono::milliseconds(20)) return false;
    last_look_ = now;
    const nanobind::gil_scoped_acquire locked;
    stopped_ = PyErr_CheckSignals() != 0;
    return stopped_;
  }

 private:
  using Clock = std::chrono::steady_clock;
  const std::thread::id caller_ = std::this_thread::get_id();
  Clock::time_point last_look_ = Clock::now();
  std::atomic<bool> stopped_{false};
};

}  // namespace annulus::python
