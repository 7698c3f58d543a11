"""Attention by its formula in jax.numpy, float64, and what rounding may make of it: a second implementation."""

import jax
import jax.numpy as jnp
import numpy as np

UNIT = 2.0**-24  # of float32, in which Annulus adds up
# Rounding of results, and of probabilities and their gradients where a target multiplies them in that type.
ROUNDING = {"float32": UNIT, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def visible(shape, *, causal=False, bottom_right=False, window=None, chunk=None, q_ids=None, kv_ids=None, padding=None,
            kv_lengths=None, mask=None, rule=None):  # fmt: skip
    """bool [batch, heads, q_len, kv_len]: every rule that is given holds."""
    batch, heads, q_len, kv_len = shape
    i, j = np.arange(q_len)[:, None], np.arange(kv_len)[None, :]
    shifted = i + (kv_len - q_len if bottom_right else 0)
    sees = np.ones(shape, bool)
    if causal:
        sees &= j <= shifted
    if window is not None:
        left, right = window
        sees &= (j >= shifted - left) if left is not None else True
        sees &= (j <= shifted + right) if right is not None else True
    if chunk is not None:
        sees &= (i // chunk == j // chunk) & (j <= i)
    if q_ids is not None:
        q_ids, kv_ids = np.asarray(q_ids), np.asarray(q_ids if kv_ids is None else kv_ids)
        same = q_ids[:, :, None] == kv_ids[:, None, :]
        if padding is not None:
            same &= (q_ids[:, :, None] != padding) & (kv_ids[:, None, :] != padding)
        sees &= same[:, None]
    if kv_lengths is not None:
        sees &= j < np.asarray(kv_lengths)[:, None, None, None]
    if mask is not None:
        sees &= np.asarray(mask)
    if rule is not None:
        sees &= np.array([[[rule(h, a, b) for b in range(kv_len)] for a in range(q_len)] for h in range(heads)])
    return sees


def scores(query, key, bias, scale, cap):
    """[batch, heads, q_len, kv_len]."""
    key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
    s = jnp.einsum("bihd,bjhd->bhij", query, key) * scale
    if cap is not None:
        s = cap * jnp.tanh(s / cap)
    return s if bias is None else s + bias


def sinks(aux, heads):
    """[heads, n]."""
    if aux is None:
        return jnp.zeros((heads, 0))
    if aux.ndim == 1:
        return aux[:, None] if aux.shape[0] == heads else jnp.broadcast_to(aux, (heads, aux.shape[0]))
    return aux


def attention(floats, sees, scale, cap):
    """(out, lse [batch, heads, q_len])."""
    query, value = floats["query"], floats["value"]
    heads = query.shape[2]
    s = scores(query, floats["key"], floats.get("bias"), scale, cap)
    aux = sinks(floats.get("softmax_aux"), heads)[None, :, None, :]
    aux = jnp.broadcast_to(aux, (*s.shape[:3], aux.shape[3]))
    top = jnp.concatenate([jnp.where(sees, s, -jnp.inf), aux], axis=-1).max(axis=-1, keepdims=True, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    e = jnp.where(sees, jnp.exp(jnp.where(sees, s - top, 0)), 0)
    total = e.sum(axis=-1) + jnp.exp(aux - top).sum(axis=-1)
    some = total > 0
    total = jnp.where(some, total, 1)
    value = jnp.repeat(value, heads // value.shape[2], axis=2)
    out = jnp.einsum("bhij,bjhd->bihd", e / total[..., None], value)
    return out, jnp.where(some, jnp.log(total) + top[..., 0], -jnp.inf)


def exact(floats, sees, dout, dlse, scale=None, cap=None):
    """The formula's results and gradients in float64, and a bound of each element's error. Dicts by name."""
    floats = {name: np.asarray(a).astype("float64") for name, a in floats.items()}
    dout, dlse = np.asarray(dout).astype("float64"), np.asarray(dlse).astype("float64")
    scale = floats["query"].shape[3] ** -0.5 if scale is None else scale
    with jax.enable_x64(True):
        lse = attention(floats, sees, scale, cap)[1]
        seen = jnp.isfinite(lse)

        def results(floats):
            out, lse = attention(floats, sees, scale, cap)
            return out, jnp.where(seen, lse, 0)

        (out, _), pull = jax.vjp(results, {name: jnp.asarray(a) for name, a in floats.items()})
        (gradients,) = pull((jnp.asarray(dout), jnp.where(seen, dlse, 0)))
    found = {"out": out, "lse": lse, **{f"d{name}": g for name, g in gradients.items()}}
    return {name: np.asarray(a) for name, a in found.items()}


def bars(floats, sees, dout, dlse, found, dtype, scale=None, cap=None, kept=1.0):
    """How far each result may be from `found`, element by element.

    First-order bounds of float32 arithmetic with unit roundoff u, n summands adding at most n u times the sum of their
    absolute values; twice that, for the terms of second order. `low` is the rounding of probabilities and of ds on
    targets that multiply in bfloat16. `kept` is 1 - dropout_prob.
    """
    floats = {name: np.asarray(a).astype("float64") for name, a in floats.items()}
    query, key, value = floats["query"], floats["key"], floats["value"]
    u, rounding = UNIT, ROUNDING[dtype]
    low = 0 if dtype == "float32" else rounding
    (batch, q_len, heads, d), (_, kv_len, kv_heads, dv) = query.shape, value.shape
    group = heads // kv_heads
    scale = d**-0.5 if scale is None else scale
    dout, dlse = np.asarray(dout).astype("float64"), np.asarray(dlse).astype("float64")
    k, v = (np.repeat(a, group, axis=2) for a in (key, value))
    # Scores: a dot product of d terms, scale, cap, bias.
    bias = floats.get("bias")
    bias = np.zeros((1, 1, 1, 1)) if bias is None else bias
    s = np.asarray(scores(query, key, bias, scale, cap))
    size = np.einsum("bihd,bjhd->bhij", abs(query), abs(k)) * abs(scale)
    ds_score = u * ((d + 4) * size + 2 * abs(bias) + 2 * abs(s) + 8 * (cap or 0))
    # Probabilities: exp of a difference, divided by a sum of kv_len terms in an order that depends on the ring.
    lse = found["lse"][..., None]
    finite = np.isfinite(lse)
    p = np.where(sees & finite, np.exp(np.where(sees & finite, s - np.where(finite, lse, 0), 0)), 0)
    error = np.where(sees, ds_score + u * (abs(s) + abs(np.where(finite, lse, 0)) + 8), 0)
    worst = error.max(axis=-1, initial=0) + (kv_len + 32) * u
    relative = (2 * worst + low)[..., None]
    p = p / kept
    bound = {"lse": worst + 2 * u * abs(np.where(finite, lse, 0))[..., 0]}
    weighted = np.einsum("bhij,bjhd->bihd", p, abs(v))
    share = np.moveaxis(relative, 1, 2)
    bound["out"] = (share + kv_len * u) * weighted + rounding * abs(found["out"])
    # ds = p (dp - delta), delta from the rounded out.
    dp = np.einsum("bihd,bjhd->bhij", abs(dout), abs(v)) / kept
    delta = np.einsum("bihd,bihd->bhi", abs(dout), abs(found["out"])) + abs(dlse)
    ddelta = np.einsum("bihd,bihd->bhi", abs(dout), bound["out"]) + (dv + 2) * u * delta
    both = p * kept * (dp + delta[..., None])
    capped = 2 * (ds_score / cap + 8 * u) if cap else 0
    dds = both * (relative + low + (dv + 8) * u + capped) + p * kept * ddelta[..., None]

    # Products of ds and p: sums over keys, or over queries and the heads of a group.
    def to_keys(x):
        return x.reshape(batch, kv_len, kv_heads, group, -1).sum(axis=3)

    terms = q_len * group
    bound["dquery"] = abs(scale) * np.einsum("bhij,bjhd->bihd", dds + (kv_len + 4) * u * both, abs(k))
    bound["dkey"] = to_keys(abs(scale) * np.einsum("bhij,bihd->bjhd", dds + (terms + 4) * u * both, abs(query)))
    bound["dvalue"] = to_keys(np.einsum("bhij,bihd->bjhd", p * (relative + (terms + 4) * u), abs(dout)))
    if "bias" in floats:
        axes = tuple(a for a in range(4) if floats["bias"].shape[a] == 1 and s.shape[a] != 1)
        bound["dbias"] = (dds + batch * heads * u * both).sum(axis=axes, keepdims=True)
    if "softmax_aux" in floats:
        aux = np.asarray(sinks(floats["softmax_aux"], heads))
        weight = np.exp(aux[None, :, None, :] - np.where(finite, lse, 0))
        part = weight * (delta * (2 * worst + (batch * q_len + 16) * u) + ddelta)[..., None]
        shape = floats["softmax_aux"].shape
        per_head = part.sum(axis=(0, 2))
        bound["dsoftmax_aux"] = per_head.reshape(shape) if per_head.size == np.prod(shape) else per_head.sum(axis=0)
    for name in floats:
        if name != "softmax_aux":
            bound[f"d{name}"] += rounding * abs(found[f"d{name}"])
    return {name: 2 * b + 1e-30 for name, b in bound.items()}


def within(got, found, bound):
    """Raises AssertionError naming the result with the element that is farthest out."""
    for name, array in got.items():
        array = np.asarray(array).astype("float64")
        assert array.shape == found[name].shape, (name, array.shape, found[name].shape)
        infinite = ~np.isfinite(found[name])
        np.testing.assert_array_equal(array[infinite], found[name][infinite], err_msg=name)
        share = np.where(infinite, 0, abs(array - np.where(infinite, 0, found[name]))) / bound[name]
        assert not np.isnan(array).any() and share.max(initial=0) <= 1, f"{name}: {share.max()} times its bar"
