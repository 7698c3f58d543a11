#include "io/svg.h"

#include <fmt/format.h>

#include <cmath>
#include <cstdint>

namespace annulus {
namespace {

constexpr std::string_view kReplacement = "\ufffd";

// Bytes of the UTF-8 sequence that starts text, 0 if it is ill-formed: overlong, a surrogate, out
// of range or cut off.
std::size_t sequence_length(std::string_view text, std::uint32_t& code) {
  const auto byte = [&](std::size_t n) { return static_cast<unsigned char>(text[n]); };
  const unsigned lead = byte(0);
  const std::size_t length = lead < 0x80   ? 1
                             : lead < 0xC2 ? 0
                             : lead < 0xE0 ? 2
                             : lead < 0xF0 ? 3
                             : lead < 0xF5 ? 4
                                           : 0;
  if (length == 0 || text.size() < length) return 0;
  code = length == 1 ? lead : lead & (0x7FU >> length);
  for (std::size_t n = 1; n < length; ++n) {
    if ((byte(n) & 0xC0U) != 0x80U) return 0;
    code = (code << 6U) | (byte(n) & 0x3FU);
  }
  const bool overlong = (length == 3 && code < 0x800) || (length == 4 && code < 0x10000);
  const bool surrogate = code >= 0xD800 && code <= 0xDFFF;
  return overlong || surrogate || code > 0x10FFFF ? 0 : length;
}

// Characters that a page shows as nothing or that reorder what stands around them.
bool is_deceptive(std::uint32_t code) {
  const bool control = code < 0x20 || (code >= 0x7F && code < 0xA0);
  const bool direction = (code >= 0x202A && code <= 0x202E) || (code >= 0x2066 && code <= 0x2069);
  return control || direction || code == 0xFFFE || code == 0xFFFF;
}

std::string_view entity(char character) {
  switch (character) {
    case '&':
      return "&amp;";
    case '<':
      return "&lt;";
    case '>':
      return "&gt;";
    case '"':
      return "&quot;";
    case '\'':
      return "&#39;";
    case '\n':
    case '\r':
    case '\t':
      return " ";
    default:
      return {};
  }
}

std::string title_element(std::string_view title) {
  return title.empty() ? std::string() : element("title", {}, title);
}

}  // namespace

std::string escape(std::string_view text) {
  std::string safe;
  safe.reserve(text.size());
  while (!text.empty()) {
    std::uint32_t code = 0;
    const std::size_t length = sequence_length(text, code);
    const std::string_view replaced = entity(text.front());
    if (!replaced.empty()) {
      safe += replaced;
    } else if (length == 0 || is_deceptive(code)) {
      safe += kReplacement;
    } else {
      safe += text.substr(0, length);
    }
    text.remove_prefix(length == 0 ? 1 : length);
  }
  return safe;
}

std::string element(std::string_view tag, std::string_view css_class, std::string_view text) {
  if (css_class.empty()) return fmt::format("<{0}>{1}</{0}>", tag, escape(text));
  return fmt::format("<{0} class=\"{1}\">{2}</{0}>", tag, css_class, escape(text));
}

std::string px(double value) {
  std::string text = fmt::format("{:.2f}", value);
  while (text.back() == '0') text.pop_back();
  if (text.back() == '.') text.pop_back();
  return text == "-0" ? "0" : text;
}

std::string outline(const Box& box) {
  return fmt::format("M{} {}h{}v{}h-{}z", px(box.x), px(box.y), px(box.width), px(box.height),
                     px(box.width));
}

Svg::Svg(double width, double height, std::string_view label, std::string_view css_class) {
  const std::string role = label.empty()
                               ? std::string("aria-hidden=\"true\"")
                               : fmt::format("role=\"img\" aria-label=\"{}\"", escape(label));
  markup_ =
      fmt::format("<svg class=\"{2}\" width=\"{0}\" height=\"{1}\" viewBox=\"0 0 {0} {1}\" {3}>",
                  px(width), px(height), css_class, role);
}

void Svg::path(std::string_view css_class, std::string_view data, std::string_view title) {
  if (data.empty()) return;
  if (title.empty()) {
    markup_ += fmt::format("<path class=\"{}\" d=\"{}\"/>", css_class, data);
  } else {
    markup_ +=
        fmt::format("<path class=\"{}\" d=\"{}\">{}</path>", css_class, data, title_element(title));
  }
}

void Svg::box(std::string_view css_class, const Box& box, std::string_view title) {
  path(css_class, outline(box), title);
}

void Svg::line(std::string_view css_class, double x1, double y1, double x2, double y2) {
  path(css_class, fmt::format("M{} {}L{} {}", px(x1), px(y1), px(x2), px(y2)));
}

void Svg::text(std::string_view css_class, double x, double y, std::string_view text) {
  markup_ += fmt::format("<text class=\"{}\" x=\"{}\" y=\"{}\">{}</text>", css_class, px(x), px(y),
                         escape(text));
}

std::string Svg::finish() { return std::move(markup_) + "</svg>"; }

std::string markup(const Table& table) {
  std::string text = "<div class=\"scroll\"><table";
  if (!table.css_class.empty()) text += " class=\"" + table.css_class + "\"";
  text += ">";
  if (!table.caption.empty()) text += element("caption", {}, table.caption);
  text += "<thead><tr>";
  for (const std::string& cell : table.head) text += "<th scope=\"col\">" + cell + "</th>";
  text += "</tr></thead><tbody>";
  const auto add_row = [&](const std::vector<std::string>& row) {
    text += "<tr>";
    for (std::size_t n = 0; n < row.size(); ++n) {
      text += n == 0 ? "<th scope=\"row\">" + row[n] + "</th>" : "<td>" + row[n] + "</td>";
    }
    text += "</tr>\n";
  };
  for (const auto& row : table.rows) add_row(row);
  text += "</tbody>";
  if (!table.foot.empty()) {
    text += "<tfoot>";
    add_row(table.foot);
    text += "</tfoot>";
  }
  return text + "</table></div>\n";
}

std::string details(std::string_view summary, std::string_view body) {
  return fmt::format("<details><summary>{}</summary>{}</details>\n", escape(summary), body);
}

}  // namespace annulus
