#include "base/half.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <set>

namespace annulus {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A 16-bit format, described by what its definition says and nothing of its bits.
struct Format {
  const char* name;
  float (*widen)(std::uint16_t);
  std::uint16_t (*narrow)(float);
  int precision;        // bits of a significand, the leading one included
  int least_exponent;   // of the spacing of subnormal numbers
  double first_beyond;  // the power of two above the largest number
  std::uint16_t infinity;
};

const Format kFormats[] = {
    {"float16", f16_to_float, float_to_f16, 11, -24, 0x1p16, 0x7c00},
    {"bfloat16", bf16_to_float, float_to_bf16, 8, -133, 0x1p128, 0x7f80},
};

// The nearest number of the format, ties to even, in double precision.
double reference(const Format& format, double value) {
  if (!std::isfinite(value) || value == 0) return value;
  int exponent = 0;
  std::frexp(value, &exponent);
  const double spacing =
      std::ldexp(1.0, std::max(exponent - format.precision, format.least_exponent));
  const double rounded = std::nearbyint(value / spacing) * spacing;
  return std::abs(rounded) >= format.first_beyond
             ? std::copysign(std::numeric_limits<double>::infinity(), value)
             : rounded;
}

// Compares values and signs, so that zeros count too.
void expect_rounds(const Format& format, float value) {
  const double expected = reference(format, static_cast<double>(value));
  const auto found = static_cast<double>(format.widen(format.narrow(value)));
  ASSERT_EQ(found, expected) << format.name << " of " << std::hexfloat << value;
  ASSERT_EQ(std::signbit(found), std::signbit(expected)) << format.name << " of " << value;
}

TEST(Half, EveryBitPatternComesBack) {
  for (const Format& format : kFormats) {
    for (std::uint32_t u = 0; u < 0x10000; ++u) {
      const auto bits = static_cast<std::uint16_t>(u);
      const float value = format.widen(bits);
      if (std::isnan(value)) {
        ASSERT_TRUE(std::isnan(format.widen(format.narrow(value)))) << format.name << " " << u;
        ASSERT_EQ(format.narrow(value) & 0x8000U, u & 0x8000U) << format.name << " " << u;
      } else {
        ASSERT_EQ(format.narrow(value), bits) << format.name << " " << u;
      }
    }
  }
}

TEST(Half, NumbersRiseWithTheirBits) {
  for (const Format& format : kFormats) {
    EXPECT_EQ(format.widen(0), 0.0F);
    EXPECT_EQ(format.widen(1), std::ldexp(1.0F, format.least_exponent));
    EXPECT_EQ(format.widen(format.infinity), kInfinity);
    for (std::uint16_t bits = 0; bits < format.infinity; ++bits) {
      ASSERT_LT(format.widen(bits), format.widen(static_cast<std::uint16_t>(bits + 1)));
      ASSERT_EQ(format.widen(bits | 0x8000U), -format.widen(bits));
    }
  }
}

TEST(Half, RoundsToNearestEvenAroundEveryNumberAndMidpoint) {
  for (const Format& format : kFormats) {
    for (std::uint16_t bits = 0; bits < format.infinity; ++bits) {
      const auto low = static_cast<double>(format.widen(bits));
      const auto next = static_cast<std::uint16_t>(bits + 1);
      // Above the largest number the spacing goes on: from its midpoint on everything is infinite.
      const double high =
          next < format.infinity ? static_cast<double>(format.widen(next)) : format.first_beyond;
      for (const double point : {low, (low + high) / 2}) {
        const auto exact = static_cast<float>(point);
        ASSERT_EQ(static_cast<double>(exact), point);
        for (const float value :
             {std::nextafter(exact, -kInfinity), exact, std::nextafter(exact, kInfinity)}) {
          expect_rounds(format, value);
          expect_rounds(format, -value);
        }
      }
    }
  }
}

TEST(Half, RoundsAnyFloat) {
  std::mt19937 generator(1);
  for (const Format& format : kFormats) {
    for (int n = 0; n < 1000000; ++n) {
      const auto value = std::bit_cast<float>(static_cast<std::uint32_t>(generator()));
      if (!std::isnan(value)) expect_rounds(format, value);
    }
  }
}

TEST(Half, KeepsInfinityAndNaN) {
  for (const Format& format : kFormats) {
    EXPECT_EQ(format.narrow(kInfinity), format.infinity);
    EXPECT_EQ(format.narrow(-kInfinity), format.infinity | 0x8000U);
    EXPECT_EQ(format.narrow(std::numeric_limits<float>::max()), format.infinity);
    // A NaN whose payload lies in the bits that are cut off.
    for (const std::uint32_t bits : {0x7f800001U, 0xff800001U, 0x7fffffffU, 0x7fc00000U}) {
      EXPECT_TRUE(std::isnan(format.widen(format.narrow(std::bit_cast<float>(bits)))));
    }
  }
}

template <class T>
double load(DType dtype, T value) {
  EXPECT_EQ(static_cast<std::int64_t>(sizeof value), size_bytes(dtype));
  return load_element(dtype, &value);
}

TEST(Element, LoadsEveryType) {
  EXPECT_EQ(load(DType::kFloat32, -1.5F), -1.5);
  EXPECT_EQ(load(DType::kBFloat16, std::uint16_t{0xbfc0}), -1.5);
  EXPECT_EQ(load(DType::kFloat16, std::uint16_t{0xbe00}), -1.5);
  EXPECT_EQ(load(DType::kInt64, std::int64_t{-5000000000}), -5e9);
  EXPECT_EQ(load(DType::kInt32, std::int32_t{-7}), -7.0);
  EXPECT_EQ(load(DType::kInt8, std::int8_t{-128}), -128.0);
  EXPECT_EQ(load(DType::kUInt8, std::uint8_t{255}), 255.0);
  EXPECT_EQ(load(DType::kBool, std::uint8_t{255}), 1.0);
  EXPECT_EQ(load(DType::kBool, std::uint8_t{0}), 0.0);
}

TEST(Element, StoresByWayOfFloat) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    std::uint16_t elements[2] = {0xffff, 0xffff};
    store_element(dtype, elements, -1.5);
    EXPECT_EQ(load_element(dtype, elements), -1.5) << name(dtype);
    EXPECT_EQ(elements[1] == 0xffff, size_bytes(dtype) == 2) << name(dtype);
  }
  // A tie of float16 only after the first rounding: 1 + 2^-11 + 2^-40.
  std::uint16_t half = 0;
  store_element(DType::kFloat16, &half, 1 + 0x1p-11 + 0x1p-40);
  EXPECT_EQ(half, 0x3c00);
}

TEST(Tensor, NamesAndSizes) {
  EXPECT_EQ(name(DType::kFloat32), "float32");
  EXPECT_EQ(name(DType::kBFloat16), "bfloat16");
  EXPECT_EQ(name(DType::kFloat16), "float16");
  EXPECT_EQ(name(DType::kBool), "bool");
  EXPECT_EQ(to_string({2, 16, 4, 64}), "[2, 16, 4, 64]");
}

TEST(Tensor, DenseStridesReachEachElementOnce) {
  const std::array<std::int64_t, 4> shape{2, 3, 5, 7};
  for (const Layout layout : {Layout::kBshd, Layout::kBhsd, Layout::kBhds}) {
    const auto strides = dense_strides(shape, layout);
    std::set<std::int64_t> offsets;
    for (std::int64_t b = 0; b < shape[0]; ++b) {
      for (std::int64_t s = 0; s < shape[1]; ++s) {
        for (std::int64_t h = 0; h < shape[2]; ++h) {
          for (std::int64_t d = 0; d < shape[3]; ++d) {
            offsets.insert(b * strides[0] + s * strides[1] + h * strides[2] + d * strides[3]);
          }
        }
      }
    }
    EXPECT_EQ(offsets.size(), 2U * 3 * 5 * 7);
    EXPECT_EQ(*offsets.rbegin(), 2 * 3 * 5 * 7 - 1);
  }
  EXPECT_EQ(dense_strides(shape), row_major_strides(shape));
  EXPECT_EQ(dense_strides(shape, Layout::kBhsd), (std::array<std::int64_t, 4>{105, 7, 21, 1}));
  EXPECT_EQ(dense_strides(shape, Layout::kBhds), (std::array<std::int64_t, 4>{105, 1, 21, 3}));
}

}  // namespace
}  // namespace annulus
