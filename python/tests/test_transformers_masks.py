"""Masks of Transformers as rules: what the rules say is what Transformers' dense mask says."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import annulus.transformers  # noqa: E402
from annulus import _transformers_masks as masks  # noqa: E402
from transformers import masking_utils  # noqa: E402

pytestmark = pytest.mark.transformers


@pytest.fixture(autouse=True)
def _registered():
    yield
    annulus.transformers.register()


def mask_functions(q_len):
    m, ids = masking_utils, torch.arange(q_len).mul(3).div(max(q_len, 1), rounding_mode="floor")[None].repeat(2, 1)
    positions = torch.cat([torch.arange(int((ids[0] == i).sum())) for i in range(3)])[None].repeat(2, 1)
    packed = m.packed_sequence_compatibility_function
    no_padding, some = torch.zeros(2, dtype=torch.long), torch.tensor([0, 2])
    return {
        "causal": m.causal_mask_function,
        "full": m.bidirectional_mask_function,
        "window 1": m.sliding_window_causal_mask_function(1),
        "window 4": m.sliding_window_causal_mask_function(4),
        "both sides": m.sliding_window_bidirectional_mask_function(2),
        "chunks": m.chunked_causal_mask_function(3, no_padding),
        "chunks behind padding": m.chunked_causal_mask_function(3, some),
        "packed": packed(m.causal_mask_function, positions, ids),
        "packed window": packed(m.sliding_window_causal_mask_function(2), positions, ids),
        "packed, no positions": packed(m.causal_mask_function, positions * 2, ids),
        "other": m.or_masks(m.causal_mask_function, lambda b, h, i, j: j < 2),
    }


GEOMETRIES = {
    "square": (7, 7, 0, 0),
    "decode": (1, 9, 8, 0),
    "chunked prefill": (3, 9, 6, 0),
    "static prefill": (5, 12, 0, 0),
    "static decode": (1, 12, torch.tensor(4), 0),
    "static, later": (4, 12, torch.tensor(3), 0),
    "sliding cache": (2, 6, 9, 5),
    "cross": (3, 8, 0, 0),
    "behind": (3, 4, 2, 4),
}


def paddings(q_len, kv_len, q_offset, kv_offset):
    end = kv_len + kv_offset
    left, right, holes, none = (torch.ones(2, end, dtype=torch.bool) for _ in range(4))
    left[0, : end // 2] = False
    right[1, -(end // 2) :] = False
    holes[0, ::2] = False
    none[1] = False
    # As models pass it: up to the last query, shorter than a static cache.
    now = torch.ones(2, min(int(q_offset) + q_len, end), dtype=torch.bool)
    return {"no": None, "left": left, "right": right, "holes": holes, "nothing": none, "now": now}


def seen_through(mask, q_len, kv_len):
    """The bool mask of a call: equal scores, and values that name the keys."""
    module = torch.nn.Module()
    out, weights = annulus.transformers.annulus_attention(
        module, torch.zeros(2, 2, q_len, 8), torch.zeros(2, 1, kv_len, 8), torch.eye(kv_len).expand(2, 1, -1, -1), mask
    )
    assert weights is None and out.shape == (2, q_len, 2, kv_len)
    return out.transpose(1, 2)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("geometry", list(GEOMETRIES))
def test_rules_say_what_dense_masks_say(geometry, workers):
    annulus.transformers.register(workers=workers)
    q_len, kv_len, q_offset, kv_offset = GEOMETRIES[geometry]
    by_rules = set()
    for name, function in mask_functions(q_len).items():
        if "packed" in name and geometry != "square":
            continue
        for side, padding in paddings(q_len, kv_len, q_offset, kv_offset).items():
            arguments = {
                "batch_size": 2, "q_length": q_len, "kv_length": kv_len, "q_offset": q_offset, "kv_offset": kv_offset,
                "mask_function": function, "attention_mask": padding,
            }  # fmt: skip
            expected = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
            mask = masks.annulus_mask(**arguments)
            assert mask.shape == expected.shape and mask.dtype == torch.bool
            found = seen_through(mask, q_len, kv_len)
            count = expected.sum(-1, keepdim=True)
            torch.testing.assert_close(
                found, (expected / count.clamp(min=1)).expand(found.shape), msg=f"{name}, {side}"
            )
            if isinstance(mask, masks.RulesMask):
                by_rules.add((name, side))
                assert mask.options is not None and torch.equal(mask.clone(), expected)
    # Ordinary masks need no tensor.
    if geometry != "behind":
        assert {(name, side) for name in ("causal", "window 4", "full") for side in ("no", "left", "right")} <= by_rules
    if geometry == "square":
        assert ("packed", "no") in by_rules and ("packed window", "no") in by_rules and ("chunks", "no") in by_rules
    assert not {name for name, _ in by_rules} & {"other", "packed, no positions", "chunks behind padding"}


def test_a_mask_that_is_touched_is_dense():
    def mask():
        return masks.annulus_mask(batch_size=1, q_length=5, kv_length=5)

    first, lower = mask(), torch.ones(5, 5).tril().bool()
    assert "causal" in repr(first)
    assert torch.equal(first & True, lower.expand(1, 1, 5, 5)) and first.options is None and "dense" in repr(first)
    second = mask()
    second[0, 0, 4, :] = False
    second.logical_and_(torch.arange(5) > 0)
    found = seen_through(second, 5, 5) > 0
    assert not found[:, :, 4].any() and not found[..., 0].any() and found[:, :, 3, 1:4].all()


def test_a_version_with_other_meanings_is_noticed(monkeypatch):
    assert set(masks._known().values()) >= {
        "and",
        "causal",
        "all",
        "window",
        "both_sides",
        "chunk",
        "packed",
        "remapped",
    }

    def overlay(sliding_window):
        def inner_mask(batch_idx, head_idx, q_idx, kv_idx):
            return kv_idx >= q_idx - sliding_window

        return inner_mask

    monkeypatch.setattr(masking_utils, "sliding_window_overlay", overlay)
    assert "window" not in masks._known().values()
