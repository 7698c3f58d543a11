"""Attention by its formula in PyTorch's float64, the documented dropout rule in NumPy, bounds of float32 arithmetic.

Nothing here calls annulus. Rows are [batch, seq, heads, dim] outside, [batch, heads, q, kv] inside.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

U = 2.0**-24  # float32's unit roundoff
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
LOST = 2.0**-80
# Half the distance of neighbours near zero.
TINY = {torch.float32: 1e-37, torch.bfloat16: 1e-37, torch.float16: 2.0**-25}


def gamma(n):
    """Relative error of a float32 sum of n terms in any order."""
    return n * U / (1 - n * U)


def philox(seed, *counter):
    """First output word of Philox 4x32-10 for four broadcastable counter words."""
    mask = np.uint64(0xFFFFFFFF)
    c = [np.asarray(x, dtype=np.uint64) & mask for x in np.broadcast_arrays(*counter)]
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> np.uint64(32)) ^ c[1] ^ k0, b & mask, (a >> np.uint64(32)) ^ c[3] ^ k1, a & mask]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & mask, (k1 + np.uint64(0xBB67AE85)) & mask
    return c[0].astype(np.uint32)


def dropout_keep(seed, prob, batch, heads, q_len, kv_len):
    """0 where a pair is dropped, 1 / (1 - prob) elsewhere."""
    words = philox(seed, *np.ogrid[:batch, :heads, :q_len, :kv_len])
    # Both sides are exact: a word has 32 bits, and prob * 2^32 only moves the exponent.
    return torch.from_numpy(np.where(words.astype(np.float64) < prob * 2.0**32, 0.0, 1 / (1 - prob)))


@dataclass
class Rules:
    """What besides the tensors decides a result."""

    visible: torch.Tensor  # bool [batch, heads, q, kv]
    keep: torch.Tensor | float = 1.0
    scale: float | None = None
    cap: float | None = None
    workers: int = 1
    extra: dict = field(default_factory=dict)


def sinks_of(aux, heads):
    """[heads, n] of any of the three shapes."""
    if aux is None:
        return None
    if aux.dim() == 2:
        return aux
    return aux[:, None] if aux.shape[0] == heads else aux.expand(heads, -1)


def _heads_first(q, k, v):
    group = q.shape[2] // k.shape[2]
    return q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))


def _logits(q, k, bias, rules):
    scale = q.shape[-1] ** -0.5 if rules.scale is None else rules.scale
    capped = scale * (q @ k.transpose(2, 3))
    if rules.cap is not None:
        capped = rules.cap * torch.tanh(capped / rules.cap)
    s = capped if bias is None else capped + bias
    return scale, capped, torch.where(rules.visible, s, -torch.inf)


def _reference(s, sinks):
    """The row's largest logit, 0 where there is none."""
    columns = [s] if sinks is None else [s, sinks]
    m = torch.cat([*columns, s.new_full((*s.shape[:3], 1), -torch.inf)], -1).amax(-1, keepdim=True).detach()
    return torch.where(torch.isneginf(m), 0.0, m)


def formula(q, k, v, aux, bias, rules):
    """(out, lse) of semantics' section 2 in the tensors' own dtype, through autograd."""
    q, k, v = _heads_first(q, k, v)
    _, _, s = _logits(q, k, bias, rules)
    sinks = sinks_of(aux, q.shape[1])
    if sinks is not None:
        sinks = sinks[None, :, None].expand(*s.shape[:3], -1).to(s.dtype)
    m = _reference(s, sinks)
    e = torch.exp(s - m)
    total = e.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - m).sum(-1, keepdim=True)
    safe = torch.where(total == 0, 1.0, total)
    keep = rules.keep if isinstance(rules.keep, float) else rules.keep.to(s.dtype)
    out = ((e / safe * keep) @ v).transpose(1, 2)
    return out, torch.where(total == 0, -torch.inf, m + torch.log(safe))[..., 0]


def gradients_on(out, q, k, v, aux, bias, rules, dout, dlse):
    """dq, dk, dv by semantics' section 5 with delta = rowsum(dout * out) of the given, already rounded, out."""
    shape = (k.shape[2], q.shape[2] // k.shape[2])
    _, lse = formula(q, k, v, aux, bias, rules)
    q, k, v = _heads_first(q, k, v)
    scale, t, s = _logits(q, k, bias, rules)
    p = torch.exp(s - torch.where(torch.isneginf(lse), 0.0, lse)[..., None])
    d = dout.transpose(1, 2)
    delta = (d * out.transpose(1, 2)).sum(-1, keepdim=True) - (0.0 if dlse is None else dlse[..., None])
    ds = scale * p * (rules.keep * (d @ v.transpose(2, 3)) - delta)
    if rules.cap is not None:
        ds = ds * (1 - (t / rules.cap) ** 2)
    columns = (ds.transpose(2, 3) @ q, (p * rules.keep).transpose(2, 3) @ d)
    dk, dv = (x.unflatten(1, shape).sum(2).transpose(1, 2) for x in columns)
    return (ds @ k).transpose(1, 2), dk, dv


def bounds(q, k, v, aux, bias, rules, dtype, u_p, dout, dlse):
    """How far results that are computed in float32 and rounded once may be from the formula, per element: a dict with
    out, lse, dq, dk, dv, daux, dbias. All tensors are float64.

    Running error analysis to first order (1.02 covers the rest). With u = 2^-24 and g(n) = n u / (1 - n u):

    * a logit errs by E = g(head_dim + 2) scale |q|.|k|, 8 u |.| more for the tanh of a cap, u |s| for adding the bias;
    * the argument of exp by 4 u (|s| + |m|) (change of base, subtraction of the row's largest m), exp itself by 8 u, or
      by the documented 2.9e-6 + 4 u where probabilities are bfloat16;
    * a probability by its own error, the p-weighted mean of all of its row (the denominator), g(keys + sinks + merges);
    * weights that lie 2^-80 below the row's largest need not be kept;
    * sums by g(number of terms); probabilities and ds that are rounded to bfloat16 by u_p = 2^-8, else u_p = 0; in out
      twice, because the sum that divides it is of the rounded ones;
    * delta = dout . out by the error of the rounded out that the backward is given;
    * a result by u_out: half a unit in its last place.
    """
    group, (q, k, v) = q.shape[2] // k.shape[2], _heads_first(q, k, v)
    B, H, M, D = q.shape
    N, Dv = k.shape[2], v.shape[3]
    scale, t, s = _logits(q, k, bias, rules)
    sinks = sinks_of(aux, H)
    a = s.new_zeros(B, H, M, 0) if sinks is None else sinks[None, :, None].expand(B, H, M, -1)
    m = _reference(s, a)
    e, ea = torch.exp(s - m), torch.exp(a - m)
    total = e.sum(-1, keepdim=True) + ea.sum(-1, keepdim=True)
    total = torch.where(total == 0, 1.0, total)
    p, pa, lse = e / total, ea / total, (m + torch.log(total))
    keep, u_out, tiny = rules.keep, ROUNDING[dtype], TINY[dtype]
    n = N + a.shape[-1] + 8 * rules.workers + 16
    finite = torch.isfinite(s)
    size = torch.where(finite, s, 0.0).abs()

    E = gamma(D + 2) * abs(scale) * (q.abs() @ k.abs().transpose(2, 3))
    if rules.cap is not None:
        E = E + 8 * U * t.abs()
    if bias is not None:
        E = E + U * size
    u_exp = 2.9e-6 + 4 * U if u_p else 8 * U
    R = torch.where(finite, E + 4 * U * (size + m.abs()) + u_exp, 0.0)
    Ra = torch.where(torch.isfinite(a), 4 * U * (a.nan_to_num(0, 0, 0).abs() + m.abs()) + u_exp, 0.0)
    mean = (p * R).sum(-1, keepdim=True) + (pa * Ra).sum(-1, keepdim=True) + gamma(n)
    rel, rel_a = R + mean, Ra + mean

    out = (p * keep) @ v
    e_out = u_out * out.abs() + (((rel + gamma(n) + 2 * u_p + 3 * U) * p + LOST) * keep) @ v.abs() + tiny
    e_lse = mean + 4 * U * (1 + lse.abs())
    result = {"out": e_out.transpose(1, 2), "lse": e_lse[..., 0]}
    if dout is None:
        return {name: 1.02 * bound for name, bound in result.items()}

    d = dout.transpose(1, 2)
    dl = s.new_zeros(B, H, M, 1) if dlse is None else dlse[..., None]
    back = 4 * U * (1 + lse.abs()) + mean
    dp, e_dp = d @ v.transpose(2, 3), gamma(Dv + 2) * (d.abs() @ v.abs().transpose(2, 3))
    delta = (d * out).sum(-1, keepdim=True) - dl
    e_delta = gamma(Dv + 4) * ((d * out).abs().sum(-1, keepdim=True) + dl.abs())
    e_delta = e_delta + (d.abs() * e_out).sum(-1, keepdim=True)
    ds = p * (keep * dp - delta)
    e_ds = (rel + back + u_p + 3 * U) * ds.abs()
    e_ds = (
        e_ds
        + LOST * (keep * dp - delta).abs()
        + p * (keep * e_dp + e_delta + 3 * U * ((keep * dp).abs() + delta.abs()))
    )
    dt, e_dt = ds, e_ds
    if rules.cap is not None:
        f = 1 - (t / rules.cap) ** 2
        dt, e_dt = ds * f, e_ds * f + ds.abs() * (2 * t.abs() / rules.cap**2 * E + 8 * U)
    over_q = M * group + 8 * rules.workers + 16

    def grouped(x):
        return x.unflatten(1, (H // group, group)).sum(2).transpose(1, 2)

    dq, dk = abs(scale) * (dt @ k), scale * grouped(dt.transpose(2, 3) @ q)
    e_dq = abs(scale) * ((e_dt + gamma(n) * dt.abs()) @ k.abs()) + u_out * dq.abs()
    e_dk = abs(scale) * grouped((e_dt + gamma(over_q) * dt.abs()).transpose(2, 3) @ q.abs()) + u_out * dk.abs()
    pk = p * keep
    dv = grouped(pk.transpose(2, 3) @ d)
    e_dv = grouped(((rel + back + u_p + gamma(over_q)) * pk + LOST * keep).transpose(2, 3) @ d.abs()) + u_out * dv.abs()
    result.update(dq=e_dq.transpose(1, 2) + tiny, dk=e_dk + tiny, dv=e_dv + tiny)
    result["ds"], result["e_ds"] = ds, e_ds
    da = -pa * delta
    result["da"], result["e_da"] = da, pa * ((rel_a + back) * delta.abs() + e_delta)
    return _reduced(result, bias, rules.extra, aux, B * M)


def _reduced(result, bias, dtypes, aux, rows):
    """The bounds of dbias and daux: sums over what they are broadcast over."""
    ds, e_ds, da, e_da = (result.pop(name) for name in ("ds", "e_ds", "da", "e_da"))
    if bias is not None:
        axes = [axis for axis in range(2) if bias.shape[axis] == 1]
        terms = 1
        for axis in axes:
            terms *= ds.shape[axis]
        add = (lambda x: x.sum(axes, keepdim=True)) if axes else (lambda x: x)
        bias_dtype = dtypes.get("bias", torch.float32)
        result["dbias"] = (
            add(e_ds) + gamma(terms + 16) * add(ds.abs()) + ROUNDING[bias_dtype] * add(ds).abs() + TINY[bias_dtype]
        )
    if aux is not None:
        heads = ds.shape[1]
        axes = [0, 1, 2] if aux.dim() == 1 and aux.shape[0] != heads else [0, 2]
        aux_dtype = dtypes.get("aux", torch.float32)
        bound = e_da.sum(axes) + gamma(rows * heads + 16) * da.abs().sum(axes)
        bound = bound + ROUNDING[aux_dtype] * da.sum(axes).abs() + TINY[aux_dtype]
        result["daux"] = bound.reshape(aux.shape)
    return {name: 1.02 * bound for name, bound in result.items()}
