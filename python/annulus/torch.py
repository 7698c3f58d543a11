"""Annulus for PyTorch: autograd through every operation, operators for ``torch.compile``, and drop-ins.

Nothing needs to be called from here for plain use: ``annulus.attention`` and the others take tensors and take part in
autograd. Here are ``scaled_dot_product_attention`` and ``context_parallel_attention``, in PyTorch's layouts, and the
operators ``torch.ops.annulus.attention`` and ``attention_backward`` that compiled programs contain.
"""

import torch

from . import _core, _frameworks, _operations, _torch_ops
from ._errors import InvalidArgument, Unsupported
from ._workers import ring_of

__all__ = ["context_parallel_attention", "scaled_dot_product_attention"]

_Torch = _frameworks.Torch


class _Call:
    """What a forward leaves to its backward, besides tensors."""

    __slots__ = ("comm", "operation", "options", "workers")

    def __init__(self, operation, options, workers, comm):
        self.operation, self.options, self.workers, self.comm = operation, options, workers, comm


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(query, key, value, aux, bias, call):
        return _operations.forward(
            call.operation, _Torch, call.options, query, key, value, call.workers, call.comm, True, None
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.call = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse):
        if dout is None and dlse is None:
            return (None,) * 6
        query, key, value, aux, bias, out, lse = ctx.saved_tensors
        call, wanted = ctx.call, ctx.needs_input_grad
        if dout is None:
            dout = torch.zeros((), dtype=out.dtype).expand(out.shape)
        gradients = _operations.backward(
            call.operation, _Torch, call.options, dout, query, key, value, out, lse, dlse, aux if wanted[3] else None,
            bias if wanted[4] else None, call.workers, call.comm,
        )  # fmt: skip
        return (*gradients, None)


def _call(operation, query, key, value, kwargs, axis_name, workers, comm, return_lse, out):
    if torch.compiler.is_compiling():
        if out is not None:
            raise InvalidArgument(f"{operation}: out= cannot be compiled", "leave it out under torch.compile")
        result = _torch_ops.compiled(operation, query, key, value, kwargs, axis_name, workers, comm)
        return result if return_lse else result[0]
    aux, bias = kwargs.get("softmax_aux"), kwargs.get("bias")
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (query, key, value, aux, bias)
    )
    options, _ = _operations.make_options(operation, _Torch, kwargs)
    ring = ring_of(operation, comm, axis_name, workers)
    workers = _operations.count_of_workers(operation, workers)
    if not differentiable:
        result = _operations.forward(
            operation, _Torch, options, query, key, value, workers, ring, return_lse, out
        )
    elif out is not None:
        raise InvalidArgument(f"{operation}: out= does not take part in autograd", "leave it out, or use torch.no_grad()")
    else:
        result = _Attention.apply(query, key, value, aux, bias, _Call(operation, options, workers, ring))
    return result if return_lse else result[0]


class _Once(torch.autograd.Function):
    """Results that know that they have no derivatives."""

    @staticmethod
    def forward(ctx, compute, *inputs):
        results = compute()
        ctx.count = 1 + len(inputs)
        return tuple(results)

    @staticmethod
    def backward(ctx, *_):
        raise Unsupported("attention_backward: second derivatives are not computed", "detach its arguments or results")


def _backward(operation, kind, options, dout, query, key, value, out, lse, dlse, aux, bias, workers, comm):
    def compute():
        return _operations.backward(
            operation, kind, options, dout, query, key, value, out, lse, dlse, aux, bias, workers, comm
        )

    given = [t for t in (dout, query, key, value, out, lse, dlse, aux, bias) if t is not None]
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in given):
        return compute()
    return _operations.Gradients(*_Once.apply(compute, *given))


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(out_a, lse_a, out_b, lse_b):
        return _operations.merge_arrays(_Torch, out_a, lse_a, out_b, lse_b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse):
        # out = sum of w out_x and lse = log sum e^lse_x with w = e^(lse_x - lse), so that
        # d w / d lse_x = w (1 - w) and, for the other side, -w_a w_b.
        out_a, lse_a, out_b, lse_b, out, lse = ctx.saved_tensors
        dout = dout.float()
        gradients = []
        for out_x, lse_x in ((out_a, lse_a), (out_b, lse_b)):
            weight = torch.where(torch.isneginf(lse_x), 0.0, torch.exp(lse_x - lse))
            rows = weight.transpose(1, 2).unsqueeze(-1)
            # A side that saw nothing weighs nothing, whatever its out holds.
            moved = torch.where(rows == 0, 0.0, dout * (out_x.float() - out.float())).sum(-1).transpose(1, 2)
            gradients += [(rows * dout).to(out_x.dtype), weight * (moved + dlse)]
        return tuple(gradients)


def _merge(out_a, lse_a, out_b, lse_b):
    return _Merge.apply(out_a, lse_a, out_b, lse_b)


def _broadcast(operation, query, key, value, enable_gqa):
    """PyTorch's [..., heads, seq, dim] as three tensors of four axes with equal batches; the batch's axes, and the shape of
    the result."""
    tensors = (query, key, value)
    for name, tensor in zip(("query", "key", "value"), tensors):
        if tensor.dim() < 2:
            raise InvalidArgument(f"{operation}: {name} has shape {list(tensor.shape)}, expected [..., seq, dim]")
    axes = max(query.dim(), key.dim(), value.dim())
    if axes < 4 or any(t.dim() < axes for t in tensors):
        tensors = tuple(t[(None,) * (max(axes, 4) - t.dim())] for t in tensors)
    heads = [t.shape[-3] for t in tensors]
    if heads[1] != heads[2] or (not enable_gqa and heads[0] != heads[1] and heads[1] != 1):
        raise InvalidArgument(
            f"{operation}: query, key and value have {heads[0]}, {heads[1]} and {heads[2]} heads",
            "pass enable_gqa=True where several query heads share a key head",
        )
    batch = tensors[0].shape[:-3]
    if any(t.shape[:-3] != batch for t in tensors):
        batch = torch.broadcast_shapes(*(t.shape[:-3] for t in tensors))
        tensors = tuple(t.expand(*batch, *t.shape[-3:]) for t in tensors)
    shape = (*batch, heads[0], query.shape[-2], value.shape[-1])[-axes:]
    if len(batch) != 1:
        tensors = tuple(t.reshape(-1, *t.shape[-3:]) for t in tensors)
    return tensors, batch, shape


def _attn_mask(operation, mask, batch, heads, q_len, kv_len):
    """(attention_mask, bias): bool masks hide, others are added."""
    shape = (*batch, heads, q_len, kv_len)
    try:
        mask = torch.broadcast_to(mask, shape)
    except RuntimeError:
        raise InvalidArgument(
            f"{operation}: attn_mask has shape {list(mask.shape)}, which does not broadcast to {list(shape)}"
        ) from None
    if len(batch) != 1:
        mask = mask.reshape(-1, heads, q_len, kv_len)
    return (mask, None) if mask.dtype == torch.bool else (None, mask)


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, *, workers=None
):
    """Takes the place of ``torch.nn.functional.scaled_dot_product_attention``: its layouts [..., heads, seq, dim], its top-left
    causal mask, its additive masks, gradients for the mask too. ``workers``: threads of a ring in this process.

    Differences: dropout drops by position from a seed that is drawn from PyTorch's generator; float64 is refused; rows that
    see nothing are 0. Returns [..., heads, seq, v_dim].
    """
    operation = "scaled_dot_product_attention"
    if attn_mask is not None and is_causal:
        raise InvalidArgument(f"{operation}: both attn_mask and is_causal are given", "put the causal rule into the mask")
    (q, k, v), batch, shape = _broadcast(operation, query, key, value, enable_gqa)
    kwargs = {"causal": is_causal, "causal_alignment": "top_left", "softmax_scale": scale}
    if attn_mask is not None:
        mask, bias = _attn_mask(operation, attn_mask, batch, q.shape[1], q.shape[2], k.shape[2])
        kwargs.update(attention_mask=mask, bias=bias)
    if dropout_p:
        kwargs.update(dropout_prob=dropout_p, dropout_seed=_torch_ops.drawn_seed())
    out = _call(operation, *(t.transpose(1, 2) for t in (q, k, v)), kwargs, None, workers, None, False, None)
    out = out.transpose(1, 2)
    return out if len(shape) == 4 else out.reshape(shape)


def context_parallel_attention(
    query, key, value, *, comm, axis_name=None, partition="contiguous", is_causal=False, scale=None, **options
):
    """Attention of a rank's shards [batch, heads, seq, dim] over the whole sequence, in the SPMD view: every rank of ``comm``
    (or of the Mesh's axis ``axis_name``) calls it with the rows that ``partition`` gives it. ``options`` are those of
    ``annulus.ring_attention``. Returns the shard's rows [batch, heads, seq, v_dim]; gradients flow to every rank's shard."""
    operation = "context_parallel_attention"
    _operations.names_of(operation, options)
    kwargs = {
        "causal": is_causal, "causal_alignment": "top_left", "softmax_scale": scale, "partition": partition, **options,
    }  # fmt: skip
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return _call(operation, q, k, v, kwargs, axis_name, None, comm, False, None).transpose(1, 2)
