"""Attention as JAX operations: under jit, grad, vmap, scan and shard_map, on CPU devices.

    out = annulus.jax.ring_attention(query, key, value, causal=True, workers=4)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(None, "sp"), out_specs=P(None, "sp"))
    def attend(query, key, value):                                  # a true ring between the mesh's devices
        return annulus.jax.ring_attention(query, key, value, causal=True, axis_name="sp")

Arrays are JAX's (or NumPy's, which become JAX's). Shapes, dtypes and options are checked when a call is traced; what
depends on the values of arrays is checked when it runs. An error of a running program is JAX's, ``JaxRuntimeError`` or
ValueError, with Annulus's message; where the call itself was waiting for the result, it is the ``annulus.Error``.
"""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _core, _errors
from ._errors import InvalidArgument
from ._frameworks import OPTION_ARRAYS
from ._operations import count_of_workers, make_options
from ._params import FwdParams, block_sizes

__all__ = ["attention", "ring_attention"]

# Older ones cannot differentiate one compiled function in two sets of arguments (custom_vjp with symbolic zeros), and
# the first of them cannot run handlers of this kind.
if jax.__version_info__ < (0, 9):
    raise ImportError(f"annulus.jax needs JAX 0.9 or newer, found {jax.__version__}")

_TARGET = "annulus_attention"
jax.ffi.register_ffi_target(_TARGET, _core.ffi_handlers(), platform="cpu")

_ARRAYS = ("query", "key", "value", *OPTION_ARRAYS)
_DIFFERENTIABLE = ("query", "key", "value", "bias", "softmax_aux")
# Options that are part of the program. What they are is known when it is traced.
_STATIC = (
    "mask_builder", "sliding_window", "chunk_size", "causal", "logits_soft_cap", "softmax_scale", "fwd_params",
    "bwd_params", "fused_backward", "dropout_prob", "padding_segment_id", "causal_alignment", "partition",
)  # fmt: skip
_PLAIN = frozenset((type(None), bool, int, float, str))


class _Program(NamedTuple):
    """A call without its arrays. Equal ones share compiled programs."""

    operation: str
    attributes: tuple  # (name, value) pairs
    return_lse: bool
    dropped: bool  # reads the dropout seed


def _call_target(program, operands, results):
    """One call of the library: `results` are shapes and dtypes by name, and so are the arrays returned."""
    operands = _alike(operands)
    placed = {}
    if _varying(operands["query"]):
        aval = jax.typeof(operands["query"])
        kind = "manual_axis_type" if hasattr(aval, "manual_axis_type") else "vma"
        placed = {kind: getattr(aval, kind), "sharding": jax.NamedSharding(aval.sharding.mesh, jax.P())}
    avals = tuple(jax.ShapeDtypeStruct(shape, dtype, **placed) for shape, dtype in results.values())
    found = jax.ffi.ffi_call(_TARGET, avals, vmap_method="expand_dims")(
        *operands.values(),
        operation=program.operation,
        arguments=",".join(operands),
        results=",".join(results),
        **dict(program.attributes),
    )
    return dict(zip(results, found))


def _forward(program, floats, others, with_lse):
    query, value = floats["query"], floats["value"]
    batch, q_len, heads, _ = query.shape
    results = {"out": ((batch, q_len, heads, value.shape[3]), query.dtype)}
    if with_lse:
        results["lse"] = ((batch, heads, q_len), np.dtype("float32"))
    return _call_target(program, {**floats, **others}, results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def annulus_attention(program, floats, others):
    """The operation that JAX sees. `floats` and `others` are arrays by name."""
    found = _forward(program, floats, others, program.return_lse)
    return (found["out"], found["lse"]) if program.return_lse else found["out"]


def _annulus_attention_fwd(program, floats, others):
    # Which gradients are wanted, as keys: part of the structure, not of the values.
    wanted = {name: () for name, array in floats.items() if array.perturbed}
    floats = {name: array.value for name, array in floats.items()}
    others = {name: array.value for name, array in others.items()}
    found = _forward(program, floats, others, True)
    out = (found["out"], found["lse"]) if program.return_lse else found["out"]
    return out, (floats, others, found, wanted)


def _annulus_attention_bwd(program, kept, cotangents):
    floats, others, found, wanted = kept
    dout, dlse = cotangents if program.return_lse else (cotangents, None)
    operands = {**floats, **others, **found, "dout": dout}
    if isinstance(dout, jax.custom_derivatives.SymbolicZero):
        operands["dout"] = jnp.zeros_like(found["out"])
    if dlse is not None and not isinstance(dlse, jax.custom_derivatives.SymbolicZero):
        operands["dlse"] = dlse
    gradients = {"query": "dq", "key": "dk", "value": "dv"}
    gradients.update((name, f"d{name}") for name in ("bias", "softmax_aux") if name in wanted)
    results = {gradients[name]: (floats[name].shape, floats[name].dtype) for name in gradients}
    computed = _call_target(program, operands, results)
    return {name: computed[gradients[name]] if name in gradients else None for name in floats}, None


annulus_attention.defvjp(_annulus_attention_fwd, _annulus_attention_bwd, symbolic_zeros=True)
_run = jax.jit(annulus_attention, static_argnums=0)


def _varying(array):
    """The axes of shard_map's mesh along which an array is known to vary. JAX 0.10 renamed where it says so."""
    aval = jax.typeof(array)
    return aval.manual_axis_type.varying if hasattr(aval, "manual_axis_type") else getattr(aval, "vma", frozenset())


def _alike(arrays):
    """Inside shard_map, arrays that are the same on some devices count as varying where others vary."""
    known = {name: _varying(array) for name, array in arrays.items()}
    union = frozenset().union(*known.values())
    if not union:
        return arrays
    return {
        name: lax.pcast(array, tuple(union - known[name]), to="varying") if union != known[name] else array
        for name, array in arrays.items()
    }


def _ring(operation, axis_name, arrays):
    """How many devices form the ring, this device's rank, and which of the mesh's rings it is in."""
    axes = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    try:
        rank, size = lax.axis_index(axis_name), lax.axis_size(axis_name)
    except NameError:
        raise InvalidArgument(
            f"{operation}: axis_name is {axis_name!r}, which is no axis here",
            "call it inside jax.shard_map over a mesh with that axis, or pass workers=P outside",
        ) from None
    # Rings are told apart by the axes along which arrays vary; without that knowledge, by all.
    if axes[0] in _varying(rank):
        varying = frozenset().union(*(_varying(array) for array in arrays.values()))
    else:
        varying = frozenset(jax.sharding.get_abstract_mesh().manual_axes)
    group = jnp.int32(0)
    for name in sorted(varying - set(axes)):
        group = group * lax.axis_size(name) + lax.axis_index(name)
    return size, {"rank": rank, "group": group}


def _array(operation, name, array):
    if isinstance(array, (jax.Array, np.ndarray, np.generic)):
        return array
    raise InvalidArgument(
        f"{operation}: {name} is a {type(array).__qualname__}, expected an array", "pass an array of JAX or NumPy"
    )


def _for_jax(operation, name, array):
    """NumPy's arrays as JAX's; int64 that JAX would cut to int32 must fit it."""
    if isinstance(array, jax.Array):
        return array
    if array.dtype == np.int64:
        narrow = array.astype(np.int32)
        if not np.array_equal(narrow, array):
            raise InvalidArgument(f"{operation}: {name} holds numbers which int32 cannot")
        array = narrow
    return jnp.asarray(array)


def _static(operation, name, value):
    """A plain, hashable value of an option that is part of the program."""
    if isinstance(value, jax.core.Tracer):
        raise InvalidArgument(
            f"{operation}: {name} is a tracer of jax, expected a value that is known when the call is traced",
            "make it a static argument of jit",
        )
    if isinstance(value, (jax.Array, np.ndarray)) and value.ndim == 0:
        return value.item()
    if name in ("fwd_params", "bwd_params"):
        return FwdParams(*(size or None for size in block_sizes(operation, name, value)))
    return tuple(value) if isinstance(value, list) else value


def _seed(operation, seed):
    """uint32 [2], the low word first."""
    if isinstance(seed, jax.Array) and seed.ndim == 0 and jnp.issubdtype(seed.dtype, jnp.integer):
        wide = seed.dtype.itemsize == 8
        high = lax.shift_right_logical(seed, jnp.array(32, seed.dtype)).astype("uint32") if wide else jnp.uint32(0)
        return jnp.stack([seed.astype("uint32"), high])
    plain = seed.item() if isinstance(seed, (np.ndarray, np.generic)) and seed.ndim == 0 else seed
    if isinstance(plain, bool) or not isinstance(plain, int) or not 0 <= plain < 2**64:
        raise InvalidArgument(f"{operation}: dropout_seed is {seed!r}, expected an integer of 64 bits without a sign")
    return np.array([plain & 0xFFFFFFFF, plain >> 32], np.uint32)


# The handles of what users pass by identity, for ever: programs that were compiled with them may run at any time.
_handles = {}


@functools.lru_cache(maxsize=4096, typed=True)
def _program(operation, described, ring, workers, return_lse, *static):
    """The checked program of a call. `described` are (name, dtype, shape) of its arrays, `ring` is (axis, world_size,
    timeout_s) or None."""
    specs = {name: _core.ArraySpec(str(dtype), shape) for name, dtype, shape in described}
    primals = [specs.pop(name) for name in ("query", "key", "value")]
    kwargs = {**dict(zip(_STATIC, static)), **specs}
    options, _ = make_options(operation, None, kwargs)
    axis, world_size, timeout_s = ring or (None, 1, None)
    attributes = _core.ffi_attributes(options, *primals, world_size, workers)
    for name, option in (("masks", "mask_builder"), ("positions", "partition")):
        if name in attributes:
            key = (kwargs[option], name, world_size, described[:3])
            attributes[name] = _handles.setdefault(key, attributes[name])
    attributes["workers"] = workers
    if ring:
        attributes.update(axis=str(axis), world_size=world_size, timeout_s=timeout_s)
    kinds = {bool: np.bool_, int: np.int64, float: np.float64, str: str}
    typed = tuple((name, kinds[type(value)](value)) for name, value in sorted(attributes.items()))
    return _Program(operation, typed, return_lse, attributes["dropout_prob"] > 0)


def _error(error):
    """The annulus.Error of a program that failed, or None."""
    found = re.search(
        r"annulus\.(\w+)(?:\(rank (\d+)\))?: (.*?)(?: \(fix: (.*?)\))?$", str(error), re.DOTALL | re.MULTILINE
    )
    kind = getattr(_errors, found[1], None) if found else None
    if kind is None:
        return None
    result = kind(found[3], found[4] or "")
    if found[2]:
        result.rank = int(found[2])
    return result


def _call(operation, given):
    """`given`: the arguments by name. Those of a ring may be missing."""
    given = {"axis_name": None, "workers": None, "timeout_s": None, "partition": "contiguous", **given}
    axis_name, workers, timeout_s = given["axis_name"], given["workers"], given["timeout_s"]
    arrays = {name: _array(operation, name, given[name]) for name in _ARRAYS if given[name] is not None}
    if "softmax_aux" in arrays and str(arrays["softmax_aux"].dtype) in ("bfloat16", "float16"):
        arrays["softmax_aux"] = arrays["softmax_aux"].astype("float32")
    static = [
        value if type(value := given[name]) in _PLAIN else _static(operation, name, value) for name in _STATIC
    ]
    described = tuple((name, array.dtype, array.shape) for name, array in arrays.items())
    arrays = {name: _for_jax(operation, name, array) for name, array in arrays.items()}
    ring, placed = None, {}
    if axis_name is not None:
        if workers is not None:
            raise InvalidArgument(f"{operation}: both workers and axis_name are given", "pass one of them")
        world_size, placed = _ring(operation, axis_name, arrays)
        ring = (axis_name, world_size, float("inf") if timeout_s is None else float(timeout_s))
    try:
        workers = count_of_workers(operation, workers)
        program = _program(operation, described, ring, workers, given["return_lse"], *static)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        raise InvalidArgument(f"{operation}: an option cannot be part of a program: {error}") from None
    arrays.update(placed)
    seed = _seed(operation, given["dropout_seed"])
    if program.dropped:
        arrays["dropout_seed"] = seed
    if any(isinstance(array, jax.core.Tracer) for array in arrays.values()):
        arrays = _alike(arrays)
    floats = {name: arrays.pop(name) for name in _DIFFERENTIABLE if name in arrays}
    try:
        return _run(program, floats, arrays)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        translated = _error(error)
        if translated is None:
            raise
    raise translated


def ring_attention(
    query, key, value, q_segment_ids=None, kv_segment_ids=None, softmax_aux=None, bias=None, mask_builder=None,
    sliding_window=None, chunk_size=None, causal=False, logits_soft_cap=None, softmax_scale=None, axis_name=None,
    fwd_params=None, bwd_params=None, fused_backward=False, *, attention_mask=None, dropout_prob=0.0, dropout_seed=0,
    kv_lengths=None, padding_segment_id=None, causal_alignment="top_left", workers=None, partition="contiguous",
    return_lse=False, timeout_s=30.0,
):  # fmt: skip
    """``annulus.ring_attention`` as a JAX operation, differentiable in query, key, value, bias and softmax_aux.

    Shapes, options and results are those of ``annulus.ring_attention``. Two ways to form the ring:

    * Outside shard_map: whole arrays, and ``workers=P`` threads of this process share each call (None: one pass).
    * Inside ``jax.shard_map``: ``axis_name`` is a mesh axis (or a tuple of them), each device passes its shard, and the
      devices along the axis are the ring. Device r holds the rows that ``partition`` gives to rank r of P. Segment ids
      are the shard's rows; bias and attention_mask its own query rows by all keys in position order; kv_lengths are
      global. Every device of the axis must make the call, equally often; one that does not come within ``timeout_s``
      seconds after the first (None: no limit) ends the program with PeerTimeout, which names it.

    Arrays may be traced, ``dropout_seed`` too (a traced seed of 32 bits is read without a sign). Other options are part
    of the program: numbers, and masks and partitions by identity, so pass the same object again rather than an equal
    one. ``mask_builder`` is asked when the call is traced. Under vmap every mapped element is a call of its own.

    Raises InvalidArgument for what can be known when the call is traced. Later errors come as JAX's with the same text,
    unless the call itself waits for its result.
    """
    return _call("ring_attention", locals())


def attention(
    query, key, value, *, causal=False, causal_alignment="bottom_right", sliding_window=None, chunk_size=None,
    q_segment_ids=None, kv_segment_ids=None, padding_segment_id=None, kv_lengths=None, attention_mask=None,
    mask_builder=None, softmax_scale=None, logits_soft_cap=None, softmax_aux=None, bias=None, dropout_prob=0.0,
    dropout_seed=0, fwd_params=None, bwd_params=None, fused_backward=True, return_lse=False,
):  # fmt: skip
    """``annulus.attention`` as a JAX operation: exact attention in one pass. Arguments and results as there; what is
    traced and what is part of the program, and errors, as in ``annulus.jax.ring_attention``."""
    return _call("attention", locals())
