#include "ops/backward_pass.h"

#include <algorithm>
#include <limits>
#include <thread>
#include <utility>

namespace annulus {
namespace {

// Blocks by which a panel stays behind the one before. dq that another core wrote just now is slow
// to read, and the prefetch of the next block must not take lines that are still written: far
// behind is better (8 blocks against 2: 5 % at 16K tokens, d = 128, two threads), as long as all
// threads find room.
std::int64_t lead_of(std::int64_t blocks, int threads) {
  return std::clamp<std::int64_t>(blocks / (std::int64_t{8} * threads), 1, 7);
}

// Which (set, panel) a unit is: of as many sets as there are threads one panel each, then the next.
// While there are sets enough, threads rarely trail each other.
std::pair<std::int64_t, std::int64_t> key_unit_at(std::int64_t unit, std::int64_t sets,
                                                  std::int64_t panels, int threads) {
  const std::int64_t first = unit / (threads * panels) * threads;
  const std::int64_t side_by_side = std::min<std::int64_t>(threads, sets - first);
  const std::int64_t index = unit - first * panels;
  return {first + index % side_by_side, index / side_by_side};
}

constexpr std::int64_t kDone = std::numeric_limits<std::int64_t>::max();

}  // namespace

// One call of run().
struct BackwardPass::Work {
  const QueryBlock& queries;
  const KeyBlock& keys;
  float* dq;
  float* dkv;
  std::int64_t panels;
  std::int64_t blocks;
  std::int64_t lead;

  [[nodiscard]] KeyRange panel(std::int64_t index, std::int64_t panel_keys) const {
    const std::int64_t begin = index * panel_keys;
    return {begin, std::min(panel_keys, keys.num_keys() - begin)};
  }
};

// Strips [first, end) that some key of a panel sees.
struct BackwardPass::NeededBlock {
  std::int64_t index;
  std::int64_t first;
  std::int64_t end;
  TileClass shade;
};

// The strips of a block that see something, and which of their head they are.
struct BackwardPass::Prepared {
  std::vector<BackwardStrip> strips;
  std::vector<std::int64_t> numbers;
};

// What one thread keeps, per strip of a block; all pieces are multiples of 64 bytes.
struct BackwardPass::ThreadMemory {
  void* scratch;
  std::uint8_t* tile_class;
  std::uint32_t* lane_bits;
  std::uint32_t* keep_bits;
  float* bias;
  float* ds;
  std::int64_t bytes;

  // A null memory tells only the size.
  ThreadMemory(const BackwardKernel& kernel, const Problem& problem,
               const BackwardBlocking& blocking, bool with_dbias, std::byte* memory) {
    bytes = 0;
    const auto take = [&](std::int64_t size) {
      const std::int64_t begin = std::exchange(bytes, bytes + round_up(size, 64));
      return memory == nullptr ? nullptr : memory + begin;
    };
    const std::int64_t keys = blocking.block_rows / kernel.strip_rows * blocking.panel_keys;
    const std::int64_t scores = keys * kernel.strip_rows * 4;
    scratch = take(kernel.scratch_bytes(problem.dims, blocking));
    tile_class = reinterpret_cast<std::uint8_t*>(take(keys / kernel.tile_keys));
    lane_bits = reinterpret_cast<std::uint32_t*>(take(keys * 4));
    keep_bits = reinterpret_cast<std::uint32_t*>(take(problem.rule.dropout ? keys * 4 : 0));
    bias = reinterpret_cast<float*>(take(problem.rule.bias ? scores : 0));
    // scatter_add reads whole groups of 4 keys.
    ds = reinterpret_cast<float*>(take(with_dbias ? scores + 3 * kernel.strip_rows * 4 : 0));
  }
  ThreadMemory(const BackwardPass& pass, std::byte* memory)
      : ThreadMemory(pass.kernel_, pass.problem_, pass.options_.blocking,
                     static_cast<bool>(pass.options_.dbias_sum), memory) {}
};

BackwardPass::BackwardPass(const BackwardKernel& kernel, const TermKernel& terms,
                           const Problem& problem, Executor& executor, const Options& options,
                           std::function<void()> tick)
    : kernel_(kernel),
      terms_(terms),
      problem_(problem),
      sizes_(kernel, problem),
      executor_(executor),
      options_(options),
      tick_(std::move(tick)),
      block_strips_(options.blocking.block_rows / kernel.strip_rows),
      sets_(head_sets()) {
  const std::int64_t bytes =
      thread_bytes(kernel, problem, options.blocking, static_cast<bool>(options.dbias_sum));
  for (int t = 0; t < executor.threads(); ++t) thread_memory_.emplace_back(bytes);
}

std::int64_t BackwardPass::thread_bytes(const BackwardKernel& kernel, const Problem& problem,
                                        const BackwardBlocking& blocking, bool with_dbias) {
  return ThreadMemory(kernel, problem, blocking, with_dbias, nullptr).bytes;
}

std::vector<std::vector<Head>> BackwardPass::head_sets() const {
  const MutableTensorView& sum = options_.dbias_sum;
  const bool shared_batch = sum && sum.strides[0] == 0, shared_heads = sum && sum.strides[1] == 0;
  const std::int64_t batches = shared_batch ? 1 : problem_.batch,
                     heads = shared_heads ? 1 : problem_.num_kv_heads;
  std::vector<std::vector<Head>> sets(static_cast<std::size_t>(batches * heads));
  for (std::int64_t b = 0; b < problem_.batch; ++b) {
    for (std::int64_t h = 0; h < problem_.num_kv_heads; ++h) {
      const std::int64_t set = (shared_batch ? 0 : b) * heads + (shared_heads ? 0 : h);
      sets[static_cast<std::size_t>(set)].push_back({b, h});
    }
  }
  return sets;
}

std::int64_t BackwardPass::run(const QueryBlock& queries, const KeyBlock& keys, float* dq,
                               float* dkv) {
  pairs_ = 0, failed_ = false;
  if (queries.strips() == 0 || keys.num_keys() == 0 || problem_.kv_heads() == 0) return 0;
  const std::int64_t blocks = ceil_div(queries.strips(), block_strips_);
  const Work work{queries,
                  keys,
                  dq,
                  dkv,
                  ceil_div(keys.num_keys(), options_.blocking.panel_keys),
                  blocks,
                  lead_of(blocks, executor_.threads())};
  run_keys(work, options_.fused);
  if (!options_.fused) run_queries(work);
  return pairs_;
}

// A unit is a panel of keys with all queries of a set of heads. With want_dq, panels add to the
// dq of a block in their order: a wavefront, in which a thread trails the one on the panel before
// by a few blocks. Units are taken in order, so the lowest one never waits.
void BackwardPass::run_keys(const Work& work, bool want_dq) {
  const auto sets = static_cast<std::int64_t>(sets_.size());
  std::vector<std::atomic<std::int64_t>> progress(static_cast<std::size_t>(sets * work.panels));
  std::atomic<std::int64_t> next{0};
  executor_.run([&](int thread) {
    try {
      for (std::int64_t unit = next++; unit < sets * work.panels; unit = next++) {
        const auto [set, panel] = key_unit_at(unit, sets, work.panels, executor_.threads());
        key_unit(work, static_cast<std::size_t>(set), panel, want_dq,
                 thread_memory_[static_cast<std::size_t>(thread)].data(),
                 progress.data() + set * work.panels);
      }
    } catch (...) {  // nobody may wait for this thread any more
      failed_ = true;
      throw;
    }
  });
}

// progress[p]: panel p adds to no dq below this place any more. Places count heads, then blocks.
void BackwardPass::key_unit(const Work& work, std::size_t set, std::int64_t panel, bool want_dq,
                            std::byte* memory_begin, std::atomic<std::int64_t>* progress) {
  const ThreadMemory memory(*this, memory_begin);
  const KeyRange range = work.panel(panel, options_.blocking.panel_keys);
  Prepared prepared;
  std::int64_t place = 0, lowest = 0;
  for (const Head& head : sets_[set]) {
    const std::vector<NeededBlock> blocks = needed_blocks(work, head, range);
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      progress[panel].store(place + blocks[i].index, std::memory_order_release);
      pairs_ += prepare(work, head, blocks[i], range, memory, prepared);
      if (prepared.strips.empty()) continue;
      if (want_dq) wait_turn(progress, panel, place + blocks[i].index + work.lead, lowest);
      if (failed_) return;
      call(work, head, range, prepared.strips, i + 1 < blocks.size() ? &blocks[i + 1] : &blocks[0],
           want_dq, true, memory);
      if (options_.dbias_sum) add_dbias(work, head, range, prepared);
      tick_();
    }
    place += work.blocks;
    progress[panel].store(place, std::memory_order_release);
  }
  progress[panel].store(kDone, std::memory_order_release);
}

// `lowest` is a panel below which all are done.
void BackwardPass::wait_turn(const std::atomic<std::int64_t>* progress, std::int64_t panel,
                             std::int64_t at, std::int64_t& lowest) const {
  while (lowest < panel && progress[lowest].load(std::memory_order_acquire) == kDone) ++lowest;
  for (std::int64_t p = lowest; p < panel; ++p) {
    for (int tries = 0; progress[p].load(std::memory_order_acquire) <= at; ++tries) {
      if (failed_) return;
      if (tries % 64 == 63) std::this_thread::yield();
    }
  }
}

// The second of two passes: dq alone. A unit is a block of queries of one head, panels in order.
void BackwardPass::run_queries(const Work& work) {
  const std::int64_t heads = problem_.kv_heads();
  std::atomic<std::int64_t> next{0};
  executor_.run([&](int thread) {
    const ThreadMemory memory(*this, thread_memory_[static_cast<std::size_t>(thread)].data());
    Prepared prepared;
    for (std::int64_t unit = next++; unit < heads * work.blocks; unit = next++) {
      const std::int64_t index = unit % work.blocks;
      const Head head = problem_.head_at(unit / work.blocks);
      for (std::int64_t panel = 0; panel < work.panels; ++panel) {
        const KeyRange range = work.panel(panel, options_.blocking.panel_keys);
        std::vector<NeededBlock> found;
        find_blocks(work, head, range, index, index + 1, found);
        if (found.empty()) continue;
        prepare(work, head, found[0], range, memory, prepared);
        if (prepared.strips.empty()) continue;
        call(work, head, range, prepared.strips, nullptr, true, false, memory);
        tick_();
      }
    }
  });
}

std::vector<BackwardPass::NeededBlock> BackwardPass::needed_blocks(const Work& work,
                                                                   const Head& head,
                                                                   const KeyRange& range) const {
  std::vector<NeededBlock> found;
  find_blocks(work, head, range, 0, work.blocks, found);
  return found;
}

// By halving, as tiles are found.
void BackwardPass::find_blocks(const Work& work, const Head& head, const KeyRange& range,
                               std::int64_t first, std::int64_t end,
                               std::vector<NeededBlock>& found) const {
  const QuerySide& side = work.queries.side;
  const std::int64_t strips = side.strips_per_head();
  const std::int64_t strip_end = std::min(end * block_strips_, strips);
  TileBox box =
      side.box(head, first * block_strips_ * side.strip_rows, side.strip_end(strip_end - 1));
  const TileClass shade = classify(problem_, box, work.keys, range);
  if (shade == TileClass::kEmpty) return;
  if (shade == TileClass::kFull || end - first == 1) {
    for (std::int64_t b = first; b < end; ++b) {
      found.push_back({b, b * block_strips_, std::min((b + 1) * block_strips_, strips), shade});
    }
    return;
  }
  const std::int64_t middle = first + (end - first) / 2;
  find_blocks(work, head, range, first, middle, found);
  find_blocks(work, head, range, middle, end, found);
}

// The strips of a block that see something, with their terms. Returns the visible pairs.
std::int64_t BackwardPass::prepare(const Work& work, const Head& head, const NeededBlock& block,
                                   const KeyRange& range, const ThreadMemory& memory,
                                   Prepared& prepared) const {
  const QuerySide& side = work.queries.side;
  const std::int64_t head_index = problem_.index_of(head), width = kernel_.strip_rows;
  std::int64_t pairs = 0;
  prepared.strips.clear(), prepared.numbers.clear();
  for (std::int64_t s = block.first; s < block.end; ++s) {
    const std::int64_t first = (s - block.first) * options_.blocking.panel_keys;
    const std::int64_t number = head_index * work.queries.strips() + s;
    std::uint8_t* tile_class = memory.tile_class + first / kernel_.tile_keys;
    BackwardStrip strip{};
    strip.packed = work.queries.packed.bytes.data() + number * work.queries.strip_bytes;
    strip.dq = work.dq + number * sizes_.strip_floats();
    strip.tile_class = tile_class, strip.lane_bits = memory.lane_bits + first;
    const std::int64_t seen = classify_tiles(side, head, s, work.keys, range, block.shade,
                                             tile_class, memory.lane_bits + first);
    if (seen == 0) continue;
    pairs += seen;
    if (problem_.rule.bias || problem_.rule.dropout) {
      const Lanes lanes = side.lanes(head, s);
      const TileTerms terms{terms_, problem_, head, lanes, work.keys, range, tile_class};
      if (problem_.rule.bias) gather_bias(terms, memory.bias + first * width);
      if (problem_.rule.dropout) gather_keep(terms, memory.keep_bits + first);
    }
    if (problem_.rule.bias) strip.bias = memory.bias + first * width;
    if (problem_.rule.dropout) strip.keep_bits = memory.keep_bits + first;
    if (options_.dbias_sum) strip.ds = memory.ds + first * width;
    prepared.strips.push_back(strip), prepared.numbers.push_back(s);
  }
  return pairs;
}

void BackwardPass::call(const Work& work, const Head& head, const KeyRange& range,
                        const std::vector<BackwardStrip>& strips, const NeededBlock* next,
                        bool want_dq, bool want_dkv, const ThreadMemory& memory) const {
  const std::int64_t h = problem_.index_of(head), keys = sizes_.padded_keys(work.keys.num_keys());
  float* dk = work.dkv + h * keys * (sizes_.k_row + sizes_.v_row);
  BackwardCall call{};
  call.packed = work.keys.packed.bytes.data() + h * work.keys.head_bytes;
  call.num_keys = work.keys.num_keys(), call.key_begin = range.begin, call.key_count = range.count;
  call.strips = strips.data(), call.strip_count = static_cast<std::int64_t>(strips.size());
  call.dk = dk + range.begin * sizes_.k_row;
  call.dv = dk + keys * sizes_.k_row + range.begin * sizes_.v_row;
  call.want_dq = want_dq, call.want_dkv = want_dkv;
  if (next != nullptr) {
    const std::int64_t number = h * work.queries.strips() + next->first,
                       count = next->end - next->first;
    call.next_strips = reinterpret_cast<const char*>(work.queries.packed.bytes.data()) +
                       number * work.queries.strip_bytes;
    call.next_strip_bytes = count * work.queries.strip_bytes;
    call.next_dq = reinterpret_cast<char*>(work.dq + number * sizes_.strip_floats());
    call.next_dq_bytes = want_dq ? count * sizes_.strip_floats() * 4 : 0;
  }
  call.rule = problem_.rule, call.dims = problem_.dims, call.scratch = memory.scratch;
  kernel_.block(call);
}

void BackwardPass::add_dbias(const Work& work, const Head& head, const KeyRange& range,
                             const Prepared& prepared) const {
  for (std::size_t i = 0; i < prepared.strips.size(); ++i) {
    const BackwardStrip& strip = prepared.strips[i];
    const Lanes lanes = work.queries.side.lanes(head, prepared.numbers[i]);
    scatter_dbias({terms_, problem_, head, lanes, work.keys, range, strip.tile_class}, strip.ds,
                  options_.dbias_sum);
  }
}

}  // namespace annulus
