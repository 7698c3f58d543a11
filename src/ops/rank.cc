#include "ops/rank.h"

#include <algorithm>
#include <numeric>

#include "annulus/targets.h"
#include "base/environment.h"

namespace annulus {
namespace {

Rows rows_of(const Partition& partition, bool whole, int rank, int world_size, std::int64_t len) {
  const std::vector<Range> ranges = partition.ranges(rank, world_size, len);
  return whole ? global_rows(ranges) : shard_rows(ranges);
}

// Rows of one head and keys of the longest shards; at least 1, for nobody's rows are cut, too.
BlockSizes longest_shards(const Problem& problem, const Deal& deal) {
  BlockSizes longest{1, 1};
  for (int rank = 0; rank < deal.world_size; ++rank) {
    const std::int64_t tokens = deal.num_queries(rank);
    longest.q = std::max(longest.q, tokens * problem.group);
    longest.kv = std::max(longest.kv, deal.num_keys(rank));
  }
  return longest;
}

std::int64_t block_size(std::int64_t asked, std::int64_t choice, std::int64_t most,
                        std::int64_t step) {
  return round_up(std::min(asked > 0 ? asked : choice, most), step);
}

}  // namespace

Rows Deal::q_rows(int rank) const {
  return rows_of(*q_partition, whole_tensors, rank, world_size, q_len);
}
Rows Deal::kv_rows(int rank) const {
  return rows_of(*kv_partition, whole_tensors, rank, world_size, kv_len);
}

std::vector<Direction> directions_of(Topology topology) {
  if (topology == Topology::kRing) return {{1, true}};
  return {{1, false}, {-1, false}};
}

int threads_of(const AttentionOptions& options, const Problem& problem, int workers) {
  if (options.threads > 0) return options.threads;
  // Waking a thread and waiting for it costs some 10 us, in which one core does 1 MFLOP or more:
  // whoever has less to do than twice that for each thread is faster alone.
  constexpr double kFlopsPerThread = 2e6;
  const double flops = 2.0 * static_cast<double>(problem.batch * problem.num_heads) *
                       static_cast<double>(ceil_div(problem.q_len, workers)) *
                       static_cast<double>(problem.kv_len) *
                       static_cast<double>(problem.dims.head_dim + problem.dims.v_head_dim);
  const int threads = read_environment().threads.value_or(std::max(1, allowed_cpus() / workers));
  return flops >= kFlopsPerThread * threads
             ? threads
             : std::max(1, static_cast<int>(flops / kFlopsPerThread));
}

Blocking forward_blocking(const ForwardKernel& kernel, const Problem& problem, const Deal& deal) {
  const Blocking choice = kernel.blocking(problem.dims);
  // A bias tile is as large as the scores: few strips, or it does not fit the L2.
  const std::int64_t rows = problem.rule.bias ? 4 * kernel.strip_rows : choice.item_rows;
  const BlockSizes asked = problem.forward_blocks, most = longest_shards(problem, deal);
  return {block_size(asked.kv, choice.panel_keys, most.kv, kernel.panel_step(problem.dims)),
          block_size(asked.q, rows, most.q, kernel.strip_rows)};
}

BackwardBlocking backward_blocking(const BackwardKernel& kernel, const Problem& problem,
                                   const Deal& deal) {
  const BackwardBlocking choice = kernel.blocking(problem.dims);
  const BlockSizes asked = problem.backward_blocks, most = longest_shards(problem, deal);
  return {block_size(asked.kv, choice.panel_keys, std::min(most.kv, kernel.most.panel_keys),
                     kernel.tile_keys),
          block_size(asked.q, choice.block_rows, std::min(most.q, kernel.most.block_rows),
                     kernel.strip_rows)};
}

std::int64_t RankCosts::total() const {
  return std::accumulate(pairs.begin(), pairs.end(), std::int64_t{0});
}

RankCosts rank_costs(const ForwardKernel& kernel, const Problem& problem, const Deal& deal,
                     int rank, int threads) {
  const Rows rows = deal.q_rows(rank);
  const std::vector<std::int32_t> segments = deal.q_segments(rank, rows);
  const Blocking blocking = forward_blocking(kernel, problem, deal);
  const std::vector<Item> items = make_items(
      make_forward_layout(kernel, problem, blocking, rows.size(), threads, false), problem, kernel);
  RankCosts costs;
  for (int owner = 0; owner < deal.world_size; ++owner) {
    Rows keys = deal.kv_rows(owner);
    std::vector<std::int32_t> ids = deal.kv_segments(owner, keys);
    const std::int64_t head_bytes = kernel.packed_bytes(problem.dims, keys.size());
    const KeyBlock block =
        describe_keys(kernel.tile_keys, head_bytes, problem, std::move(keys), std::move(ids));
    costs.item_pairs.push_back(count_item_pairs(problem, items, {&rows, segments}, block));
    costs.pairs.push_back(std::accumulate(costs.item_pairs.back().begin(),
                                          costs.item_pairs.back().end(), std::int64_t{0}));
  }
  return costs;
}

int computed_blocks(const RankSchedule& schedule) {
  int blocks = 0;
  for (const auto& step : schedule) {
    blocks += static_cast<int>(
        std::count_if(step.begin(), step.end(), [](const Visit& visit) { return visit.compute; }));
  }
  return blocks;
}

}  // namespace annulus
