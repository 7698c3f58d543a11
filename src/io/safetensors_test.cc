#include "annulus/safetensors.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "annulus/error.h"
#include "io/file_testing.h"

namespace annulus {
namespace {

using std::string_literals::operator""s;

class Safetensors : public FileTest {};

void expect_same(const SafetensorsFile& file, const std::vector<NamedTensor>& expected) {
  ASSERT_EQ(file.tensors().size(), expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const NamedTensor& got = file.tensors()[i];
    EXPECT_EQ(got.name, expected[i].name);
    EXPECT_EQ(got.file_dtype, expected[i].file_dtype);
    EXPECT_EQ(got.shape, expected[i].shape);
    ASSERT_EQ(got.bytes, expected[i].bytes);
    ASSERT_NE(got.data, nullptr) << got.name;
    EXPECT_TRUE(std::equal(got.data, got.data + got.bytes, expected[i].data)) << got.name;
    EXPECT_EQ(file.find(got.name), &got);
  }
}

std::int64_t misaligned_tensors(const SafetensorsFile& file) {
  std::int64_t count = 0;
  for (const NamedTensor& tensor : file.tensors()) {
    for (const DTypeCase& dtype : kDTypes) {
      const auto address = reinterpret_cast<std::uintptr_t>(tensor.data);
      if (tensor.file_dtype == dtype.name) {
        count += address % static_cast<std::uintptr_t>(dtype.bytes) != 0 ? 1 : 0;
      }
    }
  }
  return count;
}

TEST_F(Safetensors, RoundTripsEveryDTypeScalarsAndEmptyTensorsInOrder) {
  const Sample sample;
  const std::map<std::string, std::string> metadata = {
      {"", "empty key"}, {"note", "two\nlines, \"quotes\", \\ and \x1b[31m"}, {"ö", "漢字"}};
  write_safetensors(path(), sample.tensors, metadata);
  for (const ReadMode mode : {ReadMode::kStream, ReadMode::kMap}) {
    const SafetensorsFile file = SafetensorsFile::open(path(), mode);
    expect_same(file, sample.tensors);
    EXPECT_EQ(file.metadata(), metadata);
    EXPECT_EQ(misaligned_tensors(file), 0);
    EXPECT_EQ(file.find("absent"), nullptr);
  }
}

TEST_F(Safetensors, RoundTripsAFileWithoutTensors) {
  write_safetensors(path(), {}, {});
  EXPECT_EQ(read_raw(path()), little_endian(8) + "{}      ");
  expect_same(SafetensorsFile::open(path()), {});
  expect_same(SafetensorsFile::open(path(), ReadMode::kMap), {});
}

TEST_F(Safetensors, RoundTripsThe32DimsThatItAllows) {
  const std::byte value{7};
  const std::vector<NamedTensor> tensors = {
      {"deep", "U8", std::vector<std::int64_t>(32, 1), &value, 1}};
  write_safetensors(path(), tensors, {});
  expect_same(SafetensorsFile::open(path()), tensors);
}

TEST_F(Safetensors, ReadsAlikeAfterTheFileObjectMoved) {
  const Sample sample;
  write_safetensors(path(), sample.tensors, {});
  SafetensorsFile file = SafetensorsFile::open(path());
  const SafetensorsFile copy = file;
  const SafetensorsFile moved = std::move(file);
  expect_same(copy, sample.tensors);
  expect_same(moved, sample.tensors);
}

TEST_F(Safetensors, WritesTheBytesThatTheFormatPrescribes) {
  const float values[] = {1.0F, -2.0F};
  const auto* data = reinterpret_cast<const std::byte*>(values);
  write_safetensors(path(), {{"a", "F32", {2}, data, 8}, {"b\"", "F32", {}, data, 4}},
                    {{"k", "v"}});
  const std::string header =
      R"({"__metadata__":{"k":"v"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
      R"("b\"":{"dtype":"F32","shape":[],"data_offsets":[8,12]}})";
  const std::string written = read_raw(path());
  const std::size_t padded = (header.size() + 7) / 8 * 8;
  EXPECT_EQ(written.substr(0, 8), little_endian(padded));
  EXPECT_EQ(written.substr(8, padded), header + std::string(padded - header.size(), ' '));
  EXPECT_EQ(written.size(), 8 + padded + 12);
  EXPECT_EQ(std::memcmp(written.data() + 8 + padded, values, 8), 0);
}

TEST_F(Safetensors, PutsTheDataSectionOnACacheLine) {
  write_raw(path(), file_of("{" + entry("a", "U8", "[64]", "[0,64]") + "," +
                                entry("b", "F32", "[4]", "[64,80]") + "}",
                            80));
  const SafetensorsFile file = SafetensorsFile::open(path());
  for (const NamedTensor& tensor : file.tensors()) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(tensor.data) % 64, 0U);
  }
}

TEST_F(Safetensors, SortsTensorsByPlaceWhateverTheHeadersOrder) {
  write_raw(path(), file_of("{" + entry("b", "U8", "[2]", "[1,3]") + "," +
                                entry("none", "U64", "[0]", "[1,1]") + "," +
                                entry("a", "U8", "[1]", "[0,1]") + "}   ",
                            3));
  const SafetensorsFile file = SafetensorsFile::open(path());
  ASSERT_EQ(file.tensors().size(), 3U);
  EXPECT_EQ(file.tensors()[0].name, "a");
  EXPECT_EQ(file.tensors()[1].name, "none");
  EXPECT_EQ(file.tensors()[2].name, "b");
  EXPECT_EQ(file.tensors()[2].data[1], std::byte{3});
}

TEST_F(Safetensors, AcceptsWhatTheFormatLeavesOpen) {
  const std::string tensor = entry("a", "U8", "[2]", "[0,2]");
  const std::string accepted[] = {
      "{" + tensor + "}" + std::string(1000, ' '),
      "{ \"a\" : {\n\"data_offsets\": [0, 2], \"shape\": [2],\t\"dtype\": \"U8\" } }",
      "{\"__metadata__\":{}," + tensor + "}",
      "{" + tensor + R"(,"__metadata__":{"a":"control \u0000 \u001b"}})",
      R"({"\u00e4":{"dtype":"U8","shape":[1,2,1],"data_offsets":[0,2]}})",
      "{" + entry("", "BF16", "[]", "[0,2]") + "}",
  };
  for (const std::string& header : accepted) {
    write_raw(path(), file_of(header, 2));
    for (const ReadMode mode : {ReadMode::kStream, ReadMode::kMap}) {
      const std::optional<Error> error = error_of(path(), mode);
      EXPECT_FALSE(error) << header << ": " << error->what();
    }
  }
}

TEST(SafetensorsDType, NamesGoThereAndBack) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kInt64,
                            DType::kInt32, DType::kInt8, DType::kUInt8, DType::kBool}) {
    NamedTensor tensor;
    tensor.file_dtype = file_dtype_of(dtype);
    EXPECT_EQ(dtype_of(tensor), dtype);
  }
  EXPECT_THROW(file_dtype_of(static_cast<DType>(99)), InvalidArgument);
}

TEST(SafetensorsDType, RefusesWhatAnnulusDoesNotComputeWithAndNamesTheTensor) {
  for (const char* file_dtype :
       {"F64", "U64", "U32", "U16", "I16", "F8_E4M3", "F8_E5M2", "f32", ""}) {
    NamedTensor tensor;
    tensor.name = "rope\x1b[2J";
    tensor.file_dtype = file_dtype;
    try {
      dtype_of(tensor);
      ADD_FAILURE() << file_dtype;
    } catch (const BadData& error) {
      EXPECT_NE(std::string(error.what()).find("\"rope\\u001b[2J\""), std::string::npos);
      EXPECT_FALSE(error.fix().empty());
    }
  }
}

TEST_F(Safetensors, RefusesWhatIsNotARegularFileWithoutWaiting) {
  expect_error(path("missing.safetensors"), ErrorCode::kIoError, "missing");
  expect_error(folder_, ErrorCode::kIoError, "folder");
  ASSERT_EQ(::mkfifo(path("pipe").c_str(), 0600), 0);
  expect_error(path("pipe"), ErrorCode::kIoError, "pipe");
  expect_error("/dev/null", ErrorCode::kIoError, "device");
  EXPECT_EQ(error_of("").value().code(), ErrorCode::kIoError);
  EXPECT_EQ(error_of(path() + "\0tail"s).value().code(), ErrorCode::kIoError);
  if (::geteuid() == 0) return;  // root may read everything
  write_raw(path("secret"), file_of("{}"));
  ASSERT_EQ(::chmod(path("secret").c_str(), 0), 0);
  expect_error(path("secret"), ErrorCode::kIoError, "unreadable");
}

TEST_F(Safetensors, EscapesFileNamesInMessages) {
  const std::string name = path("a\n\x1b[31m\xff.safetensors");
  write_raw(name, "short");
  const std::string message = error_of(name).value().what();
  EXPECT_NE(message.find("a\\n\\u001b[31m\xef\xbf\xbd.safetensors\""), std::string::npos)
      << message;
}

TEST_F(Safetensors, ReportsAFileThatShrinksWhileItIsRead) {
  const std::size_t data_bytes = std::size_t{4} << 20;
  const std::string whole =
      file_of("{" + entry("a", "U8", "[4194304]", "[0,4194304]") + "}", data_bytes);
  write_raw(path(), whole);
  std::atomic<bool> stop = false;
  std::thread shrinker([&] {
    while (!stop) {
      if (::truncate(path().c_str(), 100) != 0 ||
          ::truncate(path().c_str(), static_cast<off_t>(whole.size())) != 0)
        return;
    }
  });
  for (int round = 0; round < 100; ++round) {
    const std::optional<Error> error = error_of(path());
    if (error) {
      EXPECT_EQ(error->code(), ErrorCode::kBadData) << error->what();
    }
  }
  stop = true;
  shrinker.join();
}

TEST_F(Safetensors, RefusesToWriteWhatItWouldNotRead) {
  constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();
  const std::byte data[64] = {};
  const NamedTensor good = {"a", "U8", {2}, data, 2};
  const auto with = [&](const std::function<void(NamedTensor&)>& change) {
    NamedTensor tensor = good;
    change(tensor);
    return tensor;
  };
  const std::vector<NamedTensor> refused[] = {
      {good, good},
      {with([](NamedTensor& t) { t.name = "__metadata__"; })},
      {with([](NamedTensor& t) { t.name = "a\0b"s; })},
      {with([](NamedTensor& t) { t.name = "\x1b[2J"; })},
      {with([](NamedTensor& t) { t.name = "\xff"; })},
      {with([](NamedTensor& t) { t.file_dtype = "F4"; })},
      {with([](NamedTensor& t) { t.file_dtype = "\xff\"}"; })},
      {with([](NamedTensor& t) { t.bytes = 3; })},
      {with([](NamedTensor& t) { t.bytes = -2; })},
      {with([](NamedTensor& t) { t.shape = {-1}; })},
      {with([](NamedTensor& t) {
        t.shape = {std::int64_t{1} << 62, 4};
      })},
      {with([](NamedTensor& t) { t.shape.assign(33, 1); })},
      {with([](NamedTensor& t) { t.data = nullptr; })},
      {with([](NamedTensor& t) { t.bytes = kMax; }), with([](NamedTensor& t) { t.bytes = kMax; })},
  };
  for (const std::vector<NamedTensor>& tensors : refused) {
    EXPECT_THROW(write_safetensors(path(), tensors, {}), InvalidArgument) << tensors[0].name;
  }
  EXPECT_THROW(write_safetensors(path(), {good}, {{"k", "\xff"}}), InvalidArgument);
  EXPECT_THROW(write_safetensors(path(), {good}, {{"k", std::string(3 << 20, 'v')}}),
               InvalidArgument);
  EXPECT_TRUE(names_in_folder().empty());
}

}  // namespace
}  // namespace annulus
