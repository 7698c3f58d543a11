// The operations, on arrays that the package's Python files have allocated.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <limits>

#include "annulus/attention.h"
#include "annulus/ring.h"
#include "bindings.h"
#include "interrupt.h"
#include "options.h"
#include "workers.h"

namespace annulus::python {
namespace {

constexpr std::initializer_list<DType> kFloats = {DType::kFloat32, DType::kBFloat16,
                                                  DType::kFloat16};

// [batch, seq, heads, dim] of floats.
Array rows(nb::handle object, const Options& options, const char* name, bool writable = false) {
  Array array(object, {options.operation(), name}, writable);
  array.require_rank(4, "[batch, seq, heads, dim]");
  array.require_dtype(kFloats);
  return array;
}

struct Operands {
  Operands(const Options& options, nb::handle query, nb::handle key, nb::handle value)
      : q(rows(query, options, "query")),
        k(rows(key, options, "key")),
        v(rows(value, options, "value")) {}
  Array q, k, v;
};

// The library speaks of ring_attention and of q, k and v; users called something else with query,
// key and value.
[[noreturn]] void rethrow(const InvalidArgument& error, const Options& options) {
  std::string text = error.what();
  const std::size_t colon = text.find(": ");
  if (colon == std::string::npos) throw;
  text = text.substr(colon + 2);
  for (const auto& [theirs, ours] : {std::pair{"q ", "query "}, {"k ", "key "}, {"v ", "value "}})
    if (text.rfind(theirs, 0) == 0) text = ours + text.substr(2);
  throw InvalidArgument(std::string(options.operation()) + ": " + text, error.fix());
}

// Runs `global(options)` or, on a rank of somebody's ring, `spmd(comm, options)`.
template <class Global, class Spmd>
void run(const Options& options, int workers, const nb::object& comm, const Global& global,
         const Spmd& spmd) {
  if (!comm.is_none()) {
    Communicator& communicator = communicator_of(comm);
    try {
      const nb::gil_scoped_release unlocked;
      spmd(communicator, options.ring());
    } catch (const InvalidArgument& error) {
      rethrow(error, options);
    }
    return;
  }
  SignalWatch signals;
  RingOptions ring = options.ring();
  ring.workers.stop = [&signals] { return signals.stop(); };
  // Alone there is nobody to wait for.
  if (workers == 1) ring.workers.timeout_s = std::numeric_limits<double>::infinity();
  try {
    signals.run([&] { global(ring); });
  } catch (const InvalidArgument& error) {
    rethrow(error, options);
  }
}

void forward(const Options& options, nb::handle query, nb::handle key, nb::handle value,
             nb::handle out, nb::handle lse, int workers, const nb::object& comm) {
  const Operands in(options, query, key, value);
  const Array out_array = rows(out, options, "out", true);
  Array lse_array;
  MutableTensorView lse_view;
  if (!lse.is_none()) {
    lse_array = Array(lse, {options.operation(), "lse"}, true);
    lse_view = lse_array.lse_view();
  }
  const MutableTensorView q = in.q.view(), k = in.k.view(), v = in.v.view(), o = out_array.view();
  run(
      options, workers, comm,
      [&](const RingOptions& ring) { ring_attention(workers, q, k, v, o, lse_view, ring); },
      [&](Communicator& c, const RingOptions& ring) {
        ring_attention(c, q, k, v, o, lse_view, ring);
      });
}

// `gradients`: dq, dk, dv, dsoftmax_aux or None, dbias or None, all to be written.
void backward(const Options& options, nb::handle dout, nb::handle query, nb::handle key,
              nb::handle value, nb::handle out, nb::handle lse, nb::handle dlse,
              const nb::tuple& gradients, int workers, const nb::object& comm) {
  const Operands in(options, query, key, value);
  const Array dout_array = rows(dout, options, "dout"), out_array = rows(out, options, "out");
  const Array lse_array(lse, {options.operation(), "lse"});
  Array dlse_array, dsinks, dbias;
  const Array dq = rows(gradients[0], options, "dq", true),
              dk = rows(gradients[1], options, "dk", true),
              dv = rows(gradients[2], options, "dv", true);
  Gradients g{dq.view(), dk.view(), dv.view(), {}, {}, {}};
  if (!dlse.is_none()) {
    dlse_array = Array(dlse, {options.operation(), "dlse"});
    g.dlse = dlse_array.lse_view();
  }
  if (!gradients[3].is_none()) {
    dsinks = Array(gradients[3], {options.operation(), "dsoftmax_aux"}, true);
    g.dsoftmax_aux = dsinks.sinks_view();
  }
  if (!gradients[4].is_none()) {
    dbias = rows(gradients[4], options, "dbias", true);
    g.dbias = dbias.view();
  }
  const TensorView q = in.q.view(), k = in.k.view(), v = in.v.view(), d = dout_array.view(),
                   o = out_array.view(), l = lse_array.lse_view();
  run(
      options, workers, comm,
      [&](const RingOptions& ring) { ring_attention_backward(workers, d, q, k, v, o, l, g, ring); },
      [&](Communicator& c, const RingOptions& ring) {
        ring_attention_backward(c, d, q, k, v, o, l, g, ring);
      });
}

void merge_arrays(nb::handle out_a, nb::handle lse_a, nb::handle out_b, nb::handle lse_b,
                  nb::handle out, nb::handle lse) {
  const auto rows_of = [](nb::handle object, const char* name, bool writable = false) {
    Array array(object, {"merge", name}, writable);
    array.require_rank(4, "[batch, seq, heads, dim]");
    array.require_dtype(kFloats);
    return array;
  };
  const Array a = rows_of(out_a, "out_a"), b = rows_of(out_b, "out_b"),
              to = rows_of(out, "out", true);
  const Array la(lse_a, {"merge", "lse_a"}), lb(lse_b, {"merge", "lse_b"}),
      lto(lse, {"merge", "lse"}, true);
  const MutableTensorView av = a.view(), bv = b.view(), tv = to.view(), lav = la.lse_view(),
                          lbv = lb.lse_view(), ltv = lto.lse_view();
  const nb::gil_scoped_release unlocked;
  merge(av, lav, bv, lbv, tv, ltv);
}

}  // namespace

void bind_calls(nb::module_& m) {
  nb::class_<Options>(m, "Options")
      .def(nb::init<std::string, nb::dict>(), nb::arg("operation"), nb::arg("kwargs"))
      .def_prop_ro("copies", &Options::copies)
      .def_prop_ro("softmax_aux_shape", &Options::softmax_aux_shape);
  m.def("forward", &forward, nb::arg("options"), nb::arg("query"), nb::arg("key"), nb::arg("value"),
        nb::arg("out"), nb::arg("lse").none(), nb::arg("workers"), nb::arg("comm").none());
  m.def("backward", &backward, nb::arg("options"), nb::arg("dout"), nb::arg("query"),
        nb::arg("key"), nb::arg("value"), nb::arg("out"), nb::arg("lse"), nb::arg("dlse").none(),
        nb::arg("gradients"), nb::arg("workers"), nb::arg("comm").none());
  m.def("merge", &merge_arrays);
  m.def("aligned_array", &aligned_array, nb::arg("shape"), nb::arg("dtype"));
}

}  // namespace annulus::python
