#include "base/half.h"

#include <cassert>
#include <cstring>

namespace annulus {
namespace {

template <class T>
T load(const void* element) {
  T value;
  std::memcpy(&value, element, sizeof value);
  return value;
}

}  // namespace

double load_element(DType dtype, const void* element) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<double>(load<float>(element));
    case DType::kBFloat16:
      return static_cast<double>(bf16_to_float(load<std::uint16_t>(element)));
    case DType::kFloat16:
      return static_cast<double>(f16_to_float(load<std::uint16_t>(element)));
    case DType::kInt64:
      return static_cast<double>(load<std::int64_t>(element));
    case DType::kInt32:
      return load<std::int32_t>(element);
    case DType::kInt8:
      return load<std::int8_t>(element);
    case DType::kUInt8:
      return load<std::uint8_t>(element);
    case DType::kBool:
      return load<std::uint8_t>(element) != 0 ? 1 : 0;
  }
  return 0;
}

void store_element(DType dtype, void* element, double value) {
  const auto narrow = static_cast<float>(value);
  if (dtype == DType::kFloat32) {
    std::memcpy(element, &narrow, sizeof narrow);
    return;
  }
  assert(dtype == DType::kBFloat16 || dtype == DType::kFloat16);
  const std::uint16_t bits =
      dtype == DType::kBFloat16 ? float_to_bf16(narrow) : float_to_f16(narrow);
  std::memcpy(element, &bits, sizeof bits);
}

}  // namespace annulus
