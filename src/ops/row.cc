#include "ops/row.h"

#include <algorithm>
#include <cstring>

#include "base/half.h"

namespace annulus {

void store_row(DType dtype, std::byte* out, std::int64_t stride_bytes, const float* row,
               std::int64_t n) {
  if (dtype == DType::kFloat32 && stride_bytes == 4) {
    std::memcpy(out, row, static_cast<std::size_t>(n) * 4);
  } else if (dtype == DType::kBFloat16) {
    for (std::int64_t x = 0; x < n; ++x) {
      const std::uint16_t bits = float_to_bf16(row[x]);
      std::memcpy(out + x * stride_bytes, &bits, 2);
    }
  } else {
    for (std::int64_t x = 0; x < n; ++x)
      store_element(dtype, out + x * stride_bytes, static_cast<double>(row[x]));
  }
}

void load_row(DType dtype, const std::byte* in, std::int64_t stride_bytes, float* row,
              std::int64_t n) {
  if (dtype == DType::kFloat32 && stride_bytes == 4) {
    std::memcpy(row, in, static_cast<std::size_t>(n) * 4);
  } else if (dtype == DType::kBFloat16) {
    for (std::int64_t x = 0; x < n; ++x) {
      std::uint16_t bits = 0;
      std::memcpy(&bits, in + x * stride_bytes, 2);
      row[x] = bf16_to_float(bits);
    }
  } else {
    for (std::int64_t x = 0; x < n; ++x)
      row[x] = static_cast<float>(load_element(dtype, in + x * stride_bytes));
  }
}

namespace {

double product(const std::byte* dout, const TensorView& like, const float* out) {
  const std::int64_t n = like.shape[3];
  if (std::all_of(out, out + n, [](float x) { return x == 0; })) return 0;
  constexpr std::int64_t kPiece = 64;
  const std::int64_t stride = like.strides[3] * size_bytes(like.dtype);
  double sums[8] = {};  // the latency of an addition
  for (std::int64_t x = 0; x < n; x += kPiece) {
    float piece[kPiece] = {};
    const std::int64_t count = std::min(kPiece, n - x);
    load_row(like.dtype, dout + x * stride, stride, piece, count);
    for (std::int64_t i = 0; i < count; ++i)
      sums[i % 8] += static_cast<double>(piece[i]) * static_cast<double>(out[x + i]);
  }
  for (int i = 1; i < 8; ++i) sums[0] += sums[i];
  return sums[0];
}

}  // namespace

void RowDeltas::write(std::int64_t batch, std::int64_t row, std::int64_t head,
                      const float* out) const {
  double value = product(dout.at(batch, row, head, 0), dout, out);
  if (dlse) value -= load_element(DType::kFloat32, dlse.at(batch, row, head, 0));
  const auto rounded = static_cast<float>(value);
  std::memcpy(delta.at(batch, row, head, 0), &rounded, 4);
}

}  // namespace annulus
