"""The array libraries of callers: how their arrays are told apart and made. None is imported here: an array that is
passed in has brought its library along."""

import sys

from . import _core
from ._errors import InvalidArgument


class NumPy:
    name = "NumPy"

    @staticmethod
    def empty(shape, like):
        return sys.modules["numpy"].empty(shape, like.dtype)

    @staticmethod
    def empty_float32(shape, like):
        return sys.modules["numpy"].empty(shape, "float32")

    @staticmethod
    def float32(array):
        return array.astype("float32")

    @staticmethod
    def cast(array, dtype):
        return array.astype(dtype)

    @staticmethod
    def finish(array, like):
        return array


class Torch(NumPy):
    name = "PyTorch"

    @staticmethod
    def empty(shape, like):
        return sys.modules["torch"].empty(shape, dtype=like.dtype, device="cpu")

    @staticmethod
    def empty_float32(shape, like):
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=torch.float32, device="cpu")

    @staticmethod
    def float32(array):
        return array.float()

    @staticmethod
    def cast(array, dtype):
        return array.to(dtype)


class Jax(NumPy):
    """JAX takes memory over without a copy where it is aligned to 64 bytes."""

    name = "JAX"

    @staticmethod
    def empty(shape, like):
        return _core.aligned_array(list(shape), str(like.dtype))

    @staticmethod
    def empty_float32(shape, like):
        return _core.aligned_array(list(shape), "float32")

    @staticmethod
    def finish(array, like):
        return sys.modules["jax"].dlpack.from_dlpack(array)


class Other(Jax):
    """Anything else that speaks DLPack and names its array API namespace."""

    name = "DLPack"

    @staticmethod
    def finish(array, like):
        namespace = getattr(like, "__array_namespace__", None)
        return namespace().from_dlpack(array) if namespace else array


# Options that are arrays, in the order of the PyTorch operators' arguments.
OPTION_ARRAYS = ("softmax_aux", "bias", "q_segment_ids", "kv_segment_ids", "kv_lengths", "attention_mask")

_ROOTS = {"numpy": NumPy, "ml_dtypes": NumPy, "torch": Torch, "jax": Jax, "jaxlib": Jax}
_known = {}


def _find(array_type):
    for base in array_type.__mro__:
        root = base.__module__.partition(".")[0]
        if root in _ROOTS:
            return _ROOTS[root]
    return Other if hasattr(array_type, "__dlpack__") else None


def of(operation, name, array):
    """The library of an array. Raises InvalidArgument for what is no array."""
    array_type = type(array)
    kind = _known.get(array_type)
    if kind is None:
        kind = _find(array_type)
        if kind is None:
            raise InvalidArgument(
                f"{operation}: {name} is a {array_type.__qualname__}, expected an array",
                "pass an array of NumPy, PyTorch or JAX",
            )
        _known[array_type] = kind
    return kind


def common(operation, arrays, kwargs):
    """The one library of all arrays of a call; `arrays` are (name, array) pairs."""
    first_name, first = arrays[0]
    kind = of(operation, first_name, first)
    others = list(arrays[1:])
    for name in OPTION_ARRAYS:
        array = kwargs.get(name)
        if array is not None:
            others.append((name, array))
    for name, array in others:
        other = of(operation, name, array)
        if other is not kind:
            raise InvalidArgument(
                f"{operation}: {first_name} is an array of {kind.name}, {name} of {other.name}",
                "pass arrays of one library",
            )
    return kind


def rows_shape(operation, query, value):
    """[batch, seq, heads, v_head_dim]."""
    shape, value_shape = tuple(query.shape), tuple(value.shape)
    for name, found in (("query", shape), ("value", value_shape)):
        if len(found) != 4:
            raise InvalidArgument(
                f"{operation}: {name} has shape {list(found)}, expected 4 axes [batch, seq, heads, dim]"
            )
    return (*shape[:3], value_shape[3])
