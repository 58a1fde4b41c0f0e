"""Fixtures shared by all tests."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each worker and what it starts; read when torch is imported
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import torch

if not torch.cuda.is_available():  # before any kernel module is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import quick_interpreter


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
        quick_interpreter.install()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _accelerate_begins_anew() -> Iterator[None]:
    """accelerate keeps its device and precision in singletons: what a test has made, or a failed one left, is gone."""
    yield
    states = sys.modules.get("accelerate.state")
    if states is not None:
        for kind in (states.AcceleratorState, states.GradientState, states.PartialState):
            kind._reset_state()


@pytest.fixture
def checkout_on_path() -> Iterator[None]:
    """The checkout on the path, for its folders that are not installed, and off it again afterwards: other libraries
    would find ours when they look for a package called triton_kernels."""
    root = str(Path(__file__).parent.parent)
    sys.path.insert(0, root)
    yield
    sys.path.remove(root)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sweep", action="store_true", help="run the tests marked `sweep`, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--sweep"):
        left_out = [item for item in items if "sweep" in item.keywords]
        items[:] = [item for item in items if "sweep" not in item.keywords]
        config.hook.pytest_deselected(items=left_out)
    if "PYTEST_XDIST_WORKER" in os.environ:  # a slow test that comes last would keep the other processes waiting
        items.sort(key=lambda item: "slow" not in item.keywords)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
