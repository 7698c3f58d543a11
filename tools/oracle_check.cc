#include "oracle_check.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>

#include "numbers.h"
#include "parallel.h"
#include "process.h"
#include "text.h"

namespace annulus::tools {
namespace {

using reference::Checker;
using reference::CheckResult;
using reference::Oracle;
using reference::RowIndex;

// What the oracle and the naive implementations say about one row; made in parallel, judged one
// after the other.
struct ExpectedRow {
  RowIndex at;
  reference::Row exact;
  Checker::Naive naive;
};

// `rounded`: the dtype whose rounding the bars refer to.
ExpectedRow expected_row(const Oracle& oracle, RowIndex at, DType rounded) {
  ExpectedRow row{at, oracle.row(at), {}};
  row.naive.float32 = reference::naive_row(oracle, at, DType::kFloat32);
  if (rounded != DType::kFloat32) row.naive.same_dtype = reference::naive_row(oracle, at, rounded);
  return row;
}

std::vector<RowIndex> rows_of(const OracleCheck& check) {
  std::vector<RowIndex> rows;
  const std::vector<std::int64_t> queries =
      reference::sampled_rows(check.q.shape[1], check.rows_per_head);
  for (std::int64_t b = 0; b < check.q.shape[0]; ++b) {
    for (std::int64_t h = 0; h < check.q.shape[2]; ++h) {
      for (const std::int64_t query : queries) rows.push_back({b, query, h});
    }
  }
  return rows;
}

std::vector<float> computed_row(const TensorView& out, RowIndex at) {
  std::vector<float> row;
  for (std::int64_t d = 0; d < out.shape[3]; ++d) {
    row.push_back(static_cast<float>(number_at(out.at(at.batch, at.query, at.head, d), out.dtype)));
  }
  return row;
}

Json errors_json(const CheckResult& result) {
  return {{"rows", result.rows},
          {"max_abs_err", number_or_null(result.max_abs_err)},
          {"rms_err", number_or_null(result.rms_err)},
          {"rounding_max", number_or_null(result.rounding_max)},
          {"rounding_rms", number_or_null(result.rounding_rms)},
          {"passed", result.passed}};
}

std::string errors_text(const CheckResult& result) {
  const std::string verdict =
      result.passed ? fmt::format("passed: {} rows", grouped(result.rows))
                    : fmt::format("FAILED: {} rows, {}", grouped(result.rows), result.verdict);
  return fmt::format("{}, error max {:.2e} rms {:.2e} (rounding alone: max {:.2e} rms {:.2e})",
                     verdict, result.max_abs_err, result.rms_err, result.rounding_max,
                     result.rounding_rms);
}

}  // namespace

std::int64_t rows_to_check(const OracleCheck& check) {
  const std::int64_t q_len = check.q.shape[1];
  const std::int64_t per_head =
      check.rows_per_head > 0 ? std::min(check.rows_per_head, q_len) : q_len;
  return check.q.shape[0] * check.q.shape[2] * per_head;
}

CheckResult check_against_oracle(const OracleCheck& check,
                                 const std::function<void(std::int64_t)>& progress) {
  const Oracle oracle(check.q, check.k, check.v, check.options);
  Checker checker(reference::check_options(oracle, check.out.dtype, check.bf16_probabilities));
  const DType rounded = check.out.dtype == DType::kFloat32 && check.bf16_probabilities
                            ? DType::kBFloat16
                            : check.out.dtype;
  const std::vector<RowIndex> rows = rows_of(check);
  const auto count = static_cast<std::int64_t>(rows.size());
  const std::int64_t batch = 64 * std::int64_t{check.threads};  // rows held at a time
  std::atomic<std::int64_t> done{0};
  for (std::int64_t begin = 0; begin < count; begin += batch) {
    std::vector<ExpectedRow> expected(static_cast<std::size_t>(std::min(batch, count - begin)));
    parallel_for(static_cast<std::int64_t>(expected.size()), check.threads, [&](std::int64_t i) {
      check_stop();
      expected[static_cast<std::size_t>(i)] =
          expected_row(oracle, rows[static_cast<std::size_t>(begin + i)], rounded);
      if (progress) progress(++done);
    });
    for (const ExpectedRow& row : expected) {
      std::optional<float> lse;
      if (check.lse) {
        lse = static_cast<float>(
            number_at(check.lse.at(row.at.batch, row.at.query, row.at.head, 0), check.lse.dtype));
      }
      checker.add(row.exact, computed_row(check.out, row.at), lse, row.naive, row.at);
    }
  }
  return checker.result();
}

void compute_with_oracle(const OracleCheck& check, const MutableTensorView& out) {
  const Oracle oracle(check.q, check.k, check.v, check.options);
  const std::int64_t q_len = out.shape[1], heads = out.shape[2];
  parallel_for(out.shape[0] * q_len * heads, check.threads, [&](std::int64_t i) {
    check_stop();
    const RowIndex at{i / heads / q_len, i / heads % q_len, i % heads};
    const std::vector<double> row = oracle.row(at).out;
    for (std::size_t d = 0; d < row.size(); ++d) {
      store_number(out.at(at.batch, at.query, at.head, static_cast<std::int64_t>(d)),
                   DType::kFloat32, static_cast<float>(row[d]));
    }
  });
}

std::string CheckOutcome::verdict() const {
  if (!backward || backward->passed) return forward.verdict;
  return forward.passed ? backward->verdict : forward.verdict + "; " + backward->verdict;
}

Json check_json(const CheckOutcome& outcome) {
  Json json = errors_json(outcome.forward);
  json["passed"] = outcome.passed();
  if (!outcome.backward) return json;
  json["gradients"] = Json::array();
  for (const auto& [name, result] : outcome.backward->gradients) {
    Json gradient{{"name", name}};
    gradient.update(errors_json(result));
    json["gradients"].push_back(gradient);
  }
  return json;
}

std::string check_text(const CheckOutcome& outcome, int indent) {
  const CheckResult& forward = outcome.forward;
  std::string text = errors_text(forward) + fmt::format(", lse {:.1e}", forward.lse_max_err);
  if (!outcome.backward) return text;
  for (const auto& [name, result] : outcome.backward->gradients)
    text += fmt::format("\n{:{}}{} {}", "", indent, name, errors_text(result));
  return text;
}

std::vector<std::pair<std::string, std::string>> check_facts(const CheckOutcome& outcome) {
  const CheckResult& result = outcome.forward;
  std::vector<std::pair<std::string, std::string>> facts{
      {"rows compared with the oracle", grouped(result.rows)},
      {"largest error of out", fmt::format("{:.3e}", result.max_abs_err)},
      {"rms error of out", fmt::format("{:.3e}", result.rms_err)},
      {"largest error of rounding alone", fmt::format("{:.3e}", result.rounding_max)},
      {"rms error of rounding alone", fmt::format("{:.3e}", result.rounding_rms)},
      {"largest error of lse", fmt::format("{:.3e}", result.lse_max_err)},
      {"error as a share of its bound", percent_text(result.bound_ratio)}};
  if (outcome.backward) {
    for (const auto& [name, gradient] : outcome.backward->gradients) {
      facts.emplace_back("largest error of " + name,
                         fmt::format("{:.3e}; of rounding alone {:.3e}", gradient.max_abs_err,
                                     gradient.rounding_max));
    }
  }
  facts.emplace_back("verdict", outcome.verdict());
  return facts;
}

}  // namespace annulus::tools
