#include "base/aligned_buffer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "annulus/error.h"

namespace annulus {
namespace {

constexpr std::int64_t kHuge = std::int64_t{4} << 20;  // from here on the kernel's own pages

TEST(AlignedBuffer, ZerosOfAnySize) {
  for (const std::int64_t bytes : {std::int64_t{0}, std::int64_t{1}, std::int64_t{100}, kHuge - 1,
                                   kHuge, kHuge + 1, 3 * kHuge + 77}) {
    for (int again = 0; again < 3; ++again) {  // memory that was used before
      const AlignedBuffer buffer = AlignedBuffer::zeros(bytes);
      ASSERT_EQ(buffer.size_bytes(), bytes);
      const auto* first = buffer.as<char>();
      ASSERT_EQ(reinterpret_cast<std::uintptr_t>(first) % 64, 0U);
      ASSERT_TRUE(std::all_of(first, first + bytes, [](char x) { return x == 0; })) << bytes;
      if (bytes > 0) std::memset(buffer.data(), 0x5a, static_cast<std::size_t>(bytes));
    }
  }
}

TEST(AlignedBuffer, OneTakesThePlaceOfAnother) {
  AlignedBuffer a = AlignedBuffer::zeros(kHuge), b(100);
  std::byte* const mapped = a.data();
  std::swap(a, b);
  EXPECT_EQ(b.data(), mapped);
  EXPECT_EQ(a.size_bytes(), 100);
  a = AlignedBuffer(kHuge), b = AlignedBuffer::zeros(10);
  std::memset(a.data(), 1, kHuge), std::memset(b.data(), 1, 10);
}

TEST(AlignedBuffer, TooMuchIsAnErrorWithTheSize) {
  EXPECT_THROW((void)AlignedBuffer::zeros(std::int64_t{1} << 60), OutOfMemory);
  for (const std::int64_t bytes : {std::int64_t{-1}, std::numeric_limits<std::int64_t>::max()}) {
    EXPECT_THROW((void)AlignedBuffer::zeros(bytes), OutOfMemory) << bytes;
    EXPECT_THROW((void)AlignedBuffer(bytes), OutOfMemory) << bytes;
  }
}

}  // namespace
}  // namespace annulus
