// The entries of the kernel table around StripPass: sizes, packing, starting, finishing.

#include <math.h>
#include <string.h>

#include "hwy/highway.h"
#include "kernels/kernel_table.h"
#include "kernels/strip_pass-inl.h"

ANNULUS_PUSH_TARGET
namespace annulus {
namespace HWY_NAMESPACE {
namespace {

template <class A>
Blocking BlockingOf(Dims dims) {
  // Two panels of K and V and the item's Q^T and O^T share an L2 of 1 MB: bf16, d = 128: 512 + 288
  // KB. Wider rows take shorter panels; beyond 512 bytes more rows pay for the shorter panel's
  // traffic.
  const std::int64_t widest = dims.head_dim > dims.v_head_dim ? dims.head_dim : dims.v_head_dim;
  const std::int64_t row_bytes = widest * 4 / A::kPer;
  return {row_bytes > 256 ? 256 : 512, row_bytes > 512 ? 768 : 384};
}

std::int64_t PanelStep(Dims /*dims*/) { return kKeys; }

template <class A>
std::int64_t StripBytes(Dims dims) {
  const Sizes<A> sizes(dims);
  return ((8 + sizes.v_rows + sizes.steps) * kWidth * 4 + 63) / 64 * 64;
}

template <class A>
std::int64_t ScratchBytes(Dims dims) {
  const std::int64_t rows =
      2 * (Sizes<A>(dims).steps + Sizes<A>(dims).v_rows) * 4;  // pack()'s are the caller's stack
  return (3 * kKeys * kWidth + kBlock * kWidth / A::kPer) * 4 + rows + 256;
}

template <class A>
std::int64_t PackedBytes(Dims dims, std::int64_t num_keys) {
  const Sizes<A> sizes(dims);
  return (sizes.k_bytes(num_keys) + sizes.v_bytes(num_keys) + sizes.PadKeys(num_keys) / kKeys +
          63) /
         64 * 64;
}

template <class A>
void PackKeys(void* packed, const RowSource& k, const RowSource& v, Dims dims,
              std::int64_t num_keys, std::int64_t key_begin, std::int64_t key_end) {
  const Sizes<A> sizes(dims);
  char* k_out = static_cast<char*>(packed);
  char* v_out = k_out + sizes.k_bytes(num_keys);
  auto* poisoned = reinterpret_cast<std::uint8_t*>(v_out + sizes.v_bytes(num_keys));
  for (std::int64_t tile = key_begin; tile < key_end; tile += kKeys) {
    const void *k_rows[kKeys], *v_rows[kKeys];
    RowsOfTile(k, tile, num_keys, k_rows), RowsOfTile(v, tile, num_keys, v_rows);
    TransposeTile<A>(k_rows, k, dims.head_dim, sizes.steps, k_out + tile * sizes.k_row_bytes());
    char* v_tile = v_out + tile / A::kPer * sizes.v_step_bytes();
    A::PackValues(v_tile, v_rows, kKeys, v, dims.v_head_dim, sizes.v_rows);
    poisoned[tile / kKeys] = A::AnyNotFinite(v_tile, kKeys / A::kPer * sizes.v_rows) ? 1 : 0;
  }
}

template <class A>
void StartStrip(void* memory, const void* const* rows, std::int64_t count,
                std::int64_t dim_stride_bytes, Element element, Dims dims) {
  const Sizes<A> sizes(dims);
  const Strip z = Strip::At(memory, sizes);
  const RowSource source{nullptr, nullptr, 0, dim_stride_bytes, element};
  TransposeStrip<A>(rows, count, source, dims.head_dim, sizes.steps, z.qt);
  memset(z.o, 0, static_cast<std::size_t>(sizes.v_rows * kWidth * 4));
  for (int n = 0; n < kWidth; ++n) {
    z.m[n] = 0, z.l[n] = 0, z.w[n] = 0, z.b[n] = 0, z.guard[n] = -INFINITY, z.f[n] = 1;
    z.base[n] = 0, z.base_natural[n] = 0;
  }
}

template <class A>
void RunPanel(const PanelCall& call) {
  const Sizes<A> sizes(call.dims);
  Scratch scratch;
  scratch.s[0] = static_cast<float*>(call.scratch);
  scratch.s[1] = scratch.s[0] + kKeys * kWidth;
  scratch.raw = scratch.s[1] + kKeys * kWidth;
  scratch.p = reinterpret_cast<char*>(scratch.raw + kKeys * kWidth);
  // The next panel's lines, dealt over all slots of this one.
  const char *next_k = nullptr, *next_v = nullptr;
  std::int64_t lines = 0, per_slot = 1;
  if (call.next_begin >= 0) {
    const char* packed = static_cast<const char*>(call.packed);
    next_k = packed + call.next_begin * sizes.k_row_bytes();
    next_v =
        packed + sizes.k_bytes(call.num_keys) + call.next_begin / A::kPer * sizes.v_step_bytes();
    const std::int64_t left = call.num_keys - call.next_begin;
    const std::int64_t keys = left < call.key_count ? left : call.key_count;
    const std::int64_t k_lines = keys * sizes.k_row_bytes() / 64,
                       v_lines = keys / A::kPer * sizes.v_step_bytes() / 64;
    lines = k_lines > v_lines ? k_lines : v_lines;
    const std::int64_t slots = call.key_count / kKeys * StripPass<A>::kPairs * call.strip_count;
    per_slot = lines / (slots > 0 ? slots : 1) + 1;
  }
  for (std::int64_t i = 0; i < call.strip_count; ++i) {
    StripPass<A> pass(call, call.strips[i], scratch);
    pass.AimPrefetch(next_k, next_v, lines, per_slot);
    pass.Run();
    next_k = pass.prefetch_k(), next_v = pass.prefetch_v(), lines = pass.prefetch_lines();
  }
}

// log(e^a + e^b), exact for -inf on either side.
inline double LogAddExp(double a, double b) {
  const double top = a > b ? a : b, low = a > b ? b : a;
  return low == -INFINITY ? top : top + log1p(exp(low - top));
}

template <class A>
void FinishStrip(const void* memory, const float* sinks, float keep_scale, float* out,
                 std::int64_t out_stride, float* lse, Dims dims) {
  const Sizes<A> sizes(dims);
  const Strip z = Strip::At(const_cast<void*>(memory), sizes);
  alignas(64) float factor[kWidth];
  for (int n = 0; n < kWidth; ++n) {
    const float weights = A::kRoundsP ? z.w[n] : z.l[n];
    const double seen = static_cast<double>(z.base_natural[n]) +
                        kLn2 * static_cast<double>(z.m[n]) + log(static_cast<double>(z.l[n]));
    if (z.l[n] == 0) {  // nothing seen
      lse[n] = sinks[n], factor[n] = 0;
      continue;
    }
    // Without a sink the exponential is 1; it is NaN where l is, which rounded weights may hide.
    const double total = LogAddExp(seen, static_cast<double>(sinks[n]));
    lse[n] = static_cast<float>(total);
    factor[n] = static_cast<float>(exp(seen - total)) / weights * keep_scale;
  }
  TransposeOut(z.o, kWidth, factor, dims.v_head_dim, out, out_stride);
}

template <class A>
double PeakLoop(std::int64_t rounds) {
  V acc[kPeakAccumulators];
  ANNULUS_UNROLL for (int j = 0; j < kPeakAccumulators; ++j) acc[j] = hn::Zero(kF);
  V one = hn::Zero(kF);
  Pin(one);
  for (std::int64_t i = 0; i < rounds; ++i) {
    ANNULUS_UNROLL for (int j = 0; j < kPeakAccumulators; ++j) acc[j] = A::Dot(acc[j], one, one);
    ANNULUS_UNROLL for (int j = 0; j < kPeakAccumulators; ++j) Pin(acc[j]);
  }
  return static_cast<double>(rounds) * kPeakAccumulators * kLanes * A::kPer * 2;
}

template <class A>
constexpr ForwardKernel MakeKernel(const char* target, const char* arithmetic, Element compute) {
  return {target,        arithmetic,    compute,       kWidth,          kKeys,
          BlockingOf<A>, PanelStep,     StripBytes<A>, ScratchBytes<A>, PackedBytes<A>,
          PackKeys<A>,   StartStrip<A>, RunPanel<A>,   FinishStrip<A>,  PeakLoop<A>};
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace annulus
ANNULUS_POP_TARGET
