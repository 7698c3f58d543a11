// The instruction sets this build knows and this CPU has.
#pragma once

#include <string>
#include <vector>

#include "annulus/tensor.h"

namespace annulus {
inline namespace v1 {

struct Target {
  std::string name;  // scalar, emu128, ssse3, sse4, avx2, avx512, avx512_bf16, amx
  bool available = false;
  std::string reason;  // why not available, or what it is used for
};

// All of them, slowest first.
std::vector<Target> targets();

// The target that a call with inputs of this dtype runs on: `isa` if given (the highest one not
// above it that has a kernel for the dtype), else $ANNULUS_ISA, else the fastest. Throws
// Unsupported if this CPU lacks it, ConfigError for an unknown name in the environment,
// InvalidArgument for an unknown name in `isa`.
std::string chosen_target(DType dtype, const std::string& isa = {});

// FLOP/s of a register-only loop of the instruction that `target` multiplies with, timed for about
// `seconds`. peak_kind gives its name: amx_bf16, avx512_bf16 or fma_f32.
double measure_peak_flops(const std::string& target, DType dtype, double seconds);
std::string peak_kind(const std::string& target, DType dtype);

// "AMD EPYC ...", as the CPU names itself, and the number of CPUs this process may use (affinity
// and cgroup quota).
std::string cpu_name();
int allowed_cpus();

}  // namespace v1
}  // namespace annulus
