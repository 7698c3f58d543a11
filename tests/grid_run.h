// Runs a cell of the grid in one of the call forms and says what is wrong with the results.
#pragma once

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "annulus/gradient_bars.h"
#include "grid_problem.h"

namespace annulus::testing {

// What the calls said of themselves.
struct GridSummary {
  bool bf16_forward = false, bf16_backward = false;
  bool own_delta = false;  // made of the float32 out inside the call
  // The forward's out before rounding, and its lse, where the caller does not see them.
  Tensor exact_out, exact_lse;
  std::int64_t forward_pairs = 0, backward_pairs = 0;
  std::string complaint;

  void add(const CallSummary& forward, const CallSummary& backward) {
    bf16_forward = forward.bf16_probabilities, bf16_backward = backward.bf16_probabilities;
    forward_pairs += forward.pairs_computed, backward_pairs += backward.pairs_computed;
  }
};

inline std::vector<std::int64_t> positions_of(const Partition& partition, int rank, int workers,
                                              std::int64_t len) {
  std::vector<std::int64_t> positions;
  for (const Range& r : partition.ranges(rank, workers, len)) {
    for (std::int64_t i = 0; i < r.count; ++i) positions.push_back(r.begin + i * r.stride);
  }
  return positions;
}

// Some rows of a tensor along one axis, as a tensor of its own.
class Shard {
 public:
  Shard() = default;
  Shard(const TensorView& whole, std::size_t axis, std::vector<std::int64_t> rows)
      : axis_(axis), rows_(std::move(rows)) {
    if (!whole) return;
    auto shape = whole.shape;
    shape[axis] = static_cast<std::int64_t>(rows_.size());
    tensor_ = Tensor(whole.dtype, shape, Layout::kBhsd);
    each(
        [&](const std::byte* outside, std::byte* inside) {
          std::memcpy(inside, outside, static_cast<std::size_t>(size_bytes(whole.dtype)));
        },
        whole);
  }
  void write_back(const MutableTensorView& whole) {
    each(
        [&](const std::byte* outside, std::byte* inside) {
          std::memcpy(const_cast<std::byte*>(outside), inside,
                      static_cast<std::size_t>(size_bytes(whole.dtype)));
        },
        whole);
  }
  [[nodiscard]] MutableTensorView view() {
    if (tensor_.bytes().empty()) return {};
    return tensor_.mutable_view();
  }

 private:
  template <class Visit>
  void each(const Visit& visit, const TensorView& whole) {
    const MutableTensorView mine = tensor_.mutable_view();
    for_each_index(mine.shape, [&](std::int64_t a, std::int64_t b, std::int64_t c, std::int64_t d) {
      std::array<std::int64_t, 4> at{a, b, c, d};
      at[axis_] = rows_[static_cast<std::size_t>(at[axis_])];
      visit(whole.at(at[0], at[1], at[2], at[3]), mine.at(a, b, c, d));
    });
  }
  Tensor tensor_;
  std::size_t axis_ = 0;
  std::vector<std::int64_t> rows_;
};

// One rank of the SPMD form with shards of its own; what it computed goes into the whole tensors.
inline void run_rank(GridProblem& p, Communicator& comm, GridSummary& summary, std::mutex& mutex) {
  const int rank = comm.rank();
  const auto mine = positions_of(p.options.partition, rank, p.workers, p.shape.q_len);
  const auto keys = positions_of(p.options.kv_partition.value_or(p.options.partition), rank,
                                 p.workers, p.shape.kv_len);
  const Gradients whole = p.gradients();
  Shard q(p.q, 1, mine), k(p.k, 1, keys), v(p.v, 1, keys), dout(p.dout, 1, mine),
      dlse(whole.dlse, 1, mine);
  Shard out(p.out, 1, mine), lse(p.lse, 1, mine), dq(p.dq, 1, mine), dk(p.dk, 1, keys),
      dv(p.dv, 1, keys), dbias(whole.dbias, 2, mine);
  RingOptions options = p.options;
  AttentionOptions& a = options.attention;
  Shard q_ids(a.q_segment_ids, 1, mine), kv_ids(a.kv_segment_ids, 1, keys),
      mask(a.attention_mask, 2, mine), bias(a.bias, 2, mine);
  // Given once, the ids of the queries are those of the keys, and must be dealt alike.
  a.q_segment_ids = q_ids.view(), a.kv_segment_ids = kv_ids.view();
  if (p.cell.is(kSegments, "one") && p.options.kv_partition) {
    const bool only_q = static_cast<bool>(a.q_segment_ids);
    Shard& other = only_q ? kv_ids : q_ids;
    other = Shard(only_q ? p.options.attention.q_segment_ids : p.options.attention.kv_segment_ids,
                  1, only_q ? keys : mine);
    (only_q ? a.kv_segment_ids : a.q_segment_ids) = other.view();
  }
  a.attention_mask = mask.view(), a.bias = bias.view();
  Tensor dsinks = p.rules.dsinks;
  Gradients g{dq.view(), dk.view(), dv.view(), {}, dbias.view(), dlse.view()};
  if (whole.dsoftmax_aux)
    g.dsoftmax_aux = dsinks.mutable_view(), g.dsoftmax_aux.shape = whole.dsoftmax_aux.shape;
  const CallSummary forward =
      ring_attention(comm, q.view(), k.view(), v.view(), out.view(), lse.view(), options);
  const CallSummary backward = ring_attention_backward(
      comm, dout.view(), q.view(), k.view(), v.view(), out.view(), lse.view(), g, options);
  const std::scoped_lock lock(mutex);
  summary.add(forward, backward);
  out.write_back(p.out.mutable_view()), lse.write_back(p.lse.mutable_view());
  dq.write_back(whole.dq), dk.write_back(whole.dk), dv.write_back(whole.dv);
  if (whole.dbias) dbias.write_back(whole.dbias);
  if (!whole.dsoftmax_aux) return;
  const bool first = std::isnan(p.rules.dsinks.get(0, 0, 0, 0));
  if (first) p.rules.dsinks = dsinks;
  if (p.rules.dsinks.bytes() != dsinks.bytes())
    summary.complaint += "dsoftmax_aux differs between ranks; ";
}

inline GridSummary run_calls(GridProblem& p) {
  GridSummary summary;
  const MutableTensorView out = p.out.mutable_view(), lse = p.lse.mutable_view();
  const Gradients g = p.gradients();
  if (p.cell.is(kCall, "attention")) {
    const CallSummary forward = attention(p.q, p.k, p.v, out, lse, p.options.attention);
    summary.add(forward,
                attention_backward(p.dout, p.q, p.k, p.v, out, lse, g, p.options.attention));
  } else if (p.cell.is(kCall, "with_gradients")) {
    summary.own_delta = true;
    for (const TrainingSummary& rank : ring_attention_with_gradients(
             p.workers, p.dout, p.q, p.k, p.v, out,
             p.cell.seed % 2 == 0 ? lse : MutableTensorView{}, g, p.options))
      summary.add(rank.forward, rank.backward);
  } else if (p.cell.is(kCall, "spmd")) {
    std::mutex mutex;
    run_workers(
        p.workers, [&](Communicator& comm) { run_rank(p, comm, summary, mutex); },
        p.options.workers);
  } else {
    const auto forward = ring_attention(p.workers, p.q, p.k, p.v, out, lse, p.options);
    const auto backward =
        ring_attention_backward(p.workers, p.dout, p.q, p.k, p.v, out, lse, g, p.options);
    for (std::size_t r = 0; r < forward.size(); ++r) summary.add(forward[r], backward[r]);
  }
  return summary;
}

// What the forward inside ring_attention_with_gradients() had: a forward has the same bits wherever
// it runs.
inline void find_statistics(GridProblem& p, GridSummary& summary) {
  summary.exact_out = Tensor(DType::kFloat32, p.out.view().shape);
  summary.exact_lse = Tensor(DType::kFloat32, p.lse.view().shape);
  ring_attention(p.workers, p.q, p.k, p.v, summary.exact_out.mutable_view(),
                 summary.exact_lse.mutable_view(), p.options);
}

// The forward's errors are in out, and those of products of bfloat16 pairs in lse, which the
// forward's bars judge: what is made of the two is judged with them given.
inline reference::BackwardInputs backward_inputs(GridProblem& p, GridSummary& summary) {
  if (summary.own_delta) find_statistics(p, summary);
  reference::BackwardInputs inputs{.dout = p.dout, .out = p.out, .lse = {}};
  if (summary.own_delta) inputs.out = summary.exact_out;
  inputs.dlse = p.gradients().dlse;
  if (summary.bf16_forward && !summary.bf16_backward)
    inputs.lse = summary.own_delta ? TensorView(summary.exact_lse) : TensorView(p.lse);
  return inputs;
}

// Empty if everything is right.
inline std::string judge(GridProblem& p, GridSummary& summary) {
  std::string wrong = summary.complaint;
  const bool with_lse = !summary.own_delta || p.cell.seed % 2 == 0;
  const auto forward =
      reference::check_attention(p.q, p.k, p.v, p.options.attention, p.out,
                                 with_lse ? TensorView(p.lse) : TensorView{}, summary.bf16_forward);
  if (!forward.passed) wrong += "forward: " + forward.verdict + "; ";
  reference::GradientCheckOptions check;
  check.bf16_products = summary.bf16_backward;
  const auto backward = reference::check_gradients(p.q, p.k, p.v, backward_inputs(p, summary),
                                                   p.options.attention, p.gradients(), check);
  if (!backward.passed) wrong += "backward: " + backward.verdict + "; ";
  if (summary.forward_pairs != p.visible_pairs || summary.backward_pairs != p.visible_pairs) {
    wrong += "pairs computed " + std::to_string(summary.forward_pairs) + " and " +
             std::to_string(summary.backward_pairs) + " of " + std::to_string(p.visible_pairs) +
             "; ";
  }
  for (const Box* box : {&p.out, &p.lse, &p.dq, &p.dk, &p.dv, &p.rules.dbias}) {
    if (box->touched() > 0) wrong += "elements around a tensor were written; ";
  }
  return wrong;
}

inline std::string run_once(const Cell& cell) {
  try {
    GridProblem p(cell);
    const std::vector<std::vector<std::byte>> before{p.q.bytes(), p.k.bytes(), p.v.bytes(),
                                                     p.dout.bytes(), p.rules.bias.bytes()};
    GridSummary summary = run_calls(p);
    const std::vector<std::vector<std::byte>> after{p.q.bytes(), p.k.bytes(), p.v.bytes(),
                                                    p.dout.bytes(), p.rules.bias.bytes()};
    return (before == after ? "" : "an input was written; ") + judge(p, summary);
  } catch (const std::exception& error) {
    return std::string("throws ") + error.what();
  }
}

// Bars on the largest and rms errors compare two programs' luck. A cell is small, and of thousands
// some miss such a bar by chance: a wrong program misses it again on one of two other draws. Bounds
// per element, exact values, pairs and exceptions are never tried again.
inline std::string run_cell(const Cell& cell) {
  const std::string wrong = run_once(cell);
  for (const char* certain : {"N5", "lse", "match exactly", "pairs", "throws", "written", "ranks"})
    if (wrong.find(certain) != std::string::npos) return wrong;
  if (wrong.empty()) return wrong;
  for (const std::uint64_t draw : {1, 2}) {
    Cell other = cell;
    other.seed += draw * 1000000;
    if (!run_once(other).empty()) return wrong;
  }
  return {};
}

// The cell with as many of the simplest values as still fail.
inline Cell shrink(Cell cell) {
  for (bool smaller = true; smaller;) {
    smaller = false;
    for (std::size_t f = 0; f < kFactors; ++f) {
      Cell tried = cell;
      tried.value[f] = 0;
      if (cell.value[f] == 0 || contradicts(tried) || run_cell(tried).empty()) continue;
      cell = tried, smaller = true;
    }
  }
  return cell;
}

// A variable of the environment, taken out of it: the library refuses names it does not know.
inline std::optional<std::string> take_variable(const char* name) {
  const char* text = std::getenv(name);
  if (text == nullptr) return {};
  std::string value = text;
  unsetenv(name);
  return value;
}

}  // namespace annulus::testing
