// The AMX entries of the kernel table: one kernel over the hardware's tiles, the same over tiles in
// plain C++, which proves it on CPUs without AMX. Both need AVX-512 (F, BW, DQ, VL).
//
// Everything compiled for these instructions is in the anonymous namespace, and no header but the
// kernel's own is included inside the target region, so the linker finds nothing here that it could
// put in the place of code for older CPUs.
#include <math.h>
#include <string.h>

#include <cstdint>

#include "kernels/kernel_table.h"
#include "kernels/softmax_reference.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // in GCC 12's own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16")
#endif

#include "kernels/amx_backward-inl.h"
#include "kernels/amx_forward-inl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC diagnostic pop
#pragma GCC pop_options
#endif
#endif

namespace annulus {

const ForwardKernel* amx_bf16_forward();
const ForwardKernel* amx_simulated_forward();
const BackwardKernel* amx_bf16_backward();
const BackwardKernel* amx_simulated_backward();

#if defined(__x86_64__)
namespace {

template <class T>
constexpr ForwardKernel forward_table(const char* target) {
  return {.target = target,
          .arithmetic = "bf16 products, float32 accumulation",
          .compute = Element::kBFloat16,
          .strip_rows = kStripRows,
          .tile_keys = kTileKeys,
          .blocking = blocking,
          .panel_step = panel_step,
          .strip_bytes = strip_bytes,
          .scratch_bytes = scratch_bytes<T>,
          .packed_bytes = packed_bytes,
          .pack = pack,
          .start = start,
          .panel = panel<T>,
          .finish = finish,
          .peak_loop = peak_loop<T>};
}

template <class T>
constexpr BackwardKernel backward_table(const char* target) {
  return {.target = target,
          .arithmetic = "bf16 products, p and ds, float32 accumulation",
          .compute = Element::kBFloat16,
          .strip_rows = kStripRows,
          .tile_keys = kTileKeys,
          .blocking = backward_blocking,
          .most = {kMaxTiles * kTileKeys, kMaxStrips * kStripRows},
          .scratch_bytes = backward_scratch_bytes,
          .packed_bytes = backward_packed_bytes,
          .strip_bytes = backward_strip_bytes,
          .row_floats = whole_units,
          .dq_rows = whole_units,
          .pack_keys = pack_backward_keys,
          .pack_strip = pack_backward_strip,
          .block = backward_block<T>,
          .unload_dq = unload_dq};
}

constexpr ForwardKernel kHardware = forward_table<HardwareTiles>("amx");
constexpr ForwardKernel kSimulated = forward_table<SimulatedTiles>("amx_simulated");
constexpr BackwardKernel kHardwareBackward = backward_table<HardwareTiles>("amx");
constexpr BackwardKernel kSimulatedBackward = backward_table<SimulatedTiles>("amx_simulated");

}  // namespace

const ForwardKernel* amx_bf16_forward() { return &kHardware; }
const ForwardKernel* amx_simulated_forward() { return &kSimulated; }
const BackwardKernel* amx_bf16_backward() { return &kHardwareBackward; }
const BackwardKernel* amx_simulated_backward() { return &kSimulatedBackward; }
#else
const ForwardKernel* amx_bf16_forward() { return nullptr; }
const ForwardKernel* amx_simulated_forward() { return nullptr; }
const BackwardKernel* amx_bf16_backward() { return nullptr; }
const BackwardKernel* amx_simulated_backward() { return nullptr; }
#endif

}  // namespace annulus
