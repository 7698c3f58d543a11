// The float32 kernels of every Highway target, one entry each. bfloat16 and float16 inputs are
// widened when packed.

#include "kernels/dispatch.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/vector_forward.cc"
// Vector lengths that are not constants cannot be elements of a tile.
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#include "hwy/foreach_target.h"
//
#include "hwy/highway.h"
#include "kernels/forward-inl.h"

HWY_BEFORE_NAMESPACE();
namespace annulus {
namespace HWY_NAMESPACE {

const ForwardKernel* Entry() {
#if HWY_TARGET == HWY_AVX3
  constexpr const char* kName = "avx512";
#elif HWY_TARGET == HWY_AVX2
  constexpr const char* kName = "avx2";
#elif HWY_TARGET == HWY_SSE4
  constexpr const char* kName = "sse4";
#elif HWY_TARGET == HWY_SSSE3
  constexpr const char* kName = "ssse3";
#elif HWY_TARGET == HWY_EMU128 || HWY_TARGET == HWY_SCALAR
  constexpr const char* kName = "scalar";
#else
  constexpr const char* kName = "simd";  // NEON, VSX, WASM
#endif
  static constexpr ForwardKernel kKernel =
      MakeKernel<Float32>(kName, "float32 products, float32 accumulation", Element::kFloat32);
  return &kKernel;
}

}  // namespace HWY_NAMESPACE
}  // namespace annulus
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace annulus {

const ForwardKernel* vector_forward(const std::string& target) {
  using Getter = const ForwardKernel* (*)();
  static constexpr Getter kGetters[] = {
    &HWY_NAMESPACE::Entry,  // of the last pass: the baseline
#if (HWY_TARGETS & HWY_SSSE3) && HWY_STATIC_TARGET != HWY_SSSE3
    &N_SSSE3::Entry,
#endif
#if (HWY_TARGETS & HWY_SSE4) && HWY_STATIC_TARGET != HWY_SSE4
    &N_SSE4::Entry,
#endif
#if (HWY_TARGETS & HWY_AVX2) && HWY_STATIC_TARGET != HWY_AVX2
    &N_AVX2::Entry,
#endif
#if (HWY_TARGETS & HWY_AVX3) && HWY_STATIC_TARGET != HWY_AVX3
    &N_AVX3::Entry,
#endif
  };
  for (const Getter get : kGetters) {
    if (target == get()->target) return get();
  }
  return nullptr;
}

}  // namespace annulus
#endif
