#include "io/safetensors_header.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <istream>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <tuple>
#include <utility>

#include "base/fail.h"
#include "io/escaped.h"
#include "io/header_text.h"

namespace annulus {
namespace {

constexpr std::int64_t kMaxHeaderBytes = 100'000'000;
constexpr std::size_t kMaxDims = 32;
// A short entry costs several times its text in memory; within this a header of 100 MB reaches some
// 400 000 tensors.
constexpr std::int64_t kTableAllowance = std::int64_t{40} << 20;
constexpr std::int64_t kBlockBytes = 32;  // the smallest block of the heap
constexpr auto kMaxInt64 = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
constexpr const char* kCutFix =
    "the file looks cut off or overwritten: copy it again from its source";

struct FileDType {
  std::string_view name;
  std::int64_t bytes;
};
constexpr std::array<FileDType, 15> kFileDTypes = {{{"BOOL", 1},
                                                    {"U8", 1},
                                                    {"I8", 1},
                                                    {"F8_E4M3", 1},
                                                    {"F8_E5M2", 1},
                                                    {"I16", 2},
                                                    {"U16", 2},
                                                    {"F16", 2},
                                                    {"BF16", 2},
                                                    {"I32", 4},
                                                    {"U32", 4},
                                                    {"F32", 4},
                                                    {"F64", 8},
                                                    {"I64", 8},
                                                    {"U64", 8}}};

std::string known_dtypes() {
  std::string names;
  for (const FileDType& dtype : kFileDTypes) {
    names.append(names.empty() ? "" : " ").append(dtype.name);
  }
  return names;
}

struct Entry {
  NamedTensor tensor;
  std::uint64_t begin = 0;
  std::size_t index = 0;  // in the header; orders empty tensors, which share their begin
};

// Takes the events of the JSON parser, one object per file. Depth is a place, not a stack: a value
// that the format has no place for is refused where it begins.
class HeaderReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  HeaderReader(std::int64_t header_bytes, std::int64_t data_bytes, const std::string& where)
      : data_bytes_(static_cast<std::uint64_t>(data_bytes)),
        budget_(header_bytes + kTableAllowance),
        where_(where) {}

  bool null() override { unexpected("null"); }
  bool boolean(bool value) override { unexpected(value ? "true" : "false"); }
  bool number_integer(std::int64_t value) override {
    unexpected(concat("the signed number ", value));
  }
  bool number_float(double /*value*/, const std::string& text) override {
    unexpected(concat("the number ", escaped(text)));
  }
  bool binary(binary_t& /*value*/) override { unexpected("binary data"); }

  bool number_unsigned(std::uint64_t value) override {
    if (place_ == Place::kShape) {
      add_dim(value);
    } else if (place_ == Place::kOffsets) {
      if (offsets_->size() == 2) refuse("found more than 2 numbers, expected [begin, end]");
      offsets_->push_back(value);
    } else {
      unexpected(concat("the number ", value));
    }
    return true;
  }

  bool string(std::string& value) override {
    if (place_ == Place::kMetadata) {
      charge(text_bytes(value));
      metadata_[key_] = value;  // a copy: the parser's string has spare room
    } else if (place_ == Place::kTensor && key_ == "dtype") {
      if (element_bytes(value) == 0) {
        refuse("found ", escaped(value), ", expected one of ", known_dtypes());
      }
      dtype_ = value;
    } else {
      unexpected(concat("the string ", escaped(value)));
    }
    return true;
  }

  bool key(std::string& value) override {
    key_.clear();
    if (place_ == Place::kHeader) {
      begin_entry(value);
    } else if (place_ == Place::kMetadata) {
      charge(std::int64_t{6} * kBlockBytes + text_bytes(value));
      if (!metadata_.emplace(value, std::string()).second) {
        refuse("the key ", escaped(value), " occurs twice");
      }
    } else {
      check_field(value);
    }
    key_ = value;
    return true;
  }

  bool start_object(std::size_t /*elements*/) override {
    if (place_ == Place::kStart) {
      place_ = Place::kHeader;
    } else if (place_ == Place::kHeader) {
      place_ = key_ == kMetadataKey ? Place::kMetadata : Place::kTensor;
      key_.clear();
    } else {
      unexpected("an object");
    }
    return true;
  }

  bool end_object() override {
    if (place_ == Place::kTensor) finish_entry();
    place_ = Place::kHeader;
    return true;
  }

  bool start_array(std::size_t /*elements*/) override {
    if (place_ == Place::kTensor && key_ == "shape") {
      shape_.emplace();
      place_ = Place::kShape;
    } else if (place_ == Place::kTensor && key_ == "data_offsets") {
      offsets_.emplace();
      place_ = Place::kOffsets;
    } else {
      unexpected("an array");
    }
    return true;
  }

  bool end_array() override {
    place_ = Place::kTensor;
    return true;
  }

  bool parse_error(std::size_t position, const std::string& token,
                   const nlohmann::detail::exception& /*error*/) override {
    constexpr std::size_t kShown = 24;
    const std::string_view near =
        std::string_view(token).substr(token.size() - std::min(token.size(), kShown));
    fail<BadData>(where_, "header: not JSON at its byte ", position, ", near ", escaped(near));
  }

  SafetensorsHeader finish();

 private:
  enum class Place : std::uint8_t { kStart, kHeader, kMetadata, kTensor, kShape, kOffsets };

  template <class... Parts>
  [[noreturn]] void refuse(const Parts&... parts) const {
    fail<BadData>(where_, place_text(), parts...);
  }
  [[noreturn]] void unexpected(const std::string& found) const {
    refuse("found ", found, ", expected ", expected_text());
  }
  template <class... Parts>
  [[noreturn]] void refuse_tensor(const std::string& name, const Parts&... parts) const {
    fail_with_fix<BadData>(kCutFix, where_, "tensor ", escaped(name), ": ", parts...);
  }

  [[nodiscard]] std::string place_text() const;
  [[nodiscard]] const char* expected_text() const;
  static std::int64_t text_bytes(const std::string& text) {
    return kBlockBytes + static_cast<std::int64_t>(text.size());
  }
  void charge(std::int64_t bytes);
  void begin_entry(const std::string& name);
  void check_field(const std::string& field) const;
  void add_dim(std::uint64_t dim);
  void finish_entry();
  [[nodiscard]] std::uint64_t tensor_bytes() const;
  void check_names() const;
  void check_coverage() const;

  std::uint64_t data_bytes_;
  std::int64_t budget_;
  const std::string& where_;
  Place place_ = Place::kStart;
  std::string key_;
  std::string name_;  // of the tensor being read, and its fields as far as they came
  std::optional<std::string> dtype_;
  std::optional<std::vector<std::int64_t>> shape_;
  std::optional<std::vector<std::uint64_t>> offsets_;
  std::vector<Entry> entries_;
  std::map<std::string, std::string> metadata_;
  bool has_metadata_ = false;
};

std::string HeaderReader::place_text() const {
  if (place_ == Place::kStart || (place_ == Place::kHeader && key_.empty())) return "header: ";
  std::string text = place_ == Place::kMetadata || key_ == kMetadataKey
                         ? std::string(kMetadataKey)
                         : "tensor " + escaped(name_);
  if (place_ == Place::kMetadata && !key_.empty()) text += ", key " + escaped(key_);
  if (place_ > Place::kMetadata && !key_.empty()) text += ", " + key_;
  return text + ": ";
}

const char* HeaderReader::expected_text() const {
  switch (place_) {
    case Place::kStart:
    case Place::kHeader:
      return "an object";
    case Place::kMetadata:
      return "a string";
    case Place::kTensor:
      return key_ == "dtype" ? "a string" : "an array of numbers that are not negative";
    case Place::kShape:
    case Place::kOffsets:
      return "a whole number from 0 to 2^63 - 1";
  }
  return "";
}

void HeaderReader::charge(std::int64_t bytes) {
  budget_ -= bytes;
  if (budget_ >= 0) return;
  fail<BadData>(where_, "header: ", entries_.size(), " tensors and ", metadata_.size(),
                " metadata entries so far need more memory than the header's size and ",
                kTableAllowance, " bytes, the limit of this reader");
}

void HeaderReader::begin_entry(const std::string& name) {
  if (name == kMetadataKey) {
    if (std::exchange(has_metadata_, true)) refuse(kMetadataKey, " occurs twice");
    return;
  }
  if (has_control_character(name)) {
    refuse("the tensor name ", escaped(name), " holds a control character");
  }
  // Growing the vector copies it, and so does the table that is handed out.
  charge(2 * static_cast<std::int64_t>(sizeof(Entry) + sizeof(std::string_view)) +
         text_bytes(name));
  name_ = name;
  dtype_.reset();
  shape_.reset();
  offsets_.reset();
}

void HeaderReader::check_field(const std::string& field) const {
  const bool known = field == "dtype" || field == "shape" || field == "data_offsets";
  if (!known) {
    refuse("found the field ", escaped(field), ", expected dtype, shape and data_offsets");
  }
  const bool twice = (field == "dtype" && dtype_) || (field == "shape" && shape_) ||
                     (field == "data_offsets" && offsets_);
  if (twice) refuse("the field ", field, " occurs twice");
}

void HeaderReader::add_dim(std::uint64_t dim) {
  if (shape_->size() == kMaxDims) refuse("found more than ", kMaxDims, " dimensions");
  if (dim > kMaxInt64) unexpected(concat(dim));
  charge(shape_->empty() ? kBlockBytes : 2 * static_cast<std::int64_t>(sizeof dim));
  shape_->push_back(static_cast<std::int64_t>(dim));
}

// Empty axes count as 1 here, so that no product or stride of the axes can wrap later either.
std::uint64_t HeaderReader::tensor_bytes() const {
  auto bytes = static_cast<std::uint64_t>(element_bytes(*dtype_));
  bool empty = false;
  for (const std::int64_t dim : *shape_) {
    const auto factor = static_cast<std::uint64_t>(std::max<std::int64_t>(dim, 1));
    if (bytes > kMaxInt64 / factor) refuse("the shape holds more than 2^63 - 1 bytes of ", *dtype_);
    bytes *= factor;
    empty = empty || dim == 0;
  }
  return empty ? 0 : bytes;
}

void HeaderReader::finish_entry() {
  key_.clear();
  if (!dtype_) refuse("the field dtype is missing");
  if (!shape_) refuse("the field shape is missing");
  if (!offsets_) refuse("the field data_offsets is missing");
  if (offsets_->size() != 2) {
    refuse("data_offsets: found ", offsets_->size(), " numbers, expected [begin, end]");
  }
  const std::uint64_t begin = offsets_->front(), end = offsets_->back();
  if (begin > end) refuse("data_offsets [", begin, ", ", end, "] end before they begin");
  const std::uint64_t bytes = tensor_bytes();
  if (end - begin != bytes) {
    refuse("data_offsets [", begin, ", ", end, "] hold ", end - begin, " bytes, expected ", bytes,
           " for its shape and dtype ", *dtype_);
  }
  if (end > data_bytes_) {
    refuse_tensor(name_, "ends at byte ", end, " of the data, but the file holds ", data_bytes_,
                  " bytes of data");
  }
  Entry entry{.tensor = {}, .begin = begin, .index = entries_.size()};
  entry.tensor.name = name_;
  entry.tensor.file_dtype = *dtype_;
  entry.tensor.shape = *shape_;
  entry.tensor.bytes = static_cast<std::int64_t>(bytes);
  entries_.push_back(std::move(entry));
}

void HeaderReader::check_names() const {
  std::vector<std::string_view> names;
  names.reserve(entries_.size());
  for (const Entry& entry : entries_) names.emplace_back(entry.tensor.name);
  std::sort(names.begin(), names.end());
  const auto twice = std::adjacent_find(names.begin(), names.end());
  if (twice != names.end()) {
    fail<BadData>(where_, "tensor ", escaped(*twice), ": the name occurs twice");
  }
}

void HeaderReader::check_coverage() const {
  std::uint64_t covered = 0;
  for (const Entry& entry : entries_) {
    if (entry.begin != covered) {
      refuse_tensor(entry.tensor.name, "begins at byte ", entry.begin, " of the data, ",
                    entry.begin < covered ? "inside the tensor before it" : "behind a hole",
                    ", expected ", covered);
    }
    covered += static_cast<std::uint64_t>(entry.tensor.bytes);
  }
  if (covered == data_bytes_) return;
  fail_with_fix<BadData>(kCutFix, where_, "the tensors end at byte ", covered,
                         " of the data, but the file holds ", data_bytes_,
                         " bytes of data, expected none behind the last tensor");
}

SafetensorsHeader HeaderReader::finish() {
  const auto place = [](const Entry& e) {
    return std::tuple(e.begin, e.tensor.bytes > 0,
                      e.index);  // empty tensors lie before the one they share a place with
  };
  std::sort(entries_.begin(), entries_.end(),
            [&](const Entry& a, const Entry& b) { return place(a) < place(b); });
  check_names();
  check_coverage();
  SafetensorsHeader header{.tensors = {}, .metadata = std::move(metadata_)};
  header.tensors.reserve(entries_.size());
  for (Entry& entry : entries_) header.tensors.push_back(std::move(entry.tensor));
  return header;
}

}  // namespace

std::int64_t element_bytes(std::string_view file_dtype) {
  const auto* found =
      std::find_if(kFileDTypes.begin(), kFileDTypes.end(),
                   [&](const FileDType& dtype) { return dtype.name == file_dtype; });
  return found == kFileDTypes.end() ? 0 : found->bytes;
}

SafetensorsHeader parse_safetensors_header(const ReadBytes& read, std::int64_t header_bytes,
                                           std::int64_t data_bytes, const std::string& where) {
  if (header_bytes > kMaxHeaderBytes) {
    fail<BadData>(where, "the header is ", header_bytes, " bytes long, expected at most ",
                  kMaxHeaderBytes);
  }
  HeaderText text(read, header_bytes, where);
  // The parser would skip white space and a byte order mark; the format allows neither here.
  if (text.sgetc() != '{') fail<BadData>(where, "header: expected { as its first character");
  std::istream stream(&text);
  HeaderReader reader(header_bytes, data_bytes, where);
  nlohmann::json::sax_parse(stream, &reader);
  return reader.finish();
}

}  // namespace annulus
