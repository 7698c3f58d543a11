// Which kernel a call runs on.
#pragma once

#include <string>

#include "annulus/targets.h"
#include "kernels/kernel_table.h"

namespace annulus {

// The entries of the translation units that have one each. Null where the build has none. Callable
// only on a CPU that available() names.
const ForwardKernel* avx512_bf16_forward();
const ForwardKernel* amx_bf16_forward();
const ForwardKernel*
amx_simulated_forward();  // the AMX kernel over tile operations in plain C++; needs AVX-512
// float32 kernels by Highway target name ("avx2"); null if not compiled in.
const ForwardKernel* vector_forward(const std::string& target);
const BackwardKernel* avx512_bf16_backward();
const BackwardKernel* amx_bf16_backward();
const BackwardKernel* amx_simulated_backward();  // likewise
const BackwardKernel* vector_backward(const std::string& target);
const TermKernel* vector_terms(const std::string& target);

// The kernels of chosen_target(dtype, isa). They read the environment.
const ForwardKernel& choose_forward(DType dtype, const std::string& isa);
const BackwardKernel& choose_backward(DType dtype, const std::string& isa);
// For the strips of both.
const TermKernel& choose_terms(DType dtype, const std::string& isa);

}  // namespace annulus
