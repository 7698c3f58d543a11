// Rings within a world: groups of its ranks, and grids of ranks with named axes.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "annulus/communicator.h"

namespace annulus {
inline namespace v1 {

// Some ranks of a communicator as a communicator of their own: rank r of the group is the parent's
// ranks[r]. Every rank of the group passes the same ranks and id, and all ranks make their calls on
// the parent and on its groups in the same order. Sends nothing; the parent must outlive it.
//
//   ranks   in ring order: distinct ranks of the parent, the calling one among them
//   id      1 <= id < 2^30: tells the group's messages from others', so groups of one world that
//           share two ranks have different ones
//
// Deadlines, progress and the end are the parent's: an error of one rank stops all ranks of the
// world, inside the group or not. Errors name ranks by their numbers in the world, not in the
// group. Throws InvalidArgument.
std::unique_ptr<Communicator> sub_communicator(Communicator& parent, std::vector<int> ranks,
                                               int id);

struct MeshAxis {
  std::string name;
  int size = 1;
};

// A grid of ranks with named axes, the last varying fastest: rank = sum of coordinate * stride.
// Every line along an axis is a ring of its own.
//
//   Mesh mesh(comm, {{"dp", 2}, {"sp", 4}});
//   ring_attention(mesh.ring("sp"), ...);  // two rings of four ranks at once
//
// All ranks of the communicator make the mesh, as they make a call; it must outlive the mesh.
class Mesh {
 public:
  // Names are unique and not empty, sizes multiply to comm.world_size(). Throws InvalidArgument; or
  // CommError, if ranks pass different axes.
  Mesh(Communicator& comm, std::vector<MeshAxis> axes);
  Mesh(const Mesh&) = delete;
  Mesh& operator=(const Mesh&) = delete;

  [[nodiscard]] const std::vector<MeshAxis>& axes() const { return axes_; }
  // Of this rank, by axis.
  [[nodiscard]] const std::vector<int>& coordinates() const { return coordinates_; }
  // This rank's line along the axis; its rank there is its coordinate. Lives as long as the mesh.
  // Throws InvalidArgument that lists the names.
  [[nodiscard]] Communicator& ring(std::string_view axis);

 private:
  std::vector<MeshAxis> axes_;
  std::vector<int> coordinates_;
  std::vector<std::unique_ptr<Communicator>> rings_;  // by axis
};

}  // namespace v1
}  // namespace annulus
