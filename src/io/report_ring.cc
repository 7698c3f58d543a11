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
constexpr int kMaxTableCells = 1024;  // of the text alternative; beyond, the workers' table has the sums
constexpr double kNames = 52;         // width of the column of names, as in the timeline
constexpr double kTop = 20;
constexpr double kColumn = 512;  // half of the page

// Cells shrink with the number of workers: first the arrows go, then the numbers, never the gauge of work.
struct Layout {
  double width = 0;
  double height = 0;
  double gap = 0;
  double gauge = 0;      // width of the bar whose height is the work; 0: the whole cell
  bool words = false;    // "keys of 2", "25 %"
  bool numbers = false;  // "2"
};

Layout layout_for(int rows, int columns) {
  const int longest = std::max(rows, columns);
  if (longest <= 8) return {78, 40, 14, 7, true, true};
  if (longest <= 16) return {42, 26, 12, 6, false, true};
  if (longest <= 32) return {26, 18, 4, 5, false, true};
  if (longest <= 72) return {13, 13, 1, 0, false, false};
  const double size = std::max(3.0, std::floor(960.0 / longest));
  return {size, size, 0, 0, false, false};
}

class Matrix {
 public:
  explicit Matrix(const PageData& data) : data_(data) {
    rows_ = std::min(data.workers, kMaxDrawnWorkers);
    for (const PlannedStep& step : data.plan.steps) {
      if (!is_drawn(step)) continue;
      if (step.owner >= 0) columns_ = std::max(columns_, step.step + 1);
      steps_ = std::max(steps_, step.step + 1);
      largest_ = std::max(largest_, step.pairs);
    }
    cells_.resize(static_cast<std::size_t>(rows_) * static_cast<std::size_t>(columns_));
    for (const PlannedStep& step : data.plan.steps) {
      if (!is_drawn(step) || step.owner < 0 || step.step >= columns_) continue;
      std::vector<const PlannedStep*>& cell = at(step.rank, step.step);
      cell.push_back(&step);
      split_ = std::max(split_, cell.size());
    }
    layout_ = layout_for(rows_, columns_);
  }

  [[nodiscard]] int columns() const { return columns_; }
  [[nodiscard]] int idle_steps() const { return steps_ - columns_; }
  [[nodiscard]] double width() const { return kNames + columns_ * pitch_x() + 14; }
  [[nodiscard]] bool has_arrows() const { return layout_.gap >= 12; }
  [[nodiscard]] bool has_numbers() const { return layout_.numbers; }
  [[nodiscard]] bool has_edges() const { return !has_arrows() && layout_.gap > 0; }
  [[nodiscard]] bool has_empty() const { return !empty_.empty(); }

  std::string draw(const std::string& label) {
    const double height = kTop + rows_ * pitch_y() + 14;
    Svg names(kNames, height, {}, "names");
    names.text("quiet", 0, 12, "worker");
    for (int rank = 0; rank < rows_; ++rank) {
      if (layout_.height < 10 && rank % 8 != 0) continue;
      names.text(layout_.numbers ? "name" : "small", 0, y(rank) + layout_.height / 2 + 4, std::to_string(rank));
    }
    Svg svg(width() - kNames, height, label);
    draw_steps(svg);
    for (int rank = 0; rank < rows_; ++rank) {
      for (int step = 0; step < columns_; ++step) add_cell(svg, rank, step);
    }
    flush(svg);
    return "<div class=\"chart\">" + names.finish() + svg.finish() + "</div>";
  }

  std::string word_table() {
    Table table{.caption = "Whose keys each worker has in each step, and their share of all visible pairs"};
    table.head.emplace_back("worker");
    for (int step = 0; step < columns_; ++step) table.head.push_back(fmt::format("step {}", step));
    for (int rank = 0; rank < rows_; ++rank) {
      std::vector<std::string> cells{std::to_string(rank)};
      for (int step = 0; step < columns_; ++step) {
        std::string words;
        for (const PlannedStep* block : at(rank, step)) {
          if (!words.empty()) words += "; ";
          words += fmt::format("{}: {}", block->owner, escape(block->pairs > 0 ? share_text(*block) : "skipped"));
        }
        cells.push_back(words.empty() ? "none" : words);
      }
      table.rows.push_back(std::move(cells));
    }
    return markup(table);
  }

 private:
  [[nodiscard]] static bool is_within(int value, int end) { return value >= 0 && value < end; }
  [[nodiscard]] bool is_drawn(const PlannedStep& step) const {
    return is_within(step.rank, rows_) && is_within(step.step, kMaxDrawnSteps);
  }
  std::vector<const PlannedStep*>& at(int rank, int step) {
    return cells_[static_cast<std::size_t>(rank) * static_cast<std::size_t>(columns_) + static_cast<std::size_t>(step)];
  }
  [[nodiscard]] double pitch_x() const { return layout_.width + layout_.gap; }
  [[nodiscard]] double pitch_y() const { return layout_.height + layout_.gap; }
  [[nodiscard]] double x(int step) const { return 1 + step * pitch_x(); }
  [[nodiscard]] double y(int rank) const { return kTop + 1 + rank * pitch_y(); }

  [[nodiscard]] std::string share_text(const PlannedStep& step) const {
    return percent(static_cast<double>(step.pairs) / static_cast<double>(std::max<std::int64_t>(1, data_.pairs_planned)), 2);
  }

  void draw_steps(Svg& svg) const {
    const int every = layout_.width >= 24 || columns_ <= 10 ? 1 : layout_.width >= 10 ? 4 : 32;
    for (int step = 0; step < columns_; step += every) {
      const std::string words = layout_.words ? fmt::format("step {}", step) : std::to_string(step);
      svg.text("quiet mid", x(step) + layout_.width / 2, 12, words);
    }
  }

  [[nodiscard]] std::string title_of(const PlannedStep& block) const {
    std::string text = fmt::format("worker {}, step {}: keys of worker {}, ", block.rank, block.step, block.owner);
    text += block.pairs > 0 ? fmt::format("{} pairs, {} of all", count_text(static_cast<double>(block.pairs)), share_text(block))
                            : "nothing visible, skipped";
    if (block.send_to >= 0) {
      text += fmt::format("; {} sent on to worker {}", byte_text(static_cast<double>(block.bytes)), block.send_to);
    }
    return text;
  }

  void add_cell(Svg& svg, int rank, int step) {
    const std::vector<const PlannedStep*>& blocks = at(rank, step);
    const double part = layout_.width / static_cast<double>(split_);
    if (blocks.empty() && layout_.gap > 0) {
      empty_ += outline({x(step) + 0.5, y(rank) + 0.5, layout_.width - 1, layout_.height - 1});
    }
    for (std::size_t n = 0; n < blocks.size(); ++n) {
      const double width = blocks.size() == 1 ? layout_.width : part - 1;
      const Box box{x(step) + part * static_cast<double>(n), y(rank), width, layout_.height};
      if (layout_.numbers) {
        add_block(svg, *blocks[n], box);
      } else {
        add_speck(*blocks[n], box);
      }
      if (blocks[n]->send_to >= 0) add_send(*blocks[n], box);
    }
  }

  [[nodiscard]] Box gauge(const PlannedStep& block, const Box& box) const {
    const double height = box.height * static_cast<double>(block.pairs) / static_cast<double>(largest_);
    return {box.x, box.y + box.height - height, layout_.gauge > 0 ? layout_.gauge : box.width, height};
  }

  void add_block(Svg& svg, const PlannedStep& block, const Box& box) const {
    svg.box(block.pairs > 0 ? "cell" : "skipped", box, title_of(block));
    if (block.pairs > 0) {
      svg.box("gauge", {box.x, box.y, layout_.gauge, box.height});
      svg.box("compute", gauge(block, box));
    } else {
      svg.box("cell-line", {box.x + 0.5, box.y + 0.5, box.width - 1, box.height - 1});
    }
    const double left = block.pairs > 0 ? layout_.gauge : 0;
    const double center = box.x + (box.width + left) / 2;
    const double middle = box.y + box.height / 2;
    if (layout_.words && box.width >= 60) {
      svg.text("mid hint", center, middle - 3, fmt::format("keys of {}", block.owner));
      svg.text("mid small quiet hint", center, middle + 13, block.pairs > 0 ? share_text(block) : "skipped");
    } else if (box.width >= 18) {
      svg.text("mid small hint", center, middle + 4, std::to_string(block.owner));
    }
  }

  // A cell too small for words. Neighbours of one look grow into one box where no gap is drawn between cells.
  void add_speck(const PlannedStep& block, const Box& box) {
    const bool works = block.pairs > 0;
    Box shape = works ? gauge(block, box) : box;
    if (layout_.gap == 0 && works) {
      shape.height = std::max(1.0, std::round(shape.height));
      shape.y = box.y + box.height - shape.height;
    }
    Box& open = works ? open_work_ : open_skip_;
    const bool grows = layout_.gap == 0 && open.y == shape.y && open.height == shape.height &&
                       std::abs(open.x + open.width - shape.x) < 0.01;
    if (grows) {
      open.width += shape.width;
      return;
    }
    close_specks(works);
    open = shape;
  }

  void close_specks(bool works) {
    Box& open = works ? open_work_ : open_skip_;
    if (open.width > 0) (works ? work_ : skipped_) += outline(open);
    open = {};
  }

  // From the corner of this cell towards the cell in which the block arrives; a link that wraps round leaves the picture
  // at the same corner.
  void add_send(const PlannedStep& block, const Box& box) {
    const bool down = block.send_to == (block.rank + 1) % data_.workers;
    const double right = box.x + box.width - (down || !has_arrows() ? 0 : 16);  // beside the arrow that comes down
    const double corner = down ? box.y + box.height : box.y;
    if (has_arrows()) {
      const double way = down ? 1 : -1;
      const double tip_x = right + 11;
      const double tip_y = corner + way * 11;
      arrows_ += fmt::format("M{} {}L{} {}M{} {}H{}V{}", px(right + 2), px(corner + way * 2), px(tip_x), px(tip_y),
                             px(tip_x - 6), px(tip_y), px(tip_x), px(tip_y - way * 6));
    } else if (layout_.gap > 0) {
      arrows_ += fmt::format("M{} {}v{}", px(right - 0.75), px(box.y), px(box.height));
    }
  }

  void flush(Svg& svg) {
    close_specks(true);
    close_specks(false);
    svg.path("cell-line", empty_);
    svg.path("skipped", skipped_);
    svg.path("compute", work_);
    svg.path("send-line", arrows_);
  }

  const PageData& data_;
  Layout layout_;
  int rows_ = 0;
  int columns_ = 0;  // up to the last step that brings keys to somebody
  int steps_ = 0;
  std::size_t split_ = 1;  // blocks of the fullest cell: a line brings keys from both sides
  std::int64_t largest_ = 1;
  std::vector<std::vector<const PlannedStep*>> cells_;
  Box open_work_;  // specks that may still grow
  Box open_skip_;
  // Path data shared by many cells.
  std::string empty_, work_, skipped_, arrows_;
};

std::string legend(const Matrix& matrix, const PageData& data) {
  std::string text = "<ul class=\"legend\">";
  text += legend_item("compute", "visible pairs, full height = most");
  const auto skips = [](const PlannedStep& step) { return step.owner >= 0 && step.pairs <= 0; };
  if (std::any_of(data.plan.steps.begin(), data.plan.steps.end(), skips)) {
    text += legend_item("skipped", "keys at hand, nothing visible: skipped");
  }
  if (matrix.has_empty()) text += legend_item("cell-line", "no keys here");
  if (matrix.has_arrows()) {
    text += legend_item("send-line", "sent on, arrives one step later", "M6 1L15 10M9 10H15V4");
  } else if (matrix.has_edges()) {
    text += legend_item("send-line", "at the right edge: sent on", "M11 0v12");
  }
  return text + "</ul>\n";
}

}  // namespace

bool ring_is_narrow(const PageData& data) { return data.workers == 1 || Matrix(data).width() <= kColumn; }

std::string ring_section(const PageData& data) {
  std::string text = "<section>";
  if (data.workers == 1 || data.plan.steps.empty()) {
    text += "\n<h2>Ring</h2>\n<p>";
    text += data.workers == 1 ? "One worker holds every token, so no keys travel." : "The plan lists no ring steps.";
    return text + "</p>\n</section>\n";
  }
  Matrix matrix(data);
  text += "\n<h2>Ring schedule</h2>\n<p>Each cell is one worker in one step";
  text += matrix.has_numbers() ? " and names whose keys it has then. " : ". ";
  const std::int64_t skipped = std::max<std::int64_t>(0, data.blocks_total - data.blocks_used);
  text += skipped == 0 ? "Each block of keys is of use to everyone."
                       : fmt::format("{} of {} blocks are of use; the other {} cost nothing.", grouped(data.blocks_used),
                                     grouped(data.blocks_total), grouped(skipped));
  if (matrix.idle_steps() > 0) text += fmt::format(" Keys travel no further than step {}.", matrix.columns() - 1);
  text += "</p>\n";
  const std::string label = fmt::format("Ring schedule of {} in {}: {} of {} blocks of keys are used, the rest skipped.",
                                        counted(data.workers, "worker"), counted(matrix.columns(), "step"),
                                        grouped(data.blocks_used), grouped(data.blocks_total));
  text += "<figure><div class=\"scroll\">" + matrix.draw(label) + "</div>\n";
  text += legend(matrix, data) + "</figure>\n";
  if (data.workers > kMaxDrawnWorkers) {
    text += fmt::format("<p class=\"note\">The first {} workers are drawn.</p>\n", kMaxDrawnWorkers);
  }
  const std::int64_t cells = std::int64_t{data.workers} * matrix.columns();
  if (cells <= kMaxTableCells) {
    text += details("Numbers of this picture", matrix.word_table());
  } else {
    text += "<p class=\"note\">The table of workers below has the sums.</p>\n";
  }
  return text + "</section>\n";
}

}  // namespace annulus
