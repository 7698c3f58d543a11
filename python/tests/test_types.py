"""The stubs: users' programs type-check under mypy --strict, and the signatures are those of the code."""

import ast
import importlib.util
import inspect
import os
import pathlib
import subprocess
import sys

import annulus
import pytest

pytest.importorskip("mypy")

PACKAGE = pathlib.Path(annulus.__file__).parent
# What the package has besides its public modules. mypy reads the files without checking them.
PRIVATE = [f"annulus.{file.stem}" for file in PACKAGE.glob("_*.py") if file.stem != "__init__"]
UNSTUBBED = [f"annulus.{name}" for name in ("jax", "transformers") if not (PACKAGE / f"{name}.pyi").exists()]

# Private names, and the rules of Mask: they work on the class and on a mask alike, which a stub calls a class method.
# Their parameters are compared below.
ALLOWED = r"""annulus\.(\w+\.)*_(?!_)\w+(\..*)?
annulus\.Mask\.(full|causal|sliding_window|chunked|prefix|dense|block_sparse)
"""

NUMPY_PROGRAM = """
import annulus
import numpy as np
from numpy.typing import NDArray

q: NDArray[np.float32] = np.ones((1, 8, 4, 16), np.float32)
k: NDArray[np.float32] = np.ones((1, 8, 2, 16), np.float32)
ids = np.zeros((1, 8), np.int32)

def build(q_len: int, kv_len: int, num_heads: int, head: int, num_reps: int) -> annulus.Mask:
    return annulus.Mask.prefix(2) | annulus.Mask.causal() & annulus.Mask.sliding_window(3, 0)

out: NDArray[np.float32] = annulus.ring_attention(
    q, k, k, ids, causal=True, sliding_window=(4, None), softmax_aux=np.zeros(4, np.float32), mask_builder=build,
    fwd_params=annulus.FwdParams(kv_blocksize=64), bwd_params={"q_blocksize": 32}, workers=2, partition="zigzag")
pair: tuple[NDArray[np.float32], NDArray[np.float32]] = annulus.attention(q, k, k, return_lse=True)
rows, lse = pair
joined: NDArray[np.float32] = annulus.merge(rows, lse, rows, lse)[0]
gradients: annulus.Gradients[NDArray[np.float32]] = annulus.attention_backward(rows, q, k, k, rows, lse, workers=2)
dq: NDArray[np.float32] = gradients.dq
dbias: NDArray[np.float32] | None = gradients.dbias

def rank(comm: annulus.Communicator) -> list[int]:
    mesh = annulus.Mesh(comm, {"sp": 2})
    assert mesh.ring("sp").world_size == 2
    return annulus.Partition("zigzag").positions(comm.rank, comm.world_size, 8)

positions: list[list[int]] = annulus.run_workers(rank, 2, timeout_s=None)
custom = annulus.Partition.from_positions([np.array(p) for p in positions])
plan = annulus.explain("ring_attention", q, k, k, causal=True, partition=custom, workers=2)
share: float = plan.pairs_visible / plan.pairs_total
exact, exact_lse = annulus.reference.attention(q, k, k, causal=True, return_lse=True)
try:
    annulus.attention(q, k, k, out=q)
except annulus.InvalidArgument as error:
    print(error.code, error.fix)
except annulus.CommError as error:
    print(error.rank)
"""

FRAMEWORKS_PROGRAM = """
import annulus
import annulus.jax
import annulus.torch
import jax
import jax.numpy as jnp
import torch

t = torch.ones(1, 8, 4, 16)
out: torch.Tensor = annulus.ring_attention(t, t, t, causal=True)
lse: torch.Tensor = annulus.attention(t, t, t, return_lse=True)[1]
same: torch.Tensor = annulus.torch.scaled_dot_product_attention(t, t, t, is_causal=True, workers=2)

def rank(comm: annulus.Communicator) -> torch.Tensor:
    return annulus.torch.context_parallel_attention(t, t, t, comm=comm, is_causal=True, sliding_window=4)

shards: list[torch.Tensor] = annulus.run_workers(rank, 2)
j = jnp.ones((1, 8, 4, 16))
rows: jax.Array = annulus.attention(j, j, j)
ring: jax.Array = annulus.jax.ring_attention(j, j, j, causal=True, axis_name="sp", timeout_s=None)
pair: tuple[jax.Array, jax.Array] = annulus.jax.attention(j, j, j, dropout_seed=jnp.uint32(1), return_lse=True)
"""

# Statement, and what mypy says about it.
MISTAKES = {
    "annulus.attention([1.0], k, k)": "call-overload",
    "annulus.attention(q, k, k, causual=True)": "call-overload",
    "annulus.explain('attention', q, k, k, causual=True)": "call-arg",
    "annulus.attention(q, k, k, causal_alignment='top-left')": "call-overload",
    "annulus.run_workers(lambda: 1, 2)": "misc",
    "a, b = annulus.ring_attention(q, k, k, return_lse=False), 1; a.no_such_attribute": "attr-defined",
}


def python(folder, *arguments):
    """Runs `python -m ...` where it finds the package, installed or not. mypy refuses a path that it knows already."""
    environment = dict(os.environ)
    if not {"site-packages", "dist-packages"} & set(PACKAGE.parts):
        environment["MYPYPATH"] = environment["PYTHONPATH"] = str(PACKAGE.parent)
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, timeout=600, check=False
    )


def mypy(tmp_path, program, cache):
    file = tmp_path / "program.py"
    file.write_text(program)
    run = python(tmp_path, "mypy", "--strict", "--hide-error-context", f"--cache-dir={cache}", str(file))
    assert run.returncode < 2, run.stdout + run.stderr
    return [line for line in run.stdout.splitlines() if ": error:" in line]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("mypy")


def test_a_program_of_numpy_type_checks(tmp_path, cache):
    assert mypy(tmp_path, NUMPY_PROGRAM, cache) == []


@pytest.mark.torch
@pytest.mark.jax
def test_a_program_of_frameworks_type_checks(tmp_path, cache):
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    assert mypy(tmp_path, FRAMEWORKS_PROGRAM, cache) == []


def test_mistakes_are_found(tmp_path, cache):
    head = "import annulus\nimport numpy as np\nq = k = np.ones((1, 8, 4, 16), np.float32)\n"
    errors = mypy(tmp_path, head + "\n".join(MISTAKES) + "\n", cache)
    for line, (statement, kind) in enumerate(MISTAKES.items(), start=4):
        assert any(f"program.py:{line}:" in error and f"[{kind}]" in error for error in errors), (statement, errors)


def all_modules():
    return ["torch", *(name for name in ("jax", "transformers") if (PACKAGE / f"{name}.py").exists())]


@pytest.mark.torch
@pytest.mark.jax
def test_stubs_are_those_of_the_code(tmp_path):
    """mypy.stubtest: every public name, parameter, kind and default."""
    for name in all_modules():
        pytest.importorskip(name)
    config, allowed = tmp_path / "mypy.ini", tmp_path / "allowed"
    config.write_text(f"[mypy]\n[mypy-{','.join(PRIVATE + UNSTUBBED)}]\nignore_errors = True\n")
    allowed.write_text(ALLOWED)
    run = python(
        tmp_path, "mypy.stubtest", "annulus", "--concise", "--ignore-unused-allowlist", f"--mypy-config-file={config}",
        f"--allowlist={allowed}",
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr


def test_rules_of_masks_are_those_of_the_code():
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    (mask,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Mask")
    stubbed = {
        node.name: ([a.arg for a in node.args.args[1:]], [ast.literal_eval(d) for d in node.args.defaults])
        for node in mask.body
        if isinstance(node, ast.FunctionDef) and any(getattr(d, "id", "") == "classmethod" for d in node.decorator_list)
    }
    rules = {name: inspect.signature(rule._make) for name, rule in vars(annulus.Mask).items() if hasattr(rule, "_make")}
    assert stubbed == {
        name: (list(made.parameters), [p.default for p in made.parameters.values() if p.default is not p.empty])
        for name, made in rules.items()
    }


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").exists()
    for stub in PACKAGE.glob("[!_]*.pyi"):
        assert importlib.util.find_spec(f"annulus.{stub.stem}"), stub
