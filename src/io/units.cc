#include "io/units.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <span>

namespace annulus {
namespace {

// Keeps a number and its unit, and the groups of its digits, on one line.
constexpr std::string_view kThinSpace = "\u202f";

struct Step {
  double size;
  std::string_view name;
};

constexpr std::array<Step, 4> kTimes{{{1e-9, "ns"}, {1e-6, "µs"}, {1e-3, "ms"}, {1, "s"}}};
constexpr std::array<Step, 5> kBytes{
    {{1, "B"}, {1024.0, "KiB"}, {0x1p20, "MiB"}, {0x1p30, "GiB"}, {0x1p40, "TiB"}}};
constexpr std::array<Step, 5> kCounts{{{1, ""}, {1e6, "M"}, {1e9, "G"}, {1e12, "T"}, {1e15, "P"}}};

Unit pick(std::span<const Step> steps, double largest) {
  std::size_t chosen = 0;
  while (chosen + 1 < steps.size() && largest >= steps[chosen + 1].size) ++chosen;
  const double shown = largest / steps[chosen].size;
  const bool whole = chosen == 0;  // nothing is smaller than a nanosecond, a byte, a pair
  return {steps[chosen].size, steps[chosen].name,
          whole || shown >= 1000 ? 0
          : shown >= 100         ? 1
                                 : 2};
}

// Three significant digits where the unit has fractions.
std::string short_text(std::span<const Step> steps, double value) {
  Unit unit = pick(steps, std::abs(value));
  const double shown = std::abs(value) / unit.size;
  if (unit.decimals > 0) unit.decimals = shown >= 100 ? 0 : shown >= 10 ? 1 : 2;
  return with_unit(value, unit);
}

}  // namespace

Unit time_unit(double largest_seconds) { return pick(kTimes, largest_seconds); }
Unit byte_unit(double largest_bytes) { return pick(kBytes, largest_bytes); }
Unit count_unit(double largest) { return pick(kCounts, largest); }

std::string number(double value, const Unit& unit) {
  if (!std::isfinite(value)) return "-";
  std::string text = fmt::format("{:.{}f}", value / unit.size, unit.decimals);
  const std::size_t point = text.find('.');
  const std::size_t first = text.front() == '-' ? 1 : 0;
  std::size_t at = point == std::string::npos ? text.size() : point;
  while (at > first + 3) {
    at -= 3;
    text.insert(at, kThinSpace);
  }
  return text;
}

std::string with_unit(double value, const Unit& unit) {
  std::string text = number(value, unit);
  if (!unit.name.empty()) text.append(kThinSpace).append(unit.name);
  return text;
}

std::string time_text(double seconds) { return short_text(kTimes, seconds); }
std::string byte_text(double bytes) { return short_text(kBytes, bytes); }
std::string count_text(double count) { return short_text(kCounts, count); }
std::string grouped(std::int64_t count) { return number(static_cast<double>(count), {}); }

std::string percent(double share, int decimals) {
  if (!std::isfinite(share)) return "-";
  const double value = share * 100;
  if (value > 0 && value < 0.1) return fmt::format("<0.1{}%", kThinSpace);
  if (value > 99.9 && value < 100) return fmt::format(">99.9{}%", kThinSpace);
  const bool whole = value == std::floor(value);
  const int shown = whole ? 0 : value < 10 ? decimals : value < 99 ? decimals - 1 : 1;
  return fmt::format("{:.{}f}{}%", value, std::max(0, shown), kThinSpace);
}

}  // namespace annulus
