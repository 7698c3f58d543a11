// How far two tensors are apart.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "annulus/safetensors.h"
#include "json.h"

namespace annulus::tools {

// An element passes if it is equal (NaN equals NaN), or within one of the two.
struct Tolerances {
  double absolute = 0;
  std::int64_t ulp = 0;  // steps between neighbouring numbers of the coarser dtype
  double rms = -1;       // of the whole tensor; negative: not looked at
  bool any_dtype = false;
};

struct Comparison {
  std::string name;              // "out", or "out = expected_out"
  std::string dtype_a, dtype_b;  // as in the files
  std::vector<std::int64_t> shape_a, shape_b;
  std::int64_t elements = 0;
  std::int64_t differing = 0;  // not equal
  std::int64_t outside = 0;    // beyond the tolerances
  double max_abs_err = 0;
  double rms_err = 0;
  std::int64_t max_ulp = 0;
  std::vector<std::int64_t> worst;  // index of the largest difference
  double worst_a = 0, worst_b = 0;
  bool passed = true;
  std::string reason;  // why not
};

// Null pointers are tensors that one file lacks.
Comparison compare(const std::string& name, const NamedTensor* a, const NamedTensor* b,
                   const Tolerances& tolerances);

Json comparison_json(const Comparison& comparison);
std::string comparison_table(const std::vector<Comparison>& comparisons);

}  // namespace annulus::tools
