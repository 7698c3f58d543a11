// The tensors that a call writes, and the files made of them.
#pragma once

#include <string>
#include <vector>

#include "call.h"
#include "gradients.h"
#include "tensors.h"

namespace annulus::tools {

struct Outputs {
  MutableTensorView out, lse;
  Storage out_memory, lse_memory;
  std::vector<GradientTensor> gradient_tensors;  // with --backward
  std::vector<Storage> gradient_memory;          // theirs
  Gradients gradients;
};

std::int64_t output_bytes(const Options& options, const Inputs& inputs);

// What the process will use at its peak: itself at its start, inputs, outputs, the call, the rows
// that are compared with the oracle, and an allowance.
std::int64_t planned_bytes(std::int64_t at_start, const Options& options, const Inputs& inputs,
                           const Call& call);

// Shapes as in files: {"q": [1, 4096, 1, 64], ...}.
Json shapes_json(const Options& options, const Inputs& inputs);

Outputs make_outputs(const Options& options, const Inputs& inputs);

// Throws IoError now if the files of --output, --report or --trace could not be written later.
void require_writable(const Options& options);

void write_outputs(const Options& options, const Call& call, const Outputs& outputs);

}  // namespace annulus::tools
