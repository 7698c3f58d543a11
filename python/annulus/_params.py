"""Block sizes: how many rows and keys share a pass over the caches. They change speed and memory, never results beyond the
numeric bars."""

from collections import namedtuple

from ._errors import InvalidArgument

FwdParams = namedtuple("FwdParams", "q_blocksize kv_blocksize", defaults=(None, None))
FwdParams.__doc__ = """Rows of queries and keys that one work item of the forward shares, rounded up to whole tiles. None: chosen
from the cache sizes; ``explain`` tells which."""

BwdParams = namedtuple("BwdParams", "q_blocksize kv_blocksize", defaults=(None, None))
BwdParams.__doc__ = """Rows of queries and keys that one block of the backward shares, rounded up to whole tiles. None: chosen from
the cache sizes; ``explain`` tells which."""


def block_sizes(operation, name, params):
    """(q, kv) of FwdParams, BwdParams, a mapping, or any object with their fields; 0 where it leaves the choice. A field that
    says something else than a block size is refused: it would change nothing here."""
    if hasattr(params, "_asdict"):
        fields = params._asdict()
    elif hasattr(params, "keys"):
        fields = dict(params)
    else:
        fields = dict(getattr(params, "__dict__", None) or ())
    sizes = []
    for field in FwdParams._fields:
        size = fields.pop(field, None)
        if size is not None and (isinstance(size, bool) or not hasattr(size, "__index__") or size < 1):
            raise InvalidArgument(f"{operation}: {name}.{field} is {size!r}, expected an integer of at least 1, or None")
        sizes.append(0 if size is None else size.__index__())
    rest = [field for field, value in fields.items() if value is not None]
    if rest or not (hasattr(params, "_asdict") or hasattr(params, "keys") or hasattr(params, "__dict__")):
        found = f"has {', '.join(rest)}" if rest else f"is {params!r}"
        raise InvalidArgument(
            f"{operation}: {name} {found}, expected q_blocksize and kv_blocksize only",
            f"pass annulus.{'FwdParams' if name == 'fwd_params' else 'BwdParams'}(q_blocksize=..., kv_blocksize=...)",
        )
    return tuple(sizes)
