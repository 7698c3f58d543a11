// Steps of the products of the AMX kernels: 2 x 2 tiles of C, the operands of the step behind, and
// other work between. Included by amx_bf16.cc inside its target region.
#pragma once

#include "kernels/amx_pack-inl.h"
#include "kernels/amx_tiles-inl.h"

namespace annulus {
namespace {

// One step of a product: two tiles of A, two of B, side by side.
struct Operands {
  const Bf16* a;
  const Bf16* b;
};

// C tiles 0 = A0 B0, 1 = A0 B1, 2 = A1 B0, 3 = A1 B1 in memory: of S, O and dQ a square [half of
// B][half of A], given by its address, or 32 x 32 elements of rows, as dK and dV have them.
struct RowsOfC {
  float* c;
  std::int64_t row_floats;
};
constexpr int kPlaceOfC[4] = {0, 512, 256, 768};

template <int kTile, class T>
[[gnu::always_inline]] inline void load_c(T& tiles, const float* c) {
  load<kTile>(tiles, c + kPlaceOfC[kTile]);
}
template <int kTile, class T>
[[gnu::always_inline]] inline void load_c(T& tiles, RowsOfC c) {
  load<kTile>(tiles, c.c + kTile / 2 * 16 * c.row_floats + kTile % 2 * 16, c.row_floats * 4);
}
template <int kTile, class T>
[[gnu::always_inline]] inline void store_c(T& tiles, float* c) {
  store<kTile>(tiles, c + kPlaceOfC[kTile]);
}
template <int kTile, class T>
[[gnu::always_inline]] inline void store_c(T& tiles, RowsOfC c) {
  store<kTile>(tiles, c.c + kTile / 2 * 16 * c.row_floats + kTile % 2 * 16, c.row_floats * 4);
}
template <class T, class C>
[[gnu::always_inline]] inline void store_all_c(T& tiles, C c) {
  store_c<0>(tiles, c), store_c<1>(tiles, c), store_c<3>(tiles, c), store_c<2>(tiles, c);
}

template <class T>
[[gnu::always_inline]] inline void load_operands(T& tiles, Operands from) {
  load_stream<4>(tiles, from.a), load_stream<5>(tiles, from.a + 512);
  load<6>(tiles, from.b), load<7>(tiles, from.b + 512);
}

// The step by itself.
template <class T>
void multiply_one_by_one(T& tiles, Operands from) {
  load_operands(tiles, from);
  multiply<0, 4, 6>(tiles), multiply<1, 4, 7>(tiles);
  multiply<3, 5, 7>(tiles), multiply<2, 5, 6>(tiles);
}
// C = A B over `units` squares side by side.
template <class T>
void multiply_plainly(T& tiles, Operands from, std::int64_t units, float* c) {
  zero<0>(tiles), zero<1>(tiles), zero<2>(tiles), zero<3>(tiles);
  for (std::int64_t u = 0; u < units; ++u) {
    multiply_one_by_one(tiles, {from.a + u * kSquare, from.b + u * kSquare});
  }
  store_all_c(tiles, c);
}

// What happens to a C tile before its first product: its finished content is stored and it starts
// from zero or from memory. Three products after the last one into it, a store costs nothing; four
// stores behind the last step of a product stop the unit for 56 cycles.
enum class Swap { kNone, kZero, kLoad };

template <Swap kSwap, int kTile, class T, class C>
[[gnu::always_inline]] inline void swap_c(T& tiles, C finished, C c) {
  if constexpr (kSwap != Swap::kNone) store_c<kTile>(tiles, finished);
  if constexpr (kSwap == Swap::kZero) zero<kTile>(tiles);
  if constexpr (kSwap == Swap::kLoad) load_c<kTile>(tiles, c);
}

// Four products on the operands already in tiles 4 to 7. Each operand is loaded for the next step
// as soon as its last product is issued; `filler` puts its t-th share of other work behind the t-th
// product of the slot.
template <Swap kSwap, int t, class T, class C, class Filler>
[[gnu::always_inline]] inline void step(T& tiles, C finished, C c, Operands next, Filler& filler) {
  swap_c<kSwap, 0>(tiles, finished, c);
  multiply<0, 4, 6>(tiles);
  filler.template run<t>();
  swap_c<kSwap, 1>(tiles, finished, c);
  multiply<1, 4, 7>(tiles);
  load_stream<4>(tiles, next.a);
  filler.template run<t + 1>();
  swap_c<kSwap, 3>(tiles, finished, c);
  multiply<3, 5, 7>(tiles);
  load<7>(tiles, next.b + 512);
  filler.template run<t + 2>();
  swap_c<kSwap, 2>(tiles, finished, c);
  multiply<2, 5, 6>(tiles);
  load<6>(tiles, next.b);
  load_stream<5>(tiles, next.a + 512);
  filler.template run<t + 3>();
}

}  // namespace
}  // namespace annulus
