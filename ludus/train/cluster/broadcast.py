"""The driver's side of weights that reach all actors at once, by NCCL between GPUs, by gloo between CPUs.

    weights -> bucket -> broadcast -> bucket -> ...

A group is of those that are there. Where somebody dies, or another comes, it is left, and the next weights
have a new one. What a broadcast did not bring goes through the object store. (`ray.util.collective` knows
groups too, but of actors alone, in one world of gloo per process, without a timeout of their own.)
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayActorError, RayError, RayTaskError
from torch import Tensor

from ludus.config import RunConfig
from ludus.engines.base import Adapter
from ludus.learner.device import resolve_device
from ludus.train.cluster.buckets import Bucket, lay_out
from ludus.train.cluster.group import Backend, Group, Meeting, open_store
from ludus.train.ranks import brief

_GIVEN_UP = 3  # broadcasts that failed one after another, after which weights go through the object store


class Broadcasts:
    """One after another. `backend` is None where none are wanted, or no more."""

    def __init__(self, config: RunConfig) -> None:
        self._cluster = config.cluster
        self.backend = _backend(config)
        self._store: Any = None
        self._group: Group | None = None
        self._for: list[Any] = []  # the actors that it was made for
        self._members: list[Any] = []  # those of them that were alive then
        self._met, self._vain = 0, 0
        self._done, self._failed = 0, ""

    def send(
        self,
        actors: Sequence[Any],
        policy: str,
        version: int,
        adapter: Adapter | None,
        tensors: Mapping[str, Tensor],
    ) -> tuple[list[Bucket], list[Any]]:
        """Bring `tensors` to `actors`; returns them in buckets, and the actors that have them now.

        Of the others some may be dead, which is told where they are asked to play.
        """
        layouts = lay_out(tensors, self._cluster.bucket_mib * 2**20)
        group = self._meet(actors)
        device = torch.device("cpu") if group is None else group.device
        members = [] if group is None else self._members
        asked = [actor.receive.remote(policy, version, adapter, layouts) for actor in members]
        buckets: list[Bucket] = []
        for layout in layouts:
            data = layout.fill(tensors, device)
            if group is not None:
                try:
                    group.broadcast(data)
                except RuntimeError as e:
                    self._leave(e)
                    group = None
            buckets.append(Bucket(layout, data.cpu().numpy()))
        if not members:
            return buckets, []
        answers = self._answers(asked)
        errors = [answer for answer in answers if answer is not None]
        if not errors:
            self._done, self._vain = self._done + 1, 0
        elif self._group is not None:
            self._leave(errors[0])
        if errors and not any(isinstance(error, RayActorError) for error in errors):
            self._in_vain()
        return buckets, [actor for actor, error in zip(members, answers, strict=True) if error is None]

    def report(self) -> dict[str, Any]:
        """For the step's record: how many there were since the last one; of the last that failed, why."""
        said: dict[str, Any] = {"broadcasts": self._done} if self.backend or self._failed else {}
        if self._failed:
            said["broadcast_failed"] = self._failed
        self._done, self._failed = 0, ""
        return said

    def close(self) -> None:
        """Leave the group, if there is one."""
        if self._group is not None:
            self._group.leave()
        self._group, self._store = None, None

    def _meet(self, actors: Sequence[Any]) -> Group | None:
        """A group of those of `actors` that are alive; None where it cannot be had."""
        if self._group is not None and self._for == list(actors):
            return self._group
        self.close()
        if self.backend is None:
            return None
        # A dead one would have the others wait for it.
        answers = self._answers([actor.here.remote() for actor in actors])
        members = [actor for actor, error in zip(actors, answers, strict=True) if error is None]
        if not members:
            return None
        patience = self._cluster.patience
        host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        try:
            self._store = open_store(host, 0, timedelta(seconds=patience), serve=True)
            meeting = Meeting(host, self._store.port, len(members) + 1, self.backend, patience)
            joining = [actor.join.remote(meeting, rank) for rank, actor in enumerate(members, start=1)]
            self._group = Group(meeting, 0, self._store)
        except RuntimeError as e:
            self._leave(e)
            self._in_vain()
            return None
        self._for, self._members = list(actors), members
        self._answers(joining)  # who is not there after all does not receive
        return self._group

    def _answers(self, asked: Sequence[Any]) -> list[Exception | None]:
        """For each that was asked: None once it has done so, or the error, such as that it takes too long."""
        answers: list[Exception | None] = []
        until = time.monotonic() + self._cluster.patience
        for answer in asked:
            try:
                ray.get(answer, timeout=max(0.0, until - time.monotonic()))
                answers.append(None)
            except RayTaskError as e:
                answers.append(e.cause if isinstance(e.cause, Exception) else e)
            except RayError as e:
                answers.append(e)
        return answers

    def _leave(self, why: Exception) -> None:
        """Give the group up, and have the others do so too: not every transport tells them."""
        if self._group is not None:
            for actor in self._members:
                actor.part.remote(self._group.meeting)
        self.close()
        self._failed = brief(why)

    def _in_vain(self) -> None:
        """Nobody has died, so the cause may well stay."""
        self._vain += 1
        if self._vain >= _GIVEN_UP:
            self.backend = None
            self._failed += f"; {self._vain} in a row: weights go through the object store from now on"


def _backend(config: RunConfig) -> Backend | None:
    """How broadcasts travel; None: not at all."""
    cluster = config.cluster
    whole_gpus = cluster.gpus >= 1 and cluster.gpus == int(cluster.gpus)  # two ranks of NCCL want two GPUs
    here = resolve_device(config.model.device).type == "cuda" and dist.is_nccl_available()
    nccl = whole_gpus and here and config.engine.kind == "torch"
    if cluster.transport == "objects" or (cluster.transport == "auto" and not nccl):
        return None
    return "nccl" if nccl else "gloo"
