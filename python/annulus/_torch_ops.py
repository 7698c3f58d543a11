"""The operators of ``torch.ops.annulus``: what a compiled graph contains. Their arguments are tensors and numbers; masks,
partitions and communicators travel as handles."""

from typing import Optional

import torch

from . import _frameworks, _operations
from ._errors import InvalidArgument
from ._handles import object_of
from ._params import BwdParams, FwdParams
from ._workers import ring_of


def _options(
    operation, softmax_aux, bias, q_segment_ids, kv_segment_ids, kv_lengths, attention_mask, seed, causal, top_left, window,
    chunk_size, padding_segment_id, softmax_scale, logits_soft_cap, dropout_prob, dropout_seed, fused_backward, fwd_blocks,
    bwd_blocks, mask, partition, custom_partition,
):  # fmt: skip
    kwargs = {
        "softmax_aux": softmax_aux, "bias": bias, "q_segment_ids": q_segment_ids, "kv_segment_ids": kv_segment_ids,
        "kv_lengths": kv_lengths, "attention_mask": attention_mask, "causal": causal,
        "causal_alignment": "top_left" if top_left else "bottom_right",
        "sliding_window": None if window is None else tuple(window), "chunk_size": chunk_size,
        "padding_segment_id": padding_segment_id, "softmax_scale": softmax_scale, "logits_soft_cap": logits_soft_cap,
        "dropout_prob": dropout_prob, "dropout_seed": dropout_seed if seed is None else int(seed.item()),
        "fused_backward": fused_backward, "fwd_params": fwd_blocks and FwdParams(*(size or None for size in fwd_blocks)),
        "bwd_params": bwd_blocks and BwdParams(*(size or None for size in bwd_blocks)), "mask_builder": object_of(mask),
        "partition": object_of(custom_partition) or partition,
    }  # fmt: skip
    return _operations.make_options(operation, _frameworks.Torch, kwargs)[0]


@torch.library.custom_op("annulus::attention", mutates_args=())
def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, softmax_aux: Optional[torch.Tensor] = None,
    bias: Optional[torch.Tensor] = None, q_segment_ids: Optional[torch.Tensor] = None,
    kv_segment_ids: Optional[torch.Tensor] = None, kv_lengths: Optional[torch.Tensor] = None,
    attention_mask: Optional[torch.Tensor] = None, seed: Optional[torch.Tensor] = None, causal: bool = False,
    top_left: bool = False, window: Optional[list[int]] = None, chunk_size: Optional[int] = None,
    padding_segment_id: Optional[int] = None, softmax_scale: Optional[float] = None,
    logits_soft_cap: Optional[float] = None, dropout_prob: float = 0.0, dropout_seed: int = 0,
    fused_backward: bool = True, fwd_blocks: Optional[list[int]] = None, bwd_blocks: Optional[list[int]] = None,
    mask: int = 0, partition: str = "contiguous", custom_partition: int = 0, workers: Optional[int] = None, comm: int = 0,
    axis_name: Optional[str] = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    options = _options(
        "attention", softmax_aux, bias, q_segment_ids, kv_segment_ids, kv_lengths, attention_mask, seed, causal, top_left,
        window, chunk_size, padding_segment_id, softmax_scale, logits_soft_cap, dropout_prob, dropout_seed, fused_backward,
        fwd_blocks, bwd_blocks, mask, partition, custom_partition,
    )  # fmt: skip
    ring = ring_of("attention", object_of(comm), axis_name, workers)
    return _operations.forward(
        "attention", _frameworks.Torch, options, query, key, value, workers or 1, ring, True, None
    )


@attention.register_fake
def _(query, key, value, *_args, **_kwargs):
    batch, q_len, heads, _ = query.shape
    return (
        query.new_empty((batch, q_len, heads, value.shape[3])),
        query.new_empty((batch, heads, q_len), dtype=torch.float32),
    )


@torch.library.custom_op("annulus::attention_backward", mutates_args=())
def attention_backward(
    dout: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    dlse: Optional[torch.Tensor], want_dsoftmax_aux: bool, want_dbias: bool, softmax_aux: Optional[torch.Tensor],
    bias: Optional[torch.Tensor], q_segment_ids: Optional[torch.Tensor], kv_segment_ids: Optional[torch.Tensor],
    kv_lengths: Optional[torch.Tensor], attention_mask: Optional[torch.Tensor], seed: Optional[torch.Tensor], causal: bool,
    top_left: bool, window: Optional[list[int]], chunk_size: Optional[int], padding_segment_id: Optional[int],
    softmax_scale: Optional[float], logits_soft_cap: Optional[float], dropout_prob: float, dropout_seed: int,
    fused_backward: bool, fwd_blocks: Optional[list[int]], bwd_blocks: Optional[list[int]], mask: int, partition: str,
    custom_partition: int, workers: Optional[int], comm: int, axis_name: Optional[str],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    options = _options(
        "attention_backward", softmax_aux, bias, q_segment_ids, kv_segment_ids, kv_lengths, attention_mask, seed, causal,
        top_left, window, chunk_size, padding_segment_id, softmax_scale, logits_soft_cap, dropout_prob, dropout_seed,
        fused_backward, fwd_blocks, bwd_blocks, mask, partition, custom_partition,
    )  # fmt: skip
    ring = ring_of("attention_backward", object_of(comm), axis_name, workers)
    gradients = _operations.backward(
        "attention_backward", _frameworks.Torch, options, dout, query, key, value, out, lse, dlse,
        softmax_aux if want_dsoftmax_aux else None, bias if want_dbias else None, workers or 1, ring,
    )  # fmt: skip
    return tuple(query.new_empty(0) if g is None else g for g in gradients)


@attention_backward.register_fake
def _(dout, query, key, value, out, lse, dlse, want_dsoftmax_aux, want_dbias, softmax_aux, bias, *_args):
    def like(primal, wanted=True):
        return primal.new_empty(primal.shape) if wanted else query.new_empty(0)

    return like(query), like(key), like(value), like(softmax_aux, want_dsoftmax_aux), like(bias, want_dbias)


def _setup_context(ctx, inputs, output):
    tensors, ctx.numbers = inputs[:10], inputs[10:]
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    query, key, value, aux, bias, *others, out, lse = ctx.saved_tensors
    nothing = [None] * (10 + len(ctx.numbers))
    if dout is None and dlse is None:
        return tuple(nothing)
    if dout is None:
        dout = torch.zeros_like(out)
    wanted = ctx.needs_input_grad
    gradients = torch.ops.annulus.attention_backward(
        dout, query, key, value, out, lse, dlse, wanted[3], wanted[4], aux, bias, *others, *ctx.numbers
    )
    nothing[:5] = (g if w else None for g, w in zip(gradients, wanted))
    return tuple(nothing)


attention.register_autograd(_backward, setup_context=_setup_context)


def drawn_seed():
    """A dropout seed from PyTorch's generator: an int, or in a compiled graph a tensor that is drawn when it runs."""
    seed = torch.randint(0, 2**63 - 1, ())
    return seed if torch.compiler.is_compiling() else int(seed)


def _window(window):
    if window is None:
        return None
    sides = (window, window) if isinstance(window, int) else window
    return [-1 if side is None else side for side in sides]


def _blocks(params):
    return None if params is None else [0 if size is None else size for size in (params.q_blocksize, params.kv_blocksize)]


def _handle(operation, name, value):
    if value is None:
        return 0
    if not hasattr(value, "_handle"):
        raise InvalidArgument(f"{operation}: {name} is a function, which a compiled graph cannot hold", "pass an annulus.Mask")
    return value._handle


def compiled(operation, query, key, value, kwargs, axis_name, workers, comm):
    """(out, lse) by the operator, for dynamo to trace."""
    partition = kwargs.get("partition") or "contiguous"
    custom = None if isinstance(partition, str) else partition
    seed = kwargs.get("dropout_seed") or 0
    drawn = isinstance(seed, torch.Tensor)
    return torch.ops.annulus.attention(
        query, key, value, kwargs.get("softmax_aux"), kwargs.get("bias"), kwargs.get("q_segment_ids"),
        kwargs.get("kv_segment_ids"), kwargs.get("kv_lengths"), kwargs.get("attention_mask"), seed if drawn else None,
        bool(kwargs.get("causal")), kwargs.get("causal_alignment") == "top_left", _window(kwargs.get("sliding_window")),
        kwargs.get("chunk_size"), kwargs.get("padding_segment_id"), kwargs.get("softmax_scale"),
        kwargs.get("logits_soft_cap"), kwargs.get("dropout_prob") or 0.0, 0 if drawn else seed,
        bool(kwargs.get("fused_backward", True)), _blocks(kwargs.get("fwd_params")), _blocks(kwargs.get("bwd_params")),
        _handle(operation, "mask_builder", kwargs.get("mask_builder")), partition if custom is None else "contiguous",
        _handle(operation, "partition", custom), workers, _handle(operation, "comm", comm), axis_name,
    )  # fmt: skip
