// The AMX kernel through its table against attention in double precision: over simulated tiles wherever there is
// AVX-512, over the hardware's where there is AMX.
#if defined(__x86_64__)
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
#include <string>
#include <vector>

#include "kernels/kernel_table.h"

namespace annulus {

const ForwardKernel* amx_bf16_forward();
const ForwardKernel* amx_simulated_forward();

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::uint16_t to_bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float to_float(std::uint16_t x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
float rounded(float x) { return to_float(to_bf16(x)); }

// 64-byte aligned, filled with NaN, and with a fence behind that shows writes beyond the end.
class Memory {
 public:
  explicit Memory(std::int64_t bytes)
      : bytes_(bytes), data_(static_cast<char*>(std::aligned_alloc(64, (bytes + 127) / 64 * 64))) {
    std::memset(data_.get(), 0xff, (bytes + 127) / 64 * 64);
  }
  ~Memory() {
    if (data_ == nullptr) return;
    for (std::int64_t i = bytes_; i < (bytes_ + 127) / 64 * 64; ++i) EXPECT_EQ(data_.get()[i], '\xff') << "behind the end";
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
  ScoreRule rule{0.125F, 0, false};
  std::vector<float> q, k, v, bias, sinks;  // [rows][head_dim], ..., [rows][keys], [rows]
  std::vector<char> visible;                // [rows][keys]
  Element element = Element::kBFloat16;
  std::int64_t dim_step = 1;
  bool all_partial = false;     // give full tiles as partial ones too
  bool is_large_sample = false;  // of normal data: the bars for a whole cell hold

  std::int64_t strips() const { return (rows + 31) / 32; }
  bool sees(std::int64_t row, std::int64_t key) const { return visible[row * keys + key] != 0; }
};

Problem normal_problem(Dims dims, std::int64_t keys, std::int64_t rows, unsigned seed = 1) {
  Problem p;
  p.dims = dims, p.keys = keys, p.rows = rows;
  p.rule.scale = 1 / std::sqrt(static_cast<float>(dims.head_dim));
  std::mt19937 gen(seed);
  std::normal_distribution<float> normal;
  p.q.resize(rows * dims.head_dim), p.k.resize(keys * dims.head_dim), p.v.resize(keys * dims.v_head_dim);
  for (auto* x : {&p.q, &p.k, &p.v}) std::generate(x->begin(), x->end(), [&] { return rounded(normal(gen)); });
  p.sinks.assign(rows, -kInf);
  p.visible.assign(rows * keys, 1);
  return p;
}

// Every q is one, so that score j is `score(j)` in natural units, if d is a power of 4 and the score a bf16 number.
Problem score_problem(std::int64_t keys, const std::function<float(std::int64_t)>& score, std::int64_t dim = 64) {
  Problem p = normal_problem({dim, dim}, keys, 40, 7);
  std::fill(p.q.begin(), p.q.end(), 1.0F);
  for (std::int64_t j = 0; j < keys; ++j) {
    const float each = rounded(score(j) / std::sqrt(static_cast<float>(dim)));
    std::fill_n(p.k.begin() + j * dim, dim, each);
  }
  return p;
}

struct Result {
  std::vector<float> out, lse;
};

// The rows of a tensor in a permuted order, with gaps between rows and elements.
struct Tensor {
  std::vector<char> bytes;
  std::vector<std::int64_t> row;
  RowSource source;

  Tensor(const std::vector<float>& x, std::int64_t count, std::int64_t dim, Element element, std::int64_t step) {
    const std::int64_t size = element == Element::kFloat32 ? 4 : 2, row_bytes = dim * step * size + 6 * size;
    bytes.assign(count * row_bytes + 1, '\xff');
    for (std::int64_t i = 0; i < count; ++i) row.push_back((i * 7 + 3) % count);
    std::vector<char> taken(count, 0);
    for (std::int64_t r : row) taken[r] = 1;
    if (std::find(taken.begin(), taken.end(), 0) != taken.end()) {
      for (std::int64_t i = 0; i < count; ++i) row[i] = count - 1 - i;
    }
    for (std::int64_t i = 0; i < count; ++i) {
      for (std::int64_t d = 0; d < dim; ++d) write(row[i] * row_bytes + d * step * size, x[i * dim + d], element);
    }
    source = {bytes.data(), row.data(), row_bytes, step * size, element};
  }
  void write(std::int64_t at, float x, Element element) {
    const std::uint16_t bf16 = to_bf16(x);
    const _Float16 half = static_cast<_Float16>(x);
    if (element == Element::kFloat32) std::memcpy(&bytes[at], &x, 4);
    if (element == Element::kBFloat16) std::memcpy(&bytes[at], &bf16, 2);
    if (element == Element::kFloat16) std::memcpy(&bytes[at], &half, 2);
  }
};

// What an operation would give the kernel for one strip.
struct StripInput {
  std::vector<std::uint8_t> tile_class;
  std::vector<std::uint32_t> lane_bits;
  std::vector<float> bias;

  StripInput(const Problem& p, std::int64_t strip) {
    const std::int64_t tiles = (p.keys + 31) / 32;
    tile_class.resize(tiles), lane_bits.resize(tiles * 32), bias.assign(tiles * 32 * 32, kNan);
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      std::uint32_t any = 0, all = ~0U;
      for (std::int64_t key = tile * 32; key < tile * 32 + 32; ++key) {
        for (std::int64_t n = 0; n < 32; ++n) {
          const std::int64_t row = strip * 32 + n;
          const bool sees = key < p.keys && row < p.rows && p.sees(row, key);
          lane_bits[key] |= sees ? 1U << n : 0;
          if (key < p.keys && row < p.rows && p.rule.bias) bias[key * 32 + n] = p.bias[row * p.keys + key];
        }
        any |= lane_bits[key];
        // Lanes beyond the last row do not matter: whoever fills them may give the tile as full.
        all &= lane_bits[key] | (p.rows < strip * 32 + 32 ? ~0U << (p.rows - strip * 32) : 0);
      }
      const bool full = all == ~0U && tile * 32 + 32 <= p.keys && !p.all_partial && !p.rule.bias;
      tile_class[tile] = any == 0 ? kTileEmpty : full ? kTileFull : kTilePartial;
      if (tile_class[tile] != kTilePartial) std::fill_n(lane_bits.begin() + tile * 32, 32, 0x5a5a5a5aU);
    }
  }
};

Result run(const ForwardKernel& kernel, const Problem& p) {
  const std::int64_t panel = kernel.blocking(p.dims).panel_keys;
  Memory packed(kernel.packed_bytes(p.dims, p.keys)), scratch(kernel.scratch_bytes(p.dims));
  const Tensor q(p.q, p.rows, p.dims.head_dim, p.element, p.dim_step);
  const Tensor k(p.k, p.keys, p.dims.head_dim, p.element, p.dim_step);
  const Tensor v(p.v, p.keys, p.dims.v_head_dim, p.element, p.dim_step);
  for (std::int64_t begin = 0; begin < p.keys; begin += panel) {
    kernel.pack(packed.get(), k.source, v.source, p.dims, p.keys, begin, std::min(begin + panel, p.keys));
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
    kernel.start(states[s].get(), rows.data(), static_cast<std::int64_t>(rows.size()), q.source.dim_stride_bytes,
                 p.element, p.dims);
  }
  for (std::int64_t begin = 0; begin < p.keys; begin += panel) {
    std::vector<StripWork> work;
    for (std::int64_t s = 0; s < p.strips(); ++s) {
      work.push_back({states[s].get(), inputs[s].tile_class.data() + begin / 32, inputs[s].lane_bits.data() + begin,
                      p.rule.bias ? inputs[s].bias.data() + begin * 32 : nullptr});
    }
    const PanelCall call{packed.get(), p.keys, begin, std::min(panel, p.keys - begin),
                         begin + panel < p.keys ? begin + panel : -1, work.data(), p.strips(), p.rule, p.dims, scratch.get()};
    kernel.panel(call);
  }
  Result result;
  const std::int64_t stride = p.dims.v_head_dim + 3;
  for (std::int64_t s = 0; s < p.strips(); ++s) {
    std::vector<float> sinks(32, -kInf), out(32 * stride, 12345), lse(32);
    for (std::int64_t n = 0; n < 32 && s * 32 + n < p.rows; ++n) sinks[n] = p.sinks[s * 32 + n];
    kernel.finish(states[s].get(), sinks.data(), out.data(), stride, lse.data(), p.dims);
    for (std::int64_t n = 0; n < 32; ++n) {
      for (std::int64_t d = p.dims.v_head_dim; d < stride; ++d) EXPECT_EQ(out[n * stride + d], 12345);
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
  double largest = 0;  // |score|, of those that count
};

// One row in double precision, straight from the formula.
Row oracle(const Problem& p, std::int64_t row) {
  const std::int64_t dim = p.dims.head_dim, v_dim = p.dims.v_head_dim;
  Row result{std::vector<double>(v_dim, 0), std::vector<double>(v_dim, 0)};
  std::vector<double> s(p.keys, -kInf);
  double top = p.sinks[row];
  for (std::int64_t j = 0; j < p.keys; ++j) {
    if (!p.sees(row, j)) continue;
    double dot = 0;
    for (std::int64_t d = 0; d < dim; ++d) dot += static_cast<double>(p.q[row * dim + d]) * p.k[j * dim + d];
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
  for (std::int64_t j = 0; j < p.keys; ++j) {
    if (!p.sees(row, j)) continue;
    const double w = std::exp(s[j] - result.lse);
    if (w > 1e-9) result.largest = std::max(result.largest, std::abs(s[j]));
    for (std::int64_t d = 0; d < v_dim; ++d) {
      result.out[d] += w * p.v[j * v_dim + d];
      result.weight[d] += w * std::abs(p.v[j * v_dim + d]);
    }
  }
  return result;
}

// Per element: p is rounded to bf16, 2^-8, and scores, sums and the exponential add float32 errors, which grow with the
// scores. Over the cell: the bars of largest and rms error in units of what rounding the exact result to bf16 gives.
void expect_close(const Problem& p, const Result& got) {
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
      const double err = rounded(static_cast<float>(o)) - want.out[d], rounding = rounded(static_cast<float>(want.out[d])) - want.out[d];
      err_max = std::max(err_max, std::abs(err)), rounding_max = std::max(rounding_max, std::abs(rounding));
      err_square += err * err, rounding_square += rounding * rounding;
    }
  }
  if (!p.is_large_sample) return;
  EXPECT_LE(err_max, 2 * rounding_max);
  EXPECT_LE(std::sqrt(err_square), 1.6 * std::sqrt(rounding_square));
}

bool has_amx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

class AmxKernel : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    if (!__builtin_cpu_supports("avx512bw")) GTEST_SKIP() << "no AVX-512";
    if (GetParam() && !has_amx()) GTEST_SKIP() << "no AMX";
    kernel_ = GetParam() ? amx_bf16_forward() : amx_simulated_forward();
  }
  Result check(const Problem& p) const {
    Result got = run(*kernel_, p);
    expect_close(p, got);
    return got;
  }
  const ForwardKernel* kernel_ = nullptr;
};
INSTANTIATE_TEST_SUITE_P(Tiles, AmxKernel, testing::Bool(),
                         [](const auto& test) { return test.param ? "Hardware" : "Simulated"; });

TEST_P(AmxKernel, TableIsConsistent) {
  EXPECT_EQ(kernel_->strip_rows, 32);
  EXPECT_EQ(kernel_->tile_keys, 32);
  for (std::int64_t d = 1; d <= 600; ++d) {
    for (const Dims dims : {Dims{d, d}, Dims{d, 33}, Dims{33, d}}) {
      const Blocking blocking = kernel_->blocking(dims);
      EXPECT_GT(blocking.panel_keys, 0);
      EXPECT_EQ(blocking.panel_keys % 32, 0);
      EXPECT_GT(blocking.item_rows, 0);
      EXPECT_EQ(blocking.item_rows % 32, 0);
      EXPECT_EQ(kernel_->strip_bytes(dims) % 64, 0);
      EXPECT_EQ(kernel_->packed_bytes(dims, 1) % 64, 0);
    }
  }
  EXPECT_EQ(kernel_->peak_loop(100), 100.0 * 24 * 16384);
}

TEST_P(AmxKernel, EveryShape) {
  const Dims dims[] = {{1, 1},   {7, 7},     {32, 32},   {33, 33},   {64, 64},  {72, 72},  {80, 80},  {96, 96}, {128, 128},
                       {256, 256}, {192, 128}, {192, 192}, {128, 192}, {64, 128}, {40, 260}, {300, 20}, {64, 1}};
  for (const Dims d : dims) {
    for (const std::int64_t keys : {1, 15, 17, 31, 32, 33, 100, 549, 1100}) {
      for (const std::int64_t rows : {1, 64, 90}) {
        SCOPED_TRACE(testing::Message() << d.head_dim << "," << d.v_head_dim << " keys " << keys << " rows " << rows);
        Problem p = normal_problem(d, keys, rows, static_cast<unsigned>(keys + rows));
        p.is_large_sample = keys > 500 && rows > 1 && d.v_head_dim >= 32;
        check(p);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(AmxKernel, ElementTypesAndStrides) {
  for (const Element element : {Element::kFloat32, Element::kBFloat16, Element::kFloat16}) {
    for (const std::int64_t step : {1, 3}) {
      Problem p = normal_problem({72, 50}, 150, 40);
      // float16 has no room for bf16's smallest numbers.
      for (auto* x : {&p.q, &p.k, &p.v}) for (float& f : *x) f = std::abs(f) < 0x1p-6F ? 0 : f;
      p.element = element, p.dim_step = step;
      check(p);
    }
  }
}

TEST_P(AmxKernel, RoundsFloat32ToNearestEven) {
  Problem p = normal_problem({32, 32}, 1, 32);
  p.element = Element::kFloat32;
  for (std::int64_t d = 0; d < 32; ++d) {
    const std::uint32_t bits = 0x3f800000U + static_cast<std::uint32_t>(d) * 0x4000U + (d % 3 == 0 ? 1 : 0);
    std::memcpy(&p.v[d], &bits, 4);
  }
  const Result got = run(*kernel_, p);
  const float one = got.out[0];  // all carry the same rounding of p
  for (std::int64_t d = 0; d < 32; ++d) EXPECT_NEAR(got.out[d] / one, rounded(p.v[d]) / rounded(p.v[0]), 1e-6) << d;
}

// Visible sets that give full, partial and empty tiles in all orders.
void mask_causal(Problem& p, std::int64_t shift) {
  for (std::int64_t i = 0; i < p.rows; ++i) {
    for (std::int64_t j = 0; j < p.keys; ++j) p.visible[i * p.keys + j] = j <= i + shift;
  }
}
void mask_window(Problem& p, std::int64_t shift, std::int64_t width) {
  for (std::int64_t i = 0; i < p.rows; ++i) {
    for (std::int64_t j = 0; j < p.keys; ++j) p.visible[i * p.keys + j] = j <= i + shift && j > i + shift - width;
  }
}
// Per strip and tile one of: empty, full, full but for one pair, dense random, one lane, one key.
void mask_random(Problem& p, unsigned seed) {
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

constexpr Dims kMaskDims[] = {{32, 32}, {64, 64}, {80, 80}, {96, 96}, {128, 128}, {192, 128}, {256, 256}};

TEST_P(AmxKernel, CausalAndWindows) {
  for (const Dims d : kMaskDims) {
    for (const std::int64_t shift : {0, 1, 31, 600, 1050}) {
      SCOPED_TRACE(testing::Message() << d.head_dim << " shift " << shift);
      Problem p = normal_problem(d, 1100, 90);
      mask_causal(p, shift);
      check(p);
      mask_window(p, shift, 45);
      check(p);
    }
  }
}

TEST_P(AmxKernel, RandomTiles) {
  for (const Dims d : kMaskDims) {
    for (unsigned seed = 0; seed < 12; ++seed) {
      SCOPED_TRACE(testing::Message() << d.head_dim << " seed " << seed);
      Problem p = normal_problem(d, seed % 2 == 0 ? 1100 : 700, 90, seed);
      mask_random(p, seed);
      check(p);
    }
  }
}

TEST_P(AmxKernel, FirstTilesHiddenFromSomeOrAll) {
  for (const Dims d : kMaskDims) {
    for (const std::int64_t first : {32, 70, 128, 500, 800}) {
      Problem p = normal_problem(d, 840, 64);
      for (std::int64_t i = 0; i < p.rows; ++i) {
        for (std::int64_t j = 0; j < (i % 3 == 0 ? first : i < 32 ? 64 : 0); ++j) p.visible[i * p.keys + j] = 0;
      }
      check(p);
    }
  }
}

TEST_P(AmxKernel, RowWithoutKeyIsZero) {
  Problem p = normal_problem({64, 64}, 200, 64);
  for (std::int64_t j = 0; j < p.keys; ++j) p.visible[5 * p.keys + j] = 0;
  for (std::int64_t i = 32; i < 64; ++i) std::fill_n(p.visible.begin() + i * p.keys, p.keys, 0);
  const Result got = check(p);
  for (const std::int64_t row : {5, 32, 63}) {
    EXPECT_EQ(got.lse[row], -kInf);
    for (std::int64_t d = 0; d < 64; ++d) EXPECT_EQ(got.out[row * 64 + d], 0);
  }
}

TEST_P(AmxKernel, ScoresThatBeatTheReference) {
  struct Case {
    const char* name;
    std::function<float(std::int64_t)> score;
  };
  const Case cases[] = {
      {"zero", [](std::int64_t) { return 0.0F; }},
      {"grow 1 a key", [](std::int64_t j) { return static_cast<float>(j); }},
      {"grow 30 per 64 keys", [](std::int64_t j) { return static_cast<float>(30 * (j / 64)); }},
      {"grow 100 per 8 keys", [](std::int64_t j) { return static_cast<float>(100 * (j / 8)); }},
      {"fall 1 a key", [](std::int64_t j) { return static_cast<float>(-j); }},
      {"low first 64", [](std::int64_t j) { return j < 64 ? -5000 : static_cast<float>(j % 7); }},
      {"low first 40", [](std::int64_t j) { return j < 40 ? -1e9F : static_cast<float>(j % 7); }},
      {"one huge key", [](std::int64_t j) { return j == 777 ? 1e5F : static_cast<float>(j % 5); }},
      {"huge last key", [](std::int64_t j) { return j == 1099 ? 1e5F : static_cast<float>(j % 5); }},
      {"sawtooth", [](std::int64_t j) { return 3000.0F * static_cast<float>(j % 331) / 331; }},
      {"far below zero", [](std::int64_t j) { return -4000 - static_cast<float>(j); }},
      {"just below the guard", [](std::int64_t j) { return j < 32 ? 0 : j % 9 == 0 ? 27.5F : 20.0F; }},
      {"2^39 by number", [](std::int64_t j) { return j < 32 ? 0 : 27.0F; }},
  };
  for (const std::int64_t dim : {64, 128, 256, 80}) {
    for (const Case& c : cases) {
      SCOPED_TRACE(testing::Message() << c.name << " dim " << dim);
      Problem p = score_problem(1100, c.score, dim);
      check(p);
      mask_causal(p, 1040);
      check(p);
      mask_random(p, 5);
      check(p);
      mask_causal(p, 0);
      check(p);
    }
  }
}

// A lane whose reference is raised again and again, before and behind the exponentials, leaves the bits of the others:
// also of those whose own scores jump to where their reference is barely raised or barely not.
TEST_P(AmxKernel, NeighboursKeepTheirBits) {
  for (const Dims d : {Dims{64, 64}, Dims{128, 128}, Dims{256, 256}, Dims{80, 80}}) {
    for (const float growth : {0.03F, 0.3F, 3.0F, 40.0F}) {
      for (int shape = 0; shape < 3; ++shape) {
        Problem p = normal_problem(d, 1100, 90, 3);
        // The first dimension of K grows; only chosen queries look at it.
        for (std::int64_t j = 0; j < p.keys; ++j) p.k[j * d.head_dim] = rounded(growth * static_cast<float>(j + 1));
        for (std::int64_t i = 0; i < p.rows; ++i) p.q[i * d.head_dim] = 0;
        for (std::int64_t j = 0; j < p.keys; ++j) {
          p.k[j * d.head_dim + 1] = j < 500 ? 0 : rounded(40 * std::sqrt(static_cast<float>(d.head_dim)));
        }
        for (std::int64_t i = 0; i < p.rows; ++i) {
          p.q[i * d.head_dim + 1] = rounded(0.6F + 0.002F * static_cast<float>(i));
        }
        if (shape == 1) mask_causal(p, 1040);
        if (shape == 2) mask_random(p, 9);
        const Result calm = check(p);
        for (const std::int64_t row : {5, 30, 31, 64}) p.q[row * d.head_dim] = row == 31 ? 100.0F : 10.0F;
        const Result raised = run(*kernel_, p);
        for (std::int64_t i = 0; i < p.rows; ++i) {
          if (i == 5 || i == 30 || i == 31 || i == 64) continue;
          EXPECT_EQ(std::memcmp(&calm.lse[i], &raised.lse[i], 4), 0) << "row " << i;
          EXPECT_EQ(std::memcmp(&calm.out[i * d.v_head_dim], &raised.out[i * d.v_head_dim], d.v_head_dim * 4), 0) << i;
        }
      }
    }
  }
}

TEST_P(AmxKernel, HiddenNanAndInfReachNobody) {
  for (const Dims d : kMaskDims) {
    for (unsigned seed = 0; seed < 6; ++seed) {
      SCOPED_TRACE(testing::Message() << d.head_dim << " seed " << seed);
      Problem p = normal_problem(d, 700, 90, seed);
      seed < 3 ? mask_random(p, seed) : mask_causal(p, 600 + 5 * seed);
      // Each poisoned key is hidden from all rows but a few; those rows must show it, the others must not.
      std::mt19937 gen(seed);
      for (const std::int64_t key : {3, 40, 77, 200, 389, 390, 640, 699}) {
        const float poison = gen() % 2 == 0 ? kNan : gen() % 2 == 0 ? kInf : -kInf;
        const bool in_value = gen() % 2 == 0;
        for (std::int64_t i = 0; i < p.rows; ++i) p.visible[i * p.keys + key] &= in_value ? i % 16 == 7 : 0;
        if (in_value) p.v[key * d.v_head_dim + gen() % d.v_head_dim] = poison;
        if (!in_value) p.k[key * d.head_dim + gen() % d.head_dim] = poison;
      }
      check(p);
      p.all_partial = true;
      check(p);
    }
  }
}

TEST_P(AmxKernel, VisibleNanStaysInItsRow) {
  for (const Dims d : {Dims{64, 64}, Dims{128, 128}, Dims{80, 80}}) {
    Problem p = normal_problem(d, 700, 64);
    p.q[9 * d.head_dim + 3] = kNan;
    p.v[333 * d.v_head_dim + 5] = kNan;  // a full tile: column 5 of all
    p.v[50 * d.v_head_dim + 6] = kInf;
    check(p);
    p = normal_problem(d, 700, 64);
    p.k[100 * d.head_dim + 3] = kNan;
    for (std::int64_t i = 0; i < p.rows; ++i) p.visible[i * p.keys + 100] = i == 20 ? 1 : 0;
    const Result got = check(p);
    EXPECT_TRUE(std::isnan(got.lse[20]));
    EXPECT_FALSE(std::isnan(got.lse[21]));
  }
}

// +inf: exp(inf) as the float32 formula has it. -inf: weight 0.
TEST_P(AmxKernel, InfiniteScores) {
  for (const std::int64_t at : {0, 40, 600}) {
    Problem p = normal_problem({64, 64}, 700, 64);
    for (std::int64_t i = 0; i < p.rows; ++i) p.q[i * 64] = i == 3 ? 1.0F : i == 4 ? -1.0F : 0.5F;
    p.k[at * 64] = kInf;
    for (std::int64_t i = 0; i < p.rows; ++i) p.visible[i * p.keys + at] = i == 3 || i == 4 ? 1 : 0;
    const Result got = run(*kernel_, p);
    EXPECT_EQ(got.lse[3], kInf);
    EXPECT_TRUE(std::isfinite(got.lse[4]));
    EXPECT_TRUE(std::isfinite(got.lse[5]));
    p.k[at * 64] = 0;
    for (const std::int64_t row : {3, 4}) p.visible[row * p.keys + at] = 0;
    const Result without = run(*kernel_, p);
    for (std::int64_t i = 0; i < p.rows; ++i) {
      if (i == 3) continue;
      EXPECT_EQ(got.lse[i], without.lse[i]) << i;
      for (std::int64_t d = 0; d < 64; ++d) EXPECT_EQ(got.out[i * 64 + d], without.out[i * 64 + d]);
    }
  }
}

TEST_P(AmxKernel, SoftCapAndBias) {
  for (const Dims d : {Dims{64, 64}, Dims{128, 128}, Dims{72, 40}}) {
    for (int kind = 1; kind < 4; ++kind) {
      for (const float scale : {0.1F, 4.0F, -0.2F}) {
        SCOPED_TRACE(testing::Message() << d.head_dim << " kind " << kind << " scale " << scale);
        Problem p = normal_problem(d, 700, 90);
        p.rule = {scale, (kind & 1) != 0 ? 20.0F : 0, (kind & 2) != 0};
        mask_random(p, 3);
        std::mt19937 gen(1);
        std::normal_distribution<float> normal(0, 5);
        if (p.rule.bias) {
          p.bias.resize(p.rows * p.keys);
          for (std::int64_t i = 0; i < p.rows * p.keys; ++i) p.bias[i] = p.visible[i] ? normal(gen) : kNan;
          p.bias[2] = p.visible[2] ? -kInf : kNan;
        }
        check(p);
      }
    }
  }
}

TEST_P(AmxKernel, NegativeAndZeroScale) {
  for (const float scale : {-0.3F, 0.0F}) {
    Problem p = normal_problem({64, 64}, 700, 64);
    p.rule.scale = scale;
    mask_random(p, 4);
    check(p);
  }
}

// Small scores under a large cap: tanh must be right relative to its argument.
TEST_P(AmxKernel, SoftCapNearZeroIsTheIdentity) {
  Problem p = score_problem(1, [](std::int64_t) { return 0.75F; });
  for (const float cap : {0.5F, 1.0F, 1.5F, 30.0F, 1e4F, 1e8F}) {
    p.rule.cap = cap;
    const Result got = run(*kernel_, p);
    EXPECT_NEAR(got.lse[0], cap * std::tanh(0.75 / cap), 4e-6);
  }
}

TEST_P(AmxKernel, SinksFarAboveAndBelow) {
  Problem p = normal_problem({64, 64}, 300, 64);
  for (std::int64_t i = 0; i < p.rows; ++i) {
    const float sinks[] = {-kInf, 0, 5, 1000, -1000, 1e30F, 88};
    p.sinks[i] = sinks[i % 7];
    if (i % 5 == 0) std::fill_n(p.visible.begin() + i * p.keys, p.keys, 0);
  }
  const Result got = check(p);
  EXPECT_EQ(got.lse[10], 1000);  // sinks only
  EXPECT_EQ(got.out[10 * 64], 0);
}

}  // namespace
}  // namespace annulus
#endif
