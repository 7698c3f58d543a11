// explain(): the plan of a call, by the same functions that run it.

#include <algorithm>

#include "annulus/ring.h"
#include "base/fail.h"
#include "kernels/dispatch.h"
#include "ops/rank.h"
#include "ops/ring_call.h"

namespace annulus {
namespace {

std::int64_t block_bytes(const ForwardKernel& kernel, const Problem& problem, std::int64_t keys) {
  return problem.kv_heads() * kernel.packed_bytes(problem.dims, keys);
}

// What one rank allocates at its peak; see ForwardRank and ForwardPass.
std::int64_t rank_bytes(const ForwardKernel& kernel, const Problem& problem, const Plan& plan,
                        int rank, const RankSchedule& schedule, const RankCosts& costs, bool lend) {
  const auto r = static_cast<std::size_t>(rank);
  const ForwardLayout layout =
      make_forward_layout(kernel, problem, {plan.panel_keys, plan.item_rows}, plan.q_rows[r],
                          plan.threads_per_worker, computed_blocks(schedule) > 1);
  std::int64_t widest = 0, copied = 0, at_hand = 0;
  for (const auto& step : schedule) {
    std::int64_t received = 0;
    for (const Visit& visit : step) {
      const std::int64_t keys = plan.kv_rows[static_cast<std::size_t>(visit.owner)];
      widest = std::max(widest, keys);
      if (visit.from >= 0 && !lend) received += block_bytes(kernel, problem, keys);
    }
    copied = std::max(copied,
                      received + at_hand);  // the block in use and the one that arrives meanwhile
    at_hand = received;
  }
  const bool segments = problem.visibility.rules().segments;
  const std::int64_t per_key = 16 + (segments ? 4 * problem.batch : 0);
  std::int64_t bytes = block_bytes(kernel, problem, plan.kv_rows[r]) + copied + layout.state_bytes;
  bytes += layout.items > 0 ? layout.thread_bytes * plan.threads_per_worker : 0;
  bytes += plan.q_rows[r] * per_key + 2 * widest * per_key;
  for (const auto& items : costs.item_pairs) bytes += static_cast<std::int64_t>(items.size()) * 8;
  return bytes;
}

void add_steps(Plan& plan, const ForwardKernel& kernel, const Problem& problem, int rank,
               const RankSchedule& schedule, const RankCosts& costs) {
  for (std::size_t step = 0; step < schedule.size(); ++step) {
    for (const Visit& visit : schedule[step]) {
      PlannedStep planned;
      planned.rank = rank, planned.step = static_cast<int>(step), planned.owner = visit.owner,
      planned.send_to = visit.to;
      planned.pairs = visit.compute ? costs.pairs[static_cast<std::size_t>(visit.owner)] : 0;
      if (visit.to >= 0)
        planned.bytes =
            block_bytes(kernel, problem, plan.kv_rows[static_cast<std::size_t>(visit.owner)]);
      plan.bytes_sent_per_rank[static_cast<std::size_t>(rank)] += planned.bytes;
      plan.steps.push_back(planned);
    }
  }
}

void add_notes(Plan& plan, const ForwardKernel& kernel, const Problem& problem,
               const RingOptions& options, int workers) {
  plan.notes.emplace_back(
      "k and v are copied once, packed for the kernel; q is packed strip by strip");
  if (workers > 1) {
    plan.notes.emplace_back(options.workers.lend ? "workers read each other's blocks in place"
                                                 : "blocks are copied from worker to worker");
  }
  if (problem.q.dtype != DType::kFloat32 && kernel.compute == Element::kFloat32) {
    plan.notes.push_back(
        concat("packed blocks are float32: ", kernel.target, " widens ", name(problem.q.dtype)));
  }
}

}  // namespace

inline namespace v1 {

Plan explain(int workers, const TensorView& q, const TensorView& k, const TensorView& v,
             DType out_dtype, const RingOptions& options) {
  const std::array<std::int64_t, 4> out_shape{q.shape[0], q.shape[1], q.shape[2], v.shape[3]};
  const MutableTensorView out{nullptr, out_dtype, out_shape, row_major_strides(out_shape)};
  const auto call =
      global_call("explain", workers, {.q = q, .k = k, .v = v, .out = out}, options, false);
  const Problem& problem = call->problem;
  const Deal& deal = call->deal;
  const std::int64_t q_len = problem.q_len, kv_len = problem.kv_len;
  const ForwardKernel& kernel = choose_forward(q.dtype, options.attention.isa);
  const Blocking blocking = forward_blocking(kernel, problem, deal);

  Plan plan;
  plan.target = kernel.target, plan.arithmetic = kernel.arithmetic,
  plan.mask = describe_mask(problem);
  plan.bf16_probabilities = kernel.compute == Element::kBFloat16;
  plan.workers = workers, plan.threads_per_worker = threads_of(options.attention, problem, workers);
  plan.partition = options.partition.name();
  if (options.kv_partition) plan.partition += concat(", keys ", options.kv_partition->name());
  plan.strip_rows = kernel.strip_rows, plan.tile_keys = kernel.tile_keys;
  plan.panel_keys = blocking.panel_keys, plan.item_rows = blocking.item_rows;
  plan.pairs_total = problem.batch * problem.num_heads * q_len * kv_len;
  plan.bytes_sent_per_rank.assign(static_cast<std::size_t>(workers), 0);

  std::vector<RankCosts> costs;
  std::vector<std::vector<bool>> needs;
  for (int rank = 0; rank < workers; ++rank) {
    plan.q_rows.push_back(deal.num_queries(rank));
    plan.kv_rows.push_back(deal.num_keys(rank));
    costs.push_back(rank_costs(kernel, problem, deal, rank, plan.threads_per_worker));
    plan.pairs_visible += costs.back().total();
    needs.emplace_back();
    for (const std::int64_t pairs : costs.back().pairs) needs.back().push_back(pairs > 0);
  }
  const std::vector<RankSchedule> schedule =
      make_ring_schedule(workers, needs, directions_of(options.topology));
  for (int rank = 0; rank < workers; ++rank) {
    const auto r = static_cast<std::size_t>(rank);
    add_steps(plan, kernel, problem, rank, schedule[r], costs[r]);
    plan.peak_bytes +=
        rank_bytes(kernel, problem, plan, rank, schedule[r], costs[r], options.workers.lend);
  }
  plan.flops = 2.0 * static_cast<double>(plan.pairs_visible) *
               static_cast<double>(problem.dims.head_dim + problem.dims.v_head_dim);
  add_notes(plan, kernel, problem, options, workers);
  return plan;
}

}  // namespace v1
}  // namespace annulus
