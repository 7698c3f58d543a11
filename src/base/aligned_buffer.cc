#include "base/aligned_buffer.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <limits>

#include "base/fail.h"

namespace annulus {
namespace {

constexpr std::int64_t kCacheLine = 64;
constexpr std::int64_t kHugePage = std::int64_t{2} << 20;
// Below two huge pages, aligning to one may cost as much address space as the buffer has.
constexpr std::int64_t kHugeFrom = 2 * kHugePage;

[[noreturn]] void fail_allocation(std::int64_t bytes) {
  fail_with_fix<OutOfMemory>(
      "use fewer tokens or heads per call, more ranks, or raise the memory limit", "allocate",
      bytes, " bytes (", bytes >> 20, " MiB) of working memory are not available");
}

std::size_t checked_size(std::int64_t bytes) {
  if (bytes < 0 || bytes > std::numeric_limits<std::int64_t>::max() - kHugePage)
    fail_allocation(bytes);
  return static_cast<std::size_t>(round_up(bytes, kCacheLine));
}

// A wish: kernels without huge pages refuse it and nothing is lost. Whole huge pages only, so that
// the peak stays the bytes that were asked for.
void wish_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] std::int64_t bytes) {
#ifdef MADV_HUGEPAGE
  if (bytes >= kHugeFrom) {
    static_cast<void>(
        madvise(memory, static_cast<std::size_t>(bytes / kHugePage * kHugePage), MADV_HUGEPAGE));
  }
#endif
}

}  // namespace

AlignedBuffer::AlignedBuffer(std::int64_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  const std::size_t size = checked_size(bytes);
  const std::int64_t alignment = bytes >= kHugeFrom ? kHugePage : kCacheLine;
  void* memory = nullptr;
  if (posix_memalign(&memory, static_cast<std::size_t>(alignment), size) != 0)
    fail_allocation(bytes);
  data_.reset(static_cast<std::byte*>(memory));
  wish_huge_pages(memory, bytes);
}

AlignedBuffer AlignedBuffer::zeros(std::int64_t bytes) {
  if (bytes < kHugeFrom) {
    AlignedBuffer buffer(bytes);
    if (bytes > 0) std::memset(buffer.data(), 0, static_cast<std::size_t>(bytes));
    return buffer;
  }
  const std::size_t size = checked_size(bytes), whole = size + kHugePage;
  void* memory = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) fail_allocation(bytes);
  auto* first = static_cast<std::byte*>(memory);
  const std::size_t before = -reinterpret_cast<std::uintptr_t>(first) % kHugePage;
  AlignedBuffer buffer;
  buffer.bytes_ = bytes;
  buffer.data_ = {first + before, Free{whole - before}};
  if (before > 0) munmap(first, before);
  wish_huge_pages(first + before, bytes);
  return buffer;
}

void AlignedBuffer::Free::operator()(std::byte* p) const {
  if (mapped > 0) {
    munmap(p, mapped);
  } else {
    std::free(p);
  }
}

}  // namespace annulus
