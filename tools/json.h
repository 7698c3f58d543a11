// JSON on standard output: fields in the order of the contract, text that is valid whatever a file
// name holds.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace annulus::tools {

using Json = nlohmann::ordered_json;

// One field a line; arrays and objects that hold nothing but numbers and words stay on theirs.
std::string to_text(const Json& json);

// A number, or null where JSON has no spelling for it.
inline Json number_or_null(double value) {
  return value - value == 0 ? Json(value) : Json(nullptr);
}

}  // namespace annulus::tools
