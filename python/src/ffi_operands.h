// The arrays of one call from XLA, by their names, and the axes that vmap put in front of them.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "annulus/tensor.h"
#include "ffi_frame.h"

namespace annulus::python {

enum class Slot : std::uint8_t {
  kQuery,
  kKey,
  kValue,
  kDout,
  kOut,
  kLse,
  kDlse,
  kQSegmentIds,
  kKvSegmentIds,
  kKvLengths,
  kAttentionMask,
  kBias,
  kSoftmaxAux,
  kDropoutSeed,
  kDq,
  kDk,
  kDv,
  kDsoftmaxAux,
  kDbias,
  kRank,
  kGroup,
  kCount,
};

// "query,key": the slots' names in the order of a call's arrays. Throws InternalError for others.
std::vector<Slot> slots_named(std::string_view names);

// vmap gives every array the same number of axes in front, each as long as the mapped axis or 1.
// One set of indices along them is one call.
class FfiOperands {
 public:
  FfiOperands(const std::vector<Slot>& arguments, const std::vector<FfiBuffer>& buffers,
              const std::vector<Slot>& results, const std::vector<FfiBuffer>& result_buffers,
              const char* operation);

  [[nodiscard]] bool given(Slot slot) const { return at(slot).data != nullptr; }
  // int64 becomes int32. Throws InvalidArgument for numbers that do not fit.
  void narrow_integers();
  // Calls that the mapped axes make.
  [[nodiscard]] std::int64_t count() const;
  // Turns the mapped axes into more batch rows where no option tells one call's rows from
  // another's, so that all calls become one. `dropped`: by their batch index, among others.
  void fold(bool dropped);

  // Of call number `call`; no data where the slot is not given.
  [[nodiscard]] MutableTensorView view(Slot slot, std::int64_t call) const;
  // A number that all calls share. Throws InvalidArgument naming `what` if vmap gave each its own.
  [[nodiscard]] std::int32_t scalar(Slot slot, const char* what) const;
  [[nodiscard]] std::uint64_t seed(std::int64_t call) const;

 private:
  struct Tensor {
    std::byte* data = nullptr;
    DType dtype = DType::kFloat32;
    std::int64_t elements = 0;  // of all calls
    std::array<std::int64_t, 4> shape{}, strides{};
    std::vector<std::int64_t> mapped_strides;  // 0 where the axis is 1 long
    bool mapped = false;                       // along some axis
  };

  [[nodiscard]] const Tensor& at(Slot slot) const {
    return tensors_[static_cast<std::size_t>(slot)];
  }
  [[nodiscard]] Tensor& at(Slot slot) { return tensors_[static_cast<std::size_t>(slot)]; }
  void add(Slot slot, const FfiBuffer& buffer);
  [[nodiscard]] bool foldable(Slot slot) const;
  [[nodiscard]] std::byte* address(const Tensor& tensor, std::int64_t call) const;

  const char* operation_;
  std::vector<std::int64_t> mapped_;  // lengths of the mapped axes
  std::array<Tensor, static_cast<std::size_t>(Slot::kCount)> tensors_{};
  std::vector<std::unique_ptr<std::vector<std::int32_t>>> narrowed_;
};

}  // namespace annulus::python
