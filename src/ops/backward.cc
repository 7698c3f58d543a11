// The public backward: what is prepared before the ranks run and finished after them.

#include <atomic>
#include <cstring>
#include <limits>
#include <optional>

#include "annulus/attention.h"
#include "annulus/ring.h"
#include "base/fail.h"
#include "base/half.h"
#include "ops/ring_call.h"
#include "ops/ring_rank.h"
#include "ops/row.h"

namespace annulus {
namespace {

// A dense float32 tensor of the call's own.
class FloatTensor {
 public:
  explicit FloatTensor(const std::array<std::int64_t, 4>& shape)
      : shape_(shape), buffer_(shape[0] * shape[1] * shape[2] * shape[3] * 4) {}
  [[nodiscard]] MutableTensorView view() const {
    return {buffer_.data(), DType::kFloat32, shape_, row_major_strides(shape_)};
  }

 private:
  std::array<std::int64_t, 4> shape_;
  AlignedBuffer buffer_;
};

std::array<std::int64_t, 4> row_shape(const Problem& problem) {
  return {problem.batch, problem.q.shape[1], problem.num_heads, 1};
}

RowDeltas deltas_of(const Problem& problem, const MutableTensorView& delta) {
  return {problem.dout, problem.gradients.dlse, delta};
}

// Of some rows of a given out.
void compute_deltas(const Problem& problem, const Rows& rows, const RowDeltas& deltas,
                    Executor& executor) {
  const TensorView& out = problem.given_out;
  const std::int64_t size = size_bytes(out.dtype), count = rows.size();
  std::atomic<std::int64_t> next{0};
  executor.run([&](int) {
    std::vector<float> row(static_cast<std::size_t>(problem.dims.v_head_dim));
    for (std::int64_t i = next++; i < problem.batch * count; i = next++) {
      const std::int64_t b = i / count, t = rows.row[static_cast<std::size_t>(i % count)];
      for (std::int64_t h = 0; h < problem.num_heads; ++h) {
        load_row(out.dtype, out.at(b, t, h, 0), out.strides[3] * size, row.data(),
                 problem.dims.v_head_dim);
        deltas.write(b, t, h, row.data());
      }
    }
  });
}

// dbias is summed in float32: in the caller's tensor if it is that, else beside it.
class BiasGradient {
 public:
  explicit BiasGradient(const Problem& problem) : to_(problem.gradients.dbias) {
    if (!to_) return;
    if (to_.dtype != DType::kFloat32) own_.emplace(to_.shape);
    sum_ = own_ ? own_->view() : to_;
    for_elements([this](auto... at) { std::memset(sum_.at(at...), 0, 4); });
    for (std::size_t axis = 0; axis < 2; ++axis) {
      if (problem.bias.strides[axis] == 0) sum_.strides[axis] = 0;
    }
  }
  [[nodiscard]] const MutableTensorView& sum() const { return sum_; }
  // Rounds once.
  void finish() const {
    if (!own_) return;
    const TensorView from = own_->view();
    for_elements([&](auto... at) {
      store_element(to_.dtype, to_.at(at...), load_element(DType::kFloat32, from.at(at...)));
    });
  }

 private:
  template <class Body>
  void for_elements(const Body& body) const {
    for (std::int64_t a = 0; a < to_.shape[0]; ++a)
      for (std::int64_t b = 0; b < to_.shape[1]; ++b)
        for (std::int64_t c = 0; c < to_.shape[2]; ++c)
          for (std::int64_t d = 0; d < to_.shape[3]; ++d) body(a, b, c, d);
  }

  MutableTensorView to_;
  std::optional<FloatTensor> own_;
  MutableTensorView sum_;
};

CallTensors backward_tensors(const TensorView& dout, const TensorView& q, const TensorView& k,
                             const TensorView& v, const TensorView& out, const TensorView& lse,
                             const Gradients& gradients) {
  CallTensors tensors{.q = q, .k = k, .v = v};
  tensors.forward = false, tensors.backward = true;
  tensors.dout = dout, tensors.given_out = out, tensors.given_lse = lse;
  tensors.gradients = gradients;
  return tensors;
}

// Rows of bias, dense masks and dbias lie where their queries live.
void check_travel(const RingCall& call, const RingOptions& options) {
  if (options.ring_backward != RingBackward::kQueries || call.deal.whole_tensors) return;
  const Problem& p = call.problem;
  const char* what = p.bias                                ? "bias"
                     : p.visibility.rules().attention_mask ? "attention_mask"
                                                           : nullptr;
  if (what == nullptr) return;
  fail_with_fix("let ring_backward choose", "ring_attention_backward",
                "queries cannot travel with ", what,
                ": a rank has the rows of its own queries only");
}

CallSummary run_backward(Communicator& comm, const RingCall& call, const RingOptions& options,
                         const MutableTensorView& delta, const BiasGradient& bias) {
  Executor executor(threads_of(options.attention, call.problem, comm.world_size()));
  compute_deltas(call.problem, call.deal.q_rows(comm.rank()), deltas_of(call.problem, delta),
                 executor);
  return BackwardRank(comm, call, options, executor, {call.problem.given_lse, delta}, bias.sum())
      .run();
}

}  // namespace

inline namespace v1 {

CallSummary ring_attention_backward(Communicator& comm, const TensorView& dout, const TensorView& q,
                                    const TensorView& k, const TensorView& v, const TensorView& out,
                                    const TensorView& lse, const Gradients& gradients,
                                    const RingOptions& options) {
  const auto call = spmd_call("ring_attention_backward", comm,
                              backward_tensors(dout, q, k, v, out, lse, gradients), options);
  check_travel(*call, options);
  const FloatTensor delta(row_shape(call->problem));
  const BiasGradient bias(call->problem);
  CallSummary summary = run_backward(comm, *call, options, delta.view(), bias);
  bias.finish();
  return summary;
}

std::vector<CallSummary> ring_attention_backward(int workers, const TensorView& dout,
                                                 const TensorView& q, const TensorView& k,
                                                 const TensorView& v, const TensorView& out,
                                                 const TensorView& lse, const Gradients& gradients,
                                                 const RingOptions& options) {
  const auto call = global_call("ring_attention_backward", workers,
                                backward_tensors(dout, q, k, v, out, lse, gradients), options);
  const FloatTensor delta(row_shape(call->problem));
  const BiasGradient bias(call->problem);
  std::vector<CallSummary> summaries(static_cast<std::size_t>(workers));
  run_workers(
      workers,
      [&](Communicator& comm) {
        summaries[static_cast<std::size_t>(comm.rank())] =
            run_backward(comm, *call, options, delta.view(), bias);
      },
      options.workers);
  bias.finish();
  return summaries;
}

CallSummary attention_backward(const TensorView& dout, const TensorView& q, const TensorView& k,
                               const TensorView& v, const TensorView& out, const TensorView& lse,
                               const Gradients& gradients, const AttentionOptions& options) {
  RingOptions ring;
  ring.attention = options;
  ring.workers.timeout_s = std::numeric_limits<double>::infinity();  // nobody to wait for
  return ring_attention_backward(1, dout, q, k, v, out, lse, gradients, ring).front();
}

std::vector<TrainingSummary> ring_attention_with_gradients(
    int workers, const TensorView& dout, const TensorView& q, const TensorView& k,
    const TensorView& v, const MutableTensorView& out, const MutableTensorView& lse,
    const Gradients& gradients, const RingOptions& options) {
  CallTensors tensors{.q = q, .k = k, .v = v, .out = out, .lse = lse};
  tensors.backward = true, tensors.dout = dout, tensors.gradients = gradients;
  const auto call = global_call("ring_attention", workers, tensors, options);
  const FloatTensor delta(row_shape(call->problem));
  std::optional<FloatTensor> own_lse;
  if (!lse) call->problem.lse = own_lse.emplace(row_shape(call->problem)).view();
  const BiasGradient bias(call->problem);
  std::vector<TrainingSummary> summaries(static_cast<std::size_t>(workers));
  run_workers(
      workers,
      [&](Communicator& comm) {
        TrainingSummary& summary = summaries[static_cast<std::size_t>(comm.rank())];
        Executor executor(threads_of(options.attention, call->problem, workers));
        summary.forward =
            ForwardRank(comm, *call, options, executor, deltas_of(call->problem, delta.view()))
                .run();
        summary.backward = BackwardRank(comm, *call, options, executor,
                                        {call->problem.lse, delta.view()}, bias.sum())
                               .run();
      },
      options.workers);
  bias.finish();
  return summaries;
}

}  // namespace v1
}  // namespace annulus
