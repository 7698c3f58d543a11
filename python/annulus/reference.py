"""The oracle: attention by its formula in double precision, one query at a time. Slow on purpose; compare with it.

Options mean what they mean in ``annulus.attention``; results are NumPy arrays of float64 (PyTorch tensors for tensors).
"""

import sys

from . import _core, _frameworks
from ._operations import Gradients, make_options, names_of


def _prepare(operation, arrays, kwargs):
    names_of(operation, kwargs)
    kind = _frameworks.common(operation, arrays, kwargs)
    if kind is _frameworks.Torch:
        torch = sys.modules["torch"]
        arrays = [(n, a.detach()) for n, a in arrays]
        kwargs = {n: a.detach() if isinstance(a, torch.Tensor) else a for n, a in kwargs.items()}
    kwargs.setdefault("causal_alignment", "bottom_right")
    options, _ = make_options(operation, kind, kwargs)
    return kind, options, [a for _, a in arrays]


def _result(kind, array):
    if array is None or kind is not _frameworks.Torch:
        return array
    return sys.modules["torch"].from_numpy(array)


def attention(query, key, value, *, return_lse=False, **options):
    """out float64 [batch, q_len, num_heads, v_head_dim]; with ``return_lse`` (out, lse [batch, num_heads, q_len])."""
    kind, read, arrays = _prepare("reference.attention", [("query", query), ("key", key), ("value", value)], options)
    out, lse = _core.reference_forward(read, *arrays)
    lse = lse.transpose(0, 2, 1)
    return (_result(kind, out), _result(kind, lse)) if return_lse else _result(kind, out)


def attention_backward(dout, query, key, value, out=None, lse=None, *, dlse=None, want_dbias=False, **options):
    """Gradients of ``attention`` in float64. ``out`` None: delta is made of the oracle's own rows, else of the given ones.
    ``lse`` is not read: the oracle makes its own."""
    del lse
    given = [("dout", dout), ("query", query), ("key", key), ("value", value)]
    given += [(name, array) for name, array in (("out", out), ("dlse", dlse)) if array is not None]
    kind, read, arrays = _prepare("reference.attention_backward", given, options)
    rest = iter(arrays[4:])
    out, dlse = (next(rest) if x is not None else None for x in (out, dlse))
    *gradients, dbias = _core.reference_backward(read, *arrays[:4], out, dlse)
    return Gradients(*(_result(kind, g) for g in gradients), _result(kind, dbias) if want_dbias else None)
