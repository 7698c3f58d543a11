// bfloat16 products and probabilities by vdpbf16ps: AVX-512 plus that one instruction.

#include <immintrin.h>
#include <string.h>

#include "hwy/highway.h"
#include "kernels/vector-inl.h"

ANNULUS_PUSH_TARGET
namespace annulus {
namespace HWY_NAMESPACE {
namespace {

// P is rounded to bf16 half up: add half an ulp to the bits and cut, one addition on a pipe that
// products leave idle.
HWY_INLINE hn::VFromD<U> RoundedBits(V p) {
  return hn::Add(hn::BitCast(kU, p), hn::Set(kU, 0x8000U));
}

struct BFloat16 {
  // Degree 4, not 3: the bias of degree 3 (8.6e-5) would show in lse, which callers merge.
  static constexpr int kPer = 2, kDegree = 4;
  static constexpr bool kRoundsP = true;
  static HWY_INLINE V Ones() { return hn::BitCast(kF, hn::Set(kU, 0x3f803f80U)); }
  static HWY_INLINE V Dot(V acc, V a, V b) {
    return V{_mm512_dpbf16_ps(acc.raw, reinterpret_cast<__m512bh>(a.raw),
                              reinterpret_cast<__m512bh>(b.raw))};
  }
  // A pair of keys shares a 32-bit lane: the even key below, the odd one above.
  static HWY_INLINE void StorePair(V e0, V e1, char* p, std::int64_t /*key_bytes*/) {
    StoreBits(hn::ShiftRight<16>(RoundedBits(e0)), RoundedBits(e1), p);
  }
  static HWY_INLINE void StoreBits(hn::VFromD<U> even, hn::VFromD<U> odd, char* p) {
    const __m512i pair = _mm512_mask_blend_epi16(0xAAAAAAAAU, even.raw, odd.raw);
    _mm512_store_si512(p, pair);
  }
  static HWY_INLINE void StoreRow(const V (&e)[2], char* row) {
    _mm512_store_si512(row, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(e[1].raw, e[0].raw)));
  }
  static HWY_INLINE void DropStored(char* p, const std::uint32_t* keep, int lane) {
    const __m512i pair = _mm512_load_si512(p);
    const __m512i even = _mm512_maskz_mov_epi32(static_cast<__mmask16>(keep[0] >> lane), pair);
    const __m512i odd = _mm512_maskz_mov_epi32(static_cast<__mmask16>(keep[1] >> lane), pair);
    _mm512_store_si512(p, _mm512_mask_blend_epi16(0xAAAAAAAAU, even, odd));
  }
  template <int kVectors>
  static HWY_INLINE void DropRow(char* row, std::uint32_t keep) {
    _mm512_store_si512(row, _mm512_maskz_mov_epi16(keep, _mm512_load_si512(row)));
  }
  // The factor is a power of two: cutting is exact.
  static HWY_INLINE void ScaleStored(char* p, V factor) {
    const auto pair = hn::Load(kU, reinterpret_cast<const std::uint32_t*>(p));
    const V even = hn::Mul(factor, hn::BitCast(kF, hn::ShiftLeft<16>(pair)));
    const V odd = hn::Mul(factor, hn::BitCast(kF, hn::And(pair, hn::Set(kU, 0xFFFF0000U))));
    StoreBits(hn::ShiftRight<16>(hn::BitCast(kU, even)), hn::BitCast(kU, odd), p);
  }
  static HWY_INLINE V Rounded(V p) {
    return hn::BitCast(kF, hn::And(RoundedBits(p), hn::Set(kU, 0xFFFF0000U)));
  }
  static HWY_INLINE float Value(const char* v, std::int64_t key, std::int64_t d,
                                std::int64_t step_bytes) {
    std::uint16_t bits;
    memcpy(&bits, v + key / 2 * step_bytes + d * 4 + key % 2 * 2, 2);
    return bf16_to_float(bits);
  }

  static void PackRow(char* out, const void* row, const RowSource& source, std::int64_t n,
                      std::int64_t padded) {
    if (row == nullptr) n = 0;
    if (source.dim_stride_bytes == 2) {
      if (n > 0) memcpy(out, row, static_cast<std::size_t>(n) * 2);
    } else {
      const char* p = static_cast<const char*>(row);
      for (std::int64_t x = 0; x < n; ++x) memcpy(out + x * 2, p + x * source.dim_stride_bytes, 2);
    }
    memset(out + n * 2, 0, static_cast<std::size_t>(padded - n) * 2);
  }

  // [key / 2][d][2]. Pieces of the rows go through the stack, so that any stride is one case.
  static void PackValues(char* out, const void* const* rows, int keys, const RowSource& source,
                         std::int64_t n, std::int64_t padded) {
    constexpr std::int64_t kPiece = 256;
    const hn::CappedTag<std::uint16_t, 8> d;
    for (int r = 0; r < keys; r += 2) {
      for (std::int64_t x = 0; x < padded; x += kPiece) {
        alignas(64) std::uint16_t piece[2][kPiece];
        const std::int64_t width = padded - x < kPiece ? padded - x : kPiece;
        const std::int64_t have = n - x < width ? (n > x ? n - x : 0) : width;
        for (int i = 0; i < 2; ++i) {
          const char* row = static_cast<const char*>(rows[r + i]);
          PackRow(reinterpret_cast<char*>(piece[i]),
                  row == nullptr ? nullptr : row + x * source.dim_stride_bytes, source, have,
                  width);
        }
        auto* to = reinterpret_cast<std::uint16_t*>(out + (r / 2 * padded + x) * 4);
        for (std::int64_t y = 0; y < width; y += 8) {
          const auto even = hn::Load(d, piece[0] + y), odd = hn::Load(d, piece[1] + y);
          hn::StoreU(hn::InterleaveLower(d, even, odd), d, to + y * 2);
          hn::StoreU(hn::InterleaveUpper(d, even, odd), d, to + y * 2 + 8);
        }
      }
    }
  }

  static bool AnyNotFinite(const char* v, std::int64_t words) {
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    __mmask32 bad = 0;
    std::int64_t x = 0;
    for (; x + 16 <= words; x += 16) {
      bad |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(_mm512_loadu_si512(v + x * 4), exponent),
                                     exponent);
    }
    bool any = bad != 0;
    const auto* p = reinterpret_cast<const std::uint16_t*>(v);
    for (std::int64_t i = x * 2; i < words * 2; ++i) any |= (p[i] & 0x7f80U) == 0x7f80U;
    return any;
  }
};

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace annulus
ANNULUS_POP_TARGET
