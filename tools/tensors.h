// Tensors that the program owns, and their logical views in the layouts of files.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "annulus/safetensors.h"
#include "annulus/tensor.h"

namespace annulus::tools {

using Shape = std::array<std::int64_t, 4>;  // logical [batch, seq, heads, dim]

// Which tensors `bhds` stores with the sequence last.
enum class Role : std::uint8_t { kQueryOrKey, kValueOrOut };

// The order of axes in a file: bhds is for q and k, their partners then are bhsd.
Layout file_layout(Layout layout, Role role);
std::vector<std::int64_t> file_shape(const Shape& logical, Layout stored);
Shape logical_shape(const std::vector<std::int64_t>& in_file, Layout stored);

// The view of dense data; `data` may be null for a plan.
TensorView dense_view(const void* data, DType dtype, const Shape& logical, Layout stored);
// lse [batch, heads, seq] in memory, [batch, seq, heads, 1] by its axes.
TensorView lse_view(const void* data, const Shape& out);

// Bytes of a tensor. Throws InvalidArgument where 63 bits do not hold the number.
std::int64_t checked_bytes(const std::string& name, const Shape& shape, DType dtype);

// Uninitialised dense memory, aligned for every kernel. Never null, so that empty tensors are
// given, too.
class Storage {
 public:
  Storage() = default;
  explicit Storage(std::int64_t bytes);
  [[nodiscard]] std::byte* data() const { return data_.get(); }
  [[nodiscard]] std::int64_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(std::byte* memory) const;
  };
  std::unique_ptr<std::byte, Free> data_;
  std::int64_t bytes_ = 0;
};

}  // namespace annulus::tools
