// The attention forward of strips of queries against a panel of keys on AMX, over either kind of
// tiles. Included by amx_bf16.cc inside its target region.
//
// Three things run at once in one instruction stream, one behind the other:
//   Q.K of group g + 1  |  softmax of group g  |  P.V of the block before, one unit of O a slot
// Figures here and beside are of the study this kernel follows, on an AMX core, as share of the
// peak of its product instruction, d = 128, 16K keys:
//   K and V^T by load_stream                                                       42 -> 67 %
//   softmax dealt out behind every product: the core's window spans about 16       49 -> 67 %
//   items of 1024 rows sharing a panel                                 (256 rows)  58 -> 67 %
//   prefetch of the next panel; of the next unit of O; late stores of C       each 65 -> 67 %
// This kernel itself has not been timed on one yet.
#pragma once

#include "kernels/amx_product-inl.h"
#include "kernels/amx_softmax-inl.h"

namespace annulus {
namespace {

// The softmax of one slot, dealt out evenly behind kProducts products.
template <int kProducts, int kGroup, bool kPrefetchO>
struct Filler {
  Softmax softmax;
  const float* s;
  Bf16* p[kGroup];
  const char* next_o;

  template <int t>
  [[gnu::always_inline]] void run() {
    pairs<t * 32 * kGroup / kProducts, (t + 1) * 32 * kGroup / kProducts>();
    if constexpr (kPrefetchO) lines<t * 64 / kProducts, (t + 1) * 64 / kProducts>();
  }
  template <int kFrom, int kTo>
  [[gnu::always_inline]] void pairs() {
    if constexpr (kFrom < kTo) {
      softmax.pair(s + kFrom / 32 * kSquare, p[kFrom / 32], kFrom % 32);
      pairs<kFrom + 1, kTo>();
    }
  }
  // The 64 lines of the unit of O that the next slot loads: with all strips of an item in turn they
  // lie in the L2.
  template <int kFrom, int kTo>
  [[gnu::always_inline]] void lines() {
    if constexpr (kFrom < kTo) {
      _mm_prefetch(next_o + kFrom * 64, _MM_HINT_T0);
      lines<kFrom + 1, kTo>();
    }
  }
};

// One slot's products where both dimensions are known: kK units of d, kV units of O, so kGroup * kV
// steps at most.
template <class T, int kK, int kV>
struct Slot {
  static constexpr int kGroup = group_tiles(kV);
  static constexpr int kScoreSteps = kGroup * kK, kValueSteps = kGroup * kV;
  static constexpr int kProducts = 4 * (kScoreSteps + kValueSteps);
  static constexpr bool kPrefetchO = kV == 4;  // +1.5 points at d = 128; none at 64, a loss at 256
  using Fill = Filler<kProducts, kGroup, kPrefetchO>;

  T& tiles;
  Fill& fill;
  const Bf16* const (&k)[kGroup];  // the tiles multiplied with q into s
  const Bf16* q;
  float* s;
  const Bf16* v;  // the unit of the block before, its P, its tiles, and O
  const Bf16* p;
  const std::uint8_t* tile;
  int steps;
  float* o;
  float* finished;  // where the C tiles at the slot's beginning belong
  Operands next;    // of the next slot

  [[gnu::always_inline]] Operands value_operands(int x) const {
    return {v + tile[x] * kSquare, p + tile[x] * kSquare};
  }

  template <int x = 0>
  [[gnu::always_inline]] void multiply_scores() {
    constexpr int g = x / kK, then_g = (x + 1) / kK, then_u = (x + 1) % kK;
    constexpr Swap kSwap = x % kK == 0 ? Swap::kZero : Swap::kNone;
    Operands then;
    if constexpr (x + 1 < kScoreSteps) {
      then = {k[then_g] + then_u * kSquare, q + then_u * kSquare};
    } else {
      then = value_operands(0);
    }
    step<kSwap, 4 * x>(tiles, g == 0 ? finished : s + (g - 1) * kSquare, s, then, fill);
    if constexpr (x + 1 < kScoreSteps) multiply_scores<x + 1>();
  }

  // A block may have fewer steps, not none; the softmax is dealt out to its end all the same.
  template <int x = 0>
  [[gnu::always_inline]] void multiply_values() {
    constexpr int t = 4 * (kScoreSteps + x);
    constexpr Swap kSwap = x == 0 ? Swap::kLoad : Swap::kNone;
    if (x == 0 || x < steps) {
      const Operands then = x + 1 < steps ? value_operands(x + 1) : next;
      step<kSwap, t>(tiles, s + (kGroup - 1) * kSquare, o, then, fill);
    } else {
      fill.template run<t>(), fill.template run<t + 1>();
      fill.template run<t + 2>(), fill.template run<t + 3>();
    }
    if constexpr (x + 1 < kValueSteps) multiply_values<x + 1>();
  }
};

template <class T>
class PanelPass {
 public:
  PanelPass(T& tiles, const PanelCall& call)
      : tiles_(tiles),
        call_(call),
        sizes_(call.dims),
        rule_(call.rule),
        packed_(call.packed, sizes_, call.num_keys),
        panel_tiles_(ceil_div(call.key_count, kTileKeys)),
        first_block_(call.key_begin / (sizes_.block * kTileKeys)) {
    s_[0] = static_cast<float*>(call.scratch);
    s_[1] = s_[0] + sizes_.group * kSquare;
    raw_ = s_[1] + sizes_.group * kSquare;
    unused_ = raw_ + sizes_.group * kSquare;
    p_[0] = reinterpret_cast<Bf16*>(unused_ + kSquare);
    p_[1] = p_[0] + (sizes_.block + 1) * kSquare;
    finished_ = unused_;
    aim_prefetch();
  }
  static std::int64_t scratch_bytes(const Sizes& sizes) {
    return ((3 * sizes.group + 1) * 4 + 2 * (sizes.block + 1) * 2) * kSquare;
  }

  void run() {
    switch (sizes_.k_units * 16 + sizes_.v_units) {
      case 0x22:
        return run_blocks<2, 2>();
      case 0x33:
        return run_blocks<3, 3>();
      case 0x44:
        return run_blocks<4, 4>();
      case 0x64:
        return run_blocks<6, 4>();
      case 0x66:
        return run_blocks<6, 6>();
      case 0x88:
        return run_blocks<8, 8>();
      default:
        return run_blocks<0, 0>();
    }
  }

 private:
  // The stream of blocks crosses strips without a gap. kK = 0: nothing overlaps, any dimension.
  template <int kK, int kV>
  void run_blocks() {
    Block before{}, now{}, next{};
    bool have_before = false, have_now = advance(now);
    if (!have_now) return;
    multiply_scores(now, 0, s_[s_now_]);
    for (; have_now; p_now_ ^= 1) {
      const bool have_next = advance(next);
      bool overlap = false;
      if constexpr (kK > 0) overlap = have_before && have_next && before.steps > 0;
      if (!overlap) plain_block(have_before ? &before : nullptr, now, have_next ? &next : nullptr);
      if constexpr (kK > 0) {
        if (overlap) overlapped_block<kK, kV>(before, now, next);
      }
      close_block(now);
      before = now, now = next;
      have_before = true, have_now = have_next;
    }
    put_away();
    p_now_ ^= 1;
    multiply_values(before, 0, p_[p_now_]);
  }

  // The next block with a key that its strip sees: strip by strip, blocks in the order of the keys.
  bool advance(Block& block) {
    for (; strip_ < call_.strip_count; ++strip_, tile_ = 0) {
      while (tile_ < panel_tiles_) {
        const std::int64_t first = tile_;
        tile_ += sizes_.block;
        if (fill_block(block, call_.strips[strip_], first)) return true;
      }
    }
    return false;
  }

  bool fill_block(Block& block, const StripWork& work, std::int64_t first) const {
    const std::int64_t index = first_block_ + first / sizes_.block;
    const std::uint8_t* not_finite = packed_.not_finite + index * sizes_.block;
    block.live = block.steps = block.num_selected = 0;
    block.prepared = rule_.plain ? 0 : ~0U;
    for (int i = 0; i < smaller(sizes_.block, panel_tiles_ - first); ++i) {
      const std::uint8_t tile_class = work.tile_class[first + i];
      if (tile_class == kTileEmpty) continue;
      const auto place = static_cast<std::uint8_t>(i);
      const bool partial = tile_class == kTilePartial;
      if (partial) block.prepared |= 1U << (block.live / sizes_.group);
      if (not_finite[i] != 0 && (partial || rule_.score.dropout)) {
        block.selected[block.num_selected++] = place;
      } else {
        block.step[block.steps++] = place;
      }
      block.tile[block.live++] = place;
    }
    if (block.live == 0) return false;
    block.slots = static_cast<int>(ceil_div(block.live, sizes_.group));
    for (int j = block.live; j < block.slots * sizes_.group; ++j) {
      block.tile[j] = block.tile[block.live - 1];
      block.prepared |= 1U << (block.slots - 1);
    }
    block.strip = Strip(work.strip, sizes_);
    block.work = &work;
    block.first = first;
    block.k = packed_.k + index * sizes_.block * sizes_.k_units * kSquare;
    block.v = packed_.v + index * sizes_.block * sizes_.v_units * kSquare;
    return true;
  }

  // ---------------------------------------------------------------------------------------- one
  // thing at a time

  const Bf16* k_tile(const Block& block, int j) const {
    return block.k + block.tile[j] * sizes_.k_units * kSquare;
  }

  [[gnu::noinline]] void multiply_scores(const Block& block, int slot, float* s) {
    for (int j = slot * sizes_.group; j < (slot + 1) * sizes_.group; ++j, s += kSquare) {
      multiply_plainly(tiles_, {k_tile(block, j), block.strip.q}, sizes_.k_units, s);
    }
  }

  // Units of O from `unit` on.
  [[gnu::noinline]] void multiply_values(const Block& block, std::int64_t unit, const Bf16* p) {
    for (; unit < sizes_.v_units; ++unit) {
      float* o = block.strip.o + unit * kSquare;
      load_c<0>(tiles_, o), load_c<1>(tiles_, o), load_c<3>(tiles_, o), load_c<2>(tiles_, o);
      for (int x = 0; x < block.steps; ++x) {
        const int at = block.step[x] * kSquare;
        multiply_one_by_one(tiles_, {block.v + unit * sizes_.block * kSquare + at, p + at});
      }
      store_all_c(tiles_, o);
    }
  }

  // The C tiles into the memory that awaits them.
  void put_away() { store_all_c(tiles_, finished_), finished_ = unused_; }

  [[gnu::noinline]] void plain_block(const Block* before, const Block& now, const Block* next) {
    put_away();
    for (int slot = 0; slot < now.slots; ++slot, s_now_ ^= 1) {
      float* s = s_[s_now_];
      before_exponentials(now, slot, s);
      const Sums at_begin = Sums::load(now.strip);
      exponentials(now, slot, s, p_[p_now_], rule_, sizes_);
      const Sums at_end = Sums::load(now.strip);
      if (__builtin_expect(at_end.tripped(), 0)) {
        at_begin.store(now.strip);
        raise_and_redo(now, slot, s, at_end.l[0], at_end.l[1], at_end.w[0], at_end.w[1]);
      }
      prefetch();
      if (slot + 1 < now.slots) multiply_scores(now, slot + 1, s_[s_now_ ^ 1]);
      if (slot + 1 == now.slots && next != nullptr) multiply_scores(*next, 0, s_[s_now_ ^ 1]);
    }
    if (before != nullptr) multiply_values(*before, 0, p_[p_now_ ^ 1]);
  }

  // ---------------------------------------------------------------------------------------- around
  // the softmax

  // Scores of a slot are in memory, no exponential is made yet.
  [[gnu::always_inline]] void before_exponentials(const Block& block, int slot, float* s) {
    if ((block.prepared >> slot & 1) != 0) prepare(block, slot, s, rule_, sizes_);
    const Strip::Head& z = *block.strip.head;
    if (__builtin_expect(z.shifted != 0, 0)) subtract_base(z, {s, raw_}, sizes_.group);
    if (z.watch != 0) raise(block, slot, {s, raw_}, p_[p_now_], rule_, sizes_);
  }

  // The slot's sum tripped; the strip still holds the sums from before it. Vectors by value: Sums
  // would pass through memory and have a place there throughout the pipeline.
  [[gnu::noinline]] void raise_and_redo(const Block& block, int slot, float* s, __m512 l0,
                                        __m512 l1, __m512 w0, __m512 w1) {
    if (raise(block, slot, {s, raw_}, p_[p_now_], rule_, sizes_)) {
      exponentials(block, slot, s, p_[p_now_], rule_, sizes_);
    } else {
      Sums{{l0, l1}, {w0, w1}}.store(block.strip);
    }
  }

  // P of the block is final; everything before it is in O or in the C tiles.
  void close_block(const Block& block) {
    if (__builtin_expect(rule_.score.dropout, 0)) drop(block, p_[p_now_]);
    const bool raised = block.strip.head->raised != 0;
    if (__builtin_expect(raised || block.num_selected > 0, 0)) {
      put_away();
      if (raised) rescale(block.strip, sizes_);
      for (int i = 0; i < block.num_selected; ++i) {
        add_selected(block, block.selected[i], p_[p_now_], rule_, sizes_);
      }
    }
    add_block_sums(block.strip);
  }

  // ---------------------------------------------------------------------------------------- the
  // steady state

  // Groups of the stream as seen from a block: its own, then the next block's first.
  template <int kK, int kGroup>
  [[gnu::always_inline]] static const Bf16* aim(const Block& now, const Block& next, int slot,
                                                const Bf16* (&k)[kGroup]) {
    const Block& block = slot < now.slots ? now : next;
    const std::uint8_t* tile = block.tile + (slot < now.slots ? slot * kGroup : 0);
    for (int g = 0; g < kGroup; ++g) k[g] = block.k + tile[g] * kK * kSquare;
    return block.strip.q;
  }

  template <int kK, int kV>
  [[gnu::noinline]] void overlapped_block(const Block& before, const Block& now,
                                          const Block& next) {
    using S = Slot<T, kK, kV>;
    const Bf16* k[S::kGroup];
    const Bf16* k_then[S::kGroup];
    const Bf16* q = aim<kK>(now, next, 1, k);
    const Bf16* v = before.v;
    float *s_in = s_[s_now_], *s_out = s_[s_now_ ^ 1], *o = before.strip.o, *finished = finished_;
    load_operands(tiles_, {k[0], q});
#pragma GCC unroll 1
    for (int slot = 0; slot < now.slots; ++slot) {
      // The last slot has none to aim at: it loads its own again, and every block loads its first
      // operands.
      const Bf16* q_then = aim<kK>(now, next, slot + 2, k_then);
      before_exponentials(now, slot, s_in);
      prefetch();
      const float* o_then = slot + 1 < now.slots ? o + kSquare : now.strip.o;
      typename S::Fill fill{
          Softmax(now.strip, rule_), s_in, {}, reinterpret_cast<const char*>(o_then)};
      for (int g = 0; g < S::kGroup; ++g) {
        fill.p[g] = p_[p_now_] + now.place(slot * S::kGroup + g, sizes_) * kSquare;
      }
      S work{tiles_,
             fill,
             k,
             q,
             s_out,
             v,
             p_[p_now_ ^ 1],
             before.step,
             before.steps,
             o,
             finished,
             {k_then[0], q_then}};
      work.multiply_scores();
      work.multiply_values();
      const Sums& sums = fill.softmax.sums;
      if (__builtin_expect(sums.tripped(), 0)) {
        raise_and_redo(now, slot, s_in, sums.l[0], sums.l[1], sums.w[0], sums.w[1]);
      } else {
        sums.store(now.strip);
      }
      finished = o;
      o += kSquare, v += S::kValueSteps * kSquare, q = q_then;
      for (int g = 0; g < S::kGroup; ++g) k[g] = k_then[g];
      float* swap = s_in;
      s_in = s_out, s_out = swap;
    }
    finished_ = finished;
    s_now_ ^= now.slots & 1;
    if (now.slots < kV) {  // a short block leaves units of the one before
      put_away();
      multiply_values(before, now.slots, p_[p_now_ ^ 1]);
    }
  }

  // ----------------------------------------------------------------------------------------
  // prefetch

  // K and V^T of the next panel, dealt over the slots of this one, on their way into the L2: they
  // are there before the strips are through (+2 points).
  void aim_prefetch() {
    const std::int64_t keys =
        call_.next_begin < 0 ? 0 : smaller(call_.key_count, call_.num_keys - call_.next_begin);
    if (keys <= 0) return;
    std::int64_t slots = 0;
    for (std::int64_t i = 0; i < call_.strip_count; ++i) {
      for (std::int64_t t = 0; t < panel_tiles_; ++t) {
        slots += call_.strips[i].tile_class[t] != kTileEmpty ? 1 : 0;
      }
    }
    slots = larger(1, slots / sizes_.group);
    prefetch_lines_ =
        ceil_div(keys, kTileKeys) * larger(sizes_.k_units, sizes_.v_units) * (kSquare * 2 / 64);
    prefetch_per_slot_ = ceil_div(prefetch_lines_, slots);
    const std::int64_t tile = call_.next_begin / kTileKeys;
    prefetch_k_ = reinterpret_cast<const char*>(packed_.k + tile * sizes_.k_units * kSquare);
    prefetch_v_ = reinterpret_cast<const char*>(packed_.v + tile * sizes_.v_units * kSquare);
  }
  [[gnu::always_inline]] void prefetch() {
    if (prefetch_lines_ <= 0) return;
    for (std::int64_t i = 0; i < prefetch_per_slot_; ++i) {
      _mm_prefetch(prefetch_k_ + i * 64, _MM_HINT_T1);
      _mm_prefetch(prefetch_v_ + i * 64, _MM_HINT_T1);
    }
    prefetch_k_ += prefetch_per_slot_ * 64, prefetch_v_ += prefetch_per_slot_ * 64;
    prefetch_lines_ -= prefetch_per_slot_;
  }

  T& tiles_;
  const PanelCall& call_;
  const Sizes sizes_;
  const Rule rule_;
  const Packed packed_;
  const std::int64_t panel_tiles_, first_block_;
  std::int64_t strip_ = 0, tile_ = 0;  // where advance() goes on
  float* s_[2];                        // scores of a group: being exponentiated, being made
  float* raw_;                         // of the former before a base was subtracted
  Bf16* p_[2];                         // P of a block: being made, being multiplied
  int s_now_ = 0, p_now_ = 0;
  float* unused_;
  float* finished_;  // where the C tiles' contents belong
  const char* prefetch_k_ = nullptr;
  const char* prefetch_v_ = nullptr;
  std::int64_t prefetch_lines_ = 0, prefetch_per_slot_ = 0;
};

template <class T>
void panel(const PanelCall& call) {
  T tiles;
  open(tiles);
  PanelPass<T>(tiles, call).run();
  close(tiles);
}

template <class T>
std::int64_t scratch_bytes(Dims dims) {
  return PanelPass<T>::scratch_bytes(Sizes(dims));
}

template <class T>
double peak_loop(std::int64_t rounds) {
  T tiles;
  open(tiles);
  for (std::int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) {
      multiply<0, 4, 6>(tiles), multiply<1, 4, 7>(tiles);
      multiply<3, 5, 7>(tiles), multiply<2, 5, 6>(tiles);
    }
  }
  close(tiles);
  return static_cast<double>(rounds) * 24 * 16 * 16 * 32 * 2;
}

}  // namespace
}  // namespace annulus
