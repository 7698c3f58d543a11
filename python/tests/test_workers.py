"""Ranks as threads: the SPMD view, meshes, errors that name the culprit, Ctrl-C."""

import signal
import subprocess
import sys
import textwrap
import threading
import time

import annulus
import numpy as np
import pytest


def tensors(n, seed=0, heads=2):
    draw = np.random.default_rng(seed)
    return [draw.standard_normal((1, n, heads, 8)).astype("f4") for _ in range(3)]


@pytest.mark.parametrize("partition", ["contiguous", "striped", "zigzag"])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_shards_give_the_rows_of_the_whole(partition, world_size):
    n = 23
    q, k, v = tensors(n)
    ids = np.arange(n, dtype="i4")[None] // 9
    bias = np.random.default_rng(1).standard_normal((1, 2, n, n)).astype("f4")
    sinks = np.array([1.0, 2.0], "f4")
    options = {"causal": True, "softmax_aux": sinks, "dropout_prob": 0.2, "dropout_seed": 5}
    whole, lse = annulus.ring_attention(q, k, v, q_segment_ids=ids, bias=bias, return_lse=True, **options)
    dout = np.random.default_rng(2).standard_normal(whole.shape).astype("f4")
    exact = annulus.attention_backward(
        dout, q, k, v, whole, lse, q_segment_ids=ids, bias=bias, want_dbias=True, **options
    )
    rule = annulus.Partition(partition)

    def rank(comm):
        assert comm.world_size == world_size
        rows = rule.positions(comm.rank, comm.world_size, n)
        shard = q[:, rows], k[:, rows], v[:, rows]
        given = {"q_segment_ids": ids[:, rows], "bias": bias[:, :, rows], "comm": comm, "partition": partition, **options}
        out, shard_lse = annulus.ring_attention(*shard, return_lse=True, **given)
        gradients = annulus.attention_backward(dout[:, rows], *shard, out, shard_lse, want_dbias=True, **given)
        return rows, out, shard_lse, gradients

    seen = []
    for rows, out, shard_lse, g in annulus.run_workers(rank, world_size):
        seen += rows
        np.testing.assert_allclose(out, whole[:, rows], atol=2e-6)
        np.testing.assert_allclose(shard_lse, lse[:, :, rows], atol=2e-6)
        for mine, all_rows in ((g.dq, exact.dq), (g.dk, exact.dk), (g.dv, exact.dv)):
            np.testing.assert_allclose(mine, all_rows[:, rows], atol=2e-5)
        np.testing.assert_allclose(g.dbias, exact.dbias[:, :, rows], atol=2e-5)
        np.testing.assert_allclose(g.dsoftmax_aux, exact.dsoftmax_aux, atol=5e-5)
    assert sorted(seen) == list(range(n))


def test_two_rings_of_a_mesh():
    whole = [tensors(18, seed) for seed in (0, 1)]

    def rank(comm):
        mesh = annulus.Mesh(comm, {"dp": 2, "sp": 3})
        at = mesh.coordinates
        rows = annulus.Partition("zigzag").positions(at["sp"], 3, 18)
        q, k, v = (x[:, rows] for x in whole[at["dp"]])
        out = annulus.ring_attention(q, k, v, causal=True, comm=mesh, axis_name="sp", partition="zigzag")
        with pytest.raises(annulus.InvalidArgument, match="sp"):
            annulus.ring_attention(q, k, v, comm=mesh, axis_name="tp")
        return at["dp"], rows, out

    for dp, rows, out in annulus.run_workers(rank, 6):
        exact = annulus.ring_attention(*whole[dp], causal=True)
        np.testing.assert_allclose(out, exact[:, rows], atol=2e-6)


def test_results_come_by_rank_and_context_is_the_callers():
    import contextvars

    name = contextvars.ContextVar("name", default="nobody")
    name.set("caller")
    assert annulus.run_workers(lambda comm: (comm.rank, name.get()), 4) == [(r, "caller") for r in range(4)]
    with pytest.raises(annulus.InvalidArgument, match="world_size is 0"):
        annulus.run_workers(lambda comm: None, 0)


def test_the_first_error_is_raised_and_stops_the_others():
    q, k, v = tensors(8)

    def rank(comm):
        if comm.rank == 2:
            raise LookupError("no data on this rank")
        annulus.ring_attention(q, k, v, comm=comm)

    start = time.monotonic()
    with pytest.raises(LookupError, match="no data on this rank"):
        annulus.run_workers(rank, 4)
    assert time.monotonic() - start < 20  # far below the deadline of 30 s: stopped, not timed out
    assert annulus.run_workers(lambda comm: comm.rank, 2) == [0, 1]


def test_ranks_that_disagree_are_named():
    q, k, v = tensors(8)

    def rank(comm):
        return annulus.ring_attention(q, k, v, comm=comm, softmax_scale=0.5 if comm.rank == 1 else 0.25)

    with pytest.raises(annulus.PeerMismatch, match="softmax_scale") as caught:
        annulus.run_workers(rank, 3)
    assert caught.value.rank == 1 and isinstance(caught.value, annulus.CommError) and caught.value.code == 76


def test_a_rank_that_stays_away_is_named():
    q, k, v = tensors(8)
    release = threading.Event()

    def rank(comm):
        if comm.rank == 1:
            release.wait(20)
            return
        try:
            annulus.ring_attention(q, k, v, comm=comm)
        finally:
            release.set()

    with pytest.raises(annulus.PeerTimeout, match="rank 1") as caught:
        annulus.run_workers(rank, 3, timeout_s=1)
    assert caught.value.rank == 1 and caught.value.code == 75


def test_comm_and_workers_exclude_each_other():
    q, k, v = tensors(8)

    def rank(comm):
        with pytest.raises(annulus.InvalidArgument, match="both workers and comm"):
            annulus.ring_attention(q, k, v, comm=comm, workers=2)
        with pytest.raises(annulus.InvalidArgument, match="comm has no axes"):
            annulus.ring_attention(q, k, v, comm=comm, axis_name="sp")
        with pytest.raises(annulus.Unsupported, match="MPI"):
            annulus.Communicator.from_launcher()

    annulus.run_workers(rank, 2)


LONG = """
    import sys, time, annulus, numpy as np
    q = np.zeros((1, 1 << 17, 8, 64), "f4")     # minutes
    rank = lambda comm: annulus.ring_attention(q[:, : 1 << 16], q[:, : 1 << 16], q[:, : 1 << 16], comm=comm)
    print("running", flush=True)
    try:
        {call}
    except KeyboardInterrupt:
        print("stopped", flush=True)
        print(annulus.attention(q[:, :4], q[:, :4], q[:, :4]).shape, flush=True)
"""


@pytest.mark.parametrize(
    "call",
    ["annulus.attention(q, q, q)", "annulus.ring_attention(q, q, q, workers=3)", "annulus.run_workers(rank, 2)"],
)
def test_ctrl_c_stops_a_long_call(call):
    program = textwrap.dedent(LONG).format(call=call)
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert run.stdout.readline() == "running\n"
        time.sleep(2)
        assert run.poll() is None  # it would take far longer
        run.send_signal(signal.SIGINT)
        assert run.stdout.readline() == "stopped\n"
        assert run.stdout.readline() == "(1, 4, 8, 64)\n"
        assert run.wait(60) == 0
    finally:
        run.kill()


def test_other_threads_run_meanwhile():
    """The GIL is free during a call: a thread that counts gets on."""
    counted, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            counted[0] += 1
            time.sleep(0.001)

    q = np.zeros((1, 4096, 4, 64), "f4")
    thread = threading.Thread(target=count)
    thread.start()
    try:
        before = counted[0]
        annulus.attention(q, q, q)
        assert counted[0] > before + 5
    finally:
        stop.set()
        thread.join()
