// One line on standard error that says how far a long call is, for people at a terminal.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

#include "annulus/record.h"

namespace annulus::tools {

// True where somebody would see the line.
bool progress_is_visible(bool quiet);

// Shows "computing 42 %, 12 s left" from the second second on, until it is destroyed. `share` is
// asked from another thread, twice a second; a negative share is unknown.
class Progress {
 public:
  Progress(bool visible, std::string what, std::function<double()> share);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

 private:
  void show(double seconds);

  const std::string what_;
  const std::function<double()> share_;
  std::mutex mutex_;
  std::condition_variable finished_;
  bool done_ = false;
  bool shown_ = false;
  double share_shown_ = -1;
  double share_since_ = 0;  // seconds after the start
  std::thread thread_;
};

// Share of `pairs` that the recorder has seen computed; unknown until the first block is done.
double share_computed(const Recorder& recorder, std::int64_t pairs);

}  // namespace annulus::tools
