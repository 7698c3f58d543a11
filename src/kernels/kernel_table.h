// The seam between attention and instruction sets. One ForwardKernel per target and arithmetic;
// operations know only this table, kernels know only packed operands, tiles and softmax states.
//
// Words: a strip is the rows of queries that share a tile (lanes are queries); a tile is tile_keys
// keys x one strip; a panel is the keys that all strips of a work item pass before the next panel
// (they share it in the L2). A row is (token, query head of the KV head's group): how rows map to
// tokens is the operation's business.
//
// This header is included by translation units compiled for special instruction sets: no inline
// functions, no headers that bring any beyond <cstdint>.
#pragma once

#include <cstdint>

namespace annulus {

struct Dims {
  std::int64_t head_dim;
  std::int64_t v_head_dim;
};

// Elements of q, k, v in memory; the numbers equal annulus::DType's.
enum class Element : std::uint8_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Rows of a caller's tensor: row t starts at base + row[t] * row_stride_bytes, its elements are
// dim_stride apart.
struct RowSource {
  const void* base;
  const std::int64_t* row;  // [count] row numbers
  std::int64_t row_stride_bytes;
  std::int64_t dim_stride_bytes;
  Element element;
};

// What is done to a stored score tile before the exponentials, and how scores become exponents.
struct ScoreRule {
  float scale;  // softmax_scale
  float cap;    // logits_soft_cap; 0: none
  bool bias;    // StripWork::bias is given
};

enum : std::uint8_t { kTileEmpty = 0, kTileFull = 1, kTilePartial = 2 };

// One strip against one panel.
struct StripWork {
  void* strip;                     // state, strip_bytes() of 64-byte aligned memory
  const std::uint8_t* tile_class;  // [ceil(panel keys / tile_keys)]
  const std::uint32_t* lane_bits;  // [panel keys rounded up to tile_keys]; read for partial tiles
                                   // only, bit n: lane n sees the key
  const float*
      bias;  // [panel keys rounded up to tile_keys][strip_rows] or null; garbage where not visible
};

struct PanelCall {
  const void* packed;       // what pack() wrote for this KV head
  std::int64_t num_keys;    // of the whole packed block
  std::int64_t key_begin;   // the panel: a multiple of panel_keys ...
  std::int64_t key_count;   // ... and at most panel_keys
  std::int64_t next_begin;  // panel that will be needed next (prefetch), -1: none
  const StripWork* strips;
  std::int64_t strip_count;
  ScoreRule rule;
  Dims dims;
  void* scratch;  // scratch_bytes(), one per thread, 64-byte aligned
};

struct Blocking {
  std::int64_t panel_keys;  // a multiple of tile_keys
  std::int64_t item_rows;   // a multiple of strip_rows: rows worth sharing a panel
};

struct ForwardKernel {
  const char* target;      // "avx2"
  const char* arithmetic;  // "float32 products"
  Element compute;  // kFloat32: float32 products and probabilities; kBFloat16: both bf16, float32
                    // accumulation
  std::int64_t strip_rows;  // at most 32
  std::int64_t tile_keys;

  Blocking (*blocking)(Dims dims);
  std::int64_t (*strip_bytes)(Dims dims);
  std::int64_t (*scratch_bytes)(Dims dims);
  std::int64_t (*packed_bytes)(Dims dims, std::int64_t num_keys);

  // Writes keys [key_begin, key_end) of one KV head into its packed block; key_begin is a multiple
  // of panel_keys, and key_end too or num_keys. Padding keys and dims are zeroed. k.row and v.row
  // are indexed by the key.
  void (*pack)(void* packed, const RowSource& k, const RowSource& v, Dims dims,
               std::int64_t num_keys, std::int64_t key_begin, std::int64_t key_end);
  // Empty state for a strip of `count` query rows, each at its address; lanes beyond are zero
  // queries.
  void (*start)(void* strip, const void* const* rows, std::int64_t count,
                std::int64_t dim_stride_bytes, Element element, Dims dims);
  // Every strip of the call against the panel. Tiles of class empty are not touched. A NaN or Inf
  // in a key or value a lane does not see never reaches that lane.
  void (*panel)(const PanelCall& call);
  // Normalised rows: out[n][0..v_head_dim) float32, row stride out_stride floats, and lse[n] for n
  // in [0, strip_rows). sinks[n] is the logsumexp of lane n's sinks, -inf for none; it is counted
  // here, once.
  void (*finish)(const void* strip, const float* sinks, float* out, std::int64_t out_stride,
                 float* lse, Dims dims);
  // FLOP/s of a register-only loop of the product instruction, `rounds` times 24 instructions long;
  // returns the FLOP done. The caller holds the clock.
  double (*peak_loop)(std::int64_t rounds);
};

}  // namespace annulus
