// HTML and SVG as text. Whatever may come from a caller goes through escape().
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace annulus {

// Safe inside elements and quoted attributes. Control characters, direction overrides and what is
// not UTF-8 become U+FFFD, line breaks and tabs spaces.
std::string escape(std::string_view text);

// "<tag class=...>text</tag>"; text is escaped.
std::string element(std::string_view tag, std::string_view css_class, std::string_view text);

struct Box {
  double x = 0;
  double y = 0;
  double width = 0;
  double height = 0;
};

std::string px(double value);         // at most two decimals
std::string outline(const Box& box);  // path data

// One figure's drawing. Looks are classes of the page's style sheet.
class Svg {
 public:
  // An empty label hides the drawing from readers of the text alternative.
  Svg(double width, double height, std::string_view label, std::string_view css_class = "figure");

  // title, if any, is shown as a tool tip.
  void path(std::string_view css_class, std::string_view data, std::string_view title = {});
  void box(std::string_view css_class, const Box& box, std::string_view title = {});
  void line(std::string_view css_class, double x1, double y1, double x2, double y2);
  void text(std::string_view css_class, double x, double y, std::string_view text);
  void raw(std::string_view markup) { markup_ += markup; }
  std::string finish();

 private:
  std::string markup_;
};

// Cells and heads are markup, the caption is text. The first column names the row.
struct Table {
  std::string caption = {};
  std::vector<std::string> head = {};
  std::vector<std::vector<std::string>> rows = {};
  std::vector<std::string> foot = {};
  std::string css_class = {};
};
std::string markup(const Table& table);

// The text alternative of a figure, closed until asked for.
std::string details(std::string_view summary, std::string_view body);

}  // namespace annulus
