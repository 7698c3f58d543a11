#include "annulus/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <limits>
#include <new>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/aligned_buffer.h"
#include "base/fail.h"
#include "io/atomic_file.h"
#include "io/escaped.h"
#include "io/file_descriptor.h"
#include "io/safetensors_header.h"

namespace annulus {
namespace {

static_assert(std::endian::native == std::endian::little,
              "the format stores little-endian numbers");

constexpr std::int64_t kLengthBytes = 8;  // the header's length, ahead of the header

struct InputFile {
  std::string where;  // begins every message
  FileDescriptor fd;
  std::int64_t bytes = 0;
};

InputFile open_regular(const std::string& path) {
  InputFile file{.where = concat("safetensors file ", escaped(path)), .fd = {}, .bytes = 0};
  if (path.find('\0') != std::string::npos) {
    fail<IoError>(file.where, "the path holds a NUL character");
  }
  // A pipe would block the open until somebody writes to it.
  file.fd = FileDescriptor(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
  if (!file.fd.valid()) fail<IoError>(file.where, "cannot open: ", errno_text(errno));
  struct stat found {};
  if (::fstat(file.fd.get(), &found) != 0) {
    fail<IoError>(file.where, "cannot stat: ", errno_text(errno));
  }
  if (!S_ISREG(found.st_mode)) {
    fail<IoError>(file.where, "found ",
                  S_ISDIR(found.st_mode) ? "a directory" : "a device, a pipe or a socket",
                  ", expected a regular file");
  }
  file.bytes = found.st_size;
  return file;
}

void read_at(const InputFile& file, std::int64_t offset, void* to, std::int64_t bytes) {
  auto* next = static_cast<std::byte*>(to);
  while (bytes > 0) {
    const ssize_t got = ::pread(file.fd.get(), next, static_cast<std::size_t>(bytes), offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail<IoError>(file.where, "cannot read at byte ", offset, ": ", errno_text(errno));
    if (got == 0) {
      fail<BadData>(file.where, "ends at byte ", offset, ", but held ", file.bytes,
                    " bytes when it was opened: it shrank while being read");
    }
    next += got;
    offset += got;
    bytes -= got;
  }
}

std::int64_t read_header_bytes(const InputFile& file) {
  if (file.bytes < kLengthBytes) {
    fail<BadData>(file.where, "is ", file.bytes, " bytes long, expected at least the ",
                  kLengthBytes, " bytes of the header's length");
  }
  std::uint64_t header_bytes = 0;
  read_at(file, 0, &header_bytes, kLengthBytes);
  const std::int64_t rest = file.bytes - kLengthBytes;
  if (header_bytes == 0) {
    fail<BadData>(file.where, "the header is 0 bytes long, expected at least 2");
  }
  if (header_bytes > static_cast<std::uint64_t>(rest)) {
    fail_with_fix<BadData>("check that it is a safetensors file and was copied completely",
                           file.where, "the header claims ", header_bytes,
                           " bytes, but the file holds ", rest, " after its length");
  }
  return static_cast<std::int64_t>(header_bytes);
}

SafetensorsHeader read_header(const InputFile& file, std::int64_t header_bytes) {
  std::int64_t offset = kLengthBytes;
  const auto read_next = [&](char* to, std::int64_t bytes) {
    read_at(file, offset, to, bytes);
    offset += bytes;
  };
  try {
    return parse_safetensors_header(read_next, header_bytes,
                                    file.bytes - kLengthBytes - header_bytes, file.where);
  } catch (const std::bad_alloc&) {
    fail<OutOfMemory>(file.where, "no memory for the table of a header of ", header_bytes,
                      " bytes");
  }
}

std::int64_t alignment_of(const NamedTensor& tensor) { return element_bytes(tensor.file_dtype); }

// Reads the tensors into one buffer. Where the file's order leaves one misaligned for its dtype, it
// moves up by less than an element; in other files the buffer is the data section as it stands. The
// room for that is smaller than the tensors' entries in the header, so the buffer stays smaller
// than the file.
std::shared_ptr<const void> read_data(const InputFile& file, std::int64_t offset,
                                      std::vector<NamedTensor>& tensors) {
  std::int64_t bytes = 0;
  for (const NamedTensor& tensor : tensors) {
    bytes = round_up(bytes, alignment_of(tensor)) + tensor.bytes;
  }
  const auto buffer = std::make_shared<AlignedBuffer>(
      std::max<std::int64_t>(bytes, 1));  // empty tensors point, too
  std::int64_t place = 0;
  for (NamedTensor& tensor : tensors) {
    place = round_up(place, alignment_of(tensor));
    read_at(file, offset, buffer->data() + place, tensor.bytes);
    tensor.data = buffer->data() + place;
    place += tensor.bytes;
    offset += tensor.bytes;
  }
  return buffer;
}

struct Mapping {
  void* address;
  std::size_t bytes;
  AlignedBuffer copies;  // of tensors that lie misaligned in the file

  Mapping(void* mapped, std::size_t size) : address(mapped), bytes(size) {}
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() { ::munmap(address, bytes); }
};

std::shared_ptr<const void> map_data(const InputFile& file, std::int64_t offset,
                                     std::vector<NamedTensor>& tensors) {
  const auto size = static_cast<std::size_t>(file.bytes);
  void* address = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.fd.get(), 0);
  if (address == MAP_FAILED) {
    fail<IoError>(file.where, "cannot map ", size, " bytes: ", errno_text(errno));
  }
  const auto mapping = std::make_shared<Mapping>(address, size);

  std::vector<NamedTensor*> misaligned;
  std::int64_t copied_bytes = 0;
  for (NamedTensor& tensor : tensors) {
    tensor.data = static_cast<const std::byte*>(address) + offset;
    if (offset % alignment_of(tensor) != 0) {  // the mapping itself begins on a page
      misaligned.push_back(&tensor);
      copied_bytes = round_up(copied_bytes, alignment_of(tensor)) + tensor.bytes;
    }
    offset += tensor.bytes;
  }
  if (misaligned.empty()) return mapping;

  mapping->copies = AlignedBuffer(std::max<std::int64_t>(copied_bytes, 1));
  std::int64_t place = 0;
  for (NamedTensor* tensor : misaligned) {
    place = round_up(place, alignment_of(*tensor));
    std::byte* copy = mapping->copies.data() + place;
    std::memcpy(copy, tensor->data, static_cast<std::size_t>(tensor->bytes));
    tensor->data = copy;
    place += tensor->bytes;
  }
  return mapping;
}

struct DTypeName {
  DType dtype;
  const char* file_dtype;
};
constexpr std::array<DTypeName, 8> kDTypeNames = {{{DType::kFloat32, "F32"},
                                                   {DType::kBFloat16, "BF16"},
                                                   {DType::kFloat16, "F16"},
                                                   {DType::kInt64, "I64"},
                                                   {DType::kInt32, "I32"},
                                                   {DType::kInt8, "I8"},
                                                   {DType::kUInt8, "U8"},
                                                   {DType::kBool, "BOOL"}}};

std::string json_string(const std::string& text, const std::string& where) {
  try {
    return nlohmann::json(text).dump();
  } catch (const nlohmann::json::type_error&) {
    fail(where, escaped(text), " is not valid UTF-8");
  }
}

std::string join(const std::vector<std::string>& parts) {
  std::string text;
  for (const std::string& part : parts) text.append(text.empty() ? "" : ",").append(part);
  return text;
}

std::string entry_text(const NamedTensor& tensor, std::int64_t begin, const std::string& where) {
  std::vector<std::string> dims;
  for (const std::int64_t dim : tensor.shape) dims.push_back(std::to_string(dim));
  return concat(json_string(tensor.name, where), R"(:{"dtype":)",
                json_string(tensor.file_dtype, where), R"(,"shape":[)", join(dims),
                R"(],"data_offsets":[)", begin, ",", begin + tensor.bytes, "]}");
}

// The header, padded so that the data begin on a multiple of 8 bytes. What the reader would refuse
// is refused here, by the reader's own rules.
std::string header_text(const std::vector<NamedTensor>& tensors,
                        const std::map<std::string, std::string>& metadata,
                        const std::string& where) {
  std::vector<std::string> pairs, entries;
  for (const auto& [key, value] : metadata) {
    pairs.push_back(concat(json_string(key, where), ":", json_string(value, where)));
  }
  if (!pairs.empty()) entries.push_back(concat("\"", kMetadataKey, "\":{", join(pairs), "}"));
  std::int64_t data_bytes = 0;
  for (const NamedTensor& tensor : tensors) {
    if (tensor.name == kMetadataKey) fail(where, "a tensor cannot have the name ", kMetadataKey);
    if (tensor.bytes < 0 || tensor.bytes > std::numeric_limits<std::int64_t>::max() - data_bytes) {
      fail(where, "tensor ", escaped(tensor.name), ": cannot hold ", tensor.bytes, " bytes");
    }
    if (tensor.data == nullptr && tensor.bytes > 0) {
      fail(where, "tensor ", escaped(tensor.name), ": data is null");
    }
    entries.push_back(entry_text(tensor, data_bytes, where));
    data_bytes += tensor.bytes;
  }
  std::string text = concat("{", join(entries), "}");
  text.resize(static_cast<std::size_t>(round_up(static_cast<std::int64_t>(text.size()), 8)), ' ');

  const char* next = text.data();
  const auto read_next = [&](char* to, std::int64_t bytes) {
    std::copy_n(next, bytes, to);
    next += bytes;
  };
  try {
    parse_safetensors_header(read_next, static_cast<std::int64_t>(text.size()), data_bytes, where);
  } catch (const BadData& error) {
    throw InvalidArgument(error.what());
  }
  return text;
}

}  // namespace

inline namespace v1 {

DType dtype_of(const NamedTensor& tensor) {
  for (const DTypeName& known : kDTypeNames) {
    if (tensor.file_dtype == known.file_dtype) return known.dtype;
  }
  std::string names;
  for (const DTypeName& known : kDTypeNames) {
    names.append(names.empty() ? "" : " ").append(known.file_dtype);
  }
  fail_with_fix<BadData>("convert the tensor to one of them", "dtype_of", "tensor ",
                         escaped(tensor.name), " has dtype ", escaped(tensor.file_dtype),
                         ", Annulus computes with ", names);
}

std::string file_dtype_of(DType dtype) {
  for (const DTypeName& known : kDTypeNames) {
    if (dtype == known.dtype) return known.file_dtype;
  }
  fail("file_dtype_of", "found dtype number ", static_cast<int>(dtype), ", expected one of DType");
}

SafetensorsFile SafetensorsFile::open(const std::string& path, ReadMode mode) {
  const InputFile input = open_regular(path);
  const std::int64_t header_bytes = read_header_bytes(input);
  SafetensorsHeader header = read_header(input, header_bytes);
  SafetensorsFile file;
  file.tensors_ = std::move(header.tensors);
  file.metadata_ = std::move(header.metadata);
  const auto load = mode == ReadMode::kMap ? map_data : read_data;
  file.storage_ = load(input, kLengthBytes + header_bytes, file.tensors_);
  return file;
}

const NamedTensor* SafetensorsFile::find(const std::string& name) const {
  const auto found = std::find_if(tensors_.begin(), tensors_.end(),
                                  [&](const NamedTensor& tensor) { return tensor.name == name; });
  return found == tensors_.end() ? nullptr : &*found;
}

void write_safetensors(const std::string& path, const std::vector<NamedTensor>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  const std::string header =
      header_text(tensors, metadata, concat("write_safetensors ", escaped(path)));
  const std::uint64_t header_bytes = header.size();
  AtomicFile file(path);
  file.write(&header_bytes, kLengthBytes);
  file.write(header.data(), static_cast<std::int64_t>(header.size()));
  for (const NamedTensor& tensor : tensors) file.write(tensor.data, tensor.bytes);
  file.commit(FileAccess::kUmask);
}

}  // namespace v1
}  // namespace annulus
