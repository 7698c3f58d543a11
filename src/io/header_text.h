// The text of a JSON header as a stream for the parser.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <streambuf>
#include <string>

#include "annulus/error.h"
#include "base/fail.h"

namespace annulus {

// Puts the next `bytes` bytes of the header at `to`, or throws.
using ReadBytes = std::function<void(char* to, std::int64_t bytes)>;

// The text of the header, a chunk at a time, with what the JSON parser would not refuse: a NUL,
// which it takes for the end of the text, and strings or gaps so long that the parser's buffers
// would grow with them.
class HeaderText : public std::streambuf {
 public:
  HeaderText(const ReadBytes& read, std::int64_t bytes, const std::string& where)
      : read_(read), left_(bytes), where_(where) {}

 protected:
  int_type underflow() override {
    if (left_ == 0) return traits_type::eof();
    const std::int64_t bytes = std::min(left_, static_cast<std::int64_t>(chunk_.size()));
    read_(chunk_.data(), bytes);
    left_ -= bytes;
    std::for_each(chunk_.begin(), chunk_.begin() + bytes, [this](char c) { inspect(c); });
    setg(chunk_.data(), chunk_.data(), chunk_.data() + bytes);
    return traits_type::to_int_type(chunk_[0]);
  }

 private:
  // The lexer and its error texts keep up to eight copies of a string, and of the characters
  // between two strings, where they spell a newline with eight bytes.
  static constexpr std::int64_t kMaxStringBytes = std::int64_t{2} << 20;
  static constexpr std::int64_t kMaxGapBytes = std::int64_t{256} << 10;

  void inspect(char c) {
    if (c == '\0') fail<BadData>(where_, "header: found a NUL character, expected JSON");
    const bool quote = c == '"' && !escaped_;
    if (quote) in_string_ = !in_string_;
    escaped_ = c == '\\' && !escaped_;
    run_ = quote ? 0 : run_ + 1;
    const std::int64_t limit = in_string_ ? kMaxStringBytes : kMaxGapBytes;
    if (run_ <= limit) return;
    fail<BadData>(where_, "header: ", in_string_ ? "a string" : "a gap between two strings",
                  " is longer than the ", limit, " bytes that this reader accepts");
  }

  const ReadBytes& read_;
  std::int64_t left_;
  const std::string& where_;
  std::array<char, 65536> chunk_{};
  bool in_string_ = false;
  bool escaped_ = false;
  std::int64_t run_ = 0;
};

}  // namespace annulus
