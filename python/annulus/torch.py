"""Annulus for PyTorch: autograd through every operation, operators for ``torch.compile``, and drop-ins.

Nothing needs to be called from here for plain use: ``annulus.attention`` and the others take tensors and take part in
autograd. Here are ``scaled_dot_product_attention`` and ``context_parallel_attention``, in PyTorch's layouts, and the
operators ``torch.ops.annulus.attention`` and ``attention_backward`` that compiled programs contain.
"""

import torch

from . import _frameworks, _operations, _torch_ops
from ._errors import InvalidArgument
from ._workers import ring_of

__all__ = ["context_parallel_attention", "scaled_dot_product_attention"]

_Torch = _frameworks.Torch
# Known before the first call: compiled programs are compiled again when this changes.
_frameworks._known.update({torch.Tensor: _Torch, torch.nn.Parameter: _Torch})


_TENSORS = _frameworks.OPTION_ARRAYS


def _ordinary(tensors):
    """Are all of them memory that holds the values themselves?"""
    for t in tensors:
        if t is not None and ((type(t) is not torch.Tensor and type(t) is not torch.nn.Parameter) or t.is_neg()):
            return False
    return True


def _plain(tensors):
    """The tensors as the library reads them: no subclass, no negation that is yet to be done."""
    if _ordinary(tensors):
        return tensors
    return tuple(t.as_subclass(torch.Tensor).resolve_neg() if isinstance(t, torch.Tensor) else t for t in tensors)


def _wrapped(tensors):
    """Is one made of others, or a fake? It has no memory."""
    for t in tensors:
        if t is not None and type(t) is not torch.Tensor and isinstance(t, torch.Tensor):
            if type(t).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
                return True
    return False


def _dispatched(tensors):
    """Must the call be an operator, for a mode that traces or fakes, or for what its tensors are?"""
    return torch._C._len_torch_dispatch_stack() > 0 or _wrapped(tensors)


def _each(function, info, in_dims, args):
    """vmap of a function: one call for each index of the axis."""
    results = [
        function.apply(*(x if axis is None else x.select(axis, n) for x, axis in zip(args, in_dims)))
        for n in range(info.batch_size)
    ]
    stacked = tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*results))
    return stacked, tuple(None if x is None else 0 for x in stacked)


class _Call:
    """What of a call is no tensor."""

    __slots__ = ("comm", "kwargs", "operation", "workers")

    def __init__(self, operation, kwargs, workers, comm):
        self.operation, self.workers, self.comm = operation, workers, comm
        self.kwargs = {name: value for name, value in kwargs.items() if name not in _TENSORS}

    def options(self, tensors):
        kwargs = {**self.kwargs, **dict(zip(_TENSORS, tensors))}
        return _operations.make_options(self.operation, _Torch, kwargs)[0]


def _forward(call, query, key, value, *others):
    options = call.options(others)
    return _operations.forward(call.operation, _Torch, options, query, key, value, call.workers, call.comm, True, None)


def _save(ctx, inputs, output):
    ctx.call, *tensors = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


class _Attention(torch.autograd.Function):
    """Saves every tensor, masks too: PyTorch then notices when one is written to before the backward."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, dout, dlse):
        wanted = ctx.needs_input_grad
        if dout is None and dlse is None:
            return (None,) * len(wanted)
        *tensors, out, lse = ctx.saved_tensors
        if dout is None:
            dout = out.new_zeros(()).expand(out.shape)
        arguments = (ctx.call, wanted[4], wanted[5], dout.resolve_neg(), dlse, out, lse, *tensors)
        # Graphs of gradients end here, with an error instead of a zero.
        gradients = (_Gradients.apply if torch.is_grad_enabled() else _Gradients.forward)(*arguments)
        return (None, *gradients, None, None, None, None)


class _TransformedAttention(_Attention):
    """The same for torch.func, which wants forward and context apart. That alone takes PyTorch longer than a small call."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_save)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _each(_TransformedAttention, info, in_dims, args)


class _Gradients(torch.autograd.Function):
    """Results that know that they have no derivatives."""

    @staticmethod
    def forward(call, want_aux, want_bias, dout, dlse, out, lse, query, key, value, aux, bias, *others):
        options = call.options((aux, bias, *others))
        return tuple(
            _operations.backward(
                call.operation, _Torch, options, dout, query, key, value, out, lse, dlse, aux if want_aux else None,
                bias if want_bias else None, call.workers, call.comm,
            )
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise _torch_ops.no_second_derivatives()

    @staticmethod
    def vmap(info, in_dims, *args):
        return _each(_Gradients, info, in_dims, args)


def _call(operation, query, key, value, kwargs, axis_name, workers, comm, return_lse, out):
    tensors = (query, key, value, *map(kwargs.get, _TENSORS))
    for name in ("softmax_scale", "logits_soft_cap"):
        if isinstance(kwargs.get(name), torch.Tensor) and _differentiable((kwargs[name],)):
            raise InvalidArgument(
                f"{operation}: {name} requires gradients, which are not computed for it",
                "multiply query by a learned scale, or detach it",
            )
    if torch.compiler.is_compiling() or _dispatched(tensors):
        if out is not None:
            raise InvalidArgument(f"{operation}: out= cannot be compiled", "leave it out under torch.compile")
        result = _torch_ops.compiled(operation, query, key, value, kwargs, axis_name, workers, comm)
        return result if return_lse else result[0]
    if torch.overrides.has_torch_function(tensors):
        return torch.overrides.handle_torch_function(
            _call, tensors, operation, query, key, value, kwargs, axis_name, workers, comm, return_lse, out
        )
    plain = _plain(tensors)
    ring = ring_of(operation, comm, axis_name, workers)
    workers = _operations.count_of_workers(operation, workers)
    transformed = torch._C._are_functorch_transforms_active()
    if transformed or out is not None or _differentiable(plain):
        call = _Call(operation, kwargs, workers, ring)
        if out is not None:
            return _into(call, plain, return_lse, out)
        result = (_TransformedAttention if transformed else _Attention).apply(call, *plain)
    else:
        if plain is not tensors:
            kwargs = {**kwargs, **dict(zip(_TENSORS, plain[3:]))}
        options, _ = _operations.make_options(operation, _Torch, kwargs)
        result = _operations.forward(operation, _Torch, options, *plain[:3], workers, ring, return_lse, None)
    return result if return_lse else result[0]


def _differentiable(tensors):
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def _into(call, tensors, return_lse, out):
    operation = call.operation
    if not isinstance(out, torch.Tensor):
        raise InvalidArgument(f"{operation}: query is an array of PyTorch, out is a {type(out).__qualname__}")
    if _differentiable((*tensors, out)):
        raise InvalidArgument(
            f"{operation}: out= does not take part in autograd", "leave it out, or use torch.no_grad()"
        )
    if out.is_neg():
        raise InvalidArgument(f"{operation}: out is a negated view", "pass a tensor with memory of its own")
    result = _operations.forward(
        operation, _Torch, call.options(tensors[3:]), *tensors[:3], call.workers, call.comm, return_lse, out
    )
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return result if return_lse else result[0]


class _Once(torch.autograd.Function):
    """Results of ``attention_backward`` that know that they have no derivatives."""

    @staticmethod
    def forward(ctx, compute, *inputs):
        return tuple(compute())

    @staticmethod
    def backward(ctx, *_):
        raise _torch_ops.no_second_derivatives()


def _backward(operation, kind, options, dout, query, key, value, out, lse, dlse, aux, bias, workers, comm):
    given = (dout, query, key, value, out, lse, dlse)
    if _wrapped(given):
        raise InvalidArgument(
            f"{operation}: fake tensors and tensors made of others have no memory to compute on",
            "call torch.ops.annulus.attention_backward",
        )
    tensors = _plain(given)

    def compute():
        return _operations.backward(operation, kind, options, *tensors, aux, bias, workers, comm)

    inputs = [t for t in (*given, aux, bias) if t is not None]
    if not _differentiable(inputs):
        return compute()
    return _operations.Gradients(*_Once.apply(compute, *inputs))


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(out_a, lse_a, out_b, lse_b):
        return _operations.merge_arrays(_Torch, out_a, lse_a, out_b, lse_b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx, dout, dlse):
        return _torch_ops.merge_gradients(*ctx.saved_tensors, dout, dlse)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _each(_Merge, info, in_dims, args)


def _merge(out_a, lse_a, out_b, lse_b):
    tensors = (out_a, lse_a, out_b, lse_b)
    if torch.compiler.is_compiling() or _dispatched(tensors):
        return torch.ops.annulus.merge(*tensors)
    if torch.overrides.has_torch_function(tensors):
        return torch.overrides.handle_torch_function(_merge, tensors, *tensors)
    return _Merge.apply(*_plain(tensors))


def _broadcast(operation, query, key, value, enable_gqa):
    """PyTorch's [..., heads, seq, dim] as three tensors of four axes with equal batches; the batch's axes, and the shape of
    the result."""
    tensors = (query, key, value)
    for name, tensor in zip(("query", "key", "value"), tensors):
        if not isinstance(tensor, torch.Tensor):
            raise InvalidArgument(f"{operation}: {name} is a {type(tensor).__qualname__}, expected a PyTorch tensor")
        if tensor.dim() < 2:
            raise InvalidArgument(f"{operation}: {name} has shape {list(tensor.shape)}, expected [..., seq, dim]")
    q, k, v = query.shape, key.shape, value.shape
    if len(q) == len(k) == len(v) == 4 and q[0] == k[0] == v[0] and q[1] == k[1] == v[1]:
        return tensors, q[:1], (*q[:3], v[3])  # nothing to do, as nearly always
    axes = max(query.dim(), key.dim(), value.dim())
    if axes < 4 or any(t.dim() < axes for t in tensors):
        tensors = tuple(t[(None,) * (max(axes, 4) - t.dim())] for t in tensors)
    heads = [t.shape[-3] for t in tensors]
    if heads[1] != heads[2] or (not enable_gqa and heads[0] != heads[1] and heads[1] != 1):
        count = max(heads)
        if enable_gqa or any(n not in (1, count) for n in heads):
            raise InvalidArgument(
                f"{operation}: query, key and value have {heads[0]}, {heads[1]} and {heads[2]} heads",
                "key and value must have as many; pass enable_gqa=True where several query heads share one of theirs",
            )
        tensors = tuple(t.expand(*t.shape[:-3], count, *t.shape[-2:]) for t in tensors)
        heads[0] = count
    batch = tensors[0].shape[:-3]
    if any(t.shape[:-3] != batch for t in tensors):
        try:
            batch = torch.broadcast_shapes(*(t.shape[:-3] for t in tensors))
        except RuntimeError:
            found = " and ".join(str(list(t.shape)) for t in (query, key, value))
            raise InvalidArgument(f"{operation}: shapes {found} do not broadcast") from None
        tensors = tuple(t.expand(*batch, *t.shape[-3:]) for t in tensors)
    shape = (*batch, heads[0], query.shape[-2], value.shape[-1])[-axes:]
    if len(batch) != 1:
        tensors = tuple(t.reshape(-1, *t.shape[-3:]) for t in tensors)
    return tensors, batch, shape


def _attn_mask(operation, mask, batch, heads, q_len, kv_len):
    """(attention_mask, bias): bool masks hide, others are added."""
    shape = (*batch, heads, q_len, kv_len)
    try:
        whole = torch.broadcast_to(mask, shape)
    except RuntimeError:
        raise InvalidArgument(
            f"{operation}: attn_mask has shape {list(mask.shape)}, which does not broadcast to {list(shape)}"
        ) from None
    if len(batch) == 1 and mask.dim() <= 4:
        # One batch row or head that serves all stays one: so does its gradient.
        mask = mask[(None,) * (4 - mask.dim())]
        mask = mask.expand(*mask.shape[:2], q_len, kv_len)
    else:
        mask = whole.reshape(-1, heads, q_len, kv_len)
    return (mask, None) if mask.dtype == torch.bool else (None, mask)


def _autocast(*tensors):
    """What torch.autocast does to the arguments of PyTorch's own attention."""
    if not torch.is_autocast_enabled("cpu"):
        return tensors
    dtype = torch.get_autocast_dtype("cpu")
    return tuple(t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors)


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, *, workers=None
):
    """Takes the place of ``torch.nn.functional.scaled_dot_product_attention``: its layouts [..., heads, seq, dim], its top-left
    causal mask, its additive masks, gradients for the mask too. ``workers``: threads of a ring in this process.

    Differences: dropout drops by position from a seed that is drawn from PyTorch's generator, and dropout_p is below 1;
    float64 is refused; rows that see nothing are 0. Under torch.autocast the arguments are cast as PyTorch's are.
    Returns [..., heads, seq, v_dim].
    """
    operation = "scaled_dot_product_attention"
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    if attn_mask is not None and is_causal:
        raise InvalidArgument(
            f"{operation}: both attn_mask and is_causal are given", "put the causal rule into the mask"
        )
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
    q, k, v = (t.transpose(1, 2) for t in _autocast(query, key, value))
    return _call(operation, q, k, v, kwargs, axis_name, None, comm, False, None).transpose(1, 2)
