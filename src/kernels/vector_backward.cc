// The float32 backward of every Highway target and the terms of options, one entry each. bfloat16
// and float16 inputs are widened when packed.

#include "kernels/dispatch.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/vector_backward.cc"
// Vector lengths that are not constants cannot be elements of a tile.
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#include "hwy/foreach_target.h"
//
#include "hwy/highway.h"
#include "kernels/backward-inl.h"
#include "kernels/terms-inl.h"
#undef ANNULUS_TARGET_NAME
#include "kernels/vector_targets-inl.h"

HWY_BEFORE_NAMESPACE();
namespace annulus {
namespace HWY_NAMESPACE {

const BackwardKernel* BackwardEntry() {
  static constexpr BackwardKernel kKernel = MakeBackward<Float32>(
      ANNULUS_TARGET_NAME, "float32 products, float32 accumulation", Element::kFloat32);
  return &kKernel;
}
const TermKernel* TermEntry() {
  static constexpr TermKernel kKernel = {kWidth, KeepBits, GatherTerms, ScatterTerms};
  return &kKernel;
}

}  // namespace HWY_NAMESPACE
}  // namespace annulus
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace annulus {

namespace {

using Getter = const BackwardKernel* (*)();
constexpr Getter kGetters[] = {ANNULUS_OF_EVERY_TARGET(BackwardEntry)};
constexpr const TermKernel* (*kTerms[])() = {ANNULUS_OF_EVERY_TARGET(TermEntry)};

}  // namespace

const BackwardKernel* vector_backward(const std::string& target) {
  for (const Getter get : kGetters) {
    if (target == get()->target) return get();
  }
  return nullptr;
}

const TermKernel* vector_terms(const std::string& target) {
  for (std::size_t i = 0; i < std::size(kGetters); ++i) {
    if (target == kGetters[i]()->target) return kTerms[i]();
  }
  return nullptr;
}

}  // namespace annulus
#endif
