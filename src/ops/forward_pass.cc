#include "ops/forward_pass.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <numeric>
#include <utility>

#include "base/half.h"

namespace annulus {
namespace {

constexpr std::int64_t kMaxLanes = 32;

// Sizes of what one thread keeps for its item, in the order in which it lies in memory; all
// multiples of 64 bytes.
struct ThreadSizes {
  std::int64_t scratch, tile_class, lane_bits, bias, rows, states;
  [[nodiscard]] std::int64_t total() const {
    return scratch + tile_class + lane_bits + bias + rows + states;
  }
};

ThreadSizes thread_sizes(const ForwardKernel& kernel, const Problem& problem,
                         const ForwardLayout& layout) {
  const std::int64_t strips = layout.strips_per_item, panel = layout.panel_keys;
  return {round_up(kernel.scratch_bytes(problem.dims), 64),
          round_up(strips * (panel / kernel.tile_keys), 64),
          strips * panel * 4,
          problem.rule.bias ? strips * panel * kernel.strip_rows * 4 : 0,
          round_up(kernel.strip_rows * (layout.out_stride + 1) * 4, 64),
          layout.state_bytes > 0 ? 0 : strips * layout.strip_bytes};
}

// out[x] = row[x], rounded once.
void store_row(DType dtype, std::byte* out, std::int64_t stride_bytes, const float* row,
               std::int64_t n) {
  if (dtype == DType::kFloat32 && stride_bytes == 4) {
    std::memcpy(out, row, static_cast<std::size_t>(n) * 4);
  } else if (dtype == DType::kBFloat16) {
    for (std::int64_t x = 0; x < n; ++x) {
      const std::uint16_t bits = float_to_bf16(row[x]);
      std::memcpy(out + x * stride_bytes, &bits, 2);
    }
  } else {
    for (std::int64_t x = 0; x < n; ++x)
      store_element(dtype, out + x * stride_bytes, static_cast<double>(row[x]));
  }
}

}  // namespace

ForwardLayout make_forward_layout(const ForwardKernel& kernel, const Problem& problem,
                                  std::int64_t tokens, int threads, bool keep_states) {
  ForwardLayout layout;
  const Blocking blocking = kernel.blocking(problem.dims);
  const std::int64_t heads = problem.batch * problem.num_kv_heads;
  layout.panel_keys = blocking.panel_keys;
  layout.strip_bytes = kernel.strip_bytes(problem.dims);
  layout.out_stride = round_up(problem.dims.v_head_dim, 16);
  layout.rows_per_head = tokens * problem.group;
  layout.strips_per_head = ceil_div(layout.rows_per_head, kernel.strip_rows);
  if (heads == 0 || layout.strips_per_head == 0) return layout;
  // A bias tile is as large as the scores: few strips, or it does not fit the L2.
  const std::int64_t most =
      problem.rule.bias ? 4 : std::max<std::int64_t>(1, blocking.item_rows / kernel.strip_rows);
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
  for (std::int64_t head = 0; head < problem.batch * problem.num_kv_heads && layout.items > 0;
       ++head) {
    for (std::int64_t strip = 0; strip < layout.strips_per_head; strip += layout.strips_per_item) {
      Item item;
      item.batch = head / problem.num_kv_heads, item.kv_head = head % problem.num_kv_heads;
      item.strip_begin = strip,
      item.strip_end = std::min(strip + layout.strips_per_item, layout.strips_per_head);
      item.row_begin = strip * kernel.strip_rows;
      item.row_end = std::min(item.strip_end * kernel.strip_rows, layout.rows_per_head);
      item.token_begin = item.row_begin / problem.group,
      item.token_end = ceil_div(item.row_end, problem.group);
      items.push_back(item);
    }
  }
  return items;
}

namespace {

std::int64_t count_rows(const Problem& problem, const Item& item, const TokenSide& queries,
                        const TokenSide& keys) {
  const std::int64_t group = problem.group, first_head = item.kv_head * group;
  // Rows of whole tokens in one count, what a strip cuts off a token's group in a count of its own.
  const auto count = [&](std::int64_t row_begin, std::int64_t row_end) -> std::int64_t {
    if (row_begin >= row_end) return 0;
    const bool whole = row_begin % group == 0 && row_end % group == 0;
    const auto head_first = static_cast<int>(first_head + (whole ? 0 : row_begin % group));
    const auto head_last =
        static_cast<int>(first_head + (whole ? group - 1 : (row_end - 1) % group));
    return count_visible(problem.visibility, item.batch, head_first, head_last, queries,
                         row_begin / group, ceil_div(row_end, group), keys);
  };
  const std::int64_t inner_begin = std::min(round_up(item.row_begin, group), item.row_end);
  const std::int64_t inner_end = std::max(inner_begin, item.row_end / group * group);
  return count(item.row_begin, inner_begin) + count(inner_begin, inner_end) +
         count(inner_end, item.row_end);
}

}  // namespace

std::vector<std::int64_t> count_item_pairs(const Problem& problem, const std::vector<Item>& items,
                                           const Rows& q_rows,
                                           const std::vector<std::int32_t>& q_segments,
                                           const KeyBlock& keys) {
  std::vector<std::int64_t> pairs(items.size());
  const bool same_for_heads = !problem.visibility.per_head();
  const std::size_t per_head =
      problem.num_kv_heads * problem.batch > 0
          ? items.size() / static_cast<std::size_t>(problem.batch * problem.num_kv_heads)
          : 1;
  for (std::size_t i = 0; i < items.size(); ++i) {
    const Item& item = items[i];
    if (same_for_heads && item.kv_head > 0) {
      pairs[i] = pairs[i - per_head];
      continue;
    }
    pairs[i] = count_rows(problem, item, {&q_rows, q_segments}, keys.side());
  }
  return pairs;
}

namespace {

Interval positions(const KeyBlock& keys, std::int64_t begin, std::int64_t count) {
  return {keys.rows.position[static_cast<std::size_t>(begin)],
          keys.rows.position[static_cast<std::size_t>(begin + count - 1)]};
}

}  // namespace

struct ForwardPass::ThreadMemory {
  void* scratch;
  std::uint8_t* tile_class;  // [strip of the item][tile of the panel]
  std::uint32_t* lane_bits;  // [strip][key]
  float* bias;               // [strip][key][lane]
  float* rows;               // [lane][out_stride], then lse [lane]
  std::byte* states;

  ThreadMemory(std::byte* p, const ThreadSizes& sizes) {
    const auto take = [&](std::int64_t bytes) { return std::exchange(p, p + bytes); };
    scratch = take(sizes.scratch);
    tile_class = reinterpret_cast<std::uint8_t*>(take(sizes.tile_class));
    lane_bits = reinterpret_cast<std::uint32_t*>(take(sizes.lane_bits));
    bias = reinterpret_cast<float*>(take(sizes.bias));
    rows = reinterpret_cast<float*>(take(sizes.rows));
    states = p;
  }
};

struct ForwardPass::ItemView {
  const Item& item;
  TileBox box;
  std::vector<TileBox> strips;
};

struct ForwardPass::Panel {
  std::int64_t begin;
  std::int64_t count;
  TileClass shade;  // of the whole item
};

ForwardPass::ForwardPass(const ForwardKernel& kernel, const Problem& problem, const Rows& rows,
                         std::vector<std::int32_t> segments, Executor& executor, bool keep_states,
                         std::function<void()> tick)
    : kernel_(kernel),
      problem_(problem),
      rows_(rows),
      segments_(std::move(segments)),
      executor_(executor),
      tick_(std::move(tick)),
      layout_(make_forward_layout(kernel, problem, rows.size(), executor.threads(), keep_states)),
      items_(make_items(layout_, problem, kernel)),
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
          (item.batch * problem_.num_kv_heads + item.kv_head) * layout_.strips_per_head +
          item.strip_begin;
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

TileBox ForwardPass::box_of(const Item& item, std::int64_t row_begin, std::int64_t row_end) const {
  const std::int64_t first = row_begin / problem_.group, end = ceil_div(row_end, problem_.group);
  TileBox box;
  box.batch = item.batch;
  box.head_first = static_cast<int>(item.kv_head * problem_.group);
  box.head_last = static_cast<int>(box.head_first + problem_.group - 1);
  box.queries = {rows_.position[static_cast<std::size_t>(first)],
                 rows_.position[static_cast<std::size_t>(end - 1)]};
  if (!segments_.empty()) {
    const auto ids = segments_.begin() + item.batch * rows_.size();
    const auto [lo, hi] = std::minmax_element(ids + first, ids + end);
    box.query_segments = {*lo, *hi};
  }
  return box;
}

ForwardPass::ItemView ForwardPass::view_of(const Item& item) const {
  ItemView view{item, box_of(item, item.row_begin, item.row_end), {}};
  for (std::int64_t s = item.strip_begin; s < item.strip_end; ++s) {
    view.strips.push_back(
        box_of(item, s * kernel_.strip_rows, std::min((s + 1) * kernel_.strip_rows, item.row_end)));
  }
  return view;
}

std::vector<ForwardPass::Panel> ForwardPass::needed_panels(const ItemView& item,
                                                           const KeyBlock& keys) const {
  std::vector<Panel> panels;
  TileBox box = item.box;
  for (std::int64_t begin = 0; begin < keys.num_keys(); begin += layout_.panel_keys) {
    const std::int64_t count = std::min(layout_.panel_keys, keys.num_keys() - begin);
    box.keys = positions(keys, begin, count);
    box.key_segments = keys.segment_range(item.item.batch, begin, count);
    const TileClass shade = problem_.visibility.classify(box);
    if (shade != TileClass::kEmpty) panels.push_back({begin, count, shade});
  }
  return panels;
}

Lanes ForwardPass::lanes_of(const Item& item, std::int64_t strip) const {
  Lanes lanes;
  const std::int64_t begin = strip * kernel_.strip_rows,
                     end = std::min(begin + kernel_.strip_rows, item.row_end);
  lanes.count = static_cast<int>(end - begin);
  for (std::int64_t row = begin; row < end; ++row) {
    const auto n = static_cast<std::size_t>(row - begin),
               token = static_cast<std::size_t>(row / problem_.group);
    lanes.position[n] = rows_.position[token], lanes.row[n] = rows_.row[token];
    lanes.head[n] = static_cast<std::int32_t>(item.kv_head * problem_.group + row % problem_.group);
    lanes.segment[n] = segments_.empty()
                           ? 0
                           : segments_[static_cast<std::size_t>(item.batch * rows_.size()) + token];
  }
  return lanes;
}

// Finds the classes of one strip's tiles by halving the panel until a piece is empty, full or one
// tile: most panels are one piece, and the edge of a mask crosses few tiles of the others.
class ForwardPass::StripTiles {
 public:
  StripTiles(const ForwardPass& pass, const ItemView& item, std::int64_t strip,
             const KeyBlock& keys, const Panel& panel, std::uint8_t* tile_class,
             std::uint32_t* lane_bits)
      : pass_(pass),
        item_(item.item),
        strip_(strip),
        keys_(keys),
        panel_(panel),
        box_(item.strips[static_cast<std::size_t>(strip - item.item.strip_begin)]),
        step_(pass.kernel_.tile_keys),
        tile_class_(tile_class),
        lane_bits_(lane_bits) {
    const std::int64_t row = strip * pass.kernel_.strip_rows;
    lane_count_ = std::min(row + pass.kernel_.strip_rows, item.item.row_end) - row;
    lanes_.count = 0;
  }

  // Visible pairs of the strip and the panel.
  std::int64_t classify() {
    const std::int64_t tiles = ceil_div(panel_.count, step_);
    return panel_.shade == TileClass::kFull ? fill(0, tiles) : classify(0, tiles);
  }

 private:
  std::int64_t classify(std::int64_t first, std::int64_t end) {
    const std::int64_t begin = panel_.begin + first * step_, count = keys_in(first, end);
    box_.keys = positions(keys_, begin, count);
    box_.key_segments = keys_.segment_range(item_.batch, begin, count);
    const TileClass shade = pass_.problem_.visibility.classify(box_);
    if (shade == TileClass::kFull) return fill(first, end);
    if (shade == TileClass::kEmpty) {
      std::memset(tile_class_ + first, kTileEmpty, static_cast<std::size_t>(end - first));
      return 0;
    }
    if (end - first == 1) return look_at(first);
    const std::int64_t middle = first + (end - first) / 2;
    const std::int64_t left = classify(first, middle);
    return left + classify(middle, end);
  }

  [[nodiscard]] std::int64_t keys_in(std::int64_t first, std::int64_t end) const {
    return std::min(end * step_, panel_.count) - first * step_;
  }

  std::int64_t fill(std::int64_t first, std::int64_t end) {
    std::memset(tile_class_ + first, kTileFull, static_cast<std::size_t>(end - first));
    const std::int64_t count = keys_in(first, end);
    if (count % step_ != 0) {  // the padding keys behind the last one are hidden
      tile_class_[end - 1] = kTilePartial;
      const auto all = static_cast<std::uint32_t>((std::uint64_t{1} << lane_count_) - 1);
      for (std::int64_t k = (end - 1) * step_; k < end * step_; ++k) {
        lane_bits_[k] = k < panel_.count ? all : 0;
      }
    }
    return lane_count_ * count;
  }

  // A tile that is partial as far as its edges tell: every pair of it.
  std::int64_t look_at(std::int64_t tile) {
    if (lanes_.count == 0) lanes_ = pass_.lanes_of(item_, strip_);
    const std::int64_t begin = panel_.begin + tile * step_, count = keys_in(tile, tile + 1);
    const std::span<const std::int32_t> ids = keys_.segments_of_row(item_.batch);
    const auto some =
        std::span(keys_.rows.position)
            .subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(count));
    std::uint32_t* bits = lane_bits_ + tile * step_;
    pass_.problem_.visibility.lane_bits(item_.batch, lanes_,
                                        {some, ids.empty() ? nullptr : ids.data() + begin}, bits);
    std::fill(bits + count, bits + step_, 0U);  // padding keys
    std::int64_t seen = 0;
    for (std::int64_t k = 0; k < count; ++k) seen += std::popcount(bits[k]);
    tile_class_[tile] = seen == 0                     ? kTileEmpty
                        : seen == lane_count_ * step_ ? kTileFull
                                                      : kTilePartial;
    return seen;
  }

  const ForwardPass& pass_;
  const Item& item_;
  const std::int64_t strip_;
  const KeyBlock& keys_;
  const Panel& panel_;
  TileBox box_;
  const std::int64_t step_;
  std::uint8_t* tile_class_;
  std::uint32_t* lane_bits_;
  std::int64_t lane_count_ = 0;
  Lanes lanes_;
};

std::int64_t ForwardPass::run_item(const Item& item, const KeyBlock& keys, std::byte* states,
                                   const ThreadMemory& memory) const {
  const ItemView view = view_of(item);
  const std::vector<Panel> panels = needed_panels(view, keys);
  const std::int64_t tiles = layout_.panel_keys / kernel_.tile_keys;
  const std::int64_t head = item.batch * problem_.num_kv_heads + item.kv_head;
  std::vector<StripWork> works;
  std::int64_t pairs = 0;
  for (std::size_t i = 0; i < panels.size(); ++i) {
    const Panel& panel = panels[i];
    works.clear();
    for (std::int64_t s = item.strip_begin; s < item.strip_end; ++s) {
      const std::int64_t slot = s - item.strip_begin;
      std::uint8_t* tile_class = memory.tile_class + slot * tiles;
      std::uint32_t* lane_bits = memory.lane_bits + slot * layout_.panel_keys;
      const std::int64_t seen =
          StripTiles(*this, view, s, keys, panel, tile_class, lane_bits).classify();
      if (seen == 0) continue;
      pairs += seen;
      float* bias = nullptr;
      if (problem_.rule.bias) {
        bias = memory.bias + slot * layout_.panel_keys * kernel_.strip_rows;
        gather_bias(item, lanes_of(item, s), keys, panel, tile_class, bias);
      }
      works.push_back({states + slot * layout_.strip_bytes, tile_class, lane_bits, bias});
    }
    if (works.empty()) continue;
    const std::int64_t next = i + 1 < panels.size() ? panels[i + 1].begin : panels[0].begin;
    kernel_.panel({keys.packed.bytes.data() + head * keys.head_bytes, keys.num_keys(), panel.begin,
                   panel.count, next, works.data(), static_cast<std::int64_t>(works.size()),
                   problem_.rule, problem_.dims, memory.scratch});
    tick_();
  }
  return pairs;
}

void ForwardPass::gather_bias(const Item& item, const Lanes& lanes, const KeyBlock& keys,
                              const Panel& panel, const std::uint8_t* tile_class,
                              float* bias) const {
  const TensorView& view = problem_.bias;
  const std::int64_t step = kernel_.tile_keys, width = kernel_.strip_rows;
  const std::int64_t stride = view.strides[3] * size_bytes(view.dtype);
  const std::int64_t* position = keys.rows.position.data() + panel.begin;
  for (int n = 0; n < lanes.count; ++n) {
    const std::byte* row = view.at(item.batch, lanes.head[n], lanes.row[n], 0);
    for (std::int64_t k = 0; k < panel.count; ++k) {
      if (tile_class[k / step] == kTileEmpty) continue;
      float& to = bias[k * width + n];
      const std::byte* from = row + position[k] * stride;
      if (view.dtype == DType::kFloat32) {
        std::memcpy(&to, from, 4);
      } else {
        to = static_cast<float>(load_element(view.dtype, from));
      }
    }
  }
}

void ForwardPass::start_item(const Item& item, std::byte* states) const {
  const std::int64_t size = size_bytes(problem_.q.dtype);
  for (std::int64_t s = item.strip_begin; s < item.strip_end; ++s) {
    const Lanes lanes = lanes_of(item, s);
    const void* rows[kMaxLanes];
    for (int n = 0; n < lanes.count; ++n)
      rows[n] = problem_.q.at(item.batch, lanes.row[n], lanes.head[n], 0);
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
    const Lanes lanes = lanes_of(item, s);
    float sinks[kMaxLanes];
    std::fill(std::begin(sinks), std::end(sinks), -__builtin_inff());
    for (int n = 0; n < lanes.count; ++n)
      sinks[n] = problem_.sinks[static_cast<std::size_t>(lanes.head[n])];
    kernel_.finish(states + (s - item.strip_begin) * layout_.strip_bytes, sinks, memory.rows,
                   layout_.out_stride, lane_lse, problem_.dims);
    for (int n = 0; n < lanes.count; ++n) {
      store_row(out.dtype, out.at(item.batch, lanes.row[n], lanes.head[n], 0),
                out.strides[3] * size_bytes(out.dtype), memory.rows + n * layout_.out_stride,
                problem_.dims.v_head_dim);
      if (lse) std::memcpy(lse.at(item.batch, lanes.row[n], lanes.head[n], 0), lane_lse + n, 4);
    }
  }
}

}  // namespace annulus
