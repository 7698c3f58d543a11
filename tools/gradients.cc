#include "gradients.h"

#include <algorithm>

namespace annulus::tools {
namespace {

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
