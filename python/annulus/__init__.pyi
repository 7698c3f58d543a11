from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, Literal, NamedTuple, Protocol, SupportsIndex, TypeVar, TypedDict, overload

from typing_extensions import Unpack

from . import reference as reference

__version__: str
__all__ = [
    "BadData", "BwdParams", "CommError", "Communicator", "ConfigError", "Error", "FwdParams", "Gradients",
    "InternalError", "Interrupted", "InvalidArgument", "IoError", "Mask", "Mesh", "OutOfMemory", "Partition",
    "PayloadCorrupt", "PeerMismatch", "PeerTimeout", "Plan", "Unsupported", "attention", "attention_backward", "doctor",
    "explain", "merge", "reference", "ring_attention", "run_workers",
]  # fmt: skip

# An array of any library: NumPy, PyTorch, JAX, or another with DLPack.
class _Array(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...
    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

# The library of query, key and value. Results are arrays of the same; lse is float32 whatever the dtype of query.
_A = TypeVar("_A", bound=_Array)
_Lse = TypeVar("_Lse", bound=_Array)
_T = TypeVar("_T")

_Alignment = Literal["bottom_right", "top_left"]
_Window = int | tuple[int | None, int | None] | None
_MaskBuilder = Callable[[int, int, int, int, int], "Mask"]

class _BlockSizes(Protocol):
    @property
    def q_blocksize(self) -> int | None: ...
    @property
    def kv_blocksize(self) -> int | None: ...

_Blocks = _BlockSizes | Mapping[str, int | None] | None

# Keyword options that every operation shares.
class _Options(TypedDict, total=False):
    q_segment_ids: _Array | None
    kv_segment_ids: _Array | None
    softmax_aux: _Array | None
    bias: _Array | None
    mask_builder: Mask | _MaskBuilder | None
    sliding_window: _Window
    chunk_size: int | None
    causal: bool
    logits_soft_cap: float | None
    softmax_scale: float | None
    fwd_params: _Blocks
    bwd_params: _Blocks
    fused_backward: bool
    attention_mask: _Array | None
    dropout_prob: float
    dropout_seed: SupportsIndex | _Array
    kv_lengths: _Array | None
    padding_segment_id: int | None
    causal_alignment: _Alignment

class _RingOptions(_Options, total=False):
    partition: str | Partition

class Error(Exception):
    code: int
    fix: str
    def __init__(self, message: str = "", fix: str = "") -> None: ...

class InvalidArgument(Error, ValueError): ...
class BadData(Error): ...
class Unsupported(Error): ...
class InternalError(Error): ...
class OutOfMemory(Error, MemoryError): ...
class IoError(Error, OSError): ...

class CommError(Error):
    rank: int

class PeerTimeout(CommError): ...
class PeerMismatch(CommError): ...
class PayloadCorrupt(CommError): ...
class ConfigError(Error): ...
class Interrupted(Error): ...

class FwdParams(NamedTuple):
    q_blocksize: int | None = None
    kv_blocksize: int | None = None

class BwdParams(NamedTuple):
    q_blocksize: int | None = None
    kv_blocksize: int | None = None

class Gradients(NamedTuple, Generic[_A]):
    dq: _A
    dk: _A
    dv: _A
    dsoftmax_aux: _A | None = None
    dbias: _A | None = None

class Mask:
    def __init__(self, mask: object | None = None) -> None: ...
    # On the class: that mask alone. On a mask: both together, like &.
    @classmethod
    def full(cls) -> Mask: ...
    @classmethod
    def causal(cls, shift: int = 0) -> Mask: ...
    @classmethod
    def sliding_window(cls, left: int | None, right: int | None = ...) -> Mask: ...
    @classmethod
    def chunked(cls, chunk_size: SupportsIndex) -> Mask: ...
    @classmethod
    def prefix(cls, length: SupportsIndex) -> Mask: ...
    @classmethod
    def dense(cls, visible: _Array) -> Mask: ...
    @classmethod
    def block_sparse(cls, block: SupportsIndex, visible: _Array) -> Mask: ...
    def __and__(self, other: Mask) -> Mask: ...
    def __or__(self, other: Mask) -> Mask: ...
    def visible(self, query: int, key: int) -> bool: ...

class Partition:
    def __init__(self, name: str | Partition = "contiguous") -> None: ...
    @staticmethod
    def contiguous() -> Partition: ...
    @staticmethod
    def striped() -> Partition: ...
    @staticmethod
    def zigzag() -> Partition: ...
    @staticmethod
    def from_positions(positions: Iterable[_Array | Iterable[int]]) -> Partition: ...
    def positions(self, rank: int, world_size: int, seq_len: int) -> list[int]: ...

class Communicator:
    def __init__(self, comm: object) -> None: ...
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @staticmethod
    def from_mpi(comm: object) -> Communicator: ...
    @staticmethod
    def from_launcher() -> Communicator: ...

class Mesh:
    axes: dict[str, int]
    def __init__(self, comm: Communicator, axes: Mapping[str, int]) -> None: ...
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def coordinates(self) -> dict[str, int]: ...
    def ring(self, axis_name: str) -> Communicator: ...

class Plan:
    op: str
    target: str
    arithmetic: str
    mask: str
    workers: int
    threads_per_worker: int
    partition: str
    q_rows: list[int]
    kv_rows: list[int]
    pairs_visible: int
    pairs_total: int
    flops: float
    bytes_sent_per_rank: list[int]
    strip_rows: int
    tile_keys: int
    panel_keys: int
    item_rows: int
    peak_bytes: int
    notes: list[str]
    steps: list[dict[str, int]]
    backward: dict[str, Any]
    def __init__(self, operation: str, entries: Mapping[str, Any]) -> None: ...
    def to_dict(self) -> dict[str, Any]: ...

@overload
def ring_attention(
    query: _A, key: _A, value: _A, q_segment_ids: _Array | None = None, kv_segment_ids: _Array | None = None,
    softmax_aux: _Array | None = None, bias: _Array | None = None, mask_builder: Mask | _MaskBuilder | None = None,
    sliding_window: _Window = None, chunk_size: int | None = None, causal: bool = False,
    logits_soft_cap: float | None = None, softmax_scale: float | None = None, axis_name: str | None = None,
    fwd_params: _Blocks = None, bwd_params: _Blocks = None, fused_backward: bool = False, *,
    attention_mask: _Array | None = None, dropout_prob: float = 0.0, dropout_seed: SupportsIndex | _Array = 0,
    kv_lengths: _Array | None = None, padding_segment_id: int | None = None, causal_alignment: _Alignment = "top_left",
    workers: SupportsIndex | None = None, partition: str | Partition = "contiguous",
    comm: Communicator | Mesh | None = None, return_lse: Literal[False] = False, out: _A | None = None,
) -> _A: ...  # fmt: skip
@overload
def ring_attention(
    query: _A, key: _A, value: _A, q_segment_ids: _Array | None = None, kv_segment_ids: _Array | None = None,
    softmax_aux: _Array | None = None, bias: _Array | None = None, mask_builder: Mask | _MaskBuilder | None = None,
    sliding_window: _Window = None, chunk_size: int | None = None, causal: bool = False,
    logits_soft_cap: float | None = None, softmax_scale: float | None = None, axis_name: str | None = None,
    fwd_params: _Blocks = None, bwd_params: _Blocks = None, fused_backward: bool = False, *,
    attention_mask: _Array | None = None, dropout_prob: float = 0.0, dropout_seed: SupportsIndex | _Array = 0,
    kv_lengths: _Array | None = None, padding_segment_id: int | None = None, causal_alignment: _Alignment = "top_left",
    workers: SupportsIndex | None = None, partition: str | Partition = "contiguous",
    comm: Communicator | Mesh | None = None, return_lse: Literal[True], out: _A | None = None,
) -> tuple[_A, _A]: ...  # fmt: skip
@overload
def ring_attention(
    query: _A, key: _A, value: _A, q_segment_ids: _Array | None = None, kv_segment_ids: _Array | None = None,
    softmax_aux: _Array | None = None, bias: _Array | None = None, mask_builder: Mask | _MaskBuilder | None = None,
    sliding_window: _Window = None, chunk_size: int | None = None, causal: bool = False,
    logits_soft_cap: float | None = None, softmax_scale: float | None = None, axis_name: str | None = None,
    fwd_params: _Blocks = None, bwd_params: _Blocks = None, fused_backward: bool = False, *,
    attention_mask: _Array | None = None, dropout_prob: float = 0.0, dropout_seed: SupportsIndex | _Array = 0,
    kv_lengths: _Array | None = None, padding_segment_id: int | None = None, causal_alignment: _Alignment = "top_left",
    workers: SupportsIndex | None = None, partition: str | Partition = "contiguous",
    comm: Communicator | Mesh | None = None, return_lse: bool, out: _A | None = None,
) -> _A | tuple[_A, _A]: ...  # fmt: skip
@overload
def attention(
    query: _A, key: _A, value: _A, *, causal: bool = False, causal_alignment: _Alignment = "bottom_right",
    sliding_window: _Window = None, chunk_size: int | None = None, q_segment_ids: _Array | None = None,
    kv_segment_ids: _Array | None = None, padding_segment_id: int | None = None, kv_lengths: _Array | None = None,
    attention_mask: _Array | None = None, mask_builder: Mask | _MaskBuilder | None = None,
    softmax_scale: float | None = None, logits_soft_cap: float | None = None, softmax_aux: _Array | None = None,
    bias: _Array | None = None, dropout_prob: float = 0.0, dropout_seed: SupportsIndex | _Array = 0,
    fwd_params: _Blocks = None, bwd_params: _Blocks = None, fused_backward: bool = True,
    return_lse: Literal[False] = False, out: _A | None = None,
) -> _A: ...  # fmt: skip
@overload
def attention(
    query: _A, key: _A, value: _A, *, causal: bool = False, causal_alignment: _Alignment = "bottom_right",
    sliding_window: _Window = None, chunk_size: int | None = None, q_segment_ids: _Array | None = None,
    kv_segment_ids: _Array | None = None, padding_segment_id: int | None = None, kv_lengths: _Array | None = None,
    attention_mask: _Array | None = None, mask_builder: Mask | _MaskBuilder | None = None,
    softmax_scale: float | None = None, logits_soft_cap: float | None = None, softmax_aux: _Array | None = None,
    bias: _Array | None = None, dropout_prob: float = 0.0, dropout_seed: SupportsIndex | _Array = 0,
    fwd_params: _Blocks = None, bwd_params: _Blocks = None, fused_backward: bool = True,
    return_lse: Literal[True], out: _A | None = None,
) -> tuple[_A, _A]: ...  # fmt: skip
@overload
def attention(
    query: _A, key: _A, value: _A, *, causal: bool = False, causal_alignment: _Alignment = "bottom_right",
    sliding_window: _Window = None, chunk_size: int | None = None, q_segment_ids: _Array | None = None,
    kv_segment_ids: _Array | None = None, padding_segment_id: int | None = None, kv_lengths: _Array | None = None,
    attention_mask: _Array | None = None, mask_builder: Mask | _MaskBuilder | None = None,
    softmax_scale: float | None = None, logits_soft_cap: float | None = None, softmax_aux: _Array | None = None,
    bias: _Array | None = None, dropout_prob: float = 0.0, dropout_seed: SupportsIndex | _Array = 0,
    fwd_params: _Blocks = None, bwd_params: _Blocks = None, fused_backward: bool = True, return_lse: bool,
    out: _A | None = None,
) -> _A | tuple[_A, _A]: ...  # fmt: skip
def attention_backward(
    dout: _A, query: _A, key: _A, value: _A, out: _A, lse: _Array, *, causal: bool = False,
    causal_alignment: _Alignment = "bottom_right", sliding_window: _Window = None, chunk_size: int | None = None,
    q_segment_ids: _Array | None = None, kv_segment_ids: _Array | None = None, padding_segment_id: int | None = None,
    kv_lengths: _Array | None = None, attention_mask: _Array | None = None,
    mask_builder: Mask | _MaskBuilder | None = None, softmax_scale: float | None = None,
    logits_soft_cap: float | None = None, softmax_aux: _Array | None = None, bias: _Array | None = None,
    dropout_prob: float = 0.0, dropout_seed: SupportsIndex | _Array = 0, fwd_params: _Blocks = None,
    bwd_params: _Blocks = None, fused_backward: bool = True, workers: SupportsIndex | None = None,
    partition: str | Partition = "contiguous", axis_name: str | None = None, comm: Communicator | Mesh | None = None,
    dlse: _Array | None = None, want_dbias: bool = False,
) -> Gradients[_A]: ...  # fmt: skip
def merge(out_a: _A, lse_a: _Lse, out_b: _A, lse_b: _Lse) -> tuple[_A, _Lse]: ...
def explain(
    operation: Literal["attention", "ring_attention", "attention_backward"], query: _Array, key: _Array, value: _Array,
    *, workers: SupportsIndex | None = None, return_lse: bool = False, **options: Unpack[_RingOptions],
) -> Plan: ...  # fmt: skip
def doctor() -> dict[str, Any]: ...
def run_workers(
    fn: Callable[[Communicator], _T], world_size: SupportsIndex, *, timeout_s: float | None = 30.0
) -> list[_T]: ...
