#include "gradients.h"

#include <algorithm>

namespace annulus::tools {
namespace {

// Whole vectors, tiles and strips of every kernel.
std::int64_t padded(std::int64_t count) { return (count + 31) / 32 * 32; }

std::int64_t elements(const Shape& shape) { return shape[0] * shape[1] * shape[2] * shape[3]; }

GradientTensor gradient_of(const char* name, MutableTensorView Gradients::*member,
                           const TensorView& primal, std::vector<std::int64_t> file_shape,
                           bool widened) {
  GradientTensor gradient{name, member, {}, std::move(file_shape), 0};
  const DType dtype = widened ? DType::kFloat32 : primal.dtype;
  gradient.view = {nullptr, dtype, primal.shape, primal.strides};
  Shape extents{1, 1, 1, 1};
  std::copy(gradient.file_shape.begin(), gradient.file_shape.end(), extents.begin());
  gradient.bytes = checked_bytes(name, extents, dtype);
  return gradient;
}

}  // namespace

std::vector<GradientTensor> gradient_tensors(const Options& options, const Inputs& inputs) {
  const Layout layout = layout_from_name(options.layout);
  const Layout qk = file_layout(layout, Role::kQueryOrKey),
               vo = file_layout(layout, Role::kValueOrOut);
  const bool widened = out_dtype_of(options, inputs.q.dtype) == DType::kFloat32;
  const TensorView &q = inputs.q, &k = inputs.k, &v = inputs.v;
  std::vector<GradientTensor> gradients{
      gradient_of("dq", &Gradients::dq, q, file_shape(q.shape, qk), widened),
      gradient_of("dk", &Gradients::dk, k, file_shape(k.shape, qk), widened),
      gradient_of("dv", &Gradients::dv, v, file_shape(v.shape, vo), widened)};
  if (inputs.softmax_aux) {
    gradients.push_back(gradient_of("dsoftmax_aux", &Gradients::dsoftmax_aux, inputs.softmax_aux,
                                    inputs.file->find("softmax_aux")->shape, widened));
  }
  if (options.dbias) {
    gradients.push_back(gradient_of("dbias", &Gradients::dbias, inputs.bias,
                                    inputs.file->find("bias")->shape, widened));
  }
  return gradients;
}

// Packed operands: K twice (for S and for dQ), V once; Q and dO twice each, with a line of padding
// per row, lse and delta. Gradients: float32. A block's gradients on their way exist up to three
// times: where they are added up, as sent, and in the fresh block that replaces them at home.
std::int64_t backward_bytes(const Options& options, const Inputs& inputs, const Call& call) {
  constexpr std::int64_t kPadding = 2 * 16 + 2;  // floats per row
  constexpr std::int64_t kCopies = 3;
  constexpr std::int64_t kPerThread = 512 << 10;  // scores of 64 queries by 128 keys, a few times
  const auto [batch, q_len, heads, head_dim] = inputs.q.shape;
  const std::int64_t kv_heads = inputs.k.shape[2];
  const std::int64_t group = kv_heads > 0 ? heads / kv_heads : 0;
  const std::int64_t d = padded(head_dim), dv = padded(inputs.v.shape[3]);
  const bool bf16 = call.plan.bf16_probabilities && inputs.dout->dtype == DType::kBFloat16;
  const std::int64_t packed = bf16 ? 2 : 4;
  std::int64_t bytes = 0;
  for (std::size_t rank = 0; rank < call.plan.q_rows.size(); ++rank) {
    const std::int64_t keys = batch * kv_heads * padded(call.plan.kv_rows[rank]);
    const std::int64_t queries = batch * kv_heads * padded(call.plan.q_rows[rank] * group);
    const std::int64_t dkv = keys * (d + dv) * 4, dq = queries * d * 4;
    bytes += keys * ((2 * d + dv) * packed + 1) + queries * (2 * (d + dv) * packed + kPadding * 4) +
             std::max(dkv, dq) * kCopies + std::min(dkv, dq);
  }
  bytes += batch * q_len * heads * 4;                           // delta
  if (options.dbias) bytes += elements(inputs.bias.shape) * 4;  // its sum
  return bytes + kPerThread * call.workers * call.plan.threads_per_worker;
}

// Per element of a gradient its exact value with five sums, and two naive ones; keys and values of
// a head as double and float numbers; the float32 out that delta is made of.
std::int64_t gradient_check_bytes(const Options& options, const Inputs& inputs, std::int64_t rows) {
  constexpr std::int64_t kPerElement = 64;
  const auto sampled = [&](std::int64_t length) {
    return rows > 0 ? std::min(rows, length) : length;
  };
  Shape q = inputs.q.shape, k = inputs.k.shape, v = inputs.v.shape;
  const std::int64_t head = k[1] * (k[3] + v[3]) * 16 + k[1] * 128;
  const std::int64_t out = q[0] * q[1] * q[2] * v[3] * 4;
  q[1] = sampled(q[1]), k[1] = sampled(k[1]), v[1] = sampled(v[1]);
  std::int64_t count = elements(q) + elements(k) + elements(v);
  if (options.dbias) {
    Shape bias = inputs.bias.shape;
    bias[2] = sampled(bias[2]);
    count += elements(bias);
  }
  return count * kPerElement + head + out;
}

}  // namespace annulus::tools
