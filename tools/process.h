// What surrounds the call: memory, control groups, signals, and what a launcher said. The only file
// of the tools that reads environment variables.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace annulus::tools {

std::int64_t resident_bytes();       // now
std::int64_t peak_resident_bytes();  // since the start

// 0 or infinity where nothing is known or limited.
struct Limits {
  std::int64_t memory_total = 0;
  std::int64_t memory_available = 0;  // without swapping; the control group's rest if that is less
  std::optional<std::int64_t> cgroup_memory;  // the strictest limit around this process
  std::optional<double> cgroup_cpus;          // quota / period
};
Limits read_limits();

// Throws OutOfMemory if the plan cannot fit: better now than by the kernel's out-of-memory killer
// in the middle.
void require_memory(std::int64_t planned_bytes);

// From now on blocks of 128 KiB and more go back to the system when they are freed, and threads
// share the rest. By itself the C library soon keeps all of them for reuse, per thread, and
// gradients that travel would pile up there.
void return_freed_memory();

// From now on SIGINT and SIGTERM ask the program to stop; a second one ends it at once.
void install_stop_handler();
bool stop_requested();
// Throws Interrupted if so.
void check_stop();

// Throws Unsupported if a launcher started several processes: n lonely ranks would each compute
// everything.
void refuse_launchers();

// ANNULUS_ISA is set; the library reads it.
bool environment_limits_isa();
// ANNULUS_WORKERS and ANNULUS_TIMEOUT_S (infinity for "none"). Throw ConfigError.
std::optional<int> workers_from_environment();
std::optional<double> timeout_from_environment();

}  // namespace annulus::tools
