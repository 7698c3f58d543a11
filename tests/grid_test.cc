// Every option with every other: forward and backward of each cell of a pairwise covering grid
// against the oracle, by bars N1 to N6.
//
//   ANNULUS_GRID_CELL="<index or description>"   runs this cell alone
//   ANNULUS_GRID_CELLS=60000                     runs as many, those beyond the coverings random

#include <gtest/gtest.h>

#include <cctype>
#include <string>
#include <vector>

#include "grid_run.h"
#include "grid_testing.h"

namespace annulus::testing {
namespace {

constexpr std::size_t kCells = 3000;
constexpr std::size_t kParts = 16;  // tests, so that they can run side by side

// Read before the library reads the environment.
const std::optional<std::string> kOneCell = take_variable("ANNULUS_GRID_CELL");
const std::optional<std::string> kCellCount = take_variable("ANNULUS_GRID_CELLS");

const std::vector<Cell>& coverings() {
  static const std::vector<Cell> cells = covering_cells(kCells);
  return cells;
}

Cell grid_cell(std::size_t index) {
  return index < coverings().size() ? coverings()[index] : random_cell(index);
}

void expect_right(std::size_t index, const Cell& cell, bool shrunk) {
  const std::string wrong = run_cell(cell);
  if (wrong.empty()) return;
  ADD_FAILURE() << "cell " << index << ": " << wrong << "\n  ANNULUS_GRID_CELL=\"" << describe(cell)
                << "\"";
  if (!shrunk) return;
  const Cell least = shrink(cell);
  std::cerr << "  shrunk: ANNULUS_GRID_CELL=\"" << describe(least) << "\"\n  " << run_cell(least)
            << "\n";
}

class Grid : public ::testing::TestWithParam<std::size_t> {};

TEST_P(Grid, EveryCellMeetsTheBars) {
  if (kOneCell) GTEST_SKIP() << "one cell alone was asked for";
  const std::size_t cells =
      std::max<std::size_t>(kCellCount ? std::stoull(*kCellCount) : 0, coverings().size());
  int failures = 0;
  const auto step = kParts * static_cast<std::size_t>(kTestScale);
  for (std::size_t i = GetParam(); i < cells; i += step) {
    expect_right(i, grid_cell(i), failures < 3);
    failures += HasFailure() ? 1 : 0;
  }
}

INSTANTIATE_TEST_SUITE_P(Parts, Grid, ::testing::Range<std::size_t>(0, kParts));

TEST(GridCell, Alone) {
  if (!kOneCell) GTEST_SKIP() << "set ANNULUS_GRID_CELL";
  const bool index = std::isdigit(static_cast<unsigned char>(kOneCell->at(0))) != 0;
  expect_right(0, index ? grid_cell(std::stoull(*kOneCell)) : parse_cell(*kOneCell), true);
}

TEST(GridCells, EveryPairOfValuesOccurs) {
  const std::vector<Cell>& cells = coverings();
  EXPECT_GE(cells.size(), kCells);
  PairCoverage coverage;
  for (const Cell& cell : cells) {
    EXPECT_FALSE(contradicts(cell)) << describe(cell);
    coverage.add(cell);
  }
  std::size_t pairs = 0;
  for_each_pair([&](const Cell& pair, std::size_t f, std::size_t g) {
    ++pairs;
    EXPECT_TRUE(coverage.seen(f, pair.value[f], g, pair.value[g]))
        << grid_factors()[f].name << "=" << grid_factors()[f].values[std::size_t(pair.value[f])]
        << " " << grid_factors()[g].name << "="
        << grid_factors()[g].values[std::size_t(pair.value[g])];
  });
  RecordProperty("cells", static_cast<int>(cells.size()));
  RecordProperty("pairs", static_cast<int>(pairs));
}

TEST(GridCells, DescriptionsReadBack) {
  for (std::size_t i = 0; i < coverings().size(); i += 97) {
    const Cell cell = grid_cell(i), again = parse_cell(describe(cell));
    EXPECT_EQ(again.value, cell.value);
    EXPECT_EQ(again.seed, cell.seed);
  }
}

}  // namespace
}  // namespace annulus::testing
