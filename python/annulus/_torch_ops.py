"""The operators of ``torch.ops.annulus``: what a compiled graph contains. Their arguments are tensors and numbers; masks,
partitions and communicators travel as handles."""

import inspect
from typing import Optional

import torch

from . import _frameworks, _operations
from ._errors import InvalidArgument, Unsupported
from ._handles import object_of
from ._params import BwdParams, FwdParams, block_sizes
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
        "dropout_prob": dropout_prob, "dropout_seed": dropout_seed % 2**64 if seed is None else int(seed.item()),
        "fused_backward": fused_backward,
        "fwd_params": fwd_blocks and FwdParams(*(size or None for size in fwd_blocks)),
        "bwd_params": bwd_blocks and BwdParams(*(size or None for size in bwd_blocks)),
        "mask_builder": object_of(mask),
        "partition": object_of(custom_partition) or partition,
    }  # fmt: skip
    return _operations.make_options(operation, _frameworks.Torch, kwargs)[0]


class _Held(bytearray):
    """Memory of a tensor, which keeps objects alive as long as any tensor needs it."""


def _holding(lse, objects):
    """lse, in memory that holds the objects: a compiled graph saves lse for its backward, where it needs them again,
    and knows only their numbers."""
    if not any(objects) or not lse.numel():
        return lse
    memory = _Held(lse.numel() * lse.element_size())
    memory.objects = objects
    return torch.frombuffer(memory, dtype=lse.dtype).view(lse.shape).copy_(lse)


# Exported programs know numbers too, and outlive what they were made from.
_exported = []


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
    held = tuple(object_of(number) for number in (mask, custom_partition, comm))
    ring = ring_of("attention", held[2], axis_name, workers)
    workers = _operations.count_of_workers("attention", workers)
    out, lse = _operations.forward(
        "attention", _frameworks.Torch, options, query, key, value, workers, ring, True, None
    )
    return out, _holding(lse, held)


_signature = inspect.signature(attention._init_fn)


@attention.register_fake
def _(query, key, value, *args, **kwargs):
    shape = _frameworks.rows_shape("attention", query, value)
    if torch.compiler.is_exporting():
        given = _signature.bind(query, key, value, *args, **kwargs).arguments
        numbers = [given.get(name) for name in ("mask", "custom_partition", "comm")]
        _exported.extend(object_of(number) for number in numbers if number)
    batch, q_len, heads, _ = shape
    return query.new_empty(shape), query.new_empty((batch, heads, q_len), dtype=torch.float32)


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
        softmax_aux if want_dsoftmax_aux else None, bias if want_dbias else None,
        _operations.count_of_workers("attention_backward", workers), ring,
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
    # The dispatcher drops trailing arguments that equal their defaults.
    wanted = (*ctx.needs_input_grad, False, False)[:5]
    gradients = torch.ops.annulus.attention_backward(
        dout, query, key, value, out, lse, dlse, wanted[3], wanted[4], aux, bias, *others, *ctx.numbers
    )
    nothing[:5] = (g if w else None for g, w in zip(gradients, wanted))
    return tuple(nothing)


attention.register_autograd(_backward, setup_context=_setup_context)


def no_second_derivatives():
    return Unsupported("attention_backward: second derivatives are not computed", "detach its arguments or results")


def _refuse(ctx, *_):
    raise no_second_derivatives()


attention_backward.register_autograd(_refuse)


@torch.library.custom_op("annulus::merge", mutates_args=())
def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _operations.merge_arrays(_frameworks.Torch, out_a, lse_a, out_b, lse_b)


@merge.register_fake
def _(out_a, lse_a, out_b, lse_b):
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


def merge_gradients(out_a, lse_a, out_b, lse_b, out, lse, dout, dlse):
    """Of the four arguments of merge."""
    # out = sum of w out_x and lse = log sum e^lse_x with w = e^(lse_x - lse), so that
    # d w / d lse_x = w (1 - w) and, for the other side, -w_a w_b.
    dout = dout.float()
    gradients = []
    for out_x, lse_x in ((out_a, lse_a), (out_b, lse_b)):
        nothing = torch.isneginf(lse_x)
        weight = torch.where(nothing, 0.0, torch.exp(torch.where(nothing, 0.0, lse_x - lse)))
        rows = weight.transpose(1, 2).unsqueeze(-1)
        # A side that saw nothing weighs nothing, whatever its out holds.
        moved = torch.where(rows == 0, 0.0, dout * (out_x.float() - out.float())).sum(-1).transpose(1, 2)
        gradients += [(rows * dout).to(out_x.dtype), weight * (moved + dlse)]
    return tuple(gradients)


def _merge_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def _merge_backward(ctx, dout, dlse):
    return merge_gradients(*ctx.saved_tensors, dout, dlse)


merge.register_autograd(_merge_backward, setup_context=_merge_setup)


def drawn_seed():
    """A dropout seed from PyTorch's generator: an int, or in a compiled graph a tensor that is drawn when it runs."""
    seed = torch.randint(0, 2**63 - 1, (), device="cpu")
    return seed if torch.compiler.is_compiling() else int(seed)


def _window(window):
    if window is None:
        return None
    sides = (window, window) if isinstance(window, int) else window
    return [-1 if side is None else side for side in sides]


def _blocks(operation, name, params):
    return None if params is None else list(block_sizes(operation, name, params))


def _handle(operation, name, value):
    if value is None:
        return 0
    if not hasattr(value, "_handle"):
        raise InvalidArgument(
            f"{operation}: {name} is a function, which a compiled graph cannot hold", "pass an annulus.Mask"
        )
    return value._handle


def _signed(operation, seed):
    """The operator's integers have a sign."""
    if not 0 <= seed < 2**64:
        raise InvalidArgument(f"{operation}: dropout_seed is {seed}, expected an integer of 64 bits without a sign")
    return seed - 2**64 if seed >= 2**63 else seed


def compiled(operation, query, key, value, kwargs, axis_name, workers, comm):
    """(out, lse) by the operator, for dynamo to trace."""
    partition = kwargs.get("partition") or "contiguous"
    custom = None if isinstance(partition, str) else partition
    seed = kwargs.get("dropout_seed")
    drawn = isinstance(seed, torch.Tensor)
    alignment = kwargs.get("causal_alignment")
    if alignment not in (None, "top_left", "bottom_right"):
        raise InvalidArgument(f"{operation}: causal_alignment is {alignment!r}, expected 'bottom_right' or 'top_left'")
    return torch.ops.annulus.attention(
        query, key, value, kwargs.get("softmax_aux"), kwargs.get("bias"), kwargs.get("q_segment_ids"),
        kwargs.get("kv_segment_ids"), kwargs.get("kv_lengths"), kwargs.get("attention_mask"), seed if drawn else None,
        bool(kwargs.get("causal")), alignment == "top_left", _window(kwargs.get("sliding_window")),
        kwargs.get("chunk_size"), kwargs.get("padding_segment_id"), kwargs.get("softmax_scale"),
        kwargs.get("logits_soft_cap"), kwargs.get("dropout_prob") or 0.0,
        0 if drawn else _signed(operation, seed or 0),
        bool(kwargs.get("fused_backward", True)), _blocks(operation, "fwd_params", kwargs.get("fwd_params")),
        _blocks(operation, "bwd_params", kwargs.get("bwd_params")),
        _handle(operation, "mask_builder", kwargs.get("mask_builder")), partition if custom is None else "contiguous",
        _handle(operation, "partition", custom), workers, _handle(operation, "comm", comm), axis_name,
    )  # fmt: skip
