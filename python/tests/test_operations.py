"""NumPy arrays against a second oracle: whole arrays in float64, written from the formula by another author."""

import itertools
import random

import annulus
import numpy as np
import oracle_numpy
import pytest

ml_dtypes = pytest.importorskip("ml_dtypes")

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# Relative size of one rounding of the result.
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


class Case:
    """A small problem with options drawn from a seed."""

    def __init__(self, seed):
        pick = random.Random(seed)
        draw = np.random.default_rng(seed)
        self.dtype = pick.choice(list(DTYPES))
        b, hk, group = pick.choice([1, 2]), pick.choice([1, 2]), pick.choice([1, 3])
        h, d, dv = hk * group, pick.choice([1, 8, 33]), pick.choice([4, 16])
        n, m = pick.choice([(17, 17), (33, 33), (9, 24), (24, 9), (1, 13), (64, 64)])
        self.q, self.k, self.v, self.dout = (
            draw.standard_normal(shape).astype(DTYPES[self.dtype])
            for shape in ((b, n, h, d), (b, m, hk, d), (b, m, hk, dv), (b, n, h, dv))
        )
        o = self.options = {}
        if pick.random() < 0.4:
            o["causal"] = True
        if pick.random() < 0.3:
            o["sliding_window"] = pick.choice([3, (4, 0), (-1, 2), (None, 1), (0, 0)])
        if pick.random() < 0.5:
            o["causal_alignment"] = pick.choice(["top_left", "bottom_right"])
        if pick.random() < 0.2:
            o["chunk_size"] = pick.choice([1, 5, 8])
        if pick.random() < 0.3:
            o["q_segment_ids"] = draw.integers(0, 3, (b, n)).astype(pick.choice(["int32", "int64"]))
            o["kv_segment_ids"] = draw.integers(0, 3, (b, m)).astype("int32")
            if pick.random() < 0.5:
                o["padding_segment_id"] = 0
        if pick.random() < 0.2:
            o["kv_lengths"] = draw.integers(0, m + 1, b).astype("int32")
        if pick.random() < 0.2:
            o["attention_mask"] = draw.random((pick.choice([1, b]), pick.choice([1, h]), n, m)) < 0.7
        if pick.random() < 0.3:
            o["softmax_scale"] = pick.choice([0.3, -0.2, 1.0])
        if pick.random() < 0.3:
            o["logits_soft_cap"] = pick.choice([2.0, 30.0])
        if pick.random() < 0.3:
            shape = pick.choice([(h,), (h + 1,), (h, 2), (h, 1)])
            o["softmax_aux"] = (5 * draw.standard_normal(shape)).astype("float32")
        if pick.random() < 0.3:
            o["bias"] = draw.standard_normal((pick.choice([1, b]), pick.choice([1, h]), n, m)).astype("float32")
        if pick.random() < 0.2:
            o.update(dropout_prob=0.3, dropout_seed=seed)
        self.ring = {"workers": pick.choice([None, 1, 2, 3, 5, 40]), "partition": pick.choice(["contiguous", "striped", "zigzag"])}

    def wide(self, *arrays):
        return [None if a is None else np.asarray(a, np.float64) for a in arrays]


def bound(case, exact, magnitude):
    """One rounding of the result, and float32's errors: some 1e-6 of what the sum is made of, more where scores are large.
    bfloat16 products round every weight to 2^-8 of it on the way; independent errors, so three standard deviations of
    0.42 * 2^-8 * magnitude suffice, and a fixed 2^-8 * magnitude is more than any of them."""
    products = 2.0**-8 if case.dtype == "bfloat16" else 0
    return UNIT[case.dtype] * np.abs(exact) + (2e-5 + products) * magnitude + 1e-6


def rms(x):
    return np.sqrt(np.mean(x**2)) if x.size else 0.0


def largest_terms(options, dout, q, k, v):
    """What ds = p (dp - delta) may be made of before it cancels, times q or k, over all queries of a key."""
    norm = np.linalg.norm(dout, axis=-1).max(initial=0) * np.linalg.norm(v, axis=-1).max(initial=0)
    scale = abs(options.get("softmax_scale", q.shape[3] ** -0.5))
    keep = 1 - options.get("dropout_prob", 0)
    rows = q.shape[1] * q.shape[2] // k.shape[2]
    return 2 * norm / keep * max(1, scale * max(np.abs(q).max(initial=0), np.abs(k).max(initial=0))) * rows


def gradient_bound(case, size, terms):
    """rms errors are one rounding of the result and, with bfloat16 products, one of each term: twice the unit is above both.
    float32's own are some units of the terms, however small their sum."""
    return 2 * UNIT[case.dtype] * size + 8 * 2.0**-24 * terms


@pytest.mark.parametrize("seed", range(150))
def test_agrees_with_the_formula(seed):
    case = Case(seed)
    defaults = {"causal_alignment": "top_left"}
    q, k, v, dout = case.wide(case.q, case.k, case.v, case.dout)
    options = {**defaults, **case.options}
    out, lse = annulus.ring_attention(case.q, case.k, case.v, return_lse=True, **case.options, **case.ring)
    exact, exact_lse = oracle_numpy.attention(q, k, v, **options)[:2]
    assert out.dtype == case.q.dtype and lse.dtype == np.float32
    assert out.shape == exact.shape and lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    magnitude = np.abs(v).max(initial=0) / (1 - options.get("dropout_prob", 0))
    assert (np.abs(out.astype("f8") - exact) <= bound(case, exact, magnitude)).all()
    np.testing.assert_allclose(lse, exact_lse, rtol=4e-6, atol=4e-6)

    gradients = annulus.attention_backward(
        case.dout, case.q, case.k, case.v, out, lse, want_dbias="bias" in options, **options, **case.ring
    )
    reference = annulus.reference.attention_backward(
        case.dout, case.q, case.k, case.v, out, want_dbias="bias" in options, **options
    )
    formula = oracle_numpy.attention_backward(dout, q, k, v, out=out.astype("f8"), **options)
    for name, mine, exact in zip(gradients._fields, gradients, reference):
        other = formula.get(name)
        assert (mine is None) == (exact is None) == (other is None)
        if mine is None:
            continue
        assert mine.shape == exact.shape and mine.dtype == (options[name[1:]] if name[1:] in options else case.q).dtype
        # Two authors' formulas in double precision: rounding only.
        np.testing.assert_allclose(exact, other, rtol=1e-9, atol=1e-9)
        error = mine.astype("f8") - exact
        assert rms(error) <= gradient_bound(case, rms(exact), largest_terms(options, dout, q, k, v)), name


def test_every_world_gives_the_same():
    """The same numbers for every number of workers and every partition, up to float32's rounding."""
    draw = np.random.default_rng(0)
    q, k, v = (draw.standard_normal((1, 41, 2, 16)).astype("f4") for _ in range(3))
    whole = annulus.ring_attention(q, k, v, causal=True)
    positions = [np.arange(41)[::-1][r::5] for r in range(5)]
    for partition, workers in itertools.product(["contiguous", "striped", "zigzag"], [2, 3, 7, 16, 41, 64]):
        out = annulus.ring_attention(q, k, v, causal=True, workers=workers, partition=partition)
        np.testing.assert_allclose(out, whole, rtol=0, atol=2e-6)
    mixed = annulus.ring_attention(q, k, v, causal=True, workers=5, partition=annulus.Partition.from_positions(positions))
    np.testing.assert_allclose(mixed, whole, rtol=0, atol=2e-6)


def test_masks_of_heads():
    draw = np.random.default_rng(1)
    q, k, v = (draw.standard_normal((1, 24, 4, 8)).astype("f4") for _ in range(3))
    M = annulus.Mask
    masks = [M.causal() & M.sliding_window(5, 0), M.prefix(4) | M.causal(), M.chunked(6), M.full()]
    asked = []

    def builder(q_len, kv_len, num_heads, head, num_reps):
        asked.append((q_len, kv_len, num_heads, head, num_reps))
        return masks[head]

    out = annulus.ring_attention(q, k, v, mask_builder=builder, workers=3)
    assert asked == [(24, 24, 4, head, 1) for head in range(4)]
    dense = np.array([[[mask.visible(i, j) for j in range(24)] for i in range(24)] for mask in masks])[None]
    np.testing.assert_array_equal(out, annulus.ring_attention(q, k, v, attention_mask=dense, workers=3))
    assert annulus.Mask.full().causal().sliding_window(3, 0).visible(5, 1) is False
    blocks = np.array([[True, False], [True, True]])
    assert repr(M.block_sparse(12, blocks)) and M.block_sparse(12, blocks).visible(13, 3)
    assert M.dense(dense[0, 0]).visible(3, 2) and not M.dense(dense[0, 0]).visible(2, 3)


def test_merge_joins_disjoint_keys():
    draw = np.random.default_rng(2)
    q, k, v = (draw.standard_normal((2, 20, 2, 8)).astype("f4") for _ in range(3))
    whole, lse = annulus.attention(q, k, v, return_lse=True)
    parts = [annulus.attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, 7), slice(7, 20))]
    out, joined = annulus.merge(*parts[0], *parts[1])
    np.testing.assert_allclose(out, whole, atol=1e-6)
    np.testing.assert_allclose(joined, lse, rtol=1e-6)
    nothing = np.zeros_like(whole), np.full_like(lse, -np.inf)
    for a, b in ((parts[0], nothing), (nothing, parts[0])):
        np.testing.assert_array_equal(annulus.merge(*a, *b)[0], parts[0][0])
    out, joined = annulus.merge(*nothing, *nothing)
    assert not out.any() and np.isneginf(joined).all()


def test_nothing_to_see():
    q, k = np.ones((1, 3, 2, 4), "f4"), np.full((1, 5, 2, 4), np.nan, "f4")
    out, lse = annulus.attention(q, k, k, kv_lengths=np.zeros(1, "i4"), return_lse=True)
    assert not out.any() and np.isneginf(lse).all()
    out, lse = annulus.attention(q, k, k, kv_lengths=np.zeros(1, "i4"), softmax_aux=np.array([1, 2], "f4"), return_lse=True)
    assert not out.any() and (lse[0] == np.array([[1], [2]], "f4")).all()
    assert annulus.attention(q[:, :0], k, k).shape == (1, 0, 2, 4)
    assert not annulus.attention(q, k[:, :0], k[:, :0]).any()
    assert annulus.attention(q[:0], k[:0], k[:0]).shape == (0, 3, 2, 4)


def test_block_sizes_change_nothing_but_speed():
    draw = np.random.default_rng(3)
    q, k, v = (draw.standard_normal((1, 300, 2, 16)).astype("f4") for _ in range(3))
    out = annulus.ring_attention(q, k, v, causal=True)
    small = annulus.FwdParams(q_blocksize=32, kv_blocksize=16)
    np.testing.assert_allclose(annulus.ring_attention(q, k, v, causal=True, fwd_params=small), out, atol=1e-6)
    plan = annulus.explain("ring_attention", q, k, v, fwd_params=small, bwd_params={"kv_blocksize": 16})
    assert plan.panel_keys == 16 and plan.item_rows == 32 and plan.backward["panel_keys"] == 16
