// One function per file of bindings.
#pragma once

#include <nanobind/nanobind.h>

namespace annulus::python {

void bind_errors(nanobind::module_& m);
void bind_masks(nanobind::module_& m);    // Mask, Partition
void bind_workers(nanobind::module_& m);  // ThreadWorld, Communicator, Mesh
void bind_calls(nanobind::module_& m);    // Options, forward, backward, merge
void bind_plans(nanobind::module_& m);    // explain
void bind_reference(nanobind::module_& m);
void bind_ffi(nanobind::module_& m);      // handlers for XLA programs, for annulus.jax
void bind_machine(nanobind::module_& m);  // targets, doctor's facts

}  // namespace annulus::python
