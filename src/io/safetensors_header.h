// The header of a safetensors file: JSON that names each tensor, its dtype, its shape and its
// bytes.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "annulus/safetensors.h"
#include "io/header_text.h"

namespace annulus {

inline constexpr std::string_view kMetadataKey = "__metadata__";

struct SafetensorsHeader {
  // One behind the other from the first byte of the data to the last. `data` is not set.
  std::vector<NamedTensor> tensors;
  std::map<std::string, std::string> metadata;
};

// Bytes of one element; 0 for a dtype that the format does not know.
std::int64_t element_bytes(std::string_view file_dtype);

// Reads `header_bytes` bytes of JSON that describe `data_bytes` bytes of data, and holds them to
// every rule of the format. Never holds the whole text: what it allocates is the table it returns,
// at most header_bytes + 40 MiB, and at most 24 MiB beside it. `where` begins the messages. Throws
// BadData.
SafetensorsHeader parse_safetensors_header(const ReadBytes& read, std::int64_t header_bytes,
                                           std::int64_t data_bytes, const std::string& where);

}  // namespace annulus
