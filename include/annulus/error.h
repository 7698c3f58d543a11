// Errors of Annulus. Every error a caller can meet derives from annulus::Error and carries the code
// that the command line returns, so that one number names one class in C++, in the shell and under
// MPI.
#pragma once

#include <stdexcept>
#include <string>

namespace annulus {
inline namespace v1 {

enum class ErrorCode : int {
  kInvalidArgument = 64,
  kBadData = 65,
  kUnsupported = 69,
  kInternalError = 70,
  kOutOfMemory = 71,
  kIoError = 74,
  kPeerTimeout = 75,
  kPeerMismatch = 76,
  kPayloadCorrupt = 77,
  kConfigError = 78,
  kInterrupted = 130,
};

// The class name of a code, e.g. "InvalidArgument".
const char* error_name(ErrorCode code);

// what() is "what, where, found, expected"; fix() is one sentence that says how to get out.
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message, std::string fix = {})
      : std::runtime_error(message), code_(code), fix_(std::move(fix)) {}
  [[nodiscard]] ErrorCode code() const { return code_; }
  [[nodiscard]] const std::string& fix() const { return fix_; }

 private:
  ErrorCode code_;
  std::string fix_;
};

// One class per code, so that a caller can catch what it can handle.
template <ErrorCode kCode>
class ErrorOf : public Error {
 public:
  explicit ErrorOf(const std::string& message, std::string fix = {})
      : Error(kCode, message, std::move(fix)) {}
};

using InvalidArgument = ErrorOf<ErrorCode::kInvalidArgument>;
using BadData = ErrorOf<ErrorCode::kBadData>;
using Unsupported = ErrorOf<ErrorCode::kUnsupported>;
using InternalError = ErrorOf<ErrorCode::kInternalError>;
using OutOfMemory = ErrorOf<ErrorCode::kOutOfMemory>;
using IoError = ErrorOf<ErrorCode::kIoError>;
using ConfigError = ErrorOf<ErrorCode::kConfigError>;
using Interrupted = ErrorOf<ErrorCode::kInterrupted>;

// A lost, silent or disagreeing peer. `rank` is the culprit as far as it is known, -1 otherwise.
class CommError : public Error {
 public:
  CommError(ErrorCode code, const std::string& message, int rank, std::string fix = {})
      : Error(code, message, std::move(fix)), rank_(rank) {}
  [[nodiscard]] int rank() const { return rank_; }

 private:
  int rank_;
};

}  // namespace v1
}  // namespace annulus
