// JSON on standard output: fields in the order of the contract, text that is valid whatever a file
// name holds.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace annulus::tools {

using Json = nlohmann::ordered_json;

inline std::string to_text(const Json& json) {
  return json.dump(2, ' ', false, Json::error_handler_t::replace);
}

// A number, or null where JSON has no spelling for it.
inline Json number_or_null(double value) {
  return value - value == 0 ? Json(value) : Json(nullptr);
}

}  // namespace annulus::tools
