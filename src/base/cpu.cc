#include "base/cpu.h"

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string_view>
#include <thread>
#include <vector>

#include "annulus/targets.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace annulus {
namespace {

#if defined(__x86_64__)

struct Cpuid {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  explicit Cpuid(std::uint32_t leaf, std::uint32_t subleaf = 0) {
    __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx);
  }
};

constexpr bool all_bits(std::uint64_t word, std::initializer_list<int> bits) {
  return std::all_of(bits.begin(), bits.end(), [&](int n) { return ((word >> n) & 1U) != 0; });
}

// Which registers the operating system saves. By hand: the intrinsic needs a compiler flag.
std::uint64_t saved_registers(const Cpuid& leaf1) {
  if (!all_bits(leaf1.ecx, {27})) return 0;  // OSXSAVE
  std::uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

// Linux gives the 8 KB of tile registers only to a process that asks. Empty if it gave them.
std::string ask_for_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return {};
  return std::string("the kernel refuses the tile registers: ") + std::strerror(errno);
#else
  return "this operating system is not known to give the tile registers";
#endif
}

std::string amx_refusal(const CpuFeatures& features, const Cpuid& leaf7, std::uint64_t saved) {
  if (!all_bits(leaf7.edx, {22, 24})) return "this CPU has no AMX bfloat16 instructions";
  if (!features.avx512) return "AVX-512 is missing beside AMX";
  if (!all_bits(saved, {17, 18})) return "the operating system does not save the tile registers";
  return ask_for_tiles();
}

std::string vendor_text() {
  const Cpuid leaf0(0);
  std::string text(12, ' ');
  std::memcpy(text.data(), &leaf0.ebx, 4);
  std::memcpy(text.data() + 4, &leaf0.edx, 4);
  std::memcpy(text.data() + 8, &leaf0.ecx, 4);
  return text;
}

std::string brand_text() {
  constexpr std::uint32_t kFirst = 0x80000002U;
  std::string text;
  for (std::uint32_t leaf = kFirst; leaf < kFirst + 3; ++leaf) {
    const Cpuid part(leaf);
    const std::array<std::uint32_t, 4> words = {part.eax, part.ebx, part.ecx, part.edx};
    text.append(reinterpret_cast<const char*>(words.data()), sizeof words);
  }
  // Hypervisors put anything here, and it is printed.
  std::erase_if(text, [](char c) { return c < ' ' || c > '~'; });
  const std::size_t begin = text.find_first_not_of(' ');
  if (begin == std::string::npos) return "x86-64 CPU";
  return text.substr(begin, text.find_last_not_of(' ') - begin + 1);
}

CpuFeatures detect() {
  CpuFeatures features;
  const Cpuid leaf1(1), leaf7(7);
  const std::uint64_t saved = saved_registers(leaf1);
  const bool ymm = all_bits(saved, {1, 2});
  const bool zmm = all_bits(saved, {1, 2, 5, 6, 7});
  features.avx2 = ymm && all_bits(leaf1.ecx, {12, 28, 29}) &&  // FMA, AVX, F16C
                  all_bits(leaf7.ebx, {3, 5, 8});              // BMI1, AVX2, BMI2
  features.avx512 = zmm && features.avx2 && all_bits(leaf7.ebx, {16, 17, 28, 30, 31});
  features.avx512_bf16 = features.avx512 && leaf7.eax >= 1 && all_bits(Cpuid(7, 1).eax, {5});
  features.amx_reason = amx_refusal(features, leaf7, saved);
  features.amx_bf16 = features.amx_reason.empty();
  features.vendor = vendor_text();
  features.brand = brand_text();
  return features;
}

#else

CpuFeatures detect() {
  CpuFeatures features;
  features.amx_reason = "not an x86-64 CPU";
  features.brand = "not an x86-64 CPU";
  return features;
}

#endif

using Path = std::filesystem::path;

std::optional<double> first_number(const Path& file) {
  std::ifstream in(file);
  double value = 0;
  if (in >> value) return value;
  return {};
}

// The number after `key` in lines "key value" or "key: value kB".
std::optional<double> keyed_number(const Path& file, std::string_view key) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    std::istringstream words(line);
    std::string name;
    double value = 0;
    if (words >> name >> value && name == key) return value;
  }
  return {};
}

// From the group of this process up to the mount. Inside a container the path may name a folder
// outside: then only the mount itself is there, which is right.
std::vector<Path> folders_up(const Path& mount, const std::string& group) {
  std::vector<Path> folders{mount};
  for (const Path& part : Path(group).relative_path()) {
    if (part != "..") folders.push_back(folders.back() / part);
  }
  return folders;
}

void limit_cpus(CgroupLimits& limits, double quota, double period) {
  if (quota > 0 && period > 0) limits.cpus = std::min(limits.cpus, quota / period);
}

void limit_memory(CgroupLimits& limits, std::optional<double> limit, std::optional<double> used,
                  std::optional<double> cache) {
  constexpr double kNoLimit = 1e18;  // version 1 writes a number near 2^63
  if (!limit || *limit > kNoLimit) return;
  const double left = std::max(0.0, *limit - used.value_or(0) + cache.value_or(0));
  limits.memory_bytes = std::min(limits.memory_bytes, static_cast<std::int64_t>(*limit));
  limits.memory_left_bytes =
      std::min(limits.memory_left_bytes, static_cast<std::int64_t>(std::min(left, *limit)));
}

void read_version2(CgroupLimits& limits, const Path& folder) {
  std::ifstream cpu(folder / "cpu.max");  // "max 100000" fails to parse: no limit
  double quota = 0, period = 0;
  if (cpu >> quota >> period) limit_cpus(limits, quota, period);
  limit_memory(limits, first_number(folder / "memory.max"), first_number(folder / "memory.current"),
               keyed_number(folder / "memory.stat", "inactive_file"));
}

void read_version1_cpu(CgroupLimits& limits, const Path& folder) {
  limit_cpus(limits, first_number(folder / "cpu.cfs_quota_us").value_or(-1),
             first_number(folder / "cpu.cfs_period_us").value_or(0));
}

void read_version1_memory(CgroupLimits& limits, const Path& folder) {
  limit_memory(limits, first_number(folder / "memory.limit_in_bytes"),
               first_number(folder / "memory.usage_in_bytes"),
               keyed_number(folder / "memory.stat", "total_inactive_file"));
}

bool lists(std::string_view controllers, std::string_view name) {
  const std::string all = "," + std::string(controllers) + ",";
  return all.find("," + std::string(name) + ",") != std::string::npos;
}

int cpus_in_affinity_mask() {
#if defined(__linux__)
  constexpr int kMostCpus = 1 << 16;
  for (int cpus = 1024; cpus <= kMostCpus; cpus *= 4) {
    std::vector<cpu_set_t> mask(static_cast<std::size_t>(cpus) / (8 * sizeof(cpu_set_t)));
    const std::size_t size = mask.size() * sizeof(cpu_set_t);
    if (sched_getaffinity(0, size, mask.data()) == 0) return CPU_COUNT_S(size, mask.data());
  }
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

std::int64_t meminfo_bytes(std::string_view key) {
  return static_cast<std::int64_t>(keyed_number("/proc/meminfo", key).value_or(0)) * 1024;
}

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

CgroupLimits read_cgroup_limits(const Path& root) {
  CgroupLimits limits;
  const Path mount = root / "sys/fs/cgroup";
  std::ifstream groups(root / "proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // "4:memory:/path", "0::/path"
    const std::size_t first = line.find(':');
    const std::size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string group = line.substr(second + 1);
    if (controllers.empty()) {
      for (const Path& folder : folders_up(mount, group)) read_version2(limits, folder);
    }
    if (lists(controllers, "cpu")) {
      for (const Path& folder : folders_up(mount / "cpu", group)) read_version1_cpu(limits, folder);
    }
    if (lists(controllers, "memory")) {
      for (const Path& folder : folders_up(mount / "memory", group))
        read_version1_memory(limits, folder);
    }
  }
  return limits;
}

std::int64_t total_memory_bytes() {
  return std::min(meminfo_bytes("MemTotal:"), read_cgroup_limits().memory_bytes);
}

std::int64_t available_memory_bytes() {
  return std::min(meminfo_bytes("MemAvailable:"), read_cgroup_limits().memory_left_bytes);
}

inline namespace v1 {

int allowed_cpus() {
  // Rounded down: threads beyond the quota make all of them stop together when it is spent. Read
  // once: the files take 200 us, ten times a small call.
  static const double quota = std::floor(std::max(1.0, read_cgroup_limits().cpus));
  const int cpus = std::max(1, cpus_in_affinity_mask());
  return quota < cpus ? static_cast<int>(quota) : cpus;
}

}  // namespace v1
}  // namespace annulus
