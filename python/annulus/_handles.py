"""Numbers for Python objects that compiled graphs refer to."""

import itertools
import weakref

_next = itertools.count(1)
_objects = weakref.WeakValueDictionary()


class Handled:
    """Gives each object a number of its own; whoever holds only the number must see that the object lives."""

    __slots__ = ("__weakref__", "_handle")

    def __init__(self):
        self._handle = next(_next)
        _objects[self._handle] = self


def object_of(handle):
    """The object of a number; None for 0."""
    return _objects[handle] if handle else None
