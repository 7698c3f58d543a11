#include "ops/row.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <type_traits>

#include "base/half.h"

namespace annulus {

namespace {

// Elements lie stride_bytes apart; dense ones have a loop of their own, which becomes vector code.
template <class Stored, class Loop>
void with_stride(std::int64_t stride_bytes, Loop loop) {
  constexpr std::integral_constant<std::int64_t, sizeof(Stored)> kDense;
  stride_bytes == kDense ? loop(kDense) : loop(stride_bytes);
}

template <class Stored, auto kNarrow>
void store_each(std::byte* out, std::int64_t stride_bytes, const float* row, std::int64_t n) {
  with_stride<Stored>(stride_bytes, [=](auto stride) {
    for (std::int64_t x = 0; x < n; ++x) {
      const Stored element = kNarrow(row[x]);
      std::memcpy(out + x * stride, &element, sizeof element);
    }
  });
}

template <class Stored, auto kWiden>
void load_each(const std::byte* in, std::int64_t stride_bytes, float* row, std::int64_t n) {
  with_stride<Stored>(stride_bytes, [=](auto stride) {
    for (std::int64_t x = 0; x < n; ++x) {
      Stored element;
      std::memcpy(&element, in + x * stride, sizeof element);
      row[x] = kWiden(element);
    }
  });
}

float same(float x) { return x; }

}  // namespace

void store_row(DType dtype, std::byte* out, std::int64_t stride_bytes, const float* row,
               std::int64_t n) {
  switch (dtype) {
    case DType::kBFloat16:
      return store_each<std::uint16_t, float_to_bf16>(out, stride_bytes, row, n);
    case DType::kFloat16:
      return store_each<std::uint16_t, float_to_f16>(out, stride_bytes, row, n);
    default:
      assert(dtype == DType::kFloat32);
      return store_each<float, same>(out, stride_bytes, row, n);
  }
}

void load_row(DType dtype, const std::byte* in, std::int64_t stride_bytes, float* row,
              std::int64_t n) {
  switch (dtype) {
    case DType::kBFloat16:
      return load_each<std::uint16_t, bf16_to_float>(in, stride_bytes, row, n);
    case DType::kFloat16:
      return load_each<std::uint16_t, f16_to_float>(in, stride_bytes, row, n);
    default:
      assert(dtype == DType::kFloat32);
      return load_each<float, same>(in, stride_bytes, row, n);
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
