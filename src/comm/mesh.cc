// Groups of ranks as communicators of their own. They have no state beside numbers: messages,
// deadlines and errors are the parent's.

#include "annulus/mesh.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>
#include <utility>

#include "base/fail.h"
#include "comm/call_number.h"
#include "comm/parcel.h"

namespace annulus {
namespace {

class SubCommunicator final : public Communicator {
 public:
  SubCommunicator(Communicator& parent, std::vector<int> ranks, std::int64_t group)
      : parent_(parent),
        ranks_(std::move(ranks)),
        rank_(static_cast<int>(std::find(ranks_.begin(), ranks_.end(), parent.rank()) -
                               ranks_.begin())),
        group_(group) {}

  [[nodiscard]] int rank() const override { return rank_; }
  [[nodiscard]] int world_size() const override { return static_cast<int>(ranks_.size()); }
  [[nodiscard]] int world_rank(int rank) const override {
    return parent_.world_rank(parent_rank(rank));
  }

  void send(int to, const Tag& tag, Parcel parcel) override {
    parent_.send(parent_rank(to), tag, std::move(parcel));
  }
  Parcel receive(int from, const Tag& tag) override {
    return parent_.receive(parent_rank(from), tag);
  }
  std::vector<Parcel> all_gather(std::vector<std::byte> mine) override;

  void progress() override { parent_.progress(); }
  void abort(std::exception_ptr error) override { parent_.abort(std::move(error)); }
  void check_alive() const override { parent_.check_alive(); }
  std::int64_t next_call() override { return call_number(group_, ++calls_); }

 private:
  [[nodiscard]] int parent_rank(int rank) const { return ranks_[static_cast<std::size_t>(rank)]; }

  Communicator& parent_;
  const std::vector<int> ranks_;
  const int rank_;
  const std::int64_t group_;
  std::int64_t calls_ = 0;
  std::int64_t gatherings_ = 0;  // numbered apart from calls, as their channel is
};

// Everybody to everybody: a length, which no one else knows, then the bytes. Nobody gets through
// before all have come.
std::vector<Parcel> SubCommunicator::all_gather(std::vector<std::byte> mine) {
  const std::int64_t number = call_number(group_, ++gatherings_);
  const auto tag_of = [&](int step, int owner, std::int64_t bytes) {
    return Tag{number, Channel::kGather, step, owner, bytes};
  };
  const auto size = static_cast<std::int64_t>(mine.size());
  std::vector<std::byte> length(sizeof size);
  std::memcpy(length.data(), &size, sizeof size);
  const Parcel head = parcel_of(std::move(length)), body = parcel_of(std::move(mine));
  for (int to = 0; to < world_size(); ++to) {
    if (to == rank_) continue;
    send(to, tag_of(0, rank_, sizeof size), head);
    send(to, tag_of(1, rank_, size), body);
  }
  std::vector<Parcel> parts(ranks_.size(), body);
  for (int from = 0; from < world_size(); ++from) {
    if (from == rank_) continue;
    std::int64_t bytes = 0;
    const Parcel announced = receive(from, tag_of(0, from, sizeof bytes));
    std::memcpy(&bytes, announced.bytes.data(), sizeof bytes);
    parts[static_cast<std::size_t>(from)] = receive(from, tag_of(1, from, bytes));
  }
  return parts;
}

std::string text_of(const std::vector<MeshAxis>& axes) {
  std::string text;
  for (const auto& [name, size] : axes) text += concat(text.empty() ? "" : " x ", name, "=", size);
  return text;
}

void check_axes(const std::vector<MeshAxis>& axes, int world_size) {
  std::int64_t ranks = 1;
  for (auto axis = axes.begin(); axis != axes.end(); ++axis) {
    const auto& [name, size] = *axis;
    if (name.empty()) fail("mesh", "axis ", axis - axes.begin(), " has no name");
    if (std::any_of(axes.begin(), axis, [&](const MeshAxis& a) { return a.name == axis->name; }))
      fail("mesh", "two axes have the name '", name, "'");
    if (size < 1) fail("mesh", "axis '", name, "' has size ", size, ", expected at least 1");
    ranks = std::min<std::int64_t>(ranks * size, std::int64_t{world_size} + 1);  // no overflow
  }
  if (ranks == world_size) return;
  fail("mesh", "axes '", text_of(axes), "' hold ", ranks > world_size ? "more" : "fewer",
       " ranks than the communicator's ", world_size);
}

// Ranks with different grids would wait for one another in vain.
void require_same_axes(Communicator& comm, const std::vector<MeshAxis>& axes) {
  const std::string mine = text_of(axes);
  const auto* begin = reinterpret_cast<const std::byte*>(mine.data());
  const std::vector<Parcel> parts = comm.all_gather({begin, begin + mine.size()});
  const auto axes_of = [&](int rank) {
    const std::span<const std::byte> bytes = parts[static_cast<std::size_t>(rank)].bytes;
    return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  };
  for (int rank = 1; rank < comm.world_size(); ++rank) {
    if (axes_of(rank) == axes_of(0)) continue;
    throw CommError(ErrorCode::kPeerMismatch,
                    concat("mesh: the ranks disagree: rank ", comm.world_rank(0), " has axes '",
                           axes_of(0), "', rank ", comm.world_rank(rank), " '", axes_of(rank), "'"),
                    comm.world_rank(rank), "pass the same axes on every rank");
  }
}

// The rings of a mesh are numbered by the call that made it. One number will do for all of them:
// two ranks have at most one line in common. Numbers of the world's calls stay as they are, those
// of a group's are mixed into as few bits.
std::int64_t mesh_group(std::int64_t number) {
  constexpr std::int64_t kOdd = 0x9E3779B1;
  const std::int64_t group = number >> kCallBits, call = number - call_number(group, 0);
  return kMeshes + (group * kOdd + call) % kMeshes;
}

}  // namespace

inline namespace v1 {

std::unique_ptr<Communicator> sub_communicator(Communicator& parent, std::vector<int> ranks,
                                               int id) {
  constexpr const char* kOperation = "sub_communicator";
  const int world_size = parent.world_size();
  if (id < 1 || id >= kMeshes) fail(kOperation, "id is ", id, ", expected 1 to ", kMeshes - 1);
  std::vector<bool> seen(static_cast<std::size_t>(world_size), false);
  for (const int rank : ranks) {
    if (rank < 0 || rank >= world_size)
      fail(kOperation, "ranks has ", rank, ", expected 0 to ", world_size - 1);
    if (seen[static_cast<std::size_t>(rank)]) fail(kOperation, "ranks has ", rank, " twice");
    seen[static_cast<std::size_t>(rank)] = true;
  }
  if (!seen[static_cast<std::size_t>(parent.rank())])
    fail(kOperation, "ranks lacks ", parent.rank(), ", the calling rank");
  return std::make_unique<SubCommunicator>(parent, std::move(ranks), id);
}

Mesh::Mesh(Communicator& comm, std::vector<MeshAxis> axes)
    : axes_(std::move(axes)), coordinates_(axes_.size()), rings_(axes_.size()) {
  check_axes(axes_, comm.world_size());
  require_same_axes(comm, axes_);
  const std::int64_t group = mesh_group(comm.next_call());
  int stride = 1;
  for (std::size_t i = axes_.size(); i-- > 0;) {
    const int size = axes_[i].size;
    coordinates_[i] = comm.rank() / stride % size;
    std::vector<int> line;
    line.reserve(static_cast<std::size_t>(size));
    for (int at = 0; at < size; ++at) line.push_back(comm.rank() + (at - coordinates_[i]) * stride);
    rings_[i] = std::make_unique<SubCommunicator>(comm, std::move(line), group);
    stride *= size;
  }
}

Communicator& Mesh::ring(std::string_view axis) {
  std::string names;
  for (std::size_t i = 0; i < axes_.size(); ++i) {
    if (axes_[i].name == axis) return *rings_[i];
    names += concat(i == 0 ? "" : ", ", axes_[i].name);
  }
  fail("mesh", "there is no axis '", axis, "', expected one of: ", names);
}

}  // namespace v1
}  // namespace annulus
