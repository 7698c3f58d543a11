#include <fmt/format.h>

#include <algorithm>
#include <iterator>

#include "annulus/targets.h"
#include "bench_rows.h"
#include "failure.h"
#include "text.h"

namespace annulus::tools {
namespace {

struct Path {
  DType dtype;
  std::string target;
};

// One dtype on one instruction set each, fastest first: the units made for bf16, or else the best
// that widens it; every vector width for float32. Targets below AVX2 serve other machines.
std::vector<Path> paths_of(DType dtype, const SuiteChoice& choice) {
  if (choice.one_path) return {{dtype, chosen_target(dtype, choice.isa)}};
  const std::vector<std::string> wanted = dtype == DType::kBFloat16
                                              ? std::vector<std::string>{"amx", "avx512_bf16"}
                                              : std::vector<std::string>{"avx512", "avx2"};
  std::vector<Path> paths;
  const std::vector<Target> known = targets();
  for (const std::string& name : wanted) {
    const bool available = std::any_of(known.begin(), known.end(), [&](const Target& target) {
      return target.available && target.name == name;
    });
    if (available) paths.push_back({dtype, name});
  }
  if (paths.empty()) paths.push_back({dtype, chosen_target(dtype)});
  return paths;
}

std::vector<Path> best_paths(const SuiteChoice& choice) {
  return {paths_of(DType::kBFloat16, choice).front(), paths_of(DType::kFloat32, choice).front()};
}

std::vector<Path> other_paths(const SuiteChoice& choice) {
  std::vector<Path> others;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    const std::vector<Path> paths = paths_of(dtype, choice);
    others.insert(others.end(), paths.begin() + 1, paths.end());
  }
  return others;
}

BenchRow row_of(const Path& path, std::int64_t head_dim, bool causal) {
  BenchRow row;
  row.dtype = path.dtype;
  row.target = path.target;
  row.head_dim = row.v_head_dim = head_dim;
  row.mask = causal ? "causal" : "full";
  row.options.causal = causal;
  return row;
}

void set_length(BenchRow& row, std::int64_t tokens) { row.tokens = row.kv_tokens = tokens; }

int add(BenchGroup& group, const BenchRow& row) {
  group.push_back(row);
  return static_cast<int>(group.size()) - 1;
}

struct Pair {
  int full;
  int causal;
};

// Full and causal on so many threads.
Pair add_pair(BenchGroup& group, const Path& path, std::int64_t head_dim, int threads,
              std::optional<Pair> one_thread) {
  BenchRow full = row_of(path, head_dim, false), causal = row_of(path, head_dim, true);
  full.threads_per_worker = causal.threads_per_worker = threads;
  if (one_thread) full.one_thread = one_thread->full, causal.one_thread = one_thread->causal;
  Pair pair{add(group, full), 0};
  causal.full = pair.full;
  pair.causal = add(group, causal);
  return pair;
}

BenchRow ring_row(const Path& path, bool causal, int workers, const std::string& partition) {
  BenchRow row = row_of(path, 128, causal);
  row.workers = workers;
  row.threads_per_worker = std::max(1, allowed_cpus() / workers);
  row.partition = partition;
  return row;
}

// Full and causal gradients on so many threads.
Pair add_backward_pair(BenchGroup& group, const Path& path, std::int64_t head_dim, int threads,
                       std::optional<Pair> one_thread) {
  const Pair pair = add_pair(group, path, head_dim, threads, one_thread);
  for (const int at : {pair.full, pair.causal}) group[static_cast<std::size_t>(at)].backward = true;
  return pair;
}

std::vector<BenchGroup> forward_on(const Path& path, const SuiteChoice& choice) {
  constexpr int kWorkers = 4;
  const int cpus = allowed_cpus();
  const int several = choice.threads.value_or(2);
  std::vector<BenchGroup> groups;
  for (const std::int64_t head_dim : {64, 128}) {
    BenchGroup group;
    const Pair one = add_pair(group, path, head_dim, 1, {});
    Pair single = one;
    if (several > 1 && cpus > 1) single = add_pair(group, path, head_dim, several, one);
    if (head_dim == 128) {
      const int widest = group[static_cast<std::size_t>(single.full)].threads();
      if (widest != cpus) single = add_pair(group, path, head_dim, cpus, one);
      BenchRow full = ring_row(path, false, kWorkers, "contiguous");
      BenchRow causal = ring_row(path, true, kWorkers, "zigzag");
      full.single_pass = single.full, causal.single_pass = single.causal;
      causal.full = add(group, full);
      add(group, causal);
    }
    groups.push_back(group);
  }
  return groups;
}

std::vector<BenchGroup> backward_on(const Path& path, const SuiteChoice& choice) {
  const int several = choice.threads.value_or(2);
  std::vector<BenchGroup> groups;
  for (const std::int64_t head_dim : {64, 128}) {
    BenchGroup group;
    const Pair alone = add_backward_pair(group, path, head_dim, 1, {});
    if (several > 1 && allowed_cpus() > 1) add_backward_pair(group, path, head_dim, several, alone);
    groups.push_back(group);
  }
  return groups;
}

void append(std::vector<BenchGroup>& groups, std::vector<BenchGroup> more) {
  std::move(more.begin(), more.end(), std::back_inserter(groups));
}

// Ten calls of gradients take minutes on the slower paths: those are in kernels.
std::vector<BenchGroup> quick(const SuiteChoice& choice) {
  std::vector<BenchGroup> groups;
  for (const std::vector<Path>& paths : {best_paths(choice), other_paths(choice)}) {
    for (const Path& path : paths) append(groups, forward_on(path, choice));
  }
  for (const Path& path : best_paths(choice)) append(groups, backward_on(path, choice));
  return groups;
}

// Packed sequences, tails off every tile, keys that all move the maximum: each against the plain
// row.
BenchGroup special_masks_and_inputs(const Path& path) {
  BenchGroup group;
  const Pair plain = add_pair(group, path, 128, 1, {});
  BenchRow packed = row_of(path, 128, false);
  packed.mask = "segments(8)", packed.segments = 8, packed.plain = packed.full = plain.full;
  add(group, packed);
  for (const bool causal : {false, true}) {
    BenchRow tail = row_of(path, 128, causal);
    set_length(tail, 16383);
    tail.plain = causal ? plain.causal : plain.full;
    add(group, tail);
    BenchRow rising = row_of(path, 128, causal);
    rising.inputs = BenchInputs::kRising;
    rising.plain = tail.plain;
    add(group, rising);
  }
  return group;
}

// Head sizes that fill no register: the plain partner has 64.
BenchGroup odd_head_dims(const Path& path) {
  BenchGroup group;
  const Pair plain = add_pair(group, path, 64, 1, {});
  for (const std::int64_t head_dim : {72, 80}) {
    const Pair odd = add_pair(group, path, head_dim, 1, {});
    group[static_cast<std::size_t>(odd.full)].plain = plain.full;
    group[static_cast<std::size_t>(odd.causal)].plain = plain.causal;
  }
  return group;
}

// Four query heads over one key head, against four over four.
BenchGroup grouped_heads(const Path& path) {
  BenchGroup group;
  Pair plain{};
  for (const std::int64_t kv_heads : {4, 1}) {
    const Pair pair = add_pair(group, path, 128, 1, {});
    for (const int at : {pair.full, pair.causal}) {
      BenchRow& row = group[static_cast<std::size_t>(at)];
      set_length(row, 8192);  // the work of one head at 16,384
      row.heads = 4, row.kv_heads = kv_heads;
      if (kv_heads == 1) row.plain = at == pair.full ? plain.full : plain.causal;
    }
    if (kv_heads == 4) plain = pair;
  }
  return group;
}

// What makes gradients dearer, or cheaper, than the plain ones.
BenchGroup special_gradients(const Path& path) {
  BenchGroup group;
  BenchRow plain = row_of(path, 128, false);
  plain.backward = true;
  set_length(plain, 8192);  // a bias takes 256 MiB
  const int partner = add(group, plain);
  plain.plain = partner;
  const auto add_variant = [&](const char* variant, const auto& change) {
    BenchRow row = plain;
    row.variant = variant;
    change(row);
    add(group, row);
  };
  add_variant("dropout 0.1", [](BenchRow& row) { row.options.dropout_prob = 0.1; });
  add_variant("bias", [](BenchRow& row) { row.bias = true; });
  add_variant("two passes", [](BenchRow& row) { row.fused = false; });
  add_variant(
      "", [&](BenchRow& row) { row.mask = "segments(8)", row.segments = 8, row.full = partner; });
  if (path.dtype == DType::kFloat32) {  // which float16 is widened to
    add_variant("float16", [&](BenchRow& row) {
      row.dtype = DType::kFloat16, row.target = chosen_target(DType::kFloat16, path.target);
    });
  }
  return group;
}

BenchGroup gradients_of_grouped_heads(const Path& path) {
  BenchGroup group;
  for (const std::int64_t kv_heads : {4, 1}) {
    BenchRow row = row_of(path, 128, false);
    row.backward = true, row.heads = 4, row.kv_heads = kv_heads;
    set_length(row, 4096);
    if (kv_heads == 1) row.plain = 0;
    add(group, row);
  }
  return group;
}

std::vector<BenchGroup> kernels(const SuiteChoice& choice) {
  std::vector<BenchGroup> groups;
  for (const Path& path : other_paths(choice)) append(groups, backward_on(path, choice));
  for (const Path& path : best_paths(choice)) {
    groups.push_back(special_masks_and_inputs(path));
    groups.push_back(odd_head_dims(path));
    groups.push_back(grouped_heads(path));
    groups.push_back(special_gradients(path));
    groups.push_back(gradients_of_grouped_heads(path));
  }
  return groups;
}

BenchGroup rings_of_gradients(const Path& path) {
  constexpr int kWorkers = 4;
  BenchGroup group;
  const Pair single = add_backward_pair(group, path, 128, allowed_cpus(), {});
  int full = -1;
  for (const bool causal : {false, true}) {
    BenchRow row = ring_row(path, causal, kWorkers, causal ? "zigzag" : "contiguous");
    row.backward = true;
    row.single_pass = causal ? single.causal : single.full, row.full = full;
    set_length(row, group[static_cast<std::size_t>(row.single_pass)].tokens);
    full = add(group, row);
  }
  return group;
}

std::vector<BenchGroup> rings(const SuiteChoice& choice) {
  std::vector<BenchGroup> groups;
  for (const Path& path : best_paths(choice)) {
    BenchGroup group;
    const Pair single = add_pair(group, path, 128, choice.threads.value_or(allowed_cpus()), {});
    for (const int workers : {2, 4, 8}) {
      BenchRow full = ring_row(path, false, workers, "contiguous");
      full.single_pass = single.full;
      const int ring_full = add(group, full);
      for (const char* partition : {"contiguous", "striped", "zigzag"}) {
        BenchRow causal = ring_row(path, true, workers, partition);
        causal.single_pass = single.causal, causal.full = ring_full;
        add(group, causal);
      }
    }
    groups.push_back(group);
    groups.push_back(rings_of_gradients(path));
  }
  return groups;
}

Json ratio_json(const std::optional<double>& ratio) {
  return ratio ? number_or_null(*ratio) : Json(nullptr);
}

std::string ratio_cell(const std::optional<double>& ratio) {
  return ratio ? fmt::format("{:.3f}", *ratio) : "";
}

}  // namespace

int BenchRow::threads() const {
  return std::min(std::max(1, allowed_cpus()), workers * threads_per_worker);
}

std::vector<BenchGroup> suite(const std::string& name, const SuiteChoice& choice) {
  if (name == "quick") return quick(choice);
  if (name == "kernels") return kernels(choice);
  if (name == "ring") return rings(choice);
  if (name == "decode") {
    fail<Unsupported>("use --suite=quick, kernels, ring or all",
                      "--suite=decode: attention over a paged cache is not in this build yet");
  }
  std::vector<BenchGroup> groups = quick(choice);
  append(groups, kernels(choice)), append(groups, rings(choice));
  return groups;
}

Json row_json(const BenchRow& row, const BenchResult& result) {
  return {{"op", row.backward ? "backward" : "forward"},
          {"dtype", short_name(name(row.dtype))},
          {"target", result.target},
          {"mask", row.mask},
          {"variant", row.variant},
          {"inputs", row.inputs == BenchInputs::kNormal ? "normal" : "rising"},
          {"batch", row.batch},
          {"heads", row.heads},
          {"kv_heads", row.kv_heads},
          {"head_dim", row.head_dim},
          {"v_head_dim", row.v_head_dim},
          {"tokens", row.tokens},
          {"threads", row.threads()},
          {"workers", row.workers},
          {"partition", row.partition},
          {"seconds", result.seconds},
          {"tflops", number_or_null(result.flops / result.seconds * 1e-12)},
          {"peak_kind", peak_kind(result.target, row.dtype)},
          {"peak_tflops", result.peak_flops * 1e-12},
          {"share_of_peak", number_or_null(result.share_of_peak)},
          {"ratio_to_full", ratio_json(result.ratio_to_full)},
          {"ratio_to_one_thread", ratio_json(result.ratio_to_one_thread)},
          {"ratio_to_single_pass", ratio_json(result.ratio_to_single_pass)},
          {"ratio_to_plain", ratio_json(result.ratio_to_plain)},
          {"check_passed", result.check_passed}};
}

std::vector<std::string> row_heading() {
  return {"op",    "dtype",  "target",   "mask",    "inputs", "variant", "tokens",
          "heads", "dim",    "threads",  "workers", "time",   "TFLOP/s", "peak",
          "share", "t/full", "x1thread", "x1pass",  "xplain", "check"};
}

std::vector<std::string> row_cells(const BenchRow& row, const BenchResult& result) {
  const std::string heads = row.heads == row.kv_heads
                                ? std::to_string(row.heads)
                                : fmt::format("{}/{}", row.heads, row.kv_heads);
  const std::string workers =
      row.workers == 1 ? "1" : fmt::format("{} {}", row.workers, row.partition);
  return {row.backward ? "backward" : "forward",
          short_name(name(row.dtype)),
          result.target,
          row.mask,
          row.inputs == BenchInputs::kNormal ? "normal" : "rising",
          row.variant,
          std::to_string(row.tokens),
          heads,
          std::to_string(row.head_dim),
          std::to_string(row.threads()),
          workers,
          time_text(result.seconds),
          fmt::format("{:.3f}", result.flops / result.seconds * 1e-12),
          fmt::format("{:.3f}", result.peak_flops * 1e-12),
          percent_text(result.share_of_peak),
          ratio_cell(result.ratio_to_full),
          ratio_cell(result.ratio_to_one_thread),
          ratio_cell(result.ratio_to_single_pass),
          ratio_cell(result.ratio_to_plain),
          result.check_passed ? "ok" : "FAILED"};
}

}  // namespace annulus::tools
