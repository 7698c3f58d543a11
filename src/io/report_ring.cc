#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "io/report_parts.h"
#include "io/svg.h"
#include "io/units.h"

namespace annulus {
namespace {

constexpr int kMaxDrawnSteps = 1024;
constexpr int kMaxTableCells = 1024;  // more cells are no text alternative to anything
constexpr double kNames = 52;         // width of the column of names, as in the timeline
constexpr double kTop = 20;
constexpr double kColumn = 512;  // half of the page

// Keys at one worker in one step.
struct Block {
  int rank = 0;
  int step = 0;
  int owner = 0;
  std::int64_t pairs = 0;
  std::vector<const PlannedStep*> sends;  // both ways at once, perhaps
};

using Cell = std::vector<Block>;

// The plan's steps as a grid of workers and steps.
class Grid {
 public:
  explicit Grid(const PageData& data) : rows_(std::min(data.workers, kMaxDrawnWorkers)) {
    for (const PlannedStep& step : data.plan.steps) {
      if (is_drawn(step)) columns_ = std::max(columns_, step.step + 1);
    }
    cells_.resize(static_cast<std::size_t>(rows_) * static_cast<std::size_t>(columns_));
    for (const PlannedStep& step : data.plan.steps) {
      if (is_drawn(step)) add(step);
    }
  }

  [[nodiscard]] int rows() const { return rows_; }
  [[nodiscard]] int columns() const { return columns_; }
  [[nodiscard]] std::int64_t most_pairs() const { return most_pairs_; }
  [[nodiscard]] std::size_t most_blocks() const { return most_blocks_; }
  [[nodiscard]] const Cell& at(int rank, int step) const { return cells_[index(rank, step)]; }

  template <class Predicate>
  [[nodiscard]] bool any_block(Predicate predicate) const {
    return std::any_of(cells_.begin(), cells_.end(), [&](const Cell& cell) {
      return std::any_of(cell.begin(), cell.end(), predicate);
    });
  }
  [[nodiscard]] bool any_empty() const {
    return std::any_of(cells_.begin(), cells_.end(), [](const Cell& cell) { return cell.empty(); });
  }

 private:
  [[nodiscard]] bool is_drawn(const PlannedStep& step) const {
    return step.rank >= 0 && step.rank < rows_ && step.step >= 0 && step.step < kMaxDrawnSteps &&
           step.owner >= 0;
  }
  [[nodiscard]] std::size_t index(int rank, int step) const {
    return static_cast<std::size_t>(rank) * static_cast<std::size_t>(columns_) +
           static_cast<std::size_t>(step);
  }

  void add(const PlannedStep& step) {
    Cell& cell = cells_[index(step.rank, step.step)];
    auto block = std::find_if(cell.begin(), cell.end(),
                              [&](const Block& known) { return known.owner == step.owner; });
    if (block == cell.end()) {
      block = cell.insert(cell.end(), {step.rank, step.step, step.owner, 0, {}});
    }
    block->pairs += step.pairs;
    if (step.send_to >= 0) block->sends.push_back(&step);
    most_pairs_ = std::max(most_pairs_, block->pairs);
    most_blocks_ = std::max(most_blocks_, cell.size());
  }

  int rows_ = 0;
  int columns_ = 0;
  std::int64_t most_pairs_ = 1;
  std::size_t most_blocks_ = 1;  // of one cell: a line of workers brings keys from both sides
  std::vector<Cell> cells_;
};

// Cells shrink with the number of workers: the arrows go first, then the numbers, never the gauge.
struct Layout {
  double width = 0;
  double height = 0;
  double gap = 0;
  double gauge = 0;      // width of the bar whose height is the work; 0: the whole cell
  bool words = false;    // "keys of 2", "25 %"
  bool numbers = false;  // "2"
  bool arrows = false;   // else sending shows as an edge, where there is a gap for it
};

Layout layout_for(const Grid& grid) {
  const int longest = std::max(grid.rows(), grid.columns());
  if (longest <= 8) return {78, 40, 14, 7, true, true, true};
  if (longest <= 16) return {42, 26, 12, 6, false, true, true};
  if (longest <= 32) return {26, 18, 4, 5, false, true, false};
  if (longest <= 72) return {13, 13, 1, 0, false, false, false};
  const double size = std::max(3.0, std::floor(960.0 / longest));
  return {size, size, 0, 0, false, false, false};
}

double width_of(const Grid& grid) {
  const Layout layout = layout_for(grid);
  return grid.columns() * (layout.width + layout.gap) + 14;
}

std::string share_text(const Block& block, std::int64_t all_pairs) {
  const double all = static_cast<double>(std::max<std::int64_t>(1, all_pairs));
  return percent(static_cast<double>(block.pairs) / all, 2);
}

std::string title_of(const Block& block, std::int64_t all_pairs) {
  std::string text =
      fmt::format("worker {}, step {}: keys of worker {}, ", block.rank, block.step, block.owner);
  if (block.pairs > 0) {
    text += fmt::format("{} pairs, {} of all", count_text(static_cast<double>(block.pairs)),
                        share_text(block, all_pairs));
  } else {
    text += "nothing visible, skipped";
  }
  for (const PlannedStep* send : block.sends) {
    text += fmt::format("; {} sent on to worker {}", byte_text(static_cast<double>(send->bytes)),
                        send->send_to);
  }
  return text;
}

class Matrix {
 public:
  Matrix(const Grid& grid, const PageData& data)
      : grid_(grid), data_(data), layout_(layout_for(grid)) {}

  std::string draw(const std::string& label) {
    const double height = kTop + grid_.rows() * pitch_y() + 14;
    Svg names(kNames, height, {}, "names");
    names.text("quiet", 0, 12, "worker");
    for (int rank = 0; rank < grid_.rows(); ++rank) {
      if (layout_.height < 10 && rank % 8 != 0) continue;
      names.text(layout_.numbers ? "name" : "small", 0, y(rank) + layout_.height / 2 + 4,
                 std::to_string(rank));
    }
    Svg svg(width_of(grid_), height, label);
    draw_steps(svg);
    for (int rank = 0; rank < grid_.rows(); ++rank) {
      for (int step = 0; step < grid_.columns(); ++step) draw_cell(svg, rank, step);
    }
    draw_shared(svg);
    return "<div class=\"chart\">" + names.finish() + svg.finish() + "</div>";
  }

 private:
  [[nodiscard]] double pitch_x() const { return layout_.width + layout_.gap; }
  [[nodiscard]] double pitch_y() const { return layout_.height + layout_.gap; }
  [[nodiscard]] double x(int step) const { return 1 + step * pitch_x(); }
  [[nodiscard]] double y(int rank) const { return kTop + 1 + rank * pitch_y(); }

  void draw_steps(Svg& svg) const {
    const bool roomy = layout_.width >= 24 || grid_.columns() <= 10;
    const int every = roomy ? 1 : layout_.width >= 10 ? 4 : 32;
    for (int step = 0; step < grid_.columns(); step += every) {
      const std::string words = layout_.words ? fmt::format("step {}", step) : std::to_string(step);
      svg.text("quiet mid", x(step) + layout_.width / 2, 12, words);
    }
  }

  void draw_cell(Svg& svg, int rank, int step) {
    const Cell& cell = grid_.at(rank, step);
    if (cell.empty() && layout_.gap > 0) {
      empty_ += outline({x(step) + 0.5, y(rank) + 0.5, layout_.width - 1, layout_.height - 1});
    }
    const double part = layout_.width / static_cast<double>(grid_.most_blocks());
    const double width = cell.size() == 1 ? layout_.width : part - 1;
    for (std::size_t n = 0; n < cell.size(); ++n) {
      const Box box{x(step) + part * static_cast<double>(n), y(rank), width, layout_.height};
      if (layout_.numbers) {
        draw_block(svg, cell[n], box);
      } else {
        add_speck(cell[n], box);
      }
      for (const PlannedStep* send : cell[n].sends) add_send(*send, box);
    }
  }

  [[nodiscard]] Box gauge(const Block& block, const Box& box) const {
    const double share = static_cast<double>(block.pairs) / static_cast<double>(grid_.most_pairs());
    const double width = layout_.gauge > 0 ? layout_.gauge : box.width;
    return {box.x, box.y + box.height * (1 - share), width, box.height * share};
  }

  void draw_block(Svg& svg, const Block& block, const Box& box) const {
    const bool works = block.pairs > 0;
    svg.box(works ? "cell" : "skipped", box, title_of(block, data_.pairs_planned));
    if (works) {
      svg.box("gauge", {box.x, box.y, layout_.gauge, box.height});
      svg.box("compute", gauge(block, box));
    } else {
      svg.box("cell-line", {box.x + 0.5, box.y + 0.5, box.width - 1, box.height - 1});
    }
    const double center = box.x + (box.width + (works ? layout_.gauge : 0)) / 2;
    const double middle = box.y + box.height / 2;
    if (layout_.words && box.width >= 60) {
      svg.text("mid hint", center, middle - 3, fmt::format("keys of {}", block.owner));
      svg.text(works ? "mid small quiet hint" : "mid small hint", center, middle + 13,
               works ? share_text(block, data_.pairs_planned) : "skipped");
    } else if (box.width >= 18) {
      svg.text("mid small hint", center, middle + 4, std::to_string(block.owner));
    }
  }

  // A cell too small for words. Where no gap is drawn, neighbours that look alike become one box.
  void add_speck(const Block& block, const Box& box) {
    const bool works = block.pairs > 0;
    Box shape = works ? gauge(block, box) : box;
    if (works && layout_.gap == 0) {
      shape.height = std::max(1.0, std::round(shape.height));
      shape.y = box.y + box.height - shape.height;
    }
    Box& open = works ? open_work_ : open_skip_;
    const bool joins = layout_.gap == 0 && open.y == shape.y && open.height == shape.height &&
                       std::abs(open.x + open.width - shape.x) < 0.01;
    if (joins) {
      open.width += shape.width;
    } else {
      close_speck(works);
      open = shape;
    }
  }

  void close_speck(bool works) {
    Box& open = works ? open_work_ : open_skip_;
    if (open.width > 0) (works ? work_ : skipped_) += outline(open);
    open = {};
  }

  // From the corner of this cell towards the cell in which the block arrives. A link that wraps
  // round leaves the picture by the same corner. Arrows up keep clear of those that come down.
  void add_send(const PlannedStep& send, const Box& box) {
    if (layout_.gap == 0) return;
    if (!layout_.arrows) {
      sends_ += fmt::format("M{} {}v{}", px(box.x + box.width - 0.75), px(box.y), px(box.height));
      return;
    }
    const bool down = send.send_to == (send.rank + 1) % data_.workers;
    const double way = down ? 1 : -1;
    const double tail_x = box.x + box.width + (down ? 2 : -14);
    const double tail_y = down ? box.y + box.height + 2 : box.y - 2;
    const double tip_x = tail_x + 9;
    const double tip_y = tail_y + way * 9;
    sends_ += fmt::format("M{} {}L{} {}M{} {}H{}V{}", px(tail_x), px(tail_y), px(tip_x), px(tip_y),
                          px(tip_x - 6), px(tip_y), px(tip_x), px(tip_y - way * 6));
  }

  void draw_shared(Svg& svg) {
    close_speck(true);
    close_speck(false);
    svg.path("cell-line", empty_);
    svg.path("skipped", skipped_);
    svg.path("compute", work_);
    svg.path("send-line", sends_);
  }

  const Grid& grid_;
  const PageData& data_;
  Layout layout_;
  Box open_work_;  // specks that may still grow
  Box open_skip_;
  std::string empty_, work_, skipped_, sends_;  // path data shared by many cells
};

std::string legend(const Grid& grid) {
  const Layout layout = layout_for(grid);
  std::string text = "<ul class=\"legend\">";
  text += legend_item("compute", "visible pairs, full height = most");
  if (grid.any_block([](const Block& block) { return block.pairs <= 0; })) {
    text += legend_item("skipped", "keys at hand, nothing visible: skipped");
  }
  if (grid.any_empty()) text += legend_item("cell-line", "no keys here");
  if (layout.arrows) {
    text += legend_item("send-line", "sent on, arrives one step later", "M6 1L15 10M9 10H15V4");
  } else if (layout.gap > 0) {
    text += legend_item("send-line", "at the right edge: sent on", "M11 0v12");
  }
  return text + "</ul>\n";
}

std::string word_table(const Grid& grid, std::int64_t all_pairs) {
  Table table{.caption =
                  "Whose keys each worker has in each step, and their share of all visible pairs"};
  table.head.emplace_back("worker");
  for (int step = 0; step < grid.columns(); ++step) {
    table.head.push_back(fmt::format("step {}", step));
  }
  for (int rank = 0; rank < grid.rows(); ++rank) {
    std::vector<std::string> cells{std::to_string(rank)};
    for (int step = 0; step < grid.columns(); ++step) {
      std::string words;
      for (const Block& block : grid.at(rank, step)) {
        if (!words.empty()) words += "; ";
        words += fmt::format("{}: {}", block.owner,
                             block.pairs > 0 ? share_text(block, all_pairs) : "skipped");
      }
      cells.push_back(words.empty() ? "none" : escape(words));
    }
    table.rows.push_back(std::move(cells));
  }
  return markup(table);
}

std::string summary(const Grid& grid, const PageData& data) {
  std::string text = "Each cell is one worker in one step";
  text += layout_for(grid).numbers ? " and names whose keys it has then." : ".";
  const std::int64_t skipped = std::max<std::int64_t>(0, data.blocks_total - data.blocks_used);
  if (skipped == 0) {
    text += " Each block of keys is of use to everyone.";
  } else {
    text += fmt::format(" {} of {} blocks are of use; the other {} cost nothing.",
                        grouped(data.blocks_used), grouped(data.blocks_total), grouped(skipped));
  }
  if (grid.columns() < data.workers) {
    text += fmt::format(" After step {} nobody needs further keys.", grid.columns() - 1);
  }
  return text;
}

bool has_ring(const PageData& data) { return data.workers > 1 && data.blocks_total > 0; }

}  // namespace

bool ring_is_narrow(const PageData& data) {
  return has_ring(data) && kNames + width_of(Grid(data)) <= kColumn;
}

std::string ring_section(const PageData& data) {
  if (!has_ring(data)) {
    return "<section>\n<h2>Ring</h2>\n" +
           element("p", {},
                   data.workers == 1 ? "One worker holds every token, so no keys travel."
                                     : "The plan lists no ring steps.") +
           "\n</section>\n";
  }
  const Grid grid(data);
  std::string text = "<section>\n<h2>Ring schedule</h2>\n";
  text += element("p", {}, summary(grid, data)) + "\n";
  const std::string label =
      fmt::format("Ring schedule of {} in {}: {} of {} blocks of keys are used, the rest skipped.",
                  counted(data.workers, "worker"), counted(grid.columns(), "step"),
                  grouped(data.blocks_used), grouped(data.blocks_total));
  text += "<figure><div class=\"scroll\">" + Matrix(grid, data).draw(label) + "</div>\n";
  text += legend(grid) + "</figure>\n";
  if (data.workers > kMaxDrawnWorkers) {
    text += element("p", "note", fmt::format("The first {} workers are drawn.", kMaxDrawnWorkers));
  }
  if (grid.rows() * grid.columns() <= kMaxTableCells) {
    text += details("Numbers of this picture", word_table(grid, data.pairs_planned));
  } else {
    text += element("p", "note", "The table of workers below has the sums.");
  }
  return text + "\n</section>\n";
}

}  // namespace annulus
