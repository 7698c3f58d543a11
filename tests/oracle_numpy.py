"""A second oracle, written from the formula alone: attention in float64 with whole arrays.

    s   = softmax_scale * q k^T, capped, plus bias
    L   = log(sum over visible keys exp(s) + sum over sinks exp(a))
    out = sum over visible keys exp(s - L) keep / (1 - dropout_prob) v

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


def mul_hi_lo(a, b):
    """High and low words of the 64-bit products of 32-bit words, each in a uint64."""
    product = a * b
    return product >> np.uint64(32), product & np.uint64(0xFFFFFFFF)


def philox_first_word(seed, *counter):
    """First output word of Philox 4x32-10 for arrays of counter words that broadcast together."""
    word = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (np.asarray(c).astype(np.uint64) & word for c in counter)
    for r in range(10):
        k0 = np.uint64((seed + r * 0x9E3779B9) & 0xFFFFFFFF)
        k1 = np.uint64(((seed >> 32) + r * 0xBB67AE85) & 0xFFFFFFFF)
        hi0, lo0 = mul_hi_lo(c0, np.uint64(0xD2511F53))
        hi1, lo1 = mul_hi_lo(c2, np.uint64(0xCD9E8D57))
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
    return c0


def kept_pairs(batch, num_heads, q_len, kv_len, dropout_prob, dropout_seed):
    """Boolean [batch, num_heads, q_len, kv_len]; a word is dropped iff below dropout_prob * 2^32."""
    if not 0 <= dropout_prob < 1:
        raise ValueError(f"dropout_prob is {dropout_prob}, expected a number in [0, 1)")
    words = philox_first_word(dropout_seed, *np.ix_(range(batch), range(num_heads), range(q_len),
                                                    range(kv_len)))
    return words.astype(np.float64) >= dropout_prob * 2.0 ** 32


def scores(q, k, softmax_scale, logits_soft_cap, bias):
    """Scores [batch, heads, q_len, kv_len] and their derivative by softmax_scale * q k^T."""
    s = np.einsum("bihd,bjhd->bhij", q, k)
    s = s * (q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale)
    slope = np.ones_like(s)
    if logits_soft_cap:
        s = logits_soft_cap * np.tanh(s / logits_soft_cap)
        slope = 1 - (s / logits_soft_cap) ** 2
    return (s if bias is None else s + np.asarray(bias, np.float64)), slope


def softmax(s, keep, sinks):
    """Probabilities of keys and sinks and lse; masked pairs weigh exactly 0."""
    s = np.where(keep, s, -np.inf)  # exp(-inf) = 0: a masked pair is not in the sums
    sinks = np.broadcast_to(sinks[None, :, None, :], s.shape[:3] + sinks.shape[1:])
    columns = np.concatenate([s, sinks], axis=-1)
    peak = np.max(columns, axis=-1, keepdims=True, initial=-np.inf)
    shift = np.where(np.isneginf(peak), 0.0, peak)
    lse = shift + np.log(np.sum(np.exp(columns - shift), axis=-1, keepdims=True))
    lse = np.where(np.isposinf(peak), np.inf, lse)
    p = np.where(np.isneginf(lse), 0.0, np.exp(columns - lse))
    return p[..., :s.shape[-1]], p[..., s.shape[-1]:], lse


def attention(q, k, v, *, softmax_scale=None, logits_soft_cap=None, bias=None, softmax_aux=None,
              dropout_prob=0.0, dropout_seed=0, **visibility):
    """Returns out [batch, q_len, num_heads, v_head_dim] and lse [batch, num_heads, q_len]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, q_len, num_heads, _ = q.shape
    kv_len, num_kv_heads = k.shape[1:3]
    k, v = (np.repeat(x, num_heads // num_kv_heads, axis=2) for x in (k, v))
    keep = visible_pairs(batch, num_heads, num_kv_heads, q_len, kv_len, **visibility)

    with np.errstate(all="ignore"):
        s, _ = scores(q, k, softmax_scale, logits_soft_cap, bias)
        p, _, lse = softmax(s, keep, sinks_per_head(softmax_aux, num_heads))
        seen = keep & ~np.isneginf(lse)
        seen &= kept_pairs(batch, num_heads, q_len, kv_len, dropout_prob, dropout_seed)
        p = p / (1 - dropout_prob)

        # One key at a time, so that 0 * NaN of a masked value cannot enter.
        out = np.zeros((batch, num_heads, q_len, v.shape[3]))
        for j in range(kv_len):
            term = p[..., j, None] * v[:, None, j].swapaxes(1, 2)
            out += np.where(seen[..., j, None], term, 0.0)
    return out.transpose(0, 2, 1, 3), lse[..., 0]


def sum_to(x, shape):
    """Sums x over the axes that are 1 in shape: the gradient of a broadcast."""
    axes = tuple(a for a, n in enumerate(shape) if n == 1 and x.shape[a] != 1)
    return x.sum(axis=axes, keepdims=True)


def attention_backward(dout, q, k, v, *, out=None, softmax_scale=None, logits_soft_cap=None,
                       bias=None, softmax_aux=None, dropout_prob=0.0, dropout_seed=0,
                       **visibility):
    """Gradients for dout: a dict of dq, dk, dv and, where given, dbias and dsoftmax_aux.

    Without `out`, sum(dout * out) is taken as the sum of p * dp over the row, never from out. Inputs
    must be finite where a pair is visible; what is hidden may hold anything.
    """
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    batch, q_len, num_heads, _ = q.shape
    kv_len, num_kv_heads = k.shape[1:3]
    group = num_heads // num_kv_heads
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    keep = visible_pairs(batch, num_heads, num_kv_heads, q_len, kv_len, **visibility)
    sinks = sinks_per_head(softmax_aux, num_heads)

    def zero_unless(used, x):  # a row or key that no pair uses must not bring NaN into a product
        return np.where(used.transpose(0, 2, 1)[..., None], x, 0.0)

    with np.errstate(all="ignore"):
        s, slope = scores(q, k, softmax_scale, logits_soft_cap, bias)
        p, p_sinks, lse = softmax(s, keep, sinks)
        live = keep & ~np.isneginf(lse)
        rows = live.any(axis=3)
        kept = live & kept_pairs(batch, num_heads, q_len, kv_len, dropout_prob, dropout_seed)
        q, k = zero_unless(rows, q), zero_unless(live.any(axis=2), k)
        dout = zero_unless(rows, dout)
        drop_scale = kept / (1 - dropout_prob)
        dp = np.where(kept, np.einsum("bihd,bjhd->bhij", dout, v), 0.0) * drop_scale
        if out is None:
            delta = np.sum(np.where(live, p * dp, 0.0), axis=3)
        else:
            delta = np.einsum("bihd,bihd->bhi", dout, zero_unless(rows, np.asarray(out, np.float64)))
        ds = np.where(live, p * (dp - delta[..., None]), 0.0)
        scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
        dot = scale * np.where(live, ds * slope, 0.0)
        weight = np.where(kept, p * drop_scale, 0.0)

        def sum_groups(x):
            return x.reshape(batch, kv_len, num_kv_heads, group, -1).sum(axis=3)

        grads = {"dq": np.einsum("bhij,bjhd->bihd", dot, k),
                 "dk": sum_groups(np.einsum("bhij,bihd->bjhd", dot, q)),
                 "dv": sum_groups(np.einsum("bhij,bihd->bjhd", weight, dout))}
        if bias is not None:
            grads["dbias"] = sum_to(ds, np.shape(bias))
        if softmax_aux is not None:
            per_head = -np.einsum("bhin,bhi->hn", np.where(rows[..., None], p_sinks, 0.0), delta)
            shape = np.shape(softmax_aux)
            shared = len(shape) == 1 and shape[0] != num_heads
            grads["dsoftmax_aux"] = per_head.sum(axis=0) if shared else per_head.reshape(shape)
    return grads
