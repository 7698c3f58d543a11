#include "base/aligned_buffer.h"

#include <sys/mman.h>

#include <cstdlib>
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

}  // namespace

AlignedBuffer::AlignedBuffer(std::int64_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  if (bytes < 0 || bytes > std::numeric_limits<std::int64_t>::max() - kHugePage)
    fail_allocation(bytes);
  const std::int64_t alignment = bytes >= kHugeFrom ? kHugePage : kCacheLine;
  const auto size = static_cast<std::size_t>(round_up(bytes, kCacheLine));
  void* memory = nullptr;
  if (posix_memalign(&memory, static_cast<std::size_t>(alignment), size) != 0)
    fail_allocation(bytes);
  data_.reset(static_cast<std::byte*>(memory));
#ifdef MADV_HUGEPAGE
  // A wish: kernels without huge pages refuse it and nothing is lost. Whole huge pages only, so
  // that the peak stays the bytes that were asked for.
  if (bytes >= kHugeFrom) {
    static_cast<void>(
        madvise(memory, static_cast<std::size_t>(bytes / kHugePage * kHugePage), MADV_HUGEPAGE));
  }
#endif
}

void AlignedBuffer::Free::operator()(std::byte* p) const { std::free(p); }

}  // namespace annulus
