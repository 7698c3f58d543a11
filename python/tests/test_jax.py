"""annulus.jax: results and gradients by an independent formula, transformations, errors; plain calls on JAX arrays."""

import os
import subprocess
import sys

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import jax_formula as formula  # noqa: E402
import numpy as np  # noqa: E402

import annulus  # noqa: E402
import annulus.jax  # noqa: E402

pytestmark = pytest.mark.jax

DTYPES = ("float32", "bfloat16", "float16")


def arrays(dtype="float32", batch=2, q_len=19, kv_len=19, heads=4, kv_heads=4, dim=16, v_dim=16, seed=0):
    """query, key, value."""
    rng = np.random.default_rng(seed)
    shapes = ((batch, q_len, heads, dim), (batch, kv_len, kv_heads, dim), (batch, kv_len, kv_heads, v_dim))
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def normal(shape, dtype="float32", seed=7):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


# Segments that start at different places in the two batch rows; -1 is padding.
IDS = np.array([[0] * 5 + [1] * 9 + [-1] * 5, [3] * 10 + [2] * 9], np.int32)
RANDOM_MASK = np.random.default_rng(3).random((2, 1, 19, 19)) < 0.6

# name: (shapes, options of the call, what they mean to the formula, extra floats)
CASES = {
    "full": ({}, {}, {}, {}),
    "causal": ({}, {"causal": True}, {"causal": True}, {}),
    "bottom right": (
        {"q_len": 7}, {"causal": True, "causal_alignment": "bottom_right"}, {"causal": True, "bottom_right": True}, {},
    ),
    "window": ({}, {"sliding_window": (4, 2)}, {"window": (4, 2)}, {}),
    "one-sided window": ({}, {"sliding_window": [None, 3], "causal": False}, {"window": (None, 3)}, {}),
    "chunks": ({}, {"chunk_size": 5}, {"chunk": 5}, {}),
    "segments": (
        {}, {"q_segment_ids": IDS, "kv_segment_ids": IDS, "padding_segment_id": -1},
        {"q_ids": IDS, "padding": -1}, {},
    ),
    "kv_lengths": (
        {}, {"kv_lengths": np.array([0, 11], np.int32), "causal": True}, {"kv_lengths": [0, 11], "causal": True}, {},
    ),
    "attention_mask": ({}, {"attention_mask": RANDOM_MASK}, {"mask": RANDOM_MASK}, {}),
    "mask_builder": (
        {}, {"mask_builder": lambda q, kv, heads, head, reps: annulus.Mask.sliding_window(head + 1, 0)},
        {"rule": lambda h, i, j: i - h - 1 <= j <= i}, {},
    ),
    "mask": (
        {}, {"mask_builder": annulus.Mask.causal() & annulus.Mask.prefix(9)},
        {"rule": lambda h, i, j: j <= i and j < 9}, {},
    ),
    "blocks": (
        {},
        {
            "causal": True, "fused_backward": True, "fwd_params": annulus.FwdParams(16, 16),
            "bwd_params": {"kv_blocksize": 16},
        },
        {"causal": True}, {},
    ),
    "grouped heads": ({"kv_heads": 2, "v_dim": 24}, {"causal": True}, {"causal": True}, {}),
    "cap": ({}, {"logits_soft_cap": 2.5, "causal": True}, {"causal": True}, {}),
    "scale": ({}, {"softmax_scale": 0.6}, {}, {}),
    "sinks": ({}, {"causal": True}, {"causal": True}, {"softmax_aux": (4,)}),
    "shared sinks": ({}, {"causal": True}, {"causal": True}, {"softmax_aux": (3,)}),
    "sinks by head": ({}, {}, {}, {"softmax_aux": (4, 2)}),
    "bias": ({}, {"causal": True}, {"causal": True}, {"bias": (2, 4, 19, 19)}),
    "shared bias": ({"kv_heads": 1}, {}, {}, {"bias": (1, 1, 19, 19)}),
    "everything": (
        {"kv_heads": 2, "v_dim": 8},
        {
            "causal": True, "sliding_window": (8, None), "logits_soft_cap": 4.0, "softmax_scale": 0.4,
            "q_segment_ids": IDS,
        },
        {"causal": True, "window": (8, None), "q_ids": IDS},
        {"bias": (1, 4, 19, 19), "softmax_aux": (4,)},
    ),
}  # fmt: skip


def case(name, dtype):
    """floats by name, options, what is visible, (dout, dlse)."""
    shapes, options, meaning, extra = CASES[name]
    query, key, value = arrays(dtype, **shapes)
    floats = {"query": query, "key": key, "value": value, **{n: normal(s, seed=len(n)) for n, s in extra.items()}}
    batch, q_len, heads, _ = query.shape
    sees = formula.visible((batch, heads, q_len, key.shape[1]), **meaning)
    cotangents = normal((batch, q_len, heads, value.shape[3]), dtype), normal((batch, heads, q_len), seed=8)
    return floats, options, sees, cotangents


def with_gradients(call, floats, cotangents):
    """Results and gradients of call(**floats) -> (out, lse), by the formula's names. lse is -inf where nothing is seen:
    its gradient there counts for nothing."""
    (out, lse), pull = jax.vjp(lambda floats: call(**floats), floats)
    (gradients,) = pull(cotangents)
    return {"out": out, "lse": lse, **{f"d{name}": g for name, g in gradients.items()}}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_the_formulas(name, dtype):
    floats, options, sees, cotangents = case(name, dtype)
    call = jax.jit(lambda **floats: annulus.jax.ring_attention(**floats, **options, workers=3, return_lse=True))
    got = with_gradients(call, floats, cotangents)
    rule = {"scale": options.get("softmax_scale"), "cap": options.get("logits_soft_cap")}
    found = formula.exact(floats, sees, *cotangents, **rule)
    formula.within(got, found, formula.bars(floats, sees, *cotangents, found, dtype, **rule))
    for primal, array in floats.items():
        assert got[f"d{primal}"].dtype == array.dtype
    assert got["out"].dtype == dtype and got["lse"].dtype == "float32"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("workers", (None, 3))
def test_results_and_gradients_are_bit_for_bit_those_of_plain_calls(name, dtype, workers):
    floats, options, _, (dout, dlse) = case(name, dtype)
    plain = {n: np.asarray(a) for n, a in floats.items()}
    out, lse = annulus.ring_attention(**plain, **options, workers=workers, return_lse=True)
    expected = {"query": "dq", "key": "dk", "value": "dv", "softmax_aux": "dsoftmax_aux", "bias": "dbias"}
    rest = {"causal_alignment": "top_left", "fused_backward": False, "dlse": np.asarray(dlse), "workers": workers}
    primals = [plain.pop(n) for n in ("query", "key", "value")]
    gradients = annulus.attention_backward(
        np.asarray(dout), *primals, out, lse, **{**rest, **options}, **plain, want_dbias="bias" in plain
    )

    def call(**floats):
        return annulus.jax.ring_attention(**floats, **options, workers=workers, return_lse=True)

    got = with_gradients(call, floats, (dout, dlse))
    np.testing.assert_array_equal(got["out"], out)
    np.testing.assert_array_equal(got["lse"], lse)
    for n in floats:
        np.testing.assert_array_equal(got[f"d{n}"], getattr(gradients, expected[n]), err_msg=n)


def test_attention_is_aligned_to_the_bottom_right():
    query, key, value = arrays(q_len=5)
    got = annulus.jax.attention(query, key, value, causal=True)
    expected = annulus.attention(np.asarray(query), np.asarray(key), np.asarray(value), causal=True)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_is_the_references(dtype):
    query, key, value = arrays(dtype)
    plain = [np.asarray(a) for a in (query, key, value)]
    options = {"causal": True, "dropout_prob": 0.25, "dropout_seed": 2**40 + 5}
    dout, dlse = normal(query.shape, dtype), jnp.zeros((2, 4, 19))
    call = lambda **floats: annulus.jax.ring_attention(**floats, **options, workers=2, return_lse=True)  # noqa: E731
    floats = {"query": query, "key": key, "value": value}
    got = with_gradients(call, floats, (dout, dlse))
    out, lse = annulus.reference.attention(*plain, **options, return_lse=True)
    gradients = annulus.reference.attention_backward(np.asarray(dout), *plain, **options)
    found = {"out": out, "lse": lse, "dquery": gradients.dq, "dkey": gradients.dk, "dvalue": gradients.dv}
    sees = formula.visible((2, 4, 19, 19), causal=True)
    formula.within(got, found, formula.bars(floats, sees, dout, dlse, found, dtype, kept=0.75))


def test_dropout_seeds_may_be_traced_and_mapped():
    query, key, value = arrays()
    call = lambda seed: annulus.jax.attention(query, key, value, dropout_prob=0.5, dropout_seed=seed)  # noqa: E731
    expected = [call(seed) for seed in (3, 4)]
    assert not np.array_equal(*expected)
    np.testing.assert_array_equal(jax.jit(call)(jnp.uint32(3)), expected[0])
    np.testing.assert_array_equal(jax.vmap(call)(jnp.arange(3, 5)), expected)
    with jax.enable_x64(True):
        wide = jax.jit(call)(jnp.uint64(2**40 + 5))
    np.testing.assert_array_equal(wide, call(2**40 + 5))
    assert not np.array_equal(wide, call(5))


def test_without_lse_its_gradient_is_nothing():
    query, key, value = arrays()
    loss = lambda with_lse: (
        lambda q: (  # noqa: E731
            annulus.jax.attention(q, key, value, return_lse=with_lse)[0 if with_lse else ...] ** 2
        ).sum()
    )
    np.testing.assert_array_equal(jax.grad(loss(True))(query), jax.grad(loss(False))(query))


def test_gradients_of_lse_alone():
    query, key, value = arrays()
    call = lambda q: annulus.jax.attention(q, key, value, return_lse=True)  # noqa: E731
    (out, lse), pull = jax.vjp(call, query)
    (expected,) = pull((jnp.zeros_like(out), jnp.ones_like(lse)))
    np.testing.assert_array_equal(jax.grad(lambda q: call(q)[1].sum())(query), expected)
    assert expected.any()


def test_value_and_grad_of_one_argument():
    query, key, value = arrays()
    bias = normal((1, 1, 19, 19))
    loss = lambda bias: annulus.jax.attention(query, key, value, bias=bias).sum()  # noqa: E731
    result, gradient = jax.jit(jax.value_and_grad(loss))(bias)
    np.testing.assert_array_equal(gradient, jax.grad(loss)(bias))
    assert gradient.shape == bias.shape and np.isfinite(result)


def test_gradients_of_constants_are_not_computed():
    query, key, value = arrays()
    bias = normal((1, 1, 19, 19))
    loss = lambda q: annulus.jax.attention(q, key, value, bias=bias).sum()  # noqa: E731
    assert "dbias" not in str(jax.make_jaxpr(jax.grad(loss))(query))


def mapped_inputs(options, mapped):
    query, key, value = arrays(batch=1)
    given = {"query": query, "key": key, "value": value, **options}
    stacked = {}
    for n, array in given.items():
        factor = jnp.issubdtype(array.dtype, jnp.floating)
        one = [jnp.asarray(array) * f if factor else jnp.asarray(array) for f in (1, 2, 3)]
        stacked[n] = jnp.stack(one) if n in mapped else one[0]
    return stacked, {n: 0 if n in mapped else None for n in given}


@pytest.mark.parametrize(
    "options, mapped",
    [
        ({}, {"query", "key", "value"}),
        ({}, {"query"}),
        ({}, {"key", "value"}),
        ({"softmax_aux": normal((4,))}, {"query", "softmax_aux"}),
        ({"bias": normal((1, 4, 19, 19))}, {"query", "bias"}),
        ({"bias": normal((1, 4, 19, 19))}, {"query"}),
        ({"kv_lengths": np.array([7], np.int32)}, {"query", "kv_lengths"}),
        ({"attention_mask": RANDOM_MASK[:1]}, {"value"}),
    ],
    ids=lambda value: "-".join(sorted(value)) or "none",
)
def test_vmap_is_a_call_per_element(options, mapped):
    stacked, axes = mapped_inputs(options, mapped)

    def loss(given):
        out, lse = annulus.jax.attention(**given, causal=True, return_lse=True)
        return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum(), out

    floats = [n for n in stacked if jnp.issubdtype(stacked[n].dtype, jnp.floating)]

    def both(given):
        rest = {n: a for n, a in given.items() if n not in floats}
        return jax.grad(lambda f: loss({**f, **rest}), has_aux=True)({n: given[n] for n in floats})

    gradients, out = jax.jit(jax.vmap(both, in_axes=(axes,)))(stacked)
    for index in range(3):
        one = {n: a[index] if n in mapped else a for n, a in stacked.items()}
        expected, expected_out = both(one)
        np.testing.assert_array_equal(out[index], expected_out)
        for n in floats:
            np.testing.assert_array_equal(gradients[n][index], expected[n], err_msg=n)


def test_vmap_in_vmap_and_over_batch_rows_with_options_of_their_own():
    query, key, value = (jnp.stack([a, 2 * a]) for a in arrays(batch=3))
    lengths = jnp.array([[3, 19, 0], [5, 6, 7]], jnp.int32)
    inner = lambda q, k, v, n: annulus.jax.attention(q[None], k[None], v[None], kv_lengths=n[None])[0]  # noqa: E731
    got = jax.vmap(jax.vmap(inner, in_axes=(0, 0, 0, 0)))(query, key, value, lengths)
    for index in range(2):
        expected = annulus.jax.attention(query[index], key[index], value[index], kv_lengths=lengths[index])
        np.testing.assert_array_equal(got[index], expected)
    # An outer axis that only the queries have.
    got = jax.vmap(jax.vmap(inner, in_axes=(0, 0, 0, 0)), in_axes=(0, None, None, None))(
        query, key[0], value[0], lengths[0]
    )
    expected = annulus.jax.attention(query[1], key[0], value[0], kv_lengths=lengths[0])
    np.testing.assert_array_equal(got[1], expected)


def test_vmap_over_dropout_keeps_each_elements_pairs():
    query, key, value = (jnp.stack([a, a]) for a in arrays())
    call = lambda q, k, v: annulus.jax.attention(q, k, v, dropout_prob=0.5, dropout_seed=1)  # noqa: E731
    got = jax.vmap(call)(query, key, value)
    np.testing.assert_array_equal(got[0], got[1])
    np.testing.assert_array_equal(got[0], call(query[0], key[0], value[0]))


def test_scan_and_checkpoint():
    query, key, value = arrays()

    def loss(query, steps):
        step = jax.checkpoint(lambda q, _: (annulus.jax.attention(q, key, value, causal=True), None))
        if steps:
            return (jax.lax.scan(step, query, None, length=3)[0] ** 2).sum()
        for _ in range(3):
            query = step(query, None)[0]
        return (query**2).sum()

    expected = jax.value_and_grad(loss)(query, False)
    got = jax.jit(jax.value_and_grad(loss), static_argnums=1)(query, True)
    np.testing.assert_array_equal(got[1], expected[1])


def test_float64_mode_changes_nothing():
    query, key, value = arrays("bfloat16")
    loss = lambda q: (annulus.jax.ring_attention(q, key, value, causal=True, workers=2) ** 2).sum()  # noqa: E731
    expected = jax.value_and_grad(loss)(query)
    ids = jnp.asarray(IDS)
    by_ids = annulus.jax.attention(query, key, value, q_segment_ids=ids)
    with jax.enable_x64(True):
        got = jax.jit(jax.value_and_grad(loss))(query)
        wide = jnp.asarray(IDS.astype("int64"))
        assert wide.dtype == "int64"
        np.testing.assert_array_equal(annulus.jax.attention(query, key, value, q_segment_ids=wide), by_ids)
        with pytest.raises(annulus.InvalidArgument, match="q_segment_ids holds 4294967296, which int32 cannot"):
            annulus.jax.attention(query, key, value, q_segment_ids=wide + 2**32)
        with pytest.raises(annulus.InvalidArgument, match="query has dtype float64, which Annulus cannot read"):
            jax.eval_shape(annulus.jax.attention, *(a.astype("float64") for a in (query, key, value)))
    assert got[1].dtype == "bfloat16"
    np.testing.assert_array_equal(got[1], expected[1])
    np.testing.assert_array_equal(annulus.jax.attention(query, key, value, q_segment_ids=IDS.astype("int64")), by_ids)


def test_masks_arrays_and_lengths_may_be_traced():
    query, key, value = arrays()
    options = {"q_segment_ids": IDS, "attention_mask": RANDOM_MASK, "kv_lengths": np.array([4, 12], np.int32)}
    call = lambda **options: annulus.jax.attention(query, key, value, **options)  # noqa: E731
    np.testing.assert_array_equal(jax.jit(call)(**options), call(**options))
    gradient = jax.grad(lambda q, mask: annulus.jax.attention(q, key, value, attention_mask=mask).sum())
    assert gradient(query, jnp.asarray(RANDOM_MASK)).shape == query.shape


def test_partitions_are_options():
    query, key, value = arrays(q_len=8, kv_len=8)
    one = annulus.jax.ring_attention(query, key, value, causal=True)
    custom = annulus.Partition.from_positions([[0, 7, 3], [1, 2], [4, 5, 6]])
    for partition in ("contiguous", "striped", "zigzag", custom):
        got = annulus.jax.ring_attention(query, key, value, causal=True, workers=3, partition=partition)
        plain = [np.asarray(a) for a in (query, key, value)]
        expected = annulus.ring_attention(*plain, causal=True, workers=3, partition=partition)
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_allclose(got, one, rtol=0, atol=64 * 2**-24 * abs(value).max())


def test_empty_arrays():
    query, key, value = arrays(q_len=0, kv_len=5)
    assert annulus.jax.attention(query, key, value).shape == (2, 0, 4, 16)
    query, key, value = arrays(q_len=5, kv_len=0)
    gradient = jax.grad(lambda q: annulus.jax.attention(q, key, value).sum())(query)
    assert not gradient.any()
    query, key, value = arrays(batch=0)
    assert jax.jit(annulus.jax.attention)(query, key, value).shape == (0, 19, 4, 16)


def tracing_counter(call):
    count = [0]

    def counted(*args):
        count[0] += 1
        return call(*args)

    return count, jax.jit(counted)


def test_programs_are_compiled_once():
    query, key, value = arrays()
    mask = annulus.Mask.causal() | annulus.Mask.prefix(3)
    count, call = tracing_counter(
        lambda q: annulus.jax.attention(q, key, value, mask_builder=mask, sliding_window=(9, 0))
    )
    for _ in range(3):
        call(query)
    assert count == [1]
    texts = {
        jax.jit(lambda q: annulus.jax.attention(q, key, value, mask_builder=mask)).lower(query).as_text()
        for _ in range(2)
    }
    assert len(texts) == 1
    annulus.jax.attention(query, key, value, mask_builder=mask)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        compiled = []
        patch.setattr(jax._src.compiler, "backend_compile_and_load", lambda *a, **k: compiled.append(a))
        for seed in range(3):
            annulus.jax.attention(query, key, value, mask_builder=mask, dropout_seed=seed)
    assert not compiled


attend, ring = annulus.jax.attention, annulus.jax.ring_attention
WRONG = [
    (lambda q, k, v: attend(q[0], k, v), r"attention: query has shape \[19, 4, 16\], expected 4 axes"),
    (lambda q, k, v: attend(q, k[:, :, :, :8], v), r"attention: k has shape \[2, 19, 4, 8\], expected"),
    (lambda q, k, v: attend(q, k.astype("bfloat16"), v), "attention: k has type bfloat16, expected float32"),
    (lambda q, k, v: attend(q.astype("int32"), k, v), "attention: query has dtype int32, expected float32 or"),
    (lambda q, k, v: attend(q.astype("complex64"), k, v), "query has dtype complex64, which Annulus cannot"),
    (lambda q, k, v: ring(q, k, v, bias=jnp.zeros((2, 4, 19, 18))), "ring_attention: bias has shape"),
    (lambda q, k, v: attend(q, k, v, kv_lengths=jnp.zeros(3, "int32")), "kv_lengths has shape"),
    (lambda q, k, v: attend(q, k, v, attention_mask=jnp.zeros((1, 1, 19, 19))), "attention_mask has dtype float32"),
    (lambda q, k, v: attend(q, k, v, q_segment_ids=jnp.zeros((2, 19))), "q_segment_ids has dtype float32"),
    (lambda q, k, v: attend(q, k, v, chunk_size=0), "chunk_size is 0, expected at least 1"),
    (lambda q, k, v: attend(q, k, v, dropout_prob=1.0), "dropout_prob is 1, expected at least 0 and below 1"),
    (lambda q, k, v: attend(q, k, v, dropout_seed=-1), "dropout_seed is -1, expected an integer of 64 bits"),
    (lambda q, k, v: attend(q, k, v, causal="yes"), "causal is 'yes', expected True or False"),
    (lambda q, k, v: attend(q, k, v, softmax_scale=q[0, 0, 0, 0]), "softmax_scale is a tracer of jax"),
    (lambda q, k, v: attend(q, k, [1.0]), "attention: value is a list, expected an array"),
    (lambda q, k, v: attend(q, k, v, mask_builder=3), "mask_builder is 3, expected a function"),
    (lambda q, k, v: ring(q, k, v, workers=0), "workers is 0, expected an integer of at least 1"),
    (lambda q, k, v: ring(q, k, v, partition="odd"), "partition is 'odd', expected"),
    (lambda q, k, v: ring(q, k, v, axis_name="sp"), "axis_name is 'sp', which is no axis here"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", WRONG, ids=[message[:30] for _, message in WRONG])
def test_mistakes_are_found_when_tracing(call, message):
    with pytest.raises(annulus.InvalidArgument, match=message):
        jax.eval_shape(call, *arrays())


def test_errors_of_a_running_program():
    query, key, value = arrays()
    lengths = jnp.array([3, -1], jnp.int32)
    with pytest.raises(annulus.InvalidArgument, match=r"kv_lengths\[1\] is -1, expected at least 0"):
        jax.block_until_ready(annulus.jax.attention(query, key, value, kv_lengths=lengths))
    call = jax.jit(lambda lengths: annulus.jax.attention(query, key, value, kv_lengths=lengths))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"annulus.InvalidArgument: .*kv_lengths\[1\] is -1"):
        jax.block_until_ready(call(lengths))
    assert np.isfinite(call(jnp.array([3, 1], jnp.int32))).all()


def test_an_axis_of_vmap_is_no_ring():
    query, key, value = (a[:, None] for a in arrays())
    call = jax.vmap(lambda *qkv: annulus.jax.ring_attention(*qkv, axis_name="i"), axis_name="i")
    with pytest.raises(annulus.InvalidArgument, match="axis_name is mapped by vmap"):
        jax.block_until_ready(call(query, key, value))


def test_plain_calls_read_and_return_jax_arrays_in_place(monkeypatch):
    query, key, value = arrays()
    seen = {}
    forward = annulus._core.forward

    def spy(options, query, key, value, out, *rest):
        arrays = {"query": query, "key": key, "value": value, "out": out}
        seen.update({name: np.from_dlpack(a).ctypes.data for name, a in arrays.items()})
        return forward(options, query, key, value, out, *rest)

    monkeypatch.setattr(annulus._core, "forward", spy)
    out = annulus.ring_attention(query, key, value, causal=True, workers=2)
    assert isinstance(out, jax.Array) and out.dtype == query.dtype
    pointers = {"query": query, "key": key, "value": value, "out": out}
    assert seen == {name: array.unsafe_buffer_pointer() for name, array in pointers.items()}


def test_annulus_alone_needs_no_jax():
    program = (
        "import sys; sys.modules['jax'] = None; import numpy as np, annulus\n"
        "x = np.ones((1, 3, 2, 8), np.float32)\n"
        "assert np.allclose(annulus.attention(x, x, x), x)\n"
        "try: annulus.jax\nexcept ImportError: print('as it should be')"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "as it should be\n"


def test_rings_between_eight_devices():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "jax_devices.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", path], capture_output=True, text=True, timeout=900,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
