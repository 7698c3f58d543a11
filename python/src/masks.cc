// Masks and partitions. What users see is annulus.Mask and annulus.Partition, in Python.

#include <nanobind/operators.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <vector>

#include "annulus/mask.h"
#include "annulus/partition.h"
#include "arrays.h"
#include "bindings.h"

namespace annulus::python {
namespace {

struct Bitmap {
  std::int64_t rows = 0, columns = 0;
  std::vector<std::uint8_t> visible;
};

Bitmap bitmap(nb::handle object, const char* operation, const char* axes) {
  const Array array(object, {operation, "the array"});
  array.require_rank(2, axes);
  array.require_dtype({DType::kBool, DType::kUInt8});
  const TensorView view = array.view();
  Bitmap result{view.shape[0], view.shape[1], {}};
  for (std::int64_t i = 0; i < result.rows; ++i)
    for (std::int64_t j = 0; j < result.columns; ++j)
      result.visible.push_back(std::to_integer<std::uint8_t>(*view.at(i, j, 0, 0)));
  return result;
}

}  // namespace

void bind_masks(nb::module_& m) {
  nb::class_<Mask>(m, "Mask")
      .def_static("full", &Mask::full)
      .def_static("causal", &Mask::causal)
      .def_static("sliding_window", &Mask::sliding_window)
      .def_static("chunked", &Mask::chunked)
      .def_static("prefix", &Mask::prefix)
      .def_static("dense",
                  [](nb::handle array) {
                    Bitmap b = bitmap(array, "Mask.dense", "[q_len, kv_len]");
                    return Mask::dense(b.rows, b.columns, std::move(b.visible));
                  })
      .def_static("block_sparse",
                  [](std::int64_t block, nb::handle array) {
                    Bitmap b = bitmap(array, "Mask.block_sparse", "[q_blocks, kv_blocks]");
                    return Mask::block_sparse(block, b.rows, b.columns, std::move(b.visible));
                  })
      .def("both", [](const Mask& a, const Mask& b) { return a & b; })
      .def("either", [](const Mask& a, const Mask& b) { return a | b; })
      .def("visible", &Mask::visible)
      .def("describe", &Mask::describe);

  nb::class_<Partition>(m, "Partition")
      .def_static("from_name", [](const std::string& name) { return Partition::from_name(name); })
      .def_static("from_positions", &Partition::from_positions)
      .def("name", [](const Partition& p) { return std::string(p.name()); })
      .def("positions", [](const Partition& p, int rank, int world_size, std::int64_t seq_len) {
        p.check(world_size, seq_len);
        std::vector<std::int64_t> positions;
        for (const Range& range : p.ranges(rank, world_size, seq_len))
          for (std::int64_t i = 0; i < range.count; ++i)
            positions.push_back(range.begin + i * range.stride);
        return positions;
      });
}

}  // namespace annulus::python
