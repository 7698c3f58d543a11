#include "options.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <cmath>
#include <cstring>
#include <optional>

#include "refusal.h"

namespace annulus::python {
namespace {

// The value of a keyword; none where it is absent or None.
nb::object given(const nb::dict& kwargs, const char* name) {
  PyObject* value = PyDict_GetItemString(kwargs.ptr(), name);
  return value == nullptr || value == Py_None ? nb::object() : nb::borrow(value);
}

template <class T>
T number(const Options& options, nb::handle value, const char* name, const char* expected) {
  // bool is an int to Python; as a number of anything it is a mistake.
  nb::object plain = nb::borrow(value);
  if (!PyBool_Check(value.ptr()) && nb::hasattr(value, "item")) plain = value.attr("item")();
  T result{};
  if (PyBool_Check(plain.ptr()) || !nb::try_cast(plain, result)) {
    refuse(options.operation(), name, " is ", nb::repr(value).c_str(), ", expected ", expected);
  }
  return result;
}

// Whole numbers arrive as floats from some tools; 4.0 is 4.
std::int64_t integer(const Options& options, nb::handle value, const char* name) {
  if (PyLong_Check(value.ptr()) && !PyBool_Check(value.ptr())) {
    std::int64_t result = 0;
    if (nb::try_cast(value, result)) return result;
  }
  const auto real = number<double>(options, value, name, "an integer");
  if (std::nearbyint(real) != real || std::abs(real) > 0x1p62)
    refuse(options.operation(), name, " is ", nb::repr(value).c_str(), ", expected an integer");
  return static_cast<std::int64_t>(real);
}

bool flag(const Options& options, nb::handle value, const char* name) {
  const int truth = PyBool_Check(value.ptr()) || nb::hasattr(value, "__bool__")
                        ? PyObject_IsTrue(value.ptr())
                        : -1;
  if (truth >= 0) return truth == 1;
  PyErr_Clear();
  refuse(options.operation(), name, " is ", nb::repr(value).c_str(), ", expected True or False");
}

template <class Choice>
Choice chosen(const Options& options, nb::handle value, const char* name,
              std::initializer_list<std::pair<const char*, Choice>> choices) {
  std::string known;
  for (const auto& [text, choice] : choices) {
    if (nb::isinstance<nb::str>(value) && nb::cast<std::string>(value) == text) return choice;
    known += (known.empty() ? "'" : " or '") + std::string(text) + "'";
  }
  refuse(options.operation(), name, " is ", nb::repr(value).c_str(), ", expected ", known);
}

std::int64_t window_side(const Options& options, nb::handle value) {
  return value.is_none() ? -1 : integer(options, value, "sliding_window");
}

SlidingWindow window(const Options& options, nb::handle value) {
  if (!nb::isinstance<nb::tuple>(value) && !nb::isinstance<nb::list>(value)) {
    const std::int64_t both = window_side(options, value);
    return {both, both};
  }
  const nb::sequence sides = nb::borrow<nb::sequence>(value);
  if (nb::len(sides) != 2) {
    refuse(options.operation(), "sliding_window is ", nb::repr(value).c_str(),
           ", expected an integer or (left, right)");
  }
  return {window_side(options, sides[0]), window_side(options, sides[1])};
}

// Calls back into Python from wherever the library asks. Shared, because std::function copies and
// the last copy must be dropped with the GIL held.
MaskBuilder mask_builder(const std::string& operation, const nb::object& callable) {
  const std::shared_ptr<nb::object> held(new nb::object(callable), [](nb::object* object) {
    const nb::gil_scoped_acquire gil;
    delete object;
  });
  return [operation, held](std::int64_t q_len, std::int64_t kv_len, std::int64_t num_heads,
                           std::int64_t head, std::int64_t num_reps) {
    const nb::gil_scoped_acquire gil;
    nb::object mask = (*held)(q_len, kv_len, num_heads, head, num_reps);
    if (nb::hasattr(mask, "_mask")) mask = mask.attr("_mask");
    if (!nb::isinstance<Mask>(mask)) {
      refuse(operation.c_str(), "mask_builder returned ", nb::repr(mask).c_str(), " for head ",
             head, ", expected an annulus.Mask");
    }
    return nb::cast<Mask>(mask);
  };
}

}  // namespace

Options::Options(std::string operation, const nb::dict& kwargs) : operation_(std::move(operation)) {
  read_masks(kwargs);
  read_arithmetic(kwargs);
  read_ring(kwargs);
}

std::vector<std::int64_t> Options::softmax_aux_shape() const {
  const TensorView& aux = ring_.attention.softmax_aux;
  if (aux.shape[1] == 0) return {aux.shape[0]};
  return {aux.shape[0], aux.shape[1]};
}

TensorView Options::array(const nb::dict& kwargs, const char* name, std::int64_t rank,
                          const char* axes, std::initializer_list<DType> accepted) {
  const nb::object value = given(kwargs, name);
  if (!value.is_valid()) return {};
  Array array(value, {operation(), name});
  array.require_rank(rank, axes);
  array.require_dtype(accepted);
  arrays_.push_back(std::move(array));
  return arrays_.back().view();
}

TensorView Options::integers(const nb::dict& kwargs, const char* name, std::int64_t rank,
                             const char* axes) {
  const TensorView view = array(kwargs, name, rank, axes, {DType::kInt32, DType::kInt64});
  if (!view || view.dtype == DType::kInt32) return view;
  arrays_.back() = arrays_.back().narrowed();
  copies_.push_back(std::string(name) + " is copied: int64 becomes int32");
  return arrays_.back().view();
}

void Options::read_masks(const nb::dict& kwargs) {
  AttentionOptions& a = ring_.attention;
  if (const auto value = given(kwargs, "causal"); value.is_valid())
    a.causal = flag(*this, value, "causal");
  if (const auto value = given(kwargs, "causal_alignment"); value.is_valid()) {
    a.causal_alignment = chosen<CausalAlignment>(
        *this, value, "causal_alignment",
        {{"bottom_right", CausalAlignment::kBottomRight}, {"top_left", CausalAlignment::kTopLeft}});
  }
  if (const auto value = given(kwargs, "sliding_window"); value.is_valid())
    a.sliding_window = window(*this, value);
  if (const auto value = given(kwargs, "chunk_size"); value.is_valid()) {
    a.chunk_size = integer(*this, value, "chunk_size");
    if (a.chunk_size < 1)
      refuse(operation(), "chunk_size is ", a.chunk_size, ", expected at least 1 or None");
  }
  a.q_segment_ids = integers(kwargs, "q_segment_ids", 2, "[batch, q_len]");
  a.kv_segment_ids = integers(kwargs, "kv_segment_ids", 2, "[batch, kv_len]");
  if (const auto value = given(kwargs, "padding_segment_id"); value.is_valid()) {
    const std::int64_t id = integer(*this, value, "padding_segment_id");
    a.padding_segment_id = static_cast<std::int32_t>(id);
    if (*a.padding_segment_id != id)
      refuse(operation(), "padding_segment_id is ", id, ", which int32 cannot hold");
  }
  a.kv_lengths = integers(kwargs, "kv_lengths", 1, "[batch]");
  a.attention_mask = array(kwargs, "attention_mask", 4, "[batch or 1, heads or 1, q_len, kv_len]",
                           {DType::kBool, DType::kUInt8});
  if (const auto value = given(kwargs, "mask_builder"); value.is_valid()) {
    if (nb::isinstance<Mask>(value)) {
      const auto mask = nb::cast<Mask>(value);
      a.mask_builder = [mask](auto...) { return mask; };
    } else if (PyCallable_Check(value.ptr()) != 0) {
      a.mask_builder = mask_builder(operation_, value);
    } else {
      refuse(operation(), "mask_builder is ", nb::repr(value).c_str(),
             ", expected a function (q_len, kv_len, num_heads, head, num_reps) -> Mask, or a Mask");
    }
  }
}

void Options::read_arithmetic(const nb::dict& kwargs) {
  AttentionOptions& a = ring_.attention;
  if (const auto value = given(kwargs, "softmax_scale"); value.is_valid()) {
    a.softmax_scale = number<double>(*this, value, "softmax_scale", "a number");
  }
  if (const auto value = given(kwargs, "logits_soft_cap"); value.is_valid()) {
    a.logits_soft_cap = number<double>(*this, value, "logits_soft_cap", "a number");
    if (!(a.logits_soft_cap > 0))
      refuse(operation(), "logits_soft_cap is ", a.logits_soft_cap, ", expected above 0, or None");
  }
  if (const auto value = given(kwargs, "softmax_aux"); value.is_valid()) {
    Array aux(value, {operation(), "softmax_aux"});
    aux.require_dtype({DType::kFloat32});
    arrays_.push_back(std::move(aux));
    a.softmax_aux = arrays_.back().sinks_view();
  }
  a.bias = array(kwargs, "bias", 4, "[batch or 1, heads or 1, q_len, kv_len]",
                 {DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  if (const auto value = given(kwargs, "dropout_prob"); value.is_valid()) {
    a.dropout_prob = number<double>(*this, value, "dropout_prob", "a number in [0, 1)");
  }
  if (const auto value = given(kwargs, "dropout_seed"); value.is_valid()) {
    nb::object seed = value;
    if (!PyLong_Check(seed.ptr()) && nb::hasattr(seed, "item")) seed = seed.attr("item")();
    if (!nb::try_cast(seed, a.dropout_seed)) {
      refuse(operation(), "dropout_seed is ", nb::repr(value).c_str(),
             ", expected an integer of 64 bits without a sign");
    }
  }
}

void Options::read_ring(const nb::dict& kwargs) {
  if (const auto value = given(kwargs, "partition"); value.is_valid()) {
    if (nb::isinstance<Partition>(value)) {
      ring_.partition = nb::cast<Partition>(value);
    } else {
      ring_.partition = chosen<Partition>(*this, value, "partition",
                                          {{"contiguous", Partition::contiguous()},
                                           {"striped", Partition::striped()},
                                           {"zigzag", Partition::zigzag()}});
    }
  }
  if (const auto value = given(kwargs, "topology"); value.is_valid()) {
    ring_.topology = chosen<Topology>(*this, value, "topology",
                                      {{"ring", Topology::kRing}, {"linear", Topology::kLinear}});
  }
  const auto blocks = [&](const char* name, BlockSizes& sizes) {
    const nb::object value = given(kwargs, name);
    if (!value.is_valid()) return;
    const auto [q, kv] = nb::cast<std::pair<std::int64_t, std::int64_t>>(value);
    sizes = {q, kv};
  };
  blocks("fwd_params", ring_.attention.forward_blocks);
  blocks("bwd_params", ring_.attention.backward_blocks);
  if (const auto value = given(kwargs, "fused_backward"); value.is_valid())
    ring_.fused_backward = flag(*this, value, "fused_backward");
}

}  // namespace annulus::python
