// What the tests of files share: a folder per test, files spelled byte by byte, and their errors.
#pragma once

#include <gtest/gtest.h>
#include <stdlib.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <optional>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "annulus/error.h"
#include "annulus/safetensors.h"

namespace annulus {

// Each test has a folder of its own, which also shows whether a temporary file was left behind.
class FileTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (std::filesystem::temp_directory_path() / "annulus_test_XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  [[nodiscard]] std::string path(const std::string& name = "x.safetensors") const {
    return folder_ + "/" + name;
  }
  [[nodiscard]] std::set<std::string> names_in_folder() const {
    std::set<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(folder_)) {
      names.insert(entry.path().filename());
    }
    return names;
  }

  std::string folder_;
};

inline void write_raw(const std::string& path, const std::string& bytes) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!out.flush()) throw std::runtime_error("the test cannot write " + path);
}

inline std::string read_raw(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

inline std::string little_endian(std::uint64_t value) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>((value >> (8 * i)) & 0xffU);
  return bytes;
}

inline std::string file_of(const std::string& header, std::size_t data_bytes = 0) {
  std::string data(data_bytes, '\0');
  std::iota(data.begin(), data.end(), '\1');
  return little_endian(header.size()) + header + data;
}

inline std::string entry(const std::string& name, const std::string& dtype,
                         const std::string& shape, const std::string& offsets) {
  return "\"" + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" +
         offsets + "}";
}

// The error that opening `path` throws; none if it opens. Reads every byte that the file offers, so
// that a sanitizer sees a pointer that leads astray.
inline std::optional<Error> error_of(const std::string& path, ReadMode mode = ReadMode::kStream) {
  try {
    const SafetensorsFile file = SafetensorsFile::open(path, mode);
    std::int64_t sum = 0;
    for (const NamedTensor& tensor : file.tensors()) {
      for (std::int64_t i = 0; i < tensor.bytes; ++i) sum += std::to_integer<int>(tensor.data[i]);
    }
    EXPECT_GE(sum, 0);
    return std::nullopt;
  } catch (const Error& error) {
    return error;
  }
}

inline void expect_error(const std::string& path, ErrorCode code, const std::string& label) {
  for (const ReadMode mode : {ReadMode::kStream, ReadMode::kMap}) {
    const std::optional<Error> error = error_of(path, mode);
    ASSERT_TRUE(error) << label << ": opened without an error";
    const std::string message = error->what();
    EXPECT_EQ(error->code(), code) << label << ": " << message;
    EXPECT_NE(message.find(std::filesystem::path(path).filename().string()), std::string::npos)
        << message;
    EXPECT_TRUE(std::none_of(message.begin(), message.end(),
                             [](unsigned char c) { return c < 0x20 || c == 0x7f; }))
        << label << ": a control character reached the message";
    EXPECT_LT(message.size(), 2000U) << label;
  }
}

struct DTypeCase {
  const char* name;
  std::int64_t bytes;
};
constexpr DTypeCase kDTypes[] = {{"BOOL", 1},    {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1},
                                 {"F8_E5M2", 1}, {"I16", 2}, {"U16", 2}, {"F16", 2},
                                 {"BF16", 2},    {"I32", 4}, {"U32", 4}, {"F32", 4},
                                 {"F64", 8},     {"I64", 8}, {"U64", 8}};

// Every dtype as a vector of three, a scalar and an empty tensor, so that most begin misaligned.
struct Sample {
  std::vector<std::byte> data = std::vector<std::byte>(64);
  std::vector<NamedTensor> tensors;

  Sample() {
    for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<std::byte>(i * 37 + 11);
    for (const DTypeCase& dtype : kDTypes) {
      add("vector ", dtype, {3, 1}, 3);
      add("empty ", dtype, {2, 0, 5}, 0);
      add("scalar ", dtype, {}, 1);
    }
  }
  void add(const std::string& name, const DTypeCase& dtype, std::vector<std::int64_t> shape,
           std::int64_t elements) {
    tensors.push_back({.name = name + dtype.name,
                       .file_dtype = dtype.name,
                       .shape = std::move(shape),
                       .data = elements == 0 ? nullptr : data.data(),
                       .bytes = elements * dtype.bytes});
  }
};

}  // namespace annulus
