// The attention backward of a block of strips against a panel of keys, written once and compiled
// per instruction set. Lanes are queries, as in the forward: S^T and dP^T come out with their lanes
// where P, dS and dQ need them, so nothing is transposed on the way.

#include <math.h>
#include <string.h>

#include "hwy/highway.h"
#include "kernels/kernel_table.h"
#include "kernels/tile-inl.h"

ANNULUS_PUSH_TARGET
namespace annulus {
namespace HWY_NAMESPACE {
namespace {

// Shapes of the packed operands.
//
//   keys    K tiles [tile][k-step][key][kPer] | V tiles likewise | K pairs [key / kPer][d][kPer] |
//           one byte per tile: K or V not finite
//   strip   Q^T [k-step][query][kPer] | dO^T likewise | Q pairs [query / kPer][d][kPer] | dO pairs
//           likewise | lse [query] in log2 units | delta [query] | flag: something not finite
template <class A>
struct BackwardSizes {
  static constexpr std::int64_t kRowBytes = kWidth * 4 / A::kPer;  // P of one key
  static constexpr std::int64_t kPairSteps = kWidth / A::kPer;
  std::int64_t k_steps, v_steps;  // of the tiles of S and dP
  std::int64_t dq_rows;           // rows of dQ^T, whole tiles
  std::int64_t k_row, v_row;      // floats of a row of dK, dV, whole vectors

  explicit BackwardSizes(Dims dims)
      : k_steps((dims.head_dim + A::kPer - 1) / A::kPer),
        v_steps((dims.v_head_dim + A::kPer - 1) / A::kPer),
        dq_rows(DqRows(dims.head_dim)),
        k_row(RowFloats(dims.head_dim)),
        v_row(RowFloats(dims.v_head_dim)) {}
  static std::int64_t RowFloats(std::int64_t dim) { return (dim + kLanes - 1) / kLanes * kLanes; }
  static std::int64_t DqRows(std::int64_t dim) { return (dim + kKeys - 1) / kKeys * kKeys; }
  static std::int64_t PadKeys(std::int64_t keys) { return (keys + kKeys - 1) / kKeys * kKeys; }

  std::int64_t k_tile_bytes() const { return k_steps * kKeys * 4; }
  std::int64_t v_tile_bytes() const { return v_steps * kKeys * 4; }
  std::int64_t key_pair_bytes() const { return dq_rows * 4; }  // kPer keys
  // One line more than the row: pairs 512 bytes apart would share an eighth of the L1.
  std::int64_t q_pair_bytes() const { return (k_row + kLanes) * 4; }
  std::int64_t o_pair_bytes() const { return (v_row + kLanes) * 4; }
};

template <class A>
struct PackedKeys {
  char *k, *v, *pairs;
  std::uint8_t* poisoned;
  PackedKeys(void* memory, const BackwardSizes<A>& sizes, std::int64_t num_keys) {
    const std::int64_t keys = sizes.PadKeys(num_keys), tiles = keys / kKeys;
    k = static_cast<char*>(memory);
    v = k + tiles * sizes.k_tile_bytes();
    pairs = v + tiles * sizes.v_tile_bytes();
    poisoned = reinterpret_cast<std::uint8_t*>(pairs + keys / A::kPer * sizes.key_pair_bytes());
  }
  static std::int64_t Bytes(const BackwardSizes<A>& sizes, std::int64_t num_keys) {
    const std::int64_t keys = sizes.PadKeys(num_keys), tiles = keys / kKeys;
    return (tiles * (sizes.k_tile_bytes() + sizes.v_tile_bytes() + 1) +
            keys / A::kPer * sizes.key_pair_bytes() + 63) /
           64 * 64;
  }
};

template <class A>
struct PackedStrip {
  char *qt, *ot, *q, *o;
  float *lse, *delta;
  float* base;  // of rows whose lse is far from 0, in natural units: lse is then 0
  std::uint32_t *poisoned, *shifted;
  PackedStrip(const void* memory, const BackwardSizes<A>& sizes) {
    qt = static_cast<char*>(const_cast<void*>(memory));
    ot = qt + sizes.k_steps * kWidth * 4;
    q = ot + sizes.v_steps * kWidth * 4;
    o = q + sizes.kPairSteps * sizes.q_pair_bytes();
    lse = reinterpret_cast<float*>(o + sizes.kPairSteps * sizes.o_pair_bytes());
    delta = lse + kWidth;
    base = delta + kWidth;
    poisoned = reinterpret_cast<std::uint32_t*>(base + kWidth), shifted = poisoned + 1;
  }
  static std::int64_t Bytes(const BackwardSizes<A>& sizes) {
    return ((sizes.k_steps + sizes.v_steps + 3) * kWidth * 4 +
            sizes.kPairSteps * (sizes.q_pair_bytes() + sizes.o_pair_bytes()) + 8 + 63) /
           64 * 64;
  }
};

template <class A>
class BackwardBlock {
 public:
  using Sizes = BackwardSizes<A>;
  static constexpr std::int64_t kRowBytes = Sizes::kRowBytes;
  static constexpr int kUnits = kKeys / 2;  // pieces in which a tile's vector work is dealt
  static constexpr std::int64_t kTileBytes = kKeys * kWidth * 4;

  static std::int64_t ScratchBytes(const BackwardBlocking& blocking) {
    const std::int64_t strips = blocking.block_rows / kWidth;
    return 4 * kTileBytes + 3 * strips * blocking.panel_keys * kRowBytes;
  }

  explicit BackwardBlock(const BackwardCall& call)
      : call_(call),
        sizes_(call.dims),
        keys_(const_cast<void*>(call.packed), sizes_, call.num_keys),
        tiles_((call.key_count + kKeys - 1) / kKeys),
        strip_bytes_(tiles_ * kKeys * kRowBytes),
        plain_(PlainScores(call.rule)),
        scale_(ExponentScale(call.rule)) {
    const std::int64_t tile = call.key_begin / kKeys;
    keys_.k += tile * sizes_.k_tile_bytes(), keys_.v += tile * sizes_.v_tile_bytes();
    keys_.pairs += call.key_begin / A::kPer * sizes_.key_pair_bytes(), keys_.poisoned += tile;
    s_ = static_cast<float*>(call.scratch);
    p_ = s_ + kTileBytes / 4, dp_ = p_ + kTileBytes / 4, slope_ = dp_ + kTileBytes / 4;
    char* rows = reinterpret_cast<char*>(slope_ + kTileBytes / 4);
    p_rows_ = rows;
    ds_rows_ = p_rows_ + call.strip_count * strip_bytes_;
    ds_pairs_ = A::kPer == 1 ? ds_rows_ : ds_rows_ + call.strip_count * strip_bytes_;
    AimPrefetch();
  }

  void Run() {
    if (MustSelect()) {
      for (std::int64_t i = 0; i < call_.strip_count; ++i) SelectingStrip(i);
      return;
    }
    for (std::int64_t i = 0; i < call_.strip_count; ++i) RunTiles(i);
    if (call_.want_dkv) {
      AddOuter(call_.dv, sizes_.v_row, p_rows_, &PackedStrip<A>::o, sizes_.o_pair_bytes());
      AddOuter(call_.dk, sizes_.k_row, ds_rows_, &PackedStrip<A>::q, sizes_.q_pair_bytes());
    }
    if (call_.want_dq) {
      for (std::int64_t i = 0; i < call_.strip_count; ++i) AddDq(i);
    }
  }

 private:
  // Zero times NaN would carry what is not finite from pairs that are seen to hidden ones.
  bool MustSelect() const {
    bool poison = false, all_seen = !call_.rule.dropout;
    for (std::int64_t t = 0; t < tiles_; ++t) poison |= keys_.poisoned[t] != 0;
    for (std::int64_t i = 0; i < call_.strip_count; ++i) {
      poison |= *PackedStrip<A>(call_.strips[i].packed, sizes_).poisoned != 0;
      for (std::int64_t t = 0; t < tiles_; ++t)
        all_seen &= call_.strips[i].tile_class[t] == kTileFull;
    }
    return poison && !all_seen;
  }

  // S and dP of one strip, tile by tile: the exponentials of a tile run beside its dP product, its
  // dS beside the S product of the next.
  HWY_NOINLINE void RunTiles(std::int64_t strip) {
    const BackwardStrip& work = call_.strips[strip];
    const PackedStrip<A> q(work.packed, sizes_);
    char *p_rows = p_rows_ + strip * strip_bytes_, *ds_rows = ds_rows_ + strip * strip_bytes_,
         *ds_pairs = ds_pairs_ + strip * strip_bytes_;
    std::int64_t before = -1;
    for (std::int64_t t = 0; t < tiles_; ++t) {
      const std::int64_t row = t * kKeys * kRowBytes;
      if (work.tile_class[t] == kTileEmpty) {
        memset(p_rows + row, 0, kKeys * kRowBytes), memset(ds_rows + row, 0, kKeys * kRowBytes);
        memset(ds_pairs + row, 0, kKeys * kRowBytes);
        continue;
      }
      Tile acc;
      Clear(acc);
      const char* a = keys_.k + t * sizes_.k_tile_bytes();
      if (before < 0) {
        Multiply<A>(acc, a, kKeys * 4, q.qt, kWidth * 4, sizes_.k_steps);
      } else {
        const std::int64_t back = before * kKeys * kRowBytes;
        MultiplyBeside(acc, a, q.qt, sizes_.k_steps, [&](int u) ANNULUS_ATTR {
          GradientUnit(u, q.delta, ds_rows + back, ds_pairs + back);
        });
      }
      FinishScores(acc, work, q, t);
      Clear(acc);
      MultiplyBeside(acc, keys_.v + t * sizes_.v_tile_bytes(), q.ot, sizes_.v_steps,
                     [&](int u) ANNULUS_ATTR { ExponentialUnit(u, q.lse, p_rows + row); });
      StoreTile(acc, dp_);
      if (!plain_ || call_.rule.dropout || work.ds != nullptr)
        Adjust(work, t, q.delta, p_rows + row);
      before = t;
    }
    if (before < 0) return;
    const std::int64_t back = before * kKeys * kRowBytes;
    for (int u = 0; u < kUnits; ++u) GradientUnit(u, q.delta, ds_rows + back, ds_pairs + back);
  }

  // Deals the units between the k-steps: they use the pipes that products leave idle. Without
  // AVX-512's registers the accumulators would spill instead.
  template <class Unit>
  HWY_INLINE void MultiplyBeside(Tile& acc, const char* a, const char* b, std::int64_t steps,
                                 const Unit& unit) {
#if HWY_TARGET <= HWY_AVX3
    const std::int64_t piece = steps / kUnits;
    for (int u = 0; u < kUnits; ++u) {
      unit(u);
      Prefetch();
      Multiply<A>(acc, a, kKeys * 4, b, kWidth * 4, piece);
      a += piece * kKeys * 4, b += piece * kWidth * 4;
    }
    Multiply<A>(acc, a, kKeys * 4, b, kWidth * 4, steps - piece * kUnits);
#else
    for (int u = 0; u < kUnits; ++u) unit(u), Prefetch();
    Clear(acc);
    Multiply<A>(acc, a, kKeys * 4, b, kWidth * 4, steps);
#endif
  }

  HWY_INLINE void FinishScores(Tile& acc, const BackwardStrip& work, const PackedStrip<A>& q,
                               std::int64_t t) {
    if (HWY_UNLIKELY(!plain_)) {
      StoreTile(acc, s_);
      TransformScores(call_.rule, call_.rule.bias ? work.bias + t * kKeys * kWidth : nullptr, s_,
                      slope_);
      LoadTile(acc, s_);
    }
    if (HWY_UNLIKELY(work.tile_class[t] == kTilePartial)) Hide(acc, work.lane_bits + t * kKeys);
    StoreTile(acc, s_);
    if (HWY_UNLIKELY(*q.shifted != 0)) Shift(q);
  }
  // A p is at most 1, however coarse the lse; and a score is rounded to natural units as the
  // forward rounded the base that lse is made of, so that a key alone keeps its weight.
  HWY_NOINLINE void Shift(const PackedStrip<A>& q) {
    const V to_natural = hn::Set(kF, scale_ * static_cast<float>(kLn2)), zero = hn::Zero(kF);
    const V to_stored = hn::Set(kF, 1 / (scale_ * static_cast<float>(kLn2)));
    for (int c = 0; c < kVecs; ++c) {
      const V base = At(q.base, c);
      for (int r = 0; r < kKeys; ++r) {
        const V x = At(s_ + r * kWidth, c);
        V natural = hn::Mul(x, to_natural);
        Pin(natural);  // no FMA: it would not round
        const V moved = hn::Min(hn::Mul(hn::Sub(natural, base), to_stored), zero);
        Put(s_ + r * kWidth, c, hn::IfThenElse(hn::Eq(base, zero), x, moved));
      }
    }
  }

  // p of keys 2u and 2u + 1: float32 for dS, rounded for dV.
  HWY_INLINE void ExponentialUnit(int u, const float* lse, char* rows) {
    const V scale = hn::Set(kF, scale_);
    ANNULUS_UNROLL for (int r = 2 * u; r < 2 * u + 2; ++r) {
      V e[kVecs];
      ANNULUS_UNROLL for (int c = 0; c < kVecs; ++c) {
        e[c] = Exp2<A::kDegree>(hn::MulSub(At(s_ + r * kWidth, c), scale, At(lse, c)));
        Put(p_ + r * kWidth, c, e[c]);
      }
      A::StoreRow(e, rows + r * kRowBytes);
    }
  }

  // p (dp - delta), 0 where p is: there dp may be anything.
  HWY_INLINE V Gradient(int r, int c, const float* delta) const {
    const V p = At(p_ + r * kWidth, c);
    const V ds = hn::Mul(p, hn::Sub(At(dp_ + r * kWidth, c), At(delta, c)));
    return hn::IfThenZeroElse(hn::Eq(p, hn::Zero(kF)), ds);  // NaN is not equal: it stays
  }
  HWY_INLINE void GradientUnit(int u, const float* delta, char* rows, char* pairs) {
    V ds[2][kVecs];
    ANNULUS_UNROLL for (int i = 0; i < 2; ++i) {
      ANNULUS_UNROLL for (int c = 0; c < kVecs; ++c) ds[i][c] = Gradient(2 * u + i, c, delta);
      A::StoreRow(ds[i], rows + (2 * u + i) * kRowBytes);
    }
    if constexpr (A::kPer > 1) {
      ANNULUS_UNROLL for (int c = 0; c < kVecs; ++c) {
        A::StorePair(ds[0][c], ds[1][c], pairs + 2 * u * kRowBytes + c * kLanes * 4, kRowBytes);
      }
    }
  }

  // Options on the stored tile: dropout on dp and the rounded p, dbias, the cap's derivative.
  HWY_NOINLINE void Adjust(const BackwardStrip& work, std::int64_t t, const float* delta,
                           char* p_rows) {
    const std::uint32_t* keep = work.keep_bits + t * kKeys;
    const V keep_scale = hn::Set(kF, call_.rule.keep_scale);
    for (int r = 0; r < kKeys; ++r) {
      if (call_.rule.dropout && p_rows != nullptr)
        A::template DropRow<kVecs>(p_rows + r * kRowBytes, keep[r]);
      for (int c = 0; c < kVecs; ++c) {
        float* dp = dp_ + r * kWidth;
        if (call_.rule.dropout) {
          Put(dp, c,
              hn::IfThenElseZero(LaneMask(keep[r] >> (c * kLanes)),
                                 hn::Mul(keep_scale, At(dp, c))));
        }
        if (work.ds != nullptr) Put(work.ds + (t * kKeys + r) * kWidth, c, Gradient(r, c, delta));
        if (call_.rule.cap > 0) {
          float* p = p_ + r * kWidth;
          Put(p, c, hn::Mul(At(p, c), At(slope_ + r * kWidth, c)));
        }
      }
    }
  }

  // c[key][x] += sum over the block's queries of rows[key][query] * pairs[query][x].
  HWY_NOINLINE void AddOuter(float* c, std::int64_t row_floats, const char* rows,
                             char* PackedStrip<A>::*pairs, std::int64_t pair_bytes) {
    std::int64_t x = 0;
    for (; x + kWidth <= row_floats; x += kWidth)
      AddColumns<kVecs>(c + x, row_floats, rows, pairs, x * 4, pair_bytes);
    for (; x < row_floats; x += kLanes)
      AddColumns<1>(c + x, row_floats, rows, pairs, x * 4, pair_bytes);
  }
  template <int kColumns>
  HWY_INLINE void AddColumns(float* c, std::int64_t row_floats, const char* rows,
                             char* PackedStrip<A>::*pairs, std::int64_t offset,
                             std::int64_t pair_bytes) {
    for (std::int64_t t = 0; t < tiles_; ++t) {
      V acc[kKeys][kColumns];
      Clear(acc);
      bool any = false;
      for (std::int64_t i = 0; i < call_.strip_count; ++i) {
        if (call_.strips[i].tile_class[t] == kTileEmpty) continue;
        any = true;
        const PackedStrip<A> q(call_.strips[i].packed, sizes_);
        Multiply<A, kRowBytes>(acc, rows + i * strip_bytes_ + t * kKeys * kRowBytes, 4,
                               q.*pairs + offset, pair_bytes, Sizes::kPairSteps);
      }
      if (!any) continue;
      float* to = c + t * kKeys * row_floats;
      ANNULUS_UNROLL for (int r = 0; r < kKeys; ++r) {
        ANNULUS_UNROLL for (int i = 0; i < kColumns; ++i) {
          Put(to + r * row_floats, i, hn::Add(At(to + r * row_floats, i), acc[r][i]));
        }
      }
    }
  }

  // dQ^T += K^T dS^T over the keys from the first tile that is seen to the last.
  HWY_NOINLINE void AddDq(std::int64_t strip) {
    const BackwardStrip& work = call_.strips[strip];
    std::int64_t first = 0, end = tiles_;
    while (first < end && work.tile_class[first] == kTileEmpty) ++first;
    while (end > first && work.tile_class[end - 1] == kTileEmpty) --end;
    const std::int64_t steps = (end - first) * kKeys / A::kPer,
                       step_bytes = sizes_.key_pair_bytes();
    const char* k = keys_.pairs + first * kKeys / A::kPer * step_bytes;
    const char* ds = ds_pairs_ + strip * strip_bytes_ + first * kKeys * kRowBytes;
    float* dq = work.dq;
    for (std::int64_t x = 0; x < sizes_.dq_rows; x += kKeys, dq += kKeys * kWidth) {
      Tile acc;
      Clear(acc);
      Multiply<A>(acc, k + x * 4, step_bytes, ds, kWidth * 4, steps);
      ANNULUS_UNROLL for (int r = 0; r < kKeys; ++r) {
        ANNULUS_UNROLL for (int c = 0; c < kVecs; ++c) {
          float* to = dq + r * kWidth;
          Put(to, c, hn::Add(At(to, c), acc[r][c]));
        }
      }
    }
  }

  // A strip where something is not finite and something is hidden: float32 p and dS, every pair
  // adds only what it sees.
  HWY_NOINLINE void SelectingStrip(std::int64_t strip) {
    const BackwardStrip& work = call_.strips[strip];
    const PackedStrip<A> q(work.packed, sizes_);
    for (std::int64_t t = 0; t < tiles_; ++t) {
      if (work.tile_class[t] == kTileEmpty) continue;
      const bool partial = work.tile_class[t] == kTilePartial;
      Tile acc;
      Clear(acc);
      Multiply<A>(acc, keys_.k + t * sizes_.k_tile_bytes(), kKeys * 4, q.qt, kWidth * 4,
                  sizes_.k_steps);
      FinishScores(acc, work, q, t);
      Clear(acc);
      Multiply<A>(acc, keys_.v + t * sizes_.v_tile_bytes(), kKeys * 4, q.ot, kWidth * 4,
                  sizes_.v_steps);
      StoreTile(acc, dp_);
      for (int r = 0; r < kKeys; ++r) {
        const std::uint32_t seen = partial ? work.lane_bits[t * kKeys + r] : ~0U;
        for (int c = 0; c < kVecs; ++c) {
          const V e = Exp2<A::kDegree>(
              hn::MulSub(At(s_ + r * kWidth, c), hn::Set(kF, scale_), At(q.lse, c)));
          Put(p_ + r * kWidth, c, hn::IfThenElseZero(LaneMask(seen >> (c * kLanes)), e));
        }
      }
      memcpy(s_, p_, kTileBytes);  // without the cap's derivative, for dV
      Adjust(work, t, q.delta, nullptr);
      for (int r = 0; r < kKeys; ++r) {
        const std::uint32_t seen = partial ? work.lane_bits[t * kKeys + r] : ~0U;
        const std::uint32_t keep = call_.rule.dropout ? work.keep_bits[t * kKeys + r] : ~0U;
        alignas(64) float ds[kWidth];
        for (int c = 0; c < kVecs; ++c) Put(ds, c, Gradient(r, c, q.delta));
        for (int n = 0; n < kWidth; ++n) {
          if ((seen >> n & 1U) != 0)
            AddPair(work, q, t * kKeys + r, n, ds[n], (keep >> n & 1U) != 0);
        }
      }
    }
  }
  void AddPair(const BackwardStrip& work, const PackedStrip<A>& q, std::int64_t key, int n,
               float ds, bool kept) {
    if (call_.want_dkv && kept) {
      for (std::int64_t x = 0; x < call_.dims.v_head_dim; ++x) {
        call_.dv[key * sizes_.v_row + x] +=
            s_[key % kKeys * kWidth + n] * A::Value(q.o, n, x, sizes_.o_pair_bytes());
      }
    }
    if (ds == 0) return;
    for (std::int64_t x = 0; x < call_.dims.head_dim; ++x) {
      if (call_.want_dkv)
        call_.dk[key * sizes_.k_row + x] += ds * A::Value(q.q, n, x, sizes_.q_pair_bytes());
      if (call_.want_dq)
        work.dq[x * kWidth + n] += ds * A::Value(keys_.pairs, key, x, sizes_.key_pair_bytes());
    }
  }

  // The next block on its way into the L2, a few lines behind each unit.
  void AimPrefetch() {
    const std::int64_t slots = call_.strip_count * tiles_ * 2 * kUnits;
    per_slot_ = (call_.next_strip_bytes / 64 + slots - 1) / (slots > 0 ? slots : 1);
    dq_per_slot_ = (call_.next_dq_bytes / 64 + slots - 1) / (slots > 0 ? slots : 1);
    next_ = call_.next_strips, next_end_ = next_ + call_.next_strip_bytes;
    next_dq_ = call_.next_dq, next_dq_end_ = next_dq_ + call_.next_dq_bytes;
  }
  HWY_INLINE void Prefetch() {
    for (std::int64_t i = 0; i < per_slot_ && next_ < next_end_; ++i, next_ += 64)
      PrefetchL2(next_);
    for (std::int64_t i = 0; i < dq_per_slot_ && next_dq_ < next_dq_end_; ++i, next_dq_ += 64)
      __builtin_prefetch(next_dq_, 1, 2);
  }

  const BackwardCall& call_;
  const Sizes sizes_;
  PackedKeys<A> keys_;  // of the panel
  const std::int64_t tiles_;
  const std::int64_t strip_bytes_;  // scratch rows of one strip
  const bool plain_;
  const float scale_;
  // The tile at hand [key][query]: scores, float32 p, dp, derivative of the cap.
  float *s_, *p_, *dp_, *slope_;
  // P and dS of the block: rows [strip][key][query], pairs [strip][key / kPer][query][kPer].
  char *p_rows_, *ds_rows_, *ds_pairs_;
  const char *next_ = nullptr, *next_end_ = nullptr;
  char *next_dq_ = nullptr, *next_dq_end_ = nullptr;
  std::int64_t per_slot_ = 0, dq_per_slot_ = 0;
};

// -------------------------------------------------------------------------------------------------
// the entries of the table

// A panel's K, V (packed three times) and its dK, dV stay in the L2 while the queries pass: bf16, d
// = 128: 192 + 256 KB, beside two blocks of 300 KB, just above the 1 MB at hand. Against 128 keys,
// 256 save trips of dQ (90 against 88 % of peak at d = 64, 91 against 90 at 128, 93 against 87 at
// 256); blocks of 128 rows save trips of dK and dV against 64 (16K tokens: 86.7 against 84.4 % at d
// = 64, 88.5 against 87.6 at 128). 384 keys gain one point more and halve what short sequences can
// share out to threads.
template <class A>
BackwardBlocking BackwardBlockingOf(Dims /*dims*/) {
  return {256, 128 / kWidth * kWidth};
}
template <class A>
std::int64_t BackwardScratchBytes(Dims /*dims*/, BackwardBlocking blocking) {
  return BackwardBlock<A>::ScratchBytes(blocking);
}
template <class A>
std::int64_t BackwardPackedBytes(Dims dims, std::int64_t num_keys) {
  return PackedKeys<A>::Bytes(BackwardSizes<A>(dims), num_keys);
}
template <class A>
std::int64_t BackwardStripBytes(Dims dims) {
  return PackedStrip<A>::Bytes(BackwardSizes<A>(dims));
}

template <class A>
void PackBackwardKeys(void* packed, const RowSource& k, const RowSource& v, Dims dims,
                      std::int64_t num_keys, std::int64_t key_begin, std::int64_t key_end) {
  const BackwardSizes<A> sizes(dims);
  const PackedKeys<A> to(packed, sizes, num_keys);
  for (std::int64_t key = key_begin; key < key_end; key += kKeys) {
    const std::int64_t tile = key / kKeys;
    const void *k_rows[kKeys], *v_rows[kKeys];
    RowsOfTile(k, key, num_keys, k_rows), RowsOfTile(v, key, num_keys, v_rows);
    char *k_tile = to.k + tile * sizes.k_tile_bytes(), *v_tile = to.v + tile * sizes.v_tile_bytes();
    TransposeTile<A>(k_rows, k, dims.head_dim, sizes.k_steps, k_tile);
    TransposeTile<A>(v_rows, v, dims.v_head_dim, sizes.v_steps, v_tile);
    A::PackValues(to.pairs + key / A::kPer * sizes.key_pair_bytes(), k_rows, kKeys, k,
                  dims.head_dim, sizes.dq_rows);
    to.poisoned[tile] = A::AnyNotFinite(k_tile, sizes.k_tile_bytes() / 4) ||
                                A::AnyNotFinite(v_tile, sizes.v_tile_bytes() / 4)
                            ? 1
                            : 0;
  }
}

template <class A>
void PackBackwardStrip(void* memory, const StripRows& rows, Dims dims) {
  const BackwardSizes<A> sizes(dims);
  const PackedStrip<A> to(memory, sizes);
  const RowSource q{nullptr, nullptr, 0, rows.q_dim_stride_bytes, rows.q_element};
  const RowSource dout{nullptr, nullptr, 0, rows.dout_dim_stride_bytes, rows.dout_element};
  TransposeStrip<A>(rows.q, rows.count, q, dims.head_dim, sizes.k_steps, to.qt);
  TransposeStrip<A>(rows.dout, rows.count, dout, dims.v_head_dim, sizes.v_steps, to.ot);
  const void *q_rows[kWidth], *o_rows[kWidth];
  bool poisoned = false, shifted = false;
  for (int n = 0; n < kWidth; ++n) {
    const bool real = n < rows.count;
    q_rows[n] = real ? rows.q[n] : nullptr, o_rows[n] = real ? rows.dout[n] : nullptr;
    // A row that sees nothing has lse -inf; +inf instead makes its p 0 without a branch.
    const float given = real && rows.lse[n] != -INFINITY ? rows.lse[n] : INFINITY;
    const bool far = isfinite(given) && fabsf(given * kLog2e) > kFarExponent;
    const float lse = far ? 0 : given * kLog2e;
    to.base[n] = far ? given : 0;
    shifted |= far;
    to.lse[n] = lse, to.delta[n] = real ? rows.delta[n] : 0;
    poisoned |= real && (isnan(lse) || rows.lse[n] == INFINITY || !isfinite(rows.delta[n]));
  }
  A::PackValues(to.q, q_rows, kWidth, q, dims.head_dim, sizes.q_pair_bytes() / 4);
  A::PackValues(to.o, o_rows, kWidth, dout, dims.v_head_dim, sizes.o_pair_bytes() / 4);
  poisoned |= A::AnyNotFinite(to.qt, sizes.k_steps * kWidth) ||
              A::AnyNotFinite(to.ot, sizes.v_steps * kWidth);
  *to.poisoned = poisoned ? 1 : 0, *to.shifted = shifted ? 1 : 0;
}

template <class A>
void RunBackwardBlock(const BackwardCall& call) {
  BackwardBlock<A>(call).Run();
}

template <class A>
void UnloadDq(const float* dq, float factor, float* rows, std::int64_t stride, Dims dims) {
  float factors[kWidth];
  for (float& f : factors) f = factor;
  TransposeOut(dq, kWidth, factors, dims.head_dim, rows, stride);
}

template <class A>
constexpr BackwardKernel MakeBackward(const char* target, const char* arithmetic, Element compute) {
  return {target,
          arithmetic,
          compute,
          kWidth,
          kKeys,
          BackwardBlockingOf<A>,
          {INT64_MAX, INT64_MAX},
          BackwardScratchBytes<A>,
          BackwardPackedBytes<A>,
          BackwardStripBytes<A>,
          BackwardSizes<A>::RowFloats,
          BackwardSizes<A>::DqRows,
          PackBackwardKeys<A>,
          PackBackwardStrip<A>,
          RunBackwardBlock<A>,
          UnloadDq<A>};
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace annulus
ANNULUS_POP_TARGET
