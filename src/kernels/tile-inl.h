// A tile of scores, in registers and in the L1: the shapes, the one product loop that every matrix
// product of attention goes through, and what options do to a stored tile.
//
// Includers define, per arithmetic, a type A:
//   Stored             element of K, Q, V and P in memory; kPer of them share a 32-bit lane
//   kDegree            of the exponential's polynomial
//   Dot(acc, a, b)     acc + a * b, summed over the kPer elements of a lane
//   kRoundsP           P is stored with fewer bits than it is summed with
//
// Figures in comments are shares of peak on a Zen 5 core at 16K tokens, bf16, d = 128, unless they
// say otherwise.

#if defined(ANNULUS_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)  // once per target
#ifdef ANNULUS_TILE_INL_H_
#undef ANNULUS_TILE_INL_H_
#else
#define ANNULUS_TILE_INL_H_
#endif

#include <math.h>
#include <string.h>

#include "hwy/highway.h"
#include "kernels/kernel_table.h"
#include "kernels/softmax_reference.h"
#include "kernels/vector-inl.h"

ANNULUS_PUSH_TARGET
namespace annulus {
namespace HWY_NAMESPACE {
namespace {

// A tile is kKeys keys x kVecs vectors of queries; its accumulators cover latency x pipes (12 for
// vdpbf16ps on Zen 5) and leave room for operands: 8 x 2 of 32 registers, 4 x 3 of 16. More (8 x 3)
// spill beside the exponentials.
#if HWY_TARGET <= HWY_AVX3
constexpr int kKeys = 8, kVecs = 2;
constexpr int kPeakAccumulators = 24;
#elif HWY_TARGET != HWY_SCALAR
constexpr int kKeys = 4, kVecs = 3;
constexpr int kPeakAccumulators = 12;
#else
constexpr int kKeys = 4, kVecs = 4;
constexpr int kPeakAccumulators = 12;
#endif
constexpr int kWidth = kVecs * kLanes;  // queries of a strip
constexpr float kLog2e = 1.44269504088896341F;
constexpr double kLn2 = 0.693147180559945309;

using Tile = V[kKeys][kVecs];

HWY_INLINE V At(const float* p, int c) { return hn::Load(kF, p + c * kLanes); }
HWY_INLINE void Put(float* p, int c, V x) { hn::Store(x, kF, p + c * kLanes); }

template <int kColumns>
HWY_INLINE void Clear(V (&acc)[kKeys][kColumns]) {
  ANNULUS_UNROLL for (int r = 0; r < kKeys; ++r) {
    ANNULUS_UNROLL for (int c = 0; c < kColumns; ++c) { acc[r][c] = hn::Zero(kF); }
  }
}

// acc[r][c] += sum over k of a[k][r] * b[k][c]: words of a are kRowStep bytes apart, steps a_step
// and b_step bytes. The broadcast is pinned in a register: folded into every product it would be
// loaded kColumns times, and loads are the limit (79-84 % instead of 92).
template <class A, int kRowStep = 4, int kColumns>
HWY_INLINE void Multiply(V (&acc)[kKeys][kColumns], const char* a, std::int64_t a_step,
                         const char* b, std::int64_t b_step, std::int64_t steps) {
  for (std::int64_t k = 0; k < steps; ++k, a += a_step, b += b_step) {
    V column[kColumns];
    ANNULUS_UNROLL for (int c = 0; c < kColumns; ++c) column[c] =
        hn::Load(kF, reinterpret_cast<const float*>(b) + c * kLanes);
    ANNULUS_UNROLL for (int r = 0; r < kKeys; ++r) {
      const V x = PinnedBroadcast(a + r * kRowStep);
      ANNULUS_UNROLL for (int c = 0; c < kColumns; ++c) acc[r][c] = A::Dot(acc[r][c], column[c], x);
    }
  }
}

// A tile is never handed to a function that is not inlined: the compiler would keep all of it in
// memory.
HWY_INLINE void StoreTile(const Tile& acc, float* s) {
  ANNULUS_UNROLL for (int r = 0; r < kKeys; ++r) {
    ANNULUS_UNROLL for (int c = 0; c < kVecs; ++c) Put(s + r * kWidth, c, acc[r][c]);
  }
}
HWY_INLINE void LoadTile(Tile& acc, const float* s) {
  ANNULUS_UNROLL for (int r = 0; r < kKeys; ++r) {
    ANNULUS_UNROLL for (int c = 0; c < kVecs; ++c) acc[r][c] = At(s + r * kWidth, c);
  }
}
// Hidden pairs become -inf by selection, so a NaN there goes no further.
HWY_INLINE void Hide(Tile& acc, const std::uint32_t* bits) {
  const V hidden = hn::Set(kF, -INFINITY);
  ANNULUS_UNROLL for (int r = 0; r < kKeys; ++r) {
    ANNULUS_UNROLL for (int c = 0; c < kVecs; ++c) {
      acc[r][c] = hn::IfThenElse(LaneMask(bits[r] >> (c * kLanes)), acc[r][c], hidden);
    }
  }
}

// True if scores need no pass of their own: scale and log2(e) are one factor of the exponent. A
// negative scale would turn maxima into minima and zero times a hidden score is NaN;
// TransformScores() multiplies first.
HWY_INLINE bool PlainScores(const ScoreRule& rule) {
  return rule.cap == 0 && !rule.bias && rule.scale > 0;
}
// What a stored score is multiplied by to become an exponent of two.
HWY_INLINE float ExponentScale(const ScoreRule& rule) {
  return PlainScores(rule) ? static_cast<float>(static_cast<double>(rule.scale) * (1 / kLn2))
                           : kLog2e;
}
// Scores in natural units: scale, soft cap, bias [key][query]. `slope`, if given, receives the
// cap's derivative.
HWY_NOINLINE void TransformScores(const ScoreRule& rule, const float* bias, float* s,
                                  float* slope) {
  const V scale = hn::Set(kF, rule.scale), cap = hn::Set(kF, rule.cap);
  const V inverse_cap = hn::Set(kF, 1 / rule.cap), one = hn::Set(kF, 1);
  for (int i = 0; i < kKeys * kVecs; ++i) {
    V x = hn::Mul(At(s, i), scale);
    if (rule.cap > 0) {
      const V t = Tanh(hn::Mul(x, inverse_cap));
      x = hn::Mul(cap, t);
      if (slope != nullptr) Put(slope, i, hn::NegMulAdd(t, t, one));
    }
    if (rule.bias) x = hn::Add(x, hn::LoadU(kF, bias + i * kLanes));
    Put(s, i, x);
  }
}

// Four rows of 32-bit words become [step][4] at `out`, `stride` words from step to step; null rows
// are zeros.
template <class A>
void TransposeRows(const void* const* rows, const RowSource& source, std::int64_t head_dim,
                   std::int64_t steps, std::uint32_t* out, std::int64_t stride) {
  for (std::int64_t x = 0; x < steps;
       x += kRowWords) {  // by pieces, so that any head_dim fits the stack
    alignas(64) std::uint32_t words[4][kRowWords];
    const std::int64_t piece = steps - x < kRowWords ? steps - x : kRowWords;
    const std::int64_t left = head_dim - x * A::kPer,
                       have = left < piece * A::kPer ? left : piece * A::kPer;
    for (int i = 0; i < 4; ++i) {
      const char* row = static_cast<const char*>(rows[i]);
      A::PackRow(reinterpret_cast<char*>(words[i]),
                 row == nullptr ? row : row + x * A::kPer * source.dim_stride_bytes, source, have,
                 piece * A::kPer);
    }
    TransposeIn(words, out + x * stride, stride, piece);
  }
}

// A tile of keys [k-step][key][kPer] from its rows.
template <class A>
void TransposeTile(const void* const* rows, const RowSource& source, std::int64_t head_dim,
                   std::int64_t steps, char* out) {
  for (int r = 0; r < kKeys; r += 4) {
    TransposeRows<A>(rows + r, source, head_dim, steps, reinterpret_cast<std::uint32_t*>(out) + r,
                     kKeys);
  }
}
// A strip of queries [k-step][query][kPer] from `count` rows at their addresses.
template <class A>
void TransposeStrip(const void* const* rows, std::int64_t count, const RowSource& source,
                    std::int64_t head_dim, std::int64_t steps, char* out) {
  for (int n = 0; n < kWidth; n += 4) {
    const void* four[4];
    for (int i = 0; i < 4; ++i) four[i] = n + i < count ? rows[n + i] : nullptr;
    TransposeRows<A>(four, source, head_dim, steps, reinterpret_cast<std::uint32_t*>(out) + n,
                     kWidth);
  }
}

// Addresses of a tile's rows; null behind the last key.
HWY_INLINE void RowsOfTile(const RowSource& source, std::int64_t first, std::int64_t num_keys,
                           const void* (&rows)[kKeys]) {
  for (int r = 0; r < kKeys; ++r)
    rows[r] = first + r < num_keys ? RowAddress(source, first + r) : nullptr;
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace annulus
ANNULUS_POP_TARGET
#endif
