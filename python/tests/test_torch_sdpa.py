"""annulus.torch.scaled_dot_product_attention where torch.nn.functional's stood."""

import pytest

torch = pytest.importorskip("torch")

import annulus
from annulus.torch import scaled_dot_product_attention as ours

pytestmark = pytest.mark.torch

theirs = torch.nn.functional.scaled_dot_product_attention
# Two float32 computations of some 30 terms up to 3, each within (8 + 2 * 30) u of the truth: 68 * 6e-8 * 3, twice.
CLOSE = {"rtol": 2.5e-5, "atol": 2.5e-5}


@pytest.fixture(autouse=True)
def fixed():
    torch.manual_seed(5)


def rows(*shape):
    return torch.randn(shape, requires_grad=True)


def same(q, k, v, mask=None, **options):
    """Result and every gradient, the mask's too."""
    leaves = [x for x in (q, k, v, mask) if x is not None and x.requires_grad]
    a, b = (f(q, k, v, attn_mask=mask, **options) for f in (ours, theirs))
    assert a.shape == b.shape and a.dtype == b.dtype
    torch.testing.assert_close(a, b, **CLOSE)
    dout = torch.randn_like(b)
    for x, y in zip(torch.autograd.grad(a, leaves, dout), torch.autograd.grad(b, leaves, dout)):
        torch.testing.assert_close(x, y, **CLOSE)


SHAPES = {
    "2d": ((5, 8), (7, 8), (7, 8)), "3d": ((3, 5, 8), (3, 7, 8), (3, 7, 6)),
    "4d": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
    "5d": ((2, 4, 3, 5, 8), (2, 4, 3, 7, 8), (2, 4, 3, 7, 8)), "6d": ((1, 2, 2, 3, 5, 8),) + 2 * ((1, 2, 2, 3, 7, 8),),
    "one query for a batch": ((1, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "one key head": ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "one query head": ((2, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "one value head": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 1, 7, 8)),
    "one key head only": ((2, 3, 5, 8), (2, 1, 7, 8), (2, 3, 7, 8)),
    "mixed axes": ((3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "5d batches": ((2, 1, 3, 5, 8), (1, 4, 3, 7, 8), (2, 4, 3, 7, 8)),
    "no keys": ((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 8)),
    "no queries": ((2, 3, 0, 8), (2, 3, 7, 8), (2, 3, 7, 8)), "no batch": ((0, 3, 5, 8), (0, 3, 7, 8), (0, 3, 7, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    same(*(rows(*shape) for shape in SHAPES[name]))


@pytest.mark.parametrize("lengths", [(5, 7), (9, 7), (7, 7), (1, 6)], ids=str)
@pytest.mark.parametrize("gqa", [False, True])
def test_causal_is_top_left(lengths, gqa):
    heads = (6, 3 if gqa else 6)
    same(
        rows(2, heads[0], lengths[0], 8), rows(2, heads[1], lengths[1], 8), rows(2, heads[1], lengths[1], 8),
        is_causal=True, enable_gqa=gqa,
    )  # fmt: skip


@pytest.mark.parametrize("scale", [0.0, -0.5, 2.0, 1])
def test_scale(scale):
    same(rows(2, 3, 5, 8), rows(2, 3, 7, 8), rows(2, 3, 7, 8), scale=scale)


def test_strides():
    """Transposed, sliced and expanded tensors."""
    q, k = rows(2, 5, 3, 8).transpose(1, 2), rows(2, 3, 14, 16)[:, :, ::2, 1:9]
    same(q.detach().requires_grad_(), k.detach().requires_grad_(), rows(2, 3, 7, 8))
    same(rows(1, 1, 5, 8).expand(2, 3, 5, 8), rows(2, 3, 7, 8), rows(2, 3, 7, 8))


@pytest.mark.parametrize(
    "shape", [(5, 7), (1, 7), (5, 1), (2, 1, 5, 7), (1, 3, 5, 7), (3, 5, 7), (2, 3, 5, 7), (2, 1, 1, 7)], ids=str
)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks(shape, kind):
    mask = rows(*shape) if kind == "float" else torch.rand(shape) < 0.6
    same(rows(2, 3, 5, 8), rows(2, 3, 7, 8), rows(2, 3, 7, 8), mask)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_many_batch_axes(kind):
    given = rows(2, 2, 3, 5, 8), rows(2, 2, 3, 7, 8), rows(2, 2, 3, 7, 8)
    for shape in ((5, 7), (2, 1, 1, 5, 7), (2, 3, 5, 7)):
        same(*given, rows(*shape) if kind == "float" else torch.rand(shape) < 0.6)


def test_masks_of_minus_infinity():
    """Also whole rows of it: 0, with gradients 0."""
    mask = torch.where(torch.rand(1, 1, 5, 7) < 0.5, 0.0, -torch.inf)
    mask[0, 0, 2] = -torch.inf
    q, k, v = rows(2, 3, 5, 8), rows(2, 3, 7, 8), rows(2, 3, 7, 8)
    for m in (mask, mask == 0):
        out = ours(q, k, v, attn_mask=m)
        torch.testing.assert_close(out, theirs(q, k, v, attn_mask=m), **CLOSE)
        assert out[:, :, 2].eq(0).all()
        gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
        assert all(torch.isfinite(g).all() for g in gradients) and gradients[0][:, :, 2].eq(0).all()


def test_a_mask_that_is_broadcast_costs_no_copies():
    """Its gradient is as small as it is, in batch and heads."""
    q, k, v, mask = rows(4, 8, 16, 8), rows(4, 8, 16, 8), rows(4, 8, 16, 8), rows(16, 16)
    out = ours(q, k, v, attn_mask=mask)
    dout = torch.ones(()).expand(out.shape)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.autograd.grad(out, mask, dout)
    # Of q, k, v, which the library always computes, and the mask.
    wanted = 3 * 4 * q.numel() + 4 * mask.numel()
    assert sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages()) == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half(dtype):
    """Within two roundings of values that are at most 3."""
    q, k, v = (rows(2, 4, 16, 8).to(dtype) for _ in range(3))
    found, expected = ours(q, k, v, is_causal=True), theirs(*(x.double() for x in (q, k, v)), is_causal=True)
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= 3 * expected.abs().max() * torch.finfo(dtype).eps / 2


def test_workers():
    q, k, v = rows(2, 3, 9, 8), rows(2, 3, 9, 8), rows(2, 3, 9, 8)
    torch.testing.assert_close(ours(q, k, v, is_causal=True, workers=3), theirs(q, k, v, is_causal=True), **CLOSE)


def test_dropout():
    """Determined by the generator; kept weights are scaled; the gradient drops what the forward dropped."""
    q, k, v = rows(2, 4, 32, 8), rows(2, 4, 32, 8), rows(2, 4, 32, 8)

    def run(seed, p=0.5):
        torch.manual_seed(seed)
        out = ours(q, k, v, dropout_p=p)
        return out, *torch.autograd.grad(out.sum(), (q, k, v))

    assert all(torch.equal(a, b) for a, b in zip(run(1), run(1)))
    assert not torch.equal(run(1)[0], run(2)[0])
    torch.manual_seed(1)
    first, second = ours(q, k, v, dropout_p=0.5), ours(q, k, v, dropout_p=0.5)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    ours(q, k, v)
    assert torch.equal(state, torch.get_rng_state())
    ones = torch.ones(2, 4, 32, 1)
    kept = ours(torch.zeros(2, 4, 32, 8), torch.zeros(2, 4, 32, 8), ones, dropout_p=0.25).mean()
    # 8192 draws: the mean of kept / 0.75 has a standard deviation of 0.0064.
    assert abs(kept - 1) < 0.04


@pytest.mark.parametrize(
    "change",
    [
        {"query": torch.randn(8)}, {"key": torch.randn(2, 3, 7, 6)}, {"key": torch.randn(2, 2, 7, 8)},
        {"key": torch.randn(2, 3, 7, 8).bfloat16()}, {"attn_mask": torch.randn(5, 6)},
        {"attn_mask": torch.ones(5, 7).int()},
        {"attn_mask": torch.ones(5, 7).double()}, {"attn_mask": torch.ones(5, 7).bfloat16()},
        {"attn_mask": torch.ones(1, 2, 3, 5, 7) > 0}, {"attn_mask": torch.ones(5, 7) > 0, "is_causal": True},
        {"dropout_p": 1.5}, {"dropout_p": -0.5}, {"key": [1.0]}, {"value": torch.randn(3, 3, 7, 8)},
        {"query": torch.randn(2, 4, 5, 8), "enable_gqa": True},
    ],
    ids=lambda change: "-".join(f"{n}{list(getattr(x, 'shape', []))}" for n, x in change.items()),
)  # fmt: skip
def test_what_pytorch_refuses_is_refused(change):
    given = {
        "query": torch.randn(2, 3, 5, 8),
        "key": torch.randn(2, 3, 7, 8),
        "value": torch.randn(2, 3, 7, 8),
        **change,
    }
    with pytest.raises((RuntimeError, TypeError, IndexError)):
        theirs(**given)
    with pytest.raises(annulus.InvalidArgument):
        ours(**given)


def test_known_differences():
    q = torch.randn(2, 3, 5, 8)
    with pytest.raises(annulus.InvalidArgument, match="float64"):
        ours(q.double(), q.double(), q.double())
    with pytest.raises(annulus.InvalidArgument, match="dropout"):
        ours(q, q, q, dropout_p=1.0)
    # PyTorch reads beyond the values here.
    with pytest.raises(annulus.InvalidArgument):
        ours(q, q, q[:, :, :4])


def test_in_place_of_pytorchs(monkeypatch):
    """A module of PyTorch with the function exchanged."""
    layer = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 6, 16)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(6)
    expected, _ = layer(x, x, x, need_weights=False, attn_mask=mask)
    calls = []
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or ours(*a, **k)
    )
    found, _ = layer(x, x, x, need_weights=False, attn_mask=mask)
    assert calls
    torch.testing.assert_close(found, expected, **CLOSE)
