#include "text.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

namespace annulus::tools {
namespace {

struct Unit {
  double size;
  const char* name;
};

// Three significant digits in the largest unit that leaves at least 1.
template <std::size_t kUnits>
std::string with_unit(double value, const std::array<Unit, kUnits>& units) {
  if (!std::isfinite(value)) return "-";
  std::size_t i = 0;
  while (i + 1 < kUnits && std::abs(value) >= units[i + 1].size) ++i;
  const double scaled = value / units[i].size;
  const bool whole = scaled == std::floor(scaled) || std::abs(scaled) >= 100;
  const int decimals = whole ? 0 : std::abs(scaled) >= 10 ? 1 : 2;
  const std::string text = fmt::format("{:.{}f}", scaled, decimals);
  return *units[i].name == '\0' ? text : text + " " + units[i].name;
}

}  // namespace

std::string byte_text(double bytes) {
  return with_unit<5>(
      bytes, {{{1, "B"}, {0x1p10, "KiB"}, {0x1p20, "MiB"}, {0x1p30, "GiB"}, {0x1p40, "TiB"}}});
}

std::string time_text(double seconds) {
  return with_unit<4>(seconds, {{{1e-9, "ns"}, {1e-6, "us"}, {1e-3, "ms"}, {1, "s"}}});
}

std::string flops_text(double flops_per_s) {
  return with_unit<3>(flops_per_s, {{{1e6, "MFLOP/s"}, {1e9, "GFLOP/s"}, {1e12, "TFLOP/s"}}});
}

std::string count_text(double count) {
  if (count < 1e6) return grouped(std::llround(count));
  return with_unit<5>(count, {{{1, ""}, {1e6, "M"}, {1e9, "G"}, {1e12, "T"}, {1e15, "P"}}});
}

std::string grouped(std::int64_t count) {
  std::string text = std::to_string(count);
  const std::size_t first = count < 0 ? 1 : 0;
  for (std::size_t at = text.size(); at > first + 3;) {
    at -= 3;
    text.insert(at, " ");
  }
  return text;
}

std::string percent_text(double share) {
  return std::isfinite(share) ? fmt::format("{:.1f} %", share * 100) : "-";
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

std::string short_name(std::string_view dtype) {
  if (dtype == "bfloat16") return "bf16";
  if (dtype == "float16") return "f16";
  if (dtype == "float32") return "f32";
  return std::string(dtype);
}

std::string Table::text() const {
  const std::size_t columns = rows_.front().size();
  std::vector<std::size_t> width(columns, 0);
  std::vector<bool> numbers(columns, true), used(columns, rows_.size() == 1);
  for (std::size_t c = 0; c < columns; ++c) {
    for (std::size_t r = 0; r < rows_.size(); ++r) {
      const std::string& cell = rows_[r][c];
      width[c] = std::max(width[c], cell.size());
      if (r == 0 || cell.empty()) continue;
      used[c] = true;
      if (cell.find_first_of("0123456789-+.") != 0) numbers[c] = false;
    }
  }
  std::string text;
  for (const auto& row : rows_) {
    std::string line;
    for (std::size_t c = 0; c < columns; ++c) {
      if (!used[c]) continue;
      line += numbers[c] ? fmt::format("{:>{}}  ", row[c], width[c])
                         : fmt::format("{:<{}}  ", row[c], width[c]);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  }
  return text;
}

}  // namespace annulus::tools
