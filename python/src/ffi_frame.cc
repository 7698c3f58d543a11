#include "ffi_frame.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "annulus/communicator.h"
#include "annulus/error.h"
#include "refusal.h"

namespace annulus::python {
namespace {

constexpr const char* kOperation = "annulus.jax";

[[noreturn]] void unsupported(const std::string& found) {
  throw Unsupported(std::string(kOperation) + ": " + found,
                    "install a jaxlib that this Annulus knows, or a newer Annulus");
}

DType dtype_of(xla::DataType type) {
  switch (type) {
    case xla::DataType::kPred:
      return DType::kBool;
    case xla::DataType::kS8:
      return DType::kInt8;
    case xla::DataType::kU8:
      return DType::kUInt8;
    case xla::DataType::kS32:
    case xla::DataType::kU32:
      return DType::kInt32;
    case xla::DataType::kS64:
      return DType::kInt64;
    case xla::DataType::kF16:
      return DType::kFloat16;
    case xla::DataType::kBF16:
      return DType::kBFloat16;
    case xla::DataType::kF32:
      return DType::kFloat32;
    case xla::DataType::kF64:
      break;
  }
  unsupported("an array has XLA's element type " + std::to_string(static_cast<int>(type)));
}

FfiBuffer read_buffer(const xla::Buffer& buffer) {
  // XLA may give empty arrays no memory; views without data stand for "not given".
  static std::byte nothing[64];
  return {buffer.data != nullptr ? buffer.data : nothing, dtype_of(buffer.dtype),
          std::vector<std::int64_t>(buffer.dims, buffer.dims + buffer.rank)};
}

xla::Code code_of(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidArgument:
      return xla::Code::kInvalidArgument;
    case ErrorCode::kUnsupported:
      return xla::Code::kUnimplemented;
    case ErrorCode::kOutOfMemory:
      return xla::Code::kResourceExhausted;
    case ErrorCode::kPeerTimeout:
      return xla::Code::kDeadlineExceeded;
    case ErrorCode::kInterrupted:
      return xla::Code::kCancelled;
    default:
      return xla::Code::kInternal;
  }
}

std::string message_of(const Error& error, int rank) {
  std::string text = std::string("annulus.") + error_name(error.code());
  if (rank >= 0) text += "(rank " + std::to_string(rank) + ")";
  text += std::string(": ") + error.what();
  return error.fix().empty() ? text : text + " (fix: " + error.fix() + ")";
}

xla::Error* make_error(const xla::Api* api, const std::string& message, xla::Code code) {
  xla::CreateErrorArgs args{{sizeof args, nullptr}, message.c_str(), code};
  return api->create_error(&args);
}

template <class Args>
constexpr xla::Header header() {
  return {sizeof(Args), nullptr};
}

}  // namespace

std::vector<FfiBuffer> read_buffers(const xla::Arguments& arguments) {
  std::vector<FfiBuffer> buffers;
  for (std::int64_t i = 0; i < arguments.size; ++i) {
    if (arguments.types[i] != xla::kBuffer) unsupported("an argument is no array");
    buffers.push_back(read_buffer(*static_cast<const xla::Buffer*>(arguments.values[i])));
  }
  return buffers;
}

const void* FfiAttributes::find(const char* name, std::int32_t type) const {
  for (std::int64_t i = 0; i < attributes_.size; ++i) {
    const xla::Text& found = *attributes_.names[i];
    if (std::string_view(found.data, found.size) != name) continue;
    if (attributes_.types[i] == type) return attributes_.values[i];
    throw InternalError(std::string(kOperation) + ": attribute " + name + " has another type");
  }
  return nullptr;
}

const void* FfiAttributes::scalar(const char* name, xla::DataType dtype) const {
  const auto* found = static_cast<const xla::Scalar*>(find(name, xla::kScalarAttribute));
  if (found == nullptr) return nullptr;
  if (found->dtype == dtype) return found->value;
  throw InternalError(std::string(kOperation) + ": attribute " + name + " has another type");
}

std::optional<bool> FfiAttributes::flag(const char* name) const {
  const void* at = scalar(name, xla::DataType::kPred);
  if (at == nullptr) return {};
  return *static_cast<const std::uint8_t*>(at) != 0;
}

std::optional<std::int64_t> FfiAttributes::integer(const char* name) const {
  const void* at = scalar(name, xla::DataType::kS64);
  if (at == nullptr) return {};
  std::int64_t value = 0;
  std::memcpy(&value, at, sizeof value);
  return value;
}

std::optional<double> FfiAttributes::real(const char* name) const {
  const void* at = scalar(name, xla::DataType::kF64);
  if (at == nullptr) return {};
  double value = 0;
  std::memcpy(&value, at, sizeof value);
  return value;
}

std::optional<std::string> FfiAttributes::text(const char* name) const {
  const auto* at = static_cast<const xla::Text*>(find(name, xla::kTextAttribute));
  if (at == nullptr) return {};
  return std::string(at->data, at->size);
}

bool answered_metadata(const xla::CallFrame& frame) {
  const xla::Version& version = frame.api->version;
  for (xla::Extension* e = frame.header.extensions; e != nullptr; e = e->next) {
    if (e->type != xla::kMetadataExtension) continue;
    xla::Metadata& metadata = *reinterpret_cast<xla::MetadataExtension*>(e)->metadata;
    // An XLA that knows less is told its own version, and what it lacks is looked for by size.
    const int minor = std::clamp(version.minor, xla::kOldestMinorVersion, xla::kMinorVersion);
    metadata.version = {header<xla::Version>(), xla::kMajorVersion, minor};
    metadata.traits = 0;
    return true;
  }
  const bool fits = frame.header.struct_size >= offsetof(xla::CallFrame, future) &&
                    frame.api->header.struct_size >= offsetof(xla::Api, get_run_id);
  const bool known =
      version.major == xla::kMajorVersion && version.minor >= xla::kOldestMinorVersion;
  if (known && fits) return false;
  unsupported("this jaxlib has version " + std::to_string(version.major) + "." +
              std::to_string(version.minor) +
              " of XLA's foreign function interface, with tables of " +
              std::to_string(frame.api->header.struct_size) + " bytes");
}

xla::Error* as_xla_error(const xla::Api* api, const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const CommError& e) {
    return make_error(api, message_of(e, e.rank()), code_of(e.code()));
  } catch (const Error& e) {
    return make_error(api, message_of(e, -1), code_of(e.code()));
  } catch (const std::bad_alloc&) {
    return make_error(api, message_of(OutOfMemory("no memory left for the call"), -1),
                      xla::Code::kResourceExhausted);
  } catch (const std::exception& e) {
    return make_error(api, message_of(InternalError(e.what()), -1), xla::Code::kInternal);
  } catch (...) {
    return make_error(api, message_of(InternalError("an unknown exception"), -1),
                      xla::Code::kInternal);
  }
}

void require_success(const xla::Api* api, xla::Error* error, const char* what) {
  if (error == nullptr) return;
  xla::DestroyErrorArgs args{header<xla::DestroyErrorArgs>(), error};
  api->destroy_error(&args);
  throw InternalError(std::string(kOperation) + ": XLA refused to " + what);
}

FfiPromise::FfiPromise(xla::CallFrame& frame) : api_(frame.api) {
  xla::CreateFutureArgs args{header<xla::CreateFutureArgs>(), nullptr};
  require_success(api_, api_->create_future(&args), "make a future");
  frame.future = future_ = args.future;
}

void FfiPromise::done() const {
  xla::CompleteArgs args{header<xla::CompleteArgs>(), future_};
  api_->complete(&args);
}

void FfiPromise::failed(const std::exception_ptr& error) const {
  xla::CompleteWithErrorArgs args{header<xla::CompleteWithErrorArgs>(), future_,
                                  as_xla_error(api_, error)};
  api_->complete_with_error(&args);
}

std::int64_t run_id(const xla::CallFrame& frame) {
  if (frame.api->header.struct_size < offsetof(xla::Api, get_run_id) + sizeof(void*))
    unsupported("this jaxlib does not tell runs apart, which a ring of devices needs");
  xla::RunIdArgs args{header<xla::RunIdArgs>(), frame.context, 0};
  require_success(frame.api, frame.api->get_run_id(&args), "name the run");
  return args.run_id;
}

std::int32_t device_ordinal(const xla::CallFrame& frame) {
  if (frame.api->header.struct_size < offsetof(xla::Api, get_device_ordinal) + sizeof(void*))
    unsupported("this jaxlib does not tell devices apart, which a ring of devices needs");
  xla::DeviceOrdinalArgs args{header<xla::DeviceOrdinalArgs>(), frame.context, 0};
  require_success(frame.api, frame.api->get_device_ordinal(&args), "name the device");
  return args.device_ordinal;
}

}  // namespace annulus::python
