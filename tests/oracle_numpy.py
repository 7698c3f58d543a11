"""A second oracle, written from the formula alone: attention in float64 with whole arrays.

    s   = softmax_scale * q k^T, capped, plus bias
    L   = log(sum over visible keys exp(s) + sum over sinks exp(a))
    out = sum over visible keys exp(s - L) v

Nothing here is shared with the C++ code, and nothing is fast. Arrays are [batch, seq, heads, dim].
"""

import numpy as np


def visible_pairs(batch, num_heads, num_kv_heads, q_len, kv_len, *, causal=False,
                  causal_alignment="bottom_right", sliding_window=None, chunk_size=None,
                  q_segment_ids=None, kv_segment_ids=None, padding_segment_id=None,
                  kv_lengths=None, attention_mask=None, mask_builder=None):
    """Boolean [batch, num_heads, q_len, kv_len]: the AND of all rules that are given."""
    i = np.arange(q_len)[:, None]
    j = np.arange(kv_len)[None, :]
    moved = i + {"bottom_right": kv_len - q_len, "top_left": 0}[causal_alignment]

    keep = np.ones((batch, num_heads, q_len, kv_len), bool)
    if causal:
        keep &= j <= moved
    if sliding_window is not None:
        sides = sliding_window if np.iterable(sliding_window) else (sliding_window,) * 2
        left, right = (np.inf if side in (None, -1) else side for side in sides)
        keep &= (moved - left <= j) & (j <= moved + right)
    if chunk_size:
        keep &= (i // chunk_size == j // chunk_size) & (j <= i)
    if q_segment_ids is not None or kv_segment_ids is not None:
        q_ids = np.asarray(kv_segment_ids if q_segment_ids is None else q_segment_ids)[:, :, None]
        kv_ids = np.asarray(q_segment_ids if kv_segment_ids is None else kv_segment_ids)[:, None, :]
        same = q_ids == kv_ids
        if padding_segment_id is not None:
            same &= (q_ids != padding_segment_id) & (kv_ids != padding_segment_id)
        keep &= same[:, None]
    if kv_lengths is not None:
        keep &= j < np.asarray(kv_lengths)[:, None, None, None]
    if attention_mask is not None:
        keep &= np.asarray(attention_mask).astype(bool)
    if mask_builder is not None:
        reps = num_heads // num_kv_heads
        for h in range(num_heads):
            keep[:, h] &= np.asarray(mask_builder(q_len, kv_len, num_heads, h, reps), bool)
    return keep


def sinks_per_head(softmax_aux, num_heads):
    """[num_heads, n], n may be 0."""
    if softmax_aux is None:
        return np.zeros((num_heads, 0))
    aux = np.asarray(softmax_aux, np.float64)
    if aux.ndim == 2:
        return aux
    return aux[:, None] if len(aux) == num_heads else np.tile(aux, (num_heads, 1))


def attention(q, k, v, *, softmax_scale=None, logits_soft_cap=None, bias=None, softmax_aux=None,
              **visibility):
    """Returns out [batch, q_len, num_heads, v_head_dim] and lse [batch, num_heads, q_len]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, q_len, num_heads, head_dim = q.shape
    kv_len, num_kv_heads = k.shape[1:3]
    k, v = (np.repeat(x, num_heads // num_kv_heads, axis=2) for x in (k, v))
    keep = visible_pairs(batch, num_heads, num_kv_heads, q_len, kv_len, **visibility)
    sinks = np.broadcast_to(sinks_per_head(softmax_aux, num_heads)[None, :, None, :],
                            (batch, num_heads, q_len, sinks_per_head(softmax_aux, num_heads).shape[1]))

    with np.errstate(all="ignore"):
        s = np.einsum("bihd,bjhd->bhij", q, k)
        s = s * (head_dim ** -0.5 if softmax_scale is None else softmax_scale)
        if logits_soft_cap:
            s = logits_soft_cap * np.tanh(s / logits_soft_cap)
        if bias is not None:
            s = s + np.asarray(bias, np.float64)
        s = np.where(keep, s, -np.inf)  # exp(-inf) = 0: a masked pair is not in the sums

        columns = np.concatenate([s, sinks], axis=-1)
        peak = np.max(columns, axis=-1, keepdims=True, initial=-np.inf)
        shift = np.where(np.isinf(peak) & (peak < 0), 0.0, peak)
        lse = shift + np.log(np.sum(np.exp(columns - shift), axis=-1, keepdims=True))
        lse = np.where(np.isposinf(peak), np.inf, lse)
        p = np.where(np.isneginf(lse), 0.0, np.exp(s - lse))

        # One key at a time, so that 0 * NaN of a masked value cannot enter.
        out = np.zeros((batch, num_heads, q_len, v.shape[3]))
        seen = keep & ~np.isneginf(lse)
        for j in range(kv_len):
            term = p[..., j, None] * v[:, None, j].swapaxes(1, 2)
            out += np.where(seen[..., j, None], term, 0.0)
    return out.transpose(0, 2, 1, 3), lse[..., 0]
