"""Errors: one class per code of the command line, all of them ``annulus.Error``."""


class Error(Exception):
    """What Annulus raises. ``code`` is the command line's exit code, ``fix`` says how to get out, if there is a way."""

    code = 70

    def __init__(self, message="", fix=""):
        super().__init__(message)
        self.fix = fix

    def __str__(self):
        message = super().__str__()
        return f"{message}\n  fix: {self.fix}" if self.fix else message


class InvalidArgument(Error, ValueError):
    """The caller's mistake; nothing was written or sent."""

    code = 64


class BadData(Error):
    """A file that breaks its format."""

    code = 65


class Unsupported(Error):
    """What this build or machine cannot do."""

    code = 69


class InternalError(Error):
    """A bug of Annulus. Please report it."""

    code = 70


class OutOfMemory(Error, MemoryError):
    """The machine has no memory left for the call."""

    code = 71


class IoError(Error, OSError):
    """A file that cannot be read or written."""

    code = 74


class CommError(Error):
    """A lost, silent or disagreeing peer. ``rank`` is the culprit as far as it is known, else -1."""

    code = 75
    rank = -1


class PeerTimeout(CommError):
    """A silent peer."""

    code = 75


class PeerMismatch(CommError):
    """The ranks disagree about shapes, options or the order of calls."""

    code = 76


class PayloadCorrupt(CommError):
    """A damaged message."""

    code = 77


class ConfigError(Error):
    """An environment variable with a value that Annulus does not know."""

    code = 78


class Interrupted(Error):
    """The call was stopped from outside."""

    code = 130


_CLASSES = {
    c.code: c
    for c in (
        InvalidArgument, BadData, Unsupported, InternalError, OutOfMemory, IoError, PeerTimeout, PeerMismatch,
        PayloadCorrupt, ConfigError, Interrupted,
    )
}  # fmt: skip


def make(code, message, fix, rank):
    """An instance for an error of the C++ library."""
    error = _CLASSES.get(code, Error)(message, fix)
    if isinstance(error, CommError):
        error.rank = rank
    return error
