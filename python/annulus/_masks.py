"""Mask and Partition: which key a query sees, and who owns which tokens."""

from . import _core
from ._errors import InvalidArgument
from ._handles import Handled


class _Rule:
    """A mask of one rule. Read from the class it is that mask, from a mask it is both together:
    ``Mask.causal() & Mask.prefix(4)`` and ``Mask.causal().prefix(4)`` are the same."""

    def __init__(self, make):
        self._make = make
        self.__doc__ = make.__doc__

    def __get__(self, mask, owner=None):
        make = self._make

        def rule(*args, **kwargs):
            made = Mask(make(*args, **kwargs))
            return made if mask is None else mask & made

        rule.__doc__, rule.__name__ = make.__doc__, make.__name__.strip("_")
        return rule


def _whole(what, value, least=0):
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < least:
        raise InvalidArgument(f"Mask: {what} is {value!r}, expected an integer of at least {least}")
    return value.__index__()


def _full():
    """Every query sees every key."""
    return _core.Mask.full()


def _causal(shift=0):
    """j <= i + shift."""
    return _core.Mask.causal(int(shift))


def _sliding_window(left, right=...):
    """i - left <= j <= i + right, both ends inclusive. None or -1 is unlimited; one number alone serves both sides."""
    right = left if right is ... else right
    return _core.Mask.sliding_window(*(-1 if side is None else _whole("a side", side, -1) for side in (left, right)), 0)


def _chunked(chunk_size):
    """i div c == j div c and j <= i."""
    return _core.Mask.chunked(_whole("chunk_size", chunk_size, 1))


def _prefix(length):
    """Keys at positions below `length`."""
    return _core.Mask.prefix(_whole("length", length))


def _dense(visible):
    """visible[i, j], bool [q_len, kv_len]; positions outside see nothing."""
    return _core.Mask.dense(visible)


def _block_sparse(block, visible):
    """visible[i div block, j div block], bool [ceil(q_len / block), ceil(kv_len / block)]."""
    return _core.Mask.block_sparse(_whole("block", block, 1), visible)


class Mask(Handled):
    """Which key does which query see, by global positions i and j.

    Rules combine with ``&`` and ``|``::

        Mask.sliding_window(256, 0) | Mask.prefix(16)     # a window and some tokens that all see

    Masks are asked once per head by ``mask_builder`` and are never shifted by ``causal_alignment``.
    """

    __slots__ = ("_mask",)

    def __init__(self, mask=None):
        super().__init__()
        self._mask = _core.Mask.full() if mask is None else mask

    full = _Rule(_full)
    causal = _Rule(_causal)
    sliding_window = _Rule(_sliding_window)
    chunked = _Rule(_chunked)
    prefix = _Rule(_prefix)
    dense = _Rule(_dense)
    block_sparse = _Rule(_block_sparse)

    def __and__(self, other):
        return Mask(self._mask.both(other._mask)) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other):
        return Mask(self._mask.either(other._mask)) if isinstance(other, Mask) else NotImplemented

    def visible(self, query, key):
        """Does the query at this position see the key at that one?"""
        return self._mask.visible(query, key)

    def __repr__(self):
        return f"Mask({self._mask.describe() or 'full'})"


class Partition(Handled):
    """Who owns which tokens.

    ``"contiguous"``: runs of neighbours. ``"striped"``: token i on rank i mod P. ``"zigzag"``: 2P runs, rank r holds runs
    r and 2P-1-r, which balances causal masks. Lengths need not divide.
    """

    __slots__ = ("_partition",)

    def __init__(self, name="contiguous"):
        super().__init__()
        if isinstance(name, _core.Partition):
            self._partition = name
        elif isinstance(name, Partition):
            self._partition = name._partition
        else:
            self._partition = _core.Partition.from_name(str(name))

    @staticmethod
    def contiguous():
        return Partition("contiguous")

    @staticmethod
    def striped():
        return Partition("striped")

    @staticmethod
    def zigzag():
        return Partition("zigzag")

    @staticmethod
    def from_positions(positions):
        """One integer array per rank: the positions it holds, in the order of its rows. For q and k of equal length."""
        ranks = []
        for array in positions:
            values = array.tolist() if hasattr(array, "tolist") else list(array)
            if not all(isinstance(p, int) and not isinstance(p, bool) for p in values):
                raise InvalidArgument(
                    f"Partition.from_positions: rank {len(ranks)} has {values[:4]}..., expected integers"
                )
            ranks.append(values)
        return Partition(_core.Partition.from_positions(ranks))

    def positions(self, rank, world_size, seq_len):
        """The positions of a rank's rows, in their order: ``x[:, partition.positions(r, P, n)]`` is its shard of x."""
        return self._partition.positions(rank, world_size, seq_len)

    def __repr__(self):
        return f"Partition({self._partition.name()!r})"
