"""Shared by all tests: PyTorch keeps to one thread, so that two suites can run side by side."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "tests"))  # oracle_numpy: the second oracle


def pytest_addoption(parser):
    parser.addoption("--no-torch", action="store_true", help="skip tests that need PyTorch, Transformers or JAX")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--no-torch"):
        skip = pytest.mark.skip(reason="--no-torch")
        for item in items:
            if any(item.get_closest_marker(name) for name in ("torch", "jax", "transformers")):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _quiet_torch():
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
