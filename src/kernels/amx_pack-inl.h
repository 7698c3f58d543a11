// Memory of the AMX kernel: how K, V, Q and the state of a strip lie in tiles, and the table's
// entries that write and read them. Included by amx_bf16.cc inside its target region.
//
// S^T = K Q^T and O^T += V^T P^T, queries in lanes. A unit is 32 elements of a dimension. Every
// operand is a sequence of 32 x 32 squares, two tiles each, in the order in which the products read
// them:
//
//   K    A   [tile of keys][unit of d]               [32 keys][32 d]
//   V^T  A   [block][unit of d][tile of the block]   [32 d][32 keys]
//   Q^T  B   [unit of d]                 [2 halves of the queries][16 d pairs][16 queries][2]
//   P^T  B   [tile of the block]         [2 halves of the queries][16 key pairs][16 queries][2]
//   S^T  C   [tile of the slot]          [2 halves of the queries][32 keys][16 queries]
//   O^T  C   [unit of d]                 [2 halves of the queries][32 d][16 queries]
#pragma once

namespace annulus {
namespace {

using Bf16 = std::uint16_t;

constexpr int kLanes = 16;
constexpr int kStripRows = 32;
constexpr int kTileKeys = 32;
constexpr int kSquare = 1024;  // elements of 32 x 32
constexpr int kMaxBlock = 8;   // tiles: P of two blocks takes 32 KiB of the 48 KiB L1, no more
constexpr float kInfinity = __builtin_inff();
constexpr float kNan = __builtin_nanf("");
constexpr double kLn2 = 0.693147180559945309;
constexpr double kLog2e = 1.44269504088896341;

constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
constexpr std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// A slot of the pipeline multiplies one group of tiles with Q, exponentiates the group before, and
// adds one unit of O for the block before. So a block has as many groups as O has units, and both
// products have an equal share of every slot. Blocks of about 128 keys: shorter ones load and store
// O more often (d = 128: 62 % of peak at 64 keys, 67 at 128), longer ones push P out of the L1.
constexpr int group_tiles(std::int64_t v_units) { return v_units == 1 ? 4 : v_units == 2 ? 2 : 1; }

struct Sizes {
  std::int64_t k_units, v_units;
  int group, block;  // tiles

  explicit Sizes(Dims dims)
      : k_units(ceil_div(dims.head_dim, 32)),
        v_units(ceil_div(dims.v_head_dim, 32)),
        group(group_tiles(v_units)),
        block(static_cast<int>(smaller(group * v_units, kMaxBlock))) {}
  std::int64_t blocks(std::int64_t keys) const { return ceil_div(keys, block * kTileKeys); }
  std::int64_t k_elements(std::int64_t keys) const {
    return blocks(keys) * block * k_units * kSquare;
  }
  std::int64_t v_elements(std::int64_t keys) const {
    return blocks(keys) * block * v_units * kSquare;
  }
};

// What pack() writes; whole blocks, zero beyond the last key.
struct Packed {
  Bf16* k;
  Bf16* v;
  std::uint8_t* not_finite;  // [tile] some value of its keys is Inf or NaN

  Packed(const void* memory, const Sizes& sizes, std::int64_t num_keys)
      : k(static_cast<Bf16*>(const_cast<void*>(memory))),
        v(k + sizes.k_elements(num_keys)),
        not_finite(reinterpret_cast<std::uint8_t*>(v + sizes.v_elements(num_keys))) {}
};

// Everything kept for 32 queries while the keys pass by.
struct Strip {
  struct Head {
    alignas(64) float m[kStripRows];  // reference in log2 units, an integer: rescaling is exact
    float guard[kStripRows];          // log2 of the weight that raises m; -inf: m is not set yet
    float l[kStripRows];              // sum of p, for lse
    float w[kStripRows];              // sum of p as bf16, as V is weighted: out = O / w, so weights
                                      // add up to 1 and one key's value comes back as it is
    float bl[kStripRows];             // both of the open block: their error grows with
    float bw[kStripRows];             // block + keys / block, not with keys
    float f[kStripRows];              // factor that O, l and w await
    float base[kStripRows];           // subtracted from scores: 0 unless they are far from it
    float base_natural[kStripRows];   // the same in natural units, for lse
    std::int32_t raised;              // some f is not 1
    std::int32_t shifted;             // some base is not 0
    std::int32_t watch;               // slots whose maxima are taken before the exponentials
  };
  Head* head;
  float* o;
  Bf16* q;

  Strip() = default;
  Strip(const void* memory, const Sizes& sizes)
      : head(static_cast<Head*>(const_cast<void*>(memory))),
        o(reinterpret_cast<float*>(head + 1)),
        q(reinterpret_cast<Bf16*>(o + sizes.v_units * kSquare)) {}
};

// A panel's K and V take 256 KiB of the L2, the item's strips (Q^T and O^T) 768 KiB at most: two
// panels and the strips fit the 1.2 MB that an L2 of 2 MB seems to give. Measured best at d = 64,
// 128 and 256.
Blocking blocking(Dims dims) {
  const Sizes sizes(dims);
  const std::int64_t units = sizes.k_units + sizes.v_units, block_keys = sizes.block * kTileKeys;
  const std::int64_t keys = smaller(1024, 4096 / units);
  const std::int64_t rows = smaller(1024, 8192 / units) / kStripRows * kStripRows;
  return {larger(1, (keys + block_keys / 2) / block_keys) * block_keys, larger(kStripRows, rows)};
}

// V^T lies by blocks, so a panel begins with one.
std::int64_t panel_step(Dims dims) { return Sizes(dims).block * kTileKeys; }

std::int64_t strip_bytes(Dims dims) {
  const Sizes sizes(dims);
  return static_cast<std::int64_t>(sizeof(Strip::Head)) + sizes.v_units * kSquare * 4 +
         sizes.k_units * kSquare * 2;
}

std::int64_t packed_bytes(Dims dims, std::int64_t num_keys) {
  const Sizes sizes(dims);
  const std::int64_t flags = sizes.blocks(num_keys) * sizes.block;
  return (sizes.k_elements(num_keys) + sizes.v_elements(num_keys)) * 2 + ceil_div(flags, 64) * 64;
}

// ------------------------------------------------------------------------------------------
// elements

// To nearest even; a NaN stays one.
inline __m256i round_to_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x), upper = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __m512i quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, quiet));
}
inline __m512i round_to_bf16(__m512 low, __m512 high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(round_to_bf16(low)), round_to_bf16(high), 1);
}

// Up to 32 elements of a row as bf16, zero beyond `count`.
inline __m512i load_elements(const char* from, std::int64_t stride_bytes, Element element,
                             std::int64_t count) {
  if (count <= 0) return _mm512_setzero_si512();
  const std::int64_t n = smaller(count, 32), size = element == Element::kFloat32 ? 4 : 2;
  alignas(64) char gathered[128];
  if (stride_bytes != size) {
    for (std::int64_t i = 0; i < n; ++i) {
      __builtin_memcpy(gathered + i * size, from + i * stride_bytes,
                       static_cast<std::size_t>(size));
    }
    from = gathered;
  }
  const __mmask32 have = n == 32 ? 0xffffffffU : (1U << n) - 1;
  if (element == Element::kFloat32) {
    return round_to_bf16(_mm512_maskz_loadu_ps(static_cast<__mmask16>(have), from),
                         _mm512_maskz_loadu_ps(static_cast<__mmask16>(have >> 16), from + 64));
  }
  const __m512i bits = _mm512_maskz_loadu_epi16(have, from);
  if (element == Element::kBFloat16) return bits;
  return round_to_bf16(_mm512_cvtph_ps(_mm512_castsi512_si256(bits)),
                       _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1)));
}

// 16 x 16 transpose of 32-bit elements: within 2 x 2, within 128-bit lanes, then whole lanes in two
// steps.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// ------------------------------------------------------------------------------------------ pack

// One unit of one row, null for a key that is not there.
inline __m512i load_unit(const RowSource& source, const char* row, std::int64_t unit,
                         std::int64_t dim) {
  if (row == nullptr) return _mm512_setzero_si512();
  return load_elements(row + unit * 32 * source.dim_stride_bytes, source.dim_stride_bytes,
                       source.element, dim - unit * 32);
}

inline const char* row_address(const RowSource& source, std::int64_t key, std::int64_t num_keys) {
  if (key >= num_keys) return nullptr;
  return static_cast<const char*>(source.base) + source.row[key] * source.row_stride_bytes;
}

inline __m512i side_by_side(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

inline bool all_finite(__m512i x) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  return _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent) == 0;
}

// Of 32 rows one unit of d as a square of A, transposed: [32 d][32 rows]. Returns whether each
// element is finite.
bool pack_transposed(Bf16* to, const RowSource& source, const char* const (&rows)[kTileKeys],
                     std::int64_t unit, std::int64_t dim) {
  bool finite = true;
  __m512i low[16], high[16];  // element j: rows 2j and 2j + 1 side by side, lanes d
  for (int j = 0; j < 16; ++j) {
    const __m512i even = load_unit(source, rows[2 * j], unit, dim);
    const __m512i odd = load_unit(source, rows[2 * j + 1], unit, dim);
    finite = finite && all_finite(even) && all_finite(odd);
    low[j] = side_by_side(_mm512_castsi512_si256(even), _mm512_castsi512_si256(odd));
    high[j] = side_by_side(_mm512_extracti64x4_epi64(even, 1), _mm512_extracti64x4_epi64(odd, 1));
  }
  transpose(low), transpose(high);
  for (int d = 0; d < 16; ++d) {
    _mm512_storeu_si512(to + d * 32, low[d]);
    _mm512_storeu_si512(to + (16 + d) * 32, high[d]);
  }
  return finite;
}

// The same as a square of B: [2 halves of the rows][16 d pairs][16 rows][2].
void pack_query_square(Bf16* to, const RowSource& source, const char* const (&rows)[kStripRows],
                       std::int64_t unit, std::int64_t dim) {
  for (int half = 0; half < 2; ++half, to += 512) {
    __m512i r[16];
    for (int j = 0; j < 16; ++j) r[j] = load_unit(source, rows[half * 16 + j], unit, dim);
    transpose(r);
    for (int j = 0; j < 16; ++j) _mm512_storeu_si512(to + j * 32, r[j]);
  }
}

void pack(void* memory, const RowSource& k, const RowSource& v, Dims dims, std::int64_t num_keys,
          std::int64_t key_begin, std::int64_t key_end) {
  const Sizes sizes(dims);
  const Packed packed(memory, sizes, num_keys);
  const std::int64_t end =
      key_end < num_keys ? key_end / kTileKeys : sizes.blocks(num_keys) * sizes.block;
  for (std::int64_t tile = key_begin / kTileKeys; tile < end; ++tile) {
    const char* v_rows[kTileKeys];
    Bf16* k_tile = packed.k + tile * sizes.k_units * kSquare;
    for (int r = 0; r < kTileKeys; ++r) {
      const char* k_row = row_address(k, tile * kTileKeys + r, num_keys);
      v_rows[r] = row_address(v, tile * kTileKeys + r, num_keys);
      for (std::int64_t u = 0; u < sizes.k_units; ++u) {
        _mm512_storeu_si512(k_tile + u * kSquare + r * 32, load_unit(k, k_row, u, dims.head_dim));
      }
    }
    const std::int64_t block = tile / sizes.block, step = tile % sizes.block;
    bool finite = true;
    for (std::int64_t u = 0; u < sizes.v_units; ++u) {
      Bf16* to = packed.v + ((block * sizes.v_units + u) * sizes.block + step) * kSquare;
      finite &= pack_transposed(to, v, v_rows, u, dims.v_head_dim);
    }
    packed.not_finite[tile] = finite ? 0 : 1;
  }
}

// ------------------------------------------------------------------------------------------ ends
// of a strip

void start(void* memory, const void* const* rows, std::int64_t count, std::int64_t dim_stride_bytes,
           Element element, Dims dims) {
  const Sizes sizes(dims);
  const Strip strip(memory, sizes);
  const RowSource source{nullptr, nullptr, 0, dim_stride_bytes, element};
  const char* row[kStripRows];
  for (int n = 0; n < kStripRows; ++n) {
    row[n] = n < count ? static_cast<const char*>(rows[n]) : nullptr;
  }
  for (std::int64_t u = 0; u < sizes.k_units; ++u) {
    pack_query_square(strip.q + u * kSquare, source, row, u, dims.head_dim);
  }
  memset(strip.o, 0, static_cast<std::size_t>(sizes.v_units * kSquare * 4));
  Strip::Head& z = *strip.head;
  for (int n = 0; n < kStripRows; ++n) {
    z.m[n] = 0, z.guard[n] = -kInfinity, z.f[n] = 1;
    z.l[n] = z.w[n] = z.bl[n] = z.bw[n] = z.base[n] = z.base_natural[n] = 0;
  }
  z.raised = z.shifted = 0, z.watch = 1;
}

// lse of one lane; returns the factor that normalises its O.
inline float normalise(const Strip::Head& z, int n, float sink, float& lse) {
  if (z.l[n] == 0) {
    lse = sink;
    return 0;
  }
  const double seen = z.base_natural[n] + kLn2 * z.m[n] + log(static_cast<double>(z.l[n]));
  // Each side may be far above the other; without a sink total is seen.
  const double top = seen < sink ? sink : seen, low = seen < sink ? seen : sink;
  const double total = top + log1p(exp(low - top));
  lse = static_cast<float>(total);
  return static_cast<float>(exp(seen - total)) / z.w[n];
}

// Rows of 32 queries from squares [unit][2 halves of the queries][32 d][16 queries], each times its
// factor; without its bit in `seen` a row is zero, whatever stands in the squares.
void store_rows(const float* squares, const float* factor, std::uint32_t seen, float* out,
                std::int64_t out_stride, std::int64_t dim) {
  for (std::int64_t x = 0; x < dim; x += 16) {
    const std::int64_t left = dim - x;
    const auto have = static_cast<__mmask16>(left >= 16 ? 0xffffU : (1U << left) - 1);
    for (int half = 0; half < 2; ++half) {
      const __m512 f = _mm512_loadu_ps(factor + half * 16);
      const auto lanes = static_cast<__mmask16>(seen >> (half * 16));
      const float* at = squares + x / 32 * kSquare + half * 512 + x % 32 * 16;
      __m512i r[16];
      for (int d = 0; d < 16; ++d) {
        r[d] = _mm512_castps_si512(_mm512_maskz_mul_ps(lanes, f, _mm512_load_ps(at + d * 16)));
      }
      transpose(r);
      for (int j = 0; j < 16; ++j) {
        _mm512_mask_storeu_ps(out + (half * 16 + j) * out_stride + x, have,
                              _mm512_castsi512_ps(r[j]));
      }
    }
  }
}

void finish(const void* memory, const float* sinks, float keep_scale, float* out,
            std::int64_t out_stride, float* lse, Dims dims) {
  const Strip strip(memory, Sizes(dims));
  float factor[kStripRows];
  std::uint32_t seen = 0;
  for (int n = 0; n < kStripRows; ++n) {
    factor[n] = normalise(*strip.head, n, sinks[n], lse[n]) * keep_scale;
    seen |= strip.head->l[n] != 0 ? 1U << n : 0;
  }
  store_rows(strip.o, factor, seen, out, out_stride, dims.v_head_dim);
}

}  // namespace
}  // namespace annulus
