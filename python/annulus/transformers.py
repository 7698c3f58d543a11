"""Annulus as an attention implementation of Transformers.

    import annulus.transformers

    annulus.transformers.register(workers=4)
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="annulus")     # or, of one that is loaded,
    model.set_attn_implementation("annulus")

Stock models run unchanged: causal and bidirectional ones, grouped heads, sliding windows, soft caps, sinks, position
biases, padded and packed batches, dynamic and static caches, training with dropout, float32 and bfloat16. Masks that
consist of causality, windows, packed sequences and padding need no memory of [q_len, kv_len].
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from . import _torch_ops
from ._errors import InvalidArgument, Unsupported
from ._operations import count_of_workers, ring_attention
from ._transformers_masks import RulesMask, annulus_mask

__all__ = ["annulus_attention", "annulus_mask", "register"]

_NAME = "annulus"
_workers = 1

# Keyword arguments that models hand through to attention and that do not change its result: the positions are in query
# and key already, or in the mask; the others speak to other parts of the model or to other implementations' memory
# management.
_NEUTRAL = frozenset(
    (
        "position_ids", "cache_position", "position_embeddings", "use_cache", "past_key_values", "num_items_in_batch",
        "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep", "max_length_q", "max_length_k",
        "seq_idx", "deterministic", "encoder_hidden_states", "is_first_iteration",
    )
)  # fmt: skip


def register(workers=None):
    """Makes ``attn_implementation="annulus"`` known to Transformers: the attention and its mask function.

    workers: threads of a ring in this process that every attention call is dealt to; None or 1: one pass. Calling
    register again changes the number for all models. Raises InvalidArgument for a number below 1.
    """
    global _workers
    _workers = count_of_workers("annulus.transformers.register", workers)
    AttentionInterface.register(_NAME, annulus_attention)
    AttentionMaskInterface.register(_NAME, annulus_mask)


def _refuse(what, fix):
    raise Unsupported(f"annulus.transformers: {what}", fix)


def _check(module, kwargs):
    for name, value in kwargs.items():
        if value is not None and name not in _NEUTRAL:
            _refuse(
                f"attention of {type(module).__name__} gets {name}, whose meaning is not known here",
                'leave it out, or use attn_implementation="eager" for this model',
            )


def _segments_of(name, cu_seq_lens, length):
    """Segment ids [1, length] of cumulative lengths."""
    ends = cu_seq_lens[1:].contiguous()
    if not torch.compiler.is_compiling() and int(cu_seq_lens[-1]) != length:
        raise InvalidArgument(
            f"annulus.transformers: {name} ends at {int(cu_seq_lens[-1])}, expected the sequence's length, {length}"
        )
    return torch.searchsorted(ends, torch.arange(length, dtype=ends.dtype), right=True).to(torch.int32).unsqueeze(0)


def _packed(options, cu_q, cu_k, query, key):
    """The options with the sequences of cu_seq_lens kept apart from each other."""
    if cu_q is None or cu_k is None:
        raise InvalidArgument(
            "annulus.transformers: cu_seq_lens_q and cu_seq_lens_k come together, one of them is missing"
        )
    if query.shape[0] != 1 or key.shape[0] != 1:
        _refuse(f"cu_seq_lens with a batch of {query.shape[0]}", "pack the sequences into a batch of 1")
    q_ids = _segments_of("cu_seq_lens_q", cu_q, query.shape[2])
    kv_ids = q_ids if cu_k is cu_q else _segments_of("cu_seq_lens_k", cu_k, key.shape[2])
    if (options.get("causal") or options.get("sliding_window")) and cu_k is not cu_q and not torch.equal(cu_q, cu_k):
        _refuse(
            "cu_seq_lens_q differs from cu_seq_lens_k under a causal mask or window", "pass equal ones, and no cache"
        )
    others = options.get("q_segment_ids"), options.get("kv_segment_ids")
    if others[0] is not None:
        # Both must agree: one id for each pair of ids.
        many = int(max(others[0].max(), others[1].max())) + 1
        q_ids, kv_ids = q_ids * many + others[0], kv_ids * many + others[1]
    return {**options, "q_segment_ids": q_ids, "kv_segment_ids": kv_ids}


def _from_none(module, query, key, is_causal, sliding_window):
    """The options of a call without a mask: everything is visible, or causal by the module's word."""
    q_len, kv_len = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    options = {}
    if causal and q_len > 1:
        if q_len != kv_len:
            _refuse(
                f"{type(module).__name__} is causal with {q_len} queries and {kv_len} keys and gives no mask: where "
                "the queries stand is not said",
                "pass attention_mask, or is_causal=False",
            )
        options["causal"] = True
    if sliding_window is not None and kv_len > sliding_window:
        if not options:
            _refuse(
                f"{type(module).__name__} has sliding_window={sliding_window} and gives no mask for its {kv_len} keys",
                "pass attention_mask",
            )
        options["sliding_window"] = (sliding_window - 1, None)
    return options


def _from_tensor(mask, query):
    """The options of a dense mask of Transformers or of the user: bool hides, numbers are added."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        found = f"shape {list(mask.shape)}" if isinstance(mask, torch.Tensor) else f"type {type(mask).__name__}"
        raise InvalidArgument(
            f"annulus.transformers: attention_mask has {found}, expected [batch, heads or 1, q_len, kv_len]"
        )
    if mask.dtype == torch.bool:
        return {"attention_mask": mask}
    # The lowest number of a type stands for -inf; added to a score it would leave the type's range.
    lowest = torch.finfo(mask.dtype).min / 2
    visible = mask > lowest
    if not torch.compiler.is_compiling() and not mask.requires_grad and not mask.masked_fill(~visible, 0).any():
        return {"attention_mask": visible}
    return {"attention_mask": visible, "bias": _bias(mask.clamp(min=lowest), query)}


def _bias(bias, query):
    return bias if bias.dtype in (torch.float32, query.dtype) else bias.float()


def annulus_attention(
    module, query, key, value, attention_mask=None, dropout=0.0, scaling=None, is_causal=None, sliding_window=None,
    softcap=None, s_aux=None, position_bias=None, cu_seq_lens_q=None, cu_seq_lens_k=None, output_attentions=False,
    **kwargs,
):  # fmt: skip
    """Transformers' attention function: query [batch, heads, q_len, dim], key and value [batch, kv_heads, kv_len, dim]
    to (out [batch, q_len, heads, dim], None).

    A mask says which keys are visible, and then ``is_causal`` and ``sliding_window`` add nothing to it; without a mask
    they do. Raises Unsupported for attention weights, which are never computed, and for keyword arguments that are not
    known.
    """
    if output_attentions or getattr(getattr(module, "config", None), "output_attentions", False):
        _refuse(
            "attention weights (output_attentions=True) are never computed", 'use attn_implementation="eager" for them'
        )
    _check(module, kwargs)
    if query.shape[0] != key.shape[0] and 1 in (query.shape[0], key.shape[0]):
        batch = max(query.shape[0], key.shape[0])
        query, key, value = (t.expand(batch, -1, -1, -1) for t in (query, key, value))
    if not query.dtype == key.dtype == value.dtype and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if isinstance(attention_mask, RulesMask):
        found, expected = (query.shape[2], key.shape[2]), tuple(attention_mask.shape[2:])
        if found != expected:
            raise InvalidArgument(
                f"annulus.transformers: {found[0]} queries and {found[1]} keys have a mask of {list(expected)}"
            )
        if attention_mask.options is None:
            options = _from_tensor(attention_mask.dense(), query)
        else:
            options, keys = dict(attention_mask.options), attention_mask.keys
            if keys < key.shape[2]:
                key, value = key[:, :, :keys], value[:, :, :keys]
                position_bias = None if position_bias is None else position_bias[..., :keys]
    elif attention_mask is None:
        options = _from_none(module, query, key, is_causal, sliding_window)
    else:
        options = _from_tensor(attention_mask, query)
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        options = _packed(options, cu_seq_lens_q, cu_seq_lens_k, query, key)
    if position_bias is not None:
        bias = _bias(position_bias, query)
        options["bias"] = bias if options.get("bias") is None else bias + options["bias"]
    if dropout and getattr(module, "training", True):
        options.update(dropout_prob=dropout, dropout_seed=_torch_ops.drawn_seed())
    if isinstance(scaling, torch.Tensor):
        query, scaling = query * scaling.to(query.dtype), 1.0
    # A decoding step has no rows to deal.
    workers = _workers if query.shape[2] >= _workers > 1 else None
    partition = "zigzag" if workers and options.get("causal") else "contiguous"
    out = ring_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), softmax_scale=scaling,
        logits_soft_cap=softcap, softmax_aux=s_aux, workers=workers, partition=partition, **options,
    )  # fmt: skip
    return out, None
