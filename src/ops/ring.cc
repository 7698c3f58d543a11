// The ring loop: the only one. attention() is a ring of one.

#include "annulus/ring.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <memory>

#include "annulus/attention.h"
#include "base/fail.h"
#include "kernels/dispatch.h"
#include "ops/rank.h"

namespace annulus {
namespace {

// Times one activity for the recorder, if there is one.
class Stopwatch {
 public:
  Stopwatch(Recorder* recorder, EventKind kind, int rank, int step = -1, int peer = -1)
      : recorder_(recorder), event_{kind, rank, step, peer} {
    if (recorder_ != nullptr) event_.begin_ns = Recorder::now_ns();
  }
  void stop(std::int64_t bytes = 0, std::int64_t pairs = 0) {
    if (recorder_ == nullptr) return;
    event_.end_ns = Recorder::now_ns(), event_.bytes = bytes, event_.pairs = pairs;
    recorder_->add(event_);
  }

 private:
  Recorder* recorder_;
  Event event_;
};

std::vector<std::byte> bytes_of(const std::string& text) {
  const auto* begin = reinterpret_cast<const std::byte*>(text.data());
  return {begin, begin + text.size()};
}
std::string text_of(const Parcel& parcel) {
  return {reinterpret_cast<const char*>(parcel.bytes.data()), parcel.bytes.size()};
}

// Every rank must have asked for the same; the error lists what differs, field by rank.
void require_agreement(const std::vector<Parcel>& parts) {
  const auto lines = [](const std::string& text) {
    std::vector<std::string> list;
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t end = text.find('\n', at);
      list.push_back(text.substr(at, end - at));
      at = end + 1;
    }
    return list;
  };
  const std::vector<std::string> first = lines(text_of(parts[0]));
  for (std::size_t rank = 1; rank < parts.size(); ++rank) {
    const std::vector<std::string> other = lines(text_of(parts[rank]));
    if (other == first) continue;
    std::string differences;
    for (std::size_t i = 0; i < std::min(first.size(), other.size()); ++i) {
      if (first[i] != other[i])
        differences += concat(" rank 0: ", first[i], ", rank ", rank, ": ", other[i], ";");
    }
    throw CommError(ErrorCode::kPeerMismatch, "ring_attention: the ranks disagree:" + differences,
                    static_cast<int>(rank),
                    "pass the same shapes, dtypes and options on every rank");
  }
}

// One rank from its checked problem to out and lse.
class RingRank {
 public:
  RingRank(Communicator& comm, const Problem& problem, const RingOptions& options, const Deal& deal)
      : comm_(comm),
        problem_(problem),
        options_(options),
        deal_(deal),
        recorder_(options.attention.recorder),
        kernel_(choose_forward(problem.q.dtype, options.attention.isa)),
        rank_(comm.rank()),
        call_(comm.next_call()),
        executor_(threads_of(options.attention, comm.world_size())) {}

  CallSummary run() {
    Stopwatch planning(recorder_, EventKind::kPlan, rank_);
    costs_ = rank_costs(kernel_, problem_, deal_, rank_, executor_.threads());
    const RankSchedule schedule = agree_on_schedule();
    planning.stop();
    pack();
    const Rows rows = deal_.q_rows(rank_);
    const int blocks = computed_blocks(schedule);
    ForwardPass pass(kernel_, problem_, rows, segments_of(problem_, problem_.q_segment_ids, rows),
                     executor_, blocks > 1, [this] {
                       comm_.progress();
                       comm_.check_alive();
                     });
    int left = blocks;
    for (std::size_t step = 0; step < schedule.size(); ++step) {
      for (const Visit& visit : schedule[step])
        take(visit, static_cast<int>(step), pass, blocks, left);
    }
    if (blocks == 0) {  // nothing is visible from here
      Stopwatch finishing(recorder_, EventKind::kFinish, rank_);
      pass.attend_block(nullptr, {}, true, true);
      finishing.stop();
    }
    skipped_ = comm_.world_size() - blocks;
    return summary();
  }

 private:
  RankSchedule agree_on_schedule() {
    std::vector<std::byte> mine(costs_.pairs.size());
    for (std::size_t owner = 0; owner < mine.size(); ++owner)
      mine[owner] = static_cast<std::byte>(costs_.pairs[owner] > 0);
    std::vector<std::vector<bool>> needs;
    for (const Parcel& part : comm_.all_gather(std::move(mine))) {
      std::vector<bool> row;
      for (const std::byte b : part.bytes) row.push_back(b != std::byte{0});
      needs.push_back(std::move(row));
    }
    return make_ring_schedule(comm_.world_size(), needs,
                              directions_of(options_.topology))[static_cast<std::size_t>(rank_)];
  }

  void pack() {
    Stopwatch packing(recorder_, EventKind::kPack, rank_);
    own_ = pack_keys(kernel_, problem_, deal_.kv_rows(rank_), executor_);
    packing.stop(static_cast<std::int64_t>(own_.bytes.size()));
  }

  // A block arrives, travels on, and is computed with.
  void take(const Visit& visit, int step, ForwardPass& pass, int blocks, int& left) {
    Parcel packed = visit.from < 0 ? own_ : receive(visit, step);
    const auto bytes = static_cast<std::int64_t>(packed.bytes.size());
    if (visit.to >= 0) {
      Stopwatch sending(recorder_, EventKind::kSend, rank_, step, visit.to);
      comm_.send(visit.to, {call_, step + 1, visit.owner, bytes}, packed);
      sending.stop(bytes);
      bytes_sent_ += bytes;
    }
    Stopwatch computing(recorder_, visit.compute ? EventKind::kCompute : EventKind::kSkip, rank_,
                        step, visit.owner);
    std::int64_t pairs = 0;
    if (visit.compute) {
      Rows rows = deal_.kv_rows(visit.owner);
      std::vector<std::int32_t> segments = deal_.kv_segments(visit.owner, rows);
      KeyBlock keys = describe_keys(kernel_, problem_, std::move(rows), std::move(segments));
      keys.packed = std::move(packed);
      const bool first = left == blocks, last = --left == 0;
      pairs = pass.attend_block(&keys, costs_.item_pairs[static_cast<std::size_t>(visit.owner)],
                                first, last);
      pairs_computed_ += pairs;
    }
    computing.stop(0, pairs);
  }

  Parcel receive(const Visit& visit, int step) {
    const std::int64_t bytes =
        packed_block_bytes(kernel_, problem_, deal_.kv_rows(visit.owner).size());
    Stopwatch waiting(recorder_, EventKind::kWait, rank_, step, visit.from);
    Parcel parcel = comm_.receive(visit.from, {call_, step, visit.owner, bytes});
    waiting.stop(bytes);
    return parcel;
  }

  // The ledger: what the tiles held against what the mask says. A hop dropped, doubled or stale
  // shows here.
  [[nodiscard]] CallSummary summary() const {
    if (pairs_computed_ != costs_.total()) {
      fail<InternalError>("ring_attention", "rank ", rank_, " computed ", pairs_computed_,
                          " visible pairs, the mask has ", costs_.total(), "; please report this");
    }
    CallSummary result;
    result.target = kernel_.target, result.arithmetic = kernel_.arithmetic;
    result.bf16_probabilities = kernel_.compute == Element::kBFloat16;
    result.pairs_visible = costs_.total(), result.pairs_computed = pairs_computed_;
    result.bytes_sent = bytes_sent_, result.steps_skipped = skipped_;
    return result;
  }

  Communicator& comm_;
  const Problem& problem_;
  const RingOptions& options_;
  const Deal& deal_;
  Recorder* recorder_;
  const ForwardKernel& kernel_;
  const int rank_;
  const std::int64_t call_;
  Executor executor_;
  RankCosts costs_;
  Parcel own_;
  std::int64_t bytes_sent_ = 0, pairs_computed_ = 0, skipped_ = 0;
};

const Partition& kv_partition_of(const RingOptions& options) {
  return options.kv_partition ? *options.kv_partition : options.partition;
}

}  // namespace

inline namespace v1 {

CallSummary ring_attention(Communicator& comm, const TensorView& q, const TensorView& k,
                           const TensorView& v, const MutableTensorView& out,
                           const MutableTensorView& lse, const RingOptions& options) {
  const int world = comm.world_size(), rank = comm.rank();
  // Lengths first: masks and alignment speak of the whole sequence.
  std::int64_t q_len = 0, kv_len = 0;
  std::vector<std::array<std::int64_t, 2>> lengths;
  for (const Parcel& part :
       comm.all_gather(bytes_of(std::string(reinterpret_cast<const char*>(&q.shape[1]), 8) +
                                std::string(reinterpret_cast<const char*>(&k.shape[1]), 8)))) {
    lengths.emplace_back();
    std::memcpy(lengths.back().data(), part.bytes.data(), 16);
    q_len += lengths.back()[0], kv_len += lengths.back()[1];
  }
  const Problem problem =
      make_problem("ring_attention", {q, k, v, out, lse}, options.attention, q_len, kv_len);
  const Partition& kv_partition = kv_partition_of(options);
  options.partition.check(world, q_len);
  kv_partition.check(world, kv_len);
  for (const auto& [tensor, partition, have, len] :
       {std::tuple{"q", &options.partition, q.shape[1], q_len},
        std::tuple{"k", &kv_partition, k.shape[1], kv_len}}) {
    const std::int64_t expected = partition->local_len(rank, world, len);
    if (have != expected) {
      fail("ring_attention", tensor, " on rank ", rank, " has ", have, " rows, expected ", expected,
           " of ", len, " by partition '", partition->name(), "'");
    }
  }
  std::string text;
  for (const std::string& field : signature(problem, options.attention)) text += field + "\n";
  text +=
      concat("partition=", options.partition.name(), "\nkv_partition=", kv_partition.name(), "\n");
  text += concat("topology=", static_cast<int>(options.topology), "\n");
  text += concat("target=", choose_forward(q.dtype, options.attention.isa).target, "\n");
  require_agreement(comm.all_gather(bytes_of(text)));

  Deal deal{world, &options.partition, &kv_partition, q_len, kv_len, false, {}};
  const Rows own = deal.kv_rows(rank);
  const std::vector<std::int32_t> mine = segments_of(problem, problem.kv_segment_ids, own);
  const auto* begin = reinterpret_cast<const std::byte*>(mine.data());
  const std::vector<Parcel> ids =
      comm.all_gather({begin, begin + mine.size() * sizeof(std::int32_t)});
  deal.kv_segments = [&ids](int owner, const Rows&) {
    const Parcel& part = ids[static_cast<std::size_t>(owner)];
    std::vector<std::int32_t> segments(part.bytes.size() / sizeof(std::int32_t));
    if (!segments.empty()) std::memcpy(segments.data(), part.bytes.data(), part.bytes.size());
    return segments;
  };
  return RingRank(comm, problem, options, deal).run();
}

std::vector<CallSummary> ring_attention(int workers, const TensorView& q, const TensorView& k,
                                        const TensorView& v, const MutableTensorView& out,
                                        const MutableTensorView& lse, const RingOptions& options) {
  if (workers < 1) fail("ring_attention", "workers is ", workers, ", expected at least 1");
  const std::int64_t q_len = q.shape[1], kv_len = k.shape[1];
  const Problem problem =
      make_problem("ring_attention", {q, k, v, out, lse}, options.attention, q_len, kv_len);
  const Partition& kv_partition = kv_partition_of(options);
  options.partition.check(workers, q_len);
  kv_partition.check(workers, kv_len);
  const Deal deal{
      workers, &options.partition, &kv_partition, q_len, kv_len, true, [&](int, const Rows& rows) {
        return segments_of(problem, problem.kv_segment_ids, rows);
      }};
  std::vector<CallSummary> summaries(static_cast<std::size_t>(workers));
  run_workers(
      workers,
      [&](Communicator& comm) {
        summaries[static_cast<std::size_t>(comm.rank())] =
            RingRank(comm, problem, options, deal).run();
      },
      options.workers);
  return summaries;
}

CallSummary attention(const TensorView& q, const TensorView& k, const TensorView& v,
                      const MutableTensorView& out, const MutableTensorView& lse,
                      const AttentionOptions& options) {
  RingOptions ring;
  ring.attention = options;
  ring.workers.timeout_s = std::numeric_limits<double>::infinity();  // nobody to wait for
  return ring_attention(1, q, k, v, out, lse, ring).front();
}

}  // namespace v1
}  // namespace annulus
