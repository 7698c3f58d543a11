// The tensors of one call: from a file, or made from a seed.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "annulus/safetensors.h"
#include "options.h"
#include "tensors.h"

namespace annulus::tools {

// Shapes are those of the file; without INPUT, q, k, v and dout have shapes but no data until
// make_inputs().
struct Inputs {
  TensorView q, k, v;
  std::optional<TensorView> dout;  // with --backward
  TensorView q_segment_ids, kv_segment_ids, softmax_aux, bias, attention_mask, kv_lengths;
  std::optional<std::vector<std::vector<std::int64_t>>> positions, kv_positions;  // per rank
  std::int64_t bytes = 0;  // that the tensors take in memory

  std::optional<SafetensorsFile> file;
  std::vector<Storage> made;
};

// Reads INPUT and checks names, dtypes and shapes; or lays out what the shape options ask for.
// Throws InvalidArgument for a sound file whose tensors do not fit, BadData and IoError as
// SafetensorsFile does.
Inputs open_inputs(const Options& options);

// Fills q, k, v and dout of inputs without a file. A value depends on seed, tensor and index alone.
void make_inputs(Inputs& inputs, std::uint64_t seed, int threads);

// Standard normal numbers; number `index` of stream (seed, tensor).
void fill_normal(std::byte* to, DType dtype, std::int64_t count, std::uint64_t seed,
                 std::uint64_t tensor, int threads);

}  // namespace annulus::tools
