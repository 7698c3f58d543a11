// Arrays of NumPy, PyTorch, JAX and whatever else speaks DLPack, as views: nothing is copied.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "annulus/tensor.h"

namespace annulus::python {

namespace nb = nanobind;

// Which argument of which operation: errors name both.
struct Argument {
  const char* operation;
  const char* name;
};

// What an array will be, where a program is compiled for it before there is one: arguments of this
// type are read as arrays of zeros.
struct ArraySpec {
  std::string dtype;
  std::vector<std::int64_t> shape;
};

// An array at hand and what keeps its memory alive. Copyable; must be dropped with the GIL held.
class Array {
 public:
  Array() = default;
  // Throws InvalidArgument that says what to do: not an array, another device, a tracer of jax, a
  // dtype Annulus has no name for, read-only where it is to be written.
  Array(nb::handle object, const Argument& argument, bool writable = false);

  [[nodiscard]] std::int64_t rank() const { return static_cast<std::int64_t>(shape_.size()); }
  [[nodiscard]] std::int64_t extent(std::size_t axis) const { return shape_[axis]; }
  [[nodiscard]] DType dtype() const { return dtype_; }
  // Throws InvalidArgument unless the rank is `rank`; `axes` names them for the error.
  void require_rank(std::int64_t rank, const char* axes) const;
  void require_dtype(std::initializer_list<DType> accepted) const;

  // The axes in order; those the array does not have are 1 long.
  [[nodiscard]] MutableTensorView view() const;
  // [batch, heads, seq] as the library's [batch, seq, heads, 1].
  [[nodiscard]] MutableTensorView lse_view() const;
  // [heads], [n] or [heads, n]; see AttentionOptions::softmax_aux.
  [[nodiscard]] MutableTensorView sinks_view() const;

  // int64 as int32, in memory of its own. Throws InvalidArgument for numbers that do not fit.
  [[nodiscard]] Array narrowed() const;

 private:
  void describe(const ArraySpec& spec);
  void require_few_axes() const;

  Argument argument_{};
  std::shared_ptr<void> keep_alive_;
  void* data_ = nullptr;
  DType dtype_ = DType::kFloat32;
  std::vector<std::int64_t> shape_, strides_;
};

// The int64 numbers of a view by rows, as int32. Throws InvalidArgument for those that do not fit.
void narrow(const TensorView& from, const Argument& argument, std::int32_t* to);

// A 64-byte aligned, uninitialized array of Annulus's own with __dlpack__: for frameworks that take
// memory over.
nb::object aligned_array(const std::vector<std::int64_t>& shape, const std::string& dtype);

// "float32"; throws InvalidArgument.
DType dtype_named(const std::string& name);

}  // namespace annulus::python
