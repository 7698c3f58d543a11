// Errors on their way from a throw to the shell: one line that says what is wrong, one that says
// how to mend it, and the class's code as the exit status.
#pragma once

#include <fmt/format.h>

#include <exception>
#include <string>
#include <string_view>
#include <utility>

#include "annulus/error.h"

namespace annulus::tools {

constexpr int kOk = 0;
constexpr int kCheckFailed = 1;

// fail("pass --workers=4", "--workers is {}, expected {}", 3, 4)
template <class ErrorType = InvalidArgument, class... Args>
[[noreturn]] void fail(std::string fix, fmt::format_string<Args...> what, Args&&... args) {
  throw ErrorType(fmt::format(what, std::forward<Args>(args)...), std::move(fix));
}

// Names and paths come from outside: what could break a line or steer a terminal is spelled out as
// \xNN.
std::string printable(std::string_view text);

// Prints the error on standard error, with `json` also as an object on standard output. Returns the
// exit status.
int report_failure(const std::exception& error, bool json);

}  // namespace annulus::tools
