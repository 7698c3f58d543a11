"""Agreement with PyTorch computations that do not use annulus: the formula in float64, and PyTorch's own attention.

Cell n of the grid is made from the number n alone: ``pytest -k "cell and n17-"`` repeats it.
"""

import math
import random

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import annulus
from torch_formula import ROUNDING, TINY, Rules, bounds, dropout_keep, formula, gradients_on, philox

pytestmark = pytest.mark.torch

CELLS = 360
NAMES = ("dq", "dk", "dv", "daux", "dbias")


def laid_out(x, layout):
    """The same values under other strides."""
    if layout == "bhsd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "bhds":
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    if layout == "sliced":
        b, s, h, d = x.shape
        whole = torch.full((b + 1, 2 * s + 1, h, d + 3), math.nan, dtype=x.dtype)
        view = whole[1:, 1 : 2 * s + 1 : 2, :, 2 : d + 2]
        view.copy_(x)
        return view
    return x


def random_mask(rng, q_len, kv_len, depth=2):
    """An annulus.Mask and what it must mean, bool [q, kv]."""
    i, j = np.ogrid[:q_len, :kv_len]
    if depth and rng.random() < 0.6:
        (a, sees_a), (b, sees_b) = (random_mask(rng, q_len, kv_len, depth - 1) for _ in range(2))
        return (a & b, sees_a & sees_b) if rng.random() < 0.4 else (a | b, sees_a | sees_b)
    bits = np.random.default_rng(rng.getrandbits(32))
    kind = rng.choice(["full", "causal", "window", "chunked", "prefix", "dense", "block_sparse"])
    everywhere = np.ones((q_len, kv_len), bool)
    if kind == "causal":
        shift = rng.randint(-2, 3)
        return annulus.Mask.causal(shift), everywhere & (j <= i + shift)
    if kind == "window":
        left, right = rng.choice([(3, 2), (None, 1), (5, None), (0, 0)])
        sees = (everywhere if left is None else i - left <= j) & (everywhere if right is None else j <= i + right)
        return annulus.Mask.sliding_window(-1 if left is None else left, -1 if right is None else right), sees
    if kind == "chunked":
        c = rng.choice([1, 4, 7])
        return annulus.Mask.chunked(c), (i // c == j // c) & (j <= i)
    if kind == "prefix":
        n = rng.randint(0, kv_len + 2)
        return annulus.Mask.prefix(n), everywhere & (j < n)
    if kind == "dense":
        a = bits.random((q_len, kv_len)) < 0.5
        return annulus.Mask.dense(a), a
    if kind == "block_sparse":
        c = rng.choice([1, 3, 8])
        a = bits.random((-(-q_len // c), -(-kv_len // c))) < 0.6
        return annulus.Mask.block_sparse(c, a), a[i // c, j // c] if a.size else everywhere
    return annulus.Mask.full(), everywhere


class Cell:
    """A random problem: tensors, options, and the rules that the options must mean."""

    def __init__(self, number):
        self.rng = random.Random(f"cell {number}")
        self.gen = torch.Generator().manual_seed(number)
        self.options, self.said = {}, []
        self._shape()
        self._operation()
        self._visibility()
        self._arithmetic()
        self._tensors()

    def on(self, probability=0.25):
        return self.rng.random() < probability

    def normal(self, *shape):
        return torch.randn(shape, generator=self.gen)

    def _shape(self):
        lengths = [1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 47, 64, 65]
        rng = self.rng
        self.B, self.Hk, group = rng.choice([1, 1, 2, 3]), rng.choice([1, 2, 3]), rng.choice([1, 1, 2, 3])
        self.H, self.D = self.Hk * group, rng.choice([1, 3, 8, 16, 20, 33])
        self.Dv = self.D if self.on(0.6) else rng.choice([1, 5, 16, 24])
        self.M = rng.choice(lengths)
        self.N = self.M if self.on(0.5) else rng.choice(lengths)
        if self.on(0.06):
            empty = rng.choice("BMN")
            setattr(self, empty, 0)
        self.dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])

    def _operation(self):
        rng, o = self.rng, self.options
        self.ring, self.workers = self.on(0.6), 1
        alignments = ["top_left", "bottom_right"]
        self.alignment = alignments[0] if self.ring else alignments[1]
        if self.on(0.4):
            o["causal_alignment"] = self.alignment = rng.choice(alignments)
        o["fused_backward"] = self.on(0.5)
        if self.ring and self.on(0.85):
            self.workers = rng.choice([1, 2, 2, 3, 4, 5, self.M + 2])
            kind = rng.choice(["contiguous", "striped", "zigzag", "custom"])
            if kind == "custom" and self.M == self.N:
                ranks = [[] for _ in range(self.workers)]
                for position in rng.sample(range(self.M), self.M):
                    rng.choice(ranks).append(position)
                o["partition"] = annulus.Partition.from_positions(ranks)
            elif kind != "custom":
                o["partition"] = kind if self.on(0.7) else getattr(annulus.Partition, kind)()
            self.said += [f"workers={self.workers}", kind]
        if self.on(0.2):
            o["fwd_params"] = annulus.FwdParams(rng.choice([None, 16, 64]), rng.choice([None, 8, 128]))
            o["bwd_params"] = annulus.BwdParams(rng.choice([None, 16, 64]), rng.choice([None, 8, 128]))

    def _visibility(self):
        rng, o, B, M, N = self.rng, self.options, self.B, self.M, self.N
        shift = N - M if self.alignment == "bottom_right" else 0
        i, j = torch.arange(M)[:, None], torch.arange(N)[None, :]
        sees = torch.ones(B, self.H, M, N, dtype=torch.bool)
        if self.on(0.45):
            o["causal"] = True
            sees &= j <= i + shift
        if self.on():
            window = rng.choice([0, 3, 20, (2, 3), (None, 2), (4, None), (-1, 0), (None, None), [5, 1]])
            left, right = (window, window) if isinstance(window, int) else window
            o["sliding_window"] = window
            if left not in (None, -1):
                sees &= i + shift - left <= j
            if right not in (None, -1):
                sees &= j <= i + shift + right
        if self.on(0.15):
            c = o["chunk_size"] = rng.choice([1, 4, 7, 32])
            sees &= (i // c == j // c) & (j <= i)
        if self.on():
            self._segments(sees)
        if self.on(0.2):
            lengths = torch.randint(0, N + 1, (B,), generator=self.gen)
            o["kv_lengths"] = lengths.to(rng.choice([torch.int32, torch.int64]))
            sees &= j < lengths[:, None, None, None]
        if self.on(0.2):
            shape = (rng.choice([1, B]), rng.choice([1, self.H]), M, N)
            mask = torch.rand(shape, generator=self.gen) < 0.7
            if self.on(0.3):
                mask = mask[..., :1, :].expand(shape)
            o["attention_mask"] = mask
            sees &= mask
        if self.on():
            self._mask_builder(sees)
        self.sees = sees

    def _segments(self, sees):
        rng, o = self.rng, self.options
        kind = rng.choice([torch.int32, torch.int64])
        q = torch.randint(0, 3, (self.B, self.M), generator=self.gen)
        kv = torch.randint(0, 3, (self.B, self.N), generator=self.gen)
        if self.on(0.5):
            q, kv = q.sort(1)[0], kv.sort(1)[0]
        if self.M == self.N and self.on(0.5):
            name = rng.choice(["q_segment_ids", "kv_segment_ids"])
            q = kv
            o[name] = q.to(kind)
        else:
            o["q_segment_ids"], o["kv_segment_ids"] = q.to(kind), kv.to(rng.choice([torch.int32, torch.int64]))
        sees &= (q[:, :, None] == kv[:, None, :])[:, None]
        if self.on(0.5):
            padding = o["padding_segment_id"] = rng.choice([0, 2, 7])
            sees &= ((q != padding)[:, :, None] & (kv != padding)[:, None, :])[:, None]

    def _mask_builder(self, sees):
        if self.on(0.3):
            mask, meaning = random_mask(self.rng, self.M, self.N)
            self.options["mask_builder"] = mask
            sees &= torch.from_numpy(meaning)
            return
        pairs = [random_mask(self.rng, self.M, self.N) for _ in range(self.H)]

        def builder(q_len, kv_len, num_heads, head, num_reps):
            assert (q_len, kv_len, num_heads, num_reps) == (self.M, self.N, self.H, self.H // self.Hk)
            return pairs[head][0]

        self.options["mask_builder"] = builder
        for head, (_, meaning) in enumerate(pairs):
            sees[:, head] &= torch.from_numpy(meaning)

    def _arithmetic(self):
        rng, o, dtype = self.rng, self.options, self.dtype
        self.aux = self.bias = None
        if self.on(0.3):
            o["softmax_scale"] = rng.choice([0.3, 1.0, -0.5, 0.0])
        if self.on():
            o["logits_soft_cap"] = rng.choice([0.5, 5.0, 30.0])
        if self.on(0.3):
            shape = rng.choice([(self.H,), (self.H + rng.randint(1, 3),), (self.H, 1), (self.H, 3)])
            self.aux = (2 * self.normal(*shape)).clamp(max=5)
            self.aux.flatten()[0] = 5.0
            if self.on(0.4):
                self.aux.flatten()[-1] = -torch.inf
            self.aux = self.aux.to(rng.choice([torch.float32, dtype]))
        if self.on(0.3):
            shape = (rng.choice([1, self.B]), rng.choice([1, self.H]), self.M, self.N)
            self.bias = self.normal(*shape).to(rng.choice([torch.float32, dtype]))
            if self.on(0.3):
                self.bias = self.bias[:, :, :1].expand(shape) if self.M else self.bias
            elif self.on(0.3):
                self.bias[torch.rand(shape, generator=self.gen) < 0.1] = -torch.inf
        keep = 1.0
        if self.on(0.2):
            prob, seed = o["dropout_prob"], o["dropout_seed"] = rng.choice([0.1, 0.5, 0.9]), rng.getrandbits(64)
            keep = dropout_keep(seed, prob, self.B, self.H, self.M, self.N)
        self.rules = Rules(
            self.sees, keep, o.get("softmax_scale"), o.get("logits_soft_cap"), self.workers,
            {"aux": getattr(self.aux, "dtype", None), "bias": getattr(self.bias, "dtype", None)},
        )  # fmt: skip

    def _tensors(self):
        """q, k, v for annulus and for the reference: what nobody sees is NaN in the first, 0 in the second."""
        shapes = {
            "q": (self.B, self.M, self.H, self.D), "k": (self.B, self.N, self.Hk, self.D),
            "v": (self.B, self.N, self.Hk, self.Dv),
        }  # fmt: skip
        sharpness = self.rng.choice([1.0, 1.0, 3.0])
        group = (self.Hk, self.H // self.Hk)
        unseen = {
            "q": ~self.sees.any(-1).transpose(1, 2),
            "k": ~self.sees.unflatten(1, group).any(2).any(2).transpose(1, 2),
        }
        unseen["v"] = unseen["k"]
        self.poisoned, self.repeats = self.on(0.35), False
        self.given, self.clean = {}, {}
        for name, shape in shapes.items():
            x = self.normal(*shape) * (sharpness if name != "v" else 1)
            layout = self.rng.choice(["contiguous", "bhsd", "bhds", "sliced", "expanded"])
            if layout == "expanded" and not self.poisoned and x.numel():
                axis = self.rng.choice([0, 1, 2])
                x = x.narrow(axis, 0, 1).to(self.dtype).expand(shape)
                self.repeats = True
            x = x.to(self.dtype)
            self.clean[name] = x.double()
            if self.poisoned:
                self.clean[name] = torch.where(unseen[name][..., None], 0.0, self.clean[name])
                x = torch.where(unseen[name][..., None], math.nan, x)
            self.given[name] = laid_out(x, layout)
            self.said.append(f"{name} {layout}")
        rows = (self.B, self.M, self.H, self.Dv)
        self.dout = self.normal(*rows).to(self.dtype)
        layout = self.rng.choice(["contiguous", "bhsd", "sliced", "expanded"])
        self.dout = laid_out(self.dout, layout)
        if layout == "expanded":
            self.dout = torch.ones((), dtype=self.dtype).expand(rows)
        self.dlse = self.normal(self.B, self.H, self.M) if self.on(0.4) else None
        self.said.append(f"dout {layout}")

    def forward(self, q, k, v, aux, bias):
        options = {**self.options, "softmax_aux": aux, "bias": bias, "return_lse": True}
        if self.ring:
            return annulus.ring_attention(q, k, v, workers=self.workers, **options)
        return annulus.attention(q, k, v, **options)

    def backward(self, q, k, v, aux, bias, out, lse):
        options = {**self.options, "softmax_aux": aux, "bias": bias, "causal_alignment": self.alignment}
        return annulus.attention_backward(
            self.dout, q, k, v, out, lse, workers=self.workers, dlse=self.dlse, want_dbias=bias is not None, **options
        )

    def u_p(self):
        """Does this machine round probabilities to bfloat16?"""
        if self.dtype != torch.bfloat16:
            return 0.0
        x = torch.zeros(1, 1, 1, 1, dtype=self.dtype)
        return 2.0**-8 if "probabilities" in annulus.explain("attention", x, x, x).arithmetic else 0.0

    def __str__(self):
        shapes = f"B{self.B} M{self.M} N{self.N} H{self.H}/{self.Hk} D{self.D}/{self.Dv} {self.dtype}"
        options = {n: list(x.shape) if isinstance(x, torch.Tensor) else x for n, x in self.options.items()}
        operation = "ring_attention" if self.ring else "attention"
        extra = [f"aux {list(self.aux.shape)} {self.aux.dtype}"] if self.aux is not None else []
        extra += [f"bias {list(self.bias.shape)} {self.bias.dtype}"] if self.bias is not None else []
        extra += ["poisoned"] * self.poisoned + [f"dlse {self.dlse is not None}"]
        return f"{operation} {shapes} {options} {' '.join(self.said + extra)}"


def agree(name, found, expected, bound, cell):
    """|found - expected| <= bound, elementwise; infinities must be equal and NaN nowhere."""
    assert found.shape == expected.shape, (name, found.shape, expected.shape, str(cell))
    found = found.double()
    assert torch.equal(torch.isneginf(found), torch.isneginf(expected)), f"{name}: -inf differs in {cell}"
    error = torch.where(torch.isneginf(expected), 0.0, (found - expected).abs())
    worst = torch.where(error.isnan(), torch.inf, error / bound).flatten()
    if worst.numel() and not worst.max() <= 1:
        at = worst.argmax()
        raise AssertionError(
            f"{name}: error {error.flatten()[at]:.3g} is {worst[at]:.3g} times the bound at {int(at)} of "
            f"{list(found.shape)}: {found.flatten()[at]:.6g}, expected {expected.flatten()[at]:.6g}; {cell}"
        )


def differentiated(function, inputs, dout, dlse):
    """(out, lse, gradients); None where an input is None."""
    leaves = [x for x in inputs if x is not None]
    out, lse = function(*inputs)
    ends, starts = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse])
    found = iter(torch.autograd.grad(ends, leaves, starts))
    return out.detach(), lse.detach(), [None if x is None else next(found) for x in inputs]


@pytest.mark.parametrize("number", range(CELLS), ids=lambda n: f"n{n}-")
def test_cell(number):
    """Forward and backward of one random problem against the formula, in every element."""
    cell = Cell(number)
    extra = (cell.aux, cell.bias)
    leaf = [None if x is None else x.detach().requires_grad_() for x in (*cell.given.values(), *extra)]
    out, lse, gradients = differentiated(cell.forward, leaf, cell.dout, cell.dlse)
    assert out.dtype == cell.dtype and lse.dtype == torch.float32
    with torch.no_grad():
        plain = cell.forward(*cell.given.values(), *extra)
        again = cell.backward(*cell.given.values(), *extra, *plain)
    assert torch.equal(plain[0], out) and torch.equal(plain[1], lse)
    wide = [*cell.clean.values(), *(None if x is None else x.double() for x in extra)]
    leaves = [None if x is None else x.detach().requires_grad_() for x in wide]
    dlse = None if cell.dlse is None else cell.dlse.double()
    truth = differentiated(lambda *x: formula(*x, cell.rules), leaves, cell.dout.double(), dlse)
    bound = bounds(*wide, cell.rules, cell.dtype, cell.u_p(), cell.dout.double(), dlse)
    agree("out", out, truth[0], bound["out"], cell)
    agree("lse", lse, truth[1], bound["lse"], cell)
    for name, x, found, same, expected in zip(NAMES, leaf, gradients, again, truth[2]):
        if x is None:
            assert same is None
            continue
        assert found.dtype == x.dtype and same.dtype == x.dtype
        agree(name, found, expected, bound[name], cell)
        assert torch.equal(found, same), f"{name} of autograd and of attention_backward differ in {cell}"
    if cell.dtype != torch.float32 and not cell.repeats:
        no_worse_than_naive(cell, wide, (out, *gradients[:3]), (truth[0], *truth[2][:3]), dlse)


def no_worse_than_naive(cell, wide, found, truth, dlse):
    """The largest error is at most that of the formula computed in the same dtype, plus one rounding of the largest
    result and what float32 arithmetic may err (a row of one key has dq 0, which naive arithmetic happens to hit).

    Gradients are compared with those of the rounded out that the backward was given. Of 256 elements or more: fewer may
    be lucky. So may equal keys, whose ds cancel as long as nothing rounds them: they are left out."""
    given = gradients_on(found[0].double(), *wide, cell.rules, cell.dout.double(), dlse)
    float32 = bounds(*wide, cell.rules, torch.float32, 0.0, cell.dout.double(), dlse)
    leaves = [None if x is None else x.to(cell.dtype).requires_grad_() for x in wide]
    dlse = None if dlse is None else dlse.to(cell.dtype)
    out, _, gradients = differentiated(lambda *x: formula(*x, cell.rules), leaves, cell.dout, dlse)
    for name, ours, target, naive, exact in zip(("out", *NAMES), found, (truth[0], *given), (out, *gradients), truth):
        error, theirs = (ours.double() - target).abs(), (naive.double() - exact).abs()
        if ours.numel() < 256 or theirs.isnan().any():
            continue
        allowed = theirs.max() + ROUNDING[cell.dtype] * target.abs().max() + float32[name].max() + TINY[cell.dtype]
        assert error.max() <= allowed, f"{name}: error {error.max():.3g}, naive {theirs.max():.3g} in {cell}"


def test_the_grid_meets_every_pair_of_options():
    """Options that never meet are not tested together."""
    names = [
        "causal", "sliding_window", "chunk_size", "q_segment_ids", "kv_lengths", "attention_mask", "mask_builder",
        "softmax_scale", "logits_soft_cap", "dropout_prob", "softmax_aux", "bias", "ring", "bfloat16", "poisoned",
        "dlse",
    ]  # fmt: skip
    met = set()
    for number in range(CELLS):
        cell = Cell(number)
        extra = {
            "softmax_aux": cell.aux is not None, "bias": cell.bias is not None, "ring": cell.workers > 1,
            "bfloat16": cell.dtype == torch.bfloat16, "poisoned": cell.poisoned, "dlse": cell.dlse is not None,
        }  # fmt: skip
        present = [name for name in names if name in cell.options or extra.get(name)]
        met |= {(a, b) for a in present for b in present}
    assert [(a, b) for a in names for b in names if (a, b) not in met] == []


def test_gradients_on_the_exact_out_are_the_gradients():
    """The formula for a given out against autograd through the formula."""
    cell = Cell(17)
    wide = [
        x.double().requires_grad_() for x in (cell.normal(2, 9, 4, 8), cell.normal(2, 7, 2, 8), cell.normal(2, 7, 2, 5))
    ]
    rules = Rules(torch.ones(2, 4, 9, 7, dtype=torch.bool).tril(), dropout_keep(3, 0.4, 2, 4, 9, 7), 0.7, 2.0)
    aux, dout, dlse = cell.normal(4, 2).double(), cell.normal(2, 9, 4, 5).double(), cell.normal(2, 4, 9).double()
    out, _, expected = differentiated(lambda *x: formula(*x, rules), (*wide, aux.requires_grad_(), None), dout, dlse)
    found = gradients_on(out, *(x.detach() for x in (*wide, aux)), None, rules, dout, dlse)
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y)


def test_philox():
    """The generator's published known answers (Random123, philox4x32-10)."""
    assert philox(0, 0, 0, 0, 0) == 0x6627E8D5
    ones = 0xFFFFFFFF
    assert philox(2**64 - 1, ones, ones, ones, ones) == 0x408F276D
    key = 0xA4093822 | 0x299F31D0 << 32
    assert philox(key, 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344) == 0xD16CFE09


@pytest.mark.parametrize("prob", [2.0**-32, 0.3, 1 - 2.0**-31])
def test_dropout_threshold(prob):
    """The comparison is exact at the ends: with value 1, out counts what is kept."""
    q, v = torch.zeros(2, 40, 3, 4), torch.ones(2, 40, 3, 1)
    out = annulus.attention(q, q, v, dropout_prob=prob, dropout_seed=2**63 + 5)
    expected = dropout_keep(2**63 + 5, prob, 2, 3, 40, 40).mean(-1).transpose(1, 2)[..., None]
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=0)


SDPA = {
    "plain": {}, "causal": {"is_causal": True}, "scale": {"scale": 0.7}, "gqa": {"enable_gqa": True},
    "bool": {"attn_mask": "bool"}, "bool_keys": {"attn_mask": "keys"}, "float": {"attn_mask": "float"},
    "gqa_causal_scale": {"enable_gqa": True, "is_causal": True, "scale": 1.3},
}  # fmt: skip


@pytest.mark.parametrize("lengths", [(9, 9), (33, 17), (5, 40)], ids=lambda x: "x".join(map(str, x)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", SDPA)
def test_scaled_dot_product_attention(case, dtype, lengths):
    """PyTorch's attention in float64 on the same inputs: what of it annulus.attention must be."""
    said, (M, N), gen = dict(SDPA[case]), lengths, torch.Generator().manual_seed(len(case))
    B, H, Hk, D, Dv = 2, 4, 2 if said.get("enable_gqa") else 4, 16, 24
    q, k, v = (torch.randn(s, generator=gen).to(dtype) for s in ((B, H, M, D), (B, Hk, N, D), (B, Hk, N, Dv)))
    mask = {
        "bool": torch.rand((B, 1, M, N), generator=gen) < 0.6, "keys": torch.rand((B, 1, 1, N), generator=gen) < 0.6,
        "float": torch.randn((1, H, M, N), generator=gen).to(dtype),
    }.get(said.pop("attn_mask", None))  # fmt: skip
    options, visible, bias = {"causal_alignment": "top_left"}, torch.ones(B, H, M, N, dtype=torch.bool), None
    if said.get("is_causal"):
        options["causal"] = True
        visible = visible.tril()
    if "scale" in said:
        options["softmax_scale"] = said["scale"]
    if mask is not None and mask.dtype == torch.bool:
        options["attention_mask"], visible = mask.expand(B, 1, M, N), visible & mask
    elif mask is not None:
        options["bias"] = bias = mask
    dout = torch.randn((B, H, M, Dv), generator=gen).to(dtype)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    wide_mask = mask.double() if bias is not None else mask
    expected = torch.nn.functional.scaled_dot_product_attention(*wide, attn_mask=wide_mask, **said)
    gradients = torch.autograd.grad(expected, wide, dout.double())
    rows = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
    out = annulus.attention(*rows, **options)
    found = torch.autograd.grad(out, rows, dout.transpose(1, 2))
    rules = Rules(visible, scale=said.get("scale"))
    cell = Cell(0)
    cell.dtype = dtype
    bound = bounds(
        *(x.detach().transpose(1, 2) for x in wide), None, None if bias is None else bias.double(), rules, dtype,
        cell.u_p(), dout.double().transpose(1, 2), None,
    )  # fmt: skip
    # Rows that see nothing are PyTorch's business: 0 here, as the grid's formula has it.
    seen = visible.any(-1).transpose(1, 2)[..., None]
    agree("out", torch.where(seen, out, 0), torch.where(seen, expected.transpose(1, 2), 0), bound["out"], case)
    for name, x, y in zip(NAMES, found, gradients):
        agree(name, x, y.transpose(1, 2), bound[name], case)
