// From a caller's arguments to a checked problem and everybody's rows, before anything is computed.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "annulus/communicator.h"
#include "annulus/ring.h"
#include "ops/problem.h"
#include "ops/rank.h"

namespace annulus {

struct RingCall {
  Problem problem;
  Deal deal;
};

// Whole tensors, dealt to workers that share them. The tensors, options and partitions must outlive
// the call. `writes` as in make_problem.
std::unique_ptr<RingCall> global_call(const std::string& operation, int workers,
                                      const CallTensors& tensors, const RingOptions& options,
                                      bool writes = true);
// A rank's shards. All ranks learn each other's lengths and segment ids, and that they ask for the
// same.
std::unique_ptr<RingCall> spmd_call(const std::string& operation, Communicator& comm,
                                    const CallTensors& tensors, const RingOptions& options);

}  // namespace annulus
