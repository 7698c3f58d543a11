// Ranks in threads of Python, and rings within them.

#include "workers.h"

#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>

#include "annulus/mesh.h"
#include "bindings.h"
#include "refusal.h"

namespace annulus::python {

namespace nb = nanobind;

Communicator& communicator_of(const nb::object& comm) { return nb::cast<Communicator&>(comm); }

void bind_workers(nb::module_& m) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;

  nb::class_<Communicator>(m, "Communicator")
      .def_prop_ro("rank", &Communicator::rank)
      .def_prop_ro("world_size", &Communicator::world_size);

  nb::class_<ThreadWorld>(m, "ThreadWorld")
      .def(
          "__init__",
          [](ThreadWorld* world, int world_size, double timeout_s) {
            WorkerOptions options;
            options.timeout_s = timeout_s;
            new (world) ThreadWorld(world_size, std::move(options));
          },
          nb::arg("world_size"), nb::arg("timeout_s"))
      .def("rank", &ThreadWorld::rank, nb::rv_policy::reference_internal)
      .def("leave", &ThreadWorld::leave, Unlocked())
      .def(
          "abort",
          [](ThreadWorld& world, int rank, const std::string& reason) {
            world.rank(rank).abort(std::make_exception_ptr(Interrupted(reason)));
          },
          Unlocked());

  nb::class_<Mesh>(m, "Mesh")
      .def(
          "__init__",
          [](Mesh* mesh, Communicator& comm, const std::vector<std::pair<std::string, int>>& axes) {
            std::vector<MeshAxis> list;
            for (const auto& [name, size] : axes) list.push_back({name, size});
            const nb::gil_scoped_release unlocked;
            new (mesh) Mesh(comm, std::move(list));
          },
          nb::keep_alive<1, 2>())
      .def_prop_ro("coordinates", &Mesh::coordinates)
      .def(
          "ring",
          [](Mesh& mesh, const std::string& axis) -> Communicator& { return mesh.ring(axis); },
          nb::rv_policy::reference_internal);
}

}  // namespace annulus::python
