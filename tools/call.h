// From options and tensors to a call of the library, and what the call will take.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "annulus/ring.h"
#include "inputs.h"
#include "json.h"
#include "options.h"

namespace annulus::tools {

// Throws for options that this build cannot honour (Unsupported, with the reason) and for those
// that do not belong to the operation (InvalidArgument).
void refuse_absent_features(const Options& options);

struct Call {
  RingOptions ring;
  int workers = 1;
  DType out_dtype = DType::kFloat32;
  Plan plan;
  std::optional<BackwardPlan> backward;
};

// The mask and the arithmetic alone: what the oracle needs, too.
AttentionOptions attention_options(const Options& options, const Inputs& inputs);
// Plans the call; computes nothing. The views in `inputs` must outlive the call.
Call make_call(const Options& options, const Inputs& inputs);

// --out-dtype, by default the dtype of q.
DType out_dtype_of(const Options& options, DType of_q);

// The implementation rounds probabilities to bfloat16 before it multiplies them with v.
bool rounds_probabilities(const std::string& target);

Shape out_shape(const Inputs& inputs);

// Of the forward, and with --backward of the backward too.
double flops_of(const Call& call);

// The call and its plan in a few lines.
std::string describe_call(const Options& options, const Inputs& inputs, const Call& call);

}  // namespace annulus::tools
