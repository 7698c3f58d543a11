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

std::int64_t RankCosts::total() const {
  return std::accumulate(pairs.begin(), pairs.end(), std::int64_t{0});
}

RankCosts rank_costs(const ForwardKernel& kernel, const Problem& problem, const Deal& deal,
                     int rank, int threads) {
  const Rows rows = deal.q_rows(rank);
  const std::vector<std::int32_t> segments = deal.q_segments(rank, rows);
  const std::vector<Item> items = make_items(
      make_forward_layout(kernel, problem, rows.size(), threads, false), problem, kernel);
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
