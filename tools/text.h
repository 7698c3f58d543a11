// Numbers and tables for people.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace annulus::tools {

std::string byte_text(double bytes);                             // "37.2 MiB"
std::string time_text(double seconds);                           // "12.3 ms"
std::string flops_text(double flops_per_s);                      // "1.24 TFLOP/s"
std::string count_text(double count);                            // "8.39 M"
std::string grouped(std::int64_t count);                         // "65 536"
std::string percent_text(double share);                          // "50.0 %"
std::string shape_text(const std::vector<std::int64_t>& shape);  // "[1, 4096, 1, 64]"
std::string short_name(std::string_view dtype);                  // "bf16" for "bfloat16"

// Rows of equal length under a heading; numbers to the right, text to the left, columns without a
// cell left out.
class Table {
 public:
  explicit Table(std::vector<std::string> heading) : rows_{std::move(heading)} {}
  void add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }
  [[nodiscard]] std::string text() const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace annulus::tools
