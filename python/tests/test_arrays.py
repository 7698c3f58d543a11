"""Arrays go in and come out without a copy; what does not fit is refused with a sentence that says what to do."""

import tracemalloc

import annulus
import numpy as np
import pytest


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")


def allocated_by(call):
    """Bytes of Python's own allocations, NumPy's arrays among them, at their peak during a call."""
    call()
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


VIEWS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3),
    "dim before seq": lambda x: np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    "every second of a larger one": lambda x: np.repeat(np.repeat(x, 2, axis=1), 2, axis=3)[:, ::2, :, ::2],
    "reversed": lambda x: np.ascontiguousarray(x[:, ::-1])[:, ::-1],
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "not aligned to its row": lambda x: np.concatenate([x, x], axis=3)[..., 1 : 1 + x.shape[3]],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("workers", [None, 3])
def test_any_strides_without_a_copy(view, workers):
    make = VIEWS[view]
    q, k, v = (make(normal(1, 512, 4, 64, seed=s)) for s in range(3))
    before = [x.copy() for x in (q, k, v)]
    out = annulus.ring_attention(q, k, v, causal=True, workers=workers)
    plain = annulus.ring_attention(*(np.ascontiguousarray(x) for x in (q, k, v)), causal=True, workers=workers)
    np.testing.assert_array_equal(out, plain)
    for x, old in zip((q, k, v), before):
        np.testing.assert_array_equal(x, old)
    given = np.empty_like(plain)
    # 64 KiB is an eighth of one input.
    assert allocated_by(lambda: annulus.ring_attention(q, k, v, causal=True, workers=workers, out=given)) < 1 << 16
    np.testing.assert_array_equal(given, plain)


def test_out_is_written_in_place_at_any_strides():
    q = normal(1, 9, 2, 8)
    whole = np.zeros((1, 2, 20, 16), "f4")
    out = whole.transpose(0, 2, 1, 3)[:, :18:2, :, 1:9]
    result, lse = annulus.attention(q, q, q, out=out, return_lse=True)
    assert result is out
    np.testing.assert_array_equal(out, annulus.attention(q, q, q))
    assert np.count_nonzero(whole) == out.size  # nothing beside it


def test_bfloat16_of_ml_dtypes():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    q = normal(1, 16, 2, 8).astype(bfloat16)
    out = annulus.attention(q, q[:, ::-1], q)
    assert out.dtype == bfloat16
    exact = annulus.reference.attention(q, q[:, ::-1], q)
    np.testing.assert_allclose(out.astype("f8"), exact, atol=2**-7)
    given = np.zeros_like(q)
    assert annulus.attention(q, q[:, ::-1], q, out=given) is given
    np.testing.assert_array_equal(given.view("u2"), out.view("u2"))
    frozen = np.zeros_like(q)
    frozen.flags.writeable = False
    with pytest.raises(annulus.InvalidArgument, match="out is read-only"):
        annulus.attention(q, q, q, out=frozen)


def test_copies_are_told():
    q = normal(1, 8, 2, 8)
    plain = annulus.explain("attention", q, q, q).notes
    ids = np.zeros((1, 8), "i8")
    told = annulus.explain("attention", q, q, q, q_segment_ids=ids, softmax_aux=np.zeros(2, "f2")).notes
    assert [note for note in told if note not in plain] == [
        "softmax_aux is copied: float16 becomes float32",
        "q_segment_ids is copied: int64 becomes int32",
    ]
    out = annulus.attention(q, q, q, q_segment_ids=ids, softmax_aux=np.zeros(2, "f2"))
    np.testing.assert_array_equal(out, annulus.attention(q, q, q, softmax_aux=np.zeros(2, "f4")))
    with pytest.raises(annulus.InvalidArgument, match="q_segment_ids holds 4294967296, which int32 cannot"):
        annulus.attention(q, q, q, q_segment_ids=ids + 2**32)


Q = normal(1, 8, 4, 8)
FROZEN = np.zeros_like(Q)
FROZEN.flags.writeable = False
REFUSED = {
    "a list": ((Q.tolist(), Q, Q), {}, "query is a list, expected an array"),
    "a number": ((Q, 3.0, Q), {}, "key is a float"),
    "none": ((Q, Q, None), {}, "value is a NoneType"),
    "float64": ((Q.astype("f8"), Q, Q), {}, "query .* has dtype float64"),
    "complex": ((Q, Q, Q.astype("c8")), {}, "value .* has dtype complex64"),
    "integers": ((Q.astype("i4"), Q, Q), {}, "query has dtype int32, expected float32 or bfloat16 or float16"),
    "void of two bytes": ((Q.astype("f2").view("V2"), Q, Q), {}, r"query .* has dtype \|V2"),
    "text": ((np.array([["a"]]), Q, Q), {}, "query"),
    "two dtypes": ((Q, Q.astype("f2"), Q), {}, "has type float16, expected float32"),
    "three axes": ((Q[0], Q, Q), {}, "query has shape"),
    "five axes": ((Q[None], Q, Q), {}, "query has shape"),
    "heads that do not divide": ((Q[:, :, :3], Q[:, :, :2], Q[:, :, :2]), {}, "not a multiple"),
    "another length": ((Q, Q, Q[:, :5]), {}, r"\[1, 5, 4, 8\], expected \[1, 8, 4, 8\]"),
    "read-only output": ((Q, Q, Q), {"out": FROZEN}, "out is read-only"),
    "output of another shape": ((Q, Q, Q), {"out": Q[:, :5].copy()}, "out has shape"),
    "output over an input": ((Q, Q, Q), {"out": Q}, "overlaps"),
    "segment ids of another shape": ((Q, Q, Q), {"q_segment_ids": np.zeros((8,), "i4")}, "q_segment_ids has shape"),
    "segment ids of floats": ((Q, Q, Q), {"q_segment_ids": np.zeros((1, 8), "f4")}, "q_segment_ids has dtype float32"),
    "padding without ids": ((Q, Q, Q), {"padding_segment_id": 0}, "padding_segment_id"),
    "float mask": ((Q, Q, Q), {"attention_mask": np.zeros((1, 1, 8, 8), "f4")}, "attention_mask has dtype float32"),
    "mask of another shape": ((Q, Q, Q), {"attention_mask": np.ones((1, 1, 8, 7), bool)}, "attention_mask"),
    "bias of two axes": ((Q, Q, Q), {"bias": np.zeros((8, 8), "f4")}, "bias has shape"),
    "sinks of three axes": ((Q, Q, Q), {"softmax_aux": np.zeros((4, 1, 1), "f4")}, "softmax_aux has shape"),
    "negative lengths": ((Q, Q, Q), {"kv_lengths": np.array([-1], "i4")}, "kv_lengths"),
    "chunk 0": ((Q, Q, Q), {"chunk_size": 0}, "chunk_size is 0"),
    "half a chunk": ((Q, Q, Q), {"chunk_size": 2.5}, "chunk_size is 2.5, expected an integer"),
    "window of three": ((Q, Q, Q), {"sliding_window": (1, 2, 3)}, "sliding_window is"),
    "window below -1": ((Q, Q, Q), {"sliding_window": (-2, 0)}, "sliding_window"),
    "cap 0": ((Q, Q, Q), {"logits_soft_cap": 0.0}, "logits_soft_cap is 0"),
    "scale of text": ((Q, Q, Q), {"softmax_scale": "auto"}, "softmax_scale is 'auto', expected a number"),
    "scale of truth": ((Q, Q, Q), {"softmax_scale": True}, "softmax_scale is True"),
    "dropout 1": ((Q, Q, Q), {"dropout_prob": 1.0}, "dropout_prob"),
    "negative seed": ((Q, Q, Q), {"dropout_seed": -1}, "dropout_seed is -1"),
    "no such alignment": ((Q, Q, Q), {"causal_alignment": "left"}, "'bottom_right' or 'top_left'"),
    "mask_builder of text": ((Q, Q, Q), {"mask_builder": "causal"}, "mask_builder is 'causal'"),
    "builder of arrays": ((Q, Q, Q), {"mask_builder": lambda *a: np.ones((8, 8))}, "expected an annulus.Mask"),
    "unknown block size": ((Q, Q, Q), {"fwd_params": {"num_warps": 4}}, "fwd_params has num_warps"),
}
RING_REFUSED = {
    "no worker": ({"workers": 0}, "workers is 0"),
    "half a worker": ({"workers": 1.5}, "workers is 1.5"),
    "unknown partition": ({"partition": "blocks"}, "'contiguous' or 'striped' or 'zigzag'"),
    "positions of too few ranks": ({"partition": annulus.Partition.from_positions([range(8)]), "workers": 2}, "ranks"),
    "positions twice": ({"partition": annulus.Partition.from_positions([range(8), range(8)]), "workers": 2}, "position"),
    "an axis without a mesh": ({"axis_name": "sp"}, "axis_name is 'sp' without a mesh"),
    "a ring that is none": ({"comm": 3}, "comm is a int"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("operation", [annulus.attention, annulus.ring_attention])
def test_what_does_not_fit_is_refused(operation, name):
    arrays, options, words = REFUSED[name]
    before = FROZEN.copy()
    with pytest.raises(annulus.InvalidArgument, match=words) as caught:
        operation(*arrays, **options)
    assert isinstance(caught.value, ValueError) and caught.value.code == 64
    assert str(caught.value).startswith(operation.__name__ + ":")
    np.testing.assert_array_equal(FROZEN, before)


@pytest.mark.parametrize("name", RING_REFUSED)
def test_rings_that_cannot_be_are_refused(name):
    options, words = RING_REFUSED[name]
    with pytest.raises(annulus.InvalidArgument, match=words):
        annulus.ring_attention(Q, Q, Q, **options)


def test_a_builder_that_throws_is_heard():
    with pytest.raises(ZeroDivisionError):
        annulus.ring_attention(Q, Q, Q, mask_builder=lambda *a: 1 / 0, workers=2)


def test_unknown_names_are_refused():
    for call in (annulus.attention, annulus.ring_attention, annulus.reference.attention):
        with pytest.raises(TypeError, match="casual"):
            call(Q, Q, Q, casual=True)
    with pytest.raises(TypeError, match="casual"):
        annulus.explain("attention", Q, Q, Q, casual=True)
    with pytest.raises(annulus.InvalidArgument, match="operation is 'attend'"):
        annulus.explain("attend", Q, Q, Q)


@pytest.mark.torch
def test_one_library_per_call():
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(Q.copy())
    with pytest.raises(annulus.InvalidArgument, match="query is an array of NumPy, key of PyTorch"):
        annulus.attention(Q, tensor, tensor)
    with pytest.raises(annulus.InvalidArgument, match="q_segment_ids of NumPy"):
        annulus.attention(tensor, tensor, tensor, q_segment_ids=np.zeros((1, 8), "i4"))
    with pytest.raises(annulus.InvalidArgument, match="out"):
        annulus.attention(Q, Q, Q, out=tensor)


class Foreign:
    """An array of a library that Annulus has never heard of."""

    def __init__(self, array):
        self.array = array
        self.shape, self.dtype = array.shape, array.dtype

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_whatever_speaks_dlpack():
    out, lse = annulus.attention(Foreign(Q), Foreign(Q), Foreign(Q), causal=True, return_lse=True)
    exact, exact_lse = annulus.attention(Q, Q, Q, causal=True, return_lse=True)
    np.testing.assert_array_equal(np.from_dlpack(out), exact)
    np.testing.assert_array_equal(np.from_dlpack(lse), exact_lse)
