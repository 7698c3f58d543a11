// What the backward packs before it runs, and how large it is.

#include <atomic>
#include <cstring>

#include "comm/parcel.h"
#include "ops/backward_pass.h"

namespace annulus {

BackwardSizes::BackwardSizes(const BackwardKernel& kernel, const Problem& problem)
    : k_row(kernel.row_floats(problem.dims.head_dim)),
      v_row(kernel.row_floats(problem.dims.v_head_dim)),
      kernel_(kernel),
      problem_(problem) {}

std::int64_t BackwardSizes::keys(std::int64_t num_keys) const {
  return problem_.kv_heads() * kernel_.packed_bytes(problem_.dims, num_keys);
}
std::int64_t BackwardSizes::key_gradients(std::int64_t num_keys) const {
  return problem_.kv_heads() * padded_keys(num_keys) * (k_row + v_row) * 4;
}
std::int64_t BackwardSizes::queries(std::int64_t tokens) const {
  return problem_.kv_heads() * strips(tokens) * kernel_.strip_bytes(problem_.dims);
}
std::int64_t BackwardSizes::query_gradients(std::int64_t tokens) const {
  return problem_.kv_heads() * strips(tokens) * strip_floats() * 4;
}
std::int64_t BackwardSizes::padded_keys(std::int64_t num_keys) const {
  return round_up(num_keys, kernel_.tile_keys);
}
std::int64_t BackwardSizes::strips(std::int64_t tokens) const {
  return ceil_div(tokens * problem_.group, kernel_.strip_rows);
}
std::int64_t BackwardSizes::strip_floats() const {
  return kernel_.dq_rows(problem_.dims.head_dim) * kernel_.strip_rows;
}

namespace {

void pack_one_strip(const BackwardKernel& kernel, const QuerySide& side, const Head& head,
                    std::int64_t strip, const RowStatistics& statistics, std::byte* to) {
  constexpr int kMaxLanes = 32;
  const Problem& problem = *side.problem;
  const Lanes lanes = side.lanes(head, strip);
  const void *q[kMaxLanes], *dout[kMaxLanes];
  float lse[kMaxLanes], delta[kMaxLanes];
  for (int n = 0; n < lanes.count; ++n) {
    const std::int64_t row = lanes.row[n], h = lanes.head[n];
    q[n] = problem.q.at(head.batch, row, h, 0), dout[n] = problem.dout.at(head.batch, row, h, 0);
    std::memcpy(lse + n, statistics.lse.at(head.batch, row, h, 0), 4);
    std::memcpy(delta + n, statistics.delta.at(head.batch, row, h, 0), 4);
  }
  const std::int64_t q_size = size_bytes(problem.q.dtype),
                     dout_size = size_bytes(problem.dout.dtype);
  kernel.pack_strip(
      to,
      {q, dout, lanes.count, problem.q.strides[3] * q_size, problem.dout.strides[3] * dout_size,
       static_cast<Element>(problem.q.dtype), static_cast<Element>(problem.dout.dtype), lse, delta},
      problem.dims);
}

}  // namespace

Parcel pack_queries(const BackwardKernel& kernel, const QuerySide& side,
                    const RowStatistics& statistics, Executor& executor) {
  const Problem& problem = *side.problem;
  const std::int64_t strips = side.strips_per_head(),
                     strip_bytes = kernel.strip_bytes(problem.dims);
  const auto buffer = std::make_shared<AlignedBuffer>(problem.kv_heads() * strips * strip_bytes);
  constexpr std::int64_t kPiece = 8;  // strips
  std::atomic<std::int64_t> next{0};
  executor.run([&](int) {
    const std::int64_t all = problem.kv_heads() * strips;
    for (std::int64_t i = next++; i * kPiece < all; i = next++) {
      for (std::int64_t number = i * kPiece; number < std::min(all, (i + 1) * kPiece); ++number) {
        pack_one_strip(kernel, side, problem.head_at(number / strips), number % strips, statistics,
                       buffer->data() + number * strip_bytes);
      }
    }
  });
  return parcel_of(buffer);
}

Parcel pack_backward_keys(const BackwardKernel& kernel, const Problem& problem, const Rows& rows,
                          Executor& executor) {
  return pack_keys({kernel.packed_bytes(problem.dims, rows.size()),
                    kernel.blocking(problem.dims).panel_keys, kernel.pack_keys},
                   problem, rows, executor);
}

}  // namespace annulus
