// Plans as dictionaries.

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "annulus/ring.h"
#include "bindings.h"
#include "options.h"

namespace annulus::python {
namespace {

nb::list steps_of(const std::vector<PlannedStep>& steps) {
  nb::list list;
  for (const PlannedStep& step : steps) {
    nb::dict entry;
    entry["rank"] = step.rank, entry["step"] = step.step, entry["owner"] = step.owner;
    entry["pairs"] = step.pairs, entry["send_to"] = step.send_to, entry["bytes"] = step.bytes;
    list.append(entry);
  }
  return list;
}

nb::dict plan_of(const Plan& plan) {
  nb::dict d;
  d["target"] = plan.target, d["arithmetic"] = plan.arithmetic, d["mask"] = plan.mask;
  d["workers"] = plan.workers, d["threads_per_worker"] = plan.threads_per_worker;
  d["partition"] = plan.partition;
  d["q_rows"] = nb::cast(plan.q_rows), d["kv_rows"] = nb::cast(plan.kv_rows);
  d["pairs_visible"] = plan.pairs_visible, d["pairs_total"] = plan.pairs_total;
  d["flops"] = plan.flops;
  d["bytes_sent_per_rank"] = nb::cast(plan.bytes_sent_per_rank);
  d["strip_rows"] = plan.strip_rows, d["tile_keys"] = plan.tile_keys;
  d["panel_keys"] = plan.panel_keys, d["item_rows"] = plan.item_rows;
  d["peak_bytes"] = plan.peak_bytes;
  d["notes"] = nb::cast(plan.notes);
  d["steps"] = steps_of(plan.steps);
  return d;
}

nb::dict backward_of(const BackwardPlan& plan) {
  nb::dict d;
  d["target"] = plan.target, d["arithmetic"] = plan.arithmetic;
  d["ring_backward"] = plan.queries_travel ? "q" : "kv";
  d["pairs_visible"] = plan.pairs_visible, d["flops"] = plan.flops;
  d["bytes_sent_per_rank"] = nb::cast(plan.bytes_sent_per_rank);
  d["panel_keys"] = plan.panel_keys, d["block_rows"] = plan.block_rows;
  d["peak_bytes"] = plan.peak_bytes;
  d["steps"] = steps_of(plan.steps);
  return d;
}

struct Shapes {
  Shapes(const Options& options, nb::handle query, nb::handle key, nb::handle value)
      : q(query, {options.operation(), "query"}),
        k(key, {options.operation(), "key"}),
        v(value, {options.operation(), "value"}) {
    for (const Array* array : {&q, &k, &v}) array->require_rank(4, "[batch, seq, heads, dim]");
  }
  Array q, k, v;
};

}  // namespace

void bind_plans(nb::module_& m) {
  m.def("explain", [](const Options& options, nb::handle query, nb::handle key, nb::handle value,
                      int workers) {
    const Shapes in(options, query, key, value);
    Plan plan;
    {
      const nb::gil_scoped_release unlocked;
      plan = explain(workers, in.q.view(), in.k.view(), in.v.view(), in.q.dtype(), options.ring());
    }
    return plan_of(plan);
  });
  m.def("explain_backward", [](const Options& options, nb::handle query, nb::handle key,
                               nb::handle value, int workers) {
    const Shapes in(options, query, key, value);
    BackwardPlan plan;
    {
      const nb::gil_scoped_release unlocked;
      plan = explain_backward(workers, in.q.view(), in.k.view(), in.v.view(), in.q.dtype(),
                              options.ring());
    }
    return backward_of(plan);
  });
}

}  // namespace annulus::python
