from typing import Any, Literal, overload

from typing_extensions import Unpack

from . import Gradients, _Array, _RingOptions

# Results are NumPy arrays of float64, for PyTorch tensors tensors of float64.
@overload
def attention(
    query: _Array, key: _Array, value: _Array, *, return_lse: Literal[False] = False, **options: Unpack[_RingOptions]
) -> Any: ...
@overload
def attention(
    query: _Array, key: _Array, value: _Array, *, return_lse: Literal[True], **options: Unpack[_RingOptions]
) -> tuple[Any, Any]: ...
@overload
def attention(
    query: _Array, key: _Array, value: _Array, *, return_lse: bool, **options: Unpack[_RingOptions]
) -> Any: ...
def attention_backward(
    dout: _Array, query: _Array, key: _Array, value: _Array, out: _Array | None = None, lse: _Array | None = None, *,
    dlse: _Array | None = None, want_dbias: bool = False, **options: Unpack[_RingOptions],
) -> Gradients[Any]: ...  # fmt: skip
