"""Masks of Transformers as rules instead of tensors of [batch, 1, q_len, kv_len].

Transformers describes a mask as a function of indices, made of a few known functions: causal, sliding window, chunks,
packed sequences, and a padding mask beside it. Where a mask is made of those alone, its rules are options of
``annulus.ring_attention``; otherwise, and whenever anybody else looks at it, it is the dense mask of Transformers
itself.
"""

import torch
from torch.utils._pytree import tree_map
from transformers import masking_utils

_plain = masking_utils.sdpa_mask


class RulesMask(torch.Tensor):
    """A bool mask [batch, 1, q_len, kv_len] that knows its rules and has no elements yet. The first operation on it
    makes it dense, and dense it remains: what others read or change is what counts."""

    @staticmethod
    def __new__(cls, shape, options, keys, make):
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device="cpu")
        mask.options, mask.keys, mask._make, mask._dense = options, keys, make, None
        return mask

    def dense(self):
        """The mask as a plain tensor, always the same one. From here on the rules are None."""
        if self._dense is None:
            self._dense, self.options, self._make = self._make(), None, None
        return self._dense

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def dense(x):
            return x.dense() if isinstance(x, cls) else x

        return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))

    def __repr__(self, **_):
        return f"RulesMask({list(self.shape)}, {self.options if self._dense is None else 'dense'})"


class _Unknown(Exception):
    """A function of indices that is none of those we know."""


def _cells(function):
    """What a function closes over, by name."""
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ())))


def _code(name, *args):
    """The code of the functions that a factory of Transformers makes; None where this version has none such."""
    factory = getattr(masking_utils, name, None)
    try:
        return factory(*args).__code__
    except Exception:
        return None


def _grid_says(function, expected, size=7):
    """Is the function of indices this one? Asked on a grid, so that a version which means something else is noticed."""
    i, j = torch.arange(size).view(-1, 1), torch.arange(size).view(1, -1)
    zero = torch.zeros((), dtype=torch.long)
    try:
        return torch.equal(function(zero, zero, i, j).expand(size, size), expected(i, j).expand(size, size))
    except Exception:
        return False


def _known():
    """Code object -> kind, of the functions that this version of Transformers is seen to mean as we do."""
    m, ids, positions = masking_utils, torch.tensor([[0, 0, 0, 1, 1, 1, 1]]), torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    causal = getattr(m, "causal_mask_function", None)
    no_padding = torch.zeros(1, dtype=torch.long)

    def packed(i, j):
        return ids[0, i] == ids[0, j]

    def remapped(i, j):
        return positions[0, j] <= positions[0, i]

    found = [
        ("and", "and_masks", (causal, causal), lambda i, j: j <= i),
        ("window", "sliding_window_overlay", (3,), lambda i, j: j > i - 3),
        ("both_sides", "sliding_window_bidirectional_overlay", (2,), lambda i, j: (i - j).abs() <= 2),
        ("chunk", "chunked_overlay", (3, no_padding), lambda i, j: i // 3 == j // 3),
        ("packed", "packed_sequence_mask_function", (ids,), packed),
        ("remapped", "remap_positions_for_packed_sequence", (causal, positions), remapped),
    ]
    known = {}
    for kind, name, args, expected in found:
        code = _code(name, *args)
        if code is not None and _grid_says(getattr(m, name)(*args), expected):
            known[code] = kind
    for kind, name, expected in (
        ("causal", "causal_mask_function", lambda i, j: j <= i),
        ("all", "bidirectional_mask_function", lambda i, j: (i >= 0) & (j >= 0)),
    ):
        function = getattr(m, name, None)
        if function is not None and _grid_says(function, expected):
            known[function.__code__] = kind
    return known


_KNOWN = _known()


class _Rules:
    """What a mask function says: which of causal, windows, chunks, segments."""

    def __init__(self, function):
        self.causal, self.left, self.right, self.chunk, self.ids, self._positions = False, None, None, None, None, None
        self._add(function)
        if self._positions is not None:
            self._check_positions()

    def _add(self, function):
        kind = _KNOWN.get(getattr(function, "__code__", None))
        if kind is None:
            raise _Unknown
        cells = _cells(function)
        if kind == "and":
            for part in cells["mask_functions"]:
                self._add(part)
        elif kind == "causal":
            self.causal = True
        elif kind in ("window", "both_sides"):
            window = cells["sliding_window"]
            if isinstance(window, bool) or not isinstance(window, int) or window < 1:
                raise _Unknown
            left = window - 1 if kind == "window" else window
            self.left = left if self.left is None else min(self.left, left)
            if kind == "both_sides":
                self.right = window if self.right is None else min(self.right, window)
        elif kind == "chunk":
            if self.chunk is not None or cells["left_padding"].any():
                raise _Unknown
            self.chunk = cells["chunk_size"]
        elif kind == "packed":
            if self.ids is not None:
                raise _Unknown
            self.ids = cells["packed_sequence_mask"]
        elif kind == "remapped":
            if self._positions is not None:
                raise _Unknown
            self._positions = cells["position_ids"]
            self._add(cells["mask_function"])

    def _check_positions(self):
        """Within a packed sequence positions count up by one, so that rules on differences of positions are the same
        rules on differences of indices. Chunks are no such rule."""
        if self.ids is None or self.chunk is not None or self.ids.shape != self._positions.shape:
            raise _Unknown
        same = self.ids[:, 1:] == self.ids[:, :-1]
        if not bool(((self._positions.diff(dim=1) == 1) | ~same).all()) or not bool((self.ids.diff(dim=1) >= 0).all()):
            raise _Unknown


def _padding(padding, batch, q_len, kv_offset, keys):
    """The options that hide padded keys, given the bool padding mask [batch, up to all keys]."""
    seen = padding[:batch, kv_offset : kv_offset + keys]
    if seen.shape[1] < keys:
        seen = torch.nn.functional.pad(seen, (0, keys - seen.shape[1]))
    if bool(seen.all()):
        return {}
    if not bool((seen[:, 1:] & ~seen[:, :-1]).any()):
        return {"kv_lengths": seen.sum(1, dtype=torch.int32)}
    ids = torch.ones(batch, q_len, dtype=torch.int32)
    return {"q_segment_ids": ids, "kv_segment_ids": seen.to(torch.int32)}


def _read(batch, q_len, kv_len, q_offset, kv_offset, function, padding):
    """(options of ring_attention, number of leading keys they are about). Raises _Unknown."""
    rules = _Rules(function)
    shift, keys, options = q_offset - kv_offset, kv_len, {}
    if rules.causal:
        # Keys behind the last query are seen by nobody: without them the mask is aligned to the bottom right.
        keys = shift + q_len
        options["causal"] = True
    if rules.left is not None or rules.right is not None:
        options["sliding_window"] = (rules.left, rules.right)
    if not 0 < keys <= kv_len or q_offset < 0 or kv_offset < 0:
        raise _Unknown
    if options:
        if shift != keys - q_len and shift != 0:
            raise _Unknown
        options["causal_alignment"] = "bottom_right" if shift == keys - q_len else "top_left"
    if rules.chunk is not None:
        if not rules.causal or q_offset or kv_offset:
            raise _Unknown
        options["chunk_size"] = rules.chunk
    if rules.ids is not None:
        if padding is not None or q_offset or kv_offset or rules.ids.shape != (batch, q_len) or keys != q_len:
            raise _Unknown
        ids = rules.ids.to(torch.int32)
        options.update(q_segment_ids=ids, kv_segment_ids=ids)
    if padding is not None:
        if padding.dim() != 2 or padding.dtype != torch.bool or padding.shape[0] < batch:
            raise _Unknown
        options.update(_padding(padding, batch, q_len, kv_offset, keys))
    return options, keys


def _traced(*tensors):
    """Is this a trace, of which values must not be read?"""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or any(isinstance(t, torch.Tensor) and type(t) is not torch.Tensor for t in tensors)
    )


def annulus_mask(
    batch_size, q_length=None, kv_length=None, q_offset=0, kv_offset=0,
    mask_function=masking_utils.causal_mask_function, attention_mask=None, allow_is_causal_skip=True, **kwargs,
):  # fmt: skip
    """Transformers' mask function: what a model's layers get as ``attention_mask``."""
    kwargs = {**kwargs, "kv_offset": kv_offset, "mask_function": mask_function, "attention_mask": attention_mask}

    def dense(offset=q_offset, skip=False):
        # None leaves causality to the layer, which cannot know an offset: no skip where there is one.
        skip = skip and isinstance(offset, int) and offset + q_length == kv_length
        return _plain(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=offset, allow_is_causal_skip=skip,
            **kwargs,
        )  # fmt: skip

    if q_length is None:
        # Transformers 4 gives cache_position instead.
        return _plain(batch_size=batch_size, kv_length=kv_length, allow_is_causal_skip=False, **kwargs)
    if _traced(attention_mask, q_offset):
        return dense(skip=allow_is_causal_skip)
    kwargs["allow_is_bidirectional_skip"] = False
    # A static cache counts on in its tensor: the number of now.
    offset = int(q_offset)
    if torch.device(kwargs.get("device", "cpu")).type != "cpu":
        return dense(offset)
    try:
        options, keys = _read(batch_size, q_length, kv_length, offset, kv_offset, mask_function, attention_mask)
    except _Unknown:
        return dense(offset)
    return RulesMask((batch_size, 1, q_length, kv_length), options, keys, lambda: dense(offset))
