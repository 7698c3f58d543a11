#include "ops/forward_pass.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <numeric>
#include <utility>

#include "ops/row.h"

namespace annulus {
namespace {

constexpr std::int64_t kMaxLanes = 32;

// Sizes of what one thread keeps for its item, in the order in which it lies in memory; all
// multiples of 64 bytes.
struct ThreadSizes {
  std::int64_t scratch, tile_class, lane_bits, keep_bits, bias, rows, states;
  [[nodiscard]] std::int64_t total() const {
    return scratch + tile_class + lane_bits + keep_bits + bias + rows + states;
  }
};

ThreadSizes thread_sizes(const ForwardKernel& kernel, const Problem& problem,
                         const ForwardLayout& layout) {
  const std::int64_t strips = layout.strips_per_item, panel = layout.panel_keys;
  return {round_up(kernel.scratch_bytes(problem.dims), 64),
          round_up(strips * (panel / kernel.tile_keys), 64),
          round_up(strips * panel * 4, 64),
          problem.rule.dropout ? round_up(strips * panel * 4, 64) : 0,
          problem.rule.bias ? round_up(strips * panel * kernel.strip_rows * 4, 64) : 0,
          round_up(kernel.strip_rows * (layout.out_stride + 1) * 4, 64),
          layout.state_bytes > 0 ? 0 : strips * layout.strip_bytes};
}

}  // namespace

ForwardLayout make_forward_layout(const ForwardKernel& kernel, const Problem& problem,
                                  const Blocking& blocking, std::int64_t tokens, int threads,
                                  bool keep_states) {
  ForwardLayout layout;
  const std::int64_t heads = problem.kv_heads();
  layout.panel_keys = blocking.panel_keys;
  layout.strip_bytes = kernel.strip_bytes(problem.dims);
  layout.out_stride = round_up(problem.dims.v_head_dim, 16);
  layout.rows_per_head = tokens * problem.group;
  layout.strips_per_head = ceil_div(layout.rows_per_head, kernel.strip_rows);
  if (heads == 0 || layout.strips_per_head == 0) return layout;
  const std::int64_t most = blocking.item_rows / kernel.strip_rows;
  // As many items as a multiple of the threads, of equal size: 11 items do not halve.
  const std::int64_t wanted = round_up(heads * ceil_div(layout.strips_per_head, most), threads);
  layout.strips_per_item =
      ceil_div(layout.strips_per_head, std::min(layout.strips_per_head, ceil_div(wanted, heads)));
  layout.items_per_head = ceil_div(layout.strips_per_head, layout.strips_per_item);
  layout.items = heads * layout.items_per_head;
  if (keep_states) layout.state_bytes = heads * layout.strips_per_head * layout.strip_bytes;
  layout.thread_bytes = thread_sizes(kernel, problem, layout).total();
  return layout;
}

std::vector<Item> make_items(const ForwardLayout& layout, const Problem& problem,
                             const ForwardKernel& kernel) {
  std::vector<Item> items;
  for (std::int64_t head = 0; head < problem.kv_heads() && layout.items > 0; ++head) {
    for (std::int64_t strip = 0; strip < layout.strips_per_head; strip += layout.strips_per_item) {
      Item item;
      item.head = problem.head_at(head);
      item.strip_begin = strip,
      item.strip_end = std::min(strip + layout.strips_per_item, layout.strips_per_head);
      item.row_begin = strip * kernel.strip_rows;
      item.row_end = std::min(item.strip_end * kernel.strip_rows, layout.rows_per_head);
      items.push_back(item);
    }
  }
  return items;
}

namespace {

std::int64_t count_rows(const Problem& problem, const Item& item, const TokenSide& queries,
                        const TokenSide& keys) {
  const std::int64_t group = problem.group, first_head = item.head.kv_head * group;
  // Rows of whole tokens in one count, what a strip cuts off a token's group in a count of its own.
  const auto count = [&](std::int64_t row_begin, std::int64_t row_end) -> std::int64_t {
    if (row_begin >= row_end) return 0;
    const bool whole = row_begin % group == 0 && row_end % group == 0;
    const auto head_first = static_cast<int>(first_head + (whole ? 0 : row_begin % group));
    const auto head_last =
        static_cast<int>(first_head + (whole ? group - 1 : (row_end - 1) % group));
    return count_visible(problem.visibility, item.head.batch, head_first, head_last, queries,
                         row_begin / group, ceil_div(row_end, group), keys);
  };
  const std::int64_t inner_begin = std::min(round_up(item.row_begin, group), item.row_end);
  const std::int64_t inner_end = std::max(inner_begin, item.row_end / group * group);
  return count(item.row_begin, inner_begin) + count(inner_begin, inner_end) +
         count(inner_end, item.row_end);
}

}  // namespace

std::vector<std::int64_t> count_item_pairs(const Problem& problem, const std::vector<Item>& items,
                                           const TokenSide& queries, const KeyBlock& keys) {
  std::vector<std::int64_t> pairs(items.size());
  const bool same_for_heads = !problem.visibility.per_head();
  const std::size_t per_head =
      problem.kv_heads() > 0 ? items.size() / static_cast<std::size_t>(problem.kv_heads()) : 1;
  for (std::size_t i = 0; i < items.size(); ++i) {
    const Item& item = items[i];
    if (same_for_heads && item.head.kv_head > 0) {
      pairs[i] = pairs[i - per_head];
      continue;
    }
    pairs[i] = count_rows(problem, item, queries, keys.side());
  }
  return pairs;
}

struct ForwardPass::ThreadMemory {
  void* scratch;
  std::uint8_t* tile_class;  // [strip of the item][tile of the panel]
  std::uint32_t* lane_bits;  // [strip][key]
  std::uint32_t* keep_bits;  // [strip][key]
  float* bias;               // [strip][key][lane]
  float* rows;               // [lane][out_stride], then lse [lane]
  std::byte* states;

  ThreadMemory(std::byte* p, const ThreadSizes& sizes) {
    const auto take = [&](std::int64_t bytes) { return std::exchange(p, p + bytes); };
    scratch = take(sizes.scratch);
    tile_class = reinterpret_cast<std::uint8_t*>(take(sizes.tile_class));
    lane_bits = reinterpret_cast<std::uint32_t*>(take(sizes.lane_bits));
    keep_bits = reinterpret_cast<std::uint32_t*>(take(sizes.keep_bits));
    bias = reinterpret_cast<float*>(take(sizes.bias));
    rows = reinterpret_cast<float*>(take(sizes.rows));
    states = p;
  }
};

struct ForwardPass::Panel {
  KeyRange range;
  TileClass shade;  // of the whole item
};

ForwardPass::ForwardPass(const ForwardKernel& kernel, const TermKernel& terms,
                         const Blocking& blocking, QuerySide queries, Executor& executor,
                         bool keep_states, const RowDeltas& deltas, std::function<void()> tick)
    : kernel_(kernel),
      terms_(terms),
      queries_(std::move(queries)),
      problem_(*queries_.problem),
      executor_(executor),
      deltas_(deltas),
      tick_(std::move(tick)),
      layout_(make_forward_layout(kernel, problem_, blocking, queries_.rows.size(),
                                  executor.threads(), keep_states)),
      items_(make_items(layout_, problem_, kernel)),
      states_(layout_.state_bytes) {
  for (int t = 0; t < executor.threads() && layout_.items > 0; ++t)
    thread_memory_.emplace_back(layout_.thread_bytes);
}

std::int64_t ForwardPass::attend_block(const KeyBlock* keys,
                                       const std::vector<std::int64_t>& item_pairs, bool first,
                                       bool last) {
  std::vector<std::size_t> order(items_.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  if (keys != nullptr) {
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return item_pairs[a] > item_pairs[b]; });
  }
  const ThreadSizes sizes = thread_sizes(kernel_, problem_, layout_);
  std::atomic<std::size_t> next{0};
  std::atomic<std::int64_t> pairs{0};
  executor_.run([&](int thread) {
    if (items_.empty()) return;
    const ThreadMemory memory(thread_memory_[static_cast<std::size_t>(thread)].data(), sizes);
    for (std::size_t i = next++; i < order.size(); i = next++) {
      const Item& item = items_[order[i]];
      const std::int64_t strip =
          problem_.index_of(item.head) * layout_.strips_per_head + item.strip_begin;
      std::byte* states =
          layout_.state_bytes > 0 ? states_.data() + strip * layout_.strip_bytes : memory.states;
      if (first) start_item(item, states);
      if (keys != nullptr && item_pairs[order[i]] > 0)
        pairs += run_item(item, *keys, states, memory);
      if (last) finish_item(item, states, memory);
    }
  });
  return pairs;
}

std::vector<ForwardPass::Panel> ForwardPass::needed_panels(const Item& item,
                                                           const KeyBlock& keys) const {
  std::vector<Panel> panels;
  TileBox box = queries_.box(item.head, item.row_begin, item.row_end);
  for (std::int64_t begin = 0; begin < keys.num_keys(); begin += layout_.panel_keys) {
    const KeyRange range{begin, std::min(layout_.panel_keys, keys.num_keys() - begin)};
    const TileClass shade = classify(problem_, box, keys, range);
    if (shade != TileClass::kEmpty) panels.push_back({range, shade});
  }
  return panels;
}

bool ForwardPass::prepare(const Item& item, std::int64_t strip, const KeyBlock& keys,
                          const Panel& panel, const ThreadMemory& memory, StripWork& work,
                          std::int64_t& pairs) const {
  const std::int64_t slot = strip - item.strip_begin, first = slot * layout_.panel_keys;
  std::uint8_t* tile_class = memory.tile_class + first / kernel_.tile_keys;
  std::uint32_t* lane_bits = memory.lane_bits + first;
  const std::int64_t seen = classify_tiles(queries_, item.head, strip, keys, panel.range,
                                           panel.shade, tile_class, lane_bits);
  pairs += seen;
  work.tile_class = tile_class, work.lane_bits = lane_bits;
  if (seen == 0 || (!problem_.rule.bias && !problem_.rule.dropout)) return seen > 0;
  const Lanes lanes = queries_.lanes(item.head, strip);
  const TileTerms terms{terms_, problem_, item.head, lanes, keys, panel.range, tile_class};
  if (problem_.rule.bias) {
    float* bias = memory.bias + first * kernel_.strip_rows;
    gather_bias(terms, bias);
    work.bias = bias;
  }
  if (problem_.rule.dropout) {
    std::uint32_t* keep_bits = memory.keep_bits + first;
    gather_keep(terms, keep_bits);
    work.keep_bits = keep_bits;
  }
  return true;
}

std::int64_t ForwardPass::run_item(const Item& item, const KeyBlock& keys, std::byte* states,
                                   const ThreadMemory& memory) const {
  const std::vector<Panel> panels = needed_panels(item, keys);
  const std::int64_t head = problem_.index_of(item.head);
  std::vector<StripWork> works;
  std::int64_t pairs = 0;
  for (std::size_t i = 0; i < panels.size(); ++i) {
    const Panel& panel = panels[i];
    works.clear();
    for (std::int64_t s = item.strip_begin; s < item.strip_end; ++s) {
      StripWork work{};
      work.strip = states + (s - item.strip_begin) * layout_.strip_bytes;
      if (prepare(item, s, keys, panel, memory, work, pairs)) works.push_back(work);
    }
    if (works.empty()) continue;
    const std::int64_t next =
        i + 1 < panels.size() ? panels[i + 1].range.begin : panels[0].range.begin;
    kernel_.panel({keys.packed.bytes.data() + head * keys.head_bytes, keys.num_keys(),
                   panel.range.begin, panel.range.count, next, works.data(),
                   static_cast<std::int64_t>(works.size()), problem_.rule, problem_.dims,
                   memory.scratch});
    tick_();
  }
  return pairs;
}

void ForwardPass::start_item(const Item& item, std::byte* states) const {
  const std::int64_t size = size_bytes(problem_.q.dtype);
  for (std::int64_t s = item.strip_begin; s < item.strip_end; ++s) {
    const Lanes lanes = queries_.lanes(item.head, s);
    const void* rows[kMaxLanes];
    for (int n = 0; n < lanes.count; ++n)
      rows[n] = problem_.q.at(item.head.batch, lanes.row[n], lanes.head[n], 0);
    kernel_.start(states + (s - item.strip_begin) * layout_.strip_bytes, rows, lanes.count,
                  problem_.q.strides[3] * size, static_cast<Element>(problem_.q.dtype),
                  problem_.dims);
  }
}

void ForwardPass::finish_item(const Item& item, const std::byte* states,
                              const ThreadMemory& memory) const {
  const MutableTensorView &out = problem_.out, &lse = problem_.lse;
  float* lane_lse = memory.rows + kernel_.strip_rows * layout_.out_stride;
  for (std::int64_t s = item.strip_begin; s < item.strip_end; ++s) {
    const Lanes lanes = queries_.lanes(item.head, s);
    float sinks[kMaxLanes];
    std::fill(std::begin(sinks), std::end(sinks), -__builtin_inff());
    for (int n = 0; n < lanes.count; ++n)
      sinks[n] = problem_.sinks[static_cast<std::size_t>(lanes.head[n])];
    kernel_.finish(states + (s - item.strip_begin) * layout_.strip_bytes, sinks,
                   problem_.rule.keep_scale, memory.rows, layout_.out_stride, lane_lse,
                   problem_.dims);
    for (int n = 0; n < lanes.count; ++n) {
      const float* row = memory.rows + n * layout_.out_stride;
      if (deltas_.delta) deltas_.write(item.head.batch, lanes.row[n], lanes.head[n], row);
      store_row(out.dtype, out.at(item.head.batch, lanes.row[n], lanes.head[n], 0),
                out.strides[3] * size_bytes(out.dtype), row, problem_.dims.v_head_dim);
      if (lse)
        std::memcpy(lse.at(item.head.batch, lanes.row[n], lanes.head[n], 0), lane_lse + n, 4);
    }
  }
}

}  // namespace annulus
