#include "progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <utility>
namespace annulus::tools {

bool progress_is_visible(bool quiet) { return !quiet && isatty(STDERR_FILENO) != 0; }

Progress::Progress(bool visible, std::string what, std::function<double()> share)
    : what_(std::move(what)), share_(std::move(share)) {
  if (!visible) return;
  thread_ = std::thread([this] {
    using Clock = std::chrono::steady_clock;
    const auto begin = Clock::now();
    std::unique_lock lock(mutex_);
    while (!finished_.wait_for(lock, std::chrono::milliseconds(500), [this] { return done_; })) {
      const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
      if (seconds > 1) show(seconds);
    }
    if (shown_) fmt::print(stderr, "\r\x1b[K");
    std::fflush(stderr);
  });
}

Progress::~Progress() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    done_ = true;
  }
  finished_.notify_all();
  thread_.join();
}

void Progress::show(double seconds) {
  const double share = share_ ? share_() : -1;
  if (share != share_shown_) share_shown_ = share, share_since_ = seconds;
  // Shares come in jumps; between two of them the time left runs down.
  const double left = share_since_ / share * (1 - share) - (seconds - share_since_);
  const std::string far =
      share > 0.01 ? fmt::format("{:.0f} %, {:.0f} s left", share * 100, std::max(left, 0.0))
                   : fmt::format("{:.0f} s", seconds);
  fmt::print(stderr, "\r\x1b[Kannulus: {} {}", what_, far);
  std::fflush(stderr);
  shown_ = true;
}

double share_computed(const Recorder& recorder, std::int64_t pairs) {
  if (pairs <= 0) return -1;
  std::int64_t done = 0;
  for (const Event& event : recorder.events()) {
    if (event.kind == EventKind::kCompute) done += event.pairs;
  }
  return done > 0 ? std::min(1.0, static_cast<double>(done) / static_cast<double>(pairs)) : -1;
}

}  // namespace annulus::tools
