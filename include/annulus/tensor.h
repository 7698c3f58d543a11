// Strided views of tensors. Annulus owns no tensor of the caller's: it reads and writes through
// these views, so every layout is a choice of strides and nothing is copied to change one.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

namespace annulus {
inline namespace v1 {

enum class DType : std::uint8_t {
  kFloat32,
  kBFloat16,
  kFloat16,
  kInt64,
  kInt32,
  kInt8,
  kUInt8,
  kBool
};

std::int64_t size_bytes(DType dtype);
std::string_view name(DType dtype);  // "float32", "bfloat16", ...

// Four logical axes; axes a tensor does not have are 1 long. Strides count elements and may be zero
// (broadcast) in inputs. The meaning of the axes:
//
//   q, k, v, out                [batch, seq, heads, dim]
//   lse                         [batch, seq, heads, 1]
//   segment ids                 [batch, seq, 1, 1]
//   bias, attention_mask        [batch or 1, heads or 1, q_len, kv_len]
//   softmax_aux                 [heads or 1 or n, n or 1, 1, 1]     see AttentionOptions
struct TensorView {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::array<std::int64_t, 4> shape{};
  std::array<std::int64_t, 4> strides{};

  [[nodiscard]] explicit operator bool() const { return data != nullptr; }
  [[nodiscard]] const std::byte* at(std::int64_t a, std::int64_t b, std::int64_t c,
                                    std::int64_t d) const {
    return static_cast<const std::byte*>(data) +
           (a * strides[0] + b * strides[1] + c * strides[2] + d * strides[3]) * size_bytes(dtype);
  }
};

// The same for tensors that a call writes.
struct MutableTensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::array<std::int64_t, 4> shape{};
  std::array<std::int64_t, 4> strides{};

  [[nodiscard]] explicit operator bool() const { return data != nullptr; }
  [[nodiscard]] std::byte* at(std::int64_t a, std::int64_t b, std::int64_t c,
                              std::int64_t d) const {
    return static_cast<std::byte*>(data) +
           (a * strides[0] + b * strides[1] + c * strides[2] + d * strides[3]) * size_bytes(dtype);
  }
  // A view to write is a view to read.
  // NOLINTNEXTLINE(google-explicit-constructor)
  [[nodiscard]] operator TensorView() const { return {data, dtype, shape, strides}; }
};

// Memory order of a dense q, k, v or out, outermost axis first; b batch, s seq, h heads, d dim.
enum class Layout : std::uint8_t { kBshd, kBhsd, kBhds };

// Strides of a dense tensor with logical shape [batch, seq, heads, dim] stored in `layout`.
std::array<std::int64_t, 4> dense_strides(const std::array<std::int64_t, 4>& shape,
                                          Layout layout = Layout::kBshd);

// Row-major strides, the last axis fastest, whatever the axes mean.
std::array<std::int64_t, 4> row_major_strides(const std::array<std::int64_t, 4>& shape);

// "[2, 16, 4, 64]"
std::string to_string(const std::array<std::int64_t, 4>& shape);

}  // namespace v1
}  // namespace annulus
