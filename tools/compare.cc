#include "compare.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>

#include "numbers.h"
#include "text.h"

namespace annulus::tools {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr std::int64_t kFarApart = std::numeric_limits<std::int64_t>::max();

// How one file dtype is read, and how fine it is: of two, the one with fewer digits sets the ulp.
struct Format {
  std::int64_t bytes;
  int digits;  // of the significand
  double (*number)(const std::byte*);
  std::int64_t (*rank)(double);  // place among all numbers of the dtype, in order
};

std::int64_t float_rank(float value) {
  const auto bits = std::bit_cast<std::int32_t>(value);
  return bits < 0 ? std::numeric_limits<std::int32_t>::min() - std::int64_t{bits}
                  : std::int64_t{bits};
}

std::int64_t half_rank(std::uint16_t bits) {
  return (bits & 0x8000U) != 0 ? -static_cast<std::int64_t>(bits & 0x7fffU)
                               : static_cast<std::int64_t>(bits);
}

std::int64_t double_rank(double value) {
  const auto bits = std::bit_cast<std::int64_t>(value);
  return bits < 0 ? std::numeric_limits<std::int64_t>::min() - bits : bits;
}

template <DType kDType>
double number_of(const std::byte* from) {
  return number_at(from, kDType);
}

const Format* format_of(const std::string& file_dtype) {
  static const std::map<std::string, Format> formats = {
      {"BF16",
       {2, 8, number_of<DType::kBFloat16>,
        [](double x) { return half_rank(to_bfloat16(static_cast<float>(x))); }}},
      {"F16",
       {2, 11, number_of<DType::kFloat16>,
        [](double x) { return half_rank(to_float16(static_cast<float>(x))); }}},
      {"F32",
       {4, 24, number_of<DType::kFloat32>,
        [](double x) { return float_rank(static_cast<float>(x)); }}},
      {"F64", {8, 53, [](const std::byte* from) { return load<double>(from); }, double_rank}},
      {"I32",
       {4, 64, number_of<DType::kInt32>, [](double x) { return static_cast<std::int64_t>(x); }}},
      {"I8",
       {1, 64, number_of<DType::kInt8>, [](double x) { return static_cast<std::int64_t>(x); }}},
      {"U8",
       {1, 64, number_of<DType::kUInt8>, [](double x) { return static_cast<std::int64_t>(x); }}},
      {"BOOL",
       {1, 64, number_of<DType::kBool>, [](double x) { return static_cast<std::int64_t>(x); }}},
  };
  const auto found = formats.find(file_dtype);
  return found == formats.end() ? nullptr : &found->second;
}

std::int64_t ulp_distance(const Format& format, double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return kFarApart;
  const std::int64_t rank_a = format.rank(a), rank_b = format.rank(b);
  std::int64_t distance = 0;
  if (__builtin_sub_overflow(std::max(rank_a, rank_b), std::min(rank_a, rank_b), &distance))
    return kFarApart;
  return distance;
}

std::vector<std::int64_t> index_of(std::int64_t flat, const std::vector<std::int64_t>& shape) {
  std::vector<std::int64_t> index(shape.size());
  for (std::size_t axis = shape.size(); axis-- > 0;) {
    index[axis] = flat % shape[axis];
    flat /= shape[axis];
  }
  return index;
}

void compare_numbers(Comparison& result, const NamedTensor& a, const NamedTensor& b,
                     const Format& format_a, const Format& format_b, const Tolerances& tolerances) {
  const Format& coarser = format_a.digits <= format_b.digits ? format_a : format_b;
  std::int64_t worst = -1;
  double squares = 0;
  for (std::int64_t i = 0; i < result.elements; ++i) {
    const double x = format_a.number(a.data + i * format_a.bytes),
                 y = format_b.number(b.data + i * format_b.bytes);
    if (x == y || (std::isnan(x) && std::isnan(y))) continue;
    ++result.differing;
    const double difference = std::abs(x - y);
    const double error = std::isnan(difference) ? kInfinity : difference;
    const std::int64_t ulp = ulp_distance(coarser, x, y);
    squares += error * error;
    result.max_ulp = std::max(result.max_ulp, ulp);
    if (error > tolerances.absolute && ulp > tolerances.ulp) ++result.outside;
    if (worst >= 0 && !(error > result.max_abs_err)) continue;
    worst = i, result.max_abs_err = error, result.worst_a = x, result.worst_b = y;
  }
  if (worst >= 0) result.worst = index_of(worst, a.shape);
  if (result.elements > 0)
    result.rms_err = std::sqrt(squares / static_cast<double>(result.elements));
}

// For dtypes that have no numbers here, and for 64-bit integers, which double precision would
// round: equal bytes or not.
void compare_bytes(Comparison& result, const NamedTensor& a, const NamedTensor& b) {
  if (result.elements == 0) return;
  const std::int64_t size = a.bytes / result.elements;
  for (std::int64_t i = 0; i < result.elements; ++i) {
    if (std::memcmp(a.data + i * size, b.data + i * size, static_cast<std::size_t>(size)) == 0)
      continue;
    if (result.differing++ == 0) result.worst = index_of(i, a.shape);
  }
  result.outside = result.differing;
  if (result.differing > 0) result.max_abs_err = result.rms_err = kInfinity;
}

void judge(Comparison& result, const Tolerances& tolerances) {
  if (result.outside > 0) {
    result.reason =
        fmt::format("{} of {} elements beyond the tolerance", result.outside, result.elements);
  } else if (tolerances.rms >= 0 && !(result.rms_err <= tolerances.rms)) {
    result.reason = fmt::format("rms beyond {:g}", tolerances.rms);
  }
  result.passed = result.reason.empty();
}

std::string verdict_of(const Comparison& comparison) {
  if (!comparison.passed) return "DIFFERS: " + comparison.reason;
  return comparison.differing == 0 ? "equal" : "within tolerance";
}

}  // namespace

Comparison compare(const std::string& name, const NamedTensor* a, const NamedTensor* b,
                   const Tolerances& tolerances) {
  Comparison result;
  result.name = name;
  if (a != nullptr) result.dtype_a = a->file_dtype, result.shape_a = a->shape;
  if (b != nullptr) result.dtype_b = b->file_dtype, result.shape_b = b->shape;
  const Format* format_a = a == nullptr ? nullptr : format_of(a->file_dtype);
  const Format* format_b = b == nullptr ? nullptr : format_of(b->file_dtype);
  if (a == nullptr || b == nullptr) {
    result.reason = a == nullptr ? "missing in A" : "missing in B";
  } else if (a->shape != b->shape) {
    result.reason = "shapes differ";
  } else if (a->file_dtype != b->file_dtype && !tolerances.any_dtype) {
    result.reason = "dtypes differ";
  } else if (a->file_dtype != b->file_dtype && (format_a == nullptr || format_b == nullptr)) {
    result.reason = "dtypes cannot be compared";
  }
  result.passed = result.reason.empty();
  if (!result.passed || a == nullptr || b == nullptr) return result;
  result.elements = 1;
  for (const std::int64_t extent : a->shape) result.elements *= extent;
  if (format_a != nullptr && format_b != nullptr) {
    compare_numbers(result, *a, *b, *format_a, *format_b, tolerances);
  } else {
    compare_bytes(result, *a, *b);
  }
  judge(result, tolerances);
  return result;
}

Json comparison_json(const Comparison& c) {
  Json object{{"name", c.name},
              {"dtype_a", c.dtype_a},
              {"dtype_b", c.dtype_b},
              {"shape_a", c.shape_a},
              {"shape_b", c.shape_b},
              {"elements", c.elements},
              {"differing", c.differing},
              {"outside", c.outside},
              {"max_abs_err", number_or_null(c.max_abs_err)},
              {"rms_err", number_or_null(c.rms_err)},
              {"max_ulp", c.max_ulp}};
  object["worst_index"] = c.worst.empty() ? Json(nullptr) : Json(c.worst);
  object["a"] = c.worst.empty() ? Json(nullptr) : number_or_null(c.worst_a);
  object["b"] = c.worst.empty() ? Json(nullptr) : number_or_null(c.worst_b);
  object["passed"] = c.passed;
  object["reason"] = c.reason;
  return object;
}

std::string comparison_table(const std::vector<Comparison>& comparisons) {
  Table table({"tensor", "dtype", "shape", "differing", "max", "rms", "ulp", "worst at", "A", "B",
               "verdict"});
  for (const Comparison& c : comparisons) {
    const bool same_dtype = c.dtype_a == c.dtype_b || c.dtype_b.empty();
    const std::string dtype = same_dtype ? c.dtype_a : c.dtype_a + "/" + c.dtype_b;
    const std::string shape = c.shape_a == c.shape_b || c.dtype_b.empty() ? shape_text(c.shape_a)
                              : c.dtype_a.empty()
                                  ? shape_text(c.shape_b)
                                  : shape_text(c.shape_a) + "/" + shape_text(c.shape_b);
    const bool worst = !c.worst.empty();
    table.add({c.name, dtype, shape, grouped(c.differing), fmt::format("{:.3g}", c.max_abs_err),
               fmt::format("{:.3g}", c.rms_err), c.max_ulp == kFarApart ? "-" : grouped(c.max_ulp),
               worst ? shape_text(c.worst) : "", worst ? fmt::format("{:.6g}", c.worst_a) : "",
               worst ? fmt::format("{:.6g}", c.worst_b) : "", verdict_of(c)});
  }
  return table.text();
}

}  // namespace annulus::tools
