#include "ops/problem.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/fail.h"
#include "base/half.h"

namespace annulus {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::int64_t elements(const TensorView& t) {
  std::int64_t n = 1;
  for (const std::int64_t extent : t.shape) {
    if (__builtin_mul_overflow(n, extent, &n)) return std::numeric_limits<std::int64_t>::max();
  }
  return n;
}

class Checker {
 public:
  Checker(std::string operation, bool writes) : operation_(std::move(operation)), writes_(writes) {}

  template <class... Parts>
  void require(bool ok, const Parts&... parts) const {
    if (!ok) fail(operation_, parts...);
  }

  void tensor(const char* what, const TensorView& t,
              const std::array<std::int64_t, 4>& expected) const {
    require(std::all_of(t.shape.begin(), t.shape.end(), [](std::int64_t n) { return n >= 0; }),
            what, " has a negative extent in ", to_string(t.shape));
    require(t.shape == expected, what, " has shape ", to_string(t.shape), ", expected ",
            to_string(expected));
    const bool needs_data = elements(t) > 0 && writes_;
    require(!needs_data || t.data != nullptr, what, " has no data");
  }

  void dtype(const char* what, DType found, std::initializer_list<DType> accepted) const {
    if (std::find(accepted.begin(), accepted.end(), found) != accepted.end()) return;
    std::string names;
    for (const DType d : accepted) names += (names.empty() ? "" : " or ") + std::string(name(d));
    fail(operation_, what, " has type ", name(found), ", expected ", names);
  }

  // Extent 1 is broadcast on the first two axes.
  void broadcast(const char* what, TensorView& t, std::int64_t batch, std::int64_t heads,
                 std::int64_t q_rows, std::int64_t kv_len) const {
    require((t.shape[0] == batch || t.shape[0] == 1) && (t.shape[1] == heads || t.shape[1] == 1) &&
                t.shape[2] == q_rows && t.shape[3] == kv_len,
            what, " has shape ", to_string(t.shape), ", expected [", batch, " or 1, ", heads,
            " or 1, ", q_rows, ", ", kv_len, "]");
    if (t.shape[0] == 1) t.strides[0] = 0;
    if (t.shape[1] == 1) t.strides[1] = 0;
  }

 private:
  std::string operation_;
  bool writes_;
};

// Bytes [first, last) that a view touches.
struct Extent {
  std::uintptr_t first = 0, last = 0;
};
Extent extent_of(const TensorView& t) {
  if (t.data == nullptr || elements(t) == 0) return {};
  std::int64_t low = 0, high = 0;
  for (std::size_t axis = 0; axis < 4; ++axis) {
    const std::int64_t reach = (t.shape[axis] - 1) * t.strides[axis];
    (reach < 0 ? low : high) += reach;
  }
  const auto base = reinterpret_cast<std::uintptr_t>(t.data);
  const std::int64_t size = size_bytes(t.dtype);
  return {base + static_cast<std::uintptr_t>(low * size),
          base + static_cast<std::uintptr_t>((high + 1) * size)};
}

struct NamedView {
  const char* name;
  TensorView view;
};

void check_outputs(const Checker& check, const Problem& p) {
  const Gradients& g = p.gradients;
  const std::vector<NamedView> outputs{{"out", p.out},    {"lse", p.lse},
                                       {"dq", g.dq},      {"dk", g.dk},
                                       {"dv", g.dv},      {"dsoftmax_aux", g.dsoftmax_aux},
                                       {"dbias", g.dbias}};
  const std::vector<NamedView> inputs{
      {"q", p.q},       {"k", p.k},           {"v", p.v},           {"bias", p.bias},
      {"dout", p.dout}, {"out", p.given_out}, {"lse", p.given_lse}, {"dlse", p.gradients.dlse}};
  const auto apart = [&](const NamedView& a, const NamedView& b) {
    const Extent x = extent_of(a.view), y = extent_of(b.view);
    check.require(x.first == x.last || y.first == y.last || x.last <= y.first || y.last <= x.first,
                  a.name, " overlaps ", b.name, " in memory: pass separate tensors");
  };
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const TensorView& t = outputs[i].view;
    for (std::size_t axis = 0; axis < 4; ++axis) {
      check.require(t.shape[axis] <= 1 || t.strides[axis] != 0 || elements(t) == 0, outputs[i].name,
                    " has stride 0 on axis ", axis, ": rows would overwrite each other");
    }
    for (std::size_t j = i + 1; j < outputs.size(); ++j) apart(outputs[i], outputs[j]);
    for (const NamedView& input : inputs) apart(outputs[i], input);
  }
}

void check_tensors(const Checker& check, Problem& p) {
  check.dtype("q", p.q.dtype, {DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  check.dtype("k", p.k.dtype, {p.q.dtype});
  check.dtype("v", p.v.dtype, {p.q.dtype});
  const std::int64_t rows = p.q.shape[1], keys = p.k.shape[1];
  p.batch = p.q.shape[0], p.num_heads = p.q.shape[2], p.num_kv_heads = p.k.shape[2];
  p.dims = {p.q.shape[3], p.v.shape[3]};
  check.tensor("q", p.q, {p.batch, rows, p.num_heads, p.dims.head_dim});
  check.tensor("k", p.k, {p.batch, keys, p.num_kv_heads, p.dims.head_dim});
  check.tensor("v", p.v, {p.batch, keys, p.num_kv_heads, p.dims.v_head_dim});
  check.require(p.dims.head_dim > 0 && p.dims.v_head_dim > 0, "head_dim is ", p.dims.head_dim,
                " and v_head_dim ", p.dims.v_head_dim, ", expected at least 1");
  if (p.num_heads > 0) {
    check.require(p.num_kv_heads > 0 && p.num_heads % p.num_kv_heads == 0, "num_heads (",
                  p.num_heads, ") is not a multiple of num_kv_heads (", p.num_kv_heads, ")");
    p.group = p.num_heads / p.num_kv_heads;
  }
}

void check_rows(const Checker& check, const Problem& p, const CallTensors& tensors) {
  const std::int64_t rows = p.q.shape[1];
  const auto out_like = [&](const char* what, const TensorView& t) {
    check.dtype(what, t.dtype, {p.q.dtype, DType::kFloat32});
    check.tensor(what, t, {p.batch, rows, p.num_heads, p.dims.v_head_dim});
  };
  const auto lse_like = [&](const char* what, const TensorView& t) {
    check.dtype(what, t.dtype, {DType::kFloat32});
    check.tensor(what, t, {p.batch, rows, p.num_heads, 1});
  };
  if (tensors.backward_alone()) {
    out_like("out", p.given_out), lse_like("lse", p.given_lse);
  } else {
    out_like("out", p.out);
    if (p.lse) lse_like("lse", p.lse);
  }
  if (tensors.backward) out_like("dout", p.dout);
  if (p.gradients.dlse) lse_like("dlse", p.gradients.dlse);
}

// Each gradient is like its primal.
void check_gradients(const Checker& check, const Problem& p, const AttentionOptions& options) {
  const Gradients& g = p.gradients;
  const auto like = [&](const char* what, const TensorView& t, const TensorView& primal) {
    check.dtype(what, t.dtype, {primal.dtype, DType::kFloat32});
    check.tensor(what, t, primal.shape);
  };
  like("dq", g.dq, p.q), like("dk", g.dk, p.k), like("dv", g.dv, p.v);
  if (g.dsoftmax_aux) {
    check.require(static_cast<bool>(options.softmax_aux),
                  "dsoftmax_aux is asked for without softmax_aux");
    like("dsoftmax_aux", g.dsoftmax_aux, options.softmax_aux);
  }
  if (g.dbias) {
    check.require(static_cast<bool>(options.bias), "dbias is asked for without bias");
    like("dbias", g.dbias, options.bias);
  }
}

// One mask per head if they differ, else one.
std::vector<Mask> position_masks(const Checker& check, const Problem& p,
                                 const AttentionOptions& o) {
  check.require(o.chunk_size >= 0, "chunk_size is ", o.chunk_size, ", expected at least 0");
  const std::int64_t left = o.sliding_window.left, right = o.sliding_window.right;
  check.require(left >= -1 && right >= -1, "sliding_window is (", left, ", ", right,
                "), expected -1 (unlimited) or more");
  const std::int64_t shift =
      o.causal_alignment == CausalAlignment::kBottomRight ? p.kv_len - p.q_len : 0;
  Mask common;
  if (o.causal) common = common & Mask::causal(shift);
  if (left >= 0 || right >= 0) common = common & Mask::sliding_window(left, right, shift);
  if (o.chunk_size > 0) common = common & Mask::chunked(o.chunk_size);
  if (!o.mask_builder) return {common};
  std::vector<Mask> masks;
  for (std::int64_t head = 0; head < p.num_heads; ++head) {
    masks.push_back(common & o.mask_builder(p.q_len, p.kv_len, p.num_heads, head, p.group));
  }
  return masks;
}

void set_segments(const Checker& check, Problem& p, const AttentionOptions& o,
                  Visibility::Rules& rules) {
  p.q_segment_ids = o.q_segment_ids, p.kv_segment_ids = o.kv_segment_ids;
  const bool one = static_cast<bool>(p.q_segment_ids) != static_cast<bool>(p.kv_segment_ids);
  if (one) {
    check.require(
        p.q_len == p.kv_len,
        "only one of q_segment_ids and kv_segment_ids is given, which serves both only if q_len (",
        p.q_len, ") equals kv_len (", p.kv_len, ")");
    (p.q_segment_ids ? p.kv_segment_ids : p.q_segment_ids) =
        p.q_segment_ids ? p.q_segment_ids : p.kv_segment_ids;
  }
  rules.segments = static_cast<bool>(p.q_segment_ids);
  check.require(rules.segments || !o.padding_segment_id,
                "padding_segment_id is given without segment ids");
  if (!rules.segments) return;
  check.dtype("q_segment_ids", p.q_segment_ids.dtype, {DType::kInt32});
  check.dtype("kv_segment_ids", p.kv_segment_ids.dtype, {DType::kInt32});
  check.tensor("q_segment_ids", p.q_segment_ids, {p.batch, p.q.shape[1], 1, 1});
  check.tensor("kv_segment_ids", p.kv_segment_ids, {p.batch, p.k.shape[1], 1, 1});
  rules.padding_segment_id = o.padding_segment_id;
}

void set_visibility(const Checker& check, Problem& p, const AttentionOptions& o) {
  Visibility::Rules rules;
  rules.masks = position_masks(check, p, o);
  set_segments(check, p, o, rules);
  if (o.kv_lengths) {
    check.dtype("kv_lengths", o.kv_lengths.dtype, {DType::kInt32});
    check.tensor("kv_lengths", o.kv_lengths, {p.batch, 1, 1, 1});
    for (std::int64_t b = 0; b < p.batch; ++b) {
      const auto length =
          static_cast<std::int64_t>(load_element(DType::kInt32, o.kv_lengths.at(b, 0, 0, 0)));
      check.require(length >= 0, "kv_lengths[", b, "] is ", length, ", expected at least 0");
      rules.kv_lengths.push_back(length);
    }
  }
  if (o.attention_mask) {
    rules.attention_mask = o.attention_mask;
    check.dtype("attention_mask", o.attention_mask.dtype, {DType::kBool, DType::kUInt8});
    check.broadcast("attention_mask", rules.attention_mask, p.batch, p.num_heads, p.q.shape[1],
                    p.kv_len);
  }
  p.visibility = Visibility(std::move(rules));
}

// softmax_aux -> one number per head.
std::vector<float> head_sinks(const Checker& check, const Problem& p, const TensorView& aux) {
  std::vector<float> sinks(static_cast<std::size_t>(p.num_heads),
                           -std::numeric_limits<float>::infinity());
  if (!aux) return sinks;
  check.dtype("softmax_aux", aux.dtype, {DType::kFloat32});
  const std::int64_t rows = aux.shape[0], columns = aux.shape[1];
  const bool rank_one = columns == 0, per_head = !rank_one || rows == p.num_heads;
  check.require(rank_one || rows == p.num_heads, "softmax_aux has shape [", rows, ", ", columns,
                "], expected [num_heads = ", p.num_heads, ", n], [num_heads] or [num_sinks]");
  for (std::int64_t h = 0; h < p.num_heads; ++h) {
    const std::int64_t n = rank_one ? (per_head ? 1 : rows) : columns;
    double top = -kInfinity, sum = 0;
    const auto sink = [&](std::int64_t i) {
      const std::byte* at = rank_one ? aux.at(per_head ? h : i, 0, 0, 0) : aux.at(h, i, 0, 0);
      return load_element(DType::kFloat32, at);
    };
    for (std::int64_t i = 0; i < n; ++i)
      top = std::isnan(sink(i)) ? sink(i) : std::max(top, sink(i));
    for (std::int64_t i = 0; i < n; ++i) sum += top == -kInfinity ? 0 : std::exp(sink(i) - top);
    sinks[static_cast<std::size_t>(h)] =
        static_cast<float>(top == -kInfinity ? -kInfinity : top + std::log(sum));
  }
  return sinks;
}

void set_blocks(const Checker& check, Problem& p, const AttentionOptions& options) {
  const auto size = [&](const char* what, std::int64_t value) {
    check.require(value >= 0, what, " is ", value,
                  ", expected a number of rows, or 0 for the kernel's choice");
  };
  p.forward_blocks = options.forward_blocks, p.backward_blocks = options.backward_blocks;
  size("forward_blocks.q", p.forward_blocks.q), size("forward_blocks.kv", p.forward_blocks.kv);
  size("backward_blocks.q", p.backward_blocks.q), size("backward_blocks.kv", p.backward_blocks.kv);
}

}  // namespace

Problem make_problem(const std::string& operation, const CallTensors& tensors,
                     const AttentionOptions& options, std::int64_t q_len, std::int64_t kv_len,
                     bool writes) {
  const Checker check(operation, writes);
  Problem p;
  p.q = tensors.q, p.k = tensors.k, p.v = tensors.v, p.out = tensors.out, p.lse = tensors.lse;
  p.given_out = tensors.given_out, p.given_lse = tensors.given_lse;
  p.dout = tensors.dout, p.gradients = tensors.gradients;
  p.q_len = q_len, p.kv_len = kv_len;
  check_tensors(check, p);
  check_rows(check, p, tensors);
  set_visibility(check, p, options);
  const double scale =
      options.softmax_scale.value_or(1 / std::sqrt(static_cast<double>(p.dims.head_dim)));
  check.require(std::isfinite(scale), "softmax_scale is ", scale, ", expected a finite number");
  check.require(options.logits_soft_cap >= 0 && std::isfinite(options.logits_soft_cap),
                "logits_soft_cap is ", options.logits_soft_cap,
                ", expected a positive number, or 0 for none");
  check.require(options.threads >= 0, "threads is ", options.threads, ", expected at least 0");
  set_blocks(check, p, options);
  check.require(options.dropout_prob >= 0 && options.dropout_prob < 1, "dropout_prob is ",
                options.dropout_prob, ", expected at least 0 and below 1");
  p.rule = {static_cast<float>(scale), static_cast<float>(options.logits_soft_cap),
            static_cast<bool>(options.bias), static_cast<float>(1 / (1 - options.dropout_prob)),
            options.dropout_prob > 0};
  p.dropout = {options.dropout_seed,
               static_cast<std::uint64_t>(std::ceil(options.dropout_prob * 0x1p32))};
  if (options.bias) {
    p.bias = options.bias;
    check.dtype("bias", p.bias.dtype, {DType::kFloat32, p.q.dtype});
    check.broadcast("bias", p.bias, p.batch, p.num_heads, p.q.shape[1], kv_len);
  }
  p.softmax_aux = options.softmax_aux;
  p.sinks = head_sinks(check, p, options.softmax_aux);
  if (tensors.backward) check_gradients(check, p, options);
  if (writes) check_outputs(check, p);
  return p;
}

std::string describe_mask(const Problem& problem) {
  const Visibility::Rules& rules = problem.visibility.rules();
  std::string text = rules.masks.size() > 1 ? "one mask per head, the first: " : "";
  std::vector<std::string> parts;
  if (rules.masks.empty() || !rules.masks[0].is_full())
    parts.push_back(rules.masks.empty() ? "full" : rules.masks[0].describe());
  if (rules.segments) parts.emplace_back("same segment");
  if (!rules.kv_lengths.empty()) parts.emplace_back("kv_lengths");
  if (rules.attention_mask) parts.emplace_back("attention_mask");
  if (parts.empty()) parts.emplace_back("full");
  for (std::size_t i = 0; i < parts.size(); ++i) text += (i > 0 ? " & " : "") + parts[i];
  return text;
}

std::vector<std::string> signature(const Problem& p, const AttentionOptions& o) {
  std::vector<std::string> fields;
  const auto add = [&](const char* field, const auto& value) {
    fields.push_back(concat(field, "=", value));
  };
  add("batch", p.batch), add("num_heads", p.num_heads), add("num_kv_heads", p.num_kv_heads);
  add("head_dim", p.dims.head_dim), add("v_head_dim", p.dims.v_head_dim),
      add("dtype", name(p.q.dtype));
  add("softmax_scale", p.rule.scale), add("logits_soft_cap", p.rule.cap), add("bias", p.rule.bias);
  add("dropout_prob", o.dropout_prob), add("dropout_seed", o.dropout_prob > 0 ? o.dropout_seed : 0);
  add("mask", describe_mask(p)), add("softmax_aux", static_cast<bool>(o.softmax_aux));
  add("padding_segment_id", o.padding_segment_id ? std::to_string(*o.padding_segment_id) : "none");
  return fields;
}

}  // namespace annulus
