// bfloat16 products by vdpbf16ps. Highway 1.0.3 has no target with them, so this file compiles the
// forward for AVX-512 plus that one instruction. Attributes, not compiler flags, choose the
// instructions: nothing outside the marked region can be compiled for them and end up in another
// object's place.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/avx512_bf16.cc"
// AVX-512 alone; the baseline, which cannot be disabled, is an empty pass.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX2 | HWY_AVX3_DL)
#include "hwy/foreach_target.h"
//
#include "hwy/highway.h"
#include "kernels/kernel_table.h"

#if HWY_ARCH_X86 && HWY_TARGET == HWY_AVX3
#define ANNULUS_PUSH_TARGET HWY_PUSH_ATTRIBUTES(HWY_TARGET_STR ",avx512bf16")
#define ANNULUS_POP_TARGET HWY_POP_ATTRIBUTES
#define ANNULUS_ATTR __attribute__((target(HWY_TARGET_STR ",avx512bf16")))
#define ANNULUS_UNROLL _Pragma("GCC unroll 32")
#include "kernels/backward-inl.h"
#include "kernels/bfloat16-inl.h"
#include "kernels/forward-inl.h"

ANNULUS_PUSH_TARGET
namespace annulus {
namespace HWY_NAMESPACE {

const ForwardKernel* BFloat16Entry() {
  static constexpr ForwardKernel kKernel = MakeKernel<BFloat16>(
      "avx512_bf16", "bfloat16 products and probabilities, float32 accumulation",
      Element::kBFloat16);
  return &kKernel;
}

const BackwardKernel* BFloat16BackwardEntry() {
  static constexpr BackwardKernel kKernel = MakeBackward<BFloat16>(
      "avx512_bf16", "bfloat16 products, p and ds, float32 accumulation", Element::kBFloat16);
  return &kKernel;
}

}  // namespace HWY_NAMESPACE
}  // namespace annulus
ANNULUS_POP_TARGET
#endif

#if HWY_ONCE
namespace annulus {
const ForwardKernel* avx512_bf16_forward() {
#if HWY_ARCH_X86
  return N_AVX3::BFloat16Entry();
#else
  return nullptr;
#endif
}
const BackwardKernel* avx512_bf16_backward() {
#if HWY_ARCH_X86
  return N_AVX3::BFloat16BackwardEntry();
#else
  return nullptr;
#endif
}
}  // namespace annulus
#endif
