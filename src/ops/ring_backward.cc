// The backward on a ring.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "annulus/ring.h"
#include "base/fail.h"
#include "base/half.h"
#include "comm/parcel.h"
#include "kernels/dispatch.h"
#include "ops/ring_call.h"
#include "ops/ring_rank.h"
#include "ops/row.h"

namespace annulus {
namespace {

// Every sum starts from nothing.
std::shared_ptr<AlignedBuffer> zeros(std::int64_t bytes) {
  return std::make_shared<AlignedBuffer>(AlignedBuffer::zeros(bytes));
}

}  // namespace

// dout in another type than q is widened, never rounded.
const BackwardKernel& backward_kernel(DType q_dtype, DType dout_dtype, const std::string& isa) {
  return choose_backward(dout_dtype == q_dtype ? q_dtype : DType::kFloat32, isa);
}

std::vector<std::vector<int>> ways_of(const std::vector<RankSchedule>& schedules, int owner) {
  std::vector<std::vector<int>> ways;
  for (const Visit& start : schedules[static_cast<std::size_t>(owner)].at(0)) {
    if (start.owner != owner) continue;
    std::vector<int> way;
    int rank = owner;
    Visit visit = start;
    for (std::size_t step = 0;; ++step) {
      if (visit.compute) way.push_back(rank);
      if (visit.to < 0) break;
      const auto& next = schedules[static_cast<std::size_t>(visit.to)].at(step + 1);
      const auto found = std::find_if(next.begin(), next.end(), [&](const Visit& v) {
        return v.owner == owner && v.from == rank;
      });
      rank = visit.to, visit = *found;
    }
    if (!way.empty()) ways.push_back(std::move(way));
  }
  return ways;
}

// By bytes over all ranks: packed operands make a hop less than there are ranks, float32 gradients
// one more, home. Rows of bias and dense masks lie where their queries live, unless tensors are
// whole: queries stay.
bool queries_travel(const BackwardSizes& sizes, const Problem& problem, const Deal& deal,
                    RingBackward asked) {
  const bool rows_at_home =
      !deal.whole_tensors && (problem.bias || problem.visibility.rules().attention_mask);
  if (asked == RingBackward::kKeys) return false;
  if (asked == RingBackward::kQueries) return true;
  if (rows_at_home) return false;
  const std::int64_t hops = deal.world_size - 1;
  std::int64_t keys = 0, queries = 0;
  for (int rank = 0; rank < deal.world_size; ++rank) {
    const std::int64_t k = deal.num_keys(rank), q = deal.num_queries(rank);
    keys += hops * sizes.keys(k) + (hops + 1) * sizes.key_gradients(k);
    queries += hops * sizes.queries(q) + (hops + 1) * sizes.query_gradients(q);
  }
  return queries < keys;
}

std::int64_t count_pairs(const Problem& problem, const Deal& deal, int query_rank, int key_rank) {
  Rows queries = deal.q_rows(query_rank), keys = deal.kv_rows(key_rank);
  const std::vector<std::int32_t> q_ids = deal.q_segments(query_rank, queries),
                                  k_ids = deal.kv_segments(key_rank, keys);
  // Unless masks differ, one head stands for all.
  const std::int64_t heads = problem.visibility.per_head() ? problem.num_heads : 1;
  std::int64_t pairs = 0;
  for (std::int64_t b = 0; b < problem.batch && problem.num_heads > 0; ++b) {
    pairs += count_visible(problem.visibility, b, 0, static_cast<int>(heads - 1), {&queries, q_ids},
                           0, queries.size(), {&keys, k_ids});
  }
  return heads == 1 ? pairs * problem.num_heads : pairs;
}

BackwardRank::BackwardRank(Communicator& comm, const RingCall& call, const RingOptions& options,
                           Executor& executor, const RowStatistics& statistics,
                           const MutableTensorView& dbias_sum)
    : comm_(comm),
      problem_(call.problem),
      deal_(call.deal),
      options_(options),
      kernel_(backward_kernel(problem_.q.dtype, problem_.dout.dtype, options.attention.isa)),
      executor_(executor),
      statistics_(statistics),
      sizes_(kernel_, problem_),
      walk_(comm, options.attention.recorder),
      pass_(kernel_, choose_terms(problem_.q.dtype, options.attention.isa), problem_, executor,
            {backward_blocking(kernel_, problem_, deal_), options.fused_backward, dbias_sum},
            [this] { walk_.tick(); }),
      queries_travel_(queries_travel(sizes_, problem_, deal_, options.ring_backward)) {}

QueryBlock BackwardRank::query_block(int owner) const {
  QueryBlock block;
  Rows rows = deal_.q_rows(owner);
  std::vector<std::int32_t> segments = deal_.q_segments(owner, rows);
  block.side = {&problem_, std::move(rows), std::move(segments), kernel_.strip_rows};
  block.strip_bytes = kernel_.strip_bytes(problem_.dims);
  return block;
}

KeyBlock BackwardRank::key_block(int owner) const {
  Rows rows = deal_.kv_rows(owner);
  std::vector<std::int32_t> segments = deal_.kv_segments(owner, rows);
  const std::int64_t head_bytes = kernel_.packed_bytes(problem_.dims, rows.size());
  return describe_keys(kernel_.tile_keys, head_bytes, problem_, std::move(rows),
                       std::move(segments));
}

std::int64_t BackwardRank::block_bytes(int owner) const {
  return queries_travel_ ? sizes_.queries(deal_.num_queries(owner))
                         : sizes_.keys(deal_.num_keys(owner));
}
std::int64_t BackwardRank::gradient_bytes(int owner) const {
  return queries_travel_ ? sizes_.query_gradients(deal_.num_queries(owner))
                         : sizes_.key_gradients(deal_.num_keys(owner));
}

void BackwardRank::plan() {
  Stopwatch planning = walk_.time(EventKind::kPlan);
  const int rank = walk_.rank();
  std::vector<bool> needs;
  for (int owner = 0; owner < deal_.world_size; ++owner) {
    pairs_.push_back(count_pairs(problem_, deal_, queries_travel_ ? owner : rank,
                                 queries_travel_ ? rank : owner));
    needs.push_back(pairs_.back() > 0);
  }
  walk_.agree(needs, options_.topology);
  for (int owner = 0; owner < deal_.world_size; ++owner)
    ways_.push_back(ways_of(walk_.schedules(), owner));
  planning.stop();
}

CallSummary BackwardRank::run() {
  plan();
  const int rank = walk_.rank();
  Stopwatch packing = walk_.time(EventKind::kPack);
  own_queries_ = query_block(rank), own_keys_ = key_block(rank);
  own_queries_.packed = pack_queries(kernel_, own_queries_.side, statistics_, executor_);
  own_keys_.packed = pack_backward_keys(kernel_, problem_, own_keys_.rows, executor_);
  resident_ = zeros(queries_travel_ ? sizes_.key_gradients(own_keys_.num_keys())
                                    : sizes_.query_gradients(own_queries_.side.rows.size()));
  home_ = zeros(gradient_bytes(rank));
  packing.stop(
      static_cast<std::int64_t>(own_queries_.packed.bytes.size() + own_keys_.packed.bytes.size()));
  const Parcel own = queries_travel_ ? own_queries_.packed : own_keys_.packed;
  walk_.run(
      own, [this](int owner) { return block_bytes(owner); },
      [this](RingWalk::Arrival arrival) { add(std::move(arrival)); });
  gather_home();
  Stopwatch finishing = walk_.time(EventKind::kFinish);
  write_gradients();
  if (problem_.softmax_aux && problem_.gradients.dsoftmax_aux) write_sinks();
  finishing.stop();
  return summary();
}

// This rank's share of a block that has arrived.
void BackwardRank::add(RingWalk::Arrival arrival) {
  const auto owner = static_cast<std::size_t>(arrival.owner);
  Place place;
  for (; place.way < ways_[owner].size(); ++place.way) {
    const std::vector<int>& way = ways_[owner][place.way];
    const auto at = std::find(way.begin(), way.end(), walk_.rank());
    place.index = static_cast<std::size_t>(at - way.begin());
    if (at != way.end()) break;
  }
  const std::shared_ptr<AlignedBuffer> sum = take_gradients(arrival.owner, place);
  Stopwatch computing = walk_.time(EventKind::kCompute, arrival.step, arrival.owner);
  std::int64_t pairs = 0;
  if (queries_travel_) {
    QueryBlock queries = query_block(arrival.owner);
    queries.packed = std::move(arrival.block);
    pairs = pass_.run(queries, own_keys_, sum->as<float>(), resident_->as<float>());
  } else {
    KeyBlock keys = key_block(arrival.owner);
    keys.packed = std::move(arrival.block);
    pairs = pass_.run(own_queries_, keys, resident_->as<float>(), sum->as<float>());
  }
  pairs_computed_ += pairs;
  computing.stop(0, pairs);
  pass_gradients(arrival.owner, place, sum);
}

// What the ranks before this one have added up.
std::shared_ptr<AlignedBuffer> BackwardRank::take_gradients(int owner, const Place& place) {
  const std::int64_t bytes = gradient_bytes(owner);
  if (place.index == 0) return owner == walk_.rank() ? home_ : zeros(bytes);
  const int from = ways_[static_cast<std::size_t>(owner)][place.way][place.index - 1];
  const Parcel sum = walk_.receive(
      from, {walk_.call(), Channel::kGradients, static_cast<int>(place.index), owner, bytes});
  auto copy = std::make_shared<AlignedBuffer>(bytes);
  if (bytes > 0) std::memcpy(copy->data(), sum.bytes.data(), static_cast<std::size_t>(bytes));
  return copy;
}

void BackwardRank::pass_gradients(int owner, const Place& place,
                                  const std::shared_ptr<AlignedBuffer>& sum) {
  const std::vector<int>& way = ways_[static_cast<std::size_t>(owner)][place.way];
  const std::int64_t bytes = sum->size_bytes();
  const bool last = place.index + 1 == way.size();
  if (!last) {
    walk_.send(way[place.index + 1],
               {walk_.call(), Channel::kGradients, static_cast<int>(place.index + 1), owner, bytes},
               parcel_of(sum));
    if (sum == home_) home_ = zeros(bytes);  // what was sent is read by others
  } else if (owner != walk_.rank()) {
    walk_.send(owner, {walk_.call(), Channel::kHome, static_cast<int>(place.way), owner, bytes},
               parcel_of(sum));
  }
}

void BackwardRank::gather_home() {
  const int rank = walk_.rank();
  const auto& ways = ways_[static_cast<std::size_t>(rank)];
  const std::int64_t bytes = home_->size_bytes(), count = bytes / 4;
  for (std::size_t way = 0; way < ways.size(); ++way) {
    if (ways[way].back() == rank) continue;  // it never left
    const Parcel sum = walk_.receive(
        ways[way].back(), {walk_.call(), Channel::kHome, static_cast<int>(way), rank, bytes});
    const auto* from = reinterpret_cast<const float*>(sum.bytes.data());
    auto* to = home_->as<float>();
    for (std::int64_t i = 0; i < count; ++i) to[i] += from[i];
  }
}

void BackwardRank::write_gradients() const {
  const float *travelled = home_->as<float>(), *stayed = resident_->as<float>();
  write_query_gradients(queries_travel_ ? travelled : stayed);
  write_key_gradients(queries_travel_ ? stayed : travelled);
}

void BackwardRank::write_query_gradients(const float* dq) const {
  const MutableTensorView& to = problem_.gradients.dq;
  const std::int64_t strips = own_queries_.strips(), stride = round_up(problem_.dims.head_dim, 16);
  std::atomic<std::int64_t> next{0};
  executor_.run([&](int) {
    std::vector<float> rows(static_cast<std::size_t>(kernel_.strip_rows * stride));
    for (std::int64_t i = next++; i < problem_.kv_heads() * strips; i = next++) {
      const Head head = problem_.head_at(i / strips);
      const Lanes lanes = own_queries_.side.lanes(head, i % strips);
      kernel_.unload_dq(dq + i * sizes_.strip_floats(), problem_.rule.scale, rows.data(), stride,
                        problem_.dims);
      for (int n = 0; n < lanes.count; ++n) {
        store_row(to.dtype, to.at(head.batch, lanes.row[n], lanes.head[n], 0),
                  to.strides[3] * size_bytes(to.dtype), rows.data() + n * stride,
                  problem_.dims.head_dim);
      }
    }
  });
}

void BackwardRank::write_key_gradients(const float* dkv) const {
  const std::int64_t keys = own_keys_.num_keys(), padded = sizes_.padded_keys(keys);
  const auto write = [&](const MutableTensorView& to, const Head& head, std::int64_t key,
                         const float* from, std::int64_t dim, float factor,
                         std::vector<float>& row) {
    for (std::int64_t x = 0; x < dim; ++x) row[static_cast<std::size_t>(x)] = factor * from[x];
    store_row(to.dtype,
              to.at(head.batch, own_keys_.rows.row[static_cast<std::size_t>(key)], head.kv_head, 0),
              to.strides[3] * size_bytes(to.dtype), row.data(), dim);
  };
  std::atomic<std::int64_t> next{0};
  executor_.run([&](int) {
    std::vector<float> row(static_cast<std::size_t>(std::max(sizes_.k_row, sizes_.v_row)));
    constexpr std::int64_t kPiece = 64;
    const std::int64_t pieces = ceil_div(keys, kPiece);
    for (std::int64_t i = next++; i < problem_.kv_heads() * pieces; i = next++) {
      const std::int64_t h = i / pieces, first = i % pieces * kPiece;
      const Head head = problem_.head_at(h);
      const float* dk = dkv + h * padded * (sizes_.k_row + sizes_.v_row);
      const float* dv = dk + padded * sizes_.k_row;
      for (std::int64_t key = first; key < std::min(keys, first + kPiece); ++key) {
        write(problem_.gradients.dk, head, key, dk + key * sizes_.k_row, problem_.dims.head_dim,
              problem_.rule.scale, row);
        write(problem_.gradients.dv, head, key, dv + key * sizes_.v_row, problem_.dims.v_head_dim,
              problem_.rule.keep_scale, row);
      }
    }
  });
}

// da = -sum over rows of exp(a - lse) delta, summed over ranks in their order, so that all have the
// same bits.
void BackwardRank::write_sinks() {
  const TensorView& aux = problem_.softmax_aux;
  const bool rank_one = aux.shape[1] == 0;
  const std::int64_t per_row = rank_one ? 1 : aux.shape[1];
  const bool shared = rank_one && aux.shape[0] != problem_.num_heads;
  const auto value = [&](std::int64_t i) -> double {
    return load_element(DType::kFloat32, aux.at(i / per_row, i % per_row, 0, 0));
  };
  std::vector<double> sums(static_cast<std::size_t>(aux.shape[0] * per_row), 0.0);
  const auto count = static_cast<std::int64_t>(sums.size());
  for (std::int64_t b = 0; b < problem_.batch; ++b) {
    for (const std::int64_t row : own_queries_.side.rows.row) {
      for (std::int64_t h = 0; h < problem_.num_heads; ++h) {
        const double lse = load_element(DType::kFloat32, statistics_.lse.at(b, row, h, 0)),
                     delta = load_element(DType::kFloat32, statistics_.delta.at(b, row, h, 0));
        for (std::int64_t n = 0; n < (shared ? count : per_row); ++n) {
          const std::int64_t i = shared ? n : h * per_row + n;
          if (std::isinf(value(i)) && value(i) < 0) continue;  // counts nothing
          if (delta != 0) sums[static_cast<std::size_t>(i)] -= std::exp(value(i) - lse) * delta;
        }
      }
    }
  }
  const auto* begin = reinterpret_cast<const std::byte*>(sums.data());
  const std::vector<Parcel> parts = comm_.all_gather({begin, begin + sums.size() * sizeof(double)});
  const MutableTensorView& to = problem_.gradients.dsoftmax_aux;
  // Threads of one process share the tensor.
  if (deal_.whole_tensors && walk_.rank() != 0) return;
  for (std::int64_t i = 0; i < count; ++i) {
    double total = 0;
    for (const Parcel& part : parts) {
      double share = 0;
      std::memcpy(&share, part.bytes.data() + i * 8, 8);
      total += share;
    }
    store_element(to.dtype, to.at(i / per_row, i % per_row, 0, 0), total);
  }
}

CallSummary BackwardRank::summary() const {
  const std::int64_t visible = std::accumulate(pairs_.begin(), pairs_.end(), std::int64_t{0});
  check_ledger("ring_attention_backward", walk_.rank(), pairs_computed_, visible);
  CallSummary result;
  result.target = kernel_.target, result.arithmetic = kernel_.arithmetic;
  result.bf16_probabilities = kernel_.compute == Element::kBFloat16;
  result.pairs_visible = visible, result.pairs_computed = pairs_computed_;
  result.bytes_sent = walk_.bytes_sent();
  result.steps_skipped = std::count(pairs_.begin(), pairs_.end(), std::int64_t{0});
  result.queries_travelled = queries_travel_;
  return result;
}

}  // namespace annulus
