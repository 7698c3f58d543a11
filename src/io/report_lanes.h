// The events of each worker as bars along the time axis, few enough to draw.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "io/report_parts.h"

namespace annulus {

// Where a time is on the picture.
struct TimeAxis {
  std::int64_t begin_ns = 0;
  double span_ns = 1;
  double width = 1;  // px
  [[nodiscard]] double x(std::int64_t ns) const {
    return width * static_cast<double>(ns - begin_ns) / span_ns;
  }
};

// One bar: an event, or several of one kind too close to tell apart.
struct Mark {
  double begin = 0;  // px
  double end = 0;
  const Event* first = nullptr;
  const Event* last = nullptr;
  std::int64_t events = 0;
  std::int64_t ns = 0;  // of all of them
  [[nodiscard]] double width() const { return end - begin; }
};

struct Lane {
  int rank = 0;
  std::array<std::vector<const Event*>, kEventKinds> events;
  std::array<std::vector<Mark>, kEventKinds> marks;
};

struct Lanes {
  TimeAxis axis;
  std::vector<Lane> lanes;  // by rank
  std::size_t events = 0;
  std::size_t marks = 0;
  double resolution = 1;  // px; events closer than this may have been joined

  // lanes.size() if the rank has none.
  [[nodiscard]] std::size_t lane_of(int rank) const;
};

Lanes make_lanes(const PageData& data, double width);

}  // namespace annulus
