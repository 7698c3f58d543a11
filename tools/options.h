// The command line of one verb: names, help, and what was given. Everything here is as the user
// wrote it; call.h turns it into a call.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "annulus/ring.h"
#include "annulus/tensor.h"

namespace CLI {  // NOLINT(readability-identifier-naming): CLI11's
class App;
}

namespace annulus::tools {

struct Options {
  std::string input;
  std::string output;

  std::string op = "attention";
  bool backward = false;
  bool dbias = false;
  bool no_fused_backward = false;
  std::string ring_backward = "auto";

  std::int64_t batch = 1;
  std::int64_t tokens = 4096;
  std::optional<std::int64_t> kv_tokens;  // default: tokens
  std::int64_t heads = 1;
  std::optional<std::int64_t> kv_heads;  // default: heads
  std::int64_t head_dim = 64;
  std::optional<std::int64_t> v_head_dim;  // default: head_dim
  std::string dtype = "bf16";
  std::uint64_t seed = 0;

  std::string layout = "bshd";
  std::string out_dtype;  // empty: the dtype of q
  bool ignore_extra = false;

  std::optional<int> workers;
  int threads_per_worker = 0;
  std::string partition = "contiguous";
  std::string topology = "ring";
  int num_links = 1;
  bool all_gather = false;

  bool causal = false;
  std::string causal_alignment = "bottom-right";
  std::string sliding_window;
  std::int64_t chunk_size = 0;
  std::optional<std::int32_t> padding_segment_id;
  std::optional<std::int64_t> logical_n;
  std::optional<std::int64_t> logical_l;
  std::string joint_strategy = "rear";

  std::optional<double> softmax_scale;
  double logits_soft_cap = 0;
  double dropout_prob = 0;
  std::uint64_t dropout_seed = 0;
  std::string isa;

  std::string report;
  std::string trace;
  bool json = false;
  std::string check;  // empty: no check; "all" or a number of rows
  int repeat = 1;
  bool quiet = false;
  std::string timeout_s;

  // What was given, in the order of the help: {"--tokens", "4096"}.
  std::vector<std::pair<std::string, std::string>> given;
  [[nodiscard]] bool was_given(const std::string& name) const;
};

// The groups of `annulus run --help`. Other verbs take those they share.
void add_operation_options(CLI::App& app, Options& options);
void add_shape_options(CLI::App& app, Options& options);
void add_layout_options(CLI::App& app, Options& options);
void add_ring_options(CLI::App& app, Options& options);
void add_mask_options(CLI::App& app, Options& options);
void add_arithmetic_options(CLI::App& app, Options& options);
void add_isa_option(CLI::App& app, Options& options);
void add_json_option(CLI::App& app, bool& json);
void add_quiet_option(CLI::App& app, bool& quiet);
void add_about_options(CLI::App& app, Options& options);

// False if help was asked for, which then has been printed. Throws InvalidArgument; a mistyped name
// is answered with the nearest known one.
bool parse(CLI::App& app, int argc, char** argv, Options* options = nullptr);

DType dtype_from_name(const std::string& name);
Layout layout_from_name(const std::string& name);
RingBackward ring_backward_from_name(const std::string& name);
SlidingWindow window_from_text(const std::string& text);  // "L" or "L,R"
double seconds_from_text(const std::string& text);        // "30", or "none" for infinity
std::int64_t rows_from_text(const std::string& text);     // "all" is 0
std::string nearest(const std::string& name, const std::vector<std::string>& known);

}  // namespace annulus::tools
