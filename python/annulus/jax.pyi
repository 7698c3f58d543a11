from typing import Any, Literal, SupportsIndex, overload

from jax import Array
from numpy.typing import NDArray

from . import Mask, Partition, _Alignment, _Blocks, _MaskBuilder, _Window

__all__ = ["attention", "ring_attention"]

_In = Array | NDArray[Any]

@overload
def ring_attention(
    query: _In, key: _In, value: _In, q_segment_ids: _In | None = None, kv_segment_ids: _In | None = None,
    softmax_aux: _In | None = None, bias: _In | None = None, mask_builder: Mask | _MaskBuilder | None = None,
    sliding_window: _Window = None, chunk_size: int | None = None, causal: bool = False,
    logits_soft_cap: float | None = None, softmax_scale: float | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    fwd_params: _Blocks = None, bwd_params: _Blocks = None, fused_backward: bool = False, *,
    attention_mask: _In | None = None, dropout_prob: float = 0.0, dropout_seed: SupportsIndex | _In = 0,
    kv_lengths: _In | None = None, padding_segment_id: int | None = None, causal_alignment: _Alignment = "top_left",
    workers: SupportsIndex | None = None, partition: str | Partition = "contiguous",
    return_lse: Literal[False] = False, timeout_s: float | None = 30.0,
) -> Array: ...  # fmt: skip
@overload
def ring_attention(
    query: _In, key: _In, value: _In, q_segment_ids: _In | None = None, kv_segment_ids: _In | None = None,
    softmax_aux: _In | None = None, bias: _In | None = None, mask_builder: Mask | _MaskBuilder | None = None,
    sliding_window: _Window = None, chunk_size: int | None = None, causal: bool = False,
    logits_soft_cap: float | None = None, softmax_scale: float | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    fwd_params: _Blocks = None, bwd_params: _Blocks = None, fused_backward: bool = False, *,
    attention_mask: _In | None = None, dropout_prob: float = 0.0, dropout_seed: SupportsIndex | _In = 0,
    kv_lengths: _In | None = None, padding_segment_id: int | None = None, causal_alignment: _Alignment = "top_left",
    workers: SupportsIndex | None = None, partition: str | Partition = "contiguous",
    return_lse: Literal[True], timeout_s: float | None = 30.0,
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def ring_attention(
    query: _In, key: _In, value: _In, q_segment_ids: _In | None = None, kv_segment_ids: _In | None = None,
    softmax_aux: _In | None = None, bias: _In | None = None, mask_builder: Mask | _MaskBuilder | None = None,
    sliding_window: _Window = None, chunk_size: int | None = None, causal: bool = False,
    logits_soft_cap: float | None = None, softmax_scale: float | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    fwd_params: _Blocks = None, bwd_params: _Blocks = None, fused_backward: bool = False, *,
    attention_mask: _In | None = None, dropout_prob: float = 0.0, dropout_seed: SupportsIndex | _In = 0,
    kv_lengths: _In | None = None, padding_segment_id: int | None = None, causal_alignment: _Alignment = "top_left",
    workers: SupportsIndex | None = None, partition: str | Partition = "contiguous",
    return_lse: bool, timeout_s: float | None = 30.0,
) -> Array | tuple[Array, Array]: ...  # fmt: skip
@overload
def attention(
    query: _In, key: _In, value: _In, *, causal: bool = False, causal_alignment: _Alignment = "bottom_right",
    sliding_window: _Window = None, chunk_size: int | None = None, q_segment_ids: _In | None = None,
    kv_segment_ids: _In | None = None, padding_segment_id: int | None = None, kv_lengths: _In | None = None,
    attention_mask: _In | None = None, mask_builder: Mask | _MaskBuilder | None = None,
    softmax_scale: float | None = None, logits_soft_cap: float | None = None, softmax_aux: _In | None = None,
    bias: _In | None = None, dropout_prob: float = 0.0, dropout_seed: SupportsIndex | _In = 0,
    fwd_params: _Blocks = None, bwd_params: _Blocks = None, fused_backward: bool = True,
    return_lse: Literal[False] = False,
) -> Array: ...  # fmt: skip
@overload
def attention(
    query: _In, key: _In, value: _In, *, causal: bool = False, causal_alignment: _Alignment = "bottom_right",
    sliding_window: _Window = None, chunk_size: int | None = None, q_segment_ids: _In | None = None,
    kv_segment_ids: _In | None = None, padding_segment_id: int | None = None, kv_lengths: _In | None = None,
    attention_mask: _In | None = None, mask_builder: Mask | _MaskBuilder | None = None,
    softmax_scale: float | None = None, logits_soft_cap: float | None = None, softmax_aux: _In | None = None,
    bias: _In | None = None, dropout_prob: float = 0.0, dropout_seed: SupportsIndex | _In = 0,
    fwd_params: _Blocks = None, bwd_params: _Blocks = None, fused_backward: bool = True,
    return_lse: Literal[True],
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def attention(
    query: _In, key: _In, value: _In, *, causal: bool = False, causal_alignment: _Alignment = "bottom_right",
    sliding_window: _Window = None, chunk_size: int | None = None, q_segment_ids: _In | None = None,
    kv_segment_ids: _In | None = None, padding_segment_id: int | None = None, kv_lengths: _In | None = None,
    attention_mask: _In | None = None, mask_builder: Mask | _MaskBuilder | None = None,
    softmax_scale: float | None = None, logits_soft_cap: float | None = None, softmax_aux: _In | None = None,
    bias: _In | None = None, dropout_prob: float = 0.0, dropout_seed: SupportsIndex | _In = 0,
    fwd_params: _Blocks = None, bwd_params: _Blocks = None, fused_backward: bool = True, return_lse: bool,
) -> Array | tuple[Array, Array]: ...  # fmt: skip
