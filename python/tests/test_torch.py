"""annulus as a part of PyTorch: autograd, functional transforms, out=, memory, ranks."""

import gc
import math
import weakref

import pytest

torch = pytest.importorskip("torch")

import annulus
import annulus.torch
from torch_formula import Rules, formula

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*not a double precision floating point")]


@pytest.fixture(autouse=True)
def fixed():
    torch.manual_seed(7)


def rows(*shape, grad=True, dtype=torch.float32):
    return (0.5 * torch.randn(shape)).to(dtype).requires_grad_(grad)


def small(heads=2, kv_heads=1, q_len=3, kv_len=4, dim=2, v_dim=3):
    """q, k, v of few elements."""
    return rows(1, q_len, heads, dim), rows(1, kv_len, kv_heads, dim), rows(1, kv_len, kv_heads, v_dim)


# --- derivatives -----------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {}, "causal": {"causal": True}, "top_left": {"causal": True, "causal_alignment": "top_left"},
    "window": {"sliding_window": (1, 0)}, "chunk": {"chunk_size": 2}, "scale": {"softmax_scale": 1.5},
    "cap": {"logits_soft_cap": 0.7}, "mask": {"attention_mask": torch.rand(1, 1, 3, 4) < 0.7},
    "segments": {"q_segment_ids": torch.tensor([[0, 1, 2]]), "kv_segment_ids": torch.tensor([[0, 0, 1, 1]])},
    "lengths": {"kv_lengths": torch.tensor([2])},
    "builder": {"mask_builder": annulus.Mask.prefix(1) | annulus.Mask.causal()},
    "dropout": {"dropout_prob": 0.3, "dropout_seed": 5}, "two_passes": {"fused_backward": False},
}  # fmt: skip


def gradcheck(function, *inputs):
    """Central differences of step 2^-7 in float32. They err by step^2 / 6 times the third derivative (1e-5 times at most
    10 here: logits below 2, values below 3), and by the error of the results, 2^-22 relative, over the step: 3e-5 times
    at most 3. 3e-4 covers both."""
    assert torch.autograd.gradcheck(function, inputs, eps=2.0**-7, atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name):
    gradcheck(lambda *x: annulus.attention(*x, return_lse=name not in ("segments",), **OPTIONS[name]), *small())


@pytest.mark.parametrize("workers,partition", [(2, "striped"), (3, "zigzag"), (9, "contiguous")])
def test_gradcheck_ring(workers, partition):
    gradcheck(
        lambda *x: annulus.ring_attention(*x, causal=True, workers=workers, partition=partition, return_lse=True),
        *small(q_len=4),
    )


@pytest.mark.parametrize("shape", [(2,), (3,), (2, 2)])
def test_gradcheck_sinks(shape):
    sinks = torch.randn(shape, requires_grad=True)
    gradcheck(lambda *x: annulus.attention(*x[:3], softmax_aux=x[3], causal=True, return_lse=True), *small(), sinks)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2)])
def test_gradcheck_bias(shape):
    bias = rows(*shape, 3, 4)
    gradcheck(lambda *x: annulus.attention(*x[:3], bias=x[3], logits_soft_cap=1.0), *small(), bias)


def test_gradcheck_merge():
    q, k, v = small()
    a, la = annulus.attention(q, k, v, return_lse=True)
    b, lb = annulus.attention(q, k.flip(1), 2 * v, return_lse=True)
    inputs = [x.detach().requires_grad_() for x in (a, la, b, lb)]
    gradcheck(annulus.merge, *inputs)


def test_merge_gradients_where_a_side_saw_nothing():
    out, lse = torch.randn(1, 3, 1, 2), torch.randn(1, 1, 3)
    la, lb = lse.clone(), lse + 1
    la[..., 0] = la[..., 1] = lb[..., 1] = -torch.inf
    inputs = [x.clone().requires_grad_() for x in (out, la, 2 * out, lb)]
    with torch.no_grad():
        inputs[0][:, :2] = math.nan
    merged, total = annulus.merge(*inputs)
    assert torch.equal(merged[0, 0], inputs[2][0, 0]) and torch.equal(merged[0, 1], torch.zeros(1, 2))
    assert total[0, 0, 1] == -torch.inf
    found = torch.autograd.grad([merged, total], inputs, [torch.ones_like(merged), torch.ones_like(total)])
    assert all(torch.isfinite(g).all() for g in found)
    assert found[0][0, :2].eq(0).all() and found[1][0, 0, :2].eq(0).all()
    assert found[3][0, 0].tolist()[:2] == [1, 0]


def test_merge_is_attention_over_both():
    """Forward and backward, through float32 arithmetic of a handful of roundings."""
    q, k, v = small(q_len=5, kv_len=8)
    parts = [annulus.attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, 3), slice(3, 8))]
    merged, lse = annulus.merge(*parts[0], *parts[1])
    whole, total = annulus.attention(q, k, v, return_lse=True)
    for x, y in [(merged, whole), (lse, total)] + list(
        zip(*(torch.autograd.grad(o.square().sum() + z.sum(), (q, k, v)) for o, z in ((merged, lse), (whole, total))))
    ):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-6)


def test_only_what_requires_gradients_gets_them():
    q, k, v = small()
    for wanted in ((q,), (k,), (v,), (q, v)):
        given = [x if any(x is w for w in wanted) else x.detach() for x in (q, k, v)]
        found = torch.autograd.grad(annulus.attention(*given).sum(), wanted)
        full = torch.autograd.grad(annulus.attention(q, k, v).sum(), wanted)
        assert all(torch.equal(a, b) for a, b in zip(found, full))
    out = annulus.attention(q.detach(), k.detach(), v.detach())
    assert not out.requires_grad
    sinks, bias = torch.zeros(2, requires_grad=True), torch.zeros(1, 1, 3, 4, requires_grad=True)
    out = annulus.attention(q.detach(), k.detach(), v.detach(), softmax_aux=sinks, bias=bias)
    assert all(g.shape == x.shape for g, x in zip(torch.autograd.grad(out.sum(), (sinks, bias)), (sinks, bias)))


def test_grad_modes():
    q, k, v = small()
    with torch.no_grad():
        assert not annulus.attention(q, k, v).requires_grad
    with torch.inference_mode():
        assert annulus.attention(q, k, v).is_inference()
    module = torch.nn.Linear(4, 4)
    parameter = torch.nn.Parameter(torch.randn(1, 4, 1, 4))
    annulus.attention(module(parameter), parameter, parameter).sum().backward()
    assert parameter.grad is not None and module.weight.grad is not None


def test_lse_alone_has_a_gradient():
    q, k, v = small()
    _, lse = annulus.attention(q, k, v, return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v))
    wide = [x.double() for x in (q, k, v)]
    _, true = formula(*wide, None, None, Rules(torch.ones(1, 2, 3, 4) > 0))
    expected = torch.autograd.grad(true.sum(), (q, k))
    for x, y in zip((dq, dk), expected):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert dv.eq(0).all()


def test_layouts_of_dout():
    """sum() gives an expanded gradient; others come transposed, sliced or negated."""
    q, k, v = small()
    out = annulus.attention(q, k, v)
    plain = torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)
    wide = torch.ones(1, 3, 2, 6)[..., ::2]
    negated = torch.complex(torch.zeros_like(out), -torch.ones_like(out)).conj().imag
    assert negated.is_neg()
    for dout in (torch.ones(()).expand(out.shape), torch.ones(1, 2, 3, 3).transpose(1, 2), wide, negated):
        found = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(plain, found))


def test_graphs_are_kept_and_freed():
    q, k, v = small()
    out = annulus.attention(q, k, v)
    first = torch.autograd.grad(out.sum(), q, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(out.sum(), q)[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), q)
    mask = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    held = weakref.ref(mask)
    out = annulus.attention(q, k, v, attention_mask=mask)
    del mask, out
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("call", ["attention", "attention_backward", "operator"])
def test_second_derivatives_are_refused(call, linear):
    """An error, never a zero: also where the gradient that comes in does not depend on the inputs."""
    q, k, v = small()
    if call == "attention_backward":
        out, lse = annulus.attention(q, k, v, return_lse=True)
        g = annulus.attention_backward(torch.ones_like(out), q, k, v, out, lse).dq
    else:
        out = annulus.attention(q, k, v) if call == "attention" else torch.ops.annulus.attention(q, k, v)[0]
        loss = out.sum() if linear else out.square().sum()
        (g,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(annulus.Unsupported, match="second derivatives"):
        (out.sum() + g.square().sum()).backward()


def test_writing_to_what_the_backward_needs_is_noticed():
    q, k, v = small(heads=2, q_len=4)
    tensors = {
        "attention_mask": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "q_segment_ids": torch.zeros(1, 4, dtype=torch.int32),
        "kv_lengths": torch.tensor([4], dtype=torch.int32), "softmax_aux": torch.zeros(2),
        "bias": torch.zeros(1, 1, 4, 4),
    }  # fmt: skip
    for name, tensor in tensors.items():
        out = annulus.attention(q, k, v, **{name: tensor})
        tensor.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
    middle = q * 1
    out = annulus.attention(middle, k, v)
    middle.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_checkpointing():
    from torch.utils.checkpoint import checkpoint

    q, k, v = (rows(2, 3, 8, 4) for _ in range(3))
    for p in (0.0, 0.5):
        gradients = []
        for run in (lambda f, *x: f(*x), lambda f, *x: checkpoint(f, *x, use_reentrant=False)):
            torch.manual_seed(1)
            out = run(lambda *x, p=p: annulus.torch.scaled_dot_product_attention(*x, dropout_p=p), q, k, v)
            gradients.append(torch.autograd.grad(out.sum(), (q, k, v)))
        assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_functional_transforms():
    q, k, v = (x.detach() for x in small(q_len=4))
    sinks, bias = torch.randn(2), torch.randn(1, 1, 4, 4)

    def loss(q, k, v, sinks, bias):
        return annulus.attention(q, k, v, softmax_aux=sinks, bias=bias, causal=True).square().sum()

    leaves = [x.clone().requires_grad_() for x in (q, k, v, sinks, bias)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.func.grad(loss, argnums=(0, 1, 2, 3, 4))(q, k, v, sinks, bias)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))
    many = torch.stack([q, 2 * q, -q])
    out = torch.vmap(lambda x: annulus.attention(x, k, v, bias=bias))(many)
    assert torch.equal(out[1], annulus.attention(2 * q, k, v, bias=bias))
    each = torch.vmap(torch.func.grad(loss), in_dims=(0, None, None, None, None))(many, k, v, sinks, bias)
    assert torch.equal(each[0], expected[0])
    with pytest.raises(annulus.Unsupported, match="second derivatives"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x, k, v, sinks, bias).sum())(q)


# --- tensors of all kinds --------------------------------------------------------------------------------


class Named(torch.Tensor):
    """A plain subclass."""


def test_subclasses_stay():
    q, k, v = small()
    named = q.detach().as_subclass(Named).requires_grad_()
    out, lse = annulus.attention(named, k, v, return_lse=True)
    assert type(out) is Named and type(lse) is Named
    assert torch.equal(out.as_subclass(torch.Tensor), annulus.attention(q, k, v))
    expected = torch.autograd.grad(annulus.attention(q, k, v).sum(), q)[0]
    assert torch.equal(torch.autograd.grad(out.sum(), named)[0].as_subclass(torch.Tensor), expected)


def test_tensors_of_tensors_and_fakes_become_operators():
    from torch._subclasses.fake_tensor import FakeTensorMode

    two = pytest.importorskip("torch.testing._internal.two_tensor")
    q, k, v = (x.detach() for x in small())
    pair = two.TwoTensor(q, 2 * q)
    out = annulus.attention(pair, k, v)
    assert torch.equal(out.a, annulus.attention(q, k, v)) and torch.equal(out.b, annulus.attention(2 * q, k, v))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (q, k, v)]
        out, lse = annulus.attention(*fake, return_lse=True)
        assert out.shape == (1, 3, 2, 3) and lse.shape == (1, 2, 3)
    out, lse = annulus.attention(q, k, v, return_lse=True)
    with pytest.raises(annulus.InvalidArgument, match="no memory"):
        annulus.attention_backward(mode.from_tensor(out), q, k, v, out, lse)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_negated_views(place):
    """conj().imag has the sign in a flag, not in memory."""
    given = [x.detach() for x in small()]
    negated = torch.complex(torch.zeros_like(given[place]), -given[place]).conj().imag
    assert negated.is_neg() and torch.equal(negated, given[place])
    with_view = [negated if n == place else x for n, x in enumerate(given)]
    assert torch.equal(annulus.attention(*with_view), annulus.attention(*given))
    assert torch.equal(torch.ops.annulus.attention(*with_view)[0], annulus.attention(*given))


@pytest.mark.parametrize(
    "make,says",
    [
        (lambda q: q.double(), "float64"), (lambda q: q.to("meta"), "meta"), (lambda q: q.long(), "int64"),
        (lambda q: q.numpy(), "NumPy"), (lambda q: q.tolist(), "list"), (lambda q: q[0], "4 axes"),
    ],
)  # fmt: skip
def test_refusals(make, says):
    q, k, v = (x.detach() for x in small())
    with pytest.raises(annulus.InvalidArgument, match=says):
        annulus.attention(q, make(k) if says != "4 axes" else k, v if says != "4 axes" else make(v))


def test_mixed_dtypes_are_refused():
    q, k, v = (x.detach() for x in small())
    with pytest.raises(annulus.InvalidArgument, match="bfloat16"):
        annulus.attention(q, k.bfloat16(), v)


@pytest.mark.parametrize("name", ["softmax_scale", "logits_soft_cap"])
def test_learned_numbers_are_refused(name):
    """They would never be learned."""
    q, k, v = small()
    number = torch.nn.Parameter(torch.tensor(0.5))
    with pytest.raises(annulus.InvalidArgument, match=f"{name} requires gradients"):
        annulus.attention(q, k, v, **{name: number})
    expected = annulus.attention(q, k, v, **{name: 0.5})
    assert torch.equal(annulus.attention(q, k, v, **{name: number.detach()}), expected)
    with torch.no_grad():
        assert torch.equal(annulus.attention(q, k, v, **{name: number}), expected)


def test_autocast_leaves_the_operations_alone():
    """They compute in the dtype they are given; the drop-in follows autocast."""
    q, k, v = (x.detach() for x in small(kv_heads=2))
    with torch.autocast("cpu", torch.bfloat16):
        assert annulus.attention(q, k, v).dtype == torch.float32
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        ours = annulus.torch.scaled_dot_product_attention(*heads)
        assert ours.dtype == torch.nn.functional.scaled_dot_product_attention(*heads).dtype == torch.bfloat16
        mixed = annulus.torch.scaled_dot_product_attention(heads[0], heads[1].bfloat16(), heads[2])
        assert mixed.dtype == torch.bfloat16


def test_default_device():
    q, k, v = small()
    torch.set_default_device("meta")
    try:
        _, lse = annulus.attention(q, k, v, return_lse=True)
        assert torch.autograd.grad(lse.sum(), q)[0].device.type == "cpu"
        heads = [x.detach().transpose(1, 2) for x in (q, q, q)]
        assert annulus.torch.scaled_dot_product_attention(*heads, dropout_p=0.5).device.type == "cpu"
    finally:
        torch.set_default_device(None)


# --- out= and memory -------------------------------------------------------------------------------------


def test_out():
    q, k, v = (x.detach() for x in small())
    expected, lse = annulus.attention(q, k, v, return_lse=True)
    out = torch.full((1, 2, 3, 3), math.nan).transpose(1, 2)
    version, place = out._version, out.data_ptr()
    assert annulus.attention(q, k, v, out=out) is out
    assert torch.equal(out, expected) and out.data_ptr() == place and out._version > version
    pair = annulus.ring_attention(q, k, v, out=out, return_lse=True, workers=2)
    assert pair[0] is out and pair[1].shape == lse.shape
    with torch.inference_mode():
        annulus.attention(q, k, v, out=torch.empty_like(expected))


def test_out_is_refused():
    q, k, v = small()
    for requires in ({}, {"requires_grad": True}):
        given = (q, k, v) if not requires else (q.detach(), k.detach(), v.detach())
        with pytest.raises(annulus.InvalidArgument, match="autograd"):
            annulus.attention(*given, out=torch.empty(1, 3, 2, 3, **requires))
    with torch.no_grad():
        annulus.attention(q, k, v, out=torch.empty(1, 3, 2, 3, requires_grad=True))
        wrong = {
            "shape": torch.empty(1, 3, 2, 4), "type": torch.empty(1, 3, 2, 3, dtype=torch.bfloat16),
            "PyTorch": torch.empty(1, 3, 2, 3).numpy(), "stride 0": torch.empty(1, 3, 2, 1).expand(1, 3, 2, 3),
            "negated": torch.empty(1, 3, 2, 3, dtype=torch.complex64).conj().imag,
        }  # fmt: skip
        for says, out in wrong.items():
            with pytest.raises(annulus.InvalidArgument, match=says):
                annulus.attention(q, k, v, out=out)
        with pytest.raises(annulus.InvalidArgument, match="overlaps"):
            annulus.attention(q, q[:, :, :1], q[:, :, :1], out=q)


def test_out_over_a_saved_tensor_is_noticed():
    x, factor = torch.ones(1, 3, 2, 3, requires_grad=True), torch.ones(1, 3, 2, 3)
    y = (x * factor).sum()
    q, k, v = (t.detach() for t in small())
    annulus.attention(q, k, v, out=factor)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "bhsd", "sliced", "expanded"])
def test_results_are_the_only_new_tensors(layout, dtype):
    """PyTorch allocates out and lse in the forward, the gradients in the backward, and copies nothing."""
    q, k, v = (rows(2, 4, 64, 16, dtype=dtype, grad=False) for _ in range(3))
    if layout == "contiguous":
        q, k, v = (x.view(2, 64, 4, 16) for x in (q, k, v))
    elif layout == "expanded":
        q, k, v = (x[:1, :1, :, :].expand(2, 4, 64, 16).transpose(1, 2) for x in (q, k, v))
    else:
        q, k, v = (x.transpose(1, 2)[..., : 8 if layout == "sliced" else 16] for x in (q, k, v))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out_bytes, lse_bytes = q.numel() * q.element_size(), 2 * 4 * 64 * 4

    def allocated(function):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            result = function()
        events = profile.key_averages()
        copies = {e.key for e in events} & {"aten::copy_", "aten::clone", "aten::contiguous", "aten::to", "aten::add_"}
        assert not copies
        return result, sum(e.self_cpu_memory_usage for e in events if e.self_cpu_memory_usage > 0)

    assert allocated(lambda: annulus.attention(q, k, v, causal=True))[1] == out_bytes
    given = torch.empty(q.shape, dtype=dtype)
    assert allocated(lambda: annulus.attention(q, k, v, out=given))[1] == 0
    out, memory = allocated(lambda: annulus.ring_attention(*leaves, causal=True, workers=2))
    assert memory == out_bytes + lse_bytes
    dout = torch.ones((), dtype=dtype).expand(out.shape)
    assert allocated(lambda: torch.autograd.grad(out, leaves, dout))[1] == 3 * out_bytes


# --- ranks -----------------------------------------------------------------------------------------------


def shards(x, partition, rank, world, axis=1):
    return x.index_select(axis, torch.tensor(partition.positions(rank, world, x.shape[axis]), dtype=torch.long))


@pytest.mark.parametrize("world,kind", [(2, "zigzag"), (3, "striped"), (4, "contiguous")])
def test_ranks(world, kind):
    """Every rank's gradients, sinks' and bias' too, against the whole sequence in one process."""
    seq, partition = 11, annulus.Partition(kind)
    q, k, v = rows(2, seq, 4, 8), rows(2, seq, 2, 8), rows(2, seq, 2, 8)
    sinks, bias = torch.randn(4, requires_grad=True), rows(1, 4, seq, seq)
    ids = torch.tensor([[0] * 5 + [1] * 6, [0] * 11])
    dout = torch.randn(2, seq, 4, 8)

    def run(comm):
        def mine(x, axis=1):
            return shards(x, partition, comm.rank, world, axis).detach().clone()

        local = [mine(x).requires_grad_() for x in (q, k, v)]
        extra = [sinks.detach().clone().requires_grad_(), mine(bias, 2).requires_grad_()]
        out = annulus.ring_attention(
            *local, softmax_aux=extra[0], bias=extra[1], q_segment_ids=mine(ids), causal=True, comm=comm,
            partition=partition,
        )  # fmt: skip
        out.backward(mine(dout))
        return out.detach(), [x.grad for x in (*local, *extra)]

    results = annulus.run_workers(run, world)
    leaves = (q, k, v, sinks, bias)
    whole = annulus.ring_attention(q, k, v, softmax_aux=sinks, bias=bias, q_segment_ids=ids, causal=True)
    expected = torch.autograd.grad(whole, leaves, dout)
    close = {"rtol": 2e-5, "atol": 5e-6}
    for rank, (out, gradients) in enumerate(results):
        torch.testing.assert_close(out, shards(whole, partition, rank, world), **close)
        for n in range(3):
            torch.testing.assert_close(gradients[n], shards(expected[n], partition, rank, world), **close)
        torch.testing.assert_close(gradients[4], shards(expected[4], partition, rank, world, 2), **close)
        # Every rank holds all of the sinks, and their whole gradient.
        torch.testing.assert_close(gradients[3], expected[3], **close)


def test_mesh_and_context_parallel():
    """Two rings of two ranks; heads before rows."""
    q, k, v = (rows(2, 3, 10, 4) for _ in range(3))
    expected = annulus.torch.scaled_dot_product_attention(q, k, v, is_causal=True)
    gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))
    partition = annulus.Partition.zigzag()

    def run(comm):
        mesh = annulus.Mesh(comm, {"dp": 2, "sp": 2})
        place = mesh.coordinates
        mine = [shards(x[place["dp"], None], partition, place["sp"], 2, 2).detach().requires_grad_() for x in (q, k, v)]
        out = annulus.torch.context_parallel_attention(
            *mine, comm=mesh, axis_name="sp", partition="zigzag", is_causal=True
        )
        out.square().sum().backward()
        return place, out.detach(), [x.grad for x in mine]

    for place, out, found in annulus.run_workers(run, 4):
        for x, whole in zip((out, *found), (expected, *gradients)):
            want = shards(whole[place["dp"], None], partition, place["sp"], 2, 2)
            torch.testing.assert_close(x, want, rtol=2e-5, atol=5e-6)


def test_ranks_keep_the_callers_grad_mode():
    q, k, v = small(q_len=4)
    with torch.no_grad():
        out = annulus.run_workers(lambda c: annulus.ring_attention(q, k, v, comm=c), 1)[0]
    assert not out.requires_grad


def test_wrong_rings_are_refused():
    q, k, v = small(q_len=4)
    with pytest.raises(annulus.InvalidArgument, match="axis_name"):
        annulus.ring_attention(q, k, v, axis_name="sp")
    with pytest.raises(annulus.InvalidArgument, match="nowhere"):
        annulus.run_workers(
            lambda c: annulus.ring_attention(q, k, v, comm=annulus.Mesh(c, {"sp": 1}), axis_name="nowhere"), 1
        )
    with pytest.raises(TypeError, match="casual"):
        annulus.run_workers(lambda c: annulus.torch.context_parallel_attention(q, k, v, comm=c, casual=True), 1)
