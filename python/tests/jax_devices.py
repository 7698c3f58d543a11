"""annulus.jax in shard_map: rings between devices of a mesh. test_jax.py runs this file where there are eight."""

import functools
import time

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import jax_formula as formula  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import annulus  # noqa: E402
import annulus.jax  # noqa: E402

pytestmark = pytest.mark.jax


def arrays(dtype="float32", length=32, heads=4, kv_heads=2, batch=2, dim=16):
    rng = np.random.default_rng(length)
    shapes = ((batch, length, heads, dim), (batch, length, kv_heads, dim), (batch, length, kv_heads, dim))
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def mesh_of(**axes):
    count = int(np.prod(list(axes.values())))
    return Mesh(np.array(jax.devices()[:count]).reshape(*axes.values()), tuple(axes))


ROWS = P(None, "sp")


def sharded(call, mesh, in_specs=ROWS, out_specs=ROWS, **kwargs):
    return jax.shard_map(call, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **kwargs)


def ring(**options):
    return lambda query, key, value: annulus.jax.ring_attention(query, key, value, axis_name="sp", **options)


@pytest.mark.parametrize("check_vma", (True, False))
@pytest.mark.parametrize("world_size", (1, 2, 4, 8))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_a_ring_of_devices_gives_the_bits_of_workers(world_size, dtype, check_vma):
    query, key, value = arrays(dtype)
    call = jax.jit(sharded(ring(causal=True), mesh_of(sp=world_size), check_vma=check_vma))
    expected = annulus.ring_attention(query, key, value, causal=True, workers=world_size)
    for _ in range(3):
        np.testing.assert_array_equal(call(query, key, value), expected)


def test_without_jit():
    query, key, value = arrays()
    got = sharded(ring(causal=True), mesh_of(sp=4))(query, key, value)
    np.testing.assert_array_equal(got, annulus.ring_attention(query, key, value, causal=True, workers=4))


IDS = np.repeat(np.array([[0] * 11 + [1] * 13 + [-1] * 8], np.int32), 2, axis=0)


@pytest.mark.parametrize("check_vma", (True, False))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
def test_results_and_gradients_of_every_kind_of_option(dtype, check_vma):
    query, key, value = arrays(dtype)
    rng = np.random.default_rng(5)
    floats = {
        "query": query, "key": key, "value": value,
        "bias": jnp.asarray(rng.standard_normal((1, 4, 32, 32)), "float32"),
        "softmax_aux": jnp.asarray(rng.standard_normal(4), "float32"),
    }  # fmt: skip
    mask = rng.random((2, 1, 32, 32)) < 0.8
    lengths = np.array([32, 20], np.int32)
    options = {"causal": True, "logits_soft_cap": 3.0, "padding_segment_id": -1, "return_lse": True}
    specs = {
        "query": ROWS, "key": ROWS, "value": ROWS, "bias": P(None, None, "sp"), "softmax_aux": P(),
        "q_segment_ids": ROWS, "kv_segment_ids": ROWS, "attention_mask": P(None, None, "sp"), "kv_lengths": P(),
    }  # fmt: skip
    others = {"q_segment_ids": IDS, "kv_segment_ids": IDS, "attention_mask": mask, "kv_lengths": lengths}
    call = sharded(
        lambda arrays: annulus.jax.ring_attention(**arrays, **options, axis_name="sp"), mesh_of(sp=4), (specs,),
        (ROWS, P(None, None, "sp")), check_vma=check_vma,
    )  # fmt: skip
    dout, dlse = (
        jnp.asarray(rng.standard_normal(query.shape), dtype),
        jnp.asarray(rng.standard_normal((2, 4, 32)), "float32"),
    )

    @jax.jit
    def both(floats):
        (out, lse), pull = jax.vjp(lambda floats: call({**floats, **others}), floats)
        return {"out": out, "lse": lse}, pull((dout, dlse))[0]

    results, gradients = both(floats)
    sees = formula.visible(
        (2, 4, 32, 32), causal=True, q_ids=IDS, padding=-1, kv_lengths=lengths, mask=mask
    )  # fmt: skip
    found = formula.exact(floats, sees, dout, dlse, cap=3.0)
    got = {**results, **{f"d{name}": g for name, g in gradients.items()}}
    formula.within(got, found, formula.bars(floats, sees, dout, dlse, found, dtype, cap=3.0))


@pytest.mark.parametrize("partition", ("striped", "zigzag", "custom"))
def test_shards_are_the_partitions(partition):
    query, key, value = arrays()
    if partition == "custom":
        order = np.random.default_rng(1).permutation(32).reshape(4, 8)
        partition = annulus.Partition.from_positions(list(order))
    positions = np.concatenate([annulus.Partition(partition).positions(rank, 4, 32) for rank in range(4)])
    call = jax.jit(sharded(ring(causal=True, partition=partition), mesh_of(sp=4)))
    got = call(*(array[:, positions] for array in (query, key, value)))
    expected = annulus.ring_attention(query, key, value, causal=True, workers=4, partition=partition)
    np.testing.assert_array_equal(got, np.asarray(expected)[:, positions])


@pytest.mark.parametrize("mask_builder", ("builder", "mask"))
def test_masks_see_positions_of_the_whole_sequence(mask_builder):
    query, key, value = arrays()
    asked = []

    def builder(q_len, kv_len, num_heads, head, num_reps):
        asked.append((q_len, kv_len, num_heads, num_reps))
        return annulus.Mask.sliding_window(3 * head, 0)

    mask = builder if mask_builder == "builder" else annulus.Mask.causal() & annulus.Mask.prefix(20)
    got = jax.jit(sharded(ring(mask_builder=mask), mesh_of(sp=4)))(query, key, value)
    assert set(asked) <= {(32, 32, 4, 2)}
    expected = annulus.ring_attention(query, key, value, mask_builder=mask, workers=4)
    np.testing.assert_array_equal(got, expected)


def test_dropout_is_by_position():
    query, key, value = arrays()
    options = {"dropout_prob": 0.3, "dropout_seed": 11}
    got = jax.jit(sharded(ring(**options), mesh_of(sp=4)))(query, key, value)
    np.testing.assert_array_equal(got, annulus.ring_attention(query, key, value, workers=4, **options))


@pytest.mark.parametrize("check_vma", (True, False))
@pytest.mark.parametrize("batch_axis", ("dp", None), ids=("data", "copies"))
def test_rings_of_one_mesh_do_not_mix(batch_axis, check_vma):
    query, key, value = arrays()
    spec = P(batch_axis, "sp")
    mesh = mesh_of(dp=2, sp=4)
    call = jax.jit(sharded(ring(causal=True), mesh, spec, spec, check_vma=check_vma))
    expected = annulus.ring_attention(query, key, value, causal=True, workers=4)
    for _ in range(10):
        np.testing.assert_array_equal(call(query, key, value), expected)


def test_copies_may_be_at_different_steps_of_a_loop():
    """Two rings of equal data, whose devices stumble: a step of one must not meet another step of the other."""
    query, key, value = arrays()
    luck = np.random.default_rng(9)

    def stumble(array):
        time.sleep(luck.random() * 0.01)
        return array

    @jax.jit
    @functools.partial(sharded, mesh=mesh_of(dp=2, sp=4))
    def call(query, key, value):
        def step(rows, _):
            late = jax.pure_callback(stumble, jax.ShapeDtypeStruct(rows.shape, rows.dtype), rows)
            return annulus.jax.ring_attention(late, late[:, :, :2] + key, value, causal=True, axis_name="sp"), None

        return jax.lax.scan(step, query, None, length=6)[0]

    expected = query
    for _ in range(6):
        expected = annulus.ring_attention(expected, expected[:, :, :2] + key, value, causal=True, workers=4)
    for _ in range(3):
        np.testing.assert_array_equal(call(query, key, value), expected)


def test_axes_that_xla_divides_by_itself():
    query, key, value = arrays()
    call = jax.jit(sharded(ring(causal=True), mesh_of(dp=2, sp=4), axis_names={"sp"}))
    expected = annulus.ring_attention(query, key, value, causal=True, workers=4)
    for _ in range(10):
        np.testing.assert_array_equal(call(query, key, value), expected)


def test_two_axes_as_one_ring():
    query, key, value = arrays()
    spec = P(None, ("a", "b"))
    one = lambda q, k, v: annulus.jax.ring_attention(q, k, v, causal=True, axis_name=("a", "b"))
    call = jax.jit(sharded(one, mesh_of(a=2, b=4), spec, spec))
    np.testing.assert_array_equal(
        call(query, key, value), annulus.ring_attention(query, key, value, causal=True, workers=8)
    )


def slow_on(rank, array):
    """The array itself, some milliseconds later on that device."""

    def wait(array):
        time.sleep(0.01)
        return array

    late = lambda: jax.pure_callback(wait, jax.ShapeDtypeStruct(array.shape, array.dtype), array)  # noqa: E731
    return jax.lax.cond(jax.lax.axis_index("sp") == rank, late, lambda: array)


def test_independent_calls_of_one_program_do_not_mix():
    """Calls at once that share a traced function, which devices reach in different orders: only XLA's call sites tell
    them apart."""
    query, key, value = arrays()
    one = jax.jit(ring(causal=True))

    @jax.jit
    @functools.partial(sharded, mesh=mesh_of(sp=4), out_specs=P(None, None, "sp"), check_vma=False)
    def call(query, key, value):
        return jnp.stack([one(slow_on(n % 4, query * n), key, value + n) for n in range(8)])

    expected = [annulus.ring_attention(query * n, key, value + n, causal=True, workers=4) for n in range(8)]
    runs = [call(query, key, value) for _ in range(6)]  # dispatched without waiting
    for run in runs:
        np.testing.assert_array_equal(run, expected)


def test_consecutive_runs_do_not_mix_where_one_device_is_slow():
    query, key, value = arrays()

    @jax.jit
    @functools.partial(sharded, mesh=mesh_of(sp=4), in_specs=(ROWS, ROWS, ROWS, P()), check_vma=False)
    def call(query, key, value, factor):
        return annulus.jax.ring_attention(slow_on(2, query) * factor, key, value, causal=True, axis_name="sp")

    runs = [call(query, key, value, jnp.float32(n)) for n in range(12)]
    for n, run in enumerate(runs):
        expected = annulus.ring_attention(query * n, key, value, causal=True, workers=4)
        np.testing.assert_array_equal(run, expected)


def test_loops_and_recomputation():
    query, key, value = arrays()

    def steps(query, key, value, attend):
        body = jax.checkpoint(lambda q, _: (attend(q, key, value), None))
        return jax.lax.scan(body, query, None, length=4)[0]

    looped = sharded(functools.partial(steps, attend=ring(causal=True)), mesh_of(sp=4))
    whole = functools.partial(steps, attend=lambda *qkv: annulus.jax.ring_attention(*qkv, causal=True, workers=4))
    gradients = lambda call: jax.jit(jax.grad(lambda *qkv: (call(*qkv) ** 2).sum(), argnums=(0, 1, 2)))  # noqa: E731
    np.testing.assert_array_equal(jax.jit(looped)(query, key, value), jax.jit(whole)(query, key, value))
    for got, expected in zip(gradients(looped)(query, key, value), gradients(whole)(query, key, value)):
        # The sum over the loop's steps is XLA's, in an order of its own: at most 4 terms of 24 bits.
        np.testing.assert_allclose(got, expected, rtol=0, atol=8 * 2**-24 * abs(np.asarray(expected)).max())


@pytest.mark.parametrize("inside", (True, False))
def test_vmap(inside):
    query, key, value = (jnp.stack([a, 2 * a, 3 * a]) for a in arrays())
    call = ring(causal=True)
    if inside:
        call = sharded(jax.vmap(call), mesh_of(sp=4), P(None, None, "sp"), P(None, None, "sp"))
    else:
        call = jax.vmap(sharded(call, mesh_of(sp=4)))
    for got, *one in zip(jax.jit(call)(query, key, value), query, key, value):
        np.testing.assert_array_equal(got, annulus.ring_attention(*one, causal=True, workers=4))


def test_a_device_that_does_not_come_is_named():
    query, key, value = arrays()

    @jax.jit
    @functools.partial(sharded, mesh=mesh_of(sp=4), in_specs=(ROWS, ROWS, ROWS, P()))
    def call(query, key, value, absent):
        away = jax.lax.axis_index("sp") == absent
        return jax.lax.cond(away, lambda: query, lambda: ring(timeout_s=0.5)(query, key, value))

    expected = annulus.ring_attention(query, key, value, workers=4)
    for _ in range(2):
        begin = time.monotonic()
        with pytest.raises(
            jax.errors.JaxRuntimeError, match="PeerTimeout.rank 2.*rank 2 of axis 'sp' did not come within 0.5 s"
        ):
            jax.block_until_ready(call(query, key, value, 2))
        assert time.monotonic() - begin < 20
        # The same program, with everybody: nothing is left of the run that failed.
        np.testing.assert_array_equal(call(query, key, value, -1), expected)


def test_an_error_of_one_device_ends_all():
    query, key, value = arrays()
    lengths = jnp.array([[32, 32], [32, 32], [32, -5], [32, 32]], jnp.int32)

    @jax.jit
    @functools.partial(sharded, mesh=mesh_of(sp=4), in_specs=(ROWS, ROWS, ROWS, P("sp")))
    def call(query, key, value, lengths):
        return annulus.jax.ring_attention(query, key, value, kv_lengths=lengths[0], axis_name="sp")

    begin = time.monotonic()
    with pytest.raises(
        (jax.errors.JaxRuntimeError, ValueError), match=r"annulus\.InvalidArgument.*kv_lengths\[1\] is -5"
    ):
        jax.block_until_ready(call(query, key, value, lengths))
    assert time.monotonic() - begin < 20


def test_an_error_in_one_devices_own_numbers_ends_all():
    query, key, value = arrays()
    with jax.enable_x64(True):
        ids = jnp.zeros((2, 32), "int64").at[0, 9].set(2**40)
        call = jax.jit(
            sharded(
                lambda q, k, v, ids: annulus.jax.ring_attention(q, k, v, ids, ids, axis_name="sp"),
                mesh_of(sp=4),
                (ROWS,) * 4,
            )
        )
        begin = time.monotonic()
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="q_segment_ids holds 1099511627776"):
            jax.block_until_ready(call(query, key, value, ids))
    assert time.monotonic() - begin < 20


def test_mistakes_are_found_when_tracing():
    query, key, value = arrays()
    wrong = [
        (ring(workers=2), "both workers and axis_name are given"),
        (
            ring(partition=annulus.Partition.from_positions([[0], [1], [2], list(range(3, 32))])),
            "partition gives rank 0 1 of 32 rows",
        ),
        (ring(bias=jnp.zeros((1, 1, 8, 8))), r"bias has shape \[1, 1, 8, 8\]"),
        (lambda *qkv: annulus.jax.ring_attention(*qkv, axis_name="tp"), "axis_name is 'tp', which is no axis here"),
    ]
    for call, message in wrong:
        with pytest.raises(annulus.InvalidArgument, match=message):
            jax.eval_shape(sharded(call, mesh_of(sp=4)), query, key, value)
