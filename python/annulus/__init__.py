"""Exact attention over sequences longer than one device holds, on the CPUs people have.

    out = annulus.ring_attention(query, key, value, causal=True, workers=4, partition="zigzag")

Arrays of NumPy, PyTorch and JAX go in and come out without a copy. ``annulus.torch``, ``annulus.jax`` and
``annulus.transformers`` are imported when they are used.
"""

from . import _core, reference
from ._errors import (
    BadData,
    CommError,
    ConfigError,
    Error,
    InternalError,
    Interrupted,
    InvalidArgument,
    IoError,
    OutOfMemory,
    PayloadCorrupt,
    PeerMismatch,
    PeerTimeout,
    Unsupported,
)
from ._masks import Mask, Partition
from ._operations import Gradients, attention, attention_backward, merge, ring_attention
from ._params import BwdParams, FwdParams
from ._plan import Plan, doctor, explain
from ._workers import Communicator, Mesh, run_workers

__version__ = _core.__version__

__all__ = [
    "BadData", "BwdParams", "CommError", "Communicator", "ConfigError", "Error", "FwdParams", "Gradients",
    "InternalError", "Interrupted", "InvalidArgument", "IoError", "Mask", "Mesh", "OutOfMemory", "Partition",
    "PayloadCorrupt", "PeerMismatch", "PeerTimeout", "Plan", "Unsupported", "attention", "attention_backward", "doctor",
    "explain", "merge", "reference", "ring_attention", "run_workers",
]  # fmt: skip


def __getattr__(name):
    if name in ("torch", "jax", "transformers"):
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
