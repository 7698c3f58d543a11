// explain_backward(): the plan of a backward, by the same functions that run it.

#include <algorithm>

#include "annulus/ring.h"
#include "kernels/dispatch.h"
#include "ops/ring_call.h"
#include "ops/ring_rank.h"

namespace annulus {
namespace {

class BackwardPlanner {
 public:
  BackwardPlanner(const RingCall& call, const RingOptions& options, DType dout_dtype)
      : problem_(call.problem),
        deal_(call.deal),
        options_(options),
        kernel_(backward_kernel(problem_.q.dtype, dout_dtype, options.attention.isa)),
        blocking_(backward_blocking(kernel_, problem_, deal_)),
        sizes_(kernel_, problem_),
        queries_travel_(queries_travel(sizes_, problem_, deal_, options.ring_backward)) {}

  BackwardPlan plan() {
    const int world = deal_.world_size;
    BackwardPlan plan;
    plan.target = kernel_.target, plan.arithmetic = kernel_.arithmetic;
    plan.bf16_products = kernel_.compute == Element::kBFloat16;
    plan.queries_travel = queries_travel_;
    plan.panel_keys = blocking_.panel_keys, plan.block_rows = blocking_.block_rows;
    plan.bytes_sent_per_rank.assign(static_cast<std::size_t>(world), 0);
    std::vector<std::vector<bool>> needs;
    for (int rank = 0; rank < world; ++rank) {
      pairs_.emplace_back(), needs.emplace_back();
      for (int owner = 0; owner < world; ++owner) {
        pairs_.back().push_back(count_pairs(problem_, deal_, queries_travel_ ? owner : rank,
                                            queries_travel_ ? rank : owner));
        needs.back().push_back(pairs_.back().back() > 0);
        plan.pairs_visible += pairs_.back().back();
      }
    }
    const std::vector<RankSchedule> schedules =
        make_ring_schedule(world, needs, directions_of(options_.topology));
    for (int rank = 0; rank < world; ++rank) {
      add_steps(plan, rank, schedules[static_cast<std::size_t>(rank)]);
      add_gradient_hops(plan, ways_of(schedules, rank), rank);
      plan.peak_bytes += rank_bytes(rank, schedules[static_cast<std::size_t>(rank)]);
    }
    plan.peak_bytes += problem_.batch * deal_.q_len * problem_.num_heads * 4;  // delta
    plan.flops = 5.0 * static_cast<double>(plan.pairs_visible) *
                 static_cast<double>(problem_.dims.head_dim + problem_.dims.v_head_dim);
    return plan;
  }

 private:
  [[nodiscard]] std::int64_t block_bytes(int owner) const {
    return queries_travel_ ? sizes_.queries(deal_.num_queries(owner))
                           : sizes_.keys(deal_.num_keys(owner));
  }
  [[nodiscard]] std::int64_t gradient_bytes(int owner) const {
    return queries_travel_ ? sizes_.query_gradients(deal_.num_queries(owner))
                           : sizes_.key_gradients(deal_.num_keys(owner));
  }

  void add_steps(BackwardPlan& plan, int rank, const RankSchedule& schedule) const {
    const auto r = static_cast<std::size_t>(rank);
    for (std::size_t step = 0; step < schedule.size(); ++step) {
      for (const Visit& visit : schedule[step]) {
        const std::int64_t pairs =
            visit.compute ? pairs_[r][static_cast<std::size_t>(visit.owner)] : 0;
        const std::int64_t bytes = visit.to >= 0 ? block_bytes(visit.owner) : 0;
        plan.steps.push_back({rank, static_cast<int>(step), visit.owner, pairs, visit.to, bytes});
        plan.bytes_sent_per_rank[r] += bytes;
      }
    }
  }

  // From each rank that adds to the block's gradients to the next, and home.
  void add_gradient_hops(BackwardPlan& plan, const std::vector<std::vector<int>>& ways,
                         int owner) const {
    for (const std::vector<int>& way : ways) {
      for (std::size_t i = 0; i < way.size(); ++i) {
        if (i + 1 < way.size() || way[i] != owner)
          plan.bytes_sent_per_rank[static_cast<std::size_t>(way[i])] += gradient_bytes(owner);
      }
    }
  }

  // What one rank allocates at its peak; see BackwardRank.
  [[nodiscard]] std::int64_t rank_bytes(int rank, const RankSchedule& schedule) const {
    std::int64_t visitors = 0, widest_block = 0, widest_gradient = 0, widest_rows = 0;
    for (const auto& step : schedule) {
      for (const Visit& visit : step) {
        if (visit.owner == rank) continue;
        visitors += 1;
        widest_block = std::max(widest_block, block_bytes(visit.owner));
        widest_gradient = std::max(widest_gradient, gradient_bytes(visit.owner));
        widest_rows = std::max(widest_rows, queries_travel_ ? deal_.num_queries(visit.owner)
                                                            : deal_.num_keys(visit.owner));
      }
    }
    const std::int64_t q = deal_.num_queries(rank), k = deal_.num_keys(rank);
    std::int64_t bytes = sizes_.queries(q) + sizes_.keys(k);  // packed
    bytes += sizes_.query_gradients(q) + sizes_.key_gradients(k);
    // Visitors' gradients: the sum in use and the one handed on that was not taken yet. Without
    // lending, copies of both and of the block in use and the one that arrives meanwhile.
    if (visitors > 0) bytes += (options_.workers.lend ? 2 : 4) * widest_gradient;
    if (visitors > 0 && !options_.workers.lend) bytes += 2 * widest_block;
    bytes +=
        BackwardPass::thread_bytes(kernel_, problem_, blocking_, static_cast<bool>(problem_.bias)) *
        threads_of(options_.attention, problem_, deal_.world_size);
    const bool segments = problem_.visibility.rules().segments;
    return bytes + (q + k + widest_rows) * (16 + (segments ? 4 * problem_.batch : 0));
  }

  const Problem& problem_;
  const Deal& deal_;
  const RingOptions& options_;
  const BackwardKernel& kernel_;
  const BackwardBlocking blocking_;
  const BackwardSizes sizes_;
  const bool queries_travel_;
  std::vector<std::vector<std::int64_t>> pairs_;  // [rank][owner of what visits]
};

}  // namespace

inline namespace v1 {

BackwardPlan explain_backward(int workers, const TensorView& q, const TensorView& k,
                              const TensorView& v, DType dout_dtype, const RingOptions& options,
                              bool rounded_dbias) {
  const std::array<std::int64_t, 4> out_shape{q.shape[0], q.shape[1], q.shape[2], v.shape[3]};
  const MutableTensorView out{nullptr, dout_dtype, out_shape, row_major_strides(out_shape)};
  const auto call =
      global_call("explain", workers, {.q = q, .k = k, .v = v, .out = out}, options, false);
  BackwardPlan plan = BackwardPlanner(*call, options, dout_dtype).plan();
  if (rounded_dbias) {
    const std::array<std::int64_t, 4>& s = options.attention.bias.shape;
    plan.peak_bytes += s[0] * s[1] * s[2] * s[3] * 4;
  }
  return plan;
}

}  // namespace v1
}  // namespace annulus
