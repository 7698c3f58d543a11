// The double-precision oracle. Results are NumPy arrays of float64.

#include "annulus/reference.h"

#include <memory>
#include <vector>

#include "bindings.h"
#include "options.h"

namespace annulus::python {
namespace {

using Doubles = nb::ndarray<nb::numpy, double>;

nb::object numpy_array(std::vector<double> values, const std::vector<std::size_t>& shape) {
  auto owned = std::make_unique<std::vector<double>>(std::move(values));
  std::vector<double>* memory = owned.release();
  const nb::capsule owner(memory,
                          [](void* p) noexcept { delete static_cast<std::vector<double>*>(p); });
  return nb::cast(Doubles(memory->data(), shape.size(), shape.data(), owner));
}

std::vector<std::size_t> extents(const TensorView& view) {
  return {view.shape.begin(), view.shape.end()};
}

Array rows(nb::handle object, const Options& options, const char* name) {
  Array array(object, {options.operation(), name});
  array.require_rank(4, "[batch, seq, heads, dim]");
  return array;
}

nb::tuple forward(const Options& options, nb::handle query, nb::handle key, nb::handle value) {
  const Array qa = rows(query, options, "query"), ka = rows(key, options, "key"),
              va = rows(value, options, "value");
  const TensorView q = qa.view(), k = ka.view(), v = va.view();
  std::vector<double> out, lse;
  {
    const nb::gil_scoped_release unlocked;
    reference::attention(q, k, v, options.ring().attention, out, lse);
  }
  std::vector<std::size_t> shape = extents(q);
  shape[3] = static_cast<std::size_t>(v.shape[3]);
  return nb::make_tuple(numpy_array(std::move(out), shape),
                        numpy_array(std::move(lse), {shape[0], shape[1], shape[2]}));
}

// dq, dk, dv, dsoftmax_aux or None, dbias or None. `out` None: the oracle's own.
nb::tuple backward(const Options& options, nb::handle dout, nb::handle query, nb::handle key,
                   nb::handle value, nb::handle out, nb::handle dlse) {
  const Array qa = rows(query, options, "query"), ka = rows(key, options, "key"),
              va = rows(value, options, "value"), da = rows(dout, options, "dout");
  Array oa, la;
  TensorView o, l;
  if (!out.is_none()) oa = rows(out, options, "out"), o = oa.view();
  if (!dlse.is_none()) la = Array(dlse, {options.operation(), "dlse"}), l = la.lse_view();
  const TensorView q = qa.view(), k = ka.view(), v = va.view(), d = da.view();
  reference::DenseGradients g;
  {
    const nb::gil_scoped_release unlocked;
    g = reference::attention_backward(d, q, k, v, o, options.ring().attention, l);
  }
  const AttentionOptions& a = options.ring().attention;
  nb::object dsinks = nb::none(), dbias = nb::none();
  if (a.softmax_aux) {
    std::vector<std::size_t> shape;
    for (const std::int64_t extent : options.softmax_aux_shape())
      shape.push_back(static_cast<std::size_t>(extent));
    dsinks = numpy_array(std::move(g.dsoftmax_aux), shape);
  }
  if (a.bias) dbias = numpy_array(std::move(g.dbias), extents(a.bias));
  return nb::make_tuple(numpy_array(std::move(g.dq), extents(q)),
                        numpy_array(std::move(g.dk), extents(k)),
                        numpy_array(std::move(g.dv), extents(v)), dsinks, dbias);
}

}  // namespace

void bind_reference(nb::module_& m) {
  m.def("reference_forward", &forward);
  m.def("reference_backward", &backward, nb::arg("options"), nb::arg("dout"), nb::arg("query"),
        nb::arg("key"), nb::arg("value"), nb::arg("out").none(), nb::arg("dlse").none());
}

}  // namespace annulus::python
