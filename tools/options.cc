#include "options.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numeric>

#include "failure.h"
#include "option_group.h"

namespace annulus::tools {
namespace {

constexpr std::int64_t kMost = std::int64_t{1} << 48;  // larger extents are typing errors
constexpr int kMostThreads = 65536;

constexpr const char* kArithmetic = "Arithmetic";
constexpr const char* kAboutTheRun = "About the run";

// Validators describe themselves in the help, at length; the text beside the option already says
// it.
template <class Validator>
CLI::Validator unspoken(const Validator& validator) {
  return CLI::Validator(validator).description("");
}
CLI::Validator extent() { return unspoken(CLI::Range(std::int64_t{0}, kMost)); }
// Left alone, -1 would be taken for 2^64 - 1, and so would anything larger.
CLI::Validator seed() {
  return {[](const std::string& text) {
            std::uint64_t value = 0;
            const auto [end, error] =
                std::from_chars(text.data(), text.data() + text.size(), value);
            const bool whole = error == std::errc() && end == text.data() + text.size();
            return whole ? std::string() : text + " is not a whole number below 2^64";
          },
          ""};
}
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
  std::string help = app.get_name() + " --help shows every option with an example";
  if (dynamic_cast<const CLI::ExtrasError*>(&error) == nullptr) return help;
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options()) {
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
  }
  for (const std::string& extra : app.remaining()) {
    const std::string close = nearest(extra.substr(0, extra.find('=')), names);
    if (extra.rfind("--", 0) == 0 && !close.empty())
      return help.insert(0, "did you mean " + close + "? ");
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
CLI::Validator at_least_one() { return unspoken(CLI::Range(std::int64_t{1}, kMost)); }
CLI::Validator not_negative() { return unspoken(CLI::NonNegativeNumber); }

bool Options::was_given(const std::string& name) const {
  return std::any_of(given.begin(), given.end(), [&](const auto& g) { return g.first == name; });
}

void add_operation_options(CLI::App& app, Options& o) {
  OptionGroup group(app, "Operation");
  group.value(
      "--op", o.op, "NAME",
      "attention: one call, or a ring with --workers > 1; spmd, joint, chunked: not in this build",
      one_of({"attention", "spmd", "joint", "chunked"}));
  group.flag("--backward", o.backward, "gradients too, for the tensor dout");
  group.flag("--dbias", o.dbias, "with --backward: that of bias, too");
  group.flag("--no-fused-backward", o.no_fused_backward,
             "with --backward: two passes over the tiles instead of one");
  group.value("--ring-backward", o.ring_backward, "NAME",
              "with --backward, what travels: auto (fewer bytes), kv or q",
              one_of({"auto", "kv", "q"}));
}

void add_shape_options(CLI::App& app, Options& o) {
  OptionGroup group(app, "Made inputs, N(0,1)");
  group.value("--batch", o.batch, "N", "sequences [1]", extent());
  group.value("--tokens", o.tokens, "N", "queries per sequence [4096]", extent());
  group.value("--kv-tokens", o.kv_tokens, "N", "keys per sequence [as --tokens]", extent());
  group.value("--heads", o.heads, "N", "query heads [1]", extent());
  group.value("--kv-heads", o.kv_heads, "N", "key and value heads [as --heads]", extent());
  group.value("--head-dim", o.head_dim, "N", "of q and k [64]", at_least_one());
  group.value("--v-head-dim", o.v_head_dim, "N", "of v and out [as --head-dim]", at_least_one());
  group.value("--dtype", o.dtype, "NAME", "bf16, f16 or f32; long names too [bf16]",
              one_of({"bf16", "f16", "f32", "bfloat16", "float16", "float32"}));
  group.value("--seed", o.seed, "N", "of the values [0]", seed());
}

void add_layout_options(CLI::App& app, Options& o) {
  OptionGroup group(app, "Files");
  group.value("--layout", o.layout, "NAME",
              "of q, k, v, out in files: bshd, bhsd, or bhds (q and k [b,h,d,s], else bhsd)",
              one_of({"bshd", "bhsd", "bhds"}));
  group.flag("--ignore-extra", o.ignore_extra, "leave tensors with other names in INPUT alone");
}

void add_ring_options(CLI::App& app, Options& o) {
  OptionGroup group(app, "Ring");
  group.value("--workers", o.workers, "P",
              "threads of this process that form the ring [1, or ANNULUS_WORKERS]", thread_count());
  group.value("--threads-per-worker", o.threads_per_worker, "N",
              "[the allowed CPUs divided by the workers]", thread_count());
  group.value("--partition", o.partition, "NAME",
              "contiguous, striped, zigzag, or positions (tensors in INPUT)",
              one_of({"contiguous", "striped", "zigzag", "positions"}));
  group.value("--topology", o.topology, "NAME", "ring, or linear: no wrap-around link",
              one_of({"ring", "linear"}));
  group.value("--num-links", o.num_links, "N",
              "parallel channels per message [1] (more: not in this build)", thread_count());
  group.flag("--all-gather", o.all_gather, "gather all keys, pass no blocks (not in this build)");
}

void add_mask_options(CLI::App& app, Options& o) {
  OptionGroup group(app, "Mask (rules are ANDed)");
  group.flag("--causal", o.causal, "query i sees keys up to i, aligned as below");
  group.value("--causal-alignment", o.causal_alignment, "NAME",
              "bottom-right (default) or top-left, for unequal lengths",
              one_of({"bottom-right", "top-left"}));
  group.value("--sliding-window", o.sliding_window, "L[,R]",
              "keys i-L .. i+R; one number is both; -1 is unlimited");
  group.value("--chunk-size", o.chunk_size, "N", "same chunk of N tokens, and not later", extent());
  group.value("--padding-segment-id", o.padding_segment_id, "ID",
              "tokens of this segment see nothing and are not seen");
  group.value("--logical-n", o.logical_n, "N", "--op joint: tokens before the padding", extent());
  group.value("--logical-l", o.logical_l, "N", "--op joint: joint tokens before the padding",
              extent());
  group.value("--joint-strategy", o.joint_strategy, "NAME", "--op joint: rear, front or none",
              one_of({"rear", "front", "none"}));
}

void add_arithmetic_options(CLI::App& app, Options& o) {
  OptionGroup group(app, kArithmetic);
  group.value("--softmax-scale", o.softmax_scale, "X", "[head_dim^-0.5]");
  group.value("--logits-soft-cap", o.logits_soft_cap, "X", "scores become cap * tanh(score / cap)",
              not_negative());
  group.value("--dropout-prob", o.dropout_prob, "X", "share of dropped probabilities [0]");
  group.value("--dropout-seed", o.dropout_seed, "N", "of the dropout pattern, 64 bits [0]", seed());
}

void add_isa_option(CLI::App& app, Options& o) {
  OptionGroup group(app, kArithmetic);
  group.value(
      "--isa", o.isa, "NAME",
      "highest instruction set to use [ANNULUS_ISA, else the best]; annulus doctor lists them");
}

void add_json_option(CLI::App& app, bool& json) {
  OptionGroup(app, kAboutTheRun)
      .flag("--json", json, "one JSON object on standard output, errors included");
}

void add_quiet_option(CLI::App& app, bool& quiet) {
  OptionGroup(app, kAboutTheRun)
      .flag("--quiet", quiet, "print errors only (and the object of --json)");
}

void add_about_options(CLI::App& app, Options& o) {
  OptionGroup group(app, kAboutTheRun);
  group.value("--report", o.report, "F.html", "page with plan, timeline and mask");
  group.value("--trace", o.trace, "F.json", "timeline for the Perfetto viewer");
  add_json_option(app, o.json);
  group.flag("--check", o.check,
             "compare with the oracle: all rows, or --check=ROWS sampled rows per head");
  group.value("--repeat", o.repeat, "N", "compute N times, report the median [1]", thread_count());
  add_quiet_option(app, o.quiet);
  group.value("--timeout-s", o.timeout_s, "SECONDS",
              "longest silence of a worker, or none [30, or ANNULUS_TIMEOUT_S]");
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

RingBackward ring_backward_from_name(const std::string& name) {
  if (name == "kv") return RingBackward::kKeys;
  return name == "q" ? RingBackward::kQueries : RingBackward::kAuto;
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
