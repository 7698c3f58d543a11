#include "options.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numeric>

#include "failure.h"

namespace annulus::tools {
namespace {

constexpr std::int64_t kMost = std::int64_t{1} << 48;  // larger extents are typing errors
constexpr int kMostThreads = 65536;

// Validators describe themselves in the help, at length; the text beside the option already says
// it.
template <class Validator>
CLI::Validator unspoken(const Validator& validator) {
  return CLI::Validator(validator).description("");
}
CLI::Validator extent() { return unspoken(CLI::Range(std::int64_t{0}, kMost)); }
CLI::Validator positive() { return unspoken(CLI::Range(std::int64_t{1}, kMost)); }
CLI::Validator thread_count() { return unspoken(CLI::Range(1, kMostThreads)); }

std::int64_t integer_from(const std::string& option, const std::string& text) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) {
    fail("write a whole number", "{}: '{}' is not a whole number", option, text);
  }
  return value;
}

std::size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = std::exchange(row[0], i + 1);
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, row[j] + 1, diagonal + 1});
    }
  }
  return row.back();
}

std::string fix_for(const CLI::App& app, const CLI::ParseError& error) {
  const std::string help = app.get_name() + " --help shows every option with an example";
  if (dynamic_cast<const CLI::ExtrasError*>(&error) == nullptr) return help;
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options()) {
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
  }
  for (const std::string& extra : app.remaining()) {
    const std::string close = nearest(extra.substr(0, extra.find('=')), names);
    if (extra.rfind("--", 0) == 0 && !close.empty()) return "did you mean " + close + "? " + help;
  }
  return help;
}

void remember_given(const CLI::App& app, Options& options) {
  for (const CLI::Option* option : app.get_options()) {
    if (option->count() == 0 || option->get_lnames().empty()) continue;
    options.given.emplace_back("--" + option->get_lnames().front(), option->results().back());
  }
}

}  // namespace

CLI::Validator one_of(const std::vector<std::string>& names) {
  return unspoken(CLI::IsMember(names));
}
CLI::Validator at_least_ten() { return unspoken(CLI::Range(10, kMostThreads)); }
CLI::Validator at_least_one() { return positive(); }
CLI::Validator not_negative() { return unspoken(CLI::NonNegativeNumber); }

bool Options::was_given(const std::string& name) const {
  return std::any_of(given.begin(), given.end(), [&](const auto& g) { return g.first == name; });
}

void add_operation_options(CLI::App& app, Options& options) {
  const std::string group = "Operation";
  app.add_option("--op", options.op,
                 "attention (one call, or a ring with --workers > 1); spmd, joint, chunked (not in "
                 "this build)")
      ->check(one_of({"attention", "spmd", "joint", "chunked"}))
      ->type_name("NAME")
      ->group(group);
  app.add_flag("--backward", options.backward, "gradients for the tensor dout (not in this build)")
      ->group(group);
  app.add_flag("--dbias", options.dbias, "with --backward: that of bias too (not in this build)")
      ->group(group);
  app.add_flag("--no-fused-backward", options.no_fused_backward,
               "two passes instead of one (not in this build)")
      ->group(group);
  app.add_option("--ring-backward", options.ring_backward,
                 "what travels: auto, kv or q (not in this build)")
      ->check(one_of({"auto", "kv", "q"}))
      ->type_name("NAME")
      ->group(group);
}

void add_shape_options(CLI::App& app, Options& options) {
  const std::string group = "Made inputs, N(0,1)";
  app.add_option("--batch", options.batch, "sequences [1]")
      ->check(extent())
      ->type_name("N")
      ->group(group);
  app.add_option("--tokens", options.tokens, "queries per sequence [4096]")
      ->check(extent())
      ->type_name("N")
      ->group(group);
  app.add_option("--kv-tokens", options.kv_tokens, "keys per sequence [as --tokens]")
      ->check(extent())
      ->type_name("N")
      ->group(group);
  app.add_option("--heads", options.heads, "query heads [1]")
      ->check(extent())
      ->type_name("N")
      ->group(group);
  app.add_option("--kv-heads", options.kv_heads, "key and value heads [as --heads]")
      ->check(extent())
      ->type_name("N")
      ->group(group);
  app.add_option("--head-dim", options.head_dim, "of q and k [64]")
      ->check(positive())
      ->type_name("N")
      ->group(group);
  app.add_option("--v-head-dim", options.v_head_dim, "of v and out [as --head-dim]")
      ->check(positive())
      ->type_name("N")
      ->group(group);
  app.add_option("--dtype", options.dtype, "bf16, f16 or f32; long names too [bf16]")
      ->check(one_of({"bf16", "f16", "f32", "bfloat16", "float16", "float32"}))
      ->type_name("NAME")
      ->group(group);
  app.add_option("--seed", options.seed, "of the values [0]")->type_name("N")->group(group);
}

void add_layout_options(CLI::App& app, Options& options) {
  const std::string group = "Files";
  app.add_option("--layout", options.layout,
                 "of q, k, v, out in files: bshd, bhsd, or bhds (q and k [b,h,d,s], else bhsd)")
      ->check(one_of({"bshd", "bhsd", "bhds"}))
      ->type_name("NAME")
      ->group(group);
  app.add_flag("--ignore-extra", options.ignore_extra,
               "leave tensors with other names in INPUT alone")
      ->group(group);
}

void add_ring_options(CLI::App& app, Options& options) {
  const std::string group = "Ring";
  app.add_option("--workers", options.workers,
                 "threads of this process that form the ring [1, or ANNULUS_WORKERS]")
      ->check(thread_count())
      ->type_name("P")
      ->group(group);
  app.add_option("--threads-per-worker", options.threads_per_worker,
                 "[the allowed CPUs divided by the workers]")
      ->check(thread_count())
      ->type_name("N")
      ->group(group);
  app.add_option("--partition", options.partition,
                 "contiguous, striped, zigzag, or positions (tensors in INPUT)")
      ->check(one_of({"contiguous", "striped", "zigzag", "positions"}))
      ->type_name("NAME")
      ->group(group);
  app.add_option("--topology", options.topology, "ring, or linear: no wrap-around link")
      ->check(one_of({"ring", "linear"}))
      ->type_name("NAME")
      ->group(group);
  app.add_option("--num-links", options.num_links,
                 "parallel channels per message [1] (more: not in this build)")
      ->check(thread_count())
      ->type_name("N")
      ->group(group);
  app.add_flag("--all-gather", options.all_gather,
               "gather all keys, pass no blocks (not in this build)")
      ->group(group);
}

void add_mask_options(CLI::App& app, Options& options) {
  const std::string group = "Mask (rules are ANDed)";
  app.add_flag("--causal", options.causal, "query i sees keys up to i, aligned as below")
      ->group(group);
  app.add_option("--causal-alignment", options.causal_alignment,
                 "bottom-right (default) or top-left, for unequal lengths")
      ->check(one_of({"bottom-right", "top-left"}))
      ->type_name("NAME")
      ->group(group);
  app.add_option("--sliding-window", options.sliding_window,
                 "keys i-L .. i+R; one number is both; -1 is unlimited")
      ->type_name("L[,R]")
      ->group(group);
  app.add_option("--chunk-size", options.chunk_size, "same chunk of N tokens, and not later")
      ->check(extent())
      ->type_name("N")
      ->group(group);
  app.add_option("--padding-segment-id", options.padding_segment_id,
                 "tokens of this segment see nothing and are not seen")
      ->type_name("ID")
      ->group(group);
  app.add_option("--logical-n", options.logical_n, "--op joint: tokens before the padding")
      ->check(extent())
      ->type_name("N")
      ->group(group);
  app.add_option("--logical-l", options.logical_l, "--op joint: joint tokens before the padding")
      ->check(extent())
      ->type_name("N")
      ->group(group);
  app.add_option("--joint-strategy", options.joint_strategy, "--op joint: rear, front or none")
      ->check(one_of({"rear", "front", "none"}))
      ->type_name("NAME")
      ->group(group);
}

void add_arithmetic_options(CLI::App& app, Options& options) {
  const std::string group = "Arithmetic";
  app.add_option("--softmax-scale", options.softmax_scale, "[head_dim^-0.5]")
      ->type_name("X")
      ->group(group);
  app.add_option("--logits-soft-cap", options.logits_soft_cap,
                 "scores become cap * tanh(score / cap)")
      ->check(not_negative())
      ->type_name("X")
      ->group(group);
  app.add_option("--dropout-prob", options.dropout_prob,
                 "share of dropped probabilities [0] (not in this build)")
      ->type_name("X")
      ->group(group);
  app.add_option("--dropout-seed", options.dropout_seed, "of the dropout pattern [0]")
      ->type_name("N")
      ->group(group);
}

void add_isa_option(CLI::App& app, Options& options) {
  app.add_option(
         "--isa", options.isa,
         "highest instruction set to use [ANNULUS_ISA, else the best]; annulus doctor lists them")
      ->type_name("NAME")
      ->group("Arithmetic");
}

void add_json_option(CLI::App& app, bool& json) {
  app.add_flag("--json", json, "one JSON object on standard output, errors included")
      ->group("About the run");
}

void add_about_options(CLI::App& app, Options& options) {
  const std::string group = "About the run";
  app.add_option("--report", options.report, "page with plan, timeline and mask")
      ->type_name("F.html")
      ->group(group);
  app.add_option("--trace", options.trace, "timeline for the Perfetto viewer")
      ->type_name("F.json")
      ->group(group);
  add_json_option(app, options.json);
  app.add_flag("--check", options.check,
               "compare with the oracle: all rows, or --check=ROWS sampled rows per head")
      ->group(group);
  app.add_option("--repeat", options.repeat, "compute N times, report the median [1]")
      ->check(thread_count())
      ->type_name("N")
      ->group(group);
  app.add_flag("--quiet", options.quiet, "print errors only (and the object of --json)")
      ->group(group);
  app.add_option("--timeout-s", options.timeout_s,
                 "longest silence of a worker, or none [30, or ANNULUS_TIMEOUT_S]")
      ->type_name("SECONDS")
      ->group(group);
}

bool parse(CLI::App& app, int argc, char** argv, Options* options) {
  app.get_formatter()->column_width(32);
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    fmt::print("{}", app.help());
    return false;
  } catch (const CLI::ParseError& error) {
    throw InvalidArgument(app.get_name() + ": " + error.what(), fix_for(app, error));
  }
  if (options != nullptr) remember_given(app, *options);
  return true;
}

DType dtype_from_name(const std::string& name) {
  if (name == "f32" || name == "float32") return DType::kFloat32;
  if (name == "f16" || name == "float16") return DType::kFloat16;
  if (name == "bf16" || name == "bfloat16") return DType::kBFloat16;
  fail("use bf16, f16 or f32", "dtype '{}' is unknown", name);
}

Layout layout_from_name(const std::string& name) {
  if (name == "bhsd") return Layout::kBhsd;
  return name == "bhds" ? Layout::kBhds : Layout::kBshd;
}

SlidingWindow window_from_text(const std::string& text) {
  if (text.empty()) return {};
  const std::size_t comma = text.find(',');
  SlidingWindow window;
  window.left = integer_from("--sliding-window", text.substr(0, comma));
  window.right = comma == std::string::npos
                     ? window.left
                     : integer_from("--sliding-window", text.substr(comma + 1));
  if (window.left < -1 || window.right < -1) {
    fail("write -1 for an unlimited side",
         "--sliding-window: found '{}', expected -1 or more on each side", text);
  }
  return window;
}

double seconds_from_text(const std::string& text) {
  if (text == "none") return std::numeric_limits<double>::infinity();
  double seconds = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), seconds);
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(seconds) ||
      !(seconds > 0)) {
    fail("write seconds, or none to wait without end",
         "--timeout-s: found '{}', expected a positive number or none", text);
  }
  return seconds;
}

std::int64_t rows_from_text(const std::string& text) {
  if (text == "all") return 0;
  const std::int64_t rows = integer_from("--check", text);
  if (rows < 1)
    fail("leave the number out to check all rows", "--check: found {} rows, expected at least 1",
         rows);
  return rows;
}

std::string nearest(const std::string& name, const std::vector<std::string>& known) {
  std::string best;
  std::size_t distance = name.size() / 3 + 2;
  const std::string start = name.substr(0, 64);  // the work grows with the square
  for (const std::string& candidate : known) {
    const std::size_t d = edit_distance(start, candidate);
    if (d < distance) distance = d, best = candidate;
  }
  return best;
}

}  // namespace annulus::tools
