// The tensors that a call writes, and the files made of them.
#pragma once

#include <string>

#include "call.h"
#include "tensors.h"

namespace annulus::tools {

struct Outputs {
  MutableTensorView out, lse;
  Storage out_memory, lse_memory;
};

Outputs make_outputs(const Inputs& inputs, DType out_dtype, Layout layout);

// Throws IoError now if the files of --output, --report or --trace could not be written later.
void require_writable(const Options& options);

void write_outputs(const Options& options, const Call& call, const Outputs& outputs);

}  // namespace annulus::tools
