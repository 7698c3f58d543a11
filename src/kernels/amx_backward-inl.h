// The attention backward of a block of strips against a panel of keys on AMX, over either kind of
// tiles. Included by amx_bf16.cc inside its target region.
//
// First S^T and dP^T of every square of 32 keys x 32 queries that some lane sees, in one stream
// that leaves P and dS in memory. Vector work runs one square behind the products:
//   S of square i + 1  |  exponentials of square i      dP of square i + 1  |  dS of square i
// so C tiles are stored late (see Swap) and read a whole product later. Then dV, dK and dQ, each C
// loaded and stored once a block. This kernel has not been timed on an AMX core yet.
#pragma once

#include "kernels/amx_backward_pack-inl.h"
#include "kernels/amx_product-inl.h"
#include "kernels/amx_softmax-inl.h"

namespace annulus {
namespace {

// --------------------------------------------- vector work of a square, by pieces of two keys

constexpr int kPieces = kTileKeys / 2;

// Side by side as bf16, half an ulp rounded up as in the forward.
[[gnu::always_inline]] inline __m512i round_pairs(__m512 lower, __m512 upper) {
  const __m512i half_ulp = _mm512_set1_epi32(0x8000);
  const __m512i low = _mm512_add_epi32(_mm512_castps_si512(lower), half_ulp);
  const __m512i high = _mm512_add_epi32(_mm512_castps_si512(upper), half_ulp);
  return _mm512_mask_blend_epi16(0xAAAAAAAAU, _mm512_bsrli_epi128(low, 2), high);
}

// p (dp - delta); 0 where p is: there dp may be anything.
[[gnu::always_inline]] inline __m512 gradient(__m512 p, __m512 dp, __m512 delta) {
  const __mmask16 any = _mm512_cmp_ps_mask(p, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  return _mm512_maskz_mul_ps(any, p, _mm512_sub_ps(dp, delta));
}

// p = 2^(s scale - lse): as float32 for dS, as a row of A for dV.
struct Exponentials {
  __m512 scale, lse[2];
  const float* s;
  float* p;
  Bf16* rows;

  [[gnu::always_inline]] void piece(int j) {
#pragma GCC unroll 2
    for (int key = 2 * j; key < 2 * j + 2; ++key) {
      __m512 e[2];
      for (int half = 0; half < 2; ++half) {
        const int at = half * 512 + key * kLanes;
        e[half] = exp2(_mm512_fmsub_ps(_mm512_load_ps(s + at), scale, lse[half]));
        _mm512_store_ps(p + at, e[half]);
      }
      _mm512_store_si512(rows + key * 32, round_pairs(e[0], e[1]));
    }
  }
};

// dS as rows of A for dK and as pairs of keys of B for dQ.
struct Gradients {
  __m512 delta[2];
  const float *p, *dp;
  Bf16 *rows, *pairs;

  [[gnu::always_inline]] void piece(int j) {
    __m512 ds[2][2];  // [key][half]
    for (int i = 0; i < 4; ++i) {
      const int at = i % 2 * 512 + (2 * j + i / 2) * kLanes;
      ds[i / 2][i % 2] = gradient(_mm512_load_ps(p + at), _mm512_load_ps(dp + at), delta[i % 2]);
    }
    for (int i = 0; i < 2; ++i) {
      _mm512_store_si512(rows + (2 * j + i) * 32, round_pairs(ds[i][0], ds[i][1]));
      _mm512_store_si512(pairs + i * 512 + j * 32, round_pairs(ds[0][i], ds[1][i]));
    }
  }
};

// Deals pieces out behind products, a few behind each; from `next` = kPieces on there is none.
template <class Work>
struct Dealt {
  Work work;
  int next, per_product;

  template <int t>
  [[gnu::always_inline]] void run() {
    const int end = next + per_product < kPieces ? next + per_product : kPieces;
    for (; next < end; ++next) work.piece(next);
  }
};
struct NoWork {
  template <int t>
  void run() {}
};

// ------------------------------------------------------------------------------------------

// 32 keys x 32 queries that the pass has work with.
struct Square {
  std::int64_t strip, tile;
  const BackwardStrip* work;
  BackwardRows rows;
  Operands scores, values;  // of the first steps of S and dP
  Bf16 *p, *ds, *pairs;

  bool shows_all() const {
    return work->tile_class[tile] != kTilePartial && rows.head->lanes == ~0U;
  }
  std::uint32_t seen(int key) const {
    const bool partial = work->tile_class[tile] == kTilePartial;
    return rows.head->lanes & (partial ? work->lane_bits[tile * kTileKeys + key] : ~0U);
  }
  std::uint32_t kept(int key) const { return work->keep_bits[tile * kTileKeys + key]; }
};

enum class Sum { kDv, kDk, kDq };

template <class T>
class BackwardPass {
 public:
  BackwardPass(T& tiles, const BackwardCall& call)
      : tiles_(tiles),
        call_(call),
        sizes_(call.dims),
        rule_(call.rule),
        keys_(call.packed, sizes_, call.num_keys),
        panel_tiles_(ceil_div(call.key_count, kTileKeys)) {
    const std::int64_t tile = call.key_begin / kTileKeys;
    keys_.k += tile * sizes_.k_units * kSquare, keys_.kt += tile * sizes_.k_units * kSquare;
    keys_.v += tile * sizes_.v_units * kSquare, keys_.not_finite += tile;
    s_ = static_cast<float*>(call.scratch);
    p_ = s_ + kSquare, dp_ = p_ + kSquare, slope_ = dp_ + kSquare;
    const std::int64_t squares = call.strip_count * panel_tiles_;
    p_rows_ = reinterpret_cast<Bf16*>(slope_ + kSquare);
    ds_rows_ = p_rows_ + squares * kSquare, ds_pairs_ = ds_rows_ + squares * kSquare;
    sort_squares();
    aim_prefetch();
  }

  void run() {
    if (num_streamed_ > 0) {
      stream();
      if (call_.want_dkv) {
        accumulate<Sum::kDv>(strips_of_, panel_tiles_, sizes_.v_units);
        accumulate<Sum::kDk>(strips_of_, panel_tiles_, sizes_.k_units);
      }
      if (call_.want_dq) accumulate<Sum::kDq>(tiles_of_, call_.strip_count, sizes_.k_units);
    }
    for (int i = 0; i < num_selected_; ++i) add_selected(square(selected_[i]));
  }

 private:
  struct Place {
    std::uint8_t strip, tile;
  };

  // Where a pair may be hidden or dropped, K, q and dout are multiplied with zeros, so they must be
  // finite, and so must be what hides the pair's p. What else is not, V or delta, stays with its
  // pair, whose dS is 0 by selection.
  void sort_squares() {
    for (std::int64_t i = 0; i < call_.strip_count; ++i) {
      const bool strip_finite = BackwardRows(call_.strips[i].packed, sizes_).head->not_finite == 0;
      for (std::int64_t t = 0; t < panel_tiles_; ++t) {
        const std::uint8_t tile_class = call_.strips[i].tile_class[t];
        if (tile_class == kTileEmpty) continue;
        const Place place{static_cast<std::uint8_t>(i), static_cast<std::uint8_t>(t)};
        const bool finite = strip_finite && keys_.not_finite[t] == 0;
        if (!finite && (tile_class == kTilePartial || call_.rule.dropout)) {
          selected_[num_selected_++] = place;
          continue;
        }
        streamed_[num_streamed_++] = place;
        strips_of_[t] |= 1U << i, tiles_of_[i] |= 1U << t;
      }
    }
  }

  Square square(Place place) const {
    const BackwardStrip& work = call_.strips[place.strip];
    const BackwardRows rows(work.packed, sizes_);
    const std::int64_t at = (place.strip * panel_tiles_ + place.tile) * kSquare;
    return {place.strip,
            place.tile,
            &work,
            rows,
            {keys_.k + place.tile * sizes_.k_units * kSquare, rows.qt},
            {keys_.v + place.tile * sizes_.v_units * kSquare, rows.dot},
            p_rows_ + at,
            ds_rows_ + at,
            ds_pairs_ + at};
  }

  // ---------------------------------------------------------------------------------- P and dS

  [[gnu::noinline]] void stream() {
    Square now = square(streamed_[0]), before = now;
    load_operands(tiles_, now.scores);
    for (int i = 0; i < num_streamed_; ++i) {
      const Square next = square(streamed_[i + 1 < num_streamed_ ? i + 1 : i]);
      const int first = i == 0 ? kPieces : 0;
      Dealt<Exponentials> p{exponentials(before), first, pieces_per_product(sizes_.k_units)};
      multiply_beside(now.scores, sizes_.k_units, dp_, now.values, p);
      if (i > 0) adjust(before);
      Dealt<Gradients> ds{gradients(before), first, pieces_per_product(sizes_.v_units)};
      multiply_beside(now.values, sizes_.v_units, s_, next.scores, ds);
      prepare(now);
      before = now, now = next;
    }
    store_all_c(tiles_, dp_);
    exponentiate(before);
    adjust(before);
    Gradients ds = gradients(before);
    for (int j = 0; j < kPieces; ++j) ds.piece(j);
  }

  static int pieces_per_product(std::int64_t units) {
    return static_cast<int>(ceil_div(kPieces, 4 * units));
  }
  Exponentials exponentials(const Square& at) const {
    const float* lse = at.rows.head->lse;
    return {_mm512_set1_ps(rule_.scale),
            {_mm512_load_ps(lse), _mm512_load_ps(lse + kLanes)},
            s_,
            p_,
            at.p};
  }
  Gradients gradients(const Square& at) const {
    const float* delta = at.rows.head->delta;
    return {{_mm512_load_ps(delta), _mm512_load_ps(delta + kLanes)}, p_, dp_, at.ds, at.pairs};
  }
  void exponentiate(const Square& at) const {
    Exponentials p = exponentials(at);
    for (int j = 0; j < kPieces; ++j) p.piece(j);
  }

  // C = A B, whose first operands are in the tiles already; `then`: those of the product behind.
  template <class Work>
  [[gnu::always_inline]] void multiply_beside(Operands from, std::int64_t units, float* finished,
                                              Operands then, Dealt<Work>& work) {
    for (std::int64_t u = 1; u <= units; ++u) {
      const Operands next{from.a + u * kSquare, from.b + u * kSquare};
      if (u == 1) {
        step<Swap::kZero, 0>(tiles_, finished, finished, u < units ? next : then, work);
      } else {
        step<Swap::kNone, 0>(tiles_, finished, finished, u < units ? next : then, work);
      }
      prefetch();
    }
  }

  // Scores lie in memory; everything that is not a product is done to them.
  void prepare(const Square& at) const {
    const BackwardStrip& work = *at.work;
    const std::int64_t key = at.tile * kTileKeys;
    if (!rule_.plain) transform(s_, work.bias + key * kStripRows, rule_.score, slope_);
    if (!at.shows_all()) hide_unseen(at);
    if (__builtin_expect(at.rows.head->shifted != 0, 0)) subtract_base(at);
  }
  // A p is at most 1, however coarse the lse; and a score is rounded to natural units as the
  // forward rounded the base that lse is made of, so that a key alone keeps its weight. A NaN
  // stays.
  [[gnu::noinline]] void subtract_base(const Square& at) const {
    const float to_natural = rule_.scale * static_cast<float>(kLn2);
    const __m512 zero = _mm512_setzero_ps(), to_stored = _mm512_set1_ps(1 / to_natural);
    for (int i = 0; i < kSquare; i += kLanes) {
      const __m512 base = _mm512_load_ps(at.rows.head->base + i / 512 * kLanes);
      const __mmask16 moves = _mm512_cmp_ps_mask(base, zero, _CMP_NEQ_OQ);
      __m512 natural = _mm512_mul_ps(_mm512_load_ps(s_ + i), _mm512_set1_ps(to_natural));
      asm volatile("" : "+v"(natural));  // no FMA: it would not round
      const __m512 moved = _mm512_mul_ps(_mm512_sub_ps(natural, base), to_stored);
      _mm512_mask_store_ps(s_ + i, moves, _mm512_min_ps(zero, moved));
    }
  }
  [[gnu::noinline]] void hide_unseen(const Square& at) const {
    std::uint32_t seen[kTileKeys];
    for (int key = 0; key < kTileKeys; ++key) seen[key] = at.seen(key);
    hide(s_, seen);
  }

  // p and dp lie in memory. Dropout acts on dp and on the P that multiplies dO, the cap's
  // derivative on what comes behind dbias.
  void adjust(const Square& at) const {
    if (call_.rule.dropout) drop(at);
    if (at.work->ds != nullptr) store_ds(at);
    if (call_.rule.cap > 0) multiply_by_slope();
  }
  [[gnu::noinline]] void drop(const Square& at) const {
    const __m512 keep_scale = _mm512_set1_ps(call_.rule.keep_scale);
    for (int key = 0; key < kTileKeys; ++key) {
      keep_pairs(at.p + key * 32, at.kept(key), at.kept(key) >> kLanes);
      for (int half = 0; half < 2; ++half) {
        float* dp = dp_ + half * 512 + key * kLanes;
        const auto kept = static_cast<__mmask16>(at.kept(key) >> (half * kLanes));
        _mm512_store_ps(dp, _mm512_maskz_mul_ps(kept, keep_scale, _mm512_load_ps(dp)));
      }
    }
  }
  [[gnu::noinline]] void store_ds(const Square& at) const {
    float* to = at.work->ds + at.tile * kTileKeys * kStripRows;
    const Gradients g = gradients(at);
    for (int i = 0; i < 2 * kTileKeys; ++i, to += kLanes) {
      const int from = i % 2 * 512 + i / 2 * kLanes;
      _mm512_storeu_ps(
          to, gradient(_mm512_load_ps(p_ + from), _mm512_load_ps(dp_ + from), g.delta[i % 2]));
    }
  }
  // A p of 0 stays one: behind it the derivative may be NaN.
  [[gnu::noinline]] void multiply_by_slope() const {
    for (int i = 0; i < kSquare; i += kLanes) {
      const __m512 p = _mm512_load_ps(p_ + i);
      const __mmask16 any = _mm512_cmp_ps_mask(p, _mm512_setzero_ps(), _CMP_NEQ_UQ);
      _mm512_store_ps(p_ + i, _mm512_maskz_mul_ps(any, p, _mm512_load_ps(slope_ + i)));
    }
  }

  // ------------------------------------------------------------------------------ dV, dK and dQ

  // C of (tile, unit) sums over the strips of its tile, that of (strip, unit) over the tiles.
  template <Sum kSum>
  [[gnu::always_inline]] Operands operands(std::int64_t outer, std::uint32_t steps,
                                           std::int64_t unit) const {
    const std::int64_t inner = __builtin_ctz(steps);
    if constexpr (kSum == Sum::kDq) {
      return {keys_.kt + (inner * sizes_.k_units + unit) * kSquare,
              ds_pairs_ + (outer * panel_tiles_ + inner) * kSquare};
    } else {
      const BackwardRows rows(call_.strips[inner].packed, sizes_);
      return {(kSum == Sum::kDv ? p_rows_ : ds_rows_) + (inner * panel_tiles_ + outer) * kSquare,
              (kSum == Sum::kDv ? rows.dout : rows.q) + unit * kSquare};
    }
  }
  template <Sum kSum>
  [[gnu::always_inline]] auto place_of_c(std::int64_t outer, std::int64_t unit) const {
    if constexpr (kSum == Sum::kDq) {
      return call_.strips[outer].dq + unit * kSquare;
    } else {
      const std::int64_t row = (kSum == Sum::kDv ? sizes_.v_units : sizes_.k_units) * 32;
      return RowsOfC{(kSum == Sum::kDv ? call_.dv : call_.dk) + outer * kTileKeys * row + unit * 32,
                     row};
    }
  }
  static float* unused(float* memory, float*) { return memory; }
  static RowsOfC unused(float* memory, RowsOfC) { return {memory, 32}; }

  // C += A B for each of `outers` with a step, and each unit; steps_of has a bit per step.
  template <Sum kSum>
  [[gnu::noinline]] void accumulate(const std::uint32_t* steps_of, std::int64_t outers,
                                    std::int64_t units) {
    const auto with_steps = [&](std::int64_t outer) {
      while (outer < outers && steps_of[outer] == 0) ++outer;
      return outer;
    };
    NoWork none;
    std::int64_t outer = with_steps(0);
    auto finished = unused(s_, place_of_c<kSum>(outer, 0));
    load_operands(tiles_, operands<kSum>(outer, steps_of[outer], 0));
    while (outer < outers) {
      const std::int64_t then = with_steps(outer + 1);
      const std::uint32_t all = steps_of[outer];
      for (std::int64_t unit = 0; unit < units; ++unit) {
        // Of the next C; behind the last one its own again.
        const Operands next_c = unit + 1 < units ? operands<kSum>(outer, all, unit + 1)
                                : then < outers  ? operands<kSum>(then, steps_of[then], 0)
                                                 : operands<kSum>(outer, all, unit);
        const auto c = place_of_c<kSum>(outer, unit);
        for (std::uint32_t left = all; left != 0;) {
          const bool first = left == all;
          left &= left - 1;
          const Operands next = left != 0 ? operands<kSum>(outer, left, unit) : next_c;
          if (first) {
            step<Swap::kLoad, 0>(tiles_, finished, c, next, none);
          } else {
            step<Swap::kNone, 0>(tiles_, finished, c, next, none);
          }
        }
        finished = c;
      }
      outer = then;
    }
    store_all_c(tiles_, finished);
  }

  // ------------------------------------------------------------------------------ by selection

  // A square by itself: float32 p and dS, each pair adds only what it sees.
  [[gnu::noinline]] void add_selected(const Square& at) {
    multiply_plainly(tiles_, at.scores, sizes_.k_units, s_);
    prepare(at);
    exponentiate(at);
    blank_unseen(at);
    multiply_plainly(tiles_, at.values, sizes_.v_units, dp_);
    alignas(64) float p[kSquare];  // without the cap's derivative
    memcpy(p, p_, sizeof p);
    adjust(at);
    for (int key = 0; key < kTileKeys; ++key) {
      const std::uint32_t seen = at.seen(key);
      const std::uint32_t kept = call_.rule.dropout ? at.kept(key) : ~0U;
      for (int n = 0; n < kStripRows; ++n) {
        if ((seen >> n & 1) == 0) continue;
        const int i = n / kLanes * 512 + key * kLanes + n % kLanes;
        const float ds = p_[i] == 0 ? 0 : p_[i] * (dp_[i] - at.rows.head->delta[n]);
        const int pair = n % kLanes * 32 + n / kLanes;
        if (call_.want_dkv && (kept >> n & 1) != 0) {
          add_row(call_.dv, at.tile * kTileKeys + key, call_.dims.v_head_dim, p[i],
                  at.rows.dout + pair);
        }
        if (ds == 0) continue;
        if (call_.want_dkv) {
          add_row(call_.dk, at.tile * kTileKeys + key, call_.dims.head_dim, ds, at.rows.q + pair);
        }
        if (call_.want_dq) add_key(at, n, ds, key);
      }
    }
  }
  // An lse of NaN makes p of hidden pairs NaN, too.
  void blank_unseen(const Square& at) const {
    for (int i = 0; i < 2 * kTileKeys; ++i) {
      float* p = p_ + i % 2 * 512 + i / 2 * kLanes;
      const auto seen = static_cast<__mmask16>(at.seen(i / 2) >> (i % 2 * kLanes));
      _mm512_store_ps(p, _mm512_maskz_mov_ps(seen, _mm512_load_ps(p)));
    }
  }
  // One query's element of each dimension from pairs [unit][2 halves of d][16][16 d][2].
  static void add_row(float* c, std::int64_t row, std::int64_t dim, float weight,
                      const Bf16* pairs) {
    c += row * whole_units(dim);
    for (std::int64_t x = 0; x < dim; ++x) {
      c[x] += weight * bf16_value(pairs[x / 16 * 512 + x % 16 * 2]);
    }
  }
  void add_key(const Square& at, int n, float ds, int key) const {
    for (std::int64_t x = 0; x < call_.dims.head_dim; ++x) {
      const std::int64_t unit = x / 32 * kSquare;
      at.work->dq[unit + n / kLanes * 512 + x % 32 * kLanes + n % kLanes] +=
          ds * bf16_value(at.scores.a[unit + key * 32 + x % 32]);
    }
  }

  // ---------------------------------------------------------------------------------- prefetch

  // The next block on its way into the L2, some lines behind each step of the stream.
  void aim_prefetch() {
    const std::int64_t steps = num_streamed_ * (sizes_.k_units + sizes_.v_units);
    if (steps == 0) return;
    strips_per_step_ = ceil_div(call_.next_strip_bytes, 64 * steps) * 64;
    dq_per_step_ = ceil_div(call_.next_dq_bytes, 64 * steps) * 64;
  }
  [[gnu::always_inline]] void prefetch() {
    const std::int64_t strips_end =
        smaller(strips_prefetched_ + strips_per_step_, call_.next_strip_bytes);
    for (; strips_prefetched_ < strips_end; strips_prefetched_ += 64) {
      _mm_prefetch(call_.next_strips + strips_prefetched_, _MM_HINT_T1);
    }
    const std::int64_t dq_end = smaller(dq_prefetched_ + dq_per_step_, call_.next_dq_bytes);
    for (; dq_prefetched_ < dq_end; dq_prefetched_ += 64) {
      _mm_prefetch(call_.next_dq + dq_prefetched_, _MM_HINT_T1);
    }
  }

  T& tiles_;
  const BackwardCall& call_;
  const BackwardSizes sizes_;
  const Rule rule_;
  BackwardKeys keys_;  // of the panel
  const std::int64_t panel_tiles_;
  float *s_, *p_, *dp_, *slope_;         // of a square: scores, p, dp, the cap's derivative
  Bf16 *p_rows_, *ds_rows_, *ds_pairs_;  // of the block: [strip][tile]
  Place streamed_[kMaxStrips * kMaxTiles], selected_[kMaxStrips * kMaxTiles];
  int num_streamed_ = 0, num_selected_ = 0;
  std::uint32_t strips_of_[kMaxTiles] = {};  // bit per strip, of the streamed squares
  std::uint32_t tiles_of_[kMaxStrips] = {};  // bit per tile
  std::int64_t strips_per_step_ = 0, dq_per_step_ = 0, strips_prefetched_ = 0, dq_prefetched_ = 0;
};

template <class T>
void backward_block(const BackwardCall& call) {
  T tiles;
  open(tiles);
  BackwardPass<T>(tiles, call).run();
  close(tiles);
}

}  // namespace
}  // namespace annulus
