// Memory for kernels: 64-byte aligned (a cache line, a zmm vector), on huge pages where large, not
// initialised unless asked for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace annulus {

class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  // Throws OutOfMemory with the size.
  explicit AlignedBuffer(std::int64_t bytes);
  // All zero. Large ones are the kernel's own zero pages, made by whoever touches them first: the
  // gradients of 32 heads at 8K tokens are 400 MB, and all threads would wait for the one that
  // clears them.
  static AlignedBuffer zeros(std::int64_t bytes);

  [[nodiscard]] std::byte* data() const { return data_.get(); }
  [[nodiscard]] std::int64_t size_bytes() const { return bytes_; }
  template <class T>
  [[nodiscard]] T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  struct Free {
    std::size_t mapped;  // bytes; 0: from malloc
    Free() : Free(0) {}
    explicit Free(std::size_t bytes) : mapped(bytes) {}
    void operator()(std::byte* p) const;
  };
  std::unique_ptr<std::byte, Free> data_;
  std::int64_t bytes_ = 0;
};

constexpr std::int64_t round_up(std::int64_t n, std::int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
constexpr std::int64_t ceil_div(std::int64_t n, std::int64_t d) { return (n + d - 1) / d; }

}  // namespace annulus
