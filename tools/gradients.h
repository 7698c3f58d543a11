// The gradients of a call: which there are, what they are like in files, where they lie in memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "call.h"
#include "tensors.h"

namespace annulus::tools {

struct GradientTensor {
  std::string name;                      // "dq"
  MutableTensorView Gradients::*member;  // where it goes in a call
  MutableTensorView view;                // in the layout of the primal; no data yet
  std::vector<std::int64_t> file_shape;  // as the primal's
  std::int64_t bytes = 0;
};

// Those that --backward gives: of q, k, v, of softmax_aux if there is one, of bias with --dbias. In
// the dtype of the primal, or float32 with --out-dtype=float32.
std::vector<GradientTensor> gradient_tensors(const Options& options, const Inputs& inputs);

// What reference::check_gradients() takes for `rows` rows per head, 0: all.
std::int64_t gradient_check_bytes(const Options& options, const Inputs& inputs, std::int64_t rows);

}  // namespace annulus::tools
