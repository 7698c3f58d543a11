"""The package itself: what importing it costs, what it tells about plans and machines, its command line."""

import json
import os
import subprocess
import sys

import annulus
import numpy as np
import pytest


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_import_brings_nothing_along():
    run = python("import sys, annulus; print([m for m in ('numpy', 'torch', 'jax', 'transformers') if m in sys.modules])")
    assert run.stdout == "[]\n" and not run.stderr


def test_nothing_is_printed_on_success():
    code = "import annulus, numpy as np; q = np.zeros((1, 300, 2, 64), 'f4'); annulus.ring_attention(q, q, q, workers=7)"
    run = python(code)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_environment_is_checked():
    code = "import annulus, numpy as np; q = np.zeros((1, 3, 2, 4), 'f4'); print(annulus.explain('attention', q, q, q).target)"
    assert python(code, ANNULUS_ISA="avx2").stdout == "avx2\n"
    assert "ConfigError" in python(code, ANNULUS_ISA="avx9").stderr
    assert "ConfigError" in python(code, ANNULUS_ISO="avx2").stderr


def test_plan_says_what_will_happen():
    q = np.zeros((2, 64, 4, 16), "f4")
    plan = annulus.explain("ring_attention", q, q, q, causal=True, workers=4, partition="zigzag")
    assert plan.pairs_visible == 2 * 4 * 64 * 65 // 2 and plan.pairs_total == 2 * 4 * 64 * 64
    assert plan.workers == 4 and plan.q_rows == [16] * 4 and plan.mask == "causal"
    assert plan.flops == 4 * 16 * plan.pairs_visible and plan.backward["flops"] == 2.5 * plan.flops
    entries = plan.to_dict()
    assert json.loads(json.dumps(entries)) == entries and entries["op"] == "ring_attention"
    text = str(plan)
    assert "4 workers" in text and "causal" in text and "note" in text
    with pytest.raises(AttributeError, match="no 'colour'"):
        plan.colour
    shifted = annulus.explain("attention", q[:, :8], q, q, causal=True)
    assert shifted.pairs_visible == 2 * 4 * sum(range(57, 65))
    assert annulus.explain("ring_attention", q[:, :8], q, q, causal=True).pairs_visible == 2 * 4 * sum(range(1, 9))


def test_doctor_tests_the_machine():
    found = annulus.doctor()
    assert found["version"] == annulus.__version__ and found["allowed_cpus"] >= 1


def test_command_line_is_installed():
    run = subprocess.run([sys.executable, "-m", "annulus", "--version"], capture_output=True, text=True, check=True)
    assert annulus.__version__ in run.stdout
    run = subprocess.run([sys.executable, "-m", "annulus", "run", "--tokens=x"], capture_output=True, text=True, check=False)
    assert run.returncode == 64


def test_errors_have_codes_and_bases():
    for name, code in {
        "InvalidArgument": 64, "BadData": 65, "Unsupported": 69, "InternalError": 70, "OutOfMemory": 71, "IoError": 74,
        "PeerTimeout": 75, "PeerMismatch": 76, "PayloadCorrupt": 77, "ConfigError": 78, "Interrupted": 130,
    }.items():  # fmt: skip
        error = getattr(annulus, name)
        assert issubclass(error, annulus.Error) and error.code == code
        assert str(error("what", "how")) == "what\n  fix: how"
    assert issubclass(annulus.InvalidArgument, ValueError) and issubclass(annulus.PeerTimeout, annulus.CommError)


def test_every_public_name_is_documented():
    for name in annulus.__all__:
        value = getattr(annulus, name)
        assert value.__doc__ and len(value.__doc__) > 10, name


def test_one_build_runs_on_every_instruction_set():
    code = """
import sys, annulus, numpy as np
draw = np.random.default_rng(0)
q, k, v = (draw.standard_normal((1, 70, 2, 40)).astype("f4") for _ in range(3))
out = annulus.attention(q, k, v, causal=True)
error = np.abs(out - annulus.reference.attention(q, k, v, causal=True)).max()
print(annulus.explain("attention", q, k, v).target, error < 2e-6)
"""
    for target in annulus._core.targets():
        if target["available"] and target["name"] not in ("avx512_bf16", "amx"):  # those are for bfloat16
            assert python(code, ANNULUS_ISA=target["name"]).stdout == f"{target['name']} True\n"
