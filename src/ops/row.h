// One row of a tensor against float32 rows of the kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "annulus/tensor.h"

namespace annulus {

// out[x] = row[x], rounded once.
void store_row(DType dtype, std::byte* out, std::int64_t stride_bytes, const float* row,
               std::int64_t n);
// row[x] = in[x].
void load_row(DType dtype, const std::byte* in, std::int64_t stride_bytes, float* row,
              std::int64_t n);

// What the backward wants to know of the rows of the tensors at hand:
//   delta = sum of dout * out, less dlse
// The sum, in double, is 0 where out is all zeros: a row that sees no key depends on nothing,
// whatever its dout holds. With a forward in the same call, out is what it was before rounding.
struct RowDeltas {
  TensorView dout;
  TensorView dlse;          // empty: zeros
  MutableTensorView delta;  // float32 [batch, rows, num_heads, 1]; empty: nobody asks

  void write(std::int64_t batch, std::int64_t row, std::int64_t head, const float* out) const;
};

}  // namespace annulus
