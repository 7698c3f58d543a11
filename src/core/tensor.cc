#include "annulus/tensor.h"

namespace annulus {
inline namespace v1 {

std::int64_t size_bytes(DType dtype) {
  switch (dtype) {
    case DType::kInt64:
      return 8;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kInt8:
    case DType::kUInt8:
    case DType::kBool:
      return 1;
  }
  return 0;
}

std::string_view name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
    case DType::kInt64:
      return "int64";
    case DType::kInt32:
      return "int32";
    case DType::kInt8:
      return "int8";
    case DType::kUInt8:
      return "uint8";
    case DType::kBool:
      return "bool";
  }
  return "unknown";
}

std::array<std::int64_t, 4> dense_strides(const std::array<std::int64_t, 4>& shape, Layout layout) {
  const auto [batch, seq, heads, dim] = shape;
  switch (layout) {
    case Layout::kBshd:
      return {seq * heads * dim, heads * dim, dim, 1};
    case Layout::kBhsd:
      return {heads * seq * dim, dim, seq * dim, 1};
    case Layout::kBhds:
      return {heads * dim * seq, 1, dim * seq, seq};
  }
  return {};
}

std::array<std::int64_t, 4> row_major_strides(const std::array<std::int64_t, 4>& shape) {
  return {shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1};
}

std::string to_string(const std::array<std::int64_t, 4>& shape) {
  std::string text = "[";
  for (const std::int64_t extent : shape) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(extent);
  }
  return text + "]";
}

}  // namespace v1
}  // namespace annulus
