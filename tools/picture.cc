#include "picture.h"

#include <fmt/format.h>

#include <algorithm>

#include "annulus/targets.h"
#include "numbers.h"
#include "text.h"

namespace annulus::tools {
namespace {

std::int32_t id_of(const TensorView& ids, std::int64_t token) {
  return load<std::int32_t>(ids.at(0, token, 0, 0));
}

// The tokens of cell `cell` of `cells`, at most 8 of them.
std::vector<std::int64_t> samples(int cell, int cells, std::int64_t length) {
  constexpr std::int64_t kSamples = 8;
  const std::int64_t begin = length * cell / cells;
  const std::int64_t count = length * (cell + 1) / cells - begin;
  const std::int64_t taken = std::min(count, kSamples);
  std::vector<std::int64_t> tokens;
  for (std::int64_t n = 0; n < taken; ++n)
    tokens.push_back(begin + (2 * n + 1) * count / (2 * taken));
  return tokens;
}

}  // namespace

SampledMask::SampledMask(const AttentionOptions& options, std::int64_t q_len, std::int64_t kv_len)
    : options_(options), q_len_(q_len), kv_len_(kv_len) {
  const std::int64_t shift =
      options.causal_alignment == CausalAlignment::kBottomRight ? kv_len - q_len : 0;
  const auto [left, right] = options.sliding_window;
  if (options.causal) mask_ = mask_ & Mask::causal(shift);
  if (left >= 0 || right >= 0) mask_ = mask_ & Mask::sliding_window(left, right, shift);
  if (options.chunk_size > 0) mask_ = mask_ & Mask::chunked(options.chunk_size);
}

bool SampledMask::same_segment(std::int64_t query, std::int64_t key) const {
  const TensorView& of_q =
      options_.q_segment_ids ? options_.q_segment_ids : options_.kv_segment_ids;
  const TensorView& of_k =
      options_.kv_segment_ids ? options_.kv_segment_ids : options_.q_segment_ids;
  if (!of_q) return true;
  const std::int32_t id = id_of(of_q, query);
  return id == id_of(of_k, key) &&
         (!options_.padding_segment_id || id != *options_.padding_segment_id);
}

bool SampledMask::visible(std::int64_t query, std::int64_t key) const {
  if (!mask_.visible(query, key) || !same_segment(query, key)) return false;
  if (options_.kv_lengths && key >= id_of(TensorView(options_.kv_lengths), 0)) return false;
  const TensorView& dense = options_.attention_mask;
  return !dense || load<std::uint8_t>(dense.at(0, 0, query, key)) != 0;
}

std::vector<double> SampledMask::density(int rows, int columns) const {
  std::vector<double> cells;
  for (int row = 0; row < rows; ++row) {
    const std::vector<std::int64_t> queries = samples(row, rows, q_len_);
    for (int column = 0; column < columns; ++column) {
      const std::vector<std::int64_t> keys = samples(column, columns, kv_len_);
      int seen = 0;
      for (const std::int64_t query : queries) {
        for (const std::int64_t key : keys) seen += visible(query, key) ? 1 : 0;
      }
      const std::size_t pairs = queries.size() * keys.size();
      cells.push_back(pairs == 0 ? 0 : static_cast<double>(seen) / static_cast<double>(pairs));
    }
  }
  return cells;
}

ReportInput report_input(const Options& options, const Inputs& inputs, const Call& call) {
  constexpr int kCells = 48;
  const auto [batch, q_len, heads, dim] = inputs.q.shape;
  const std::int64_t kv_len = inputs.k.shape[1];
  ReportInput report;
  report.title =
      fmt::format("{}, {} worker{}", options.op, call.workers, call.workers == 1 ? "" : "s");
  report.plan = call.plan;
  report.facts = {{"batch", grouped(batch)},
                  {"queries", grouped(q_len)},
                  {"keys", grouped(kv_len)},
                  {"query heads", grouped(heads)},
                  {"key and value heads", grouped(inputs.k.shape[2])},
                  {"head_dim", grouped(dim)},
                  {"v_head_dim", grouped(inputs.v.shape[3])},
                  {"inputs", std::string(name(inputs.q.dtype))},
                  {"output", std::string(name(call.out_dtype))},
                  {"topology", options.topology},
                  {"CPU", cpu_name()}};
  report.mask_rows = static_cast<int>(std::min<std::int64_t>(kCells, q_len));
  report.mask_columns = static_cast<int>(std::min<std::int64_t>(kCells, kv_len));
  const SampledMask mask(call.ring.attention, q_len, kv_len);
  if (batch > 0 && heads > 0)
    report.mask_density = mask.density(report.mask_rows, report.mask_columns);
  return report;
}

}  // namespace annulus::tools
