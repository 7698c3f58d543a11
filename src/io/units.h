// Numbers as a reader wants them: three or four digits, a unit, thousands apart.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace annulus {

// One unit serves a whole column or axis, so that its numbers can be compared by eye.
struct Unit {
  double size = 1;             // in the base unit
  std::string_view name = {};  // "ms"; empty: plain numbers
  int decimals = 0;
};

// The unit in which numbers up to `largest` are short.
Unit time_unit(double largest_seconds);
Unit byte_unit(double largest_bytes);
Unit count_unit(double largest);

std::string number(double value, const Unit& unit);     // "12.40"
std::string with_unit(double value, const Unit& unit);  // "12.40 ms"

std::string time_text(double seconds);
std::string byte_text(double bytes);
std::string count_text(double count);     // "65 536" or "1.2 M"
std::string grouped(std::int64_t count);  // "65 536"
// "91 %", "9.1 %": one decimal less from ten on. "<0.1 %" rather than a zero that is none.
std::string percent(double share, int decimals = 1);

}  // namespace annulus
