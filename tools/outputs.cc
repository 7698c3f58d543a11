#include "outputs.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "annulus/safetensors.h"
#include "annulus/version.h"
#include "failure.h"
#include "run_options.h"

namespace annulus::tools {
namespace {

namespace fs = std::filesystem;

void require_writable_file(const std::string& option, const std::string& path) {
  if (path.empty()) return;
  std::error_code unknown;
  if (fs::is_directory(path, unknown))
    fail<IoError>("name a file in it", "{}: {} is a directory", option, path);
  fs::path folder = fs::path(path).parent_path();
  if (folder.empty()) folder = ".";
  if (access(folder.c_str(), W_OK | X_OK) == 0) return;
  fail<IoError>("make the folder, or choose another", "{}: cannot write into folder {}: {}", option,
                folder.string(), std::strerror(errno));
}

// What was given, as it would be typed again; files are no part of what was computed.
std::string computed_with(const Options& options) {
  std::string text;
  for (const auto& [name, value] : options.given) {
    if (name == "--output" || name == "--report" || name == "--trace" || name == "--json" ||
        name == "--quiet")
      continue;
    text += fmt::format("{}{}={}", text.empty() ? "" : " ", name, value);
  }
  return text;
}

}  // namespace

std::int64_t output_bytes(const Options& options, const Inputs& inputs) {
  const auto [batch, q_len, heads, dim] = out_shape(inputs);
  const DType out_dtype = out_dtype_of(options, inputs.q.dtype);
  std::int64_t bytes = checked_bytes("out", {batch, q_len, heads, dim}, out_dtype) +
                       checked_bytes("lse", {batch, q_len, heads, 1}, DType::kFloat32);
  if (!options.backward) return bytes;
  for (const GradientTensor& gradient : gradient_tensors(options, inputs)) bytes += gradient.bytes;
  return bytes;
}

std::int64_t planned_bytes(std::int64_t at_start, const Options& options, const Inputs& inputs,
                           const Call& call) {
  // The library's code and tables that the start has not touched yet, and per thread a stack and an
  // arena of the allocator as far as they get used.
  constexpr std::int64_t kAllowance = 6 << 20;
  constexpr std::int64_t kPerThread = 384 << 10;
  // One row of the oracle: scores and weights of all keys in double precision, their positions,
  // bias, and the naive rows beside it.
  const std::int64_t per_row =
      inputs.k.shape[1] * 64 + (inputs.q.shape[3] + inputs.v.shape[3]) * 128;
  const std::int64_t checkers = check_threads(options);
  const std::int64_t threads = std::int64_t{call.workers} * call.plan.threads_per_worker + checkers;
  std::int64_t computing = call.plan.peak_bytes, checking = checkers * per_row;
  if (options.backward) {
    // What was freed in small blocks, the forward's and gradients that travelled, is kept for
    // reuse.
    computing += call.backward->peak_bytes + 2 * threads * kPerThread;
    if (wants_check(options)) {
      checking =
          std::max(checking, call.plan.peak_bytes +
                                 gradient_check_bytes(options, inputs, rows_of_check(options)));
    }
  }
  return at_start + inputs.bytes + output_bytes(options, inputs) + std::max(computing, checking) +
         kAllowance + threads * kPerThread;
}

Json shapes_json(const Options& options, const Inputs& inputs) {
  const Layout layout = layout_from_name(options.layout);
  const Layout qk = file_layout(layout, Role::kQueryOrKey),
               vo = file_layout(layout, Role::kValueOrOut);
  const Shape out = out_shape(inputs);
  Json shapes;
  shapes["q"] = file_shape(inputs.q.shape, qk);
  shapes["k"] = file_shape(inputs.k.shape, qk);
  shapes["v"] = file_shape(inputs.v.shape, vo);
  shapes["out"] = file_shape(out, vo);
  shapes["lse"] = {out[0], out[2], out[1]};
  if (!options.backward) return shapes;
  shapes["dout"] = file_shape(out, vo);
  for (const GradientTensor& gradient : gradient_tensors(options, inputs))
    shapes[gradient.name] = gradient.file_shape;
  return shapes;
}

Outputs make_outputs(const Options& options, const Inputs& inputs) {
  const DType out_dtype = out_dtype_of(options, inputs.q.dtype);
  const Layout layout = layout_from_name(options.layout);
  const Shape shape = out_shape(inputs);
  const auto [batch, q_len, heads, dim] = shape;
  Outputs outputs;
  outputs.out_memory = Storage(checked_bytes("out", shape, out_dtype));
  outputs.lse_memory = Storage(checked_bytes("lse", {batch, q_len, heads, 1}, DType::kFloat32));
  outputs.out = {outputs.out_memory.data(), out_dtype, shape,
                 dense_strides(shape, file_layout(layout, Role::kValueOrOut))};
  const TensorView lse = lse_view(nullptr, shape);
  outputs.lse = {outputs.lse_memory.data(), lse.dtype, lse.shape, lse.strides};
  if (!options.backward) return outputs;
  outputs.gradient_tensors = gradient_tensors(options, inputs);
  for (const GradientTensor& gradient : outputs.gradient_tensors) {
    outputs.gradient_memory.emplace_back(gradient.bytes);
    MutableTensorView& view = outputs.gradients.*gradient.member;
    view = gradient.view;
    view.data = outputs.gradient_memory.back().data();
  }
  return outputs;
}

void require_writable(const Options& options) {
  require_writable_file("--output", options.output);
  require_writable_file("--report", options.report);
  require_writable_file("--trace", options.trace);
  std::error_code unknown;
  if (!options.output.empty() && fs::equivalent(options.input, options.output, unknown)) {
    fail("choose another name for OUTPUT", "--output: {} is the INPUT, which it would replace",
         options.output);
  }
}

void write_outputs(const Options& options, const Call& call, const Outputs& outputs) {
  const Layout stored = file_layout(layout_from_name(options.layout), Role::kValueOrOut);
  const Shape& shape = outputs.out.shape;
  const NamedTensor out{"out", file_dtype_of(outputs.out.dtype), file_shape(shape, stored),
                        outputs.out_memory.data(), outputs.out_memory.bytes()};
  const NamedTensor lse{"lse",
                        file_dtype_of(DType::kFloat32),
                        {shape[0], shape[2], shape[1]},
                        outputs.lse_memory.data(),
                        outputs.lse_memory.bytes()};
  std::vector<NamedTensor> tensors{out, lse};
  for (std::size_t i = 0; i < outputs.gradient_tensors.size(); ++i) {
    const GradientTensor& gradient = outputs.gradient_tensors[i];
    tensors.push_back({gradient.name, file_dtype_of(gradient.view.dtype), gradient.file_shape,
                       outputs.gradient_memory[i].data(), gradient.bytes});
  }
  write_safetensors(options.output, tensors,
                    {{"version", kVersion},
                     {"op", options.op},
                     {"options", computed_with(options)},
                     {"target", call.plan.target},
                     {"world_size", std::to_string(call.workers)},
                     {"partition", options.partition}});
}

}  // namespace annulus::tools
