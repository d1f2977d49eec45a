"""The processes that share a run: who is who, and what they tell each other.

    torchrun --nproc-per-node 8 -m ludus train RECIPE

Each process, a rank, has an engine with all weights and plays its share of the matches; all get all episodes.
So each computes the same plans, advantages and micro-batches by itself, and takes its part of the learner's
work (`ludus/learner/sharding.py`). Rank 0 is the first: it writes the run directory and speaks to the user.

They agree by gloo, on the CPU; the learner's tensors travel by NCCL where there are GPUs.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ludus import config as configuration
from ludus.config import RunConfig
from ludus.engines.base import Engine, PolicyWeights
from ludus.errors import UserError
from ludus.games.base import Game
from ludus.judges.base import Stats
from ludus.learner.device import resolve_device
from ludus.learner.placement import Placement
from ludus.learner.sharding import Sharded
from ludus.players import Player
from ludus.records import decode_episodes, encode_episodes
from ludus.rollout.play import FORFEIT_AT_ONCE, HouseRules
from ludus.rollout.scheduler import play_all
from ludus.train.rollouts import Crew
from ludus.types import Episode, MatchPlan

T = TypeVar("T")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


class LostRank(UserError):
    """Another rank is gone, or cannot be reached; this one cannot go on without it."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a run, seen from one of them. By default there is one.

    `gather`, `agree`, `wait` and `play` must be called by all ranks, in the same order.
    """

    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def placement(self, device: torch.device) -> Placement | None:
        """Where a learner's weights are to lie; None: all here."""
        if self.size == 1:
            return None
        assert dist.group.WORLD is not None
        return Sharded(dist.group.WORLD, device)

    def own_files(self, config: RunConfig) -> RunConfig:
        """The recipe, with a name of this rank's own for each file that one process alone may write."""
        if self.first:
            return config
        judges = {
            name: judge.model_copy(update={"cache_file": self._own(judge.cache_file)})
            for name, judge in config.judges.items()
        }
        return config.model_copy(update={"judges": judges})

    def _own(self, file: str | None) -> str | None:
        if file is None:
            return None
        path = Path(file)
        return str(path.with_name(f"{path.stem}.rank{self.rank}{path.suffix}"))

    async def play(
        self,
        plans: Sequence[MatchPlan],
        games: Mapping[str, Game],
        players: Mapping[str, Player],
        *,
        rule: HouseRules = FORFEIT_AT_ONCE,
        in_flight: int | asyncio.Semaphore = 512,
    ) -> list[Episode]:
        """`play_all` with the matches dealt out: every rank plays its share and gets the episodes of all.

        Each has `in_flight` of its own alive at once.
        """
        mine = await play_all(plans[self.rank :: self.size], games, players, rule=rule, in_flight=in_flight)
        if self.size == 1:
            return mine
        episodes: dict[int, Episode] = {}
        for rank, data in enumerate(self.gather(encode_episodes(mine))):
            theirs = range(rank, len(plans), self.size)
            episodes.update(zip(theirs, decode_episodes(data), strict=True))
        return [episodes[i] for i in range(len(plans))]

    def gather(self, data: bytes) -> list[bytes]:
        """What each rank gives, in the order of ranks."""
        if self.size == 1:
            return [data]
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(data)
        dist.all_reduce(lengths, group=self.control)
        longest = int(lengths.max())
        padded = torch.frombuffer(bytearray(data.ljust(max(longest, 1), b"\0")), dtype=torch.uint8)
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.control)
        return [part.numpy().tobytes()[:n] for part, n in zip(parts, lengths.tolist(), strict=True)]

    def agree(self, value: T) -> T:
        """The first rank's `value`, plain JSON, for everybody."""
        if self.size == 1:
            return value
        told: T = json.loads(self.gather(json.dumps(value).encode() if self.first else b"")[0])
        return value if self.first else told

    def wait(self) -> None:
        """Until all ranks have come here."""
        self.gather(b"")


ALONE = Ranks()


class SharedCrew:
    """The first rank's crew, which plays elsewhere, for all ranks: each gets all episodes."""

    def __init__(self, ranks: Ranks, engine: Engine, crew: Crew | None) -> None:
        """`engine` is this rank's own, which measures; `crew` is there on the first rank alone."""
        self.ranks, self.engine, self.crew = ranks, engine, crew

    async def play(self, plans: Sequence[MatchPlan]) -> list[Episode]:
        data = b"" if self.crew is None else encode_episodes(await self.crew.play(plans))
        return list(decode_episodes(self.ranks.gather(data)[0]))

    def load(self, policy: str, weights: PolicyWeights, version: int) -> None:
        (self.crew or self.engine).load(policy, weights, version)

    def bring(self, run: Path) -> None:
        if self.crew is not None:
            self.crew.bring(run)

    def judged(self) -> dict[str, Stats]:
        return {} if self.crew is None else self.crew.judged()

    def report(self) -> dict[str, Any]:
        return {} if self.crew is None else self.crew.report()

    def close(self) -> None:
        if self.crew is not None:
            self.crew.close()


@contextmanager
def join(config: RunConfig, what: str) -> Iterator[Ranks]:
    """Take part in the run that torchrun started this process for; alone where nothing did.

    `what` else must be the same on all ranks, besides the recipe. Raises UserError for ranks that do not fit
    this machine, the recipe or each other. While they are together, a rank that is lost is raised as
    `LostRank` in the others.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    if lacking := [name for name in VARIABLES if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE is {size}, but {', '.join(lacking)} is not set: start the ranks by torchrun, or "
            "unset WORLD_SIZE to train in this process alone"
        )
    rank = int(os.environ["RANK"])
    backend = _backend(config, size)
    patience = timedelta(seconds=config.train.patience)
    try:
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=patience)
    except (dist.DistError, ValueError, RuntimeError) as e:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"rank {rank} of {size} cannot meet the others at {where}: {brief(e)}; start all ranks, and "
            "choose another --master-port if that one is in use"
        ) from e
    try:
        with _company(rank, size):
            ranks = Ranks(rank, size, dist.new_group(backend="gloo", timeout=patience))
            _compare(ranks, config, what)
            yield ranks
            ranks.wait()
    finally:
        dist.destroy_process_group()


@contextmanager
def _company(rank: int, size: int) -> Iterator[None]:
    """torch has no type of its own for a peer that is gone: a RuntimeError with the transport's words."""
    try:
        yield
    except RuntimeError as e:
        if isinstance(e, dist.DistError) or "gloo" in str(e):
            raise LostRank(
                f"rank {rank} of {size} has lost the others ({brief(e)}); a rank that failed says why in "
                "its own words; mend that and go on with --resume, from the last checkpoint"
            ) from e
        raise


def _backend(config: RunConfig, size: int) -> str:
    """How tensors travel; sets this rank's GPU. Raises UserError where that is not possible."""
    matches = config.rollout.matches
    if config.rollout.max_lag:
        raise UserError(
            f"rollout.max_lag is {config.rollout.max_lag}, but ranks that share a learner play and learn in "
            "turns; set it to 0"
        )
    if matches < size:
        raise UserError(
            f"{size} ranks are to share the {matches} matches of a step; raise rollout.matches or start fewer"
        )
    if not dist.is_available() or not dist.is_gloo_available():
        raise UserError("this build of torch has no gloo, by which ranks agree; install another one")
    device = resolve_device(config.model.device)
    if device.type == "cpu":
        return "gloo"
    if device.type != "cuda":
        raise UserError(
            f"several ranks train on GPUs by CUDA or on the CPU, not on {device.type}; set model.device"
        )
    if not dist.is_nccl_available():
        raise UserError("this build of torch has no NCCL, by which GPUs are joined; install another one")
    local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= there:
        raise UserError(
            f"rank {local} of this machine has no GPU: there are {there}; start torchrun with "
            f"--nproc-per-node {there}"
        )
    torch.cuda.set_device(local)
    return "cpu:gloo,cuda:nccl"


def _compare(ranks: Ranks, config: RunConfig, what: str) -> None:
    """Raise UserError on every rank unless all have the same recipe and libraries."""
    said = {
        "recipe": hashlib.sha256(configuration.dump(config).encode()).hexdigest()[:12],
        "command line": what,
        "torch": torch.__version__,
    }
    everybody: list[dict[str, Any]] = [json.loads(data) for data in ranks.gather(json.dumps(said).encode())]
    for rank, theirs in enumerate(everybody):
        for name, value in theirs.items():
            if value != everybody[0][name]:
                raise UserError(
                    f"the ranks do not do the same: rank 0 has {name} {everybody[0][name]!r} and rank {rank} "
                    f"{value!r}; start all of them in the same way"
                )


def brief(error: Exception) -> str:
    """The first sentence of what a library says, without the place in its source."""
    text = " ".join(str(error).split())
    return text.rpartition("] ")[2].partition(". ")[0] or type(error).__name__
