// annulus check: two files tensor by tensor, or a result against the oracle.

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>
#include <cstring>
#include <set>

#include "annulus/targets.h"
#include "call.h"
#include "compare.h"
#include "failure.h"
#include "gradients.h"
#include "numbers.h"
#include "option_group.h"
#include "oracle_check.h"
#include "process.h"
#include "progress.h"
#include "text.h"
#include "verbs.h"

namespace annulus::tools {
namespace {

constexpr const char* kExamples = R"(Examples:
  annulus check a.safetensors b.safetensors
  annulus check out.safetensors in.safetensors --pair=out=expected_out --pair=lse=expected_lse --any-dtype \
      --tolerance=1e-2
  annulus check in.safetensors out.safetensors --against-oracle --causal --rows=64

The first form fails if a tensor is missing on one side, if shapes or dtypes differ, or if an element is neither within
--tolerance nor within --max-ulp (both 0 by default: equal numbers; NaN equals NaN). The second form computes rows of
out and lse again in double precision, and of the gradients that OUTPUT holds; it needs the mask, the scale and the
dropout that the result was computed with. Exit status 1: they differ.
)";

struct CheckArguments {
  Options options;  // input is A, output is B; backward: B holds gradients
  bool against_oracle = false;
  std::int64_t rows = 0;
  Tolerances tolerances;
  std::vector<std::string> pairs;  // NAME_IN_A=NAME_IN_B
};

bool parse_check(CheckArguments& arguments, int argc, char** argv) {
  Options& options = arguments.options;
  CLI::App app("Compares the tensors of two files, or a result with the oracle.", "annulus check");
  app.footer(kExamples);
  app.add_option("A", options.input, "safetensors file; INPUT of the run with --against-oracle")
      ->required();
  app.add_option("B", options.output, "safetensors file; OUTPUT of the run with --against-oracle")
      ->required();
  Tolerances& tolerances = arguments.tolerances;
  OptionGroup files(app, "Two files");
  files.value("--tolerance", tolerances.absolute, "X", "largest absolute difference [0]",
              not_negative());
  files.value("--max-ulp", tolerances.ulp, "N", "or so many steps of the coarser dtype [0]",
              not_negative());
  files.value("--rms-tolerance", tolerances.rms, "X", "largest rms difference [not looked at]",
              not_negative());
  files.flag("--any-dtype", tolerances.any_dtype, "compare numbers of different dtypes");
  files
      .value("--pair", arguments.pairs, "NAME_A=NAME_B", "compare only this pair; may be repeated")
      ->allow_extra_args(false);
  OptionGroup oracle(app, "A result");
  oracle.flag("--against-oracle", arguments.against_oracle,
              "compare out, lse and gradients in B with the formula on A");
  oracle.value("--rows", arguments.rows, "ROWS", "sampled rows per head [all]", at_least_one());
  add_layout_options(app, options);
  add_mask_options(app, options);
  add_arithmetic_options(app, options);
  add_json_option(app, options.json);
  add_quiet_option(app, options.quiet);
  return parse(app, argc, argv, &options);
}

// An option of the other form would have nothing to act on.
void refuse_other_form(const CheckArguments& arguments) {
  const std::set<std::string> both{"--json", "--quiet", "--against-oracle"};
  const std::set<std::string> files{"--tolerance", "--max-ulp", "--rms-tolerance", "--any-dtype",
                                    "--pair"};
  for (const auto& [name, value] : arguments.options.given) {
    if (both.count(name) != 0 || (files.count(name) != 0) == !arguments.against_oracle) continue;
    fail(arguments.against_oracle ? "leave it out" : "add --against-oracle, or leave it out",
         "annulus check: {} does not belong to a check {} --against-oracle", name,
         arguments.against_oracle ? "with" : "without");
  }
}

std::vector<Comparison> compare_files(const CheckArguments& arguments) {
  const SafetensorsFile a = SafetensorsFile::open(arguments.options.input);
  const SafetensorsFile b = SafetensorsFile::open(arguments.options.output);
  std::vector<Comparison> comparisons;
  for (const std::string& pair : arguments.pairs) {
    const std::size_t equals = pair.find('=');
    const std::string in_a = pair.substr(0, equals);
    const std::string in_b = equals == std::string::npos ? in_a : pair.substr(equals + 1);
    const NamedTensor* tensor_a = a.find(in_a);
    const NamedTensor* tensor_b = b.find(in_b);
    if (tensor_a == nullptr && tensor_b == nullptr) {
      fail("name tensors that the files hold", "--pair={}: neither file has the tensor", pair);
    }
    const std::string what = in_a == in_b ? in_a : fmt::format("{} = {}", in_a, in_b);
    comparisons.push_back(compare(what, tensor_a, tensor_b, arguments.tolerances));
  }
  if (!arguments.pairs.empty()) return comparisons;
  std::set<std::string> names;
  for (const SafetensorsFile* file : {&a, &b}) {
    for (const NamedTensor& tensor : file->tensors()) names.insert(tensor.name);
  }
  for (const std::string& name : names) {
    comparisons.push_back(compare(name, a.find(name), b.find(name), arguments.tolerances));
  }
  return comparisons;
}

int check_files(const CheckArguments& arguments) {
  const std::vector<Comparison> comparisons = compare_files(arguments);
  const bool passed = std::all_of(comparisons.begin(), comparisons.end(),
                                  [](const Comparison& c) { return c.passed; });
  if (arguments.options.json) {
    Json tensors = Json::array();
    for (const Comparison& comparison : comparisons) tensors.push_back(comparison_json(comparison));
    fmt::print("{}\n", to_text(Json{{"tensors", tensors}, {"passed", passed}}));
  } else if (!arguments.options.quiet) {
    fmt::print("{}{}\n", comparison_table(comparisons),
               passed ? "the files agree" : "the files DIFFER");
  }
  return passed ? kOk : kCheckFailed;
}

const NamedTensor* result_tensor(const SafetensorsFile& file, const std::string& path,
                                 const std::string& name, const std::vector<std::int64_t>& shape) {
  const NamedTensor* tensor = file.find(name);
  if (tensor == nullptr || tensor->shape == shape) return tensor;
  fail("pass the layout of the run, and the INPUT that OUTPUT was computed from",
       "{}: tensor '{}' has shape {}, expected {}", path, name, shape_text(tensor->shape),
       shape_text(shape));
}

// Its dtype: that of the primal, or float32.
DType result_dtype(const NamedTensor& tensor, const std::string& path, DType primal) {
  if (tensor.file_dtype == file_dtype_of(primal)) return primal;
  if (tensor.file_dtype == "F32") return DType::kFloat32;
  fail("name the OUTPUT of a run on this INPUT", "{}: tensor '{}' has dtype {}, expected {} or F32",
       path, tensor.name, tensor.file_dtype, file_dtype_of(primal));
}

// out and lse of OUTPUT as views; checked against the shapes of INPUT.
void take_results(OracleCheck& check, const SafetensorsFile& file, const Options& options,
                  const Inputs& inputs) {
  const std::string& path = options.output;
  const Layout stored = file_layout(layout_from_name(options.layout), Role::kValueOrOut);
  const Shape shape = out_shape(inputs);
  const NamedTensor* out = result_tensor(file, path, "out", file_shape(shape, stored));
  if (out == nullptr) fail("name the OUTPUT of a run", "{}: tensor 'out' is missing", path);
  check.out = dense_view(out->data, result_dtype(*out, path, inputs.q.dtype), shape, stored);
  const NamedTensor* lse = result_tensor(file, path, "lse", {shape[0], shape[2], shape[1]});
  if (lse == nullptr) return;
  if (lse->file_dtype != "F32") {
    fail("name the OUTPUT of a run", "{}: tensor 'lse' has dtype {}, expected F32", path,
         lse->file_dtype);
  }
  check.lse = lse_view(lse->data, shape);
}

// The gradients of OUTPUT as views; checked against the shapes of INPUT.
Gradients take_gradients(const SafetensorsFile& file, const Options& options,
                         const Inputs& inputs) {
  Gradients gradients;
  for (const GradientTensor& gradient : gradient_tensors(options, inputs)) {
    const NamedTensor* tensor =
        result_tensor(file, options.output, gradient.name, gradient.file_shape);
    if (tensor == nullptr) continue;
    MutableTensorView& view = gradients.*gradient.member;
    view = gradient.view;
    view.dtype = result_dtype(*tensor, options.output, gradient.view.dtype);
    view.data = const_cast<std::byte*>(tensor->data);  // only read
  }
  return gradients;
}

bool holds_gradients(const SafetensorsFile& file) {
  const std::set<std::string> names{"dq", "dk", "dv", "dsoftmax_aux", "dbias"};
  return std::any_of(file.tensors().begin(), file.tensors().end(),
                     [&](const NamedTensor& tensor) { return names.count(tensor.name) != 0; });
}

// Whether numbers rounded to the dtype of `out` are its numbers.
bool rounds_to(const TensorView& wide, const TensorView& out) {
  std::array<std::byte, 4> bits{};
  const auto size = static_cast<std::size_t>(size_bytes(out.dtype));
  for (std::int64_t b = 0; b < out.shape[0]; ++b) {
    for (std::int64_t s = 0; s < out.shape[1]; ++s) {
      for (std::int64_t h = 0; h < out.shape[2]; ++h) {
        for (std::int64_t d = 0; d < out.shape[3]; ++d) {
          store_number(bits.data(), out.dtype, load<float>(wide.at(b, s, h, d)));
          if (std::memcmp(bits.data(), out.at(b, s, h, d), size) != 0) return false;
        }
      }
    }
  }
  return true;
}

// The run computed its gradients with the float32 out, of which OUTPUT may hold the rounded one
// alone. The same call gives the same bits again; if it does not round to OUTPUT's out, this is
// another machine or version, and the oracle's out has to do.
void compute_out(const OracleCheck& check, const Options& options, const Inputs& inputs,
                 const MutableTensorView& out) {
  const Call call = make_call(options, inputs);
  ring_attention(call.workers, inputs.q, inputs.k, inputs.v, out, {}, call.ring);
  if (!rounds_to(out, check.out)) compute_with_oracle(check, out);
}

reference::GradientCheck check_gradients(const OracleCheck& check, const SafetensorsFile& file,
                                         const Options& options, const Inputs& inputs) {
  const Progress progress(progress_is_visible(options.quiet), "checking gradients", {});
  reference::BackwardInputs backward{.dout = *inputs.dout};
  Storage memory;
  backward.out = check.out;
  if (check.out.dtype != DType::kFloat32) {
    const Shape shape = out_shape(inputs);
    memory = Storage(checked_bytes("out", shape, DType::kFloat32));
    const MutableTensorView out{memory.data(), DType::kFloat32, shape, dense_strides(shape)};
    compute_out(check, options, inputs, out);
    backward.out = out;
  }
  if (check.rows_per_head > 0) backward.lse = check.lse;
  reference::GradientCheckOptions how;
  how.bf16_products = check.bf16_probabilities && inputs.dout->dtype == inputs.q.dtype;
  how.rows_per_head = check.rows_per_head;
  return reference::check_gradients(check.q, check.k, check.v, backward, check.options,
                                    take_gradients(file, options, inputs), how);
}

std::string metadata(const SafetensorsFile& file, const std::string& name) {
  const auto found = file.metadata().find(name);
  return found == file.metadata().end() ? std::string() : found->second;
}

// How OUTPUT was computed, as far as its metadata says and this machine can.
void repeat_the_run(Options& options, const SafetensorsFile& output) {
  constexpr int kMostWorkers = 4096;  // a file must not ask for more threads
  const std::string target = metadata(output, "target"), partition = metadata(output, "partition"),
                    given = metadata(output, "options"), world = metadata(output, "world_size");
  for (const Target& known : targets()) {
    if (known.available && known.name == target) options.isa = target;
  }
  for (const char* name : {"striped", "zigzag", "positions"}) {
    if (partition == name) options.partition = partition;
  }
  if (given.find("--topology=linear") != std::string::npos) options.topology = "linear";
  int workers = 1;
  const auto [end, error] = std::from_chars(world.data(), world.data() + world.size(), workers);
  const bool sound = error == std::errc() && workers > 0 && workers <= kMostWorkers;
  options.workers = sound ? workers : 1;
}

int check_result(const CheckArguments& arguments) {
  Options options = arguments.options;
  refuse_absent_features(options);
  const SafetensorsFile output = SafetensorsFile::open(options.output);
  options.backward = holds_gradients(output), options.dbias = output.find("dbias") != nullptr;
  if (options.backward) repeat_the_run(options, output);
  const Inputs inputs = open_inputs(options);
  OracleCheck check;
  check.q = inputs.q, check.k = inputs.k, check.v = inputs.v;
  take_results(check, output, options, inputs);
  check.options = attention_options(options, inputs);
  // Without the target's name the wider bar holds for bf16.
  const std::string target = metadata(output, "target");
  check.bf16_probabilities =
      target.empty() ? inputs.q.dtype == DType::kBFloat16 : rounds_probabilities(target);
  check.rows_per_head = arguments.rows;
  check.threads = allowed_cpus();
  CheckOutcome result;
  {
    std::atomic<std::int64_t> done{0};
    const auto rows = static_cast<double>(rows_to_check(check));
    const Progress progress(progress_is_visible(options.quiet), "checking",
                            [&] { return static_cast<double>(done) / rows; });
    result.forward = check_against_oracle(check, [&](std::int64_t n) { done = n; });
  }
  if (options.backward) result.backward = check_gradients(check, output, options, inputs);
  if (options.json) {
    fmt::print("{}\n", to_text(Json{{"check", check_json(result)},
                                    {"verdict", result.verdict()},
                                    {"passed", result.passed()}}));
  } else if (!options.quiet) {
    fmt::print("{}\n", check_text(result, 0));
    const std::string with = metadata(output, "options");
    if (!result.passed() && !with.empty())
      fmt::print("OUTPUT was computed with {}\n", printable(with));
  }
  return result.passed() ? kOk : kCheckFailed;
}

}  // namespace

int check_main(int argc, char** argv) {
  CheckArguments arguments;
  if (!parse_check(arguments, argc, argv)) return kOk;
  refuse_other_form(arguments);
  install_stop_handler();
  return arguments.against_oracle ? check_result(arguments) : check_files(arguments);
}

}  // namespace annulus::tools
