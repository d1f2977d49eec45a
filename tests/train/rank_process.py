"""Several ranks of one run as processes of this machine, without torchrun's own start-up."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any


def _work(argv: Sequence[str], environment: Mapping[str, str], log: Path, dies: bool) -> None:
    os.environ.update(environment)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
    import torch

    from ludus.cli import main

    torch.set_num_threads(1)
    if dies:
        _die_at_the_third_update()
    status = main(argv)
    sys.stdout.flush()
    sys.exit(status)


def _die_at_the_third_update() -> None:
    """Kill -9, with two updates behind it whoever is quick."""
    from ludus.learner.learner import Learner

    update, calls = Learner.update, itertools.count(1)

    def last(self: Learner, *args: Any, **more: Any) -> Any:
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, *args, **more)

    Learner.update = last  # type: ignore[method-assign]


@dataclass
class Started:
    """Ranks at work; their output is in `logs`."""

    processes: list[BaseProcess]
    logs: list[Path] = field(default_factory=list)

    def finish(self, seconds: float = 240.0) -> list[int | None]:
        """Wait for all; their exit statuses. Whoever is not done by then is killed: -9."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes]

    def said(self) -> list[str]:
        return [log.read_text() for log in self.logs]


def start(
    size: int,
    argv: Callable[[int], Sequence[str]],
    folder: Path,
    port: int | None = None,
    dies: int | None = None,
    **environment: str,
) -> Started:
    """Start `ludus ARGV(rank)` on every rank, as torchrun would. Rank `dies` dies at its third update."""
    context = multiprocessing.get_context("forkserver")  # imports once and forks the ranks
    context.set_forkserver_preload(["ludus.train.loop", "transformers.models.qwen3.modeling_qwen3"])
    folder.mkdir(exist_ok=True)
    started = Started([])
    port = port or free_port()
    for rank in range(size):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **environment,
        }
        log = folder / f"rank-{rank}.txt"
        log.touch()
        process = context.Process(target=_work, args=(argv(rank), variables, log, rank == dies))
        process.start()
        started.processes.append(process)
        started.logs.append(log)
    return started


def free_port() -> int:
    """Below those that the system hands out by itself, so that it stays free until a rank listens there."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
