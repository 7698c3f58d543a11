"""What a call will do, found without computing anything; and what the machine can do."""

import json
import subprocess

from . import _core, _frameworks
from ._errors import InvalidArgument, Unsupported
from ._operations import count_of_workers, make_options, names_of

_DEFAULTS = {
    "attention": {"causal_alignment": "bottom_right"},
    "ring_attention": {"causal_alignment": "top_left", "fused_backward": False},
    "attention_backward": {"causal_alignment": "bottom_right"},
}


def _bytes(n):
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024


class Plan:
    """What a call will do. ``print`` it, read its attributes, or take ``to_dict()``.

    target, arithmetic, mask, workers, threads_per_worker, partition, q_rows and kv_rows per rank, pairs_visible and
    pairs_total, flops, bytes_sent_per_rank, peak_bytes allocated by the call, panel_keys and item_rows (block sizes), steps
    of the ring (rank, step, owner, pairs, send_to, bytes), notes (copies, and ways refused with reasons), backward (the same
    of the gradients).
    """

    def __init__(self, operation, entries):
        self._entries = {"op": operation, **entries}

    def to_dict(self):
        """All entries as plain Python values."""
        return json.loads(json.dumps(self._entries))

    def __getattr__(self, name):
        try:
            return self.__dict__["_entries"][name]
        except KeyError:
            raise AttributeError(f"a Plan has no '{name}'; it has {', '.join(self.__dict__.get('_entries', ()))}") from None

    def __str__(self):
        e = self._entries
        share = e["pairs_visible"] / e["pairs_total"] if e["pairs_total"] else 0
        lines = [
            ("op", f"{e['op']} on {e['target']}, {e['arithmetic']}"),
            ("mask", f"{e['mask']}: {e['pairs_visible']:,} of {e['pairs_total']:,} pairs visible ({share:.1%})"),
            ("ring", f"{e['workers']} workers of {e['threads_per_worker']} threads, {e['partition']}"),
            ("cost", f"{e['flops']:.3g} FLOP, {_bytes(max(e['bytes_sent_per_rank'], default=0))} sent by the busiest rank"),
            ("tiles", f"strips of {e['strip_rows']} rows, tiles of {e['tile_keys']} keys, panels of {e['panel_keys']} keys, "
                      f"items of {e['item_rows']} rows"),
            ("memory", f"{_bytes(e['peak_bytes'])} for the call"),
        ]  # fmt: skip
        back = e["backward"]
        travels = f", {'queries' if back['ring_backward'] == 'q' else 'keys and values'} travel" if e["workers"] > 1 else ""
        lines.append(("backward", f"{back['flops']:.3g} FLOP, {_bytes(back['peak_bytes'])}, {back['arithmetic']}{travels}"))
        lines += [("note", note) for note in e["notes"]]
        return "\n".join(f"{head:<9}{text}" for head, text in lines)

    def __repr__(self):
        return f"<annulus.Plan of {self._entries['op']}: {self._entries['target']}, {self._entries['workers']} workers>"


def explain(operation, query, key, value, *, workers=None, return_lse=False, **options):
    """The Plan of ``annulus.<operation>(query, key, value, workers=workers, **options)``: the path that will be taken and
    why, its cost in FLOP, bytes and memory, and every copy that cannot be avoided. Computes nothing; of the arrays only
    masks, segment ids and lengths are read.

    operation: "attention", "ring_attention" or "attention_backward". Raises what the call itself would raise.
    """
    if operation not in _DEFAULTS:
        raise InvalidArgument(f"explain: operation is {operation!r}, expected one of {', '.join(map(repr, _DEFAULTS))}")
    names_of(operation, options)
    kwargs = {**_DEFAULTS[operation], **options}
    kind = _frameworks.common(operation, (("query", query), ("key", key), ("value", value)), kwargs)
    arrays = [a.detach() if kind is _frameworks.Torch else a for a in (query, key, value)]
    if kind is _frameworks.Torch:
        kwargs = {name: a.detach() if hasattr(a, "detach") else a for name, a in kwargs.items()}
    read, copies = make_options(operation, kind, kwargs)
    workers = count_of_workers(operation, workers)
    entries = _core.explain(read, *arrays, workers)
    entries["notes"] = [*entries["notes"], *copies]
    entries["backward"] = _core.explain_backward(read, *arrays, workers)
    return Plan(operation, entries)


def doctor():
    """What this machine can do, with a self-test of every path: the command line's ``annulus doctor --json`` as a dict."""
    from .__main__ import program

    try:
        run = subprocess.run([program(), "doctor", "--json"], capture_output=True, text=True)
    except OSError as error:
        raise Unsupported(f"doctor: cannot start {program()}: {error.strerror}", "install the package again") from None
    try:
        return json.loads(run.stdout)
    except ValueError:
        raise Unsupported(f"doctor: the command line answered {run.stdout or run.stderr!r}") from None
