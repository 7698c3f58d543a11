#include "io/escaped.h"

#include <fmt/format.h>

#include <cstddef>
#include <nlohmann/json.hpp>

namespace annulus {
namespace {

constexpr std::size_t kMaxShown = 240;

unsigned char byte_at(std::string_view text, std::size_t i) {
  return i < text.size() ? static_cast<unsigned char>(text[i]) : 0;
}

struct Control {
  std::size_t bytes = 0;  // 0: the character is harmless
  unsigned code_point = 0;
};

// Recognises C0, DEL, C1 (terminals take U+009B for an escape code), the Unicode line ends and the
// marks that reverse the direction of text.
Control control_at(std::string_view text, std::size_t i) {
  const unsigned a = byte_at(text, i), b = byte_at(text, i + 1), c = byte_at(text, i + 2);
  if (a < 0x20 || a == 0x7f) return {1, a};
  if (a == 0xc2 && b >= 0x80 && b < 0xa0) return {2, b};
  const unsigned code_point = ((a & 0xfU) << 12) | ((b & 0x3fU) << 6) | (c & 0x3fU);
  const bool steers = (code_point >= 0x2028 && code_point <= 0x202e) ||
                      (code_point >= 0x2066 && code_point <= 0x2069);
  if (a == 0xe2 && steers) return {3, code_point};
  return {};
}

}  // namespace

bool has_control_character(std::string_view text) {
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (control_at(text, i).bytes > 0) return true;
  }
  return false;
}

std::string escaped(std::string_view text) {
  // JSON's own escapes already cover C0, quotes, backslashes and broken UTF-8.
  const std::string json = nlohmann::json(text.substr(0, kMaxShown))
                               .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  std::string shown;
  for (std::size_t i = 0; i < json.size();) {
    const Control control = control_at(json, i);
    if (control.bytes == 0) {
      shown += json[i++];
    } else {
      shown += fmt::format("\\u{:04x}", control.code_point);
      i += control.bytes;
    }
  }
  if (text.size() > kMaxShown) shown += fmt::format("... ({} bytes)", text.size());
  return shown;
}

}  // namespace annulus
