"""What must load quickly, on machines without the heavy libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "vllm", "ray")


LIGHT = (
    "ludus",
    "ludus.types",
    "ludus.config",
    "ludus.records",
    "ludus.games",
    "ludus.games.registry",
    "ludus.text",
    "ludus.engines.base",
    "ludus.players",
    "ludus.experts",
    "ludus.viewer.report",
    "ludus.cli",
)


@pytest.mark.parametrize("module", LIGHT)
def test_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


def test_heavy_modules_would_be_noticed() -> None:
    """The same probe sees torch where it is imported: an empty list above means something."""
    code = f"import sys, torch; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "['torch']\n"
