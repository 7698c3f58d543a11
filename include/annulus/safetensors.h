// safetensors files: reading that trusts nothing, writing that is all or nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "annulus/tensor.h"

namespace annulus {
inline namespace v1 {

// A named dense row-major tensor of any rank. `data` points into the file object or the writer's
// caller.
struct NamedTensor {
  std::string name;
  std::string file_dtype;  // as in the file: "BF16", "F32", "I32", "F8_E4M3", ...
  std::vector<std::int64_t> shape;
  const std::byte* data = nullptr;
  std::int64_t bytes = 0;
};

// The DType of a file dtype; throws BadData naming `tensor` for one that Annulus does not compute
// with.
DType dtype_of(const NamedTensor& tensor);
std::string file_dtype_of(DType dtype);

enum class ReadMode : std::uint8_t { kStream, kMap };

class SafetensorsFile {
 public:
  // Throws IoError (missing, unreadable), BadData (breaks the format; the message names file,
  // tensor and fault). kStream reads the tensors into memory; kMap maps the file, which must then
  // not shrink while it is open. Every `data` is aligned for its dtype and lives as long as any
  // copy of the file object. Allocates at most the file's size, and 64 MiB for the table of tensors
  // and the reading of it.
  static SafetensorsFile open(const std::string& path, ReadMode mode = ReadMode::kStream);

  [[nodiscard]] const std::vector<NamedTensor>& tensors() const { return tensors_; }
  [[nodiscard]] const NamedTensor* find(const std::string& name) const;
  [[nodiscard]] const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  std::vector<NamedTensor> tensors_;  // in the order of their data in the file
  std::map<std::string, std::string> metadata_;
  std::shared_ptr<const void> storage_;
};

// Writes to a temporary file in the same folder (mode 0600 until complete), syncs and renames it:
// `path` holds the old content or the new one, never half. Equal arguments give equal bytes. Throws
// IoError, or InvalidArgument for what SafetensorsFile::open() would refuse: names that occur
// twice, bytes that do not fit shape and dtype, ...
void write_safetensors(const std::string& path, const std::vector<NamedTensor>& tensors,
                       const std::map<std::string, std::string>& metadata);

}  // namespace v1
}  // namespace annulus
