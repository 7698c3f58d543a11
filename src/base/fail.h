// Error texts in one shape: fail<InvalidArgument>("ring_attention", "num_heads (", h, ") is not
// ...").
#pragma once

#include <sstream>
#include <string>
#include <string_view>

#include "annulus/error.h"

namespace annulus {

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

template <class ErrorType = InvalidArgument, class... Parts>
[[noreturn]] void fail(std::string_view operation, const Parts&... parts) {
  throw ErrorType(concat(operation, ": ", parts...));
}

// The same with the sentence that says how to mend it.
template <class ErrorType = InvalidArgument, class... Parts>
[[noreturn]] void fail_with_fix(std::string fix, std::string_view operation,
                                const Parts&... parts) {
  throw ErrorType(concat(operation, ": ", parts...), std::move(fix));
}

}  // namespace annulus
