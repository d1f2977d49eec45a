"""Learners on a Ray cluster: what torchrun does on machines, by Ray.

    ludus train RECIPE cluster=ray cluster.learners=8 cluster.learner_gpus=1

The process that is called places one `Launcher` for each learner, and makes room for the rollout actors. A
launcher starts `ludus train` in a process of its own with what torchrun would have set, so that it is a rank
like any other (`train/ranks.py`), and the first rank is the driver of the rollout actors. The process that is
called shows what the ranks say, passes signals on to them, and ends as they end.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ludus import config as configuration
from ludus.config import RunConfig
from ludus.errors import UserError
from ludus.train.cluster.connect import PLACED, connect, place

_GRACE = 60.0  # seconds that the other ranks have to end by themselves when one has ended

Said = tuple[int, bytes]  # 1 or 2, for standard output or error, and a line


def launch(config: RunConfig, out: Path, resume: bool) -> int:
    """Train as `config` says, by `cluster.learners` ranks on the cluster; the exit status.

    Raises UserError where there is no cluster, or no room on it, and where a learner dies.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"cluster.learners = {config.cluster.learners} has Ray start ranks, but torchrun has done so: "
            "call ludus without torchrun, or leave cluster.learners out"
        )
    own = connect(config.cluster)
    name = f"ludus-{secrets.token_hex(8)}"
    try:
        group = place(config.cluster, name)
        launchers = [_start(config, group, rank) for rank in range(config.cluster.learners)]
        options = ["--out", str(out.absolute()), *(["--resume"] if resume else [])]
        return asyncio.run(_together(config, launchers, options, name))
    finally:
        if own:
            ray.shutdown()


def _start(config: RunConfig, group: Any, rank: int) -> Any:
    cluster = config.cluster
    where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
    needs = {"num_cpus": cluster.learner_cpus, "num_gpus": cluster.learner_gpus}
    return ray.remote(Launcher).options(**needs, scheduling_strategy=where).remote()


async def _together(config: RunConfig, launchers: Sequence[Any], options: Sequence[str], name: str) -> int:
    """Have all ranks run, until they end."""
    address: str = ray.get_runtime_context().gcs_address
    host, port = await launchers[0].meet.remote()
    shared = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    shared |= {
        "WORLD_SIZE": str(len(launchers)),
        "LOCAL_RANK": "0",  # of the GPUs that a rank sees, its own
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        PLACED: f"{address} {name}",
    }
    if not config.cluster.learner_gpus:
        shared["CUDA_VISIBLE_DEVICES"] = ""
    recipe = configuration.dump(config)
    ranks = [
        asyncio.create_task(_rank(launcher, recipe, options, {**shared, "RANK": str(rank)}))
        for rank, launcher in enumerate(launchers)
    ]
    asked: list[int] = []

    def pass_on(number: int) -> None:
        asked.append(number)
        for launcher in launchers:
            launcher.signal.remote(number)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, pass_on, number)
    waiting = set(ranks)
    while waiting and not any(task.done() and task.result() for task in ranks):
        _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    first = next((rank for rank, task in enumerate(ranks) if task.done() and task.result()), None)
    if first is None:
        return 0
    if waiting:  # they have lost one of them, and say so
        _, hung = await asyncio.wait(waiting, timeout=_GRACE)
        for task in hung:
            task.cancel()
    status = ranks[first].result()
    if asked:
        return 128 + asked[0]
    if status < 0:
        raise UserError(
            f"learner {first} of {len(ranks)} was ended by {_named(-status)}. What was done is kept: mend "
            "the cause, and go on with --resume"
        )
    return status


async def _rank(launcher: Any, recipe: str, options: Sequence[str], variables: Mapping[str, str]) -> int:
    """Show what a rank says; its exit status in the end, -9 where its launcher is gone with it.

    Raises UserError where it cannot be started there.
    """
    status = 0
    try:
        running = launcher.run.options(num_returns="streaming")
        async for arrived in running.remote(recipe, options, os.getcwd(), variables):
            said = await arrived
            if isinstance(said, int):
                status = said
            else:
                stream = (sys.stdout, sys.stderr)[said[0] - 1]
                stream.write(said[1].decode(errors="replace"))
                stream.flush()
    except RayActorError:
        return -signal.SIGKILL
    except RayTaskError as e:
        raise UserError(f"a learner cannot be started where Ray has put it: {e.cause}") from e
    return status


def _named(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Launcher:
    """Starts one rank, on the machine where Ray has put it."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None

    async def meet(self) -> tuple[str, int]:
        """An address and a port at which the ranks can meet, if this one's is the first of them."""
        host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        with socket.socket() as free:
            free.bind((host, 0))
            return host, int(free.getsockname()[1])

    async def run(
        self, recipe: str, options: Sequence[str], folder: str, variables: Mapping[str, str]
    ) -> AsyncIterator[Said | int]:
        """Start the rank; what it says, line by line, and its exit status."""
        # Ray's own variables would have the rank be a part of this worker.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | dict(variables)
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
            file.write(recipe)
            file.flush()
            self._process = process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-u", "-m", "ludus", "train", file.name, *options),
                cwd=folder,
                env=environment,
                stdin=asyncio.subprocess.PIPE,  # which closes with this process
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=2**24,  # bytes of a line
            )
            assert process.stdout is not None
            assert process.stderr is not None
            lines: asyncio.Queue[Said | None] = asyncio.Queue()

            async def read(number: int, stream: asyncio.StreamReader) -> None:
                async for line in stream:
                    lines.put_nowait((number, line))
                lines.put_nowait(None)

            readers = [asyncio.create_task(read(n, s)) for n, s in ((1, process.stdout), (2, process.stderr))]
            closed = 0
            while closed < len(readers):
                line = await lines.get()
                if line is None:
                    closed += 1
                else:
                    yield line
            yield await process.wait()

    async def signal(self, number: int) -> None:
        """Send the rank a signal, if it is there."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)
