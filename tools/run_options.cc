#include "run_options.h"

#include "annulus/targets.h"
#include "option_group.h"

namespace annulus::tools {

bool parse_run_options(Options& options, const std::string& program, const std::string& summary,
                       const std::string& examples, int argc, char** argv) {
  CLI::App app(summary, program);
  app.footer(examples);
  app.add_option("INPUT", options.input, "safetensors file")->type_name("");
  OptionGroup files(app, "Files");
  files.value("-o,--output", options.output, "OUTPUT", "safetensors file to write");
  files.value("--out-dtype", options.out_dtype, "NAME",
              "of out: float32, or the dtype of q [that of q]",
              one_of({"bf16", "f16", "f32", "bfloat16", "float16", "float32"}));
  add_layout_options(app, options);
  add_shape_options(app, options);
  add_operation_options(app, options);
  add_ring_options(app, options);
  add_mask_options(app, options);
  add_arithmetic_options(app, options);
  add_isa_option(app, options);
  add_about_options(app, options);
  if (!parse(app, argc, argv, &options)) return false;
  // Before any work is done.
  if (wants_check(options)) static_cast<void>(rows_of_check(options));
  if (!options.timeout_s.empty()) static_cast<void>(seconds_from_text(options.timeout_s));
  return true;
}

bool wants_check(const Options& options) {
  return !options.check.empty() && options.check != "false";
}

std::int64_t rows_of_check(const Options& options) {
  return options.check == "true" ? 0 : rows_from_text(options.check);
}

int check_threads(const Options& options) { return wants_check(options) ? allowed_cpus() : 0; }

}  // namespace annulus::tools
