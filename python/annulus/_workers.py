"""Ranks as threads of this process, and meshes of ranks."""

import contextvars
import sys
import threading

from . import _core
from ._errors import InvalidArgument, Unsupported
from ._handles import Handled


class Communicator(Handled):
    """How a rank reaches its ring. Made by ``run_workers``; pass it as ``comm=``."""

    __slots__ = ("_comm",)

    def __init__(self, comm):
        super().__init__()
        self._comm = comm

    @property
    def rank(self):
        """This rank, 0 to world_size - 1."""
        return self._comm.rank

    @property
    def world_size(self):
        """Number of ranks."""
        return self._comm.world_size

    @staticmethod
    def from_mpi(comm):
        """A ring over the ranks of an mpi4py communicator. This build has no MPI transport yet: raises Unsupported."""
        raise Unsupported(
            "Communicator.from_mpi: this build has no MPI transport",
            "use workers=P or annulus.run_workers, which run in this process",
        )

    @staticmethod
    def from_launcher():
        """A ring over the ranks a launcher started. This build has no MPI transport yet: raises Unsupported."""
        raise Unsupported(
            "Communicator.from_launcher: this build has no MPI transport",
            "use workers=P or annulus.run_workers, which run in this process",
        )

    def __repr__(self):
        return f"Communicator(rank={self.rank}, world_size={self.world_size})"


class Mesh(Handled):
    """A grid of ranks with named axes, the last varying fastest; every line along an axis is a ring of its own.

    All ranks of ``comm`` make the mesh together::

        mesh = annulus.Mesh(comm, {"dp": 2, "sp": 4})
        out = annulus.ring_attention(q, k, v, comm=mesh, axis_name="sp")     # two rings of four ranks
    """

    __slots__ = ("_mesh", "_whole", "axes")

    def __init__(self, comm, axes):
        super().__init__()
        if not isinstance(comm, Communicator):
            raise InvalidArgument(f"Mesh: comm is a {type(comm).__qualname__}, expected an annulus.Communicator")
        self.axes = dict(axes)
        self._whole = comm
        self._mesh = _core.Mesh(comm._comm, [(str(name), int(size)) for name, size in self.axes.items()])

    @property
    def rank(self):
        """This rank in the whole mesh."""
        return self._whole.rank

    @property
    def world_size(self):
        """Number of ranks of the whole mesh."""
        return self._whole.world_size

    @property
    def coordinates(self):
        """Where this rank is, by axis."""
        return dict(zip(self.axes, self._mesh.coordinates))

    def ring(self, axis_name):
        """The Communicator of this rank's line along an axis. Raises InvalidArgument for an unknown name."""
        return Communicator(self._mesh.ring(str(axis_name)))

    def __repr__(self):
        return f"Mesh({self.axes}, rank={self.rank})"


def ring_of(operation, comm, axis_name, workers):
    """The binding's communicator of a call, None in the global view."""
    if comm is None:
        if axis_name is not None:
            raise InvalidArgument(
                f"{operation}: axis_name is {axis_name!r} without a mesh",
                "pass comm=annulus.Mesh(comm, {...}), or workers=P for a ring in this process",
            )
        return None
    if workers is not None:
        raise InvalidArgument(f"{operation}: both workers and comm are given", "pass one of them")
    if isinstance(comm, Mesh):
        return (comm.ring(axis_name) if axis_name is not None else comm._whole)._comm
    if not isinstance(comm, Communicator):
        raise InvalidArgument(
            f"{operation}: comm is a {type(comm).__qualname__}, expected an annulus.Communicator or annulus.Mesh"
        )
    if axis_name is not None:
        raise InvalidArgument(
            f"{operation}: axis_name is {axis_name!r}, but comm has no axes",
            "pass comm=annulus.Mesh(comm, {...}) or leave axis_name out",
        )
    return comm._comm


def _with_grad_mode(fn):
    """PyTorch's grad mode belongs to a thread; workers get the caller's."""
    torch = sys.modules.get("torch")
    if torch is None or torch.is_grad_enabled():
        return fn

    def without_grad(comm):
        with torch.no_grad():
            return fn(comm)

    return without_grad


def run_workers(fn, world_size, *, timeout_s=30.0):
    """Calls ``fn(comm)`` on ``world_size`` ranks, each a thread of this process; returns their results by rank.

    The first exception of any rank stops the others and is raised here. A rank that does not take part in a call which the
    others wait in for ``timeout_s`` seconds ends it with PeerTimeout, which names it. Ctrl-C stops all ranks.
    """
    if isinstance(world_size, bool) or not hasattr(world_size, "__index__") or world_size < 1:
        raise InvalidArgument(f"run_workers: world_size is {world_size!r}, expected an integer of at least 1")
    world = _core.ThreadWorld(world_size, float("inf") if timeout_s is None else timeout_s)
    results, errors, lock = [None] * world_size, [], threading.Lock()
    fn = _with_grad_mode(fn)

    def stop(rank, error):
        with lock:
            errors.append(error)
        world.abort(max(rank, 0), f"stopped because {f'rank {rank}' if rank >= 0 else 'the caller'} raised {error!r}")

    # Not Thread.join(): a Ctrl-C in it makes Python 3.11 take running threads for finished ones.
    finished = threading.Semaphore(0)

    def work(rank, context):
        try:
            results[rank] = context.run(fn, Communicator(world.rank(rank)))
            world.leave(rank)
        except BaseException as error:
            stop(rank, error)
        finally:
            finished.release()

    threads = [
        threading.Thread(target=work, args=(rank, contextvars.copy_context()), name=f"annulus-rank-{rank}", daemon=True)
        for rank in range(world_size)
    ]
    running = 0
    try:
        for thread in threads:
            thread.start()
            running += 1
        while running:
            finished.acquire()
            running -= 1
    except BaseException as error:
        stop(-1, error)
        while running:
            finished.acquire()
            running -= 1
    if errors:
        raise errors[0]
    return results
