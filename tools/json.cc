#include "json.h"

#include <algorithm>

namespace annulus::tools {
namespace {

std::string dumped(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

bool flat(const Json& json) {
  return std::none_of(json.begin(), json.end(),
                      [](const Json& child) { return child.is_structured(); });
}

void append(const Json& json, std::size_t depth, std::string& text) {
  const bool object = json.is_object();
  if (!json.is_structured()) {
    text += dumped(json);
    return;
  }
  const bool one_line = json.empty() || (flat(json) && depth > 0);
  const std::string line = one_line ? "" : "\n" + std::string(2 * (depth + 1), ' ');
  text += object ? "{" : "[";
  bool first = true;
  for (const auto& [key, value] : json.items()) {
    text += first ? line : one_line ? ", " : "," + line;
    first = false;
    if (object) text += dumped(Json(key)) + ": ";
    append(value, depth + 1, text);
  }
  if (!one_line) text += "\n" + std::string(2 * depth, ' ');
  text += object ? "}" : "]";
}

}  // namespace

std::string to_text(const Json& json) {
  std::string text;
  append(json, 0, text);
  return text;
}

}  // namespace annulus::tools
