#include "inputs.h"

#include <algorithm>
#include <cstring>

#include "failure.h"
#include "numbers.h"
#include "parallel.h"
#include "process.h"
#include "text.h"

namespace annulus::tools {
namespace {

// Who uses a tensor name. Names of other operations are known, but here an error: the result would
// silently lack them.
struct KnownTensor {
  const char* name;
  const char* other;  // where it belongs; null: used here, or harmless
};

constexpr KnownTensor kKnown[] = {
    {"q", nullptr},
    {"k", nullptr},
    {"v", nullptr},
    {"q_segment_ids", nullptr},
    {"kv_segment_ids", nullptr},
    {"softmax_aux", nullptr},
    {"bias", nullptr},
    {"attention_mask", nullptr},
    {"kv_lengths", nullptr},
    // One file may serve forward and backward, and every partition.
    {"dout", nullptr},
    {"positions", nullptr},
    {"kv_positions", nullptr},
    {"joint_q", "--op=joint"},
    {"joint_k", "--op=joint"},
    {"joint_v", "--op=joint"},
    {"joint_dout", "--op=joint"},
    {"k_cache", "--op=chunked"},
    {"v_cache", "--op=chunked"},
    {"page_table", "--op=chunked"},
    {"chunk_start_idx", "--op=chunked"},
    {"k_scales", "--op=chunked"},
    {"v_scales", "--op=chunked"},
};

// One axis that a shape must have: a value, perhaps 1 instead, or any (-1), under its name.
struct Axis {
  std::string name;
  std::int64_t extent = -1;
  bool or_one = false;

  [[nodiscard]] bool accepts(std::int64_t found) const {
    return extent < 0 || found == extent || (or_one && found == 1);
  }
  [[nodiscard]] std::string text() const {
    std::string what = extent < 0 ? name : fmt::format("{} = {}", name, extent);
    return or_one ? what + " or 1" : what;
  }
};

std::string text_of(const std::vector<Axis>& axes) {
  std::vector<std::string> parts;
  parts.reserve(axes.size());
  for (const Axis& axis : axes) parts.push_back(axis.text());
  return fmt::format("[{}]", fmt::join(parts, ", "));
}

class FileTensors {
 public:
  FileTensors(const SafetensorsFile& file, std::string path)
      : file_(file), path_(std::move(path)) {}

  void check_names(bool ignore_extra) const {
    std::vector<std::string> known;
    for (const KnownTensor& tensor : kKnown) known.emplace_back(tensor.name);
    for (const NamedTensor& tensor : file_.tensors()) {
      if (ignore_extra) return;
      const auto* found = std::find_if(std::begin(kKnown), std::end(kKnown),
                                       [&](const KnownTensor& k) { return tensor.name == k.name; });
      if (found == std::end(kKnown)) {
        const std::string close = nearest(tensor.name, known);
        fail(close.empty() ? "rename it, or pass --ignore-extra"
                           : "did you mean " + close + "? Else pass --ignore-extra",
             "{}: unknown tensor '{}'; known are {}", path_, tensor.name, fmt::join(known, ", "));
      }
      if (found->other != nullptr) {
        fail("pass --ignore-extra to compute without it",
             "{}: tensor '{}' belongs to {}, not to --op=attention", path_, tensor.name,
             found->other);
      }
    }
  }

  [[nodiscard]] const NamedTensor* find(const std::string& name) const { return file_.find(name); }

  const NamedTensor& require(const std::string& name) const {
    const NamedTensor* tensor = file_.find(name);
    if (tensor != nullptr) return *tensor;
    std::vector<std::string> names;
    for (const NamedTensor& other : file_.tensors()) names.push_back(other.name);
    fail(fmt::format("store the tensor under the name '{}'", name),
         "{}: tensor '{}' is missing; the file holds {}", path_, name,
         names.empty() ? "nothing" : fmt::format("{}", fmt::join(names, ", ")));
  }

  // Checks before dtype_of(): a dtype that does not fit here is the caller's mistake, not a broken
  // file.
  DType dtype(const NamedTensor& tensor, const std::vector<DType>& accepted) const {
    std::vector<std::string> names;
    for (const DType dtype : accepted) {
      if (tensor.file_dtype == file_dtype_of(dtype)) return dtype;
      names.push_back(file_dtype_of(dtype));
    }
    fail(fmt::format("store '{}' as {}", tensor.name, names.front()),
         "{}: tensor '{}' has dtype {}, expected {}", path_, tensor.name, tensor.file_dtype,
         fmt::join(names, " or "));
  }

  void shape(const NamedTensor& tensor, const std::vector<std::vector<Axis>>& accepted) const {
    std::vector<std::string> texts;
    for (const std::vector<Axis>& axes : accepted) {
      texts.push_back(text_of(axes));
      if (axes.size() != tensor.shape.size()) continue;
      bool fits = true;
      for (std::size_t i = 0; i < axes.size(); ++i) fits &= axes[i].accepts(tensor.shape[i]);
      if (fits) return;
    }
    fail(
        "--layout=bshd, bhsd or bhds says how q, k and v are stored; reshape the tensor if it is "
        "none of these",
        "{}: tensor '{}' has shape {}, expected {}", path_, tensor.name, shape_text(tensor.shape),
        fmt::join(texts, " or "));
  }

  // An optional tensor with up to four row-major axes.
  TensorView optional(const char* name, const std::vector<DType>& dtypes,
                      const std::vector<std::vector<Axis>>& accepted) const {
    const NamedTensor* tensor = find(name);
    if (tensor == nullptr) return {};
    TensorView view;
    view.dtype = dtype(*tensor, dtypes);
    shape(*tensor, accepted);
    view.data = tensor->data;
    view.shape = {1, 1, 1, 1};
    std::copy(tensor->shape.begin(), tensor->shape.end(), view.shape.begin());
    view.strides = row_major_strides(view.shape);
    return view;
  }

 private:
  const SafetensorsFile& file_;
  std::string path_;
};

// [batch, seq, heads, dim] in the order of the layout.
std::vector<Axis> attention_axes(Layout stored, const Axis& batch, const Axis& seq,
                                 const Axis& heads, const Axis& dim) {
  if (stored == Layout::kBshd) return {batch, seq, heads, dim};
  if (stored == Layout::kBhsd) return {batch, heads, seq, dim};
  return {batch, heads, dim, seq};
}

void take_qkv(Inputs& inputs, const FileTensors& file, Layout layout) {
  const Layout qk = file_layout(layout, Role::kQueryOrKey),
               vo = file_layout(layout, Role::kValueOrOut);
  const auto take = [&](const char* name, Layout stored, const std::vector<DType>& dtypes,
                        const Axis& batch, const Axis& seq, const Axis& heads, const Axis& dim) {
    const NamedTensor& tensor = file.require(name);
    const DType dtype = file.dtype(tensor, dtypes);
    file.shape(tensor, {attention_axes(stored, batch, seq, heads, dim)});
    return dense_view(tensor.data, dtype, logical_shape(tensor.shape, stored), stored);
  };
  inputs.q = take("q", qk, {DType::kBFloat16, DType::kFloat16, DType::kFloat32}, {"batch"},
                  {"q_len"}, {"num_heads"}, {"head_dim"});
  const auto [batch, q_len, heads, dim] = inputs.q.shape;
  inputs.k = take("k", qk, {inputs.q.dtype}, {"batch", batch}, {"kv_len"}, {"num_kv_heads"},
                  {"head_dim", dim});
  inputs.v = take("v", vo, {inputs.q.dtype}, {"batch", batch}, {"kv_len", inputs.k.shape[1]},
                  {"num_kv_heads", inputs.k.shape[2]}, {"v_head_dim"});
}

// Like out, in the dtype of q or float32.
void take_dout(Inputs& inputs, const FileTensors& file, Layout layout) {
  const Layout stored = file_layout(layout, Role::kValueOrOut);
  const auto [batch, q_len, heads, dim] = inputs.q.shape;
  const NamedTensor& tensor = file.require("dout");
  std::vector<DType> dtypes{inputs.q.dtype};
  if (inputs.q.dtype != DType::kFloat32) dtypes.push_back(DType::kFloat32);
  const DType dtype = file.dtype(tensor, dtypes);
  file.shape(tensor, {attention_axes(stored, {"batch", batch}, {"q_len", q_len},
                                     {"num_heads", heads}, {"v_head_dim", inputs.v.shape[3]})});
  inputs.dout = dense_view(tensor.data, dtype, logical_shape(tensor.shape, stored), stored);
}

void take_optional(Inputs& inputs, const FileTensors& file) {
  const auto [batch, q_len, heads, dim] = inputs.q.shape;
  const std::int64_t kv_len = inputs.k.shape[1];
  const auto ids = std::vector<DType>{DType::kInt32};
  inputs.q_segment_ids =
      file.optional("q_segment_ids", ids, {{{"batch", batch}, {"q_len", q_len}}});
  inputs.kv_segment_ids =
      file.optional("kv_segment_ids", ids, {{{"batch", batch}, {"kv_len", kv_len}}});
  inputs.kv_lengths = file.optional("kv_lengths", ids, {{{"batch", batch}}});
  const std::vector<Axis> pairs{
      {"batch", batch, true}, {"heads", heads, true}, {"q_len", q_len}, {"kv_len", kv_len}};
  std::vector<DType> bias_dtypes{DType::kFloat32};
  if (inputs.q.dtype != DType::kFloat32) bias_dtypes.push_back(inputs.q.dtype);
  inputs.bias = file.optional("bias", bias_dtypes, {pairs});
  inputs.attention_mask = file.optional("attention_mask", {DType::kBool, DType::kUInt8}, {pairs});
  inputs.softmax_aux =
      file.optional("softmax_aux", {DType::kFloat32}, {{{"n"}}, {{"heads", heads}, {"n"}}});
  if (inputs.softmax_aux && file.find("softmax_aux")->shape.size() == 1) {
    inputs.softmax_aux.shape[1] = 0;  // how the interface says "rank one"
    inputs.softmax_aux.strides = {1, 1, 1, 1};
  }
}

// Rows of [world_size, rows], each without its -1 entries.
std::optional<std::vector<std::vector<std::int64_t>>> take_positions(const FileTensors& file,
                                                                     const char* name) {
  const TensorView view = file.optional(name, {DType::kInt64}, {{{"world_size"}, {"rows"}}});
  if (!view) return {};
  std::vector<std::vector<std::int64_t>> positions(static_cast<std::size_t>(view.shape[0]));
  for (std::int64_t rank = 0; rank < view.shape[0]; ++rank) {
    for (std::int64_t i = 0; i < view.shape[1]; ++i) {
      const auto position = load<std::int64_t>(view.at(rank, i, 0, 0));
      if (position < -1) {
        fail("write -1 where a rank has no row",
             "tensor '{}' at [{}, {}] is {}, expected a position or -1", name, rank, i, position);
      }
      if (position >= 0) positions[static_cast<std::size_t>(rank)].push_back(position);
    }
  }
  return positions;
}

Inputs read_inputs(const Options& options) {
  for (const char* name : {"--batch", "--tokens", "--kv-tokens", "--heads", "--kv-heads",
                           "--head-dim", "--v-head-dim", "--dtype", "--seed"}) {
    if (!options.was_given(name)) continue;
    fail(fmt::format("leave out {} or INPUT", name), "{} makes inputs, but INPUT {} brings its own",
         name, options.input);
  }
  Inputs inputs;
  inputs.file = SafetensorsFile::open(options.input);
  const FileTensors file(*inputs.file, options.input);
  file.check_names(options.ignore_extra);
  take_qkv(inputs, file, layout_from_name(options.layout));
  take_optional(inputs, file);
  if (options.backward) take_dout(inputs, file, layout_from_name(options.layout));
  if (options.dbias) file.require("bias");
  if (options.partition == "positions") {
    file.require("positions");
    inputs.positions = take_positions(file, "positions");
    inputs.kv_positions = take_positions(file, "kv_positions");
  }
  for (const NamedTensor& tensor : inputs.file->tensors()) inputs.bytes += tensor.bytes;
  return inputs;
}

// Without INPUT: shapes alone.
Inputs lay_out_inputs(const Options& options) {
  if (options.partition == "positions") {
    fail("store int64 'positions' [world_size, rows] in INPUT",
         "--partition=positions needs an INPUT with positions");
  }
  if (options.ignore_extra)
    fail("leave it out", "--ignore-extra is about INPUT, but there is none");
  if (options.dbias) {
    fail("store 'bias' [batch or 1, heads or 1, q, kv] in INPUT, or leave out --dbias",
         "--dbias needs an INPUT with bias");
  }
  const DType dtype = dtype_from_name(options.dtype);
  const Layout layout = layout_from_name(options.layout);
  const std::int64_t kv_heads = options.kv_heads.value_or(options.heads);
  const std::int64_t kv_len = options.kv_tokens.value_or(options.tokens);
  const Shape q{options.batch, options.tokens, options.heads, options.head_dim};
  const Shape k{options.batch, kv_len, kv_heads, options.head_dim};
  const Shape v{options.batch, kv_len, kv_heads, options.v_head_dim.value_or(options.head_dim)};
  const Shape out{q[0], q[1], q[2], v[3]};
  Inputs inputs;
  std::vector<std::pair<const char*, Shape>> made{{"q", q}, {"k", k}, {"v", v}};
  if (options.backward) made.emplace_back("dout", out);
  for (const auto& [name, shape] : made) {
    const std::int64_t bytes = checked_bytes(name, shape, dtype);
    if (__builtin_add_overflow(inputs.bytes, bytes, &inputs.bytes)) {
      fail("ask for smaller extents", "the sizes of the inputs do not fit 63 bits");
    }
  }
  inputs.q = dense_view(nullptr, dtype, q, file_layout(layout, Role::kQueryOrKey));
  inputs.k = dense_view(nullptr, dtype, k, file_layout(layout, Role::kQueryOrKey));
  inputs.v = dense_view(nullptr, dtype, v, file_layout(layout, Role::kValueOrOut));
  if (options.backward)
    inputs.dout = dense_view(nullptr, dtype, out, file_layout(layout, Role::kValueOrOut));
  return inputs;
}

std::uint64_t mixed(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31);
}

}  // namespace

Inputs open_inputs(const Options& options) {
  return options.input.empty() ? lay_out_inputs(options) : read_inputs(options);
}

void fill_normal(std::byte* to, DType dtype, std::int64_t count, std::uint64_t seed,
                 std::uint64_t tensor, int threads) {
  constexpr std::int64_t kBlock =
      1 << 16;  // numbers: a few milliseconds between two looks at the stop flag
  constexpr float kTwoPi = 6.2831853F;
  const std::uint64_t stream = mixed(mixed(seed + 0x9e3779b97f4a7c15U) + tensor);
  const std::int64_t size = size_bytes(dtype);
  parallel_for((count + kBlock - 1) / kBlock, threads, [&](std::int64_t block) {
    check_stop();
    const std::int64_t end = std::min(count, (block + 1) * kBlock);
    for (std::int64_t i = block * kBlock; i < end; i += 2) {
      // One hash, two uniform numbers of 24 bits, two normal ones (Box and Muller).
      const std::uint64_t bits =
          mixed(stream + 0x9e3779b97f4a7c15U * static_cast<std::uint64_t>(i / 2 + 1));
      const float above_zero = (static_cast<float>(bits >> 40) + 1.0F) * 0x1p-24F;
      const float angle = kTwoPi * static_cast<float>(bits & 0xffffffU) * 0x1p-24F;
      const float radius = std::sqrt(-2.0F * std::log(above_zero));
      store_number(to + i * size, dtype, radius * std::cos(angle));
      if (i + 1 < end) store_number(to + (i + 1) * size, dtype, radius * std::sin(angle));
    }
  });
}

void make_inputs(Inputs& inputs, std::uint64_t seed, int threads) {
  std::uint64_t tensor = 0;
  std::vector<TensorView*> views{&inputs.q, &inputs.k, &inputs.v};
  if (inputs.dout) views.push_back(&*inputs.dout);
  for (TensorView* view : views) {
    const auto [b, s, h, d] = view->shape;
    const std::int64_t count = b * s * h * d;
    inputs.made.emplace_back(count * size_bytes(view->dtype));
    view->data = inputs.made.back().data();
    fill_normal(inputs.made.back().data(), view->dtype, count, seed, tensor++, threads);
  }
}

}  // namespace annulus::tools
