#include "ops/ring_call.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <tuple>

#include "base/fail.h"
#include "kernels/dispatch.h"
#include "ops/key_block.h"

namespace annulus {
namespace {

std::vector<std::byte> bytes_of(const std::string& text) {
  const auto* begin = reinterpret_cast<const std::byte*>(text.data());
  return {begin, begin + text.size()};
}
std::string text_of(const Parcel& parcel) {
  return {reinterpret_cast<const char*>(parcel.bytes.data()), parcel.bytes.size()};
}

// Every rank must have asked for the same; the error lists what differs, field by rank.
void require_agreement(const std::string& operation, Communicator& comm, const std::string& mine) {
  const std::vector<Parcel> parts = comm.all_gather(bytes_of(mine));
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
  for (int r = 1; r < comm.world_size(); ++r) {
    const std::vector<std::string> other = lines(text_of(parts[static_cast<std::size_t>(r)]));
    if (other == first) continue;
    const int base = comm.world_rank(0), rank = comm.world_rank(r);
    std::string differences;
    for (std::size_t i = 0; i < std::min(first.size(), other.size()); ++i) {
      if (first[i] != other[i])
        differences += concat(" rank ", base, ": ", first[i], ", rank ", rank, ": ", other[i], ";");
    }
    throw CommError(ErrorCode::kPeerMismatch,
                    concat(operation, ": the ranks disagree:", differences), rank,
                    "pass the same shapes, dtypes and options on every rank");
  }
}

const Partition& kv_partition_of(const RingOptions& options) {
  return options.kv_partition ? *options.kv_partition : options.partition;
}

void check_partitions(const RingOptions& options, int world, std::int64_t q_len,
                      std::int64_t kv_len) {
  options.partition.check(world, q_len);
  kv_partition_of(options).check(world, kv_len);
}

// Lengths of q and k over all ranks: masks and alignment speak of the whole sequence.
std::array<std::int64_t, 2> global_lengths(Communicator& comm, const CallTensors& tensors) {
  const std::array<std::int64_t, 2> mine{tensors.q.shape[1], tensors.k.shape[1]};
  const auto* begin = reinterpret_cast<const std::byte*>(mine.data());
  std::array<std::int64_t, 2> sum{};
  for (const Parcel& part : comm.all_gather({begin, begin + sizeof mine})) {
    std::array<std::int64_t, 2> lengths{};
    std::memcpy(lengths.data(), part.bytes.data(), sizeof lengths);
    sum[0] += lengths[0], sum[1] += lengths[1];
  }
  return sum;
}

void check_local_length(const std::string& operation, const char* tensor, const Communicator& comm,
                        const Partition& partition, std::int64_t have, std::int64_t len) {
  const std::int64_t expected = partition.local_len(comm.rank(), comm.world_size(), len);
  if (have == expected) return;
  fail(operation, tensor, " on rank ", comm.world_rank(comm.rank()), " has ", have,
       " rows, expected ", expected, " of ", len, " by partition '", partition.name(), "'");
}

std::string agreement(const Problem& problem, const RingOptions& options) {
  std::string text;
  for (const std::string& field : signature(problem, options.attention)) text += field + "\n";
  text += concat("partition=", options.partition.name(),
                 "\nkv_partition=", kv_partition_of(options).name(), "\n");
  text += concat("topology=", static_cast<int>(options.topology),
                 "\nring_backward=", static_cast<int>(options.ring_backward),
                 "\nfused_backward=", options.fused_backward, "\n");
  text += concat("target=", choose_forward(problem.q.dtype, options.attention.isa).target, "\n");
  return text;
}

// Everybody's segment ids, as a function of the rank.
std::function<std::vector<std::int32_t>(int, const Rows&)> gathered_segments(
    Communicator& comm, const std::vector<std::int32_t>& mine) {
  const auto* begin = reinterpret_cast<const std::byte*>(mine.data());
  const std::vector<Parcel> parts =
      comm.all_gather({begin, begin + mine.size() * sizeof(std::int32_t)});
  return [parts](int owner, const Rows&) {
    const Parcel& part = parts[static_cast<std::size_t>(owner)];
    std::vector<std::int32_t> segments(part.bytes.size() / sizeof(std::int32_t));
    if (!segments.empty()) std::memcpy(segments.data(), part.bytes.data(), part.bytes.size());
    return segments;
  };
}

}  // namespace

std::unique_ptr<RingCall> global_call(const std::string& operation, int workers,
                                      const CallTensors& tensors, const RingOptions& options,
                                      bool writes) {
  if (workers < 1) fail(operation, "workers is ", workers, ", expected at least 1");
  auto call = std::make_unique<RingCall>();
  const std::int64_t q_len = tensors.q.shape[1], kv_len = tensors.k.shape[1];
  call->problem = make_problem(operation, tensors, options.attention, q_len, kv_len, writes);
  check_partitions(options, workers, q_len, kv_len);
  const Problem& problem = call->problem;
  call->deal = {workers,
                &options.partition,
                &kv_partition_of(options),
                q_len,
                kv_len,
                true,
                [&problem](int, const Rows& rows) {
                  return segments_of(problem, problem.q_segment_ids, rows);
                },
                [&problem](int, const Rows& rows) {
                  return segments_of(problem, problem.kv_segment_ids, rows);
                }};
  return call;
}

std::unique_ptr<RingCall> spmd_call(const std::string& operation, Communicator& comm,
                                    const CallTensors& tensors, const RingOptions& options) {
  const int world = comm.world_size(), rank = comm.rank();
  const auto [q_len, kv_len] = global_lengths(comm, tensors);
  auto call = std::make_unique<RingCall>();
  call->problem = make_problem(operation, tensors, options.attention, q_len, kv_len);
  const Problem& problem = call->problem;
  check_partitions(options, world, q_len, kv_len);
  const Partition& kv_partition = kv_partition_of(options);
  check_local_length(operation, "q", comm, options.partition, problem.q.shape[1], q_len);
  check_local_length(operation, "k", comm, kv_partition, problem.k.shape[1], kv_len);
  require_agreement(operation, comm, agreement(problem, options));
  Deal& deal = call->deal;
  deal = {world, &options.partition, &kv_partition, q_len, kv_len, false, {}, {}};
  deal.q_segments =
      gathered_segments(comm, segments_of(problem, problem.q_segment_ids, deal.q_rows(rank)));
  deal.kv_segments =
      gathered_segments(comm, segments_of(problem, problem.kv_segment_ids, deal.kv_rows(rank)));
  return call;
}

}  // namespace annulus
