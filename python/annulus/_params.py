"""Block sizes: how many rows and keys share a pass over the caches. They change speed and memory, never results beyond the
numeric bars."""

from collections import namedtuple

FwdParams = namedtuple("FwdParams", "q_blocksize kv_blocksize", defaults=(None, None))
FwdParams.__doc__ = """Rows of queries and keys that one work item of the forward shares, rounded up to whole tiles. None: chosen
from the cache sizes; ``explain`` tells which."""

BwdParams = namedtuple("BwdParams", "q_blocksize kv_blocksize", defaults=(None, None))
BwdParams.__doc__ = """Rows of queries and keys that one block of the backward shares, rounded up to whole tiles. None: chosen from
the cache sizes; ``explain`` tells which."""
