// annulus check: two files tensor by tensor, or a result against the oracle.

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <set>

#include "annulus/targets.h"
#include "call.h"
#include "compare.h"
#include "failure.h"
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
out and lse again in double precision; it needs the mask and the scale that the result was computed with. Exit status 1:
they differ.
)";

struct CheckArguments {
  Options options;  // input is A, output is B
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
              "compare out and lse in B with the formula on A");
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

// out and lse of OUTPUT as views; checked against the shapes of INPUT.
void take_results(OracleCheck& check, const SafetensorsFile& file, const CheckArguments& arguments,
                  const Inputs& inputs) {
  const std::string& path = arguments.options.output;
  const Layout stored = file_layout(layout_from_name(arguments.options.layout), Role::kValueOrOut);
  const Shape shape = out_shape(inputs);
  const NamedTensor* out = result_tensor(file, path, "out", file_shape(shape, stored));
  if (out == nullptr) fail("name the OUTPUT of a run", "{}: tensor 'out' is missing", path);
  DType dtype = DType::kFloat32;
  if (out->file_dtype == file_dtype_of(inputs.q.dtype)) {
    dtype = inputs.q.dtype;
  } else if (out->file_dtype != "F32") {
    fail("name the OUTPUT of a run on this INPUT",
         "{}: tensor 'out' has dtype {}, expected {} or F32", path, out->file_dtype,
         file_dtype_of(inputs.q.dtype));
  }
  check.out = dense_view(out->data, dtype, shape, stored);
  const NamedTensor* lse = result_tensor(file, path, "lse", {shape[0], shape[2], shape[1]});
  if (lse == nullptr) return;
  if (lse->file_dtype != "F32") {
    fail("name the OUTPUT of a run", "{}: tensor 'lse' has dtype {}, expected F32", path,
         lse->file_dtype);
  }
  check.lse = lse_view(lse->data, shape);
}

std::string metadata(const SafetensorsFile& file, const std::string& name) {
  const auto found = file.metadata().find(name);
  return found == file.metadata().end() ? std::string() : found->second;
}

int check_result(const CheckArguments& arguments) {
  const Options& options = arguments.options;
  refuse_absent_features(options);
  const Inputs inputs = open_inputs(options);
  const SafetensorsFile output = SafetensorsFile::open(options.output);
  OracleCheck check;
  check.q = inputs.q, check.k = inputs.k, check.v = inputs.v;
  take_results(check, output, arguments, inputs);
  check.options = attention_options(options, inputs);
  // Without the target's name the wider bar holds for bf16.
  const std::string target = metadata(output, "target");
  check.bf16_probabilities =
      target.empty() ? inputs.q.dtype == DType::kBFloat16 : rounds_probabilities(target);
  check.rows_per_head = arguments.rows;
  check.threads = allowed_cpus();
  reference::CheckResult result;
  {
    std::atomic<std::int64_t> done{0};
    const auto rows = static_cast<double>(rows_to_check(check));
    const Progress progress(progress_is_visible(options.quiet), "checking",
                            [&] { return static_cast<double>(done) / rows; });
    result = check_against_oracle(check, [&](std::int64_t n) { done = n; });
  }
  if (options.json) {
    fmt::print("{}\n", to_text(Json{{"check", check_json(result)},
                                    {"verdict", result.verdict},
                                    {"passed", result.passed}}));
  } else if (!options.quiet) {
    fmt::print("{}\n", check_text(result));
    const std::string with = metadata(output, "options");
    if (!result.passed && !with.empty())
      fmt::print("OUTPUT was computed with {}\n", printable(with));
  }
  return result.passed ? kOk : kCheckFailed;
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
