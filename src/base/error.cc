#include "annulus/error.h"

namespace annulus {
inline namespace v1 {

const char* error_name(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidArgument:
      return "InvalidArgument";
    case ErrorCode::kBadData:
      return "BadData";
    case ErrorCode::kUnsupported:
      return "Unsupported";
    case ErrorCode::kInternalError:
      return "InternalError";
    case ErrorCode::kOutOfMemory:
      return "OutOfMemory";
    case ErrorCode::kIoError:
      return "IoError";
    case ErrorCode::kPeerTimeout:
      return "PeerTimeout";
    case ErrorCode::kPeerMismatch:
      return "PeerMismatch";
    case ErrorCode::kPayloadCorrupt:
      return "PayloadCorrupt";
    case ErrorCode::kConfigError:
      return "ConfigError";
    case ErrorCode::kInterrupted:
      return "Interrupted";
  }
  return "UnknownError";
}

}  // namespace v1
}  // namespace annulus
