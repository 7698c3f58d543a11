#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <vector>

#include "annulus/partition.h"
#include "io/report_parts.h"
#include "io/svg.h"
#include "io/units.h"

namespace annulus {
namespace {

constexpr int kMaxCells = 128;     // per side: the pixels of a phone allow no more
constexpr int kWordCells = 8;      // per side of the text alternative
constexpr double kSide = 320;      // the longer side of the picture, px
constexpr double kShortest = 120;  // of the other one, whatever the lengths
constexpr double kAxis = 18;       // strip of owners beside the picture
constexpr std::size_t kLevels = 8;

// Shares of visible pairs on a grid, rows are queries.
struct Grid {
  int rows = 0;
  int columns = 0;
  std::vector<double> share;

  [[nodiscard]] double at(int row, int column) const {
    return share[static_cast<std::size_t>(row) * static_cast<std::size_t>(columns) +
                 static_cast<std::size_t>(column)];
  }
};

Grid input_grid(const ReportInput& input) {
  if (input.mask_rows <= 0 || input.mask_columns <= 0) return {};
  const std::size_t cells =
      static_cast<std::size_t>(input.mask_rows) * static_cast<std::size_t>(input.mask_columns);
  if (input.mask_density.size() != cells) return {};
  Grid grid{input.mask_rows, input.mask_columns, input.mask_density};
  for (double& share : grid.share) share = share >= 0 ? std::min(share, 1.0) : 0;  // NaN is 0
  return grid;
}

// The mean over blocks of cells: at most `side` rows and columns.
Grid shrunk(const Grid& grid, int side) {
  if (grid.rows <= side && grid.columns <= side) return grid;
  Grid small{std::min(side, grid.rows), std::min(side, grid.columns), {}};
  const auto cut = [](int index, int parts, int length) {
    return static_cast<int>(std::int64_t{index} * length / parts);
  };
  for (int row = 0; row < small.rows; ++row) {
    for (int column = 0; column < small.columns; ++column) {
      const int top = cut(row, small.rows, grid.rows);
      const int bottom = cut(row + 1, small.rows, grid.rows);
      const int left = cut(column, small.columns, grid.columns);
      const int right = cut(column + 1, small.columns, grid.columns);
      double sum = 0;
      for (int i = top; i < bottom; ++i) {
        for (int j = left; j < right; ++j) sum += grid.at(i, j);
      }
      small.share.push_back(sum / (static_cast<double>(bottom - top) * (right - left)));
    }
  }
  return small;
}

// 0 for nothing and kLevels for everything only where that is exact.
std::size_t level_of(double share) {
  if (share <= 0) return 0;
  if (share >= 1) return kLevels;
  const auto level = static_cast<std::size_t>(std::lround(share * kLevels));
  return std::clamp<std::size_t>(level, 1, kLevels - 1);
}

void draw_grid(Svg& svg, const Grid& grid, const Box& frame) {
  std::array<std::string, kLevels + 1> data;
  for (int row = 0; row < grid.rows; ++row) {
    const double top = std::round(frame.height * row / grid.rows);
    const double bottom = std::round(frame.height * (row + 1) / grid.rows);
    for (int column = 0; column < grid.columns;) {
      const std::size_t level = level_of(grid.at(row, column));
      int end = column + 1;
      while (end < grid.columns && level_of(grid.at(row, end)) == level) ++end;
      const double left = frame.width * column / grid.columns;
      const double right = frame.width * end / grid.columns;
      data[level] += outline({frame.x + left, frame.y + top, right - left, bottom - top});
      column = end;
    }
  }
  for (std::size_t level = 1; level <= kLevels; ++level) {  // level 0 is the paper
    svg.path(fmt::format("d{}", level), data[level]);
  }
}

// A run of neighbouring tokens and the worker that holds them.
struct Run {
  std::int64_t begin = 0;
  std::int64_t count = 0;
  int owner = 0;
};

// Empty where the plan does not say it, or where tokens are dealt one by one.
std::vector<Run> owner_runs(const PageData& data, const std::vector<std::int64_t>& rows) {
  std::vector<Run> runs;
  const std::string& partition = data.plan.partition;
  const std::int64_t tokens = std::accumulate(rows.begin(), rows.end(), std::int64_t{0});
  const bool in_runs = partition == "contiguous" || partition == "zigzag";
  if (!in_runs || tokens <= 0 || data.workers == 1) return runs;
  const Partition dealt = Partition::from_name(partition);
  for (int rank = 0; rank < static_cast<int>(rows.size()); ++rank) {
    std::int64_t held = 0;
    for (const Range& range : dealt.ranges(rank, static_cast<int>(rows.size()), tokens)) {
      if (range.count > 0) runs.push_back({range.begin, range.count, rank});
      held += range.count;
    }
    if (held != rows[static_cast<std::size_t>(rank)]) return {};  // dealt by a rule of its own
  }
  std::sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) { return a.begin < b.begin; });
  return runs;
}

enum class Axis { kQueries, kKeys };

// Strip of owners beside the picture, with their numbers where they fit.
void draw_owners(Svg& svg, const std::vector<Run>& runs, Axis axis, const Box& frame) {
  if (runs.empty()) return;
  const bool down = axis == Axis::kQueries;
  const double length = down ? frame.height : frame.width;
  const double scale = length / static_cast<double>(runs.back().begin + runs.back().count);
  for (std::size_t n = 0; n < runs.size(); ++n) {
    const double at = static_cast<double>(runs[n].begin) * scale;
    const double size = static_cast<double>(runs[n].count) * scale;
    const Box box = down ? Box{frame.x - kAxis - 2, frame.y + at, kAxis, size}
                         : Box{frame.x + at, frame.y - kAxis - 2, size, kAxis};
    svg.box(n % 2 == 0 ? "owner-a" : "owner-b", box,
            fmt::format("{} {} to {}: worker {}", down ? "queries" : "keys", grouped(runs[n].begin),
                        grouped(runs[n].begin + runs[n].count - 1), runs[n].owner));
    if (size >= 16) {
      svg.text("mid small", box.x + box.width / 2, box.y + box.height / 2 + 4,
               std::to_string(runs[n].owner));
    }
  }
}

// Hair lines where owners change, across the whole picture; none where they would be most of it.
void draw_borders(Svg& svg, std::string_view css_class, const std::vector<Run>& runs, Axis axis,
                  const Box& frame) {
  if (runs.size() > 32) return;
  const bool down = axis == Axis::kQueries;
  for (std::size_t n = 1; n < runs.size(); ++n) {
    const double share = static_cast<double>(runs[n].begin) /
                         static_cast<double>(runs.back().begin + runs.back().count);
    const double x = frame.x + frame.width * share;
    const double y = frame.y + frame.height * share;
    if (down) {
      svg.line(css_class, frame.x, y, frame.x + frame.width, y);
    } else {
      svg.line(css_class, x, frame.y, x, frame.y + frame.height);
    }
  }
}

Box picture_frame(const Grid& grid, std::int64_t queries, std::int64_t keys) {
  const double rows = queries > 0 ? static_cast<double>(queries) : grid.rows;
  const double columns = keys > 0 ? static_cast<double>(keys) : grid.columns;
  const double longest = std::max(rows, columns);
  return {kAxis * 2 + 8, kAxis * 2 + 8, std::round(std::max(kShortest, kSide * columns / longest)),
          std::round(std::max(kShortest, kSide * rows / longest))};
}

void draw_axis_words(Svg& svg, std::int64_t tokens, Axis axis, const Box& frame, double away) {
  const std::string count = tokens > 0 ? grouped(tokens) + " " : std::string();
  if (axis == Axis::kKeys) {
    svg.text("quiet", frame.x, frame.y - away, count + "keys \u2192");
    return;
  }
  svg.raw(fmt::format("<g transform=\"translate({} {}) rotate(-90)\">", px(frame.x - away),
                      px(frame.y)));
  svg.text("quiet end", 0, 0, "\u2190 " + count + "queries");
  svg.raw("</g>");
}

std::string draw(const PageData& data, const Grid& grid, const std::string& label) {
  const auto sum = [](const std::vector<std::int64_t>& rows) {
    return std::accumulate(rows.begin(), rows.end(), std::int64_t{0});
  };
  const std::int64_t queries = sum(data.plan.q_rows);
  const std::int64_t keys = sum(data.plan.kv_rows);
  const std::vector<Run> query_runs = owner_runs(data, data.plan.q_rows);
  const std::vector<Run> key_runs = owner_runs(data, data.plan.kv_rows);
  const Box frame = picture_frame(grid, queries, keys);
  Svg svg(frame.x + frame.width + 1, frame.y + frame.height + 1, label, "fluid");
  const auto borders = [&](std::string_view css_class) {
    draw_borders(svg, css_class, key_runs, Axis::kKeys, frame);
    draw_borders(svg, css_class, query_runs, Axis::kQueries, frame);
  };
  borders("owner-line");
  draw_grid(svg, shrunk(grid, kMaxCells), frame);
  borders("owner-over");  // light on dark and dark on light: one of the two shows
  draw_owners(svg, key_runs, Axis::kKeys, frame);
  draw_owners(svg, query_runs, Axis::kQueries, frame);
  svg.box("frame", {frame.x - 0.5, frame.y - 0.5, frame.width + 1, frame.height + 1});
  draw_axis_words(svg, keys, Axis::kKeys, frame, key_runs.empty() ? 7 : kAxis + 8);
  draw_axis_words(svg, queries, Axis::kQueries, frame, query_runs.empty() ? 7 : kAxis + 8);
  return svg.finish();
}

// The legend: from nothing to everything in the steps of the picture.
std::string scale() {
  constexpr double kStep = 18;
  Svg svg(kStep * (kLevels + 1) + 1, 12, {});
  for (std::size_t level = 1; level <= kLevels; ++level) {
    svg.box(fmt::format("d{}", level), {kStep * static_cast<double>(level), 1, kStep, 10});
  }
  svg.box("cell-line", {0.5, 0.5, kStep * (kLevels + 1), 11});
  return fmt::format("<ul class=\"legend\"><li>nothing visible {} everything</li></ul>\n",
                     svg.finish());
}

std::string ownership(const PageData& data) {
  if (data.workers == 1) return {};
  if (data.plan.partition == "striped") {
    return element(
        "figcaption", {},
        fmt::format("Tokens are dealt one by one: token i to worker i mod {}.", data.workers));
  }
  if (owner_runs(data, data.plan.q_rows).empty()) return {};
  return element("figcaption", {}, "Along the edges: the worker that holds these queries or keys.");
}

std::string word_table(const Grid& grid) {
  const Grid coarse = shrunk(grid, kWordCells);
  Table table{
      .caption = "Share of visible pairs, by part of the queries (rows) and of the keys (columns)"};
  table.head.emplace_back("queries");
  const auto part = [](int index, int parts) {
    return fmt::format("{:.0f}\u2013{:.0f}\u202f%", 100.0 * index / parts,
                       100.0 * (index + 1) / parts);
  };
  for (int column = 0; column < coarse.columns; ++column) {
    table.head.push_back(part(column, coarse.columns));
  }
  for (int row = 0; row < coarse.rows; ++row) {
    std::vector<std::string> cells{part(row, coarse.rows)};
    for (int column = 0; column < coarse.columns; ++column) {
      cells.push_back(escape(percent(coarse.at(row, column))));
    }
    table.rows.push_back(std::move(cells));
  }
  return markup(table);
}

}  // namespace

std::string mask_section(const PageData& data) {
  std::string words = data.plan.mask.empty() ? "not described" : data.plan.mask;
  if (data.plan.pairs_total > 0) {
    const double share =
        static_cast<double>(data.plan.pairs_visible) / static_cast<double>(data.plan.pairs_total);
    words += ": " + percent(share) + " of all pairs are visible";
  }
  std::string text = "<section>\n<h2>Mask</h2>\n" + element("p", {}, words) + "\n";
  const Grid grid = input_grid(data.input);
  if (grid.rows == 0) {
    return text + element("p", "note", "No picture of it was given.") + "\n</section>\n";
  }
  text += "<figure>" + draw(data, grid, "Which keys each query sees. Mask " + words + ".") + "\n";
  text += scale() + ownership(data) + "</figure>\n";
  text += details("Numbers of this picture", word_table(grid));
  return text + "</section>\n";
}

}  // namespace annulus
