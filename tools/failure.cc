#include "failure.h"

#include <cstdio>
#include <new>

#include "json.h"

namespace annulus::tools {
namespace {

struct Failure {
  ErrorCode code = ErrorCode::kInternalError;
  std::string message;
  std::string fix;
};

// Errors of the library that name no way out still end with one.
std::string usual_fix(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidArgument:
      return "annulus VERB --help shows every option with an example";
    case ErrorCode::kBadData:
      return "check that the file was copied completely, or write it again";
    case ErrorCode::kUnsupported:
      return "annulus doctor shows what this build and machine can do";
    case ErrorCode::kInternalError:
      return "this is a bug of Annulus: please report it with the command line";
    case ErrorCode::kOutOfMemory:
      return "annulus explain shows what a call needs; use fewer tokens, heads or workers";
    case ErrorCode::kIoError:
      return "check the path, its permissions and the space left";
    case ErrorCode::kPeerTimeout:
      return "raise --timeout-s if the worker was only slow";
    case ErrorCode::kPeerMismatch:
      return "pass the same shapes, dtypes and options on every rank";
    case ErrorCode::kPayloadCorrupt:
      return "repeat the call; if it comes back, test the memory";
    case ErrorCode::kConfigError:
      return "unset or correct the variable";
    case ErrorCode::kInterrupted:
      return "nothing was written; start it again when it suits";
  }
  return {};
}

Failure describe(const std::exception& error) {
  if (const auto* ours = dynamic_cast<const Error*>(&error)) {
    return {ours->code(), ours->what(), ours->fix()};
  }
  if (dynamic_cast<const std::bad_alloc*>(&error) != nullptr) {
    return {
        ErrorCode::kOutOfMemory, "an allocation failed, expected enough memory for the plan", {}};
  }
  return {ErrorCode::kInternalError, fmt::format("unexpected: {}", error.what()), {}};
}

}  // namespace

std::string printable(std::string_view text) {
  std::string shown;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    // Bytes of UTF-8 sequences pass, except the second halves of the control characters
    // U+0080..U+009F.
    const bool control = byte < 0x20 || byte == 0x7f ||
                         (byte >= 0x80 && byte < 0xa0 && !shown.empty() && shown.back() == '\xc2');
    if (control) {
      shown += fmt::format("\\x{:02x}", byte);
    } else {
      shown += c;
    }
  }
  return shown;
}

int report_failure(const std::exception& error, bool json) {
  Failure failure = describe(error);
  if (failure.fix.empty()) failure.fix = usual_fix(failure.code);
  const int code = static_cast<int>(failure.code);
  if (json) {
    const Json object{{"error",
                       {{"code", code},
                        {"name", error_name(failure.code)},
                        {"message", failure.message},
                        {"fix", failure.fix}}}};
    fmt::print("{}\n", to_text(object));
    std::fflush(stdout);
  }
  fmt::print(stderr, "annulus: {}: {}\nfix: {}\n", error_name(failure.code),
             printable(failure.message), printable(failure.fix));
  return code;
}

}  // namespace annulus::tools
