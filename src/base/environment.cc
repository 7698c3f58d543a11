#include "base/environment.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <string_view>
#include <vector>

#include "base/fail.h"

namespace annulus {
namespace {

constexpr std::string_view kPrefix = "ANNULUS_";
constexpr std::array<std::string_view, 8> kKnown = {
    "ANNULUS_ISA",     "ANNULUS_MPI_PLUGIN", "ANNULUS_THREADS",      "ANNULUS_TIMEOUT_S",
    "ANNULUS_VERBOSE", "ANNULUS_TRANSPORT",  "ANNULUS_VERBOSE_FILE", "ANNULUS_WORKERS"};

// In quotes, with everything but printable ASCII spelled out, and cut: names and values come from
// outside and must neither break a line nor steer a terminal.
std::string shown(std::string_view text) {
  constexpr std::string_view kHex = "0123456789abcdef";
  constexpr std::size_t kLongest = 80;
  std::string out = "'";
  for (const char c : text.substr(0, kLongest)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f && c != '\\' && c != '\'') {
      out += c;
    } else {
      out += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15U]};
    }
  }
  return out + (text.size() > kLongest ? "...'" : "'");
}

std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i + 1;
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, row[j] + 1, diagonal + 1});
    }
  }
  return row.back();
}

std::string_view nearest_known(std::string_view name) {
  const std::string_view start = name.substr(0, 64);  // the work grows with the square
  return *std::min_element(kKnown.begin(), kKnown.end(),
                           [&](std::string_view a, std::string_view b) {
                             return edit_distance(start, a) < edit_distance(start, b);
                           });
}

void check_names() {
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    const std::string_view line = *entry;
    const std::string_view name = line.substr(0, line.find('='));
    if (!name.starts_with(kPrefix)) continue;
    if (std::find(kKnown.begin(), kKnown.end(), name) != kKnown.end()) continue;
    fail_with_fix<ConfigError>(concat("unset it, or use ", nearest_known(name)), "environment",
                               "unknown variable ", shown(name), ", nearest known is ",
                               nearest_known(name));
  }
}

// An empty value is an unset one, as the shell's NAME= means it.
std::string_view value_of(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? std::string_view() : std::string_view(value);
}

[[noreturn]] void fail_value(std::string_view name, std::string_view value,
                             std::string_view expected) {
  fail_with_fix<ConfigError>(concat("set ", name, " to ", expected, ", or unset it"), "environment",
                             name, " is ", shown(value), ", expected ", expected);
}

std::optional<int> count_of(const char* name) {
  constexpr int kMost = 65536;
  const std::string_view value = value_of(name);
  if (value.empty()) return {};
  int count = 0;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), count);
  if (error != std::errc() || end != value.data() + value.size() || count < 1 || count > kMost) {
    fail_value(name, value, "a whole number from 1 to 65536");
  }
  return count;
}

std::optional<double> seconds_of(const char* name) {
  const std::string_view value = value_of(name);
  if (value.empty()) return {};
  if (value == "none") return std::numeric_limits<double>::infinity();
  double seconds = 0;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), seconds);
  if (error != std::errc() || end != value.data() + value.size() || !std::isfinite(seconds) ||
      seconds < 1) {
    fail_value(name, value, "a number of seconds, 1 or more, or none");
  }
  return seconds;
}

// Which names there are, the table of kernels knows; this one knows only what no name can be.
std::string isa() {
  const std::string_view value = value_of("ANNULUS_ISA");
  const auto of_a_name = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_';
  };
  if (value.size() > 32 || !std::all_of(value.begin(), value.end(), of_a_name)) {
    fail_value("ANNULUS_ISA", value, "the name of a target, as 'annulus doctor' lists them");
  }
  return std::string(value);
}

// What other builds will honour is refused here: silence would look like obedience.
void check_absent_features() {
  const std::string_view transport = value_of("ANNULUS_TRANSPORT");
  if (transport == "mpi") {
    fail_with_fix<ConfigError>("set ANNULUS_TRANSPORT to auto or inproc, or unset it",
                               "environment",
                               "ANNULUS_TRANSPORT is 'mpi', but this build has no MPI transport");
  }
  if (!transport.empty() && transport != "auto" && transport != "inproc") {
    fail_value("ANNULUS_TRANSPORT", transport, "auto or inproc");
  }
  for (const auto& [name, feature] :
       {std::pair{"ANNULUS_VERBOSE", "messages"}, std::pair{"ANNULUS_VERBOSE_FILE", "message file"},
        std::pair{"ANNULUS_MPI_PLUGIN", "MPI transport"}}) {
    const std::string_view value = value_of(name);
    if (value.empty()) continue;
    fail_with_fix<ConfigError>(concat("unset ", name), "environment", name, " is ", shown(value),
                               ", but this build has no ", feature);
  }
}

}  // namespace

Environment read_environment() {
  check_names();
  check_absent_features();
  return {.isa = isa(),
          .threads = count_of("ANNULUS_THREADS"),
          .workers = count_of("ANNULUS_WORKERS"),
          .timeout_s = seconds_of("ANNULUS_TIMEOUT_S")};
}

}  // namespace annulus
