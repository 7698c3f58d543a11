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
// Sum of dout * out over a row of the view's dtype and stride, in double. 0 where out is all zeros:
// a row that sees nothing depends on nothing, whatever its dout holds.
float row_delta(const std::byte* dout, const TensorView& like, const float* out, std::int64_t n);

}  // namespace annulus
