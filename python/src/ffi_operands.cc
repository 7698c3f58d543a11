#include "ffi_operands.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>

#include "annulus/error.h"
#include "arrays.h"
#include "refusal.h"

namespace annulus::python {
namespace {

enum class Axes : std::uint8_t { kRows, kLse, kPerToken, kPerBatch, kSinks, kSeed, kScalar };

struct NamedSlot {
  Slot slot;
  std::string_view name;
  Axes axes;
};
constexpr NamedSlot kSlots[] = {
    {Slot::kQuery, "query", Axes::kRows},
    {Slot::kKey, "key", Axes::kRows},
    {Slot::kValue, "value", Axes::kRows},
    {Slot::kDout, "dout", Axes::kRows},
    {Slot::kOut, "out", Axes::kRows},
    {Slot::kLse, "lse", Axes::kLse},
    {Slot::kDlse, "dlse", Axes::kLse},
    {Slot::kQSegmentIds, "q_segment_ids", Axes::kPerToken},
    {Slot::kKvSegmentIds, "kv_segment_ids", Axes::kPerToken},
    {Slot::kKvLengths, "kv_lengths", Axes::kPerBatch},
    {Slot::kAttentionMask, "attention_mask", Axes::kRows},
    {Slot::kBias, "bias", Axes::kRows},
    {Slot::kSoftmaxAux, "softmax_aux", Axes::kSinks},
    {Slot::kDropoutSeed, "dropout_seed", Axes::kSeed},
    {Slot::kDq, "dq", Axes::kRows},
    {Slot::kDk, "dk", Axes::kRows},
    {Slot::kDv, "dv", Axes::kRows},
    {Slot::kDsoftmaxAux, "dsoftmax_aux", Axes::kSinks},
    {Slot::kDbias, "dbias", Axes::kRows},
    {Slot::kRank, "rank", Axes::kScalar},
    {Slot::kGroup, "group", Axes::kScalar},
};
constexpr bool in_order() {
  for (std::size_t i = 0; i < std::size(kSlots); ++i)
    if (static_cast<std::size_t>(kSlots[i].slot) != i) return false;
  return std::size(kSlots) == static_cast<std::size_t>(Slot::kCount);
}
static_assert(in_order());

const NamedSlot& entry(Slot slot) { return kSlots[static_cast<std::size_t>(slot)]; }

// Axes of one call's array; of sinks, what the mapped axes leave.
std::int64_t rank_of(Slot slot, const FfiBuffer& buffer, std::int64_t mapped) {
  switch (entry(slot).axes) {
    case Axes::kRows:
      return 4;
    case Axes::kLse:
      return 3;
    case Axes::kPerToken:
      return 2;
    case Axes::kPerBatch:
    case Axes::kSeed:
      return 1;
    case Axes::kSinks:
      return buffer.rank() - mapped;
    case Axes::kScalar:
      break;
  }
  return 0;
}

std::int64_t product(const std::vector<std::int64_t>& extents) {
  return std::accumulate(extents.begin(), extents.end(), std::int64_t{1}, std::multiplies<>());
}

}  // namespace

std::vector<Slot> slots_named(std::string_view names) {
  std::vector<Slot> slots;
  while (!names.empty()) {
    const std::string_view name = names.substr(0, names.find(','));
    const auto* found = std::find_if(std::begin(kSlots), std::end(kSlots),
                                     [&](const NamedSlot& s) { return s.name == name; });
    if (found == std::end(kSlots))
      throw InternalError("annulus.jax: no array is named '" + std::string(name) + "'");
    slots.push_back(found->slot);
    names.remove_prefix(std::min(names.size(), name.size() + 1));
  }
  return slots;
}

FfiOperands::FfiOperands(const std::vector<Slot>& arguments, const std::vector<FfiBuffer>& buffers,
                         const std::vector<Slot>& results,
                         const std::vector<FfiBuffer>& result_buffers, const char* operation)
    : operation_(operation) {
  if (arguments.size() != buffers.size() || results.size() != result_buffers.size() ||
      result_buffers.empty() || result_buffers[0].rank() < 4)
    throw InternalError("annulus.jax: the program passes other arrays than it names");
  // Results are mapped along every axis; the first has four axes of its own.
  const auto& dims = result_buffers[0].dims;
  mapped_.assign(dims.begin(), dims.end() - 4);
  for (std::size_t i = 0; i < arguments.size(); ++i) add(arguments[i], buffers[i]);
  for (std::size_t i = 0; i < results.size(); ++i) add(results[i], result_buffers[i]);
}

void FfiOperands::add(Slot slot, const FfiBuffer& buffer) {
  const auto front = static_cast<std::int64_t>(mapped_.size());
  const std::int64_t rank = rank_of(slot, buffer, front);
  if (buffer.rank() != front + rank || rank > 4)
    throw InternalError("annulus.jax: " + std::string(entry(slot).name) + " has " +
                        std::to_string(buffer.rank()) + " axes");
  Tensor& tensor = at(slot);
  tensor.data = static_cast<std::byte*>(buffer.data), tensor.dtype = buffer.dtype;
  tensor.elements = product(buffer.dims);
  std::vector<std::int64_t> strides(buffer.dims.size(), 1);
  for (std::size_t axis = strides.size(); axis-- > 1;)
    strides[axis - 1] = strides[axis] * buffer.dims[axis];
  tensor.mapped_strides.assign(strides.begin(), strides.begin() + front);
  for (std::size_t axis = 0; axis < mapped_.size(); ++axis) {
    const bool single = buffer.dims[axis] == 1;
    if (single) tensor.mapped_strides[axis] = 0;
    tensor.mapped = tensor.mapped || (!single && mapped_[axis] > 1);
  }
  tensor.shape = {1, 1, 1, 1};
  std::copy(buffer.dims.begin() + front, buffer.dims.end(), tensor.shape.begin());
  std::copy(strides.begin() + front, strides.end(), tensor.strides.begin());
  if (entry(slot).axes == Axes::kLse)
    std::swap(tensor.shape[1], tensor.shape[2]), std::swap(tensor.strides[1], tensor.strides[2]);
  if (entry(slot).axes == Axes::kSinks && rank == 1) tensor.shape[1] = 0;
}

void FfiOperands::narrow_integers() {
  for (const NamedSlot& named : kSlots) {
    Tensor& tensor = at(named.slot);
    if (!given(named.slot) || tensor.dtype != DType::kInt64) continue;
    const auto size = static_cast<std::size_t>(tensor.elements);
    std::vector<std::int32_t>& narrowed = *narrowed_.emplace_back(
        std::make_unique<std::vector<std::int32_t>>(std::max<std::size_t>(size, 1)));
    narrow({tensor.data, DType::kInt64, {tensor.elements, 1, 1, 1}, {1, 1, 1, 1}},
           {operation_, named.name.data()}, narrowed.data());
    tensor.data = reinterpret_cast<std::byte*>(narrowed.data()), tensor.dtype = DType::kInt32;
  }
}

std::int64_t FfiOperands::count() const { return product(mapped_); }

// May all calls' arrays of this slot be read as one with more batch rows?
bool FfiOperands::foldable(Slot slot) const {
  const Tensor& tensor = at(slot);
  switch (entry(slot).axes) {
    case Axes::kSeed:
    case Axes::kScalar:
      return true;
    case Axes::kSinks:
      return !tensor.mapped;
    default:
      break;
  }
  const std::int64_t batch = at(Slot::kQuery).shape[0];
  const bool everywhere = std::none_of(tensor.mapped_strides.begin(), tensor.mapped_strides.end(),
                                       [](std::int64_t stride) { return stride == 0; });
  // A bias that is repeated in memory has one gradient, the sum.
  const bool repeatable = batch == 1 && !(slot == Slot::kBias && given(Slot::kDbias));
  if (tensor.shape[0] == batch) return everywhere || (!tensor.mapped && repeatable);
  return !tensor.mapped;  // one row for the whole batch, whatever its size
}

void FfiOperands::fold(bool dropped) {
  const std::int64_t calls = count();
  if (mapped_.empty() || calls < 2 || dropped) return;
  const auto any = [&](auto wrong) {
    return std::any_of(std::begin(kSlots), std::end(kSlots),
                       [&](const NamedSlot& s) { return given(s.slot) && wrong(s.slot); });
  };
  if (any([&](Slot slot) { return !foldable(slot); })) return;
  const std::int64_t batch = at(Slot::kQuery).shape[0];
  for (const NamedSlot& named : kSlots) {
    Tensor& tensor = at(named.slot);
    tensor.mapped_strides.clear();
    if (!given(named.slot) || named.axes == Axes::kSinks || named.axes == Axes::kSeed ||
        named.axes == Axes::kScalar || tensor.shape[0] != batch)
      continue;
    if (!tensor.mapped) tensor.strides[0] = 0;
    tensor.shape[0] *= calls;
  }
  mapped_.clear();
}

std::byte* FfiOperands::address(const Tensor& tensor, std::int64_t call) const {
  std::int64_t offset = 0;
  for (std::size_t axis = mapped_.size(); axis-- > 0; call /= mapped_[axis])
    offset += call % mapped_[axis] * tensor.mapped_strides[axis];
  return tensor.data + offset * size_bytes(tensor.dtype);
}

MutableTensorView FfiOperands::view(Slot slot, std::int64_t call) const {
  const Tensor& tensor = at(slot);
  if (tensor.data == nullptr) return {};
  return {address(tensor, call), tensor.dtype, tensor.shape, tensor.strides};
}

std::int32_t FfiOperands::scalar(Slot slot, const char* what) const {
  const Tensor& tensor = at(slot);
  if (tensor.mapped)
    refuse_with_fix("use shard_map for the ring's axis", operation_, what, " is mapped by vmap");
  std::int32_t value = 0;
  std::memcpy(&value, tensor.data, sizeof value);
  return value;
}

std::uint64_t FfiOperands::seed(std::int64_t call) const {
  std::uint32_t words[2];  // the low one first
  std::memcpy(words, address(at(Slot::kDropoutSeed), call), sizeof words);
  return std::uint64_t{words[1]} << 32 | words[0];
}

}  // namespace annulus::python
