// Call frames of XLA as values of our own, and our errors as XLA's. Nothing here touches Python:
// handlers run on XLA's threads, without the GIL.
#pragma once

#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "annulus/tensor.h"
#include "xla_ffi.h"

namespace annulus::python {

// An argument or result, the last axis fastest. `data` is never null.
struct FfiBuffer {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::vector<std::int64_t> dims;

  [[nodiscard]] std::int64_t rank() const { return static_cast<std::int64_t>(dims.size()); }
};

// Throws Unsupported for what is no array or has an element type Annulus has no name for; uint32 is
// read as int32, its bits.
std::vector<FfiBuffer> read_buffers(const xla::Arguments& arguments);

// The attributes of a call by their names; nothing where one was not given. Throws InternalError
// for an attribute of another type.
class FfiAttributes {
 public:
  explicit FfiAttributes(const xla::Attributes& attributes) : attributes_(attributes) {}
  [[nodiscard]] std::optional<bool> flag(const char* name) const;
  [[nodiscard]] std::optional<std::int64_t> integer(const char* name) const;
  [[nodiscard]] std::optional<double> real(const char* name) const;
  [[nodiscard]] std::optional<std::string> text(const char* name) const;

 private:
  [[nodiscard]] const void* find(const char* name, std::int32_t type) const;
  [[nodiscard]] const void* scalar(const char* name, xla::DataType dtype) const;

  const xla::Attributes& attributes_;
};

// Answers XLA's question for metadata; false where the frame is a call. A call's API has been
// checked: its functions up to futures may be called. Throws Unsupported for another version.
bool answered_metadata(const xla::CallFrame& frame);

// For XLA: "annulus.InvalidArgument: ring_attention: ... (fix: ...)"; an error of a peer has its
// rank behind the name, "annulus.PeerTimeout(rank 2): ...".
xla::Error* as_xla_error(const xla::Api* api, const std::exception_ptr& error);
// Throws InternalError for an error of XLA's.
void require_success(const xla::Api* api, xla::Error* error, const char* what);

// The end of a call that goes on after its handler has returned. XLA may go on with the program
// inside done() or failed(), in the calling thread: call them without locks.
class FfiPromise {
 public:
  FfiPromise() = default;
  // Makes the frame's future.
  explicit FfiPromise(xla::CallFrame& frame);
  void done() const;
  void failed(const std::exception_ptr& error) const;

 private:
  const xla::Api* api_ = nullptr;
  xla::Future* future_ = nullptr;
};

std::int64_t run_id(const xla::CallFrame& frame);
std::int32_t device_ordinal(const xla::CallFrame& frame);

}  // namespace annulus::python
