#include "process.h"

#include <malloc.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>

#include "failure.h"
#include "text.h"

namespace annulus::tools {
namespace {

namespace fs = std::filesystem;

static_assert(std::atomic<bool>::is_always_lock_free, "a signal handler may touch nothing else");
std::atomic<bool> g_stop{false};  // a handler has no other way to reach the program

// The number behind "Name:" in a file of the form of /proc/meminfo, in bytes; 0 if absent.
std::int64_t kib_field(const char* path, const std::string& name) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.rfind(name + ":", 0) != 0) continue;
    return std::strtoll(line.c_str() + name.size() + 1, nullptr, 10) * 1024;
  }
  return 0;
}

std::string first_line(const fs::path& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::optional<std::int64_t> integer_in(const fs::path& path) {
  const std::string line = first_line(path);
  char* end = nullptr;
  const std::int64_t value = std::strtoll(line.c_str(), &end, 10);
  if (end == line.c_str()) return {};  // absent, or "max"
  return value;
}

template <class T>
void tighten(std::optional<T>& limit, std::optional<T> other) {
  if (other && (!limit || *other < *limit)) limit = other;
}

// One control group, version 1 or 2; `rest` is what its members may still allocate, page cache
// counted as free.
struct Group {
  std::optional<std::int64_t> memory;
  std::optional<std::int64_t> rest;
  std::optional<double> cpus;
};

Group read_group_v2(const fs::path& path) {
  Group group;
  group.memory = integer_in(path / "memory.max");
  const auto used = integer_in(path / "memory.current");
  if (group.memory && used) {
    std::int64_t cache = 0;
    std::ifstream stat(path / "memory.stat");
    for (std::string name, value; stat >> name >> value;) {
      if (name == "inactive_file" || name == "active_file") cache += std::atoll(value.c_str());
    }
    group.rest = *group.memory - *used + cache;
  }
  std::istringstream quota(first_line(path / "cpu.max"));
  double microseconds = 0, period = 0;
  if (quota >> microseconds >> period && period > 0) group.cpus = microseconds / period;
  return group;
}

Group read_group_v1(const fs::path& memory, const fs::path& cpu) {
  constexpr std::int64_t kUnlimited = std::int64_t{1} << 60;  // version 1 writes a huge number
  Group group;
  group.memory = integer_in(memory / "memory.limit_in_bytes");
  if (group.memory && *group.memory > kUnlimited) group.memory.reset();
  const auto used = integer_in(memory / "memory.usage_in_bytes");
  if (group.memory && used) group.rest = *group.memory - *used;
  const auto quota = integer_in(cpu / "cpu.cfs_quota_us");
  const auto period = integer_in(cpu / "cpu.cfs_period_us");
  if (quota && period && *quota > 0 && *period > 0) {
    group.cpus = static_cast<double>(*quota) / static_cast<double>(*period);
  }
  return group;
}

// The strictest of all groups from this process's own up to the root. Inside a container the paths
// in /proc/self/cgroup may not exist below the mount; the mount's root then is the group.
Group read_groups() {
  const fs::path mount = "/sys/fs/cgroup";
  Group strictest;
  const auto add = [&](const Group& group) {
    tighten(strictest.memory, group.memory);
    tighten(strictest.rest, group.rest);
    tighten(strictest.cpus, group.cpus);
  };
  std::ifstream list("/proc/self/cgroup");
  for (std::string line; std::getline(list, line);) {
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool known =
        controllers.empty() || controllers == "memory" || controllers.find("cpu") == 0;
    for (fs::path path = line.substr(second + 1); known; path = path.parent_path()) {
      const fs::path below = path.relative_path();
      add(controllers.empty() ? read_group_v2(mount / below)
                              : read_group_v1(mount / "memory" / below, mount / "cpu" / below));
      if (!path.has_relative_path()) break;
    }
  }
  return strictest;
}

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? std::string() : std::string(value);
}

}  // namespace

std::int64_t resident_bytes() { return kib_field("/proc/self/status", "VmRSS"); }
std::int64_t peak_resident_bytes() { return kib_field("/proc/self/status", "VmHWM"); }

Limits read_limits() {
  const Group group = read_groups();
  Limits limits;
  limits.memory_total = kib_field("/proc/meminfo", "MemTotal");
  limits.memory_available = kib_field("/proc/meminfo", "MemAvailable");
  if (group.rest && *group.rest < limits.memory_available) limits.memory_available = *group.rest;
  limits.cgroup_memory = group.memory;
  limits.cgroup_cpus = group.cpus;
  return limits;
}

void require_memory(std::int64_t planned_bytes) {
  const std::int64_t available = read_limits().memory_available;
  if (available <= 0 || planned_bytes <= available) return;
  fail<OutOfMemory>("use fewer tokens, heads or workers, or a machine with more memory",
                    "the plan needs {}, but only {} are available",
                    byte_text(static_cast<double>(planned_bytes)),
                    byte_text(static_cast<double>(available)));
}

void return_freed_memory() {
#ifdef __GLIBC__
  mallopt(M_MMAP_THRESHOLD, 128 << 10);
  mallopt(M_ARENA_MAX, 2);
#endif
}

void install_stop_handler() {
  struct sigaction action {};
  action.sa_handler = [](int) { g_stop = true; };
  action.sa_flags = static_cast<int>(SA_RESETHAND) | SA_RESTART;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

bool stop_requested() { return g_stop; }

void check_stop() {
  if (stop_requested()) fail<Interrupted>("", "stopped by a signal");
}

void refuse_launchers() {
  if (variable("ANNULUS_TRANSPORT") == "inproc")
    return;  // each process was asked to compute on its own
  // WORLD_SIZE alone may be anybody's; torchrun sets LOCAL_RANK beside it.
  const char* const torchrun = variable("LOCAL_RANK").empty() ? "LOCAL_RANK" : "WORLD_SIZE";
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", torchrun}) {
    const std::string value = variable(name);
    if (std::atoi(value.c_str()) <= 1) continue;
    fail<Unsupported>(
        "start one process with --workers=P, or set ANNULUS_TRANSPORT=inproc to let each process "
        "compute alone",
        "a launcher started {} processes ({}={}), but this build has no MPI transport to join them",
        value, name, value);
  }
}

bool environment_limits_isa() { return !variable("ANNULUS_ISA").empty(); }

std::optional<int> workers_from_environment() {
  const std::string value = variable("ANNULUS_WORKERS");
  if (value.empty()) return {};
  char* end = nullptr;
  const std::int64_t workers = std::strtoll(value.c_str(), &end, 10);
  if (*end != '\0' || workers < 1 || workers > 65536) {
    fail<ConfigError>(
        "set ANNULUS_WORKERS to a whole number from 1 to 65536, or unset it",
        "environment: ANNULUS_WORKERS is '{}', expected a whole number from 1 to 65536", value);
  }
  return static_cast<int>(workers);
}

std::optional<double> timeout_from_environment() {
  const std::string value = variable("ANNULUS_TIMEOUT_S");
  if (value.empty()) return {};
  if (value == "none") return std::numeric_limits<double>::infinity();
  char* end = nullptr;
  const double seconds = std::strtod(value.c_str(), &end);
  if (*end != '\0' || !(seconds >= 1)) {
    fail<ConfigError>("set ANNULUS_TIMEOUT_S to 1 or more seconds or to none, or unset it",
                      "environment: ANNULUS_TIMEOUT_S is '{}', expected 1 or more, or none", value);
  }
  return seconds;
}

}  // namespace annulus::tools
