// What this machine has and what this process may use of it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <limits>
#include <string>

namespace annulus {

// True only if the operating system saves the registers too.
struct CpuFeatures {
  bool avx2 = false;    // with FMA, F16C, BMI1, BMI2
  bool avx512 = false;  // F, BW, DQ, VL, CD
  bool avx512_bf16 = false;
  bool amx_bf16 = false;   // the kernel was asked for the tile registers and gave them
  std::string amx_reason;  // why not; empty if amx_bf16
  std::string vendor;      // "AuthenticAMD"
  std::string brand;       // "AMD EPYC ..."
};

// Looked up once; the first call asks the kernel for the tile registers.
const CpuFeatures& cpu_features();

// The strictest limits of the control groups around this process, versions 1 and 2.
struct CgroupLimits {
  double cpus = std::numeric_limits<double>::infinity();
  std::int64_t memory_bytes = std::numeric_limits<std::int64_t>::max();
  std::int64_t memory_left_bytes =
      std::numeric_limits<std::int64_t>::max();  // page cache counts as free
};

// `root` stands for "/": tests bring a tree of their own. What cannot be read is not a limit.
CgroupLimits read_cgroup_limits(const std::filesystem::path& root = "/");

// Of the machine, or of the control group if that is less. 0 if unknown.
std::int64_t total_memory_bytes();
std::int64_t available_memory_bytes();

}  // namespace annulus
