#include "tensors.h"

#include <algorithm>
#include <new>

#include "failure.h"

namespace annulus::tools {
namespace {

constexpr std::align_val_t kAlignment{64};  // a cache line, the widest vector

}  // namespace

Layout file_layout(Layout layout, Role role) {
  return layout == Layout::kBhds && role == Role::kValueOrOut ? Layout::kBhsd : layout;
}

std::vector<std::int64_t> file_shape(const Shape& logical, Layout stored) {
  const auto& [b, s, h, d] = logical;
  if (stored == Layout::kBshd) return {b, s, h, d};
  if (stored == Layout::kBhsd) return {b, h, s, d};
  return {b, h, d, s};
}

Shape logical_shape(const std::vector<std::int64_t>& in_file, Layout stored) {
  const auto at = [&](std::size_t axis) { return in_file[axis]; };
  if (stored == Layout::kBshd) return {at(0), at(1), at(2), at(3)};
  if (stored == Layout::kBhsd) return {at(0), at(2), at(1), at(3)};
  return {at(0), at(3), at(1), at(2)};
}

TensorView dense_view(const void* data, DType dtype, const Shape& logical, Layout stored) {
  return {data, dtype, logical, dense_strides(logical, stored)};
}

TensorView lse_view(const void* data, const Shape& out) {
  const auto [b, s, h, d] = out;
  return {data, DType::kFloat32, {b, s, h, 1}, {h * s, 1, s, 1}};
}

std::int64_t checked_bytes(const std::string& name, const Shape& shape, DType dtype) {
  std::int64_t bytes = size_bytes(dtype);
  bool overflow = false;
  for (const std::int64_t extent : shape) {
    overflow |= extent != 0 && __builtin_mul_overflow(bytes, extent, &bytes);
  }
  if (overflow) {
    fail("ask for smaller extents", "{}: the size of shape {} does not fit 63 bits", name,
         to_string(shape));
  }
  return std::find(shape.begin(), shape.end(), 0) != shape.end() ? 0 : bytes;
}

Storage::Storage(std::int64_t bytes)
    : data_(static_cast<std::byte*>(
          ::operator new(static_cast<std::size_t>(std::max<std::int64_t>(bytes, 1)), kAlignment))),
      bytes_(bytes) {}

void Storage::Free::operator()(std::byte* memory) const { ::operator delete(memory, kAlignment); }

}  // namespace annulus::tools
