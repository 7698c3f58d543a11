// The Highway targets as a list, for files that are compiled once per target.

#ifndef ANNULUS_VECTOR_TARGETS_INL_H_
#define ANNULUS_VECTOR_TARGETS_INL_H_

#include "hwy/highway.h"

#if (HWY_TARGETS & HWY_SSSE3) && HWY_STATIC_TARGET != HWY_SSSE3
#define ANNULUS_SSSE3(entry) &N_SSSE3::entry,
#else
#define ANNULUS_SSSE3(entry)
#endif
#if (HWY_TARGETS & HWY_SSE4) && HWY_STATIC_TARGET != HWY_SSE4
#define ANNULUS_SSE4(entry) &N_SSE4::entry,
#else
#define ANNULUS_SSE4(entry)
#endif
#if (HWY_TARGETS & HWY_AVX2) && HWY_STATIC_TARGET != HWY_AVX2
#define ANNULUS_AVX2(entry) &N_AVX2::entry,
#else
#define ANNULUS_AVX2(entry)
#endif
#if (HWY_TARGETS & HWY_AVX3) && HWY_STATIC_TARGET != HWY_AVX3
#define ANNULUS_AVX3(entry) &N_AVX3::entry,
#else
#define ANNULUS_AVX3(entry)
#endif

// Addresses of `entry` of every target, for an array; after the last pass only. The first is the
// baseline's.
#define ANNULUS_OF_EVERY_TARGET(entry) \
  &HWY_NAMESPACE::entry,               \
      ANNULUS_SSSE3(entry) ANNULUS_SSE4(entry) ANNULUS_AVX2(entry) ANNULUS_AVX3(entry)

#endif  // ANNULUS_VECTOR_TARGETS_INL_H_

// Once per target.
#if HWY_TARGET == HWY_AVX3
#define ANNULUS_TARGET_NAME "avx512"
#elif HWY_TARGET == HWY_AVX2
#define ANNULUS_TARGET_NAME "avx2"
#elif HWY_TARGET == HWY_SSE4
#define ANNULUS_TARGET_NAME "sse4"
#elif HWY_TARGET == HWY_SSSE3
#define ANNULUS_TARGET_NAME "ssse3"
#elif HWY_TARGET == HWY_EMU128 || HWY_TARGET == HWY_SCALAR
#define ANNULUS_TARGET_NAME "scalar"
#else
#define ANNULUS_TARGET_NAME "simd"  // NEON, VSX, WASM
#endif
