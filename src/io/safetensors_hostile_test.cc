// Files made to break the reader: each is refused with BadData, in bounded memory.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "annulus/error.h"
#include "annulus/safetensors.h"
#include "io/file_testing.h"

namespace annulus {
namespace {

using std::string_literals::operator""s;

class HostileSafetensors : public FileTest {};

struct HostileFile {
  std::string label;
  std::string bytes;
};

void add_frames(std::vector<HostileFile>& files) {
  const auto add = [&](const char* label, const std::string& bytes) {
    files.push_back({label, bytes});
  };
  const std::string good = "{" + entry("a", "U8", "[2]", "[0,2]") + "}";
  add("no bytes", "");
  add("seven bytes", "\x02\0\0\0\0\0\0"s);
  add("length without header", little_endian(2));
  add("header length 0", little_endian(0) + "{}");
  add("header one byte too long", little_endian(3) + "{}");
  add("header length 2^31", little_endian(std::uint64_t{1} << 31) + good);
  add("header length 2^63", little_endian(std::uint64_t{1} << 63) + good);
  add("header length 2^64 - 1", little_endian(~std::uint64_t{0}) + good);
  add("header length 2^64 - 8", little_endian(~std::uint64_t{7}) + good);
  add("header cuts the JSON", little_endian(good.size() - 1) + good + "ab");
  add("header swallows a byte of data", little_endian(good.size() + 1) + good + "ab");
  add("one byte of data missing", file_of(good, 1));
  add("one byte of data too much", file_of(good, 3));
  add("data without tensors", file_of("{}", 1));
  add("a million bytes without tensors", file_of("{}", 1'000'000));
}

// Each but the first few would be a sound header without the one fault it shows.
void add_texts(std::vector<HostileFile>& files) {
  const std::string a = entry("a", "U8", "[2]", "[0,2]"), whole = "{" + a + "}";
  const std::string long_text(3 << 20, 'n'), long_gap(300 << 10, '\n');
  const std::string texts[] = {
      " ",
      "x",
      "null",
      "true",
      "7",
      "-1",
      "1.5",
      "\"a\"",
      "[]",
      "{",
      "}",
      "{,}",
      "{a:1}",
      "{\"a\"}",
      "{\"a\":}",
      "{\"a",
      "{\"a\\",
      "{\"a\":" + long_gap + "}",
      "[" + whole + "]",
      " " + whole,
      "\n" + whole,
      "\xef\xbb\xbf" + whole,
      whole + "}",
      whole + whole,
      whole + ",",
      whole + " x",
      whole + "//",
      whole + "\0"s,
      whole + "\0garbage"s,
      "\0"s + whole,
      "{\0"s + a + "}",
      "{/**/" + a + "}",
      "{'" + a.substr(1) + "}",
      "{" + a + ",}",
      "{" + a + " " + a + "}",
      "{" + long_gap + a + "}",
      whole + std::string(300 << 10, ' '),
      R"({"__metadata__":{"k":")" + long_text + "\"}," + a + "}",
  };
  for (const std::string& text : texts) {
    files.push_back({"text " + text.substr(0, 20), file_of(text, 2)});
  }
  for (const std::string name :
       {"\x01", "\n", "\xff", "\xc0\x80", "\xed\xa0\x80", "\xf5\x80\x80\x80", "\xc3", "\\ud800",
        "\\udc00", "\\u12", "\\x41"}) {
    files.push_back({"name " + name, file_of("{" + entry(name, "U8", "[2]", "[0,2]") + "}", 2)});
  }
}

void add_depths(std::vector<HostileFile>& files) {
  for (const int depth : {2, 100, 100'000}) {
    const auto n = static_cast<std::size_t>(depth);
    std::string objects;
    for (int i = 0; i < depth; ++i) objects += "{\"a\":";
    files.push_back({"nested objects", file_of(objects + "1" + std::string(n, '}'))});
    files.push_back({"open objects", file_of(objects)});
    files.push_back(
        {"nested arrays", file_of("{\"a\":" + std::string(n, '[') + std::string(n, ']') + "}")});
    files.push_back(
        {"nested shape",
         file_of("{" + entry("a", "U8", std::string(n, '[') + std::string(n, ']'), "[0,2]") + "}",
                 2)});
    files.push_back({"nested metadata",
                     file_of("{\"__metadata__\":" + objects + "\"\"" + std::string(n + 1, '}'))});
  }
}

// Puts each kind of JSON value where the format has no place for it.
void add_wrong_kinds(std::vector<HostileFile>& files) {
  const std::vector<std::pair<std::string, std::string>> places = {
      {"entry", R"({"a":?})"},
      {"dtype", R"({"a":{"dtype":?,"shape":[2],"data_offsets":[0,2]}})"},
      {"shape", R"({"a":{"dtype":"U8","shape":?,"data_offsets":[0,2]}})"},
      {"dim", R"({"a":{"dtype":"U8","shape":[?],"data_offsets":[0,2]}})"},
      {"second dim", R"({"a":{"dtype":"U8","shape":[2,?],"data_offsets":[0,2]}})"},
      {"offsets", R"({"a":{"dtype":"U8","shape":[2],"data_offsets":?}})"},
      {"begin", R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[?,2]}})"},
      {"end", R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,?]}})"},
      {"metadata", R"({"__metadata__":?,"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})"},
      {"metadata value",
       R"({"__metadata__":{"k":?},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})"},
  };
  for (const auto& [place, text] : places) {
    for (const std::string value : {"null",
                                    "true",
                                    "\"2\"",
                                    "\"\\u0000\\u001b[31m\"",
                                    "-2",
                                    "-0",
                                    "2.0",
                                    "2e0",
                                    "1e999",
                                    "3",
                                    "18446744073709551616",
                                    "9223372036854775808",
                                    "[]",
                                    "[0,\"2\"]",
                                    "[[2]]",
                                    "{}",
                                    R"({"k":null})",
                                    R"({"k":{}})",
                                    "nan",
                                    "02"}) {
      const bool fits =
          (place == "metadata value" && value[0] == '"') || (place == "metadata" && value == "{}");
      if (fits) continue;
      std::string header = text;
      header.replace(header.find('?'), 1, value);
      files.push_back({place + " is " + value, file_of(header, 2)});
    }
  }
}

void add_fields(std::vector<HostileFile>& files) {
  const std::string dtype = R"("dtype":"U8")", shape = R"("shape":[2])",
                    offsets = R"("data_offsets":[0,2])";
  const std::string entries[] = {
      "",
      dtype,
      shape,
      offsets,
      dtype + "," + shape,
      dtype + "," + offsets,
      shape + "," + offsets,
      dtype + "," + dtype + "," + shape + "," + offsets,
      dtype + "," + shape + "," + shape + "," + offsets,
      dtype + "," + shape + "," + offsets + "," + offsets,
      dtype + "," + shape + "," + offsets + R"(,"strides":[1])",
      dtype + "," + shape + "," + offsets + R"(,"":"")",
      dtype + "," + shape + "," + offsets + R"(,"Dtype":"U8")",
      R"("\u0064type":"U8",)" + dtype + "," + shape + "," + offsets,
      dtype + "," + shape + R"(,"data_offsets":[])",
      dtype + "," + shape + R"(,"data_offsets":[2])",
      dtype + "," + shape + R"(,"data_offsets":[0,2,2])",
      dtype + "," + shape + R"(,"data_offsets":[2,0])",
  };
  for (const std::string& fields : entries) {
    files.push_back({"fields " + fields, file_of("{\"a\":{" + fields + "}}", 2)});
  }
  for (const char* name :
       {"F4", "F8_E8M0", "u8", "U8 ", "", "C64", "FLOAT32", "F32\\u0000", "\\u001b[2J", "U128"}) {
    files.push_back({"dtype "s + name, file_of("{" + entry("a", name, "[2]", "[0,2]") + "}", 2)});
  }
  for (const DTypeCase& known : kDTypes) {
    for (const std::int64_t off : {-1, 1}) {
      const std::int64_t bytes = 3 * known.bytes + off;
      files.push_back(
          {"bytes of "s + known.name,
           file_of("{" + entry("a", known.name, "[3]", "[0," + std::to_string(bytes) + "]") + "}",
                   static_cast<std::size_t>(bytes))});
    }
  }
}

void add_shapes(std::vector<HostileFile>& files) {
  std::string dims = "[1";
  for (int i = 0; i < 32; ++i) dims += ",1";
  const std::tuple<const char*, std::string, const char*> shapes[] = {
      {"U8", "[9223372036854775808]", "[0,2]"},
      {"U8", "[18446744073709551615]", "[0,2]"},
      {"U8", "[9223372036854775807]", "[0,2]"},
      {"U8", "[9223372036854775807]", "[0,9223372036854775807]"},
      {"U16", "[9223372036854775807]", "[0,2]"},
      {"U8", "[4294967296,4294967296]", "[0,0]"},
      {"U8", "[4294967296,4294967296,2]", "[0,2]"},
      {"U8", "[4294967297,4294967296,4294967295]", "[0,2]"},
      {"U64", "[2305843009213693952]", "[0,0]"},
      {"U64", "[2305843009213693953]", "[0,8]"},
      {"U8", "[0,9223372036854775807,2]", "[0,0]"},
      {"U8", "[9223372036854775807,2,0]", "[0,0]"},
      {"U8", "[9223372036854775808,0]", "[0,0]"},
      {"U8", "[3]", "[0,2]"},
      {"U8", "[0]", "[0,2]"},
      {"U8", "[2,0]", "[0,2]"},
      {"U8", "[]", "[0,2]"},
      {"U8", "[2]", "[0,3]"},
      {"U8", "[2]", "[1,3]"},
      {"U8", "[2]", "[2,4]"},
      {"U8", "[2]", "[9223372036854775805,9223372036854775807]"},
      {"U8", "[2]", "[18446744073709551613,18446744073709551615]"},
      {"U8", "[2]", "[18446744073709551615,1]"},
      {"U8", dims + "]", "[0,1]"},
  };
  for (const auto& [dtype, shape, offsets] : shapes) {
    const std::string text = "{" + entry("a", dtype, shape, offsets) + "}";
    for (const std::size_t data_bytes :
         {0U, 1U, 2U, 8U}) {  // one of them may be what the offsets say
      files.push_back({"shape " + shape + " at " + offsets, file_of(text, data_bytes)});
    }
  }
}

void add_layouts(std::vector<HostileFile>& files) {
  const std::pair<const char*, const char*> pairs[] = {
      {"[0,4]", "[0,4]"}, {"[0,4]", "[2,6]"},  {"[0,4]", "[3,7]"}, {"[0,4]", "[5,9]"},
      {"[1,5]", "[5,9]"}, {"[4,8]", "[8,12]"}, {"[0,4]", "[4,8]"}, {"[0,4]", "[8,12]"},
      {"[2,6]", "[0,4]"}, {"[8,12]", "[0,4]"},
  };
  for (const auto& [a, b] : pairs) {
    // 10 bytes of data: even the pair that is contiguous leaves two bytes behind itself.
    files.push_back(
        {"two at "s + a + b,
         file_of("{" + entry("a", "F32", "[]", a) + "," + entry("b", "I32", "[1]", b) + "}", 10)});
  }
  const std::string a = entry("a", "U8", "[1]", "[0,1]"), none = entry("e", "U8", "[0]", "[3,3]");
  files.push_back({"empty tensor behind the end", file_of("{" + a + "," + none + "}", 1)});
  files.push_back({"empty tensor inside another",
                   file_of("{" + entry("a", "U8", "[4]", "[0,4]") + "," + none + "}", 4)});
  files.push_back(
      {"duplicate name", file_of("{" + a + "," + entry("a", "U8", "[1]", "[1,2]") + "}", 2)});
  files.push_back(
      {"duplicate empty", file_of("{" + a + "," + entry("a", "U8", "[0]", "[1,1]") + "}", 1)});
  files.push_back(
      {"duplicate spelled apart",
       file_of("{" + a + R"(,"\u0061":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})", 2)});
  files.push_back(
      {"metadata twice", file_of("{\"__metadata__\":{},\"__metadata__\":{}," + a + "}", 1)});
  files.push_back(
      {"metadata key twice", file_of(R"({"__metadata__":{"k":"v","k":"v"},)" + a + "}", 1)});
  files.push_back({"metadata is a tensor",
                   file_of("{" + entry("__metadata__", "U8", "[1]", "[0,1]") + "}", 1)});
  for (const char* name : {"\\u0000", "a\\u0000b", "\\u001b[2J\\u001b[1;1H", "a\\nb", "\\r", "\\t",
                           "\\u007f", "\x7f", "\xc2\x9b", "\\u009b", "\\u202e", "\\u2066"}) {
    files.push_back({"name "s + name, file_of("{" + entry(name, "U8", "[1]", "[0,1]") + "}", 1)});
  }
}

TEST_F(HostileSafetensors, RefusesEveryHostileFileWithBadData) {
  std::vector<HostileFile> files;
  add_frames(files);
  add_texts(files);
  add_depths(files);
  add_wrong_kinds(files);
  add_fields(files);
  add_shapes(files);
  add_layouts(files);
  ASSERT_GE(files.size(), 300U);
  for (const HostileFile& file : files) {
    write_raw(path(), file.bytes);
    expect_error(path(), ErrorCode::kBadData, file.label);
  }
}

// A header whose table would need far more memory than its text is refused before it gets it.
TEST_F(HostileSafetensors, RefusesHeadersThatMultiplyInMemory) {
  std::string metadata = "{\"__metadata__\":{\"0\":\"\"";
  for (int i = 1; i < 300'000; ++i) metadata += ",\"" + std::to_string(i) + "\":\"\"";
  write_raw(path(), file_of(metadata + "}}"));
  expect_error(path(), ErrorCode::kBadData, "many metadata entries");

  std::string tensors = "{";
  for (int i = 0; i < 250'000; ++i) tensors += entry(std::to_string(i), "U8", "[0]", "[0,0]") + ",";
  tensors.back() = '}';
  write_raw(path(), file_of(tensors));
  expect_error(path(), ErrorCode::kBadData, "many tensors");
}

TEST_F(HostileSafetensors, ReadsFiftyThousandTensors) {
  std::string header = "{";
  for (int i = 0; i < 50'000; ++i) {
    header += entry("model.layers." + std::to_string(i) + ".self_attn.weight", "U8", "[1,1]",
                    "[" + std::to_string(i) + "," + std::to_string(i + 1) + "]") +
              ",";
  }
  header.back() = '}';
  write_raw(path(), file_of(header, 50'000));
  const SafetensorsFile file = SafetensorsFile::open(path());
  EXPECT_EQ(file.tensors().size(), 50'000U);
  EXPECT_EQ(file.tensors().back().data[0], static_cast<std::byte>(50'000 % 256));
}

// 2^40 bytes on disk only by name: whoever allocates first and looks later dies here.
TEST_F(HostileSafetensors, RefusesAHugeHeaderBeforeItAllocates) {
  for (const std::uint64_t length : {std::uint64_t{100'000'001}, std::uint64_t{1} << 39}) {
    write_raw(path(), little_endian(length) + "{");
    ASSERT_EQ(::truncate(path().c_str(), off_t{1} << 40), 0);
    expect_error(path(), ErrorCode::kBadData, "huge header");
    EXPECT_NE(std::string(error_of(path())->what()).find("at most 100000000"), std::string::npos);
  }
}

TEST_F(HostileSafetensors, RefusesTruncationAtEveryByte) {
  const Sample sample;
  const std::byte value{1};
  const std::function<void()> writers[] = {
      [&] {
        write_safetensors(path("whole"), {}, {{"key", "value"}});
      },
      [&] {
        write_safetensors(path("whole"), {{"one", "U8", {1}, &value, 1}}, {});
      },
      [&] {
        write_safetensors(path("whole"), {sample.tensors.begin(), sample.tensors.begin() + 9},
                          {{"a", "b"}});
      },
  };
  for (const auto& write : writers) {
    write();
    const std::string whole = read_raw(path("whole"));
    ASSERT_FALSE(error_of(path("whole")));
    for (std::size_t bytes = 0; bytes < whole.size(); ++bytes) {
      write_raw(path(), whole.substr(0, bytes));
      expect_error(path(), ErrorCode::kBadData, "truncated to " + std::to_string(bytes));
    }
  }
}

TEST_F(HostileSafetensors, SurvivesRandomByteFlips) {
  const Sample sample;
  write_safetensors(path(), {sample.tensors.begin(), sample.tensors.begin() + 6},
                    {{"key", "value"}});
  const std::string whole = read_raw(path());
  const int fd = ::open(path().c_str(), O_WRONLY | O_CLOEXEC);
  ASSERT_GE(fd, 0);
  std::mt19937 random(20240817);  // NOLINT: the same flips on every run
  int errors = 0;
  for (int round = 0; round < 20'000; ++round) {
    std::set<std::size_t> places;
    for (std::size_t i = 0; i < 1 + random() % 4; ++i) places.insert(random() % whole.size());
    for (const std::size_t place : places) {
      const char flipped =
          static_cast<char>(static_cast<unsigned char>(whole[place]) ^ (1U + random() % 255U));
      ASSERT_EQ(::pwrite(fd, &flipped, 1, static_cast<off_t>(place)), 1);
    }
    const std::optional<Error> error =
        error_of(path(), round % 2 == 0 ? ReadMode::kStream : ReadMode::kMap);
    if (error) {
      ++errors;
      ASSERT_EQ(error->code(), ErrorCode::kBadData) << error->what();
    }
    for (const std::size_t place : places) {
      ASSERT_EQ(::pwrite(fd, &whole[place], 1, static_cast<off_t>(place)), 1);
    }
  }
  ::close(fd);
  EXPECT_GT(errors, 10'000);
  EXPECT_LT(errors, 20'000);  // flips in the data must go unnoticed, else the test tests nothing
  EXPECT_FALSE(error_of(path()));
}

}  // namespace
}  // namespace annulus
