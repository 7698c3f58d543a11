"""Numbers for Python objects that compiled graphs refer to."""

import itertools
import os
import weakref

from ._errors import InvalidArgument

# A random start: a program that was exported by another process must not find objects of this one.
_next = itertools.count(int.from_bytes(os.urandom(7), "little") + 1)
_objects = weakref.WeakValueDictionary()


class Handled:
    """Gives each object a number of its own; whoever holds only the number must see that the object lives. These objects
    never change: a copy is the object itself."""

    __slots__ = ("__weakref__", "_handle")

    def __init__(self):
        self._handle = next(_next)
        _objects[self._handle] = self

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self


def object_of(handle):
    """The object of a number; None for 0. Raises InvalidArgument for a number of another process or of a dead object."""
    if not handle:
        return None
    found = _objects.get(handle)
    if found is None:
        raise InvalidArgument(
            "annulus: a compiled program refers to a Mask, Partition or Communicator that is not here any more",
            "keep the object while the program is used; programs for other processes cannot hold such objects",
        )
    return found
