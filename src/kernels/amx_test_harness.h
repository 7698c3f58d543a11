// Drives a bf16 kernel through its table, as an operation would, and compares it with attention in
// double precision.
#pragma once

#include <cpuid.h>
#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "kernels/kernel_table.h"

namespace annulus::amx_test {

inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

inline std::uint16_t to_bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float to_float(std::uint16_t x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
// Of numbers that float16 holds exactly, not below its least normal one.
inline std::uint16_t to_half(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const std::uint32_t sign = bits >> 16 & 0x8000;
  return static_cast<std::uint16_t>(x == 0 ? sign : sign | ((bits >> 13 & 0x3ffff) - (112U << 10)));
}
inline float rounded(float x) { return to_float(to_bf16(x)); }

// 64-byte aligned, filled with NaN, and with a fence behind that shows writes beyond the end.
class Memory {
 public:
  explicit Memory(std::int64_t bytes)
      : bytes_(bytes), data_(static_cast<char*>(std::aligned_alloc(64, (bytes + 127) / 64 * 64))) {
    std::memset(data_.get(), 0xff, (bytes + 127) / 64 * 64);
  }
  ~Memory() {
    if (data_ == nullptr) return;
    for (std::int64_t i = bytes_; i < (bytes_ + 127) / 64 * 64; ++i)
      EXPECT_EQ(data_.get()[i], '\xff') << "behind the end";
  }
  Memory(Memory&&) = default;
  char* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::int64_t bytes_;
  std::unique_ptr<char, Free> data_;
};

struct Problem {
  Dims dims{64, 64};
  std::int64_t keys = 100, rows = 32;  // rows: of queries; strips are filled up
  ScoreRule rule{.scale = 0.125F, .cap = 0, .bias = false, .keep_scale = 1, .dropout = false};
  std::vector<float> q, k, v, bias, sinks;  // [rows][head_dim], ..., [rows][keys], [rows]
  std::vector<char> visible;                // [rows][keys]
  std::vector<char> kept;                   // likewise, with dropout
  Element element = Element::kBFloat16;
  std::int64_t dim_step = 1;
  std::int64_t panel_steps = 0;  // of a panel; 0: the kernel's choice
  bool all_partial = false;      // give full tiles as partial ones too
  bool is_large_sample = false;  // of normal data: the bars for a whole cell hold

  std::int64_t strips() const { return (rows + 31) / 32; }
  bool sees(std::int64_t row, std::int64_t key) const { return visible[row * keys + key] != 0; }
  bool keeps(std::int64_t row, std::int64_t key) const {
    return !rule.dropout || kept[row * keys + key] != 0;
  }
};

inline Problem normal_problem(Dims dims, std::int64_t keys, std::int64_t rows, unsigned seed = 1) {
  Problem p;
  p.dims = dims, p.keys = keys, p.rows = rows;
  p.rule.scale = 1 / std::sqrt(static_cast<float>(dims.head_dim));
  std::mt19937 gen(seed);
  std::normal_distribution<float> normal;
  p.q.resize(rows * dims.head_dim), p.k.resize(keys * dims.head_dim),
      p.v.resize(keys * dims.v_head_dim);
  for (auto* x : {&p.q, &p.k, &p.v})
    std::generate(x->begin(), x->end(), [&] { return rounded(normal(gen)); });
  p.sinks.assign(rows, -kInf);
  p.visible.assign(rows * keys, 1);
  return p;
}

// Every q is one, so that score j is `score(j)` in natural units, if d is a power of 4 and the
// score a bf16 number.
inline Problem score_problem(std::int64_t keys, const std::function<float(std::int64_t)>& score,
                             std::int64_t dim = 64) {
  Problem p = normal_problem({dim, dim}, keys, 40, 7);
  std::fill(p.q.begin(), p.q.end(), 1.0F);
  for (std::int64_t j = 0; j < keys; ++j) {
    const float each = rounded(score(j) / std::sqrt(static_cast<float>(dim)));
    std::fill_n(p.k.begin() + j * dim, dim, each);
  }
  return p;
}

inline bool has_amx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  constexpr unsigned kTilesAndBf16 = 1U << 24 | 1U << 22;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  return (d & kTilesAndBf16) == kTilesAndBf16 &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Visible sets that give full, partial and empty tiles in all orders.
inline void mask_causal(Problem& p, std::int64_t shift) {
  for (std::int64_t i = 0; i < p.rows; ++i) {
    for (std::int64_t j = 0; j < p.keys; ++j) p.visible[i * p.keys + j] = j <= i + shift;
  }
}
inline void mask_window(Problem& p, std::int64_t shift, std::int64_t width) {
  for (std::int64_t i = 0; i < p.rows; ++i) {
    for (std::int64_t j = 0; j < p.keys; ++j)
      p.visible[i * p.keys + j] = j <= i + shift && j > i + shift - width;
  }
}
// Per strip and tile one of: empty, full, full but for one pair, dense random, one lane, one key.
inline void mask_random(Problem& p, unsigned seed) {
  std::mt19937 gen(seed);
  for (std::int64_t strip = 0; strip < p.strips(); ++strip) {
    for (std::int64_t tile = 0; tile * 32 < p.keys; ++tile) {
      const unsigned kind = gen() % 7, lane = gen() % 32, index = gen() % 32;
      for (std::int64_t n = 0; n < 32 && strip * 32 + n < p.rows; ++n) {
        for (std::int64_t j = 0; j < 32 && tile * 32 + j < p.keys; ++j) {
          const bool here = n == lane && j == index;
          const bool options[] = {false, true, true, !here, gen() % 2 == 0, n == lane, j == index};
          p.visible[(strip * 32 + n) * p.keys + tile * 32 + j] = options[kind];
        }
      }
    }
  }
}

inline constexpr Dims kMaskDims[] = {{32, 32},   {64, 64},   {80, 80},  {96, 96},
                                     {128, 128}, {192, 128}, {256, 256}};

inline void drop_pairs(Problem& p, double probability, unsigned seed) {
  std::mt19937 gen(seed);
  std::bernoulli_distribution keep(1 - probability);
  p.rule.dropout = true, p.rule.keep_scale = static_cast<float>(1 / (1 - probability));
  p.kept.resize(p.rows * p.keys);
  std::generate(p.kept.begin(), p.kept.end(), [&] { return keep(gen); });
}

struct Result {
  std::vector<float> out, lse;
};

// The rows of a tensor in a permuted order, with gaps between rows and elements.
struct Tensor {
  std::vector<char> bytes;
  std::vector<std::int64_t> row;
  RowSource source;

  Tensor(const std::vector<float>& x, std::int64_t count, std::int64_t dim, Element element,
         std::int64_t step) {
    const std::int64_t size = element == Element::kFloat32 ? 4 : 2,
                       row_bytes = dim * step * size + 6 * size;
    bytes.assign(count * row_bytes + 1, '\xff');
    for (std::int64_t i = 0; i < count; ++i) row.push_back((i * 7 + 3) % count);
    std::vector<char> taken(count, 0);
    for (std::int64_t r : row) taken[r] = 1;
    if (std::find(taken.begin(), taken.end(), 0) != taken.end()) {
      for (std::int64_t i = 0; i < count; ++i) row[i] = count - 1 - i;
    }
    for (std::int64_t i = 0; i < count; ++i) {
      for (std::int64_t d = 0; d < dim; ++d)
        write(row[i] * row_bytes + d * step * size, x[i * dim + d], element);
    }
    source = {bytes.data(), row.data(), row_bytes, step * size, element};
  }
  void write(std::int64_t at, float x, Element element) {
    const std::uint16_t bf16 = to_bf16(x);
    const std::uint16_t half = to_half(x);
    if (element == Element::kFloat32) std::memcpy(&bytes[at], &x, 4);
    if (element == Element::kBFloat16) std::memcpy(&bytes[at], &bf16, 2);
    if (element == Element::kFloat16) std::memcpy(&bytes[at], &half, 2);
  }
};

// What an operation would give the kernel for one strip.
struct StripInput {
  std::vector<std::uint8_t> tile_class;
  std::vector<std::uint32_t> lane_bits, keep_bits;
  std::vector<float> bias;

  StripInput(const Problem& p, std::int64_t strip, std::int64_t tile_keys = 32) {
    const std::int64_t tiles = (p.keys + tile_keys - 1) / tile_keys, keys = tiles * tile_keys;
    tile_class.resize(tiles), lane_bits.resize(keys), bias.assign(keys * 32, kNan);
    keep_bits.resize(keys);
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      std::uint32_t any = 0, all = ~0U;
      for (std::int64_t key = tile * tile_keys; key < tile * tile_keys + tile_keys; ++key) {
        for (std::int64_t n = 0; n < 32; ++n) {
          const std::int64_t row = strip * 32 + n;
          const bool sees = key < p.keys && row < p.rows && p.sees(row, key);
          lane_bits[key] |= sees ? 1U << n : 0;
          const bool keeps = sees ? p.keeps(row, key) : (n + key) % 2 == 0;
          keep_bits[key] |= keeps ? 1U << n : 0;
          if (key < p.keys && row < p.rows && p.rule.bias)
            bias[key * 32 + n] = p.bias[row * p.keys + key];
        }
        any |= lane_bits[key];
        // Lanes beyond the last row do not matter: whoever fills them may give the tile as full.
        all &= lane_bits[key] | (p.rows < strip * 32 + 32 ? ~0U << (p.rows - strip * 32) : 0);
      }
      const bool full = all == ~0U && (tile + 1) * tile_keys <= p.keys && !p.all_partial;
      tile_class[tile] = any == 0 ? kTileEmpty : full ? kTileFull : kTilePartial;
      if (tile_class[tile] != kTilePartial)
        std::fill_n(lane_bits.begin() + tile * tile_keys, tile_keys, 0x5a5a5a5aU);
    }
  }
};

inline Result run(const ForwardKernel& kernel, const Problem& p) {
  const std::int64_t panel = p.panel_steps > 0 ? p.panel_steps * kernel.panel_step(p.dims)
                                               : kernel.blocking(p.dims).panel_keys;
  Memory packed(kernel.packed_bytes(p.dims, p.keys)), scratch(kernel.scratch_bytes(p.dims));
  const Tensor q(p.q, p.rows, p.dims.head_dim, p.element, p.dim_step);
  const Tensor k(p.k, p.keys, p.dims.head_dim, p.element, p.dim_step);
  const Tensor v(p.v, p.keys, p.dims.v_head_dim, p.element, p.dim_step);
  for (std::int64_t begin = 0; begin < p.keys; begin += panel) {
    kernel.pack(packed.get(), k.source, v.source, p.dims, p.keys, begin,
                std::min(begin + panel, p.keys));
  }
  std::vector<Memory> states;
  std::vector<StripInput> inputs;
  for (std::int64_t s = 0; s < p.strips(); ++s) {
    states.emplace_back(kernel.strip_bytes(p.dims));
    inputs.emplace_back(p, s);
    std::vector<const void*> rows;
    for (std::int64_t n = s * 32; n < std::min(p.rows, s * 32 + 32); ++n) {
      rows.push_back(q.bytes.data() + q.row[n] * q.source.row_stride_bytes);
    }
    kernel.start(states[s].get(), rows.data(), static_cast<std::int64_t>(rows.size()),
                 q.source.dim_stride_bytes, p.element, p.dims);
  }
  for (std::int64_t begin = 0; begin < p.keys; begin += panel) {
    std::vector<StripWork> work;
    for (std::int64_t s = 0; s < p.strips(); ++s) {
      work.push_back({states[s].get(), inputs[s].tile_class.data() + begin / 32,
                      inputs[s].lane_bits.data() + begin,
                      p.rule.bias ? inputs[s].bias.data() + begin * 32 : nullptr,
                      p.rule.dropout ? inputs[s].keep_bits.data() + begin : nullptr});
    }
    const PanelCall call{packed.get(),
                         p.keys,
                         begin,
                         std::min(panel, p.keys - begin),
                         begin + panel < p.keys ? begin + panel : -1,
                         work.data(),
                         p.strips(),
                         p.rule,
                         p.dims,
                         scratch.get()};
    kernel.panel(call);
  }
  Result result;
  const std::int64_t stride = p.dims.v_head_dim + 3;
  for (std::int64_t s = 0; s < p.strips(); ++s) {
    std::vector<float> sinks(32, -kInf), out(32 * stride, 12345), lse(32);
    for (std::int64_t n = 0; n < 32 && s * 32 + n < p.rows; ++n) sinks[n] = p.sinks[s * 32 + n];
    kernel.finish(states[s].get(), sinks.data(), p.rule.keep_scale, out.data(), stride, lse.data(),
                  p.dims);
    for (std::int64_t n = 0; n < 32; ++n) {
      for (std::int64_t d = p.dims.v_head_dim; d < stride; ++d)
        EXPECT_EQ(out[n * stride + d], 12345);
      if (s * 32 + n >= p.rows) continue;
      result.out.insert(result.out.end(), &out[n * stride], &out[n * stride] + p.dims.v_head_dim);
      result.lse.push_back(lse[n]);
    }
  }
  return result;
}

struct Row {
  std::vector<double> out, weight;  // weight: sum of p |v|
  double lse = 0;
  double largest = 0;  // |score|, of those that count; of far ones the distance to the largest
};

// One row in double precision, straight from the formula.
inline Row oracle(const Problem& p, std::int64_t row) {
  const std::int64_t dim = p.dims.head_dim, v_dim = p.dims.v_head_dim;
  Row result{std::vector<double>(v_dim, 0), std::vector<double>(v_dim, 0)};
  std::vector<double> s(p.keys, -kInf);
  double top = p.sinks[row];
  for (std::int64_t j = 0; j < p.keys; ++j) {
    if (!p.sees(row, j)) continue;
    double dot = 0;
    for (std::int64_t d = 0; d < dim; ++d)
      dot += static_cast<double>(p.q[row * dim + d]) * p.k[j * dim + d];
    s[j] = dot * p.rule.scale;
    if (p.rule.cap > 0) s[j] = p.rule.cap * std::tanh(s[j] / p.rule.cap);
    if (p.rule.bias) s[j] += p.bias[row * p.keys + j];
    top = std::isnan(s[j]) ? s[j] : std::max(top, s[j]);
    if (std::isnan(top)) break;
  }
  result.lse = top;
  if (top == -kInf) return result;
  double sum = std::exp(p.sinks[row] - top);
  for (std::int64_t j = 0; j < p.keys; ++j) {
    if (p.sees(row, j)) sum += std::exp(s[j] - top);
  }
  result.lse = top + std::log(sum);
  const double base = std::abs(top) > 1e6 ? top : 0;
  for (std::int64_t j = 0; j < p.keys; ++j) {
    if (!p.sees(row, j)) continue;
    const double w = std::exp(s[j] - result.lse) * p.rule.keep_scale;
    if (w > 1e-9) result.largest = std::max(result.largest, std::abs(s[j] - base));
    if (!p.keeps(row, j)) continue;
    for (std::int64_t d = 0; d < v_dim; ++d) {
      result.out[d] += w * p.v[j * v_dim + d];
      result.weight[d] += w * std::abs(p.v[j * v_dim + d]);
    }
  }
  return result;
}

// Per element: p is rounded to bf16, 2^-9, and so is the sum of p that divides it, 2^-9 more;
// scores, sums and the exponential add float32 errors, which grow with the scores. Over the cell:
// the bars of largest and rms error in units of what rounding the exact result to bf16 gives.
inline void expect_close(const Problem& p, const Result& got) {
  double err_max = 0, rounding_max = 0, err_square = 0, rounding_square = 0;
  for (std::int64_t row = 0; row < p.rows; ++row) {
    const Row want = oracle(p, row);
    const double lse = got.lse[row];
    if (std::isnan(want.lse) || std::isinf(want.lse)) {
      EXPECT_EQ(std::isnan(lse), std::isnan(want.lse)) << "row " << row;
      if (std::isinf(want.lse)) {
        EXPECT_EQ(lse, want.lse) << "row " << row;
      }
    } else {
      EXPECT_NEAR(lse, want.lse, 4e-6 * std::max(1.0, std::abs(want.lse))) << "row " << row;
    }
    const double relative = 0x1p-8 * 1.01 + 1e-5 + 4e-7 * want.largest;
    for (std::int64_t d = 0; d < p.dims.v_head_dim; ++d) {
      const double o = got.out[row * p.dims.v_head_dim + d];
      if (std::isnan(want.out[d]) || std::isnan(want.lse)) {
        ASSERT_TRUE(std::isnan(o)) << "row " << row << " d " << d;
        continue;
      }
      if (std::isinf(want.out[d])) {
        ASSERT_FALSE(std::isfinite(o)) << "row " << row << " d " << d;
        continue;
      }
      ASSERT_NEAR(o, want.out[d], relative * want.weight[d]) << "row " << row << " d " << d;
      const double err = rounded(static_cast<float>(o)) - want.out[d],
                   rounding = rounded(static_cast<float>(want.out[d])) - want.out[d];
      err_max = std::max(err_max, std::abs(err)),
      rounding_max = std::max(rounding_max, std::abs(rounding));
      err_square += err * err, rounding_square += rounding * rounding;
    }
  }
  if (!p.is_large_sample) return;
  EXPECT_LE(err_max, 2 * rounding_max);
  EXPECT_LE(std::sqrt(err_square), 1.6 * std::sqrt(rounding_square));
}

}  // namespace annulus::amx_test
