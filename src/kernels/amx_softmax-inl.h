// From scores to probabilities in the AMX kernel: exponentials, masks, soft cap, bias, and the
// reference that takes the place of a running maximum. Included by amx_bf16.cc inside its target
// region.
//
// There is no pass over the maxima. Beside the products a maximum costs as much as an FMA, one of
// seven. Instead a lane keeps its reference m until a sum of p exceeds kTrip. The scores of that
// slot still lie in memory, so m is raised and that slot's p are made again; p made earlier in the
// block, their sums, O, l and w are multiplied by a power of two, which rounds nothing. Lanes that
// did not trip get a factor of one and the same bits again. A strip that has tripped is watched:
// its maxima are taken before the exponentials, so that scores growing in every slot pay for a
// maximum each time, not for a second exponential.
#pragma once

#include "kernels/amx_pack-inl.h"

namespace annulus {
namespace {

// A sum trips at half of what a p may be (kGuard), so every lane that a watched strip would raise
// also trips when it is not watched: neighbours do not matter.
constexpr float kTrip = 0x1p39F;
// Slots a strip is watched after it grew. Growth of 1 a key needs a raise every second tile:
// without memory it would be found too late each time.
constexpr std::int32_t kWatchedSlots = 8;

constexpr int kUpperHalf = -0x10000;  // of 32 bits: a bf16 number as float32

// 2^x; relative error 2.7e-6 (lse may be off by 4e-6), exactly 0 for -inf, +inf for +inf, NaN for
// NaN. vreduceps is x - floor(x) and vscalefps multiplies by 2^floor(x), so the integer part is
// never formed. Minimax on [0, 1).
[[gnu::always_inline]] inline __m512 exp2(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, 1);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(1.3534168e-2F), f, _mm512_set1_ps(5.201146e-2F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4144275e-1F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9300383e-1F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0000026F));
  return _mm512_scalef_ps(p, x);
}

// tanh, about 2 ulp. Below 0.625 an odd polynomial (minimax, 4.4e-9), since 1 - e^-2x cancels
// there; beyond it (1 - t) / (1 + t), t = e^-2x, with a polynomial of degree 5 (1.5e-7, reduced by
// t < 0.29).
inline __m512 tanh(__m512 x) {
  const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0F)),
               size = _mm512_andnot_ps(_mm512_set1_ps(-0.0F), x);
  const __m512 one = _mm512_set1_ps(1), square = _mm512_mul_ps(x, x);
  __m512 small = _mm512_fmadd_ps(_mm512_set1_ps(-5.704986862838268e-3F), square,
                                 _mm512_set1_ps(2.06390880048275e-2F));
  small = _mm512_fmadd_ps(small, square, _mm512_set1_ps(-5.373971536755562e-2F));
  small = _mm512_fmadd_ps(small, square, _mm512_set1_ps(1.3331441581249237e-1F));
  small = _mm512_fmadd_ps(small, square, _mm512_set1_ps(-3.333328068256378e-1F));
  small = _mm512_fmadd_ps(_mm512_mul_ps(small, square), x, x);

  const __m512 y = _mm512_mul_ps(size, _mm512_set1_ps(static_cast<float>(-2 * kLog2e)));
  const __m512 f = _mm512_reduce_ps(y, 1);
  __m512 t = _mm512_fmadd_ps(_mm512_set1_ps(1.8775768e-3F), f, _mm512_set1_ps(8.98934e-3F));
  t = _mm512_fmadd_ps(t, f, _mm512_set1_ps(5.5826318e-2F));
  t = _mm512_fmadd_ps(t, f, _mm512_set1_ps(2.4015361e-1F));
  t = _mm512_fmadd_ps(t, f, _mm512_set1_ps(6.931531e-1F));
  t = _mm512_scalef_ps(_mm512_fmadd_ps(t, f, _mm512_set1_ps(9.9999994e-1F)), y);
  const __m512 large = _mm512_div_ps(_mm512_sub_ps(one, t), _mm512_add_ps(one, t));
  const __mmask16 is_small = _mm512_cmp_ps_mask(size, _mm512_set1_ps(0.625F), _CMP_LT_OQ);
  return _mm512_mask_mov_ps(_mm512_or_ps(large, sign), is_small, small);
}

// How a stored score becomes an exponent.
struct Rule {
  ScoreRule score;
  bool plain;   // the product is the stored score: no pass over S
  float scale;  // log2 units of a stored score

  // Not plain at a scale of 0 or below either: -inf, a hidden score, must stay -inf.
  explicit Rule(const ScoreRule& r)
      : score(r),
        plain(r.cap == 0 && !r.bias && r.scale > 0),
        scale(static_cast<float>(plain ? kLog2e * r.scale : kLog2e)) {}
};

// Keys that wait for one product with V: tiles of a panel that some lane of the strip sees. They
// are exponentiated in whole groups, filled up with the last one again, hidden.
struct Block {
  Strip strip;
  const StripWork* work;
  const Bf16* k;                     // tile 0 of the block
  const Bf16* v;                     // unit 0 of tile 0
  std::int64_t first;                // tile 0 in the panel
  int live, slots;                   // tiles, groups
  int steps;                         // tiles in the product with V
  std::uint8_t tile[kMaxBlock];      // place in the block, of each tile of each group
  std::uint8_t step[kMaxBlock];      // the same of each tile in the product with V
  std::uint8_t selected[kMaxBlock];  // and of those whose values are added by selection
  int num_selected;
  std::uint32_t prepared;  // bit per slot: its scores need a pass

  // Where P of tile j lies. Those that fill up a group share a place that nobody reads.
  int place(int j, const Sizes& sizes) const { return j < live ? tile[j] : sizes.block; }
};

// ------------------------------------------------------------------------------------------ the
// fast path

// Of the open block: p and p as bf16.
struct Sums {
  __m512 l[2], w[2];

  [[gnu::always_inline]] static Sums load(const Strip& strip) {
    const Strip::Head& z = *strip.head;
    return {{_mm512_load_ps(z.bl), _mm512_load_ps(z.bl + kLanes)},
            {_mm512_load_ps(z.bw), _mm512_load_ps(z.bw + kLanes)}};
  }
  [[gnu::always_inline]] void store(const Strip& strip) const {
    for (int half = 0; half < 2; ++half) {
      _mm512_store_ps(strip.head->bl + half * kLanes, l[half]);
      _mm512_store_ps(strip.head->bw + half * kLanes, w[half]);
    }
  }
  [[gnu::always_inline]] bool tripped() const {
    const __m512 trip = _mm512_set1_ps(kTrip);  // a NaN does not trip: no reference would cure it
    return (_mm512_cmp_ps_mask(l[0], trip, _CMP_GT_OQ) |
            _mm512_cmp_ps_mask(l[1], trip, _CMP_GT_OQ)) != 0;
  }
};

// The softmax of one strip while one slot passes.
struct Softmax {
  __m512 scale, minus_m[2];
  Sums sums;

  [[gnu::always_inline]] Softmax(const Strip& strip, const Rule& rule)
      : scale(_mm512_set1_ps(rule.scale)), sums(Sums::load(strip)) {
    for (int half = 0; half < 2; ++half) {
      const __m512 m = _mm512_load_ps(strip.head->m + half * kLanes);
      minus_m[half] = _mm512_sub_ps(_mm512_setzero_ps(), m);
    }
  }

  // Pair j of a square's 32 (16 of each half): two keys of S^T -> one row of P^T.
  [[gnu::always_inline]] void pair(const float* s, Bf16* p, int j) {
    const int half = j >= 16 ? 1 : 0;
    s += j * 32;
    const __m512 e0 = exp2(_mm512_fmadd_ps(_mm512_load_ps(s), scale, minus_m[half]));
    const __m512 e1 = exp2(_mm512_fmadd_ps(_mm512_load_ps(s + kLanes), scale, minus_m[half]));
    // Half an ulp, then the upper half: cut without it, every p is too small and the error doubles.
    // The addition and the byte shift run on the port that has no FMA; a shift by bits would not.
    const __m512i half_ulp = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(kUpperHalf);
    const __m512i u0 = _mm512_add_epi32(_mm512_castps_si512(e0), half_ulp);
    const __m512i u1 = _mm512_add_epi32(_mm512_castps_si512(e1), half_ulp);
    const __m512 rounded0 = _mm512_castsi512_ps(_mm512_and_si512(u0, upper));
    const __m512 rounded1 = _mm512_castsi512_ps(_mm512_and_si512(u1, upper));
    __m512 &l = sums.l[half], &w = sums.w[half];
    l = _mm512_add_ps(l, _mm512_add_ps(e0, e1));
    w = _mm512_add_ps(w, _mm512_add_ps(rounded0, rounded1));
    // Now, not later: GCC defers all additions of a slot to its end otherwise and spills 200
    // vectors (d = 64: 42 % of peak instead of 53).
    asm volatile("" : "+v"(l), "+v"(w));
    const __m512i low = _mm512_bsrli_epi128(u0, 2);
    _mm512_store_si512(p + j * 32, _mm512_mask_blend_epi16(0xAAAAAAAAU, low, u1));
  }
};

// All of a slot at once.
[[gnu::noinline]] void exponentials(const Block& block, int slot, const float* s, Bf16* p,
                                    const Rule& rule, const Sizes& sizes) {
  Softmax softmax(block.strip, rule);
  for (int g = 0; g < sizes.group; ++g, s += kSquare) {
    Bf16* to = p + block.place(slot * sizes.group + g, sizes) * kSquare;
    for (int j = 0; j < 16; ++j) softmax.pair(s, to, j);
    for (int j = 16; j < 32; ++j) softmax.pair(s, to, j);
  }
  softmax.sums.store(block.strip);
}

// ------------------------------------------------------------------------------------------ passes
// over the scores

// To natural units, with soft cap and bias. `slope`, if given, receives the cap's derivative. A NaN
// becomes the usual one: rounding up would carry one of all ones, as a bias may hold it, into its
// sign.
inline void transform(float* s, const float* bias, const ScoreRule& rule, float* slope) {
  const __m512 scale = _mm512_set1_ps(rule.scale), cap = _mm512_set1_ps(rule.cap);
  for (int key = 0; key < kTileKeys; ++key) {
    for (int half = 0; half < 2; ++half) {
      const int at = half * 512 + key * kLanes;
      __m512 x = _mm512_mul_ps(scale, _mm512_load_ps(s + at));
      if (rule.cap > 0) {
        const __m512 t = tanh(_mm512_div_ps(x, cap));
        x = _mm512_mul_ps(cap, t);
        if (slope != nullptr)
          _mm512_store_ps(slope + at, _mm512_fnmadd_ps(t, t, _mm512_set1_ps(1)));
      }
      if (rule.bias) x = _mm512_add_ps(x, _mm512_loadu_ps(bias + key * kStripRows + half * kLanes));
      const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
      _mm512_store_ps(s + at, _mm512_mask_mov_ps(x, nan, _mm512_set1_ps(kNan)));
    }
  }
}

// Hidden scores become -inf by selection, so a NaN there goes no further. `bits` null: all hidden.
inline void hide(float* s, const std::uint32_t* bits) {
  const __m512 hidden = _mm512_set1_ps(-kInfinity);
  for (int key = 0; key < kTileKeys; ++key) {
    const std::uint32_t dark = bits == nullptr ? ~0U : ~bits[key];
    _mm512_mask_store_ps(s + key * kLanes, static_cast<__mmask16>(dark), hidden);
    _mm512_mask_store_ps(s + 512 + key * kLanes, static_cast<__mmask16>(dark >> 16), hidden);
  }
}

[[gnu::noinline]] void prepare(const Block& block, int slot, float* s, const Rule& rule,
                               const Sizes& sizes) {
  const StripWork& work = *block.work;
  for (int j = slot * sizes.group; j < (slot + 1) * sizes.group; ++j, s += kSquare) {
    const std::int64_t tile = block.first + block.tile[j];
    if (j >= block.live) {
      hide(s, nullptr);
      continue;
    }
    if (!rule.plain) transform(s, work.bias + tile * kTileKeys * kStripRows, rule.score, nullptr);
    if (work.tile_class[tile] == kTilePartial) hide(s, work.lane_bits + tile * kTileKeys);
  }
}

// ------------------------------------------------------------------------------------------ the
// reference

// Of one slot: less the base of their lanes, and as they were if some lane has one.
struct Scores {
  float *shifted, *raw;
};

// Lanes without a base subtract 0.
[[gnu::noinline]] void subtract_base(const Strip::Head& z, const Scores& s, int group) {
  memcpy(s.raw, s.shifted, static_cast<std::size_t>(group * kSquare) * sizeof(float));
  for (int i = 0; i < group * kSquare; i += kLanes) {
    const __m512 base = _mm512_load_ps(z.base + i / 512 % 2 * kLanes);
    _mm512_store_ps(s.shifted + i, _mm512_sub_ps(_mm512_load_ps(s.shifted + i), base));
  }
}

inline void scale_lanes(float* x, __m512 factor) {
  _mm512_store_ps(x, _mm512_mul_ps(factor, _mm512_load_ps(x)));
}

// Multiplies one half of P of a tile. A power of two: bf16 loses nothing above its least normal
// number, and what is below the tile products take for zero.
inline void scale_p(Bf16* p, __m512 factor) {
  for (int j = 0; j < 16; ++j) {
    const __m512i pair = _mm512_load_si512(p + j * 32);
    const __m512 even = _mm512_mul_ps(factor, _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)));
    const __m512i upper = _mm512_and_si512(pair, _mm512_set1_epi32(kUpperHalf));
    const __m512 odd = _mm512_mul_ps(factor, _mm512_castsi512_ps(upper));
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
    _mm512_store_si512(p + j * 32,
                       _mm512_mask_blend_epi16(0xAAAAAAAAU, low, _mm512_castps_si512(odd)));
  }
}

// The slot's largest score of each lane. A NaN is passed over: its lane is lost anyway.
inline __m512 top_score(const float* s, int half, int group) {
  __m512 top[4];  // the latency of a maximum
  for (__m512& x : top) x = _mm512_set1_ps(-kInfinity);
  for (int g = 0; g < group; ++g) {
    const float* at = s + g * kSquare + half * 512;
    for (int r = 0; r < kTileKeys; r += 4) {
      for (int i = 0; i < 4; ++i)
        top[i] = _mm512_max_ps(_mm512_load_ps(at + (r + i) * kLanes), top[i]);
    }
  }
  return _mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3]));
}

// Gives a base to the lanes of `fresh` whose exponent is far from 0: the slot's largest score,
// which becomes 0. They have seen nothing that counts beside it: that vanishes, as if it had not
// been seen. Scores follow from those without a base: scores that differ may not differ any more
// once another base was subtracted. Returns the lanes.
inline __mmask16 rebase(Strip::Head& z, int half, __mmask16 fresh, __m512 exponent,
                        const Rule& rule, const float* raw, float* s, int group) {
  const int at = half * kLanes;
  const __mmask16 far = _mm512_mask_cmp_ps_mask(fresh, _mm512_abs_ps(exponent),
                                                _mm512_set1_ps(kFarExponent), _CMP_GT_OQ);
  if (far == 0) return 0;
  const __m512 limit = _mm512_set1_ps(kLargest);
  // Finite, so that nothing becomes inf - inf. The p of a score of +inf is inf, which stays.
  const __m512 base = _mm512_max_ps(top_score(raw, half, group), _mm512_set1_ps(-kLargest));
  const __mmask16 moves = _mm512_mask_cmp_ps_mask(far, base, limit, _CMP_LE_OQ);
  if (moves == 0) return 0;
  for (int g = 0; g < group; ++g) {
    for (int key = 0; key < kTileKeys; ++key) {
      const int i = g * kSquare + half * 512 + key * kLanes;
      _mm512_mask_store_ps(s + i, moves, _mm512_sub_ps(_mm512_load_ps(raw + i), base));
    }
  }
  const __m512 to_natural = _mm512_set1_ps(rule.scale * static_cast<float>(kLn2));
  _mm512_mask_store_ps(z.base + at, moves, base);
  _mm512_mask_store_ps(z.base_natural + at, moves, _mm512_mul_ps(base, to_natural));
  z.shifted = 1;
  return moves;
}

// Raises the lanes whose scores in this slot top their guard: base, m, bl, bw, f, and P of the
// slots of the block before. Returns whether there was one.
[[gnu::noinline]] bool raise_lanes(const Block& block, int slot, const Scores& s, Bf16* p,
                                   const Rule& rule, const Sizes& sizes) {
  Strip::Head& z = *block.strip.head;
  const float* raw = z.shifted != 0 ? s.raw : s.shifted;
  bool any = false, grown = false, unset_left = false;
  for (int half = 0; half < 2; ++half) {
    const int at = half * kLanes;
    const __m512 guard = _mm512_load_ps(z.guard + at), m = _mm512_load_ps(z.m + at);
    const __m512 highest = top_score(s.shifted, half, sizes.group);
    const __mmask16 seen = _mm512_cmp_ps_mask(highest, _mm512_set1_ps(-kInfinity), _CMP_GT_OQ);
    __m512 top = _mm512_mul_ps(highest, _mm512_set1_ps(rule.scale));
    top = _mm512_mask_max_ps(top, seen, top, _mm512_set1_ps(-kLargest));
    const __mmask16 up = _mm512_cmp_ps_mask(top, guard, _CMP_GT_OQ);
    const __mmask16 unset = _mm512_cmp_ps_mask(guard, _mm512_set1_ps(-kInfinity), _CMP_EQ_OQ);
    const auto growing = static_cast<__mmask16>(up & ~unset);
    unset_left |= (unset & ~up) != 0;
    if (up == 0) continue;
    any = true, grown |= growing != 0;
    // Finite even for a score of +inf, whose p is then inf, as the formula has it.
    __m512 to = _mm512_roundscale_ps(top, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
    const __mmask16 near =
        _mm512_mask_cmp_ps_mask(growing, _mm512_sub_ps(to, m), _mm512_set1_ps(kFar), _CMP_LE_OQ);
    const auto fresh = static_cast<__mmask16>(up & ~near);
    const __mmask16 moved = rebase(z, half, fresh, top, rule, raw, s.shifted, sizes.group);
    to = _mm512_mask_mov_ps(to, moved, _mm512_setzero_ps());
    to = _mm512_mask_add_ps(to, near, to, _mm512_set1_ps(kRoom));
    to = _mm512_mask_mov_ps(m, up, _mm512_min_ps(to, _mm512_set1_ps(0x1p126F)));
    _mm512_store_ps(z.m + at, to);
    _mm512_mask_store_ps(z.guard + at, up, _mm512_add_ps(to, _mm512_set1_ps(kGuard)));
    if (growing == 0) continue;  // lanes without a reference have nothing to scale yet
    const __m512 one = _mm512_set1_ps(1);
    __m512 factor = _mm512_mask_scalef_ps(one, growing, one, _mm512_sub_ps(m, to));
    factor = _mm512_mask_mov_ps(factor, moved, _mm512_setzero_ps());
    scale_lanes(z.bl + at, factor), scale_lanes(z.bw + at, factor), scale_lanes(z.f + at, factor);
    for (int j = 0; j < slot * sizes.group; ++j) {
      scale_p(p + block.place(j, sizes) * kSquare + half * 512, factor);
    }
  }
  z.raised |= grown ? 1 : 0;
  z.watch =
      grown ? kWatchedSlots : static_cast<std::int32_t>(larger(z.watch - 1, unset_left ? 1 : 0));
  return any;
}

// Scaling down makes denormals, for which some cores leave the fast path for 100 cycles and more an
// instruction, and which are nothing beside the new reference. The arithmetic is in functions that
// are not inlined, since compilers may move it across a change of mode.
constexpr unsigned kFlushDenormals = 0x8040;

inline bool raise(const Block& block, int slot, const Scores& s, Bf16* p, const Rule& rule,
                  const Sizes& sizes) {
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(mode | kFlushDenormals);
  const bool any = raise_lanes(block, slot, s, p, rule, sizes);
  _mm_setcsr(mode);
  return any;
}

// ------------------------------------------------------------------------------------------ end of
// a block

[[gnu::noinline]] void multiply_by_factor(const Strip& strip, const Sizes& sizes) {
  Strip::Head& z = *strip.head;
  for (int half = 0; half < 2; ++half) {
    const __m512 f = _mm512_load_ps(z.f + half * kLanes);
    for (std::int64_t u = 0; u < sizes.v_units; ++u) {
      float* o = strip.o + u * kSquare + half * 512;
      for (int d = 0; d < 32; ++d) {
        scale_lanes(o + d * kLanes, f);
      }
    }
    scale_lanes(z.l + half * kLanes, f), scale_lanes(z.w + half * kLanes, f);
    _mm512_store_ps(z.f + half * kLanes, _mm512_set1_ps(1));
  }
  z.raised = 0;
}

// O, l and w after a reference was raised. O must lie in memory, with all blocks before this one.
inline void rescale(const Strip& strip, const Sizes& sizes) {
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(mode | kFlushDenormals);
  multiply_by_factor(strip, sizes);
  _mm_setcsr(mode);
}

// The sums of the block first, then l and w: see Strip::Head::bl.
inline void add_block_sums(const Strip& strip) {
  Strip::Head& z = *strip.head;
  for (int at = 0; at < kStripRows; at += kLanes) {
    _mm512_store_ps(z.l + at, _mm512_add_ps(_mm512_load_ps(z.l + at), _mm512_load_ps(z.bl + at)));
    _mm512_store_ps(z.w + at, _mm512_add_ps(_mm512_load_ps(z.w + at), _mm512_load_ps(z.bw + at)));
    _mm512_store_ps(z.bl + at, _mm512_setzero_ps());
    _mm512_store_ps(z.bw + at, _mm512_setzero_ps());
  }
}

inline float bf16_value(Bf16 x) {
  return __builtin_bit_cast(float, static_cast<std::uint32_t>(x) << 16);
}

// Takes out of 16 pairs of bf16 the lower and the upper ones without their bit.
inline void keep_pairs(Bf16* at, std::uint32_t lower, std::uint32_t upper) {
  const __m512i pair = _mm512_load_si512(at);
  const __m512i even = _mm512_maskz_mov_epi32(static_cast<__mmask16>(lower), pair);
  const __m512i odd = _mm512_maskz_mov_epi32(static_cast<__mmask16>(upper), pair);
  _mm512_store_si512(at, _mm512_mask_blend_epi16(0xAAAAAAAAU, even, odd));
}

// Dropped pairs leave P of the block after its sums were taken: they count in l and w.
[[gnu::noinline]] void drop(const Block& block, Bf16* p) {
  for (int i = 0; i < block.steps; ++i) {
    const std::uint32_t* keep = block.work->keep_bits + (block.first + block.step[i]) * kTileKeys;
    Bf16* at = p + block.step[i] * kSquare;
    for (int j = 0; j < 32; ++j) {
      const int key = j % 16 * 2, lane = j / 16 * kLanes;
      keep_pairs(at + j * 32, keep[key] >> lane, keep[key + 1] >> lane);
    }
  }
}

// O += V^T P^T for a tile of which a lane may miss some keys and that holds a value that is not
// finite: each lane adds what it sees and keeps, since 0 * NaN would reach the others.
[[gnu::noinline]] void add_selected(const Block& block, int place, const Bf16* p, const Rule& rule,
                                    const Sizes& sizes) {
  const std::int64_t tile = block.first + place;
  std::uint32_t bits[kTileKeys];
  for (int key = 0; key < kTileKeys; ++key) {
    const std::int64_t at = tile * kTileKeys + key;
    bits[key] = block.work->tile_class[tile] == kTilePartial ? block.work->lane_bits[at] : ~0U;
    if (rule.score.dropout) bits[key] &= block.work->keep_bits[at];
  }
  p += place * kSquare;
  for (std::int64_t row = 0; row < sizes.v_units * 32; ++row) {
    const Bf16* v = block.v + (row / 32 * sizes.block + place) * kSquare + row % 32 * 32;
    for (int half = 0; half < 2; ++half) {
      float* o = block.strip.o + row / 32 * kSquare + half * 512 + row % 32 * kLanes;
      __m512 sum = _mm512_load_ps(o);
      for (int key = 0; key < kTileKeys; ++key) {
        const __m512i pair = _mm512_load_si512(p + half * 512 + key / 2 * 32);
        const __m512i weight = key % 2 == 0 ? _mm512_slli_epi32(pair, 16)
                                            : _mm512_and_si512(pair, _mm512_set1_epi32(kUpperHalf));
        const auto seen = static_cast<__mmask16>(bits[key] >> (half * kLanes));
        sum = _mm512_mask3_fmadd_ps(_mm512_set1_ps(bf16_value(v[key])), _mm512_castsi512_ps(weight),
                                    sum, seen);
      }
      _mm512_store_ps(o, sum);
    }
  }
}

}  // namespace
}  // namespace annulus
