// InvalidArgument in the shape of the library's own errors: "operation: what was found".
#pragma once

#include <sstream>
#include <string>
#include <utility>

#include "annulus/error.h"

namespace annulus::python {

template <class... Parts>
[[noreturn]] void refuse_with_fix(std::string fix, const char* operation, const Parts&... parts) {
  std::ostringstream text;
  text << operation << ": ";
  (text << ... << parts);
  throw InvalidArgument(text.str(), std::move(fix));
}

template <class... Parts>
[[noreturn]] void refuse(const char* operation, const Parts&... parts) {
  refuse_with_fix({}, operation, parts...);
}

}  // namespace annulus::python
