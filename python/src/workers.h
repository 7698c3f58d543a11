#pragma once

#include <nanobind/nanobind.h>

#include "annulus/communicator.h"

namespace annulus::python {

// Throws InvalidArgument for anything but a communicator.
Communicator& communicator_of(const nanobind::object& comm);

}  // namespace annulus::python
