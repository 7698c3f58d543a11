// The float32 forward of every Highway target, one entry each. bfloat16 and float16 inputs are
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
#undef ANNULUS_TARGET_NAME
#include "kernels/vector_targets-inl.h"

HWY_BEFORE_NAMESPACE();
namespace annulus {
namespace HWY_NAMESPACE {

const ForwardKernel* ForwardEntry() {
  static constexpr ForwardKernel kKernel = MakeKernel<Float32>(
      ANNULUS_TARGET_NAME, "float32 products, float32 accumulation", Element::kFloat32);
  return &kKernel;
}

}  // namespace HWY_NAMESPACE
}  // namespace annulus
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace annulus {

const ForwardKernel* vector_forward(const std::string& target) {
  using Getter = const ForwardKernel* (*)();
  static constexpr Getter kGetters[] = {ANNULUS_OF_EVERY_TARGET(ForwardEntry)};
  for (const Getter get : kGetters) {
    if (target == get()->target) return get();
  }
  return nullptr;
}

}  // namespace annulus
#endif
