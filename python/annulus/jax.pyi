from typing import Any, Literal, SupportsIndex, overload

from jax import Array

from . import Mask, Partition, _Alignment, _Blocks, _MaskBuilder, _Window

__all__ = ["attention", "ring_attention"]

_Input = Any  # an array of JAX, a tracer, or what JAX makes an array of

@overload
def ring_attention(
    query: _Input, key: _Input, value: _Input, q_segment_ids: _Input | None = None, kv_segment_ids: _Input | None = None,
    softmax_aux: _Input | None = None, bias: _Input | None = None, mask_builder: Mask | _MaskBuilder | None = None,
    sliding_window: _Window = None, chunk_size: int | None = None, causal: bool = False,
    logits_soft_cap: float | None = None, softmax_scale: float | None = None,
    axis_name: str | tuple[str, ...] | None = None, fwd_params: _Blocks = None, bwd_params: _Blocks = None,
    fused_backward: bool = False, *, attention_mask: _Input | None = None, dropout_prob: float = 0.0,
    dropout_seed: SupportsIndex = 0, kv_lengths: _Input | None = None, padding_segment_id: int | None = None,
    causal_alignment: _Alignment = "top_left", workers: SupportsIndex | None = None,
    partition: str | Partition = "contiguous", return_lse: Literal[False] = False, timeout_s: float = 30.0,
) -> Array: ...  # fmt: skip
@overload
def ring_attention(
    query: _Input, key: _Input, value: _Input, q_segment_ids: _Input | None = None, kv_segment_ids: _Input | None = None,
    softmax_aux: _Input | None = None, bias: _Input | None = None, mask_builder: Mask | _MaskBuilder | None = None,
    sliding_window: _Window = None, chunk_size: int | None = None, causal: bool = False,
    logits_soft_cap: float | None = None, softmax_scale: float | None = None,
    axis_name: str | tuple[str, ...] | None = None, fwd_params: _Blocks = None, bwd_params: _Blocks = None,
    fused_backward: bool = False, *, attention_mask: _Input | None = None, dropout_prob: float = 0.0,
    dropout_seed: SupportsIndex = 0, kv_lengths: _Input | None = None, padding_segment_id: int | None = None,
    causal_alignment: _Alignment = "top_left", workers: SupportsIndex | None = None,
    partition: str | Partition = "contiguous", return_lse: Literal[True], timeout_s: float = 30.0,
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def attention(
    query: _Input, key: _Input, value: _Input, *, causal: bool = False, causal_alignment: _Alignment = "bottom_right",
    sliding_window: _Window = None, chunk_size: int | None = None, q_segment_ids: _Input | None = None,
    kv_segment_ids: _Input | None = None, padding_segment_id: int | None = None, kv_lengths: _Input | None = None,
    attention_mask: _Input | None = None, mask_builder: Mask | _MaskBuilder | None = None,
    softmax_scale: float | None = None, logits_soft_cap: float | None = None, softmax_aux: _Input | None = None,
    bias: _Input | None = None, dropout_prob: float = 0.0, dropout_seed: SupportsIndex = 0, fwd_params: _Blocks = None,
    bwd_params: _Blocks = None, fused_backward: bool = True, return_lse: Literal[False] = False,
) -> Array: ...  # fmt: skip
@overload
def attention(
    query: _Input, key: _Input, value: _Input, *, causal: bool = False, causal_alignment: _Alignment = "bottom_right",
    sliding_window: _Window = None, chunk_size: int | None = None, q_segment_ids: _Input | None = None,
    kv_segment_ids: _Input | None = None, padding_segment_id: int | None = None, kv_lengths: _Input | None = None,
    attention_mask: _Input | None = None, mask_builder: Mask | _MaskBuilder | None = None,
    softmax_scale: float | None = None, logits_soft_cap: float | None = None, softmax_aux: _Input | None = None,
    bias: _Input | None = None, dropout_prob: float = 0.0, dropout_seed: SupportsIndex = 0, fwd_params: _Blocks = None,
    bwd_params: _Blocks = None, fused_backward: bool = True, return_lse: Literal[True],
) -> tuple[Array, Array]: ...  # fmt: skip
