// The attention forward of one strip of queries against a panel of keys, written once and compiled
// per instruction set. Lanes are queries: S^T = K Q^T and O^T += V^T P^T need no shuffles, sums and
// maxima are lane-wise, and P is born in the form the second product reads.

#include <math.h>
#include <string.h>

#include "hwy/highway.h"
#include "kernels/kernel_table.h"
#include "kernels/softmax_reference.h"
#include "kernels/tile-inl.h"

ANNULUS_PUSH_TARGET
namespace annulus {
namespace HWY_NAMESPACE {
namespace {

// Keys whose P waits for one product with V. Longer saves trips of O (1 point against 128), shorter
// keeps P in the L1.
constexpr int kBlock = 256;
template <class A>
struct Sizes {
  // A packed KV head: K by tiles [tile][k-step][key][kPer], V [key / kPer][d][kPer], one byte per
  // tile: V not finite. Products then read both front to back at constant offsets; strides known at
  // run time only would be loads again.
  std::int64_t steps;   // k-steps of a score tile
  std::int64_t v_rows;  // rows of O^T, padded to whole tiles
  explicit Sizes(Dims dims)
      : steps((dims.head_dim + A::kPer - 1) / A::kPer),
        v_rows((dims.v_head_dim + kKeys - 1) / kKeys * kKeys) {}
  std::int64_t k_row_bytes() const { return steps * 4; }
  std::int64_t v_step_bytes() const { return v_rows * 4; }  // kPer keys
  std::int64_t k_bytes(std::int64_t keys) const { return PadKeys(keys) * k_row_bytes(); }
  std::int64_t v_bytes(std::int64_t keys) const { return PadKeys(keys) / A::kPer * v_step_bytes(); }
  static std::int64_t PadKeys(std::int64_t keys) { return (keys + kKeys - 1) / kKeys * kKeys; }
};

// Everything kept for kWidth queries while the keys pass by.
struct Strip {
  char* qt;      // Q^T [k-step][query][kPer]
  float* o;      // O^T, unnormalised [v row][query]
  float* m;      // reference in log2 units, an integer: rescaling is exact
  float* l;      // sum of p, for lse
  float* w;      // sum of p as it was stored, for out: the weights then add up to 1 whatever their
                 // rounding, and a row that sees one key is that key's value exactly. Unused where
                 // storing does not round.
  float* b;      // sum of p of the open block; l sums blocks, so its error grows as
                 // block + keys / block
  float* guard;  // score above which the reference is raised; -inf: no reference yet
  float* f;      // factor that O and l await; 1 unless a reference was raised in the open block
  float* base;   // subtracted from scores as they are stored: 0 unless they are far from it
  float* base_natural;  // the same in natural units, for lse

  template <class A>
  static Strip At(void* memory, const Sizes<A>& sizes) {
    Strip z;
    z.m = static_cast<float*>(memory);
    z.l = z.m + kWidth, z.w = z.l + kWidth, z.b = z.w + kWidth, z.guard = z.b + kWidth,
    z.f = z.guard + kWidth, z.base = z.f + kWidth, z.base_natural = z.base + kWidth;
    z.o = z.base_natural + kWidth;
    z.qt = reinterpret_cast<char*>(z.o + sizes.v_rows * kWidth);
    return z;
  }
};

struct Scratch {
  float* s[2];  // scores of the tile being exponentiated and the one just multiplied [key][query]
  float* raw;   // those before a base was subtracted
  char* p;      // P^T of the open block [key / kPer][query][kPer]
};

// One strip against one panel.
template <class A>
class StripPass {
 public:
  static constexpr std::int64_t kKeyBytes = kWidth * 4 / A::kPer;  // of P, per key
  static constexpr int kPairs = kKeys / 2 * kVecs;  // a tile's exponentials, by pairs of keys

  StripPass(const PanelCall& call, const StripWork& work, const Scratch& scratch)
      : call_(call),
        work_(work),
        scratch_(scratch),
        sizes_(call.dims),
        z_(Strip::At(work.strip, sizes_)) {
    const char* packed = static_cast<const char*>(call.packed);
    k_ = packed + call.key_begin * sizes_.k_row_bytes();
    v_ = packed + sizes_.k_bytes(call.num_keys) + call.key_begin / A::kPer * sizes_.v_step_bytes();
    poisoned_ = reinterpret_cast<const std::uint8_t*>(packed) + sizes_.k_bytes(call.num_keys) +
                sizes_.v_bytes(call.num_keys) + call.key_begin / kKeys;
    plain_ = PlainScores(call.rule), scale_ = ExponentScale(call.rule);
    for (int n = 0; n < kWidth; ++n) shifted_ |= z_.base[n] != 0;
  }

  void AimPrefetch(const char* k, const char* v, std::int64_t lines, std::int64_t per_slot) {
    prefetch_k_ = k, prefetch_v_ = v, prefetch_lines_ = lines, prefetch_per_slot_ = per_slot;
  }
  std::int64_t prefetch_lines() const { return prefetch_lines_; }
  const char* prefetch_k() const { return prefetch_k_; }
  const char* prefetch_v() const { return prefetch_v_; }

  // Runs of tiles that are neither empty nor poisoned share the pipeline.
  void Run() {
    const std::int64_t tiles = (call_.key_count + kKeys - 1) / kKeys;
    for (std::int64_t t = 0; t < tiles;) {
      if (work_.tile_class[t] == kTileEmpty) {
        ++t;
      } else if (Poisoned(t)) {
        SelectingTile(t++);
      } else {
        const std::int64_t first = t;
        while (t < tiles && work_.tile_class[t] != kTileEmpty && !Poisoned(t)) ++t;
        RunTiles(first, t);
      }
    }
  }

 private:
  // A value that is not finite in a tile that some lane sees only in part, or that dropout thins
  // out: 0 * NaN would reach the others.
  bool Poisoned(std::int64_t tile) const {
    return poisoned_[tile] != 0 && (work_.tile_class[tile] == kTilePartial || call_.rule.dropout);
  }

  // Tiles t+1 (products) and t (exponentials) share one instruction stream; the product with V of a
  // block follows the score products of the tile behind it.
  HWY_NOINLINE void RunTiles(std::int64_t first, std::int64_t end) {
    alignas(64) float top[kWidth];
    float *now = scratch_.s[0], *before = scratch_.s[1];
    std::int64_t block = first;
    for (std::int64_t t = first; t < end; ++t) {
      Tile acc;
      Clear(acc);
      const char* a = k_ + t * kKeys * sizes_.k_row_bytes();
      if (t == first) {
        Multiply<A>(acc, a, kKeys * 4, z_.qt, kWidth * 4, sizes_.steps);
      } else {
        MultiplyBesideExponentials(acc, a, before,
                                   scratch_.p + (t - 1 - block) * kKeys * kKeyBytes);
      }
      if (Scores(acc, t, now, top)) Raise(top, (t - block) * kKeys, now);
      if ((t - block) * kKeys == kBlock) ProductWithV(block * kKeys, kBlock), block = t;
      float* swap = now;
      now = before, before = swap;
    }
    char* p = scratch_.p + (end - 1 - block) * kKeys * kKeyBytes;
    for (int c = 0; c < kVecs; ++c) {
      const V m = At(z_.m, c);
      V sum = At(z_.b, c);
      for (int u = 0; u < kKeys / 2; ++u) ExponentialPair(before, u, c, m, sum, p);
      Put(z_.b, c, sum);
    }
    ProductWithV(block * kKeys, (end - block) * kKeys);
  }

  // Deals the exponentials of the tile before between the k-steps: they use the pipes that products
  // leave idle, if the core's window reaches both (2 to 6 points). Without AVX-512's registers the
  // accumulators would spill instead.
  HWY_INLINE void MultiplyBesideExponentials(Tile& acc, const char* a, const float* before,
                                             char* p) {
    V sum[kVecs], m[kVecs];
    ANNULUS_UNROLL for (int c = 0; c < kVecs; ++c) sum[c] = At(z_.b, c), m[c] = At(z_.m, c);
    const char* b = z_.qt;
#if HWY_TARGET <= HWY_AVX3
    const std::int64_t steps = sizes_.steps, per_pair = steps / kPairs;
    for (int u = 0; u < kKeys / 2; ++u) {
      ANNULUS_UNROLL for (int c = 0; c < kVecs; ++c) {
        ExponentialPair(before, u, c, m[c], sum[c], p);
        Prefetch();
        Multiply<A>(acc, a, kKeys * 4, b, kWidth * 4, per_pair);
        a += per_pair * kKeys * 4, b += per_pair * kWidth * 4;
      }
    }
    Multiply<A>(acc, a, kKeys * 4, b, kWidth * 4, steps - per_pair * kPairs);
#else
    ANNULUS_UNROLL for (int c = 0; c < kVecs; ++c) {
      for (int u = 0; u < kKeys / 2; ++u)
        ExponentialPair(before, u, c, m[c], sum[c], p), Prefetch();
    }
    Clear(acc);
    Multiply<A>(acc, a, kKeys * 4, b, kWidth * 4, sizes_.steps);
#endif
    ANNULUS_UNROLL for (int c = 0; c < kVecs; ++c) Put(z_.b, c, sum[c]);
  }

  // p of one vector of queries and keys 2u, 2u + 1. Unrounded p are summed, in key order.
  HWY_INLINE void ExponentialPair(const float* s, int u, int c, V m, V& sum, char* p) {
    const V scale = hn::Set(kF, scale_);
    const V e0 = Exp2<A::kDegree>(hn::MulSub(At(s + 2 * u * kWidth, c), scale, m));
    const V e1 = Exp2<A::kDegree>(hn::MulSub(At(s + (2 * u + 1) * kWidth, c), scale, m));
    sum = hn::Add(sum, hn::Add(e0, e1));
    Pin(sum);  // now, not later: deferred sums spill
    A::StorePair(e0, e1, p + 2 * u * kKeyBytes + c * kLanes * 4, kKeyBytes);
  }

  // Stores the tile's scores; everything that is not a product is done to them here. Hidden pairs
  // become -inf by selection, so a NaN there goes no further. True if a lane's guard is topped; the
  // lanes' maxima are then in top.
  //
  // The tile is never handed to a function by address: the compiler would keep all of it in memory.
  HWY_INLINE bool Scores(Tile& acc, std::int64_t t, float* s, float* top) {
    if (HWY_UNLIKELY(!plain_)) {
      StoreTile(acc, s);
      TransformScores(call_.rule, call_.rule.bias ? work_.bias + t * kKeys * kWidth : nullptr, s,
                      nullptr);
      LoadTile(acc, s);
    }
    if (HWY_UNLIKELY(work_.tile_class[t] == kTilePartial)) Hide(acc, work_.lane_bits + t * kKeys);
    if (HWY_UNLIKELY(shifted_)) {
      StoreTile(acc, scratch_.raw);
      ANNULUS_UNROLL for (int r = 0; r < kKeys; ++r) {
        ANNULUS_UNROLL for (int c = 0; c < kVecs; ++c) acc[r][c] =
            hn::Sub(acc[r][c], At(z_.base, c));
      }
    }
    StoreTile(acc, s);
    // A NaN is passed over: its lane is lost anyway. Maxima cost nothing, they run beside the
    // products.
    V highest[kVecs];
    ANNULUS_UNROLL for (int c = 0; c < kVecs; ++c) {
      highest[c] = acc[0][c];
      ANNULUS_UNROLL for (int r = 1; r < kKeys; ++r) highest[c] = hn::Max(acc[r][c], highest[c]);
    }
    auto above = hn::Gt(highest[0], At(z_.guard, 0));
    ANNULUS_UNROLL for (int c = 1; c < kVecs; ++c) above =
        hn::Or(above, hn::Gt(highest[c], At(z_.guard, c)));
    if (HWY_LIKELY(hn::AllFalse(kF, above))) return false;
    ANNULUS_UNROLL for (int c = 0; c < kVecs; ++c) Put(top, c, highest[c]);
    return true;
  }
  // Raises the reference of the lanes whose guard is topped. P of the open block (n keys, not
  // multiplied yet), its sum and the factor of O and l follow by a power of two: nothing is rounded
  // or computed again, other lanes multiply by 1.
  HWY_NOINLINE void Raise(float* top, std::int64_t n, float* s) {
    Rebase(top, s);
    const V scale = hn::Set(kF, scale_), one = hn::Set(kF, 1);
    // Finite even for a score of +inf, whose p is then inf, as the formula has it.
    const V limit = hn::Set(kF, 0x1p126F);
    for (int c = 0; c < kVecs; ++c) {
      const V guard = At(z_.guard, c), m = At(z_.m, c);
      const auto up = hn::Gt(At(top, c), guard), unset = hn::Eq(guard, hn::Set(kF, -INFINITY));
      if (hn::AllFalse(kF, up)) continue;
      const V ceiling = hn::Ceil(hn::Mul(At(top, c), scale));
      const auto far = hn::Gt(hn::Sub(ceiling, m), hn::Set(kF, kFar));
      V to = hn::IfThenElse(hn::Or(unset, far), ceiling, hn::Add(ceiling, hn::Set(kF, kRoom)));
      to = hn::IfThenElse(up, hn::Min(to, limit), m);
      const V factor = hn::IfThenElse(hn::And(up, unset), hn::Zero(kF),
                                      hn::IfThenElse(up, Exp2<3>(hn::Sub(m, to)), one));
      Put(z_.m, c, to);
      Put(z_.guard, c, hn::IfThenElse(up, hn::Div(hn::Add(to, hn::Set(kF, kGuard)), scale), guard));
      Put(z_.f, c, hn::Mul(factor, At(z_.f, c)));
      Put(z_.b, c, hn::Mul(factor, At(z_.b, c)));
      char* p = scratch_.p + c * kLanes * 4;
      for (std::int64_t j = 0; j < n / A::kPer;
           j += 2, p += 2 * kWidth * 4) {  // n / kPer is even: whole tiles
        A::ScaleStored(p, factor), A::ScaleStored(p + kWidth * 4, factor);
      }
    }
  }

  // Gives a base to the lanes whose guard is topped by an exponent that is far from 0, unless what
  // came before still counts beside it: the tile's largest score. What came before vanishes then,
  // as if it had not been seen. The tile's scores follow, from those without a base: scores that
  // differ may not differ any more once another base was subtracted.
  HWY_NOINLINE void Rebase(float* top, float* s) {
    const V far = hn::Set(kF, kFarExponent), scale = hn::Set(kF, scale_);
    const V limit = hn::Set(kF, kLargest),
            to_natural = hn::Set(kF, scale_ * static_cast<float>(kLn2));
    const float* raw = shifted_ ? scratch_.raw : s;
    for (int c = 0; c < kVecs; ++c) {
      const V guard = At(z_.guard, c), exponent = hn::Mul(At(top, c), scale);
      const auto fresh =
          hn::Or(hn::Eq(guard, hn::Set(kF, -INFINITY)),
                 hn::Gt(hn::Sub(hn::Ceil(exponent), At(z_.m, c)), hn::Set(kF, kFar)));
      auto moves = hn::And(fresh, hn::Gt(At(top, c), guard));
      moves = hn::And(moves, hn::Gt(hn::Abs(exponent), far));
      if (hn::AllFalse(kF, moves)) continue;
      V base = hn::Neg(limit);  // finite, so that nothing becomes inf - inf
      for (int r = 0; r < kKeys; ++r) base = hn::Max(At(raw + r * kWidth, c), base);
      moves = hn::And(moves, hn::Le(base, limit));  // p of +inf is inf, which stays
      base = hn::IfThenElse(moves, base, At(z_.base, c));
      for (int r = 0; r < kKeys; ++r) {
        const V x = At(raw + r * kWidth, c);
        Put(s + r * kWidth, c, hn::IfThenElse(moves, hn::Sub(x, base), At(s + r * kWidth, c)));
      }
      Put(z_.base, c, base), Put(z_.base_natural, c, hn::Mul(base, to_natural));
      Put(z_.guard, c, hn::IfThenElse(moves, hn::Set(kF, -INFINITY), guard));
      Put(top, c, hn::IfThenZeroElse(moves, At(top, c)));
      shifted_ = true;
    }
  }

  // O^T = f O^T + V^T P^T over n keys from `key` on, and l likewise. Accumulators start from zero:
  // loading O first would wait behind the stores of the tile before.
  HWY_NOINLINE void ProductWithV(std::int64_t key, std::int64_t n) {
    const char* v = v_ + key / A::kPer * sizes_.v_step_bytes();
    V f[kVecs];
    ANNULUS_UNROLL for (int c = 0; c < kVecs; ++c) f[c] = At(z_.f, c);
    float* o = z_.o;
    if constexpr (A::kRoundsP) AddWeights(n / A::kPer);
    if (HWY_UNLIKELY(call_.rule.dropout)) Drop(key, n);
    for (std::int64_t x = 0; x < sizes_.v_rows; x += kKeys, o += kKeys * kWidth) {
      Tile acc;
      Clear(acc);
      Multiply<A>(acc, v + x * 4, sizes_.v_step_bytes(), scratch_.p, kWidth * 4, n / A::kPer);
      ANNULUS_UNROLL for (int r = 0; r < kKeys; ++r) {
        ANNULUS_UNROLL for (int c = 0; c < kVecs; ++c) {
          Put(o + r * kWidth, c, hn::MulAdd(f[c], At(o + r * kWidth, c), acc[r][c]));
        }
      }
    }
    CloseBlock();
  }
  // w = f w + sum of the stored p: the product with a row of ones, 1 % of the block's work at d
  // = 64.
  HWY_INLINE void AddWeights(std::int64_t steps) {
    const V one = A::Ones();
    const float* p = reinterpret_cast<const float*>(scratch_.p);
    V sum[2][kVecs];  // two chains each: the latency of a product is six cycles
    ANNULUS_UNROLL for (int c = 0; c < kVecs; ++c) {
      sum[0][c] = hn::Mul(At(z_.f, c), At(z_.w, c)), sum[1][c] = hn::Zero(kF);
    }
    for (std::int64_t k = 0; k < steps; k += 2, p += 2 * kWidth) {  // whole tiles: steps is even
      ANNULUS_UNROLL for (int c = 0; c < kVecs; ++c) {
        sum[0][c] = A::Dot(sum[0][c], At(p, c), one),
        sum[1][c] = A::Dot(sum[1][c], At(p + kWidth, c), one);
      }
    }
    ANNULUS_UNROLL for (int c = 0; c < kVecs; ++c) Put(z_.w, c, hn::Add(sum[0][c], sum[1][c]));
  }
  // Dropped pairs leave P after its sums were taken: they count in l and w.
  HWY_NOINLINE void Drop(std::int64_t key, std::int64_t n) {
    char* p = scratch_.p;
    for (std::int64_t k = 0; k < n; k += A::kPer, p += kWidth * 4) {
      const std::uint32_t* keep = work_.keep_bits + key + k;
      for (int c = 0; c < kVecs; ++c) A::DropStored(p + c * kLanes * 4, keep, c * kLanes);
    }
  }
  HWY_INLINE void CloseBlock() {
    for (int c = 0; c < kVecs; ++c) {
      Put(z_.l, c, hn::MulAdd(At(z_.f, c), At(z_.l, c), At(z_.b, c)));
      Put(z_.b, c, hn::Zero(kF));
      Put(z_.f, c, hn::Set(kF, 1));
    }
  }

  // A poisoned tile by itself: float32 p, each lane adds only the values it sees.
  HWY_NOINLINE void SelectingTile(std::int64_t t) {
    float* s = scratch_.s[0];
    std::uint32_t bits[kKeys];
    for (int r = 0; r < kKeys; ++r) {
      bits[r] = work_.tile_class[t] == kTilePartial ? work_.lane_bits[t * kKeys + r] : ~0U;
      if (call_.rule.dropout) bits[r] &= work_.keep_bits[t * kKeys + r];
    }
    Tile acc;
    Clear(acc);
    Multiply<A>(acc, k_ + t * kKeys * sizes_.k_row_bytes(), kKeys * 4, z_.qt, kWidth * 4,
                sizes_.steps);
    alignas(64) float top[kWidth];
    if (Scores(acc, t, s, top)) Raise(top, 0, s);
    for (int c = 0; c < kVecs; ++c) {
      V sum = hn::Zero(kF), weights = hn::Mul(At(z_.f, c), At(z_.w, c));
      for (int r = 0; r < kKeys; ++r) {
        const V x = hn::MulSub(At(s + r * kWidth, c), hn::Set(kF, scale_), At(z_.m, c));
        const V e = Exp2<A::kDegree>(x);
        sum = hn::Add(sum, e), weights = hn::Add(weights, A::Rounded(e));
        Put(s + r * kWidth, c, A::Rounded(e));
      }
      Put(z_.b, c, sum), Put(z_.w, c, weights);
      for (std::int64_t d = 0; d < sizes_.v_rows; ++d) {
        V o = hn::Mul(At(z_.f, c), At(z_.o + d * kWidth, c));
        for (int r = 0; r < kKeys; ++r) {
          const V v = hn::Set(kF, A::Value(v_, t * kKeys + r, d, sizes_.v_step_bytes()));
          o = hn::IfThenElse(LaneMask(bits[r] >> (c * kLanes)),
                             hn::MulAdd(At(s + r * kWidth, c), v, o), o);
        }
        Put(z_.o + d * kWidth, c, o);
      }
    }
    CloseBlock();
  }

  // The next panel on its way into the L2, a few lines behind each pair of exponentials: the
  // largest single effect once K and V pass the L2 (3 points; 10 at d = 256).
  HWY_INLINE void Prefetch() {
    if (prefetch_lines_ <= 0) return;
    for (std::int64_t i = 0; i < prefetch_per_slot_; ++i) {
      PrefetchL2(prefetch_k_ + i * 64), PrefetchL2(prefetch_v_ + i * 64);
    }
    prefetch_k_ += prefetch_per_slot_ * 64, prefetch_v_ += prefetch_per_slot_ * 64;
    prefetch_lines_ -= prefetch_per_slot_;
  }

  const PanelCall& call_;
  const StripWork& work_;
  const Scratch scratch_;
  const Sizes<A> sizes_;
  const Strip z_;
  const char* k_;
  const char* v_;
  const std::uint8_t* poisoned_;
  bool plain_;
  bool shifted_ = false;  // some lane has a base
  float scale_;
  const char* prefetch_k_ = nullptr;
  const char* prefetch_v_ = nullptr;
  std::int64_t prefetch_lines_ = 0, prefetch_per_slot_ = 0;
};

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace annulus
ANNULUS_POP_TARGET
