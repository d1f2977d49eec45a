"""What the tests of runs share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from tiny_run import ROOT


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def kills() -> ModuleType:
    """benchmarks/kills.py, whose comparison of two runs these tests share."""
    return _benchmark("kills")


@pytest.fixture(scope="module")
def ray_kills() -> ModuleType:
    """benchmarks/ray_kills.py, whose killer and check of a run these tests share."""
    return _benchmark("ray_kills")


def _benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
