"""The operations. Arguments are arrays of one library, results are arrays of the same."""

from collections import namedtuple

from . import _core, _frameworks
from ._errors import InvalidArgument
from ._params import block_sizes
from ._workers import ring_of

Gradients = namedtuple("Gradients", "dq dk dv dsoftmax_aux dbias", defaults=(None, None))
Gradients.__doc__ = """Gradients of an operation, each the shape and dtype of what it is the gradient of; None where that
was not given, and dbias where it was not asked for."""

# Every option of an operation by its name.
OPTIONS = frozenset(
    (
        "q_segment_ids", "kv_segment_ids", "softmax_aux", "bias", "mask_builder", "sliding_window", "chunk_size", "causal",
        "logits_soft_cap", "softmax_scale", "fwd_params", "bwd_params", "fused_backward", "attention_mask", "dropout_prob",
        "dropout_seed", "kv_lengths", "padding_segment_id", "causal_alignment", "partition",
    )
)  # fmt: skip


def names_of(operation, kwargs):
    """Raises TypeError for a name that is no option."""
    unknown = [name for name in kwargs if name not in OPTIONS]
    if unknown:
        raise TypeError(f"{operation}() got an unexpected keyword argument {unknown[0]!r}; it knows {', '.join(sorted(OPTIONS))}")


def count_of_workers(operation, workers):
    if workers is None:
        return 1
    if isinstance(workers, bool) or not hasattr(workers, "__index__") or workers < 1:
        raise InvalidArgument(f"{operation}: workers is {workers!r}, expected an integer of at least 1, or None")
    return workers.__index__()


def make_options(operation, kind, kwargs):
    """The binding's Options, and the copies that making them took. Sinks may be of any float type: the library reads
    float32."""
    copies = []
    aux = kwargs.get("softmax_aux")
    if aux is not None and str(aux.dtype).rpartition(".")[2] in ("bfloat16", "float16"):
        kwargs = {**kwargs, "softmax_aux": kind.float32(aux)}
        copies.append(f"softmax_aux is copied: {aux.dtype} becomes float32")
    partition = kwargs.get("partition")
    if hasattr(partition, "_partition"):
        kwargs = {**kwargs, "partition": partition._partition}
    mask_builder = kwargs.get("mask_builder")
    if hasattr(mask_builder, "_mask"):
        kwargs = {**kwargs, "mask_builder": mask_builder._mask}
    for name in ("fwd_params", "bwd_params"):
        if kwargs.get(name) is not None:
            kwargs = {**kwargs, name: block_sizes(operation, name, kwargs[name])}
    options = _core.Options(operation, kwargs)
    return options, copies + options.copies


def forward(operation, kind, options, query, key, value, workers, comm, return_lse, out):
    """One forward of the library: (out, lse or None)."""
    shape = _frameworks.rows_shape(operation, query, value)
    result = kind.empty(shape, query) if out is None else out
    lse = kind.empty_float32((shape[0], shape[2], shape[1]), query) if return_lse else None
    _core.forward(options, query, key, value, result, lse, workers, comm)
    if out is None:
        result = kind.finish(result, query)
    return result, kind.finish(lse, query) if return_lse else None


def backward(operation, kind, options, dout, query, key, value, out, lse, dlse, aux, bias, workers, comm):
    """One backward of the library. `aux` and `bias` are the primals whose gradients are wanted, or None."""
    _frameworks.rows_shape(operation, query, value)
    primals = (query, key, value)
    gradients = [kind.empty(tuple(x.shape), x) for x in primals]
    dsinks = None if aux is None else kind.empty_float32(tuple(aux.shape), query)
    dbias = None if bias is None else kind.empty(tuple(bias.shape), bias)
    _core.backward(
        options, dout, query, key, value, out, lse, dlse, (*gradients, dsinks, dbias), workers, comm
    )
    results = [kind.finish(g, x) for g, x in zip(gradients, primals)]
    if dsinks is not None:
        dsinks = kind.finish(dsinks, query)
        if dsinks.dtype != aux.dtype:
            dsinks = kind.cast(dsinks, aux.dtype)
    return Gradients(*results, dsinks, None if dbias is None else kind.finish(dbias, bias))


def _call(operation, query, key, value, kwargs, axis_name, workers, comm, return_lse, out):
    kind = _frameworks.common(operation, (("query", query), ("key", key), ("value", value)), kwargs)
    if kind is _frameworks.Torch:
        from .torch import _call as torch_call

        return torch_call(operation, query, key, value, kwargs, axis_name, workers, comm, return_lse, out)
    if out is not None and _frameworks.of(operation, "out", out) is not kind:
        raise InvalidArgument(f"{operation}: query is an array of {kind.name}, out is not")
    options, _ = make_options(operation, kind, kwargs)
    ring = ring_of(operation, comm, axis_name, workers)
    result, lse = forward(
        operation, kind, options, query, key, value, count_of_workers(operation, workers), ring, return_lse, out
    )
    return (result, lse) if return_lse else result


def ring_attention(
    query, key, value, q_segment_ids=None, kv_segment_ids=None, softmax_aux=None, bias=None, mask_builder=None,
    sliding_window=None, chunk_size=None, causal=False, logits_soft_cap=None, softmax_scale=None, axis_name=None,
    fwd_params=None, bwd_params=None, fused_backward=False, *, attention_mask=None, dropout_prob=0.0, dropout_seed=0,
    kv_lengths=None, padding_segment_id=None, causal_alignment="top_left", workers=None, partition="contiguous", comm=None,
    return_lse=False, out=None,
):  # fmt: skip
    """Exact attention over a sequence dealt to a ring of workers.

    Global view: whole arrays and ``workers=P`` threads of this process (None: one pass). SPMD view: each rank passes its
    shard and ``comm``, a Communicator or Mesh; ``partition`` then says which rows the shard holds.

    query [batch, q_len, num_heads, head_dim], key [batch, kv_len, num_kv_heads, head_dim], value [batch, kv_len,
    num_kv_heads, v_head_dim]: float32, bfloat16 or float16, any strides, nothing is copied. num_heads is a multiple of
    num_kv_heads.

    A key is visible if every rule that is given says so:

    * ``causal``: j <= i (``causal_alignment="bottom_right"``: j <= i + kv_len - q_len).
    * ``sliding_window``: (left, right) or one number for both; i - left <= j <= i + right, both ends inclusive; None or -1
      on a side is unlimited. Shifted like causal.
    * ``chunk_size`` c: i div c == j div c and j <= i, never shifted.
    * ``q_segment_ids`` [batch, q_len], ``kv_segment_ids`` [batch, kv_len], int32: equal ids. One serves both where the
      lengths are equal. Tokens with ``padding_segment_id`` see nothing and are seen by nothing.
    * ``kv_lengths`` int32 [batch]: keys at positions below the length.
    * ``attention_mask`` bool [batch or 1, heads or 1, q_len, kv_len]: True is visible.
    * ``mask_builder(q_len, kv_len, num_heads, head, num_reps)``: an annulus.Mask per head; or one Mask for all.

    Arithmetic: ``softmax_scale`` (default head_dim**-0.5); ``logits_soft_cap`` c: c * tanh(s / c); ``bias`` [batch or 1,
    heads or 1, q_len, kv_len], added after the cap; ``softmax_aux``: sinks, logits in the scaled unit, [num_heads],
    [num_sinks] seen by every head, or [num_heads, n]; ``dropout_prob`` and ``dropout_seed``: dropped by position, the same
    pairs for every number of workers.

    ``fwd_params``, ``bwd_params``: annulus.FwdParams, annulus.BwdParams; block sizes, which change speed only.
    ``fused_backward``: the backward in one pass over the tiles instead of two. ``axis_name``: the axis of a Mesh whose ranks
    form the ring. ``out``: where the result goes.

    Returns out [batch, q_len, num_heads, v_head_dim] in the library and dtype of query; with ``return_lse`` also lse,
    float32 [batch, num_heads, q_len], the natural logarithm of the sum of exp(s), sinks included. A row that sees nothing is
    0 with lse -inf. Raises InvalidArgument (a ValueError), CommError, Unsupported.
    """
    return _call(
        "ring_attention", query, key, value,
        {
            "q_segment_ids": q_segment_ids, "kv_segment_ids": kv_segment_ids, "softmax_aux": softmax_aux, "bias": bias,
            "mask_builder": mask_builder, "sliding_window": sliding_window, "chunk_size": chunk_size, "causal": causal,
            "logits_soft_cap": logits_soft_cap, "softmax_scale": softmax_scale, "fwd_params": fwd_params,
            "bwd_params": bwd_params, "fused_backward": fused_backward, "attention_mask": attention_mask,
            "dropout_prob": dropout_prob, "dropout_seed": dropout_seed, "kv_lengths": kv_lengths,
            "padding_segment_id": padding_segment_id, "causal_alignment": causal_alignment or "top_left",
            "partition": partition,
        },
        axis_name, workers, comm, return_lse, out,
    )  # fmt: skip


def attention(
    query, key, value, *, causal=False, causal_alignment="bottom_right", sliding_window=None, chunk_size=None,
    q_segment_ids=None, kv_segment_ids=None, padding_segment_id=None, kv_lengths=None, attention_mask=None,
    mask_builder=None, softmax_scale=None, logits_soft_cap=None, softmax_aux=None, bias=None, dropout_prob=0.0,
    dropout_seed=0, fwd_params=None, bwd_params=None, fused_backward=True, return_lse=False, out=None,
):  # fmt: skip
    """Exact attention in one pass. Arguments and results as in ``ring_attention``, except that causal masks and windows are
    aligned to the bottom right: the last query sees the last key."""
    return _call(
        "attention", query, key, value,
        {
            "q_segment_ids": q_segment_ids, "kv_segment_ids": kv_segment_ids, "softmax_aux": softmax_aux, "bias": bias,
            "mask_builder": mask_builder, "sliding_window": sliding_window, "chunk_size": chunk_size, "causal": causal,
            "logits_soft_cap": logits_soft_cap, "softmax_scale": softmax_scale, "fwd_params": fwd_params,
            "bwd_params": bwd_params, "fused_backward": fused_backward, "attention_mask": attention_mask,
            "dropout_prob": dropout_prob, "dropout_seed": dropout_seed, "kv_lengths": kv_lengths,
            "padding_segment_id": padding_segment_id, "causal_alignment": causal_alignment,
        },
        None, None, None, return_lse, out,
    )  # fmt: skip


def attention_backward(
    dout, query, key, value, out, lse, *, causal=False, causal_alignment="bottom_right", sliding_window=None,
    chunk_size=None, q_segment_ids=None, kv_segment_ids=None, padding_segment_id=None, kv_lengths=None,
    attention_mask=None, mask_builder=None, softmax_scale=None, logits_soft_cap=None, softmax_aux=None, bias=None,
    dropout_prob=0.0, dropout_seed=0, fwd_params=None, bwd_params=None, fused_backward=True, workers=None,
    partition="contiguous", axis_name=None, comm=None, dlse=None, want_dbias=False,
):  # fmt: skip
    """Gradients of ``attention`` or ``ring_attention`` for the gradient ``dout`` of out.

    ``out`` and ``lse`` are what the forward returned (``return_lse=True``) for the same arguments; pass
    ``causal_alignment="top_left"`` for ring_attention where q_len != kv_len. ``dlse`` float32 [batch, heads, q_len]: the
    gradient of lse, where it was used. Returns Gradients(dq, dk, dv, dsoftmax_aux, dbias): the dtypes of their primals;
    None for what was not given; dbias only with ``want_dbias=True``. The same arguments give the same bits.
    """
    kwargs = {
        "q_segment_ids": q_segment_ids, "kv_segment_ids": kv_segment_ids, "softmax_aux": softmax_aux, "bias": bias,
        "mask_builder": mask_builder, "sliding_window": sliding_window, "chunk_size": chunk_size, "causal": causal,
        "logits_soft_cap": logits_soft_cap, "softmax_scale": softmax_scale, "fwd_params": fwd_params,
        "bwd_params": bwd_params, "fused_backward": fused_backward, "attention_mask": attention_mask,
        "dropout_prob": dropout_prob, "dropout_seed": dropout_seed, "kv_lengths": kv_lengths,
        "padding_segment_id": padding_segment_id, "causal_alignment": causal_alignment, "partition": partition,
    }  # fmt: skip
    operation = "attention_backward"
    arrays = [("query", query), ("key", key), ("value", value), ("dout", dout), ("out", out), ("lse", lse)]
    if dlse is not None:
        arrays.append(("dlse", dlse))
    kind = _frameworks.common(operation, arrays, kwargs)
    if want_dbias and bias is None:
        raise InvalidArgument(f"{operation}: want_dbias without a bias")
    compute = backward
    if kind is _frameworks.Torch:
        from .torch import _backward as compute
    options, _ = make_options(operation, kind, kwargs)
    ring = ring_of(operation, comm, axis_name, workers)
    return compute(
        operation, kind, options, dout, query, key, value, out, lse, dlse, softmax_aux, bias if want_dbias else None,
        count_of_workers(operation, workers), ring,
    )  # fmt: skip


def merge(out_a, lse_a, out_b, lse_b):
    """Joins two attention results over disjoint sets of keys into the result over their union: (out, lse).

    out [batch, q_len, heads, v_head_dim], lse float32 [batch, heads, q_len]. Exact for -inf on either or both sides. Sinks
    must have been counted in one of the two only.
    """
    kind = _frameworks.common("merge", (("out_a", out_a), ("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)), {})
    if kind is _frameworks.Torch:
        from .torch import _merge

        return _merge(out_a, lse_a, out_b, lse_b)
    return merge_arrays(kind, out_a, lse_a, out_b, lse_b)


def merge_arrays(kind, out_a, lse_a, out_b, lse_b):
    out, lse = kind.empty(tuple(out_a.shape), out_a), kind.empty_float32(tuple(lse_a.shape), lse_a)
    _core.merge(out_a, lse_a, out_b, lse_b, out, lse)
    return kind.finish(out, out_a), kind.finish(lse, lse_a)
