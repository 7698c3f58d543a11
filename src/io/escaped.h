// Text from outside, made safe for messages, terminals and logs.
#pragma once

#include <string>
#include <string_view>

namespace annulus {

// `text` in double quotes and as valid UTF-8. Control characters, escape codes, line ends and
// direction marks are spelled out, broken UTF-8 is replaced, and long text is cut, so that one name
// stays on one line and cannot steer a terminal. Not called quoted(): a std::string would find
// std::quoted.
std::string escaped(std::string_view text);

// Whether `text` holds a character that escaped() spells out because a terminal would act on it.
bool has_control_character(std::string_view text);

}  // namespace annulus
