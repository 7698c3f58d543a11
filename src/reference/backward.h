// The backward by its formula, pair by pair in the order heads, queries, keys: one walk for the
// oracle, for what the bars need of it, and for the naive programs they compare with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <span>
#include <vector>

#include "annulus/bars.h"
#include "reference/pair_gradients.h"

namespace annulus {
inline namespace v1 {
namespace reference {

// The rows of gradients to compute: those of dq and dbias at `queries`, of dk and dv at `keys`.
// dsoftmax_aux is always complete.
struct Sample {
  std::vector<std::int64_t> queries, keys;  // rising
  bool with_bias = false;
};

// Row-major over [batch, sampled rows, heads, dim]; dbias over [batch or 1, heads or 1, sampled
// queries, kv_len]; dsoftmax_aux over its own axes, empty without softmax_aux.
template <class Element>
struct GradientRows {
  std::vector<Element> dq, dk, dv, dsoftmax_aux, dbias;
};

inline std::int64_t num_sink_elements(const TensorView& aux) {
  return aux ? aux.shape[0] * std::max<std::int64_t>(aux.shape[1], 1) : 0;
}

// Element is what one element of a gradient is summed in; add(Scalar, Number) adds a term to it.
template <class Element, class Pairs>
class BackwardWalk {
 public:
  using Number = typename Pairs::Number;
  using Scalar = typename Pairs::Scalar;

  BackwardWalk(const Oracle& oracle, const Pairs& pairs, const Sample& sample)
      : oracle_(oracle),
        pairs_(pairs),
        sample_(sample),
        key_places_(static_cast<std::size_t>(oracle.kv_len()), -1),
        all_keys_(key_places_.size()) {
    std::iota(all_keys_.begin(), all_keys_.end(), 0);
    for (std::size_t n = 0; n < sample.keys.size(); ++n) {
      key_places_[static_cast<std::size_t>(sample.keys[n])] = static_cast<std::int64_t>(n);
    }
    const std::int64_t queries = count(sample.queries);
    const std::int64_t keys = count(sample.keys);
    resize(rows_.dq, oracle.batch() * queries * oracle.num_heads() * oracle.head_dim());
    resize(rows_.dk, oracle.batch() * keys * oracle.num_kv_heads() * oracle.head_dim());
    resize(rows_.dv, oracle.batch() * keys * oracle.num_kv_heads() * oracle.v_head_dim());
    resize(rows_.dsoftmax_aux, num_sink_elements(oracle.options().softmax_aux));
    const TensorView& bias = oracle.options().bias;
    if (sample.with_bias) {
      resize(rows_.dbias, bias.shape[0] * bias.shape[1] * queries * oracle.kv_len());
    }
  }

  GradientRows<Element> run() && {
    for (std::int64_t b = 0; b < oracle_.batch(); ++b) {
      for (std::int64_t h = 0; h < oracle_.num_heads(); ++h) {
        load_keys(b, h);
        auto next = sample_.queries.begin();
        for (std::int64_t i = 0; i < oracle_.q_len(); ++i) {
          const bool sampled = next != sample_.queries.end() && *next == i;
          add_row({b, i, h}, sampled ? next - sample_.queries.begin() : -1);
          if (sampled) ++next;
        }
      }
    }
    return std::move(rows_);
  }

 private:
  static std::int64_t count(const std::vector<std::int64_t>& x) {
    return static_cast<std::int64_t>(x.size());
  }
  static void resize(std::vector<Element>& to, std::int64_t size) {
    to.resize(static_cast<std::size_t>(size));
  }
  static std::span<Element> vector(std::vector<Element>& rows, std::int64_t row,
                                   std::int64_t width) {
    return {rows.data() + row * width, static_cast<std::size_t>(width)};
  }
  static void add(std::span<Element> to, Scalar factor, std::span<const Number> x) {
    for (std::size_t d = 0; d < x.size(); ++d) to[d].add(factor, x[d]);
  }

  void load_keys(std::int64_t b, std::int64_t h) {
    std::vector<double> k(static_cast<std::size_t>(oracle_.head_dim()));
    std::vector<double> v(static_cast<std::size_t>(oracle_.v_head_dim()));
    k_.clear();
    v_.clear();
    for (std::int64_t j = 0; j < oracle_.kv_len(); ++j) {
      oracle_.load_key({b, 0, h}, j, k);
      oracle_.load_value({b, 0, h}, j, v);
      k_.insert(k_.end(), k.begin(), k.end());
      v_.insert(v_.end(), v.begin(), v.end());
    }
  }

  // `place` is the row's place in the sample, or -1.
  void add_row(RowIndex at, std::int64_t place) {
    const typename Pairs::Row row = pairs_.row(at);
    if (!row.contributes) return;
    bool sees_a_key = false;
    for (const std::int64_t j : place >= 0 ? all_keys_ : sample_.keys) {
      const std::optional<PairInputs> inputs = oracle_.pair(at, j);
      if (!inputs) continue;
      sees_a_key = true;
      add_pair(at, place, row, j, *inputs);
    }
    if (rows_.dsoftmax_aux.empty() || !Pairs::has_delta(row)) return;
    // Only a row that sees a key has an out to take from its sinks; elsewhere even NaN in dout says
    // nothing. Its lse says something everywhere.
    add_sinks(at, sees_a_key || oracle_.sees_a_key(at) ? row : Pairs::without_out(row));
  }

  void add_pair(RowIndex at, std::int64_t place, const typename Pairs::Row& row, std::int64_t j,
                PairInputs inputs) {
    const std::int64_t d = oracle_.head_dim();
    const std::int64_t dv = oracle_.v_head_dim();
    const std::span<const Number> k{k_.data() + j * d, static_cast<std::size_t>(d)};
    const std::span<const Number> v{v_.data() + j * dv, static_cast<std::size_t>(dv)};
    const PairGradient<Scalar> pair = pairs_.pair(row, k, v, inputs);
    if (place >= 0) {
      const std::int64_t q_row =
          (at.batch * count(sample_.queries) + place) * oracle_.num_heads() + at.head;
      add(vector(rows_.dq, q_row, d), pair.ddot, k);
      if (sample_.with_bias) bias_element(at, place, j).add(pair.ds, Number{1});
    }
    const std::int64_t key_place = key_places_[static_cast<std::size_t>(j)];
    if (key_place < 0) return;
    const std::int64_t k_row =
        (at.batch * count(sample_.keys) + key_place) * oracle_.num_kv_heads() +
        oracle_.kv_head(at.head);
    add(vector(rows_.dk, k_row, d), pair.ddot, row.q);
    if (pair.kept) add(vector(rows_.dv, k_row, dv), pair.weight, row.dout);
  }

  void add_sinks(RowIndex at, const typename Pairs::Row& row) {
    if (sinks_of_ != at.head) {
      // The sinks of a row depend on its head alone.
      sinks_ = oracle_.sinks(at.head);
      sinks_of_ = at.head;
    }
    for (const SinkInput& sink : sinks_) {
      rows_.dsoftmax_aux[static_cast<std::size_t>(sink.index)].add(pairs_.sink(row, sink.value),
                                                                   Number{1});
    }
  }

  Element& bias_element(RowIndex at, std::int64_t place, std::int64_t j) {
    const TensorView& bias = oracle_.options().bias;
    const std::int64_t b = bias.shape[0] == 1 ? 0 : at.batch;
    const std::int64_t h = bias.shape[1] == 1 ? 0 : at.head;
    const std::int64_t row = (b * bias.shape[1] + h) * count(sample_.queries) + place;
    return rows_.dbias[static_cast<std::size_t>(row * oracle_.kv_len() + j)];
  }

  const Oracle& oracle_;
  const Pairs& pairs_;
  const Sample& sample_;
  std::vector<std::int64_t> key_places_;  // of each key in the sample, or -1
  std::vector<std::int64_t> all_keys_;
  std::vector<Number> k_, v_;  // [kv_len, dim] of one kv head
  std::vector<SinkInput> sinks_;
  std::int64_t sinks_of_ = -1;
  GradientRows<Element> rows_;
};

}  // namespace reference
}  // namespace v1
}  // namespace annulus
