// libFuzzer target of the safetensors reader, through the interface that users call.
//
//   clang++ -std=c++20 -O1 -g -fsanitize=fuzzer,address,undefined -Iinclude -Isrc \
//     fuzz/safetensors_fuzz.cc src/io/{safetensors,safetensors_header,atomic_file,escaped}.cc \
//     src/base/{aligned_buffer,error}.cc -lfmt -o safetensors_fuzz

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "annulus/error.h"
#include "annulus/safetensors.h"

namespace {

// A crash is an error other than annulus::Error, a byte that cannot be read, or a count that does
// not add up.
void read_everything(const std::string& path, annulus::ReadMode mode, std::size_t file_bytes) {
  try {
    const auto file = annulus::SafetensorsFile::open(path, mode);
    std::size_t bytes = 0;
    unsigned sum = 0;
    for (const annulus::NamedTensor& tensor : file.tensors()) {
      bytes += static_cast<std::size_t>(tensor.bytes);
      for (std::int64_t i = 0; i < tensor.bytes; ++i)
        sum += std::to_integer<unsigned>(tensor.data[i]);
      if (file.find(tensor.name) != &tensor) std::abort();
    }
    if (bytes >= file_bytes || sum > 255 * bytes) std::abort();
  } catch (const annulus::Error& error) {
    if (error.code() != annulus::ErrorCode::kBadData) std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const int fd = ::memfd_create("safetensors_fuzz", 0);
  static const std::string path = "/proc/self/fd/" + std::to_string(fd);
  if (::ftruncate(fd, static_cast<off_t>(size)) != 0) std::abort();
  if (::pwrite(fd, data, size, 0) != static_cast<ssize_t>(size)) std::abort();
  read_everything(path, annulus::ReadMode::kStream, size);
  read_everything(path, annulus::ReadMode::kMap, size);
  return 0;
}
