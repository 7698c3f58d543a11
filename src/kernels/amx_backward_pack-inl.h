// Memory layouts of the AMX backward, and the table's entries that write and read them. Included by
// amx_bf16.cc inside its target region.
//
// Five products; nothing is transposed between them, since a row of P or dS is blended from its two
// halves into A, and two rows into B. Squares of 32 x 32 as in the forward, in the order in which
// the products read them:
//
//   S^T = K Q^T     K     A  [tile of keys][unit of d]   [32 keys][32 d]
//                   Q^T   B  [unit of d]     [2 halves of the queries][16 d pairs][16 queries][2]
//   dP^T = V dO^T   V, dO^T  likewise
//   dV += P^T dO    P^T   A  [strip][tile]   [32 keys][16 queries][2], queries j and j + 16
//                   dO    B  [unit of d]     [2 halves of d][16 queries][16 d][2], likewise
//   dK += dS^T Q    dS^T, Q  likewise
//   dQ^T += K^T dS^T  K^T A  [tile of keys][unit of d]   [32 d][32 keys]
//                   dS^T  B  [strip][tile]   [2 halves of the queries][16 key pairs][16 queries][2]
//
// S^T, dP^T and dQ^T are C as in the forward, dK and dV rows of their own.
#pragma once

#include "kernels/amx_pack-inl.h"

namespace annulus {
namespace {

std::int64_t whole_units(std::int64_t dim) { return ceil_div(dim, 32) * 32; }

struct BackwardSizes {
  std::int64_t k_units, v_units;

  explicit BackwardSizes(Dims dims)
      : k_units(ceil_div(dims.head_dim, 32)), v_units(ceil_div(dims.v_head_dim, 32)) {}
  std::int64_t key_squares(std::int64_t tiles) const { return tiles * (2 * k_units + v_units); }
};

// At d = 128: the panel's K, V and K^T 192 KiB, its dK and dV 256, two blocks of strips (Q and dO
// twice) 256, their dQ 128, P and dS 192: 1 MiB, of the 1.2 MB that an L2 of 2 MB seems to give.
// Short panels read strips and dQ more often, small blocks load and store dK and dV more often; at
// d = 64 there is room for a larger block, beyond 128 only for half a panel. Not measured.
BackwardBlocking backward_blocking(Dims dims) {
  const BackwardSizes sizes(dims);
  const std::int64_t units = sizes.k_units + sizes.v_units;
  return {(units <= 8 ? 8 : 4) * kTileKeys, (units <= 4 ? 8 : 4) * kStripRows};
}

// A block knows its strips and tiles by the bits of a word.
constexpr int kMaxStrips = 32, kMaxTiles = 32;

std::int64_t backward_scratch_bytes(Dims /*dims*/, BackwardBlocking blocking) {
  const std::int64_t squares = blocking.panel_keys / kTileKeys * blocking.block_rows / kStripRows;
  return (4 * 4 + 3 * 2 * squares) * kSquare;
}

// What pack_backward_keys() writes; whole tiles, zero beyond the last key.
struct BackwardKeys {
  Bf16 *k, *v, *kt;
  std::uint8_t* not_finite;  // [tile] some element of K is Inf or NaN

  BackwardKeys(const void* memory, const BackwardSizes& sizes, std::int64_t num_keys)
      : k(static_cast<Bf16*>(const_cast<void*>(memory))) {
    const std::int64_t tiles = ceil_div(num_keys, kTileKeys);
    v = k + tiles * sizes.k_units * kSquare;
    kt = v + tiles * sizes.v_units * kSquare;
    not_finite = reinterpret_cast<std::uint8_t*>(kt + tiles * sizes.k_units * kSquare);
  }
};

// What pack_backward_strip() writes.
struct BackwardRows {
  struct Head {
    alignas(64) float lse[kStripRows];  // log2 units; +inf for a row that sees nothing: its p are 0
    float delta[kStripRows];
    float base[kStripRows];   // of rows whose lse is far from 0, in natural units: lse is then 0
    std::int32_t shifted;     // some base is not 0
    std::uint32_t lanes;      // bit per row; the lanes beyond see nothing
    std::int32_t not_finite;  // some element of q or dout is not, or some lse is NaN
  };
  const Head* head;
  const Bf16 *qt, *dot, *q, *dout;

  BackwardRows() = default;
  BackwardRows(const void* memory, const BackwardSizes& sizes)
      : head(static_cast<const Head*>(memory)),
        qt(reinterpret_cast<const Bf16*>(head + 1)),
        dot(qt + sizes.k_units * kSquare),
        q(dot + sizes.v_units * kSquare),
        dout(q + sizes.k_units * kSquare) {}
};

std::int64_t backward_packed_bytes(Dims dims, std::int64_t num_keys) {
  const std::int64_t tiles = ceil_div(num_keys, kTileKeys);
  return BackwardSizes(dims).key_squares(tiles) * kSquare * 2 + ceil_div(tiles, 64) * 64;
}

std::int64_t backward_strip_bytes(Dims dims) {
  const BackwardSizes sizes(dims);
  return static_cast<std::int64_t>(sizeof(BackwardRows::Head)) +
         2 * (sizes.k_units + sizes.v_units) * kSquare * 2;
}

// One unit of 32 rows as a square of A: [32 rows][32 d].
void pack_rows(Bf16* to, const RowSource& source, const char* const (&rows)[32], std::int64_t unit,
               std::int64_t dim) {
  for (int r = 0; r < 32; ++r) {
    _mm512_storeu_si512(to + r * 32, load_unit(source, rows[r], unit, dim));
  }
}

// The same as a square of B: [2 halves of d][16 rows][16 d][2], rows j and j + 16 side by side.
// Returns whether each element is finite.
bool pack_row_pairs(Bf16* to, const RowSource& source, const char* const (&rows)[32],
                    std::int64_t unit, std::int64_t dim) {
  bool finite = true;
  for (int j = 0; j < 16; ++j) {
    const __m512i x = load_unit(source, rows[j], unit, dim);
    const __m512i y = load_unit(source, rows[j + 16], unit, dim);
    finite = finite && all_finite(x) && all_finite(y);
    _mm512_storeu_si512(to + j * 32,
                        side_by_side(_mm512_castsi512_si256(x), _mm512_castsi512_si256(y)));
    _mm512_storeu_si512(to + 512 + j * 32, side_by_side(_mm512_extracti64x4_epi64(x, 1),
                                                        _mm512_extracti64x4_epi64(y, 1)));
  }
  return finite;
}

void pack_backward_keys(void* memory, const RowSource& k, const RowSource& v, Dims dims,
                        std::int64_t num_keys, std::int64_t key_begin, std::int64_t key_end) {
  const BackwardSizes sizes(dims);
  const BackwardKeys packed(memory, sizes, num_keys);
  for (std::int64_t tile = key_begin / kTileKeys; tile < ceil_div(key_end, kTileKeys); ++tile) {
    const char *k_rows[kTileKeys], *v_rows[kTileKeys];
    for (int r = 0; r < kTileKeys; ++r) {
      k_rows[r] = row_address(k, tile * kTileKeys + r, num_keys);
      v_rows[r] = row_address(v, tile * kTileKeys + r, num_keys);
    }
    bool finite = true;
    for (std::int64_t u = 0; u < sizes.k_units; ++u) {
      const std::int64_t at = (tile * sizes.k_units + u) * kSquare;
      pack_rows(packed.k + at, k, k_rows, u, dims.head_dim);
      finite &= pack_transposed(packed.kt + at, k, k_rows, u, dims.head_dim);
    }
    for (std::int64_t u = 0; u < sizes.v_units; ++u) {
      Bf16* to = packed.v + (tile * sizes.v_units + u) * kSquare;
      pack_rows(to, v, v_rows, u, dims.v_head_dim);
    }
    packed.not_finite[tile] = finite ? 0 : 1;
  }
}

// Both forms of 32 rows of q or dout.
bool pack_both_forms(const Bf16* transposed, const Bf16* pairs, const void* const* rows,
                     std::int64_t count, const RowSource& source, std::int64_t units,
                     std::int64_t dim) {
  const char* row[kStripRows];
  for (int n = 0; n < kStripRows; ++n) {
    row[n] = n < count ? static_cast<const char*>(rows[n]) : nullptr;
  }
  bool finite = true;
  for (std::int64_t u = 0; u < units; ++u) {
    pack_query_square(const_cast<Bf16*>(transposed) + u * kSquare, source, row, u, dim);
    finite &= pack_row_pairs(const_cast<Bf16*>(pairs) + u * kSquare, source, row, u, dim);
  }
  return finite;
}

void pack_backward_strip(void* memory, const StripRows& rows, Dims dims) {
  const BackwardSizes sizes(dims);
  const BackwardRows packed(memory, sizes);
  const RowSource q{nullptr, nullptr, 0, rows.q_dim_stride_bytes, rows.q_element};
  const RowSource dout{nullptr, nullptr, 0, rows.dout_dim_stride_bytes, rows.dout_element};
  bool shifted = false;
  bool finite =
      pack_both_forms(packed.qt, packed.q, rows.q, rows.count, q, sizes.k_units, dims.head_dim);
  finite &= pack_both_forms(packed.dot, packed.dout, rows.dout, rows.count, dout, sizes.v_units,
                            dims.v_head_dim);
  auto& head = *static_cast<BackwardRows::Head*>(memory);
  for (int n = 0; n < kStripRows; ++n) {
    float lse = n < rows.count ? rows.lse[n] : -kInfinity;
    float delta = n < rows.count ? rows.delta[n] : 0;
    // The usual NaN: see transform().
    if (__builtin_isnan(lse)) lse = kNan;
    if (__builtin_isnan(delta)) delta = kNan;
    finite &= !__builtin_isnan(lse);
    if (lse == -kInfinity) lse = kInfinity;
    const double exponent = kLog2e * lse;
    const bool far = __builtin_fabs(exponent) > kFarExponent && lse != kInfinity;
    head.lse[n] = far ? 0 : static_cast<float>(exponent), head.base[n] = far ? lse : 0;
    head.delta[n] = delta;
    shifted |= far;
  }
  head.shifted = shifted ? 1 : 0;
  head.lanes = rows.count < kStripRows ? (1U << rows.count) - 1 : ~0U;
  head.not_finite = finite ? 0 : 1;
}

void unload_dq(const float* dq, float factor, float* rows, std::int64_t stride, Dims dims) {
  float factors[kStripRows];
  for (float& f : factors) f = factor;
  store_rows(dq, factors, ~0U, rows, stride, dims.head_dim);
}

}  // namespace
}  // namespace annulus
