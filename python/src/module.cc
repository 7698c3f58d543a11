// annulus._core: the C++ library as the package's Python files use it. Not an interface for users.

#include "bindings.h"

#include "annulus/targets.h"
#include "annulus/version.h"

#include <nanobind/stl/string.h>

namespace annulus::python {

namespace nb = nanobind;

void bind_machine(nb::module_& m) {
  m.attr("__version__") = kVersion;
  m.def("cpu_name", &cpu_name);
  m.def("allowed_cpus", &allowed_cpus);
  m.def("targets", [] {
    nb::list list;
    for (const Target& target : targets()) {
      nb::dict entry;
      entry["name"] = target.name, entry["available"] = target.available;
      entry["reason"] = target.reason;
      list.append(entry);
    }
    return list;
  });
}

}  // namespace annulus::python

NB_MODULE(_core, m) {
  using namespace annulus::python;  // NOLINT(google-build-using-namespace)
  // What autograd graphs hold may outlive the module; that is no leak.
  nanobind::set_leak_warnings(false);
  m.doc() = "The C++ library behind the annulus package. Private: use annulus itself.";
  bind_errors(m);
  bind_machine(m);
  bind_masks(m);
  bind_workers(m);
  bind_calls(m);
  bind_plans(m);
  bind_reference(m);
  bind_ffi(m);
}
