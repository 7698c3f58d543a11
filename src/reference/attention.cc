#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "annulus/bars.h"
#include "annulus/reference.h"
#include "base/fail.h"
#include "base/half.h"
#include "reference/formula.h"
#include "reference/philox.h"

namespace annulus {
inline namespace v1 {
namespace reference {
namespace {

constexpr const char* kOperation = "reference::attention";
constexpr double kInfinity = std::numeric_limits<double>::infinity();

bool is_float(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16;
}

bool is_bool(DType dtype) { return dtype == DType::kBool || dtype == DType::kUInt8; }

double squared_norm(std::span<const double> a) {
  return std::inner_product(a.begin(), a.end(), a.begin(), 0.0);
}

// An axis of one entry serves every index.
double broadcast_element(const TensorView& t, RowIndex at, std::int64_t key) {
  const std::int64_t b = t.shape[0] == 1 ? 0 : at.batch;
  const std::int64_t h = t.shape[1] == 1 ? 0 : at.head;
  return load_element(t.dtype, t.at(b, h, at.query, key));
}

void check_tensors(const TensorView& q, const TensorView& k, const TensorView& v) {
  for (const TensorView* t : {&q, &k, &v}) {
    if (!is_float(t->dtype)) fail(kOperation, "q, k, v must be floats, found ", name(t->dtype));
  }
  if (k.shape[0] != q.shape[0] || v.shape[0] != q.shape[0] || v.shape[1] != k.shape[1] ||
      v.shape[2] != k.shape[2] || k.shape[3] != q.shape[3]) {
    fail(kOperation, "q ", to_string(q.shape), ", k ", to_string(k.shape), " and v ",
         to_string(v.shape), " do not fit each other");
  }
  const bool divides = k.shape[2] > 0 ? q.shape[2] % k.shape[2] == 0 : q.shape[2] == 0;
  if (!divides) {
    fail(kOperation, "num_heads (", q.shape[2], ") is not a multiple of num_kv_heads (", k.shape[2],
         ")");
  }
}

void check_pairwise(const char* what, const TensorView& t, const TensorView& q,
                    const TensorView& k) {
  if (!t) return;
  const bool fits = (t.shape[0] == 1 || t.shape[0] == q.shape[0]) &&
                    (t.shape[1] == 1 || t.shape[1] == q.shape[2]) && t.shape[2] == q.shape[1] &&
                    t.shape[3] == k.shape[1];
  if (!fits) {
    fail(kOperation, what, " is ", to_string(t.shape), ", expected [", q.shape[0], " or 1, ",
         q.shape[2], " or 1, ", q.shape[1], ", ", k.shape[1], "]");
  }
}

void check_int32(const char* what, const TensorView& t, std::int64_t batch, std::int64_t seq) {
  if (!t) return;
  if (t.dtype != DType::kInt32 || t.shape[0] != batch || t.shape[1] != seq) {
    fail(kOperation, what, " is ", name(t.dtype), " ", to_string(t.shape), ", expected int32 [",
         batch, ", ", seq, "]");
  }
}

void check_call(const AttentionOptions& options, const TensorView& q, const TensorView& k) {
  const std::int64_t q_len = q.shape[1];
  const std::int64_t kv_len = k.shape[1];
  check_int32("q_segment_ids", options.q_segment_ids, q.shape[0], q_len);
  check_int32("kv_segment_ids", options.kv_segment_ids, q.shape[0], kv_len);
  if (static_cast<bool>(options.q_segment_ids) != static_cast<bool>(options.kv_segment_ids) &&
      q_len != kv_len && q_len > 0 && kv_len > 0) {
    fail(kOperation, "one of q_segment_ids and kv_segment_ids serves both only if q_len (", q_len,
         ") equals kv_len (", kv_len, ")");
  }
  if (options.kv_lengths) check_int32("kv_lengths", options.kv_lengths, q.shape[0], 1);
  check_pairwise("attention_mask", options.attention_mask, q, k);
  check_pairwise("bias", options.bias, q, k);
  if (options.attention_mask && !is_bool(options.attention_mask.dtype)) {
    fail(kOperation, "attention_mask must be bool or uint8");
  }
  if (options.bias && !is_float(options.bias.dtype)) fail(kOperation, "bias must be of floats");
  if (options.chunk_size < 0) fail(kOperation, "chunk_size (", options.chunk_size, ") is negative");
  if (!(options.logits_soft_cap >= 0)) {
    fail(kOperation, "logits_soft_cap (", options.logits_soft_cap, ") must be 0 or positive");
  }
  if (!(options.dropout_prob >= 0 && options.dropout_prob < 1)) {
    fail(kOperation, "dropout_prob (", options.dropout_prob, ") must be in [0, 1)");
  }
  const TensorView& aux = options.softmax_aux;
  if (!aux) return;
  if (!is_float(aux.dtype)) fail(kOperation, "softmax_aux must be of floats");
  if (aux.shape[1] > 0 && aux.shape[0] != q.shape[2]) {
    fail(kOperation, "softmax_aux has ", aux.shape[0], " rows, expected num_heads (", q.shape[2],
         ")");
  }
}

// exp(score - lse) without the rounding of lse: exp(score - max) / sum. Where the maximum is not
// finite, the formula itself.
class Softmax {
 public:
  Softmax(std::span<const double> scores, std::span<const double> sinks) {
    for (const auto part : {scores, sinks}) {
      for (const double s : part) max_ = std::isnan(s) || s > max_ ? s : max_;
      if (std::isnan(max_)) return;
    }
    if (!std::isfinite(max_)) return;
    Sum sum;
    for (const auto part : {scores, sinks}) {
      for (const double s : part) sum.add(std::exp(s - max_));
    }
    sum_ = sum.value();
  }

  [[nodiscard]] double max() const { return max_; }
  [[nodiscard]] double sum() const { return std::isfinite(max_) ? sum_ : 1; }
  [[nodiscard]] double lse() const { return std::isfinite(max_) ? max_ + std::log(sum_) : max_; }
  [[nodiscard]] double probability(double score) const { return std::exp(score - max_) / sum(); }

 private:
  double max_ = -kInfinity;
  double sum_ = 0;
};

double largest_relevant(std::span<const double> scores, double max, double largest) {
  for (const double s : scores) {
    if (std::isfinite(s) && s >= max - 32) largest = std::max(largest, std::abs(s));
  }
  return largest;
}

}  // namespace

Oracle::Oracle(const TensorView& q, const TensorView& k, const TensorView& v,
               AttentionOptions options)
    : q_(q), k_(k), v_(v), options_(std::move(options)) {
  check_tensors(q_, k_, v_);
  check_call(options_, q_, k_);
  softmax_scale_ = options_.softmax_scale.value_or(1 / std::sqrt(static_cast<double>(q_.shape[3])));
  if (!options_.mask_builder) return;
  const std::int64_t num_reps = num_heads() == 0 ? 1 : num_heads() / k_.shape[2];
  for (std::int64_t h = 0; h < num_heads(); ++h) {
    masks_.push_back(options_.mask_builder(q_len(), kv_len(), num_heads(), h, num_reps));
  }
}

std::int64_t Oracle::kv_head(std::int64_t head) const { return head / (num_heads() / k_.shape[2]); }

void Oracle::load_query(RowIndex at, std::span<double> to) const {
  load(q_, at.batch, at.query, at.head, to);
}

void Oracle::load_key(RowIndex at, std::int64_t key, std::span<double> to) const {
  load(k_, at.batch, key, kv_head(at.head), to);
}

void Oracle::load_value(RowIndex at, std::int64_t key, std::span<double> to) const {
  load(v_, at.batch, key, kv_head(at.head), to);
}

bool Oracle::visible_by_position(std::int64_t query, std::int64_t key) const {
  const bool bottom_right = options_.causal_alignment == CausalAlignment::kBottomRight;
  const std::int64_t shift = bottom_right ? kv_len() - q_len() : 0;
  const std::int64_t ahead = key - (query + shift);
  const auto [left, right] = options_.sliding_window;
  if (options_.causal && ahead > 0) return false;
  if (left >= 0 && ahead < -left) return false;
  if (right >= 0 && ahead > right) return false;
  const std::int64_t chunk = options_.chunk_size;
  return chunk == 0 || (query / chunk == key / chunk && key <= query);
}

bool Oracle::visible_by_segment(RowIndex at, std::int64_t key) const {
  if (!options_.q_segment_ids && !options_.kv_segment_ids) return true;
  const TensorView& q_ids =
      options_.q_segment_ids ? options_.q_segment_ids : options_.kv_segment_ids;
  const TensorView& kv_ids =
      options_.kv_segment_ids ? options_.kv_segment_ids : options_.q_segment_ids;
  const double q_id = load_element(q_ids.dtype, q_ids.at(at.batch, at.query, 0, 0));
  const double kv_id = load_element(kv_ids.dtype, kv_ids.at(at.batch, key, 0, 0));
  if (options_.padding_segment_id && q_id == *options_.padding_segment_id) return false;
  return q_id == kv_id;
}

bool Oracle::visible(RowIndex at, std::int64_t key) const {
  if (!visible_by_position(at.query, key) || !visible_by_segment(at, key)) return false;
  const TensorView& lengths = options_.kv_lengths;
  if (lengths) {
    const double length = load_element(lengths.dtype, lengths.at(at.batch, 0, 0, 0));
    if (static_cast<double>(key) >= length) return false;
  }
  if (options_.attention_mask && broadcast_element(options_.attention_mask, at, key) == 0) {
    return false;
  }
  return masks_.empty() || masks_[static_cast<std::size_t>(at.head)].visible(at.query, key);
}

std::vector<SinkInput> Oracle::sinks(std::int64_t head) const {
  const TensorView& aux = options_.softmax_aux;
  std::vector<SinkInput> found;
  if (!aux) return found;
  const std::int64_t columns = std::max<std::int64_t>(aux.shape[1], 1);
  const bool per_head = aux.shape[1] > 0 || aux.shape[0] == num_heads();
  const std::int64_t begin = per_head ? head * columns : 0;
  const std::int64_t end = per_head ? begin + columns : aux.shape[0];
  for (std::int64_t n = begin; n < end; ++n) {
    const double sink = load_element(aux.dtype, aux.at(n / columns, n % columns, 0, 0));
    if (sink != -kInfinity) found.push_back({sink, n});
  }
  return found;
}

// Bits beyond 32 of a counter word do not count; the comparison in double is exact.
bool Oracle::kept(RowIndex at, std::int64_t key) const {
  if (options_.dropout_prob == 0) return true;
  const auto word = [](auto x) { return static_cast<std::uint32_t>(x); };
  const std::uint32_t drawn =
      philox4x32_10({word(at.batch), word(at.head), word(at.query), word(key)},
                    {word(options_.dropout_seed), word(options_.dropout_seed >> 32)})[0];
  return static_cast<double>(drawn) >= std::ldexp(options_.dropout_prob, 32);
}

std::optional<PairInputs> Oracle::pair(RowIndex at, std::int64_t key) const {
  if (!visible(at, key)) return std::nullopt;
  return PairInputs{.bias = options_.bias ? broadcast_element(options_.bias, at, key) : 0,
                    .kept = kept(at, key)};
}

bool Oracle::sees_a_key(RowIndex at) const {
  for (std::int64_t j = 0; j < kv_len(); ++j) {
    if (visible(at, j)) return true;
  }
  return false;
}

RowInputs Oracle::inputs(RowIndex at) const {
  if (at.batch < 0 || at.batch >= batch() || at.query < 0 || at.query >= q_len() || at.head < 0 ||
      at.head >= num_heads()) {
    fail(kOperation, "row (", at.batch, ", ", at.query, ", ", at.head, ") is outside q ",
         to_string(q_.shape));
  }
  RowInputs inputs;
  for (const SinkInput& sink : sinks(at.head)) inputs.sinks.push_back(sink.value);
  for (std::int64_t j = 0; j < kv_len(); ++j) {
    const std::optional<PairInputs> pair = this->pair(at, j);
    if (!pair) continue;
    inputs.keys.push_back(j);
    if (options_.bias) inputs.bias.push_back(pair->bias);
    if (options_.dropout_prob > 0) inputs.kept.push_back(pair->kept);
  }
  return inputs;
}

Row Oracle::row(RowIndex at) const {
  const RowInputs inputs = this->inputs(at);
  Row row;
  row.visible = static_cast<std::int64_t>(inputs.keys.size());
  row.sinks = static_cast<std::int64_t>(inputs.sinks.size());
  std::vector<double> query(static_cast<std::size_t>(head_dim()));
  std::vector<double> key(query.size());
  load_query(at, query);
  row.q_norm = std::sqrt(squared_norm(query));

  const double cap = options_.logits_soft_cap;
  std::vector<double> scores(inputs.keys.size());
  double max_squared_k = 0;
  for (std::size_t n = 0; n < scores.size(); ++n) {
    load_key(at, inputs.keys[n], key);
    max_squared_k = std::max(max_squared_k, squared_norm(key));
    scores[n] = softmax_scale_ * dot(query, key);
    if (cap > 0) scores[n] = cap * std::tanh(scores[n] / cap);
    if (options_.bias) scores[n] += inputs.bias[n];
  }
  row.max_k_norm = std::sqrt(max_squared_k);
  const Softmax softmax(scores, inputs.sinks);
  row.lse = softmax.lse();
  row.max_score = softmax.max();
  row.weight_sum = softmax.sum();
  row.max_abs_score = largest_relevant(scores, softmax.max(), 0);
  row.max_abs_score = largest_relevant(inputs.sinks, softmax.max(), row.max_abs_score);

  // Without a key, or if every weight is exp(-inf), there is nothing to normalize.
  if (row.lse == -kInfinity) {
    for (auto* zeros : {&row.out, &row.abs_out, &row.spread_out}) {
      zeros->resize(static_cast<std::size_t>(v_head_dim()));
    }
    return row;
  }
  for (double& score : scores) score = softmax.probability(score);
  add_values(at, inputs, scores, row);
  return row;
}

void Oracle::add_values(RowIndex at, const RowInputs& inputs, std::span<const double> p,
                        Row& row) const {
  std::vector<double> value(static_cast<std::size_t>(v_head_dim()));
  std::vector<Sum> out(value.size());
  row.abs_out.resize(value.size());
  row.spread_out.resize(value.size());
  const double keep_prob = 1 - options_.dropout_prob;
  for (std::size_t n = 0; n < p.size(); ++n) {
    if (!inputs.kept.empty() && inputs.kept[n] == 0) continue;
    load_value(at, inputs.keys[n], value);
    const double weight = p[n] / keep_prob;
    for (std::size_t d = 0; d < value.size(); ++d) {
      const double term = weight * value[d];
      out[d].add(term);
      row.abs_out[d] += std::abs(term);
      row.spread_out[d] += term * term;
      if (std::isfinite(value[d])) {
        row.max_abs_v = std::max(row.max_abs_v, std::abs(value[d]) / keep_prob);
      }
    }
  }
  for (const Sum& sum : out) row.out.push_back(sum.value());
  for (double& squares : row.spread_out) squares = std::sqrt(squares);
}

Row attention_row(const TensorView& q, const TensorView& k, const TensorView& v,
                  const AttentionOptions& options, std::int64_t batch, std::int64_t query,
                  std::int64_t head) {
  AttentionOptions one_head = options;
  if (options.mask_builder) {
    one_head.mask_builder = [&](auto q_len, auto kv_len, auto num_heads, auto h, auto num_reps) {
      return h == head ? options.mask_builder(q_len, kv_len, num_heads, h, num_reps) : Mask();
    };
  }
  return Oracle(q, k, v, std::move(one_head)).row({batch, query, head});
}

void attention(const TensorView& q, const TensorView& k, const TensorView& v,
               const AttentionOptions& options, std::vector<double>& out,
               std::vector<double>& lse) {
  const Oracle oracle(q, k, v, options);
  out.clear();
  lse.clear();
  for (std::int64_t b = 0; b < oracle.batch(); ++b) {
    for (std::int64_t i = 0; i < oracle.q_len(); ++i) {
      for (std::int64_t h = 0; h < oracle.num_heads(); ++h) {
        const Row row = oracle.row({b, i, h});
        out.insert(out.end(), row.out.begin(), row.out.end());
        lse.push_back(row.lse);
      }
    }
  }
}

}  // namespace reference
}  // namespace v1
}  // namespace annulus
