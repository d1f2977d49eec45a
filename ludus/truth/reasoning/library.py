"""Reasoning-gym and math-verify in a process of their own, which is killed when it takes too long.

Some generators never come back for some seeds, some graders hand what a model wrote to a computer algebra
system, and both may take all memory. So `child.py` runs them, with a limit on its memory, and this file asks
it in lines of JSON. The child's hash seed is fixed: some generators iterate over sets.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ludus.errors import UserError

GENERATION = 60.0  # seconds for the problems of one task
MARKING = 20.0  # seconds for one answer
_START = 120.0  # seconds for the child to import its libraries


class TooLate(Exception):
    """The child did not answer in time; it was killed, and the next question starts another."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What an answer is worth, from 0 to 1; 0 where the library cannot read it: `problem` says why."""

    score: float
    problem: str | None = None


class Library:
    """Makes problems and marks answers. One question at a time."""

    def __init__(self, package: str, generation: float = GENERATION, marking: float = MARKING) -> None:
        """Raises UserError where `package` is not installed."""
        try:
            self.version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as e:
            raise UserError(f"{package} is not installed; get it by: pip install 'ludus[reasoning]'") from e
        self.generation = generation
        self._limits = {"generate": generation, "mark": marking, "equal": marking}
        self._child: subprocess.Popen[bytes] | None = None
        self._made: set[tuple[str, int, int]] = set()  # what the child has at hand

    def generate(self, task: str, seed: int, size: int) -> list[str]:
        """The questions of `size` problems of a reasoning-gym task: a function of the arguments and its
        version.

        Raises TooLate, and UserError where the library fails.
        """
        questions: list[str] = self._ask("generate", task=task, seed=seed, size=size)
        self._made.add((task, seed, size))
        return questions

    def mark(self, task: str, seed: int, size: int, index: int, answer: str) -> Mark:
        """What the library's own `score_answer` gives to the answer of problem `index`."""
        try:
            if (task, seed, size) not in self._made:
                self.generate(task, seed, size)
            return _mark(self._ask("mark", task=task, seed=seed, size=size, index=index, answer=answer))
        except TooLate:
            return Mark(0.0, "timeout")

    def equal(self, truth: str, answer: str) -> Mark:
        """1.0 if math-verify takes `answer` for the same as `truth`, both LaTeX or plain expressions."""
        try:
            return _mark(self._ask("equal", truth=truth, answer=answer))
        except TooLate:
            return Mark(0.0, "timeout")

    def __enter__(self) -> Library:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _ask(self, do: str, **what: Any) -> Any:
        if self._child is None:
            self._start()
        self._write({"do": do, **what})
        found = self._read(self._limits[do])
        if "error" in found:
            raise UserError(f"{what.get('task', 'math-verify')}: {found['error']}")
        return found["found"]

    def _start(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "ludus.truth.reasoning.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        self._read(_START)

    def _write(self, line: dict[str, Any]) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(line).encode() + b"\n")
        self._child.stdin.flush()

    def _read(self, seconds: float) -> dict[str, Any]:
        assert self._child is not None
        assert self._child.stdout is not None
        deadline, line = time.monotonic() + seconds, b""
        file = self._child.stdout.fileno()
        while not line.endswith(b"\n"):
            if not select.select([file], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self._stop()
                raise TooLate
            piece = os.read(file, 1 << 16)
            if not piece:
                self._stop()  # out of memory, most likely: the same to whoever asked
                raise TooLate
            line += piece
        found: dict[str, Any] = json.loads(line)
        return found

    def _stop(self) -> None:
        if self._child is None:
            return
        self._child.kill()
        self._child.communicate()
        self._child = None
        self._made.clear()


def _mark(found: dict[str, Any]) -> Mark:
    return Mark(float(found["score"]), found["problem"])
