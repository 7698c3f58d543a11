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
  float scale;       // softmax_scale
  float cap;         // logits_soft_cap; 0: none
  bool bias;         // StripWork::bias is given
  float keep_scale;  // 1 / (1 - dropout_prob)
  bool dropout;      // StripWork::keep_bits is given
};

enum : std::uint8_t { kTileEmpty = 0, kTileFull = 1, kTilePartial = 2 };

// One strip against one panel.
struct StripWork {
  void* strip;                     // state, strip_bytes() of 64-byte aligned memory
  const std::uint8_t* tile_class;  // [ceil(panel keys / tile_keys)]
  const std::uint32_t* lane_bits;  // [panel keys rounded up to tile_keys]; read for partial tiles
                                   // only, bit n: lane n sees the key
  const float* bias;  // [panel keys rounded up to tile_keys][strip_rows] or null; garbage where not
                      // visible
  const std::uint32_t* keep_bits;  // [panel keys rounded up to tile_keys] or null; bit n: dropout
                                   // keeps the pair of lane n; garbage where not visible
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
  std::int64_t panel_keys;  // a multiple of panel_step()
  std::int64_t item_rows;   // a multiple of strip_rows: rows worth sharing a panel
};

struct ForwardKernel {
  const char* target;      // "avx2"
  const char* arithmetic;  // "float32 products"
  Element compute;  // kFloat32: float32 products and probabilities; kBFloat16: both bf16, float32
                    // accumulation
  std::int64_t strip_rows;  // at most 32
  std::int64_t tile_keys;

  // The kernel's choice. A call may take other multiples of panel_step() and strip_rows.
  Blocking (*blocking)(Dims dims);
  std::int64_t (*panel_step)(Dims dims);  // a multiple of tile_keys
  std::int64_t (*strip_bytes)(Dims dims);
  std::int64_t (*scratch_bytes)(Dims dims);
  std::int64_t (*packed_bytes)(Dims dims, std::int64_t num_keys);

  // Writes keys [key_begin, key_end) of one KV head into its packed block; key_begin is a multiple
  // of panel_step(), and key_end too or num_keys: what is packed does not depend on the panels of a
  // call. Padding keys and dims are zeroed. k.row and v.row are indexed by the key.
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
  // here, once, and so is keep_scale.
  void (*finish)(const void* strip, const float* sinks, float keep_scale, float* out,
                 std::int64_t out_stride, float* lse, Dims dims);
  // FLOP/s of a register-only loop of the product instruction, `rounds` times 24 instructions long;
  // returns the FLOP done. The caller holds the clock.
  double (*peak_loop)(std::int64_t rounds);
};

// The backward of a block: some strips of queries that follow each other against one panel of keys.
// One instruction stream computes S^T = K Q^T and dP^T = V dO^T by tiles and stores P and dS; then
//   dV += P^T dO    dK += dS^T Q    dQ^T += K^T dS^T

// One strip of the block.
struct BackwardStrip {
  const void* packed;              // what pack_strip() wrote
  float* dq;                       // [dq_rows(head_dim)][strip_rows], added to
  const std::uint8_t* tile_class;  // as in StripWork, and the next three
  const std::uint32_t* lane_bits;
  const float* bias;
  const std::uint32_t* keep_bits;
  float* ds;  // [panel keys rounded up to tile_keys][strip_rows] or null: receives dS as dbias has
              // it, 0 where not visible; empty tiles are not written
};

struct BackwardCall {
  const void* packed;  // what pack_keys() wrote for this KV head
  std::int64_t num_keys;
  std::int64_t key_begin;  // the panel, as in PanelCall
  std::int64_t key_count;
  const BackwardStrip* strips;
  std::int64_t strip_count;  // at most block_rows / strip_rows of the blocking in use
  // [key of the panel][row_floats()], added to; null with want_dkv false.
  float* dk;
  float* dv;
  bool want_dq;
  bool want_dkv;
  // Will be needed next (prefetch), null and 0: nothing.
  const char* next_strips;
  std::int64_t next_strip_bytes;
  char* next_dq;
  std::int64_t next_dq_bytes;
  ScoreRule rule;
  Dims dims;
  void* scratch;  // scratch_bytes(), one per thread, 64-byte aligned
};

// Rows of one strip: their q and dout, and what the forward knew of them.
struct StripRows {
  const void* const* q;     // [count]
  const void* const* dout;  // [count]
  std::int64_t count;
  std::int64_t q_dim_stride_bytes;
  std::int64_t dout_dim_stride_bytes;
  Element q_element;
  Element dout_element;
  const float* lse;    // [count]
  const float* delta;  // [count]
};

struct BackwardBlocking {
  std::int64_t panel_keys;  // a multiple of tile_keys
  std::int64_t block_rows;  // a multiple of strip_rows
};

struct BackwardKernel {
  const char* target;
  const char* arithmetic;
  Element compute;
  std::int64_t strip_rows;  // at most 32
  std::int64_t tile_keys;

  // The kernel's choice. A call may take other multiples of tile_keys and strip_rows, `most` at the
  // most.
  BackwardBlocking (*blocking)(Dims dims);
  BackwardBlocking most;
  std::int64_t (*scratch_bytes)(Dims dims, BackwardBlocking blocking);
  std::int64_t (*packed_bytes)(Dims dims, std::int64_t num_keys);
  std::int64_t (*strip_bytes)(Dims dims);
  // Floats of a row of dk or dv in memory, for head_dim or v_head_dim.
  std::int64_t (*row_floats)(std::int64_t dim);
  // Rows of a strip's dq in memory.
  std::int64_t (*dq_rows)(std::int64_t head_dim);

  // As ForwardKernel::pack, by multiples of tile_keys.
  void (*pack_keys)(void* packed, const RowSource& k, const RowSource& v, Dims dims,
                    std::int64_t num_keys, std::int64_t key_begin, std::int64_t key_end);
  // Lanes beyond the count are zero queries that see nothing.
  void (*pack_strip)(void* strip, const StripRows& rows, Dims dims);
  // A NaN or Inf in a key, value, query or dout never reaches the gradients of a pair's other side
  // where the pair is hidden.
  void (*block)(const BackwardCall& call);
  // rows[n][0..head_dim) = factor * dq[.][n], row stride `stride` floats, n in [0, strip_rows).
  void (*unload_dq)(const float* dq, float factor, float* rows, std::int64_t stride, Dims dims);
};

// Dropout's counter rule for a strip of queries: bit n of bits[k] is set iff the pair is kept.
struct DropoutRows {
  std::uint64_t seed;
  std::uint64_t threshold;  // dropped iff the word is below: ceil(dropout_prob * 2^32)
  std::uint32_t batch;
  std::int64_t count;         // lanes
  const std::int32_t* head;   // [32]
  const std::int64_t* query;  // [32] positions
};

// What options hold per pair, for strips of 32 lanes or fewer: [key][lane] as tiles want it, from
// and to tensors [query][key].
struct TermKernel {
  std::int64_t strip_rows;
  void (*keep_bits)(const DropoutRows& rows, const std::int64_t* keys, std::int64_t num_keys,
                    std::uint32_t* bits);
  // to[k * strip_rows + n] = row n's element k, which lies k * stride_bytes behind rows[n]; n below
  // strip_rows, 0 from `count` on.
  void (*gather)(const void* const* rows, std::int64_t count, std::int64_t stride_bytes,
                 Element element, std::int64_t num_keys, float* to);
  // rows[n][k * stride] += from[k * strip_rows + n]; n below `count`.
  void (*scatter_add)(float* const* rows, std::int64_t count, std::int64_t stride,
                      std::int64_t num_keys, const float* from);
};

}  // namespace annulus
