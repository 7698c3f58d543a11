#include "kernels/dispatch.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "base/cpu.h"
#include "base/environment.h"
#include "base/fail.h"
#include "hwy/targets.h"

namespace annulus {
namespace {

bool any_dtype(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16;
}
bool bfloat16_only(DType dtype) { return dtype == DType::kBFloat16; }
bool always() { return true; }
// Asked once: it is made of CPUID instructions, which trap in a virtual machine and together take
// longer than a small call.
template <std::int64_t kTarget>
bool highway_has() {
  static const auto supported = static_cast<std::int64_t>(hwy::SupportedTargets());
  return (supported & kTarget) != 0;
}

// One line per target, slowest first.
struct Entry {
  const char* name;
  bool (*available)();
  bool (*takes)(DType);
  const ForwardKernel* (*forward)();
  const BackwardKernel* (*backward)();
  const TermKernel* (*terms)();
  const char* use;
};

constexpr const char* kSimulated = "amx_simulated";  // for tests: by name only, and not listed

#if HWY_ARCH_X86
const Entry kEntries[] = {
    {"scalar", always, any_dtype, [] { return vector_forward("scalar"); },
     [] { return vector_backward("scalar"); }, [] { return vector_terms("scalar"); },
     "plain C++, for comparison"},
    {"ssse3", highway_has<HWY_SSSE3>, any_dtype, [] { return vector_forward("ssse3"); },
     [] { return vector_backward("ssse3"); }, [] { return vector_terms("ssse3"); },
     "float32 products, 4 lanes"},
    {"sse4", highway_has<HWY_SSE4>, any_dtype, [] { return vector_forward("sse4"); },
     [] { return vector_backward("sse4"); }, [] { return vector_terms("sse4"); },
     "float32 products, 4 lanes"},
    {"avx2", highway_has<HWY_AVX2>, any_dtype, [] { return vector_forward("avx2"); },
     [] { return vector_backward("avx2"); }, [] { return vector_terms("avx2"); },
     "float32 products, 8 lanes"},
    {"avx512", highway_has<HWY_AVX3>, any_dtype, [] { return vector_forward("avx512"); },
     [] { return vector_backward("avx512"); }, [] { return vector_terms("avx512"); },
     "float32 products, 16 lanes"},
    {"avx512_bf16", [] { return highway_has<HWY_AVX3>() && cpu_features().avx512_bf16; },
     bfloat16_only, avx512_bf16_forward, avx512_bf16_backward,
     [] { return vector_terms("avx512"); }, "bfloat16 dot products"},
    {kSimulated, highway_has<HWY_AVX3>, bfloat16_only, amx_simulated_forward,
     amx_simulated_backward, [] { return vector_terms("avx512"); },
     "the AMX kernel on simulated tiles"},
    {"amx", [] { return highway_has<HWY_AVX3>() && cpu_features().amx_bf16; }, bfloat16_only,
     amx_bf16_forward, amx_bf16_backward, [] { return vector_terms("avx512"); },
     "bfloat16 tile products"},
};
#else
const Entry kEntries[] = {
    {"scalar", always, any_dtype, [] { return vector_forward("scalar"); },
     [] { return vector_backward("scalar"); }, [] { return vector_terms("scalar"); },
     "plain C++, for comparison"},
    {"simd", [] { return vector_forward("simd") != nullptr; }, any_dtype,
     [] { return vector_forward("simd"); }, [] { return vector_backward("simd"); },
     [] { return vector_terms("simd"); }, "float32 products, 4 lanes"},
};
#endif

// The dot-product instruction halves the rate of float32 products on Intel's cores and doubles it
// on AMD's: there it is chosen by itself, elsewhere by name only.
bool chosen_by_itself(const Entry& entry) {
  const std::string name = entry.name;
  return name != kSimulated && (name != "avx512_bf16" || cpu_features().vendor == "AuthenticAMD");
}

std::string known_names() {
  std::string names;
  for (const Entry& entry : kEntries)
    names += (names.empty() ? "" : ", ") + std::string(entry.name);
  return names;
}

const Entry* find_entry(const std::string& name) {
  const auto* entry = std::find_if(std::begin(kEntries), std::end(kEntries),
                                   [&](const Entry& e) { return e.name == name; });
  return entry == std::end(kEntries) ? nullptr : entry;
}

const Entry& choose(DType dtype, const std::string& isa) {
  const std::string from_environment = isa.empty() ? read_environment().isa : "";
  const std::string& name = isa.empty() ? from_environment : isa;
  const Entry* limit = std::end(kEntries) - 1;
  if (!name.empty()) {
    limit = find_entry(name);
    const std::string fix = "use one of " + known_names();
    if (limit == nullptr && isa.empty())
      fail_with_fix<ConfigError>(fix, "environment", "ANNULUS_ISA is '", name,
                                 "', not a known target");
    if (limit == nullptr) fail_with_fix(fix, "isa", "'", name, "' is not a known target");
    if (!limit->available()) {
      fail_with_fix<Unsupported>("run 'annulus doctor' for the targets of this CPU", "isa",
                                 "this CPU has no ", name, " (", cpu_features().brand, ")");
    }
  }
  for (const Entry* entry = limit;; --entry) {
    const bool wanted = entry == limit && !name.empty();
    if (entry->available() && entry->takes(dtype) && (wanted || chosen_by_itself(*entry)))
      return *entry;
    if (entry == std::begin(kEntries)) break;
  }
  fail("isa", "no kernel takes inputs of type ", annulus::name(dtype));
}

}  // namespace

const ForwardKernel& choose_forward(DType dtype, const std::string& isa) {
  return *choose(dtype, isa).forward();
}

const BackwardKernel& choose_backward(DType dtype, const std::string& isa) {
  return *choose(dtype, isa).backward();
}
const TermKernel& choose_terms(DType dtype, const std::string& isa) {
  return *choose(dtype, isa).terms();
}

inline namespace v1 {

std::vector<Target> targets() {
  std::vector<Target> list;
  for (const Entry& entry : kEntries) {
    if (entry.name == kSimulated) continue;
    const bool available = entry.available();
    list.push_back({entry.name, available,
                    available ? entry.use : "this CPU or its operating system lacks it"});
  }
  return list;
}

std::string chosen_target(DType dtype, const std::string& isa) { return choose(dtype, isa).name; }

std::string peak_kind(const std::string& target, DType dtype) {
  const ForwardKernel& kernel = choose_forward(dtype, target);
  if (kernel.compute == Element::kFloat32) return "fma_f32";
  return std::string(kernel.target) == "amx" ? "amx_bf16" : "avx512_bf16";
}

double measure_peak_flops(const std::string& target, DType dtype, double seconds) {
  using Clock = std::chrono::steady_clock;
  const ForwardKernel& kernel = choose_forward(dtype, target);
  const auto timed = [&](std::int64_t rounds) {
    const auto begin = Clock::now();
    const double flop = kernel.peak_loop(rounds);
    return flop / std::chrono::duration<double>(Clock::now() - begin).count();
  };
  constexpr std::int64_t kProbe = 1000;  // 24 instructions each: tens of microseconds
  const double flop_per_round = kernel.peak_loop(1);
  const double rate = timed(kProbe);
  return timed(std::max<std::int64_t>(kProbe, std::llround(rate * seconds / flop_per_round)));
}

std::string cpu_name() { return cpu_features().brand; }

}  // namespace v1
}  // namespace annulus
