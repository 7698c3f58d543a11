// The keyword arguments of a call, read once: a forward and its backward share them.
#pragma once

#include <nanobind/nanobind.h>

#include <string>
#include <vector>

#include "annulus/ring.h"
#include "arrays.h"

namespace annulus::python {

class Options {
 public:
  // `kwargs` has every option by its name in Python, absent or None where it is not given. Throws
  // InvalidArgument naming `operation`.
  Options(std::string operation, const nb::dict& kwargs);

  [[nodiscard]] const char* operation() const { return operation_.c_str(); }
  [[nodiscard]] const RingOptions& ring() const { return ring_; }
  // Copies that reading the options took, in words.
  [[nodiscard]] const std::vector<std::string>& copies() const { return copies_; }
  [[nodiscard]] std::vector<std::int64_t> softmax_aux_shape() const;

 private:
  void read_masks(const nb::dict& kwargs);
  void read_arithmetic(const nb::dict& kwargs);
  void read_ring(const nb::dict& kwargs);
  TensorView array(const nb::dict& kwargs, const char* name, std::int64_t rank, const char* axes,
                   std::initializer_list<DType> accepted);
  TensorView integers(const nb::dict& kwargs, const char* name, std::int64_t rank,
                      const char* axes);

  std::string operation_;
  RingOptions ring_;
  std::vector<Array> arrays_;  // keep the views' memory
  std::vector<std::string> copies_;
};

}  // namespace annulus::python
