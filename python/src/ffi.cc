// Attention as calls of XLA programs: what annulus.jax registers with JAX.

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "annulus/ring.h"
#include "arrays.h"
#include "bindings.h"
#include "ffi_frame.h"
#include "ffi_operands.h"
#include "ffi_options.h"
#include "ffi_rendezvous.h"
#include "ops/problem.h"
#include "options.h"
#include "refusal.h"

namespace annulus::python {
namespace {

// One call in one compiled program, shared by all devices that run it. XLA keeps it as the call's
// state.
class Site {
 public:
  explicit Site(const FfiAttributes& given)
      : options(ring_options(given)),
        operation(given.text("operation").value_or("annulus.jax")),
        arguments(slots_named(given.text("arguments").value_or(""))),
        results(slots_named(given.text("results").value_or(""))),
        workers(static_cast<int>(given.integer("workers").value_or(1))) {
    terms = {operation.c_str(), given.text("axis").value_or(""),
             static_cast<int>(given.integer("world_size").value_or(1)),
             given.real("timeout_s").value_or(30)};
    static std::atomic<std::int64_t> count{0};
    number = ++count;
  }

  // How often the device has come here before in this run.
  std::int64_t turn(std::int32_t device, std::int64_t run) {
    const std::lock_guard lock(mutex_);
    for (Visits& visits : visits_)
      if (visits.device == device && visits.run == run) return visits.count++;
    // Runs end without a word. XLA has at most some dozens under way on a device.
    if (visits_.size() >= 4096) visits_.pop_back();
    visits_.push_front({device, run, 1});
    return 0;
  }

  RingOptions options;  // without arrays
  std::string operation;
  std::vector<Slot> arguments, results;
  int workers = 1;
  MeetingTerms terms;  // of a ring of devices, if world_size > 1
  std::int64_t number = 0;

 private:
  struct Visits {
    std::int32_t device;
    std::int64_t run, count;
  };
  std::mutex mutex_;
  std::deque<Visits> visits_;  // the latest run first
};

RingOptions options_of(const Site& site, const FfiOperands& in, std::int64_t call) {
  RingOptions ring = site.options;
  AttentionOptions& a = ring.attention;
  a.q_segment_ids = in.view(Slot::kQSegmentIds, call);
  a.kv_segment_ids = in.view(Slot::kKvSegmentIds, call);
  a.kv_lengths = in.view(Slot::kKvLengths, call);
  a.attention_mask = in.view(Slot::kAttentionMask, call);
  a.bias = in.view(Slot::kBias, call);
  a.softmax_aux = in.view(Slot::kSoftmaxAux, call);
  if (in.given(Slot::kDropoutSeed)) a.dropout_seed = in.seed(call);
  // Alone there is nobody to wait for.
  if (site.workers == 1) ring.workers.timeout_s = std::numeric_limits<double>::infinity();
  return ring;
}

// Gradients of what every rank has are added up over the ranks by JAX; the first one brings all.
void keep_on_first_rank(const MutableTensorView& sum, int rank) {
  if (!sum || rank == 0) return;
  auto* at = static_cast<float*>(sum.data);
  std::fill(at, at + sum.shape[0] * std::max<std::int64_t>(sum.shape[1], 1), 0.0F);
}

// `comm` is null for whole tensors. What depends on a rank's own data may fail from here on: its
// ring is told.
void compute(const Site& site, FfiOperands& in, Communicator* comm) {
  in.narrow_integers();
  in.fold(site.options.attention.dropout_prob > 0);
  for (std::int64_t call = 0; call < in.count(); ++call) {
    const RingOptions ring = options_of(site, in, call);
    const auto view = [&](Slot slot) { return in.view(slot, call); };
    const TensorView q = view(Slot::kQuery), k = view(Slot::kKey), v = view(Slot::kValue);
    const MutableTensorView out = view(Slot::kOut), lse = view(Slot::kLse);
    if (!in.given(Slot::kDq)) {
      if (comm != nullptr) {
        ring_attention(*comm, q, k, v, out, lse, ring);
      } else {
        ring_attention(site.workers, q, k, v, out, lse, ring);
      }
      continue;
    }
    const TensorView dout = view(Slot::kDout);
    const Gradients gradients{view(Slot::kDq),          view(Slot::kDk),    view(Slot::kDv),
                              view(Slot::kDsoftmaxAux), view(Slot::kDbias), view(Slot::kDlse)};
    if (comm != nullptr) {
      ring_attention_backward(*comm, dout, q, k, v, out, lse, gradients, ring);
      keep_on_first_rank(gradients.dsoftmax_aux, comm->rank());
    } else {
      ring_attention_backward(site.workers, dout, q, k, v, out, lse, gradients, ring);
    }
  }
}

// XLA's number for the type; of the process, since XLA's registry is.
xla::TypeId site_type{0};

void register_site_type(const xla::Api* api) {
  static std::mutex mutex;
  static const xla::TypeInfo info{{sizeof info, nullptr},
                                  [](void* site) { delete static_cast<Site*>(site); }};
  const std::lock_guard lock(mutex);
  if (site_type.id != 0) return;
  const std::string_view name = "annulus.jax.Site";
  xla::RegisterTypeArgs args{{sizeof args, nullptr}, {name.data(), name.size()}, &site_type, &info};
  require_success(api, api->register_type(&args), "register a type");
}

bool old_state(const xla::Api* api) { return api->version.minor < 3; }

void set_site(const xla::CallFrame& frame, std::unique_ptr<Site> site) {
  register_site_type(frame.api);
  xla::StateArgs args{
      {sizeof args, nullptr}, frame.context, xla::Stage::kInstantiate, &site_type, site.get()};
  xla::OldStateArgs old{{sizeof old, nullptr}, frame.context, &site_type, site.get()};
  void* either = old_state(frame.api) ? static_cast<void*>(&old) : &args;
  require_success(frame.api, frame.api->set_state(either), "keep a call's state");
  site.release();  // NOLINT(bugprone-unused-return-value): XLA's now
}

Site& site_of(const xla::CallFrame& frame) {
  xla::StateArgs args{
      {sizeof args, nullptr}, frame.context, xla::Stage::kInstantiate, &site_type, nullptr};
  xla::OldStateArgs old{{sizeof old, nullptr}, frame.context, &site_type, nullptr};
  void* either = old_state(frame.api) ? static_cast<void*>(&old) : &args;
  require_success(frame.api, frame.api->get_state(either), "return a call's state");
  return *static_cast<Site*>(old_state(frame.api) ? old.state : args.state);
}

void instantiate(xla::CallFrame& frame) {
  set_site(frame, std::make_unique<Site>(FfiAttributes(frame.attributes)));
}

void execute(xla::CallFrame& frame) {
  Site& site = site_of(frame);
  auto operands =
      std::make_shared<FfiOperands>(site.arguments, read_buffers(frame.arguments), site.results,
                                    read_buffers(frame.results), site.operation.c_str());
  if (site.terms.world_size == 1) return compute(site, *operands, nullptr);
  const std::int32_t rank = operands->scalar(Slot::kRank, "axis_name");
  if (rank < 0 || rank >= site.terms.world_size)
    throw InternalError("annulus.jax: rank " + std::to_string(rank) + " is not on the axis");
  const std::int64_t run = run_id(frame), turn = site.turn(device_ordinal(frame), run);
  const MeetingPlace place{site.number, run, turn, operands->scalar(Slot::kGroup, "a mesh axis")};
  meet(place, site.terms, rank,
       {[&site, operands](Communicator& comm) { compute(site, *operands, &comm); },
        FfiPromise(frame)});
}

template <void (*body)(xla::CallFrame&)>
xla::Error* handler(xla::CallFrame* frame) {
  try {
    if (!answered_metadata(*frame)) body(*frame);
    return nullptr;
  } catch (...) {
    return as_xla_error(frame->api, std::current_exception());
  }
}

// What a program will be called with, checked as the call itself would, and its options as
// attributes. `world_size` ranks hold shards like these; `workers` share them.
nb::dict attributes(const Options& options, nb::handle query, nb::handle key, nb::handle value,
                    int world_size, int workers) {
  const auto rows = [&](nb::handle object, const char* name) {
    const Array array(object, {options.operation(), name});
    array.require_rank(4, "[batch, seq, heads, dim]");
    array.require_dtype({DType::kFloat32, DType::kBFloat16, DType::kFloat16});
    return array.view();
  };
  CallTensors tensors;
  tensors.q = rows(query, "query"), tensors.k = rows(key, "key"), tensors.v = rows(value, "value");
  tensors.out = {nullptr, tensors.q.dtype, tensors.q.shape, tensors.q.strides};
  tensors.out.shape[3] = tensors.v.shape[3];
  const std::int64_t q_len = world_size * tensors.q.shape[1],
                     kv_len = world_size * tensors.k.shape[1];
  make_problem(options.operation(), tensors, options.ring().attention, q_len, kv_len, false);
  const Partition& partition = options.ring().partition;
  for (const std::int64_t length : {q_len, kv_len}) {
    partition.check(world_size == 1 ? workers : world_size, length);
    for (int rank = 0; world_size > 1 && rank < world_size; ++rank) {
      const std::int64_t rows_of_rank = partition.local_len(rank, world_size, length);
      if (rows_of_rank == length / world_size) continue;
      refuse(options.operation(), "partition gives rank ", rank, " ", rows_of_rank, " of ", length,
             " rows, but every device's shard has ", length / world_size);
    }
  }
  const std::int64_t heads = tensors.q.shape[2], kv_heads = tensors.k.shape[2];
  return attributes_of(options.ring(), q_len, kv_len, heads, kv_heads > 0 ? heads / kv_heads : 1);
}

}  // namespace

void bind_ffi(nb::module_& m) {
  nb::class_<ArraySpec>(m, "ArraySpec")
      .def("__init__",
           [](ArraySpec* spec, std::string dtype, std::vector<std::int64_t> shape) {
             new (spec) ArraySpec{std::move(dtype), std::move(shape)};
           })
      .def_ro("dtype", &ArraySpec::dtype);
  m.def("ffi_attributes", &attributes);
  m.def("ffi_handlers", [] {
    nb::dict stages;
    stages["instantiate"] = nb::capsule(reinterpret_cast<void*>(&handler<instantiate>));
    stages["execute"] = nb::capsule(reinterpret_cast<void*>(&handler<execute>));
    return stages;
  });
}

}  // namespace annulus::python
