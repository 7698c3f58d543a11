// The tensors and options of a cell of the grid.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "annulus/bars.h"
#include "annulus/ring.h"
#include "base/half.h"
#include "grid_testing.h"
#include "testing.h"

namespace annulus::testing {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

template <class Visit>
void for_each_index(const std::array<std::int64_t, 4>& shape, const Visit& visit) {
  for (std::int64_t a = 0; a < shape[0]; ++a)
    for (std::int64_t b = 0; b < shape[1]; ++b)
      for (std::int64_t c = 0; c < shape[2]; ++c)
        for (std::int64_t d = 0; d < shape[3]; ++d) visit(a, b, c, d);
}

// A tensor that may lie inside a larger one of NaN, which nobody may touch.
class Box {
 public:
  Box() = default;
  Box(DType dtype, std::array<std::int64_t, 4> shape, Layout layout, bool embedded)
      : store_(dtype, outer(shape, embedded), layout), shape_(shape), embedded_(embedded) {
    store_.fill([](auto...) { return kNan; });
  }
  [[nodiscard]] MutableTensorView mutable_view() {
    MutableTensorView view = store_.mutable_view();
    if (embedded_) view.data = view.at(0, 1, 0, 2);
    view.shape = shape_;
    return view;
  }
  [[nodiscard]] TensorView view() const { return const_cast<Box*>(this)->mutable_view(); }
  operator TensorView() const { return view(); }  // NOLINT: reads as a view everywhere
  [[nodiscard]] double get(std::int64_t a, std::int64_t b, std::int64_t c, std::int64_t d) const {
    const TensorView t = view();
    return load_element(t.dtype, t.at(a, b, c, d));
  }
  void set(std::int64_t a, std::int64_t b, std::int64_t c, std::int64_t d, double value) {
    const MutableTensorView t = mutable_view();
    store_element(t.dtype, t.at(a, b, c, d), value);
  }
  template <class Value>
  Box& fill(const Value& value) {
    for_each_index(shape_, [&](auto... at) { set(at..., value(at...)); });
    return *this;
  }
  Box& normal(std::mt19937_64& random, bool outliers = false) {
    std::normal_distribution<double> gauss;
    return fill([&](auto...) {
      const double x = gauss(random);
      return outliers && random() % 1000 == 0 ? 10 * x : x;
    });
  }
  [[nodiscard]] const std::vector<std::byte>& bytes() const { return store_.bytes(); }
  // Elements around the tensor that are no longer NaN.
  [[nodiscard]] std::int64_t touched() const {
    std::int64_t count = 0;
    if (!embedded_) return 0;
    for_each_index(store_.shape(), [&](std::int64_t a, std::int64_t b, std::int64_t c,
                                       std::int64_t d) {
      const bool inside = b >= 1 && b <= shape_[1] && c < shape_[2] && d >= 2 && d < shape_[3] + 2;
      if (!inside && !std::isnan(store_.get(a, b, c, d))) ++count;
    });
    return count;
  }

 private:
  static std::array<std::int64_t, 4> outer(std::array<std::int64_t, 4> shape, bool embedded) {
    if (embedded) shape[1] += 2, shape[2] += 1, shape[3] += 5;
    return shape;
  }
  Tensor store_;
  std::array<std::int64_t, 4> shape_{};
  bool embedded_ = false;
};

inline DType dtype_of(const Cell& cell) {
  if (cell.is(kDType, "bfloat16")) return DType::kBFloat16;
  return cell.is(kDType, "float16") ? DType::kFloat16 : DType::kFloat32;
}

// As many tokens as the oracle judges in about twenty milliseconds.
inline Shape grid_shape(const Cell& cell) {
  Shape s;
  s.batch = cell.number(kBatch);
  std::tie(s.heads, s.kv_heads) = cell.numbers(kHeads);
  std::tie(s.head_dim, s.v_head_dim) = cell.numbers(kDims);
  constexpr double kBudget = 5e5;
  const double per_pair = static_cast<double>(s.batch * s.heads * (s.head_dim + s.v_head_dim + 20));
  const auto most = static_cast<std::int64_t>(std::sqrt(kBudget / per_pair));
  const std::int64_t even = std::clamp<std::int64_t>(most / 2 * 2, 10, 144), odd = even - 1;
  s.q_len = s.kv_len = odd;
  if (cell.is(kLengths, "even")) s.q_len = s.kv_len = even;
  if (cell.is(kLengths, "q_short")) s.q_len = odd / 3 + 1, s.kv_len = even;
  if (cell.is(kLengths, "q_long")) s.q_len = even, s.kv_len = odd / 3 + 1;
  if (cell.is(kLengths, "few")) s.q_len = 3, s.kv_len = 2;
  if (cell.is(kLengths, "no_queries")) s.q_len = 0;
  if (cell.is(kLengths, "no_keys")) s.kv_len = 0;
  if (cell.is(kLengths, "one")) s.q_len = s.kv_len = 1;
  return s;
}

inline Partition random_partition(int workers, std::int64_t len, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::vector<std::int64_t>> positions(static_cast<std::size_t>(workers));
  for (std::int64_t i = 0; i < len; ++i)
    positions[random() % static_cast<std::uint64_t>(workers)].push_back(i);
  for (auto& list : positions) std::shuffle(list.begin(), list.end(), random);
  return Partition::from_positions(positions);
}

// What options point to.
struct Rules {
  Tensor q_ids, kv_ids, lengths, mask, sinks, dsinks;
  Box bias, dbias;
};

class GridProblem {
 public:
  explicit GridProblem(const Cell& of)
      : cell(of), shape(grid_shape(of)), dtype(dtype_of(of)), random_(of.seed) {
    make_tensors();
    make_visibility();
    make_arithmetic();
    make_ring();
    hide();
  }
  GridProblem(const GridProblem&) = delete;
  GridProblem& operator=(const GridProblem&) = delete;

  Gradients gradients() {
    Gradients g{dq.mutable_view(), dk.mutable_view(), dv.mutable_view(), {}, {}};
    if (cell.is(kWantDSinks, "yes")) {
      g.dsoftmax_aux = rules.dsinks.mutable_view();
      g.dsoftmax_aux.shape = options.attention.softmax_aux.shape;
    }
    if (cell.is(kWantDBias, "yes")) g.dbias = rules.dbias.mutable_view();
    if (cell.is(kWithDLse, "yes")) g.dlse = dlse;
    return g;
  }

  Cell cell;
  Shape shape;
  DType dtype;
  Box q, k, v, dout, dlse, out, lse, dq, dk, dv;
  Rules rules;
  RingOptions options;
  int workers = 1;
  std::int64_t visible_pairs = 0;

 private:
  DType chosen(Factor f) const { return cell.is(f, "float32") ? DType::kFloat32 : dtype; }

  Box box(DType type, const std::array<std::int64_t, 4>& extents) {
    static constexpr Layout kLayouts[] = {Layout::kBshd, Layout::kBhsd, Layout::kBhds};
    const bool mixed = cell.is(kLayout, "mixed") || cell.is(kLayout, "embedded");
    const std::size_t layout =
        mixed ? random_() % 3 : static_cast<std::size_t>(cell.value[kLayout]);
    return {type, extents, kLayouts[layout], cell.is(kLayout, "embedded")};
  }

  void make_tensors() {
    const Shape& s = shape;
    const std::array<std::int64_t, 4> rows{s.batch, s.q_len, s.heads, s.v_head_dim};
    q = box(dtype, {s.batch, s.q_len, s.heads, s.head_dim});
    k = box(dtype, {s.batch, s.kv_len, s.kv_heads, s.head_dim});
    v = box(dtype, {s.batch, s.kv_len, s.kv_heads, s.v_head_dim});
    out = box(chosen(kOutDType), rows), dout = box(chosen(kDoutDType), rows);
    lse = box(DType::kFloat32, {s.batch, s.q_len, s.heads, 1});
    dlse = box(DType::kFloat32, lse.view().shape);
    dq = box(chosen(kGradientDType), q.view().shape);
    dk = box(chosen(kGradientDType), k.view().shape);
    dv = box(chosen(kGradientDType), v.view().shape);
    const bool outliers = cell.is(kInput, "outliers");
    for (Box* t : {&q, &k, &v, &dout, &dlse}) t->normal(random_, outliers);
    if (cell.is(kInput, "large")) {
      const Box before = q;
      q.fill([&](auto... at) { return 8 * before.get(at...); });
    }
    if (cell.is(kInput, "growing")) {
      q.fill([&](auto...) { return 1 + 0.1 * unit(); });
      k.fill([&](std::int64_t, std::int64_t j, auto...) {
        return 0.1 * unit() + 4.0 * static_cast<double>(j) / std::sqrt(double(s.head_dim)) /
                                  static_cast<double>(s.kv_len);
      });
    }
  }

  // In [-1, 1].
  double unit() { return std::uniform_real_distribution<double>(-1, 1)(random_); }

  void make_visibility() {
    AttentionOptions& a = options.attention;
    const std::int64_t n = std::max<std::int64_t>(shape.kv_len, shape.q_len);
    const std::string& mask = cell.get(kMask);
    a.causal = mask.starts_with("causal");
    if (cell.is(kAlignment, "top_left")) a.causal_alignment = CausalAlignment::kTopLeft;
    if (mask == "window_left") a.sliding_window = {n / 4, -1};
    if (mask == "window_right") a.sliding_window = {-1, n / 6};
    if (mask == "window" || mask == "causal_window") a.sliding_window = {n / 3, n / 8};
    if (mask == "chunked" || mask == "causal_chunked") a.chunk_size = n / 3 + 1;
    if (mask == "prefix") {
      a.mask_builder = [n](auto...) { return Mask::prefix(n / 3) | Mask::causal(); };
    }
    if (mask == "per_head") a.mask_builder = per_head;
    if (mask == "block_sparse") make_block_sparse();
    if (mask == "attention_mask") make_dense_mask();
    make_segments();
    if (cell.is(kKvLengths, "none")) return;
    rules.lengths = Tensor(DType::kInt32, {shape.batch, 1, 1, 1});
    const bool zero = cell.is(kKvLengths, "some_zero");
    rules.lengths.fill([&](std::int64_t b, auto...) {
      if (b == 1) return static_cast<double>(zero ? 0 : shape.kv_len + 3);
      return static_cast<double>(shape.kv_len * (b + 2) / 4);
    });
    a.kv_lengths = rules.lengths;
  }

  static Mask per_head(std::int64_t q_len, std::int64_t kv_len, std::int64_t, std::int64_t head,
                       std::int64_t) {
    const std::int64_t n = std::max(q_len, kv_len);
    switch (head % 5) {
      case 0:
        return Mask::causal(kv_len - q_len);
      case 1:
        return Mask::sliding_window(n / 5, n / 9) | Mask::prefix(3);
      case 2:
        return Mask::chunked(n / 4 + 1) | Mask::sliding_window(0, 1, 2);
      case 3:
        return Mask::prefix(0);
      default:
        return Mask::full();
    }
  }

  void make_block_sparse() {
    const std::int64_t block = 1 + static_cast<std::int64_t>(random_() % 20);
    const std::int64_t q_blocks = (shape.q_len + block - 1) / block;
    const std::int64_t kv_blocks = (shape.kv_len + block - 1) / block;
    std::vector<std::uint8_t> visible(static_cast<std::size_t>(q_blocks * kv_blocks));
    for (std::uint8_t& entry : visible) entry = random_() % 2 == 0;
    const Mask mask = Mask::block_sparse(block, q_blocks, kv_blocks, std::move(visible));
    options.attention.mask_builder = [mask](auto...) { return mask; };
  }

  void make_dense_mask() {
    const bool per_batch = random_() % 2 == 0, by_head = random_() % 2 == 0;
    rules.mask =
        Tensor(random_() % 2 == 0 ? DType::kBool : DType::kUInt8,
               {per_batch ? shape.batch : 1, by_head ? shape.heads : 1, shape.q_len, shape.kv_len});
    rules.mask.fill([&](auto...) { return random_() % 3 == 0; });
    options.attention.attention_mask = rules.mask;
  }

  void make_segments() {
    AttentionOptions& a = options.attention;
    if (cell.is(kSegments, "none")) return;
    const bool padding = cell.is(kSegments, "padding");
    const auto ids = [&](Tensor& to, std::int64_t len, std::int64_t offset) {
      to = Tensor(DType::kInt32, {shape.batch, len, 1, 1});
      to.fill([&](std::int64_t b, std::int64_t t, auto...) -> double {
        const bool pad = padding && (t >= len - len / 8 || (t + b) % 11 == 3);
        if (pad) return -7;
        // Documents of 3, 5, 7, ... tokens; else runs that differ per batch row.
        if (cell.is(kSegments, "documents"))
          return std::floor(std::sqrt(static_cast<double>(t + 1 + b)));
        return static_cast<double>((t + 5 * b + offset) * 4 / (len + 3));
      });
    };
    ids(rules.q_ids, shape.q_len, 0), ids(rules.kv_ids, shape.kv_len, 2);
    const bool one = cell.is(kSegments, "one"), only_kv = one && random_() % 2 == 0;
    if (!only_kv) a.q_segment_ids = rules.q_ids;
    if (!one || only_kv) a.kv_segment_ids = rules.kv_ids;
    if (padding) a.padding_segment_id = -7;
  }

  void make_arithmetic() {
    AttentionOptions& a = options.attention;
    if (cell.is_not(kScale, "default")) a.softmax_scale = std::stod(cell.get(kScale));
    if (cell.is(kCap, "3")) a.logits_soft_cap = 3;
    a.dropout_prob = std::stod(cell.get(kDropout));
    a.dropout_seed = cell.seed * 0x9e3779b97f4a7c15U;
    a.threads = static_cast<int>(cell.number(kThreads));
    std::tie(a.forward_blocks.q, a.forward_blocks.kv) = cell.numbers(kForwardBlocks);
    std::tie(a.backward_blocks.q, a.backward_blocks.kv) = cell.numbers(kBackwardBlocks);
    if (cell.is_not(kTarget, "default")) a.isa = cell.get(kTarget);
    make_sinks();
    make_bias();
  }

  void make_sinks() {
    if (cell.is(kSinks, "none")) return;
    const bool several = cell.is(kSinks, "several"), shared = cell.is(kSinks, "shared");
    const std::int64_t n = shared ? shape.heads + 2 : shape.heads;
    const std::array<std::int64_t, 4> extents{n, several ? 3 : 1, 1, 1};
    rules.sinks = Tensor(DType::kFloat32, extents);
    rules.dsinks = Tensor(DType::kFloat32, extents);
    rules.dsinks.fill([](auto...) { return kNan; });
    rules.sinks.fill([&](std::int64_t h, std::int64_t i, auto...) {
      return several && (h + i) % 3 == 1 ? -INFINITY : (shared ? 1 : 5) + unit();
    });
    options.attention.softmax_aux = rules.sinks;
    if (!several) options.attention.softmax_aux.shape[1] = 0;
  }

  void make_bias() {
    if (cell.is(kBias, "none")) return;
    const std::int64_t b = cell.is(kBias, "one_batch") || cell.is(kBias, "one") ? 1 : shape.batch;
    const std::int64_t h = cell.is(kBias, "one_head") || cell.is(kBias, "one") ? 1 : shape.heads;
    const DType type = cell.is(kBias, "narrow") ? dtype : DType::kFloat32;
    const std::array<std::int64_t, 4> extents{b, h, shape.q_len, shape.kv_len};
    rules.bias = box(type, extents).normal(random_);
    const bool wide = cell.is(kGradientDType, "float32");
    rules.dbias = box(wide ? DType::kFloat32 : type, extents);
    options.attention.bias = rules.bias;
  }

  void make_ring() {
    workers = static_cast<int>(cell.number(kWorkers));
    const auto partition = [&](const std::string& name, std::int64_t len, std::uint64_t salt) {
      return name == "random" ? random_partition(workers, len, cell.seed + salt)
                              : Partition::from_name(name);
    };
    options.partition = partition(cell.get(kPartition), shape.q_len, 1);
    if (cell.is_not(kKvPartition, "same"))
      options.kv_partition = partition(cell.get(kKvPartition), shape.kv_len, 2);
    options.topology = cell.is(kTopology, "ring") ? Topology::kRing : Topology::kLinear;
    options.ring_backward = static_cast<RingBackward>(cell.value[kTravel]);
    options.fused_backward = cell.is(kFused, "yes");
    options.workers.lend = cell.is(kTransfer, "lend");
  }

  // NaN or Inf wherever nobody looks.
  void hide() {
    const Shape& s = shape;
    const reference::Oracle oracle(q, k, v, options.attention);
    Tensor seen(DType::kBool, {s.batch, s.heads, s.q_len, s.kv_len});
    for_each_index({s.batch, s.q_len, s.heads, 1},
                   [&](std::int64_t b, std::int64_t i, std::int64_t h, std::int64_t) {
                     for (const std::int64_t j : oracle.inputs({b, i, h}).keys) {
                       seen.set(b, h, i, j, 1);
                       ++visible_pairs;
                     }
                   });
    if (!cell.get(kInput).starts_with("hidden")) return;
    const double poison = cell.is(kInput, "hidden_nan") ? kNan : -INFINITY;
    const auto any = [&](std::array<std::int64_t, 2> b, std::array<std::int64_t, 2> h,
                         std::array<std::int64_t, 2> i, std::array<std::int64_t, 2> j) {
      bool found = false;
      for_each_index({b[1] - b[0], h[1] - h[0], i[1] - i[0], j[1] - j[0]},
                     [&](std::int64_t w, std::int64_t x, std::int64_t y, std::int64_t z) {
                       const std::byte* at = seen.view().at(b[0] + w, h[0] + x, i[0] + y, j[0] + z);
                       found = found || *at != std::byte{0};
                     });
      return found;
    };
    const auto hide_in = [&](Box& box, const auto& is_seen) {
      const Box before = box;
      box.fill([&](std::int64_t a, std::int64_t b, std::int64_t c, std::int64_t d) {
        return is_seen(a, b, c, d) ? before.get(a, b, c, d) : poison;
      });
    };
    const std::int64_t group = s.heads / s.kv_heads;
    std::vector<std::uint8_t> key_seen, row_seen;
    for_each_index({s.batch, s.kv_len, s.kv_heads, 1}, [&](std::int64_t b, std::int64_t j,
                                                           std::int64_t h, std::int64_t) {
      key_seen.push_back(any({b, b + 1}, {h * group, h * group + group}, {0, s.q_len}, {j, j + 1}));
    });
    for_each_index({s.batch, s.q_len, s.heads, 1},
                   [&](std::int64_t b, std::int64_t i, std::int64_t h, std::int64_t) {
                     row_seen.push_back(any({b, b + 1}, {h, h + 1}, {i, i + 1}, {0, s.kv_len}));
                   });
    const auto key = [&](std::int64_t b, std::int64_t j, std::int64_t h, std::int64_t) {
      return key_seen[static_cast<std::size_t>((b * s.kv_len + j) * s.kv_heads + h)] != 0;
    };
    const auto row = [&](std::int64_t b, std::int64_t i, std::int64_t h, std::int64_t) {
      return row_seen[static_cast<std::size_t>((b * s.q_len + i) * s.heads + h)] != 0;
    };
    hide_in(k, key), hide_in(v, key), hide_in(q, row), hide_in(dout, row);
    if (!options.attention.bias) return;
    const auto& extents = options.attention.bias.shape;
    hide_in(rules.bias, [&](std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) {
      return any({b, extents[0] == 1 ? s.batch : b + 1}, {h, extents[1] == 1 ? s.heads : h + 1},
                 {i, i + 1}, {j, j + 1});
    });
  }

  std::mt19937_64 random_;
};

}  // namespace annulus::testing
