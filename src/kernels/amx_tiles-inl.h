// Tile operations of the AMX kernel, twice: the hardware's, and plain C++ arrays that prove the
// kernel on a CPU without AMX. Included by amx_bf16.cc inside its target region.
//
// Every tile is 16 rows of 64 bytes and lies in memory as such, without gaps unless a stride is
// given. Tiles 0 to 3 hold C, 4 and 5 A, 6 and 7 B. Tiles belong to a
// thread from open(), which zeroes them, to close(), behind which a thread's state is as small as
// before; the pair costs 50 ns, so once a call. (No destructor: unwinding would need symbols that
// the linker may share with other code.)
#pragma once

namespace annulus {
namespace {

constexpr int kTileBytes = 1024;

// ------------------------------------------------------------------------------------------
// hardware

struct HardwareTiles {};

inline void open(HardwareTiles&) {
  struct alignas(64) {
    std::uint8_t palette, start_row, reserved[14];
    std::uint16_t row_bytes[16];
    std::uint8_t rows[16];
  } config = {};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
  asm volatile("ldtilecfg %0" ::"m"(config));
}
inline void close(HardwareTiles&) { asm volatile("tilerelease" ::: "memory"); }

// Assembly instead of intrinsics: the clobber of memory keeps the compiler from moving the loads
// and stores of the exponentials across a product, so the interleaving written is the one that
// runs.
template <int kTile>
[[gnu::always_inline]] inline void load(HardwareTiles&, const void* from, long stride = 64) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
// For data read once per strip (K, V^T): its lines do not displace Q, S, P and O from the L1.
template <int kTile>
[[gnu::always_inline]] inline void load_stream(HardwareTiles&, const void* from) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(64L), "i"(kTile) : "memory");
}
template <int kTile>
[[gnu::always_inline]] inline void store(HardwareTiles&, void* to, long stride = 64) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
[[gnu::always_inline]] inline void zero(HardwareTiles&) {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// C += A B
template <int kC, int kA, int kB>
[[gnu::always_inline]] inline void multiply(HardwareTiles&) {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB) : "memory");
}

// ------------------------------------------------------------------------------------------
// simulated

struct SimulatedTiles {
  alignas(64) std::uint32_t tile[8][16][16];
};

inline void open(SimulatedTiles& tiles) { memset(&tiles, 0, sizeof tiles); }
inline void close(SimulatedTiles&) {}

inline float as_float(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline std::uint32_t as_bits(float x) { return __builtin_bit_cast(std::uint32_t, x); }

// The instruction takes denormals for zero and makes none.
inline std::uint32_t flush(std::uint32_t bits) {
  return (bits & 0x7f800000U) == 0 ? bits & 0x80000000U : bits;
}
inline float flush(float x) { return as_float(flush(as_bits(x))); }
inline float even_half(std::uint32_t pair) { return as_float(flush(pair << 16)); }
inline float odd_half(std::uint32_t pair) { return as_float(flush(pair & 0xffff0000U)); }

// As the instruction is documented: the even and the odd elements of a row have a sum each, from
// zero, rounded behind every fused product; then the two are added, then C.
[[gnu::noinline]] inline void multiply_tiles(std::uint32_t (&c)[16][16],
                                             const std::uint32_t (&a)[16][16],
                                             const std::uint32_t (&b)[16][16]) {
  for (int m = 0; m < 16; ++m) {
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < 16; ++k) {
      const float a_even = even_half(a[m][k]), a_odd = odd_half(a[m][k]);
      for (int n = 0; n < 16; ++n) {
        even[n] = flush(__builtin_fmaf(a_even, even_half(b[k][n]), even[n]));
        odd[n] = flush(__builtin_fmaf(a_odd, odd_half(b[k][n]), odd[n]));
      }
    }
    for (int n = 0; n < 16; ++n) {
      c[m][n] = as_bits(flush(as_float(flush(c[m][n])) + flush(even[n] + odd[n])));
    }
  }
}

template <int kTile>
inline void load(SimulatedTiles& tiles, const void* from, long stride = 64) {
  for (int i = 0; i < 16; ++i) {
    memcpy(tiles.tile[kTile][i], static_cast<const char*>(from) + i * stride, 64);
  }
}
template <int kTile>
inline void load_stream(SimulatedTiles& tiles, const void* from) {
  memcpy(tiles.tile[kTile], from, kTileBytes);
}
template <int kTile>
inline void store(SimulatedTiles& tiles, void* to, long stride = 64) {
  for (int i = 0; i < 16; ++i) {
    memcpy(static_cast<char*>(to) + i * stride, tiles.tile[kTile][i], 64);
  }
}
template <int kTile>
inline void zero(SimulatedTiles& tiles) {
  memset(tiles.tile[kTile], 0, kTileBytes);
}
template <int kC, int kA, int kB>
inline void multiply(SimulatedTiles& tiles) {
  multiply_tiles(tiles.tile[kC], tiles.tile[kA], tiles.tile[kB]);
}

}  // namespace
}  // namespace annulus
