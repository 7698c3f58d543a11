#include "ffi_options.h"

#include <nanobind/stl/string.h>

#include <memory>
#include <mutex>
#include <random>
#include <utility>
#include <vector>

#include "annulus/error.h"

namespace annulus::python {

namespace nb = nanobind;

namespace {

// What programs know by number. A number has the process in its upper bits: a program that was
// compiled in another process, and stored, must not find some other mask here.
template <class Value>
class Registry {
 public:
  std::int64_t add(Value value) {
    const std::lock_guard lock(mutex_);
    values_.push_back(std::make_shared<const Value>(std::move(value)));
    return process_ + static_cast<std::int64_t>(values_.size());
  }

  std::shared_ptr<const Value> at(std::int64_t handle) const {
    const std::lock_guard lock(mutex_);
    const std::int64_t index = handle - process_ - 1;
    if (index >= 0 && index < static_cast<std::int64_t>(values_.size()))
      return values_[static_cast<std::size_t>(index)];
    throw Unsupported(
        "annulus.jax: this program was compiled in another process, and has masks or a "
        "partition which stayed there",
        "trace and compile it in this process");
  }

 private:
  static std::int64_t random_process() {
    std::random_device random;
    return static_cast<std::int64_t>(random()) << 30;
  }

  mutable std::mutex mutex_;
  const std::int64_t process_ = random_process();
  std::vector<std::shared_ptr<const Value>> values_;
};

// Never destroyed: XLA's threads may outlive main().
Registry<std::vector<Mask>>& masks() {
  static auto* const registry = new Registry<std::vector<Mask>>;
  return *registry;
}
Registry<Partition>& partitions() {
  static auto* const registry = new Registry<Partition>;
  return *registry;
}

constexpr const char* kCustom = "custom";

bool has_name(const Partition& partition) { return partition.name() != kCustom; }

}  // namespace

nb::dict attributes_of(const RingOptions& options, std::int64_t q_len, std::int64_t kv_len,
                       std::int64_t num_heads, std::int64_t num_reps) {
  const AttentionOptions& a = options.attention;
  nb::dict d;
  d["causal"] = a.causal;
  d["top_left"] = a.causal_alignment == CausalAlignment::kTopLeft;
  d["window_left"] = a.sliding_window.left, d["window_right"] = a.sliding_window.right;
  d["chunk_size"] = a.chunk_size;
  if (a.padding_segment_id) d["padding_segment_id"] = std::int64_t{*a.padding_segment_id};
  if (a.softmax_scale) d["softmax_scale"] = *a.softmax_scale;
  d["logits_soft_cap"] = a.logits_soft_cap;
  d["dropout_prob"] = a.dropout_prob;
  if (a.mask_builder) {
    std::vector<Mask> by_head;
    for (std::int64_t head = 0; head < num_heads; ++head)
      by_head.push_back(a.mask_builder(q_len, kv_len, num_heads, head, num_reps));
    d["masks"] = masks().add(std::move(by_head));
  }
  d["partition"] = std::string(options.partition.name());
  if (!has_name(options.partition)) d["positions"] = partitions().add(options.partition);
  d["linear"] = options.topology == Topology::kLinear;
  d["fused_backward"] = options.fused_backward;
  d["forward_q_block"] = a.forward_blocks.q, d["forward_kv_block"] = a.forward_blocks.kv;
  d["backward_q_block"] = a.backward_blocks.q, d["backward_kv_block"] = a.backward_blocks.kv;
  return d;
}

RingOptions ring_options(const FfiAttributes& given) {
  RingOptions options;
  AttentionOptions& a = options.attention;
  a.causal = given.flag("causal").value_or(false);
  a.causal_alignment = given.flag("top_left").value_or(false) ? CausalAlignment::kTopLeft
                                                              : CausalAlignment::kBottomRight;
  a.sliding_window = {given.integer("window_left").value_or(-1),
                      given.integer("window_right").value_or(-1)};
  a.chunk_size = given.integer("chunk_size").value_or(0);
  if (const auto id = given.integer("padding_segment_id"))
    a.padding_segment_id = static_cast<std::int32_t>(*id);
  a.softmax_scale = given.real("softmax_scale");
  a.logits_soft_cap = given.real("logits_soft_cap").value_or(0);
  a.dropout_prob = given.real("dropout_prob").value_or(0);
  if (const auto handle = given.integer("masks")) {
    a.mask_builder = [by_head = masks().at(*handle)](std::int64_t, std::int64_t, std::int64_t,
                                                     std::int64_t head, std::int64_t) {
      return by_head->at(static_cast<std::size_t>(head));
    };
  }
  const auto positions = given.integer("positions");
  options.partition = positions
                          ? *partitions().at(*positions)
                          : Partition::from_name(given.text("partition").value_or("contiguous"));
  options.topology = given.flag("linear").value_or(false) ? Topology::kLinear : Topology::kRing;
  options.fused_backward = given.flag("fused_backward").value_or(true);
  a.forward_blocks = {given.integer("forward_q_block").value_or(0),
                      given.integer("forward_kv_block").value_or(0)};
  a.backward_blocks = {given.integer("backward_q_block").value_or(0),
                       given.integer("backward_kv_block").value_or(0)};
  return options;
}

}  // namespace annulus::python
