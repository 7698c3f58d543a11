// Errors of the library as the Python classes of annulus._errors, found by their code.

#include "annulus/error.h"

#include <exception>

#include "bindings.h"

namespace annulus::python {

namespace nb = nanobind;

namespace {

void raise(const Error& error, int rank) {
  try {
    const nb::object make = nb::module_::import_("annulus._errors").attr("make");
    const nb::object exception =
        make(static_cast<int>(error.code()), error.what(), error.fix().c_str(), rank);
    PyErr_SetObject(exception.type().ptr(), exception.ptr());
  } catch (nb::python_error& e) {
    e.restore();
  }
}

}  // namespace

void bind_errors(nb::module_&) {
  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const CommError& error) {
      raise(error, error.rank());
    } catch (const Error& error) {
      raise(error, -1);
    }
  });
}

}  // namespace annulus::python
