"""Operators of torch.ops.annulus: what PyTorch's own checks, torch.compile and torch.export make of them."""

import gc

import pytest

torch = pytest.importorskip("torch")

import annulus
import annulus.torch

pytestmark = pytest.mark.torch

sdpa = annulus.torch.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def fixed():
    torch.manual_seed(3)
    torch._dynamo.reset()


def rows(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


MASK = annulus.Mask.causal() | annulus.Mask.prefix(2)
PARTITION = annulus.Partition.from_positions([[0, 5, 3], [4, 1, 2]])
OPERATOR = {
    "defaults": {}, "causal": {"causal": True}, "top_left": {"causal": True, "top_left": True, "workers": 2},
    "window": {"window": [2, -1]}, "chunk": {"chunk_size": 4, "fused_backward": False},
    "arithmetic": {"softmax_scale": 0.5, "logits_soft_cap": 3.0, "dropout_prob": 0.25, "dropout_seed": 11},
    "segments": {"q_segment_ids": torch.tensor([[0, 0, 1, 1, 2, 2]], dtype=torch.int32), "padding_segment_id": 2},
    "masks": {"attention_mask": torch.rand(1, 1, 6, 6) < 0.6, "kv_lengths": torch.tensor([4])},
    "objects": {"mask": MASK._handle, "custom_partition": PARTITION._handle, "workers": 2, "fwd_blocks": [16, 16]},
    "sinks": {"softmax_aux": torch.zeros(4, requires_grad=True)},
    "bias": {"bias": torch.zeros(1, 4, 6, 6, requires_grad=True), "softmax_aux": torch.zeros(3)},
    "seed": {"seed": torch.tensor(5), "dropout_prob": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATOR)
def test_opcheck(name):
    given = (rows(1, 6, 4, 8), rows(1, 6, 2, 8), rows(1, 6, 2, 5))
    torch.library.opcheck(torch.ops.annulus.attention.default, given, OPERATOR[name])


@pytest.mark.parametrize("extra", [False, True], ids=["plain", "all"])
def test_opcheck_backward(extra):
    q, k, v = (x.detach() for x in (rows(1, 6, 4, 8), rows(1, 6, 2, 8), rows(1, 6, 2, 5)))
    aux, bias = (torch.zeros(4, 2), torch.zeros(1, 1, 6, 6)) if extra else (None, None)
    numbers = (
        True,
        False,
        [3, -1],
        None,
        None,
        None,
        None,
        0.0,
        0,
        True,
        None,
        None,
        0,
        "contiguous",
        0,
        None,
        0,
        None,
    )
    out, lse = torch.ops.annulus.attention(q, k, v, aux, bias, None, None, None, None, None, *numbers)
    dlse = torch.randn_like(lse) if extra else None
    torch.library.opcheck(
        torch.ops.annulus.attention_backward.default,
        (torch.randn_like(out), q, k, v, out, lse, dlse, extra, extra, aux, bias, *(None,) * 5, *numbers),
    )


def test_opcheck_merge():
    out, lse = torch.randn(1, 3, 2, 4), torch.randn(1, 2, 3)
    given = [x.clone().requires_grad_() for x in (out, lse, -out, lse + 1)]
    torch.library.opcheck(torch.ops.annulus.merge.default, given)


def compiled(function, backend="aot_eager", dynamic=None):
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)


def agrees(function, *inputs, **how):
    """Compiled and eager, forward and every gradient: the same bits."""
    other = compiled(function, **how)
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    results = []
    for f in (function, other):
        out = f(*inputs)
        ends = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
        gradients = torch.autograd.grad([x.square().sum() for x in ends], leaves)
        results.append([*(out if isinstance(out, tuple) else (out,)), *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results))


Q, K, V = (2, 6, 4, 8), (2, 6, 2, 8), (2, 6, 2, 8)
PROGRAMS = {
    "attention": lambda q, k, v: annulus.attention(q, k, v),
    "lse": lambda q, k, v: annulus.attention(q, k, v, causal=True, return_lse=True),
    "ring": lambda q, k, v: annulus.ring_attention(q, k, v, causal=True, workers=3, partition="zigzag"),
    "objects": lambda q, k, v: annulus.ring_attention(
        q, k, v, mask_builder=MASK, partition=PARTITION, workers=2, fwd_params=annulus.FwdParams(16, None),
        bwd_params={"kv_blocksize": 16}, sliding_window=(None, 2), logits_soft_cap=4.0, softmax_scale=1,
    ),
    "ids": lambda q, k, v: annulus.attention(q, k, v, q_segment_ids=torch.arange(6).div(2).long().expand(2, 6)),
    "dropout": lambda q, k, v: annulus.attention(q, k, v, dropout_prob=0.5, dropout_seed=2**64 - 1),
    "around": lambda q, k, v: annulus.attention(q * 2, k.transpose(1, 2).contiguous().transpose(1, 2), v).relu(),
    "heads_first": lambda q, k, v: sdpa(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_compiled_programs(name):
    agrees(PROGRAMS[name], rows(*Q), rows(*K), rows(*V))


def test_compiled_sinks_and_bias():
    agrees(
        lambda q, k, v, s, b: annulus.ring_attention(q, k, v, softmax_aux=s, bias=b, causal=True),
        rows(*Q), rows(*K), rows(*V), rows(4, 2), rows(1, 4, 6, 6),
    )  # fmt: skip


def test_inductor():
    def program(q, k, v, bias):
        return annulus.attention(q.sin(), k, v + 1, bias=bias, causal=True).cos()

    given = [rows(*Q), rows(*K), rows(*V), rows(1, 1, 6, 6)]
    eager, other = program(*given), compiled(program, backend="inductor")(*given)
    torch.testing.assert_close(other, eager)
    for a, b in zip(*(torch.autograd.grad(x.sum(), given) for x in (eager, other))):
        torch.testing.assert_close(a, b)


def test_dynamic_shapes_do_not_compile_again():
    from torch._dynamo.testing import CompileCounterWithBackend

    def function(q, w):
        return annulus.ring_attention(q, q, q, causal=True, sliding_window=w, chunk_size=2 * w)

    count = CompileCounterWithBackend("aot_eager")
    other = torch.compile(function, fullgraph=True, backend=count, dynamic=True)
    for length, window in ((8, 3), (9, 4), (30, 5)):
        q = rows(2, length, 2, 4)
        out = other(q, window)
        assert torch.equal(out, function(q, window))
        assert torch.equal(*(torch.autograd.grad(x.sum(), q)[0] for x in (out, function(q, window))))
    assert sum("annulus" in graph.code for graph in count.graphs) == 1


def test_compiled_dropout_follows_the_generator():
    program = compiled(lambda q: sdpa(q, q, q, dropout_p=0.5))
    q, results = rows(1, 2, 16, 4), []
    for function, seed in ((program, 1), (program, 1), (program, 2), (lambda q: sdpa(q, q, q, dropout_p=0.5), 1)):
        torch.manual_seed(seed)
        out = function(q)
        results.append((out, torch.autograd.grad(out.sum(), q)[0]))
    for n, same in ((1, True), (2, False), (3, True)):
        assert [torch.equal(a, b) for a, b in zip(results[0], results[n])] == [same, same]


def test_objects_live_until_the_backward():
    """Graphs know a mask by its number; whoever made it may forget it."""
    program = compiled(lambda q, mask: annulus.attention(q, q, q, mask_builder=mask))
    for n in (1, 3, 4):
        q = rows(1, 6, 2, 4)
        out = program(q, annulus.Mask.prefix(n))
        gc.collect()
        (found,) = torch.autograd.grad(out.sum(), q)
        assert torch.equal(
            found, torch.autograd.grad(annulus.attention(q, q, q, kv_lengths=torch.tensor([n])).sum(), q)[0]
        )


def test_compiled_merge():
    def program(q, k, v):
        halves = [annulus.attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, 2), slice(2, 6))]
        return annulus.merge(*halves[0], *halves[1])

    agrees(program, rows(*Q), rows(*K), rows(*V))


def test_compiled_autocast():
    def program(q):
        with torch.autocast("cpu", torch.bfloat16):
            return sdpa(q, q, q)

    q = rows(1, 2, 6, 4)
    assert compiled(program)(q).dtype == program(q).dtype == torch.bfloat16


@pytest.mark.parametrize("mesh", [False, True])
def test_compiled_ranks(mesh):
    q, k, v = rows(1, 8, 2, 4), rows(1, 8, 2, 4), rows(1, 8, 2, 4)

    def run(comm):
        ring = {"comm": annulus.Mesh(comm, {"sp": 2}), "axis_name": "sp"} if mesh else {"comm": comm}
        program = compiled(lambda *x: annulus.ring_attention(*x, causal=True, **ring))
        mine = [x[:, 4 * comm.rank : 4 * comm.rank + 4].detach().requires_grad_() for x in (q, k, v)]
        out = program(*mine)
        out.sum().backward()
        return [out.detach(), *(x.grad for x in mine)]

    found = [torch.cat(parts, 1) for parts in zip(*annulus.run_workers(run, 2, timeout_s=120))]
    out = annulus.ring_attention(q, k, v, causal=True)
    for a, b in zip(found, (out, *torch.autograd.grad(out.sum(), (q, k, v)))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.sinks = torch.nn.Parameter(torch.randn(2))
        self.mask = annulus.Mask.causal()

    def forward(self, x):
        return annulus.attention(x, x, x, mask_builder=self.mask, softmax_aux=self.sinks)


def test_export():
    layer, x = Layer(), torch.randn(1, 8, 2, 4)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({1: length},))
    longer = torch.randn(1, 11, 2, 4)
    expected = layer(longer)
    del layer
    gc.collect()
    assert torch.equal(program.module()(longer), expected)


@pytest.mark.parametrize(
    "options,says",
    [
        ({"workers": 0}, "workers is 0"), ({"logits_soft_cap": 0.0}, "logits_soft_cap"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"dropout_prob": 1.5}, "dropout_prob"), ({"sliding_window": (1, 1, 1)}, "sliding_window"),
    ],
)  # fmt: skip
def test_compiled_mistakes(options, says):
    """What eager refuses, a compiled program refuses when it runs."""
    q = rows(1, 6, 2, 4)
    with pytest.raises(annulus.InvalidArgument, match=says):
        annulus.ring_attention(q, q, q, **options)
    with pytest.raises(annulus.InvalidArgument, match=says):
        compiled(lambda q: annulus.ring_attention(q, q, q, **options))(q)


@pytest.mark.parametrize(
    "options",
    [
        {"causal_alignment": "middle"}, {"dropout_seed": -1, "dropout_prob": 0.5}, {"partition": "diagonal"},
        {"mask_builder": lambda *_: MASK}, {"out": torch.empty(1, 6, 2, 4)},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_mistakes_that_stop_the_compiler(options):
    q = rows(1, 6, 2, 4)
    with pytest.raises((torch._dynamo.exc.TorchDynamoException, annulus.InvalidArgument)):
        compiled(lambda q: annulus.ring_attention(q, q, q, **options))(q)
