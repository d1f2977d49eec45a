"""Runs with vLLM in processes of their own, to be killed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from ludus.small.make import Course, SmallSpec, make
from ludus.train import checkpoint

LONG = 300  # steps, more than anybody waits for


def make_small(directory: Path) -> Path:
    """A model that has learnt a little Kuhn poker, and whose heads are wide enough for vLLM."""
    courses = (Course("kuhn_poker", 800),)
    spec = SmallSpec(
        courses, hidden=64, layers=2, heads=2, kv_heads=1, ffn=64, context=1024, batch=4, lr=6e-3
    )
    make(directory, spec, tell=lambda _: None)
    return directory


class Life:
    """One `ludus train`, and the processes of vLLM that it starts."""

    def __init__(self, recipe: Path, out: Path, *options: str) -> None:
        self.log = out.with_suffix(".log")
        command = [sys.executable, "-m", "ludus.cli", "train", str(recipe), "--out", str(out), *options]
        with self.log.open("a") as log:
            self.process = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def until(self, there: Callable[[], bool]) -> None:
        while not there():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)

    def vllm(self) -> list[psutil.Process]:
        return [p for p in self.process.children(recursive=True) if p.name().startswith("VLLM")]

    def end(self) -> int:
        return int(self.process.wait())


def steps_kept(out: Path) -> int:
    found = checkpoint.steps(out) if out.exists() else []
    return found[-1][0] if found else 0
