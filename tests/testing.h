// Tensors and calls for the tests of operations: hard inputs, every layout, judged by the numeric
// bars.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "annulus/attention.h"
#include "annulus/bars.h"
#include "annulus/ring.h"
#include "annulus/targets.h"
#include "base/half.h"

namespace annulus::testing {

// Under a sanitizer, rows that the oracle recomputes are divided by this: it is what takes the
// time.
#ifdef ANNULUS_TEST_SCALE
constexpr std::int64_t kTestScale = ANNULUS_TEST_SCALE;
#else
constexpr std::int64_t kTestScale = 1;
#endif

// A dense tensor that owns its memory.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, std::array<std::int64_t, 4> shape, Layout layout = Layout::kBshd)
      : dtype_(dtype),
        shape_(shape),
        strides_(dense_strides(shape, layout)),
        data_(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3] *
                                       size_bytes(dtype)) +
              64) {}

  [[nodiscard]] TensorView view() const { return {data_.data(), dtype_, shape_, strides_}; }
  [[nodiscard]] MutableTensorView mutable_view() {
    return {data_.data(), dtype_, shape_, strides_};
  }
  operator TensorView() const { return view(); }  // NOLINT: reads as a view everywhere
  [[nodiscard]] std::array<std::int64_t, 4> shape() const { return shape_; }
  [[nodiscard]] const std::vector<std::byte>& bytes() const { return data_; }
  [[nodiscard]] double get(std::int64_t a, std::int64_t b, std::int64_t c, std::int64_t d) const {
    return load_element(dtype_, view().at(a, b, c, d));
  }
  void set(std::int64_t a, std::int64_t b, std::int64_t c, std::int64_t d, double value) {
    std::byte* at = mutable_view().at(a, b, c, d);
    if (dtype_ == DType::kInt32) {
      const auto number = static_cast<std::int32_t>(value);
      std::memcpy(at, &number, 4);
    } else if (dtype_ == DType::kInt64) {
      const auto number = static_cast<std::int64_t>(value);
      std::memcpy(at, &number, 8);
    } else if (dtype_ == DType::kUInt8 || dtype_ == DType::kBool) {
      *at = static_cast<std::byte>(value != 0);
    } else {
      store_element(dtype_, at, value);
    }
  }
  Tensor& fill(
      const std::function<double(std::int64_t, std::int64_t, std::int64_t, std::int64_t)>& value) {
    for (std::int64_t a = 0; a < shape_[0]; ++a)
      for (std::int64_t b = 0; b < shape_[1]; ++b)
        for (std::int64_t c = 0; c < shape_[2]; ++c)
          for (std::int64_t d = 0; d < shape_[3]; ++d) set(a, b, c, d, value(a, b, c, d));
    return *this;
  }
  // N(0, 1); with outliers, N(0, 10) is added with probability 0.001.
  Tensor& normal(unsigned seed, bool outliers = false) {
    std::mt19937 generator(seed);
    std::normal_distribution<double> gauss;
    std::uniform_real_distribution<double> uniform;
    return fill([&](auto...) {
      return gauss(generator) +
             (outliers && uniform(generator) < 0.001 ? 10 * gauss(generator) : 0);
    });
  }

 private:
  DType dtype_ = DType::kFloat32;
  std::array<std::int64_t, 4> shape_{};
  std::array<std::int64_t, 4> strides_{};
  std::vector<std::byte> data_;
};

struct Shape {
  std::int64_t batch = 1, q_len = 64, kv_len = 64, heads = 1, kv_heads = 1, head_dim = 64,
               v_head_dim = 64;
};

struct Inputs {
  Tensor q, k, v, out, lse;
  Inputs(DType dtype, const Shape& s, unsigned seed = 1, bool outliers = false,
         Layout layout = Layout::kBshd)
      : q(dtype, {s.batch, s.q_len, s.heads, s.head_dim}, layout),
        k(dtype, {s.batch, s.kv_len, s.kv_heads, s.head_dim}, layout),
        v(dtype, {s.batch, s.kv_len, s.kv_heads, s.v_head_dim}, layout),
        out(dtype, {s.batch, s.q_len, s.heads, s.v_head_dim}, layout),
        lse(DType::kFloat32, {s.batch, s.q_len, s.heads, 1}) {
    q.normal(seed, outliers), k.normal(seed + 1, outliers), v.normal(seed + 2, outliers);
    out.fill([](auto...) { return 77; }), lse.fill([](auto...) { return 77; });
  }
};

// Runs `workers` ranks (1: attention()) and judges every row, or `rows` sampled rows per head.
inline reference::CheckResult run_and_check(Inputs& in, const RingOptions& options, int workers,
                                            std::int64_t rows = 0) {
  bool bf16_probabilities = false;
  if (workers == 1 && !options.kv_partition && options.partition.name() == "contiguous") {
    bf16_probabilities =
        attention(in.q, in.k, in.v, in.out.mutable_view(), in.lse.mutable_view(), options.attention)
            .bf16_probabilities;
  } else {
    bf16_probabilities = ring_attention(workers, in.q, in.k, in.v, in.out.mutable_view(),
                                        in.lse.mutable_view(), options)
                             .front()
                             .bf16_probabilities;
  }
  return reference::check_attention(in.q, in.k, in.v, options.attention, in.out, in.lse,
                                    bf16_probabilities, rows);
}

// What the error says that body must throw.
template <class E, class Body>
std::string message_of(Body body) {
  try {
    body();
  } catch (const E& error) {
    return error.what();
  }
  return "no such error";
}

// Names of the targets that run inputs of this dtype here, the AMX kernel on simulated tiles
// included.
inline std::vector<std::string> targets_for(DType dtype) {
  std::vector<std::string> names;
  for (const Target& target : targets()) {
    const bool bf16_only = target.name == "avx512_bf16" || target.name == "amx";
    if (target.available && (!bf16_only || dtype == DType::kBFloat16)) names.push_back(target.name);
  }
  const bool avx512 = std::find(names.begin(), names.end(), "avx512") != names.end();
  if (avx512 && dtype == DType::kBFloat16) names.emplace_back("amx_simulated");
  return names;
}

}  // namespace annulus::testing
