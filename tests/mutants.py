"""Deliberate bugs, one at a time, that the suite must catch: `scripts/mutants` puts each into a copy of the tree.

Most are bugs that ring attention programs have shipped; `like` says which kind. `find` occurs exactly once in `file`.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    like: str
    file: str
    find: str
    replace: str


MUTANTS = [
    # ---------------------------------------------------------------- positions, masks, segments
    Mutant("window_not_shifted", "window applied per block without shift", "src/ops/problem.cc",
           "Mask::sliding_window(left, right, shift)", "Mask::sliding_window(left, right, 0)"),
    Mutant("local_positions", "local index used as position", "src/ops/query_side.cc",
           "lanes.position[n] = rows.position[token]", "lanes.position[n] = rows.row[token]"),
    Mutant("causal_alignment_swapped", "query length used as key length", "src/ops/problem.cc",
           "o.causal_alignment == CausalAlignment::kBottomRight ? p.kv_len - p.q_len : 0",
           "o.causal_alignment == CausalAlignment::kBottomRight ? p.q_len - p.kv_len : 0"),
    Mutant("edge_tile_full", "diagonal tile taken for full", "src/ops/query_side.cc",
           ": seen == lane_count_ * step_ ? kTileFull",
           ": seen >= lane_count_ * step_ - 1 ? kTileFull"),
    Mutant("tail_key_dropped", "tail padding drops real keys", "src/ops/query_side.cc",
           "lane_bits_[k] = k < range_.count ? all : 0;", "lane_bits_[k] = k + 1 < range_.count ? all : 0;"),
    Mutant("tail_key_added", "tail of the block read as keys", "src/ops/query_side.cc",
           "lane_bits_[k] = k < range_.count ? all : 0;", "lane_bits_[k] = all;"),
    Mutant("segments_stay_at_home", "segment ids do not travel", "src/ops/ring_backward.cc",
           "std::vector<std::int32_t> segments = deal_.kv_segments(owner, rows);",
           "std::vector<std::int32_t> segments = deal_.kv_segments(walk_.rank(), deal_.kv_rows(walk_.rank()));\n"
           "  segments.resize(segments.empty() ? 0 : static_cast<std::size_t>(problem_.batch * rows.size()));"),
    Mutant("segments_of_batch_0", "masks of batch row 0 used for all", "src/ops/key_block.cc",
           "return std::span(segments).subspan(static_cast<std::size_t>(batch) * count, count);",
           "return std::span(segments).subspan(static_cast<std::size_t>(batch) * 0 * count, count);"),
    Mutant("dense_mask_ignored", "mask argument taken and dropped", "src/core/visibility.cc",
           "  if (rules_.attention_mask) keep_dense(", "  if (rules_.attention_mask && batch > 0) keep_dense("),
    Mutant("forward_ignores_partial", "causal ignored on one back end", "src/kernels/strip_pass-inl.h",
           "if (HWY_UNLIKELY(work_.tile_class[t] == kTilePartial)) Hide(", "if (call_.num_keys < 0) Hide("),
    Mutant("backward_ignores_partial", "causal ignored in the backward", "src/kernels/backward-inl.h",
           "if (HWY_UNLIKELY(work.tile_class[t] == kTilePartial)) Hide(", "if (call_.num_keys < 0) Hide("),
    Mutant("token_dropped", "uneven lengths lose tokens", "src/core/partition.cc",
           "base + (index < extra ? 1 : 0), 1};", "base, 1};"),

    # ---------------------------------------------------------------- heads and batch
    Mutant("gqa_first_head", "grouped heads replicated wrongly", "src/ops/query_side.cc",
           "head.kv_head * group + row % group);", "head.kv_head * group + row % group * 0);"),
    Mutant("bias_of_batch_0", "bias of batch row 0 used for all", "src/ops/query_side.cc",
           "rows[n] = view.at(terms.head.batch, terms.lanes.head[n], terms.lanes.row[n], run.position);",
           "rows[n] = view.at(0, terms.lanes.head[n], terms.lanes.row[n], run.position);"),
    Mutant("bias_after_run_stride", "bias columns of a strided shard", "src/ops/query_side.cc",
           "terms.kernel.gather(rows, terms.lanes.count, element * run.stride,",
           "terms.kernel.gather(rows, terms.lanes.count, element,"),

    # ---------------------------------------------------------------- arithmetic of the forward
    Mutant("far_scores_shifted_twice", "a reference taken of scores that have one already", "src/kernels/amx_softmax-inl.h",
           "const float* raw = z.shifted != 0 ? s.raw : s.shifted;", "const float* raw = s.shifted;"),
    Mutant("far_scores_forget", "what came before a larger maximum is lost", "src/kernels/strip_pass-inl.h",
           "auto moves = hn::And(fresh, hn::Gt(At(top, c), guard));", "auto moves = hn::Gt(At(top, c), guard);"),
    Mutant("far_scores_unknown_to_backward", "scores of whole rows at the lowest number", "src/kernels/amx_backward-inl.h",
           "if (__builtin_expect(at.rows.head->shifted != 0, 0)) subtract_base(at);", ""),
    Mutant("lse_base_2", "lse in base 2 taken for base e", "src/kernels/forward-inl.h",
           "kLn2 * static_cast<double>(z.m[n]) + log(static_cast<double>(z.l[n]));",
           "static_cast<double>(z.m[n]) + log2(static_cast<double>(z.l[n]));"),
    Mutant("sink_twice", "sink counted once per step", "src/kernels/forward-inl.h",
           "const double total = LogAddExp(seen, static_cast<double>(sinks[n]));",
           "const double total = LogAddExp(LogAddExp(seen, static_cast<double>(sinks[n])), static_cast<double>(sinks[n]));"),
    Mutant("raise_forgets_factor", "state not rescaled when the maximum grows", "src/kernels/strip_pass-inl.h",
           "Put(z_.f, c, hn::Mul(factor, At(z_.f, c)));", "Put(z_.f, c, At(z_.f, c));"),
    Mutant("bf16_truncated", "bf16 truncated instead of rounded", "src/base/half.h",
           "(nan ? u | 0x400000U : rounded) >> 16", "(nan ? u | 0x400000U : u) >> 16"),
    Mutant("exp_drops_nan", "exponential turns NaN into 0", "src/kernels/vector-inl.h",
           "x = hn::IfThenElse(hn::Lt(x, low), low, x);", "x = hn::IfThenElse(hn::Ge(x, low), x, low);"),
    Mutant("nan_behind_mask", "0 times NaN leaks through a mask", "src/kernels/strip_pass-inl.h",
           "return poisoned_[tile] != 0 &&", "return poisoned_[tile] > 1 &&"),
    Mutant("empty_merge_nan", "merge of empty parts is NaN", "src/ops/merge.cc",
           "a == kNothing ? 0 : weight_a * load_element(", "weight_a * load_element("),
    Mutant("negative_scale_plain", "negative scale breaks the running maximum", "src/kernels/tile-inl.h",
           "return rule.cap == 0 && !rule.bias && rule.scale > 0;", "return rule.cap == 0 && !rule.bias;"),

    # ---------------------------------------------------------------- arithmetic of the backward
    Mutant("cap_derivative_missing", "soft cap derivative missing", "src/kernels/backward-inl.h",
           "Put(p, c, hn::Mul(At(p, c), At(slope_ + r * kWidth, c)));", "Put(p, c, At(p, c));"),
    Mutant("scale_twice", "scale applied twice", "src/ops/ring_backward.cc",
           "kernel_.unload_dq(dq + i * sizes_.strip_floats(), problem_.rule.scale,",
           "kernel_.unload_dq(dq + i * sizes_.strip_floats(), problem_.rule.scale * problem_.rule.scale,"),
    Mutant("delta_missing", "delta of the local block instead of the row's", "src/kernels/backward-inl.h",
           "to.lse[n] = lse, to.delta[n] = real ? rows.delta[n] : 0;", "to.lse[n] = lse, to.delta[n] = 0;"),
    Mutant("empty_row_lse", "row without keys gives NaN gradients", "src/kernels/backward-inl.h",
           "const float given = real && rows.lse[n] != -INFINITY ? rows.lse[n] : INFINITY;",
           "const float given = real ? rows.lse[n] : INFINITY;"),
    Mutant("dq_in_bf16", "dq cast to bf16 whatever the type", "src/ops/ring_backward.cc",
           "      for (int n = 0; n < lanes.count; ++n) {\n        store_row(to.dtype,",
           "      for (float& x : rows) x = bf16_to_float(float_to_bf16(x));\n"
           "      for (int n = 0; n < lanes.count; ++n) {\n        store_row(to.dtype,"),
    Mutant("dq_of_last_panel", "only the last block's dq is kept", "src/kernels/backward-inl.h",
           "Put(to, c, hn::Add(At(to, c), acc[r][c]));", "Put(to, c, acc[r][c]);"),
    Mutant("dk_of_first_strip", "gradients of one query block only", "src/kernels/backward-inl.h",
           "if (call_.strips[i].tile_class[t] == kTileEmpty) continue;",
           "if (call_.strips[i].tile_class[t] == kTileEmpty || i > 0) continue;"),
    Mutant("backward_nan_behind_mask", "0 times NaN leaks into gradients", "src/kernels/backward-inl.h",
           "return poison && !all_seen;", "return poison && all_seen;"),
    Mutant("hidden_dp", "masked pairs keep their dp", "src/kernels/backward-inl.h",
           "return hn::IfThenZeroElse(hn::Eq(p, hn::Zero(kF)), ds);", "return ds;"),
    Mutant("nan_gradient_zero", "visible NaN becomes a zero gradient", "src/kernels/backward-inl.h",
           "return hn::IfThenZeroElse(hn::Eq(p, hn::Zero(kF)), ds);",
           "return hn::IfThenElseZero(hn::Gt(p, hn::Zero(kF)), ds);"),
    Mutant("second_pass_missing", "two-pass form forgets dq", "src/ops/backward_pass.cc",
           "if (!options_.fused) run_queries(work);", "if (!options_.fused && work.panels > 1) run_queries(work);"),
    Mutant("dbias_overwritten", "gradient of a broadcast bias not summed", "src/kernels/terms-inl.h",
           "to[i * stride] += piece[n * kPiece + i];", "to[i * stride] = piece[n * kPiece + i];"),
    Mutant("dbias_after_cap", "dbias scaled by the cap's derivative", "src/kernels/backward-inl.h",
           "if (work.ds != nullptr) Put(work.ds + (t * kKeys + r) * kWidth, c, Gradient(r, c, delta));",
           "if (work.ds != nullptr) Put(work.ds + (t * kKeys + r) * kWidth, c, hn::Mul(call_.rule.cap > 0 ? "
           "At(slope_ + r * kWidth, c) : hn::Set(kF, 1), Gradient(r, c, delta)));"),
    Mutant("sink_gradient_of_one_rank", "sink gradient not summed over ranks", "src/ops/ring_backward.cc",
           "for (const Parcel& part : parts) {\n      double share = 0;",
           "for (const Parcel& part : {parts.front()}) {\n      double share = 0;"),
    Mutant("sink_gradient_zero", "sink gradient missing", "src/ops/ring_backward.cc",
           "if (delta != 0) sums", "if (delta > 1e30) sums"),

    # ---------------------------------------------------------------- dropout
    Mutant("dropout_not_in_backward", "dropout pattern lost for the backward", "src/kernels/backward-inl.h",
           "if (call_.rule.dropout && p_rows != nullptr)\n", "if (call_.rule.keep_scale < 0)\n"),
    Mutant("dropout_dp_unscaled", "dropout scale missing in dp", "src/kernels/backward-inl.h",
           "hn::Mul(keep_scale, At(dp, c))));", "At(dp, c)));"),
    Mutant("dropout_renormalises", "dropout before the softmax", "src/kernels/strip_pass-inl.h",
           "    if constexpr (A::kRoundsP) AddWeights(n / A::kPer);\n"
           "    if (HWY_UNLIKELY(call_.rule.dropout)) Drop(key, n);",
           "    if (HWY_UNLIKELY(call_.rule.dropout)) Drop(key, n);\n"
           "    if constexpr (A::kRoundsP) AddWeights(n / A::kPer);"),
    Mutant("dropout_by_row", "dropout drawn by local index", "src/ops/query_side.cc",
           "terms.lanes.position};", "terms.lanes.row};"),
    Mutant("dropout_rounds", "generator one round short", "src/kernels/terms-inl.h",
           "for (int i = 3; i < kRounds - 1; ++i) {", "for (int i = 3; i < kRounds - 2; ++i) {"),

    # ---------------------------------------------------------------- the ring
    Mutant("stale_keys", "backward uses the keys of step 0 in every step", "src/ops/ring_backward.cc",
           "keys.packed = std::move(arrival.block);",
           "keys.packed = keys.num_keys() == own_keys_.num_keys() ? own_keys_.packed : std::move(arrival.block);"),
    Mutant("stale_forward_keys", "forward uses the keys of step 0 in every step", "src/ops/ring.cc",
           "keys.packed = std::move(arrival.block);",
           "static thread_local Parcel held;\n"
           "  if (arrival.step == 0) held = arrival.block;\n"
           "  keys.packed = held.bytes.size() == arrival.block.bytes.size() ? held : arrival.block;"),
    Mutant("gradients_not_sent_home", "dk, dv not brought home", "src/ops/ring_backward.cc",
           "for (std::int64_t i = 0; i < count; ++i) to[i] += from[i];",
           "for (std::int64_t i = 0; i < count; ++i) to[i] += 0 * from[i];"),
    Mutant("gradients_forgotten_on_the_way", "dk, dv of the ranks before lost", "src/ops/ring_backward.cc",
           "if (bytes > 0) std::memcpy(copy->data(), sum.bytes.data(),",
           "if (bytes > 0) std::memset(copy->data(), 0, static_cast<std::size_t>(bytes));\n"
           "  if (bytes > 0 && place.index > 5) std::memcpy(copy->data(), sum.bytes.data(),"),
    Mutant("gradients_in_bf16_on_the_wire", "state in bf16 between hops", "src/ops/ring_backward.cc",
           "  return copy;",
           "  for (std::int64_t i = 0; i < bytes / 4; ++i)\n"
           "    copy->as<float>()[i] = bf16_to_float(float_to_bf16(copy->as<float>()[i]));\n  return copy;"),
    Mutant("last_hop_dropped", "last hop dropped", "src/core/ring_schedule.cc",
           "for (int hop = 0; hop <= reach; ++hop) {", "for (int hop = 0; hop <= reach - (reach > 1 ? 1 : 0); ++hop) {"),
    Mutant("diagonal_twice", "diagonal block computed twice", "src/ops/backward_pass.cc",
           "      found.push_back({b, b * block_strips_,",
           "      if (b == 0 && end - first == 1) found.push_back({b, 0, std::min(block_strips_, strips), shade});\n"
           "      found.push_back({b, b * block_strips_,"),
    Mutant("zigzag_halves_swapped", "zigzag halves swapped", "src/core/partition.cc",
           "cut(2 * parts - 1 - rank, 2 * parts, seq_len)", "cut(2 * parts - 1 - (rank ^ 1), 2 * parts, seq_len)"),
    Mutant("tag_of_last_step", "receives do not match sends", "src/ops/ring_walk.cc",
           "{call_, Channel::kBlocks, step + 1, visit.owner, bytes}", "{call_, Channel::kBlocks, step, visit.owner, bytes}"),

    # ---------------------------------------------------------------- indices
    Mutant("int32_rows", "32-bit index overflow", "src/kernels/vector-inl.h",
           "return static_cast<const char*>(source.base) + source.row[t] * source.row_stride_bytes;",
           "return static_cast<const char*>(source.base) + static_cast<std::int32_t>(source.row[t] * source.row_stride_bytes);"),
    Mutant("int32_offsets", "32-bit index overflow in views", "include/annulus/tensor.h",
           "return static_cast<const std::byte*>(data) +\n           (a * strides[0]",
           "return static_cast<const std::byte*>(data) +\n           static_cast<std::int32_t>(a * strides[0]"),
]
