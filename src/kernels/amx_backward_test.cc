// The AMX backward through its table against the gradients in double precision and against the
// vector kernel of the same arithmetic.
#if defined(__x86_64__)
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/amx_test_harness.h"
#include "kernels/kernel_table.h"

namespace annulus {

const ForwardKernel* amx_bf16_forward();
const ForwardKernel* amx_simulated_forward();
const BackwardKernel* amx_bf16_backward();
const BackwardKernel* amx_simulated_backward();
const BackwardKernel* avx512_bf16_backward();

namespace {

using namespace amx_test;

struct BackwardProblem : Problem {
  std::vector<float> dout, lse, delta;  // [rows][v_head_dim], [rows], [rows]
  bool want_dq = true, want_dkv = true, want_ds = false;
  BackwardBlocking blocking{};  // 0: the kernel's choice
};

struct Gradients {
  std::vector<float> dq, dk, dv;  // [rows][head_dim], [keys][head_dim], [keys][v_head_dim]
  std::vector<float> ds;          // [rows][keys]
};

// lse and delta as a forward would leave them.
void take_statistics(BackwardProblem& p) {
  p.lse.resize(p.rows), p.delta.resize(p.rows);
  for (std::int64_t i = 0; i < p.rows; ++i) {
    const Row row = oracle(p, i);
    double delta = 0;
    for (std::int64_t d = 0; d < p.dims.v_head_dim; ++d)
      delta += row.out[d] * p.dout[i * p.dims.v_head_dim + d];
    p.lse[i] = static_cast<float>(row.lse), p.delta[i] = static_cast<float>(delta);
  }
}

BackwardProblem backward_problem(const Problem& base, unsigned seed = 1) {
  BackwardProblem p;
  static_cast<Problem&>(p) = base;
  std::mt19937 gen(seed);
  std::normal_distribution<float> normal;
  p.dout.resize(p.rows * p.dims.v_head_dim);
  std::generate(p.dout.begin(), p.dout.end(), [&] { return rounded(normal(gen)); });
  take_statistics(p);
  return p;
}

Memory zeros(std::int64_t floats) {
  Memory memory(floats * 4);
  std::memset(memory.get(), 0, floats * 4);
  return memory;
}
float* floats(const Memory& memory) { return reinterpret_cast<float*>(memory.get()); }

std::vector<const void*> addresses(const Tensor& x, std::int64_t begin, std::int64_t end) {
  std::vector<const void*> rows;
  for (std::int64_t n = begin; n < end; ++n)
    rows.push_back(x.bytes.data() + x.row[n] * x.source.row_stride_bytes);
  return rows;
}

// Panel by panel, in each block of strips by block, as an operation would.
Gradients run(const BackwardKernel& kernel, const BackwardProblem& p) {
  const Dims dims = p.dims;
  const BackwardBlocking blocking = p.blocking.panel_keys > 0 ? p.blocking : kernel.blocking(dims);
  const auto [panel, block_rows] = blocking;
  const std::int64_t tile = kernel.tile_keys, padded = (p.keys + tile - 1) / tile * tile;
  const std::int64_t k_row = kernel.row_floats(dims.head_dim),
                     v_row = kernel.row_floats(dims.v_head_dim),
                     dq_floats = kernel.dq_rows(dims.head_dim) * 32;
  Memory packed(kernel.packed_bytes(dims, p.keys)), scratch(kernel.scratch_bytes(dims, blocking));
  const Tensor q(p.q, p.rows, dims.head_dim, p.element, p.dim_step);
  const Tensor k(p.k, p.keys, dims.head_dim, p.element, p.dim_step);
  const Tensor v(p.v, p.keys, dims.v_head_dim, p.element, p.dim_step);
  const Tensor dout(p.dout, p.rows, dims.v_head_dim, p.element, 1);
  const Memory dk = zeros(padded * k_row), dv = zeros(padded * v_row);
  const Memory dq = zeros(p.strips() * dq_floats);
  const Memory strips(p.strips() * kernel.strip_bytes(dims));
  std::vector<StripInput> inputs;
  const Memory ds(p.strips() * padded * 32 * 4);
  for (std::int64_t s = 0; s < p.strips(); ++s) {
    inputs.emplace_back(p, s, tile);
    const std::int64_t end = std::min(p.rows, s * 32 + 32);
    const auto q_rows = addresses(q, s * 32, end), dout_rows = addresses(dout, s * 32, end);
    kernel.pack_strip(
        strips.get() + s * kernel.strip_bytes(dims),
        {q_rows.data(), dout_rows.data(), end - s * 32, q.source.dim_stride_bytes,
         dout.source.dim_stride_bytes, p.element, p.element, &p.lse[s * 32], &p.delta[s * 32]},
        dims);
  }
  for (std::int64_t begin = 0; begin < p.keys; begin += panel) {
    const std::int64_t end = std::min(begin + panel, p.keys);
    kernel.pack_keys(packed.get(), k.source, v.source, dims, p.keys, begin, end);
    for (std::int64_t first = 0; first < p.strips(); first += block_rows / 32) {
      std::vector<BackwardStrip> block;
      for (std::int64_t s = first; s < std::min(first + block_rows / 32, p.strips()); ++s) {
        block.push_back({strips.get() + s * kernel.strip_bytes(dims), floats(dq) + s * dq_floats,
                         inputs[s].tile_class.data() + begin / tile,
                         inputs[s].lane_bits.data() + begin,
                         p.rule.bias ? inputs[s].bias.data() + begin * 32 : nullptr,
                         p.rule.dropout ? inputs[s].keep_bits.data() + begin : nullptr,
                         p.want_ds ? floats(ds) + (s * padded + begin) * 32 : nullptr});
      }
      BackwardCall call{};
      call.packed = packed.get(), call.num_keys = p.keys;
      call.key_begin = begin, call.key_count = end - begin;
      call.strips = block.data(), call.strip_count = static_cast<std::int64_t>(block.size());
      if (p.want_dkv) call.dk = floats(dk) + begin * k_row, call.dv = floats(dv) + begin * v_row;
      call.want_dq = p.want_dq, call.want_dkv = p.want_dkv;
      call.next_strips = strips.get(), call.next_strip_bytes = kernel.strip_bytes(dims);
      call.next_dq = dq.get(), call.next_dq_bytes = dq_floats * 4;
      call.rule = p.rule, call.dims = dims, call.scratch = scratch.get();
      kernel.block(call);
    }
  }
  Gradients g;
  for (std::int64_t j = 0; j < padded; ++j) {
    const float *k_from = floats(dk) + j * k_row, *v_from = floats(dv) + j * v_row;
    if (j < p.keys) {
      g.dk.insert(g.dk.end(), k_from, k_from + dims.head_dim);
      g.dv.insert(g.dv.end(), v_from, v_from + dims.v_head_dim);
    } else {
      for (std::int64_t x = 0; x < k_row; ++x) EXPECT_EQ(k_from[x], 0) << "padded key " << j;
      for (std::int64_t x = 0; x < v_row; ++x) EXPECT_EQ(v_from[x], 0) << "padded key " << j;
    }
  }
  const std::int64_t stride = dims.head_dim + 3;
  for (std::int64_t s = 0; s < p.strips(); ++s) {
    std::vector<float> rows(32 * stride, 12345);
    kernel.unload_dq(floats(dq) + s * dq_floats, 0.5F, rows.data(), stride, dims);
    for (std::int64_t n = 0; n < 32; ++n) {
      for (std::int64_t x = dims.head_dim; x < stride; ++x) EXPECT_EQ(rows[n * stride + x], 12345);
      if (s * 32 + n >= p.rows) continue;
      for (std::int64_t x = 0; x < dims.head_dim; ++x) g.dq.push_back(2 * rows[n * stride + x]);
      for (std::int64_t j = 0; j < p.keys; ++j)
        g.ds.push_back(floats(ds)[(s * padded + j) * 32 + n]);
    }
  }
  return g;
}

// ------------------------------------------------------------------------------------------------
// in double precision

struct Expected {
  struct Sum {
    std::vector<double> value, error;  // error: what a kernel may be off by
    explicit Sum(std::int64_t n) : value(n, 0), error(n, 0) {}
    bool all_finite() const {
      return std::all_of(value.begin(), value.end(), [](double x) { return std::isfinite(x); });
    }
  };
  Sum dq, dk, dv, ds;

  bool all_finite() const {
    return dq.all_finite() && dk.all_finite() && dv.all_finite() && ds.all_finite();
  }
};

double dot(const float* a, const float* b, std::int64_t n) {
  double sum = 0;
  for (std::int64_t d = 0; d < n; ++d) sum += static_cast<double>(a[d]) * b[d];
  return sum;
}

// Term by term. P and dS are rounded to bf16: 2^-9 of each term, and as much again for float32
// additions and for dims that cancel. Before that float32 leaves `small` of p, which grows with the
// score, and as much of dp and delta each, which may cancel in dS: `small` of p (|dp| + |delta|).
Expected expected(const BackwardProblem& p) {
  const std::int64_t dim = p.dims.head_dim, v_dim = p.dims.v_head_dim;
  using Sum = Expected::Sum;
  Expected e{Sum(p.rows * dim), Sum(p.keys * dim), Sum(p.keys * v_dim), Sum(p.rows * p.keys)};
  const auto add = [](Sum& sum, std::int64_t at, double value, double error) {
    sum.value[at] += value, sum.error[at] += error;
  };
  for (std::int64_t i = 0; i < p.rows; ++i) {
    const float *q = &p.q[i * dim], *dout = &p.dout[i * v_dim];
    for (std::int64_t j = 0; j < p.keys; ++j) {
      if (!p.sees(i, j)) continue;
      const float *k = &p.k[j * dim], *v = &p.v[j * v_dim];
      double s = dot(q, k, dim) * p.rule.scale, slope = 1, size = 0;
      if (p.rule.cap > 0) {
        const double t = std::tanh(s / p.rule.cap);
        s = p.rule.cap * t, slope = 1 - t * t;
      }
      if (p.rule.bias) s += p.bias[i * p.keys + j];
      if (s == -kInf) continue;  // p = 0, dS = 0
      const double weight = std::exp(s - p.lse[i]);
      double dp = dot(dout, v, v_dim) * p.rule.keep_scale;
      for (std::int64_t x = 0; x < v_dim; ++x) size += std::abs(dout[x] * v[x]);
      if (!p.keeps(i, j)) dp = size = 0;
      const double small = 1e-5 + 4e-7 * std::abs(s) + 4e-7 * std::abs(p.lse[i]);
      const double ds = weight * (dp - p.delta[i]);
      const double off = small * weight * (size * p.rule.keep_scale + std::abs(p.delta[i]));
      add(e.ds, i * p.keys + j, ds, off);
      const double rounded_off = 0x1p-8 * std::abs(ds * slope) + off;
      for (std::int64_t x = 0; x < dim; ++x) {
        add(e.dq, i * dim + x, ds * slope * k[x], rounded_off * std::abs(k[x]));
        add(e.dk, j * dim + x, ds * slope * q[x], rounded_off * std::abs(q[x]));
      }
      for (std::int64_t x = 0; p.keeps(i, j) && x < v_dim; ++x) {
        add(e.dv, j * v_dim + x, weight * dout[x], (0x1p-8 + small) * weight * std::abs(dout[x]));
      }
    }
  }
  return e;
}

// Not finite exactly where the formula is not.
void expect_close(const char* name, const std::vector<float>& got, const Expected::Sum& want,
                  const BackwardProblem& p, std::int64_t dim, bool is_ds = false) {
  ASSERT_EQ(got.size(), want.value.size());
  for (std::size_t at = 0; at < got.size(); ++at) {
    const auto row = static_cast<std::int64_t>(at) / dim, x = static_cast<std::int64_t>(at) % dim;
    if (is_ds && !p.sees(row, x)) {  // not written where the tile is empty
      ASSERT_TRUE(got[at] == 0 || std::memcmp(&got[at], "\xff\xff\xff\xff", 4) == 0);
      continue;
    }
    if (!std::isfinite(want.value[at])) {
      ASSERT_FALSE(std::isfinite(got[at])) << name << " row " << row << " at " << x;
      continue;
    }
    ASSERT_NEAR(got[at], want.value[at], want.error[at] + 1e-30)
        << name << " row " << row << " at " << x;
  }
}

class AmxBackward : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    if (!__builtin_cpu_supports("avx512bw")) GTEST_SKIP() << "no AVX-512";
    if (GetParam() && !has_amx()) GTEST_SKIP() << "no AMX";
    kernel_ = GetParam() ? amx_bf16_backward() : amx_simulated_backward();
  }
  Gradients check(const BackwardProblem& p) const {
    const Expected want = expected(p);
    const Gradients got = run(*kernel_, p);
    expect_close(p, got, want);
    // Both are as far from the exact sums as bf16 makes them, not from each other by less. What is
    // not finite is another test's business.
    if (__builtin_cpu_supports("avx512bf16") && want.all_finite()) {
      SCOPED_TRACE("the vector kernel");
      BackwardProblem same = p;
      same.element = Element::kBFloat16;  // the only one it reads
      // It reads the bias of lanes behind the last row where a tile is given as full.
      same.all_partial |= p.rule.bias && p.rows % 32 != 0;
      expect_close(p, run(*avx512_bf16_backward(), same), want);
    }
    return got;
  }
  static void expect_close(const BackwardProblem& p, const Gradients& got, const Expected& want) {
    const auto untouched = [](const Expected::Sum& sum) {
      return Expected::Sum(static_cast<std::int64_t>(sum.value.size()));
    };
    const std::int64_t dim = p.dims.head_dim, v_dim = p.dims.v_head_dim;
    annulus::expect_close("dq", got.dq, p.want_dq ? want.dq : untouched(want.dq), p, dim);
    annulus::expect_close("dk", got.dk, p.want_dkv ? want.dk : untouched(want.dk), p, dim);
    annulus::expect_close("dv", got.dv, p.want_dkv ? want.dv : untouched(want.dv), p, v_dim);
    if (p.want_ds) annulus::expect_close("ds", got.ds, want.ds, p, p.keys, true);
  }
  const BackwardKernel* kernel_ = nullptr;
};
INSTANTIATE_TEST_SUITE_P(Tiles, AmxBackward, testing::Bool(),
                         [](const auto& test) { return test.param ? "Hardware" : "Simulated"; });

TEST_P(AmxBackward, TableIsConsistent) {
  const ForwardKernel& forward = GetParam() ? *amx_bf16_forward() : *amx_simulated_forward();
  EXPECT_STREQ(kernel_->target, forward.target);
  EXPECT_EQ(kernel_->strip_rows, forward.strip_rows);
  EXPECT_EQ(kernel_->tile_keys, forward.tile_keys);
  for (std::int64_t d = 1; d <= 600; ++d) {
    for (const Dims dims : {Dims{d, d}, Dims{d, 33}, Dims{33, d}}) {
      const BackwardBlocking blocking = kernel_->blocking(dims);
      EXPECT_GT(blocking.panel_keys, 0);
      EXPECT_EQ(blocking.panel_keys % 32, 0);
      EXPECT_GT(blocking.block_rows, 0);
      EXPECT_EQ(blocking.block_rows % 32, 0);
      EXPECT_LE(blocking.panel_keys, kernel_->most.panel_keys);
      EXPECT_LE(blocking.block_rows, kernel_->most.block_rows);
      EXPECT_EQ(kernel_->strip_bytes(dims) % 64, 0);
      EXPECT_EQ(kernel_->packed_bytes(dims, 1) % 64, 0);
      EXPECT_GE(kernel_->row_floats(d), d);
      EXPECT_GE(kernel_->dq_rows(d), d);
    }
  }
}

TEST_P(AmxBackward, EveryShape) {
  const Dims dims[] = {{1, 1},     {7, 7},     {33, 32},  {64, 64},   {80, 72},
                       {128, 128}, {192, 128}, {40, 260}, {256, 256}, {64, 1}};
  for (const Dims d : dims) {
    for (const std::int64_t keys : {1, 17, 32, 100, 549}) {
      for (const std::int64_t rows : {1, 64, 290}) {
        SCOPED_TRACE(testing::Message()
                     << d.head_dim << "," << d.v_head_dim << " keys " << keys << " rows " << rows);
        check(backward_problem(normal_problem(d, keys, rows, static_cast<unsigned>(keys))));
        if (HasFailure()) return;
      }
    }
  }
}

TEST_P(AmxBackward, RandomProblems) {
  constexpr unsigned kRounds = 120 / ANNULUS_TEST_SCALE;
  for (unsigned seed = 0; seed < kRounds; ++seed) {
    std::mt19937 gen(seed);
    const auto below = [&](std::int64_t n) { return static_cast<std::int64_t>(gen() % n); };
    Problem base =
        normal_problem({1 + below(200), 1 + below(200)}, 1 + below(400), 1 + below(150), seed);
    SCOPED_TRACE(testing::Message()
                 << "seed " << seed << ": " << base.dims.head_dim << "," << base.dims.v_head_dim
                 << " keys " << base.keys << " rows " << base.rows);
    const std::int64_t mask = below(4);
    if (mask == 1) mask_random(base, seed);
    if (mask == 2) mask_causal(base, below(base.keys));
    if (mask == 3) mask_window(base, below(base.keys), 45);
    base.all_partial = below(4) == 0, base.dim_step = 1 + 2 * below(2);
    base.element = below(3) == 0 ? Element::kFloat32 : Element::kBFloat16;
    if (below(3) == 0) base.rule.scale *= -3;
    if (below(3) == 0) base.rule.cap = 1.5F;
    base.rule.bias = below(3) == 0;
    std::normal_distribution<float> normal(0, 3);
    if (base.rule.bias) base.bias.resize(base.rows * base.keys);
    for (std::size_t i = 0; i < base.bias.size(); ++i)
      base.bias[i] = !base.visible[i] ? kNan : below(50) == 0 ? -kInf : normal(gen);
    if (below(3) == 0) drop_pairs(base, 0.3, seed);
    BackwardProblem p = backward_problem(base, seed);
    p.want_dq = below(5) != 0, p.want_dkv = below(5) != 0, p.want_ds = below(3) == 0;
    SCOPED_TRACE(testing::Message()
                 << "seed " << seed << ": " << p.dims.head_dim << "," << p.dims.v_head_dim
                 << " keys " << p.keys << " rows " << p.rows << " mask " << mask << " scale "
                 << p.rule.scale << " cap " << p.rule.cap << " bias " << p.rule.bias << " dropout "
                 << p.rule.dropout << " dq " << p.want_dq << " dkv " << p.want_dkv << " ds "
                 << p.want_ds << " partial " << p.all_partial);
    check(p);
    if (HasFailure()) return;
  }
}

TEST_P(AmxBackward, RandomTiles) {
  for (const Dims d : kMaskDims) {
    for (unsigned seed = 0; seed < 2; ++seed) {
      SCOPED_TRACE(testing::Message() << d.head_dim << " seed " << seed);
      Problem base = normal_problem(d, 600, 270, seed);
      mask_random(base, seed);
      check(backward_problem(base));
    }
  }
}

// Half of them rows whose keys have a bias of -inf.
TEST_P(AmxBackward, RowsWithoutKeyGiveNothing) {
  Problem base = normal_problem({64, 64}, 200, 64);
  base.rule.bias = true;
  base.bias.assign(base.rows * base.keys, 0);
  for (std::int64_t i = 0; i < base.rows; i += 3) {
    for (std::int64_t j = 0; j < base.keys; ++j) {
      if (i % 2 == 0) base.visible[i * base.keys + j] = 0;
      if (i % 2 == 1) base.bias[i * base.keys + j] = -kInf;
    }
  }
  const BackwardProblem p = backward_problem(base);
  const Gradients got = check(p);
  for (std::int64_t i = 0; i < p.rows; i += 3) {
    EXPECT_EQ(p.lse[i], -kInf);
    for (std::int64_t x = 0; x < 64; ++x) EXPECT_EQ(got.dq[i * 64 + x], 0);
  }
}

TEST_P(AmxBackward, EitherSideAloneIsTheSame) {
  Problem base = normal_problem({72, 40}, 300, 90);
  mask_random(base, 1);
  BackwardProblem p = backward_problem(base);
  const Gradients both = check(p);
  p.want_dkv = false;
  EXPECT_EQ(run(*kernel_, p).dq, both.dq);
  p.want_dkv = true, p.want_dq = false;
  const Gradients keys_only = run(*kernel_, p);
  EXPECT_EQ(keys_only.dk, both.dk);
  EXPECT_EQ(keys_only.dv, both.dv);
}

TEST_P(AmxBackward, EveryBlock) {
  for (const std::int64_t panel : {std::int64_t{32}, std::int64_t{96}, kernel_->most.panel_keys}) {
    for (const std::int64_t rows :
         {std::int64_t{32}, std::int64_t{160}, kernel_->most.block_rows}) {
      SCOPED_TRACE(testing::Message() << panel << " keys, " << rows << " rows");
      for (const bool poisoned : {false, true}) {
        Problem base = normal_problem({40, 72}, 1100, 1090);
        mask_random(base, 3);
        BackwardProblem p = backward_problem(base);
        for (std::int64_t i = 0; i < p.rows && poisoned; ++i) p.visible[i * p.keys + 1020] = 0;
        if (poisoned) p.k[1020 * 40 + 7] = kNan;
        p.blocking = {panel, rows};
        check(p);
      }
    }
  }
}

// A poisoned key or query is hidden from all of the other side but a few; those must show it, the
// others must not. lse and delta are of the data without it, so that each pair counts by itself.
TEST_P(AmxBackward, HiddenNanAndInfReachNobody) {
  for (const Dims d : {Dims{64, 64}, Dims{128, 128}, Dims{80, 40}, Dims{256, 256}}) {
    for (unsigned seed = 0; seed < 8; ++seed) {
      SCOPED_TRACE(testing::Message() << d.head_dim << " seed " << seed);
      Problem base = normal_problem(d, 300, 140, seed);
      if (seed % 2 == 0) mask_random(base, seed);
      if (seed >= 4) drop_pairs(base, 0.3, seed);
      if (seed % 3 == 0) base.rule.cap = 2;
      const bool any_visible = seed % 4 < 2;
      for (const std::int64_t key : {3, 40, 200, 258, 259, 299}) {
        for (std::int64_t i = 0; i < base.rows; ++i)
          base.visible[i * base.keys + key] &= any_visible && i % 16 == 7;
      }
      for (const std::int64_t row : {0, 33, 34, 135}) {
        for (std::int64_t j = 0; j < base.keys; ++j)
          base.visible[row * base.keys + j] &= any_visible && j % 16 == 9;
      }
      BackwardProblem p = backward_problem(base, seed);
      for (const std::int64_t key : {3, 200, 259}) p.k[key * d.head_dim + key % 30] = kNan;
      for (const std::int64_t key : {40, 258, 299}) {
        p.v[key * d.v_head_dim + key % 30] = key == 40 ? kNan : kInf;
      }
      for (const std::int64_t row : {0, 33}) p.q[row * d.head_dim + row % 30] = kNan;
      p.dout[34 * d.v_head_dim + 5] = kNan, p.dout[135 * d.v_head_dim + 7] = -kInf;
      if (!any_visible) p.lse[0] = kNan, p.lse[33] = kInf, p.delta[34] = kNan, p.delta[135] = kInf;
      p.all_partial = seed % 3 == 2, p.want_ds = true;
      check(p);
    }
  }
}

// Of pairs that are seen, in tiles that are seen whole.
TEST_P(AmxBackward, VisibleNanStaysWithItsPairs) {
  for (const Dims d : {Dims{64, 64}, Dims{128, 128}, Dims{80, 40}}) {
    for (int kind = 0; kind < 6; ++kind) {
      SCOPED_TRACE(testing::Message() << d.head_dim << " kind " << kind);
      BackwardProblem p = backward_problem(normal_problem(d, 100, 40));
      if (kind == 0) p.q[9 * d.head_dim + 3] = kNan;
      if (kind == 1) p.k[50 * d.head_dim + 3] = kNan;
      if (kind == 2) p.v[50 * d.v_head_dim + 3] = kInf;
      if (kind == 3) p.dout[9 * d.v_head_dim + 3] = kNan;
      if (kind == 4) p.lse[39] = kNan;
      if (kind == 5) p.delta[39] = kNan;
      check(p);
    }
  }
}

// Scores and dp of hidden pairs that overflow: Inf, and NaN where both signs do.
TEST_P(AmxBackward, HiddenOverflowReachesNobody) {
  for (const float cap : {0.0F, 2.0F}) {
    Problem base = normal_problem({64, 64}, 100, 64);
    base.rule.cap = cap;
    for (const std::int64_t key : {5, 70}) {
      for (std::int64_t i = 0; i < base.rows; ++i) base.visible[i * base.keys + key] = 0;
      for (std::int64_t x = 0; x < 64; ++x) {
        base.k[key * 64 + x] = base.v[key * 64 + x] = x % 2 == 0 ? 0x1.8p127F : -0x1.8p127F;
      }
    }
    check(backward_problem(base));
  }
}

// Rounding up carries such a NaN into its sign: p or dS would be zero.
TEST_P(AmxBackward, NanOfAllOnesStaysNan) {
  const std::uint32_t ones[] = {0x7fffffffU, 0xffffffffU};
  for (const std::uint32_t& bits : ones) {
    Problem base = normal_problem({64, 64}, 100, 32);
    base.rule.bias = true;
    base.bias.assign(base.rows * base.keys, 0);
    BackwardProblem p = backward_problem(base);
    std::memcpy(&p.bias[3 * p.keys + 7], &bits, 4);
    std::memcpy(&p.lse[5], &bits, 4), std::memcpy(&p.delta[6], &bits, 4);
    const Expected want = expected(p);
    expect_close(p, run(*kernel_, p), want);
  }
}

}  // namespace
}  // namespace annulus
#endif
