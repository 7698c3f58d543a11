// Options of a call as attributes of an XLA program and back.
#pragma once

#include <nanobind/nanobind.h>

#include "annulus/ring.h"
#include "ffi_frame.h"

namespace annulus::python {

// The options that are no arrays, by the names that ring_options() reads. Masks and partitions that
// have no name are registered for the life of the process and travel as handles; `num_heads` masks
// are asked from the builder here and now.
nanobind::dict attributes_of(const RingOptions& options, std::int64_t q_len, std::int64_t kv_len,
                             std::int64_t num_heads, std::int64_t num_reps);

// Throws Unsupported for handles of another process: a program with masks cannot be carried there.
RingOptions ring_options(const FfiAttributes& attributes);

}  // namespace annulus::python
