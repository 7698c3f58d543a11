// The vocabulary of the kernels on one vector instruction set: what Highway 1.0.3 lacks or does
// otherwise than attention needs. Compiled once per target; ANNULUS_PUSH_TARGET may add
// instructions to Highway's.

#if defined(ANNULUS_VECTOR_INL_H_) == defined(HWY_TARGET_TOGGLE)  // once per target
#ifdef ANNULUS_VECTOR_INL_H_
#undef ANNULUS_VECTOR_INL_H_
#else
#define ANNULUS_VECTOR_INL_H_
#endif

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "base/half.h"
#include "hwy/highway.h"
#include "kernels/kernel_table.h"

#ifndef ANNULUS_PUSH_TARGET
#define ANNULUS_PUSH_TARGET HWY_BEFORE_NAMESPACE();
#define ANNULUS_POP_TARGET HWY_AFTER_NAMESPACE();
#define ANNULUS_ATTR HWY_ATTR  // of lambdas, which clang's attributes of a region leave out
#define ANNULUS_UNROLL _Pragma("GCC unroll 32")
#endif

ANNULUS_PUSH_TARGET
namespace annulus {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using F = hn::ScalableTag<float>;
using I = hn::RebindToSigned<F>;
using U = hn::RebindToUnsigned<F>;
using V = hn::VFromD<F>;
constexpr F kF;
constexpr I kI;
constexpr U kU;
constexpr int kLanes = HWY_LANES(float);

// Keeps a value in a register here and now: the compiler neither folds it into later instructions
// nor computes it later.
HWY_INLINE void Pin(V& x) {
#if HWY_ARCH_X86 && HWY_TARGET != HWY_EMU128 && HWY_TARGET != HWY_SCALAR
#if HWY_TARGET <= HWY_AVX3
  asm volatile("" : "+v"(x.raw));
#else
  asm volatile("" : "+x"(x.raw));
#endif
#else
  (void)x;
#endif
}

// The 32 bits at p in every lane, in a register.
HWY_INLINE V PinnedBroadcast(const char* p) {
  float bits;
  memcpy(&bits, p, 4);
  V x = hn::Set(kF, bits);
#if HWY_ARCH_X86 && HWY_TARGET != HWY_EMU128 && HWY_TARGET != HWY_SCALAR
#if HWY_TARGET <= HWY_AVX3
  asm("" : "+v"(x.raw));
#else
  asm("" : "+x"(x.raw));
#endif
#endif
  return x;
}

HWY_INLINE void PrefetchL2(const char* p) { __builtin_prefetch(p, 0, 2); }

// Lane n is true iff bit n is set.
HWY_INLINE hn::Mask<F> LaneMask(std::uint32_t bits) {
#if HWY_TARGET <= HWY_AVX3
  return hn::Mask<F>{static_cast<__mmask16>(bits)};
#else
  std::uint8_t bytes[8] = {static_cast<std::uint8_t>(bits), static_cast<std::uint8_t>(bits >> 8),
                           static_cast<std::uint8_t>(bits >> 16),
                           static_cast<std::uint8_t>(bits >> 24)};
  return hn::LoadMaskBits(kF, bytes);
#endif
}

// Minimax polynomials of 2^f on [0, 1) with p(0) = 1. Relative error 8.6e-5, 2.9e-6, 8.2e-8 for
// degree 3, 4, 5.
template <int kDegree>
HWY_INLINE V Exp2Fraction(V f) {
  const auto c = [](float x) HWY_ATTR { return hn::Set(kF, x); };
  V p;
  if constexpr (kDegree == 3) {
    p = hn::MulAdd(c(7.706704641e-2F), f, c(2.276449851e-1F));
    p = hn::MulAdd(p, f, c(6.951167883e-1F));
  } else if constexpr (kDegree == 4) {
    p = hn::MulAdd(c(1.342668372e-2F), f, c(5.224247534e-2F));
    p = hn::MulAdd(p, f, c(2.412802041e-1F));
    p = hn::MulAdd(p, f, c(6.930448450e-1F));
  } else {
    static_assert(kDegree == 5);
    p = hn::MulAdd(c(1.867130212e-3F), f, c(9.017029963e-3F));
    p = hn::MulAdd(p, f, c(5.579991343e-2F));
    p = hn::MulAdd(p, f, c(2.401644500e-1F));
    p = hn::MulAdd(p, f, c(6.931513118e-1F));
  }
  return hn::MulAdd(p, f, c(1.0F));
}

// 2^x for x <= 128; exactly 0 for x = -inf, inf for 128, NaN for NaN. Not Highway's Exp: that one
// turns NaN into 0.
template <int kDegree>
HWY_INLINE V Exp2(V x) {
#if HWY_TARGET <= HWY_AVX3
  // x - floor x and the product with 2^floor x are one instruction each, on the pipes without FMA.
  const V f{_mm512_reduce_ps(x.raw, 1)};
  return V{_mm512_scalef_ps(Exp2Fraction<kDegree>(f).raw, x.raw)};
#else
  // Below -127 the factor's exponent field would wrap; at -127 it is 0, and so is the factor.
  // Comparisons that are false for NaN let it pass.
  const V low = hn::Set(kF, -127.0F), high = hn::Set(kF, 128.0F);
  x = hn::IfThenElse(hn::Lt(x, low), low, x);
  x = hn::IfThenElse(hn::Gt(x, high), high, x);
  const V floor = hn::Floor(x);
  const auto exponent = hn::ShiftLeft<23>(hn::Add(hn::ConvertTo(kI, floor), hn::Set(kI, 127)));
  return hn::Mul(Exp2Fraction<kDegree>(hn::Sub(x, floor)), hn::BitCast(kF, exponent));
#endif
}

// tanh, relative error below 3e-7: an odd minimax polynomial near 0, where 1 - 2 / (e^2x + 1)
// cancels, that beyond.
HWY_INLINE V Tanh(V x) {
  const auto c = [](float value) HWY_ATTR { return hn::Set(kF, value); };
  const V size = hn::Abs(x), square = hn::Mul(x, x);
  V p = hn::MulAdd(c(-5.704986995e-3F), square, c(2.063908725e-2F));
  p = hn::MulAdd(p, square, c(-5.373971509e-2F));
  p = hn::MulAdd(p, square, c(1.333144220e-1F));
  p = hn::MulAdd(p, square, c(-3.333328194e-1F));
  const V small = hn::MulAdd(hn::Mul(p, square), x, x);
  // e^2x beyond 2^40 makes the quotient vanish against 1.
  const V limit = c(40.0F), exponent = hn::Mul(size, c(2.88539008177792681F));
  const V e = Exp2<5>(hn::IfThenElse(hn::Gt(exponent, limit), limit, exponent));
  const V large = hn::Sub(c(1.0F), hn::Div(c(2.0F), hn::Add(e, c(1.0F))));
  return hn::IfThenElse(hn::Gt(size, c(0.625F)), hn::CopySign(large, x), small);
}

// -------------------------------------------------------------------------------------------------------
// rows and packing

constexpr int kRowWords = 256;  // longest piece of a row that is transposed at once: 4 KB of stack

HWY_INLINE const void* RowAddress(const RowSource& source, std::int64_t t) {
  return static_cast<const char*>(source.base) + source.row[t] * source.row_stride_bytes;
}

HWY_INLINE float LoadFloat(const char* p, Element element) {
  if (element == Element::kFloat32) {
    float x;
    memcpy(&x, p, 4);
    return x;
  }
  std::uint16_t bits;
  memcpy(&bits, p, 2);
  return element == Element::kBFloat16 ? bf16_to_float(bits) : f16_to_float(bits);
}

// n elements of a row as float32, then zeros up to `padded`. A null row is all zeros.
inline void FloatRow(float* out, const void* row, const RowSource& source, std::int64_t n,
                     std::int64_t padded) {
  if (row == nullptr) n = 0;
  const char* p = static_cast<const char*>(row);
  std::int64_t x = 0;
  if (source.element == Element::kFloat32 && source.dim_stride_bytes == 4) {
    if (n > 0) memcpy(out, p, static_cast<std::size_t>(n) * 4);
    x = n;
  } else if (source.element == Element::kBFloat16 && source.dim_stride_bytes == 2) {
    const hn::Rebind<std::uint16_t, F> half;
    for (; x + kLanes <= n; x += kLanes) {
      const auto bits =
          hn::PromoteTo(kU, hn::LoadU(half, reinterpret_cast<const std::uint16_t*>(p) + x));
      hn::StoreU(hn::BitCast(kF, hn::ShiftLeft<16>(bits)), kF, out + x);
    }
#if HWY_ARCH_X86 && \
    HWY_TARGET <= HWY_AVX2  // elsewhere Highway's widening forgets infinities and NaN
  } else if (source.element == Element::kFloat16 && source.dim_stride_bytes == 2) {
    const hn::Rebind<hwy::float16_t, F> half;
    for (; x + kLanes <= n; x += kLanes) {
      hn::StoreU(hn::PromoteTo(kF, hn::LoadU(half, reinterpret_cast<const hwy::float16_t*>(p) + x)),
                 kF, out + x);
    }
#endif
  }
  for (; x < n; ++x) out[x] = LoadFloat(p + x * source.dim_stride_bytes, source.element);
  for (; x < padded; ++x) out[x] = 0;
}

// Four rows of 32-bit words become four columns; `rows` are at least 4 words long.
HWY_INLINE void Transpose4x4(const std::uint32_t* const (&rows)[4],
                             std::uint32_t (&columns)[4][4]) {
#if HWY_TARGET == HWY_SCALAR
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) columns[j][i] = rows[i][j];
  }
#else
  const hn::CappedTag<std::uint32_t, 4> d;
  const hn::Repartition<std::uint64_t, decltype(d)> d64;
  const auto a = hn::LoadU(d, rows[0]), b = hn::LoadU(d, rows[1]), c = hn::LoadU(d, rows[2]),
             e = hn::LoadU(d, rows[3]);
  const auto ab0 = hn::BitCast(d64, hn::InterleaveLower(d, a, b)),
             ab1 = hn::BitCast(d64, hn::InterleaveUpper(d, a, b));
  const auto ce0 = hn::BitCast(d64, hn::InterleaveLower(d, c, e)),
             ce1 = hn::BitCast(d64, hn::InterleaveUpper(d, c, e));
  hn::StoreU(hn::BitCast(d, hn::InterleaveLower(d64, ab0, ce0)), d, columns[0]);
  hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(d64, ab0, ce0)), d, columns[1]);
  hn::StoreU(hn::BitCast(d, hn::InterleaveLower(d64, ab1, ce1)), d, columns[2]);
  hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(d64, ab1, ce1)), d, columns[3]);
#endif
}

// out[x * stride + i] = rows[i][x] for x < count, i in 0..3.
inline void TransposeIn(const std::uint32_t (&rows)[4][kRowWords], std::uint32_t* out,
                        std::int64_t stride, std::int64_t count) {
  std::uint32_t columns[4][4];
  for (std::int64_t x = 0; x < count; x += 4) {
    const std::uint32_t* const in[4] = {rows[0] + x, rows[1] + x, rows[2] + x, rows[3] + x};
    Transpose4x4(in, columns);
    for (int j = 0; j < 4 && x + j < count; ++j) memcpy(out + (x + j) * stride, columns[j], 16);
  }
}

// out[n * out_stride + x] = factor[n] * o[x * width + n] for x < count; o has whole groups of 4
// rows.
inline void TransposeOut(const float* o, std::int64_t width, const float* factor,
                         std::int64_t count, float* out, std::int64_t out_stride) {
  std::uint32_t columns[4][4];
  for (std::int64_t n = 0; n < width; n += 4) {
    for (std::int64_t x = 0; x < count; x += 4) {
      const auto row = [&](std::int64_t i) HWY_ATTR {
        return reinterpret_cast<const std::uint32_t*>(o + (x + i) * width + n);
      };
      const std::uint32_t* const in[4] = {row(0), row(1), row(2), row(3)};
      Transpose4x4(in, columns);
      const std::int64_t piece = count - x < 4 ? count - x : 4;
      for (int i = 0; i < 4; ++i) {
        float* to = out + (n + i) * out_stride + x;
        for (std::int64_t j = 0; j < piece; ++j) {
          float value;
          memcpy(&value, &columns[i][j], 4);
          to[j] = value * factor[n + i];
        }
      }
    }
  }
}

// float32 products and probabilities, inputs of any float type widened once while they are packed.
struct Float32 {
  static constexpr int kPer = 1, kDegree = 5;
  static constexpr bool kRoundsP = false;
  static HWY_INLINE V Dot(V acc, V a, V b) { return hn::MulAdd(a, b, acc); }
  static HWY_INLINE void StorePair(V e0, V e1, char* p, std::int64_t key_bytes) {
    hn::Store(e0, kF, reinterpret_cast<float*>(p)),
        hn::Store(e1, kF, reinterpret_cast<float*>(p + key_bytes));
  }
  // One key's row of a strip, and the same with the pairs that dropout drops taken out.
  template <int kVectors>
  static HWY_INLINE void StoreRow(const V (&e)[kVectors], char* row) {
    ANNULUS_UNROLL for (int c = 0; c < kVectors; ++c) {
      hn::Store(e[c], kF, reinterpret_cast<float*>(row) + c * kLanes);
    }
  }
  // Takes dropped pairs out of what StorePair wrote: lanes from `lane` on of kPer keys.
  static HWY_INLINE void DropStored(char* p, const std::uint32_t* keep, int lane) {
    float* x = reinterpret_cast<float*>(p);
    hn::Store(hn::IfThenElseZero(LaneMask(keep[0] >> lane), hn::Load(kF, x)), kF, x);
  }
  template <int kVectors>
  static HWY_INLINE void DropRow(char* row, std::uint32_t keep) {
    float* x = reinterpret_cast<float*>(row);
    for (int c = 0; c < kVectors; ++c, x += kLanes)
      hn::Store(hn::IfThenElseZero(LaneMask(keep >> (c * kLanes)), hn::Load(kF, x)), kF, x);
  }
  static HWY_INLINE void ScaleStored(char* p, V factor) {
    float* x = reinterpret_cast<float*>(p);
    hn::Store(hn::Mul(factor, hn::Load(kF, x)), kF, x);
  }
  static HWY_INLINE V Rounded(V p) { return p; }
  static HWY_INLINE float Value(const char* v, std::int64_t key, std::int64_t d,
                                std::int64_t step_bytes) {
    return reinterpret_cast<const float*>(v + key * step_bytes)[d];
  }
  static void PackRow(char* out, const void* row, const RowSource& source, std::int64_t n,
                      std::int64_t padded) {
    FloatRow(reinterpret_cast<float*>(out), row, source, n, padded);
  }
  static void PackValues(char* out, const void* const* rows, int keys, const RowSource& source,
                         std::int64_t n, std::int64_t padded) {
    for (int r = 0; r < keys; ++r)
      FloatRow(reinterpret_cast<float*>(out) + r * padded, rows[r], source, n, padded);
  }
  static bool AnyNotFinite(const char* v, std::int64_t words) {
    const auto exponent = hn::Set(kU, 0x7f800000U);
    auto bad = hn::Zero(kU);
    std::int64_t x = 0;
    const auto* p = reinterpret_cast<const std::uint32_t*>(v);
    for (; x + kLanes <= words; x += kLanes) {
      bad = hn::Or(bad,
                   hn::VecFromMask(kU, hn::Eq(hn::And(hn::LoadU(kU, p + x), exponent), exponent)));
    }
    bool any = !hn::AllTrue(kU, hn::Eq(bad, hn::Zero(kU)));
    for (; x < words; ++x) any |= (p[x] & 0x7f800000U) == 0x7f800000U;
    return any;
  }
};

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace annulus
ANNULUS_POP_TARGET
#endif
