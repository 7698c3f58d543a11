from typing import SupportsIndex

from torch import Tensor
from typing_extensions import Unpack

from . import Communicator, Mesh, Partition, _Options

__all__ = ["context_parallel_attention", "scaled_dot_product_attention"]

def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *,
    workers: SupportsIndex | None = None,
) -> Tensor: ...  # fmt: skip
def context_parallel_attention(
    query: Tensor, key: Tensor, value: Tensor, *, comm: Communicator | Mesh, axis_name: str | None = None,
    partition: str | Partition = "contiguous", is_causal: bool = False, scale: float | None = None,
    **options: Unpack[_Options],
) -> Tensor: ...  # fmt: skip
