#include "outputs.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

#include "annulus/safetensors.h"
#include "annulus/version.h"
#include "failure.h"

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

Outputs make_outputs(const Inputs& inputs, DType out_dtype, Layout layout) {
  const Shape shape = out_shape(inputs);
  const auto [batch, q_len, heads, dim] = shape;
  Outputs outputs;
  outputs.out_memory = Storage(checked_bytes("out", shape, out_dtype));
  outputs.lse_memory = Storage(checked_bytes("lse", {batch, q_len, heads, 1}, DType::kFloat32));
  outputs.out = {outputs.out_memory.data(), out_dtype, shape,
                 dense_strides(shape, file_layout(layout, Role::kValueOrOut))};
  const TensorView lse = lse_view(nullptr, shape);
  outputs.lse = {outputs.lse_memory.data(), lse.dtype, lse.shape, lse.strides};
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
  write_safetensors(options.output, {out, lse},
                    {{"version", kVersion},
                     {"op", options.op},
                     {"options", computed_with(options)},
                     {"target", call.plan.target},
                     {"world_size", std::to_string(call.workers)},
                     {"partition", options.partition}});
}

}  // namespace annulus::tools
