"""A process group of torch's that the driver, rank 0, and rollout actors join for a while.

It is apart from the group by which ranks learn together (`train/ranks.py`), which lives as long as the run:
where a member of this one dies, the others get an error, leave it, and meet in another.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Backend = Literal["nccl", "gloo"]


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where and how the members of a group find each other."""

    host: str
    port: int  # of the driver's store
    size: int  # members
    backend: Backend
    patience: float  # seconds to wait for each other, when they meet and in every broadcast


class Group:
    """One member's part. Whatever goes wrong is a RuntimeError of torch's, and the end of the group."""

    def __init__(self, meeting: Meeting, rank: int, store: Any = None) -> None:
        """Wait until all are there; `store` is the driver's own, to which the others connect."""
        timeout = timedelta(seconds=meeting.patience)
        if store is None:
            store = open_store(meeting.host, meeting.port, timeout)
        self.meeting = meeting
        self._timeout = timeout
        self._group: Any  # torch says little of the types of what it exports
        if meeting.backend == "gloo":
            self.device = torch.device("cpu")
            self._group = dist.ProcessGroupGloo(store, rank, meeting.size, timeout)
        else:
            self.device = torch.device("cuda", torch.cuda.current_device())
            with _errors_are_raised():
                settings = dist.ProcessGroupNCCL.Options()
                settings._timeout = timeout
                self._group = dist.ProcessGroupNCCL(store, rank, meeting.size, settings)
                self._group.eager_connect_single_device(self.device)

    def broadcast(self, data: Tensor) -> None:
        """Have `data`, bytes on this group's `device`, be the driver's with all members."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = 0, 0, self._timeout
        self._group.broadcast([data], options).wait()

    def leave(self) -> None:
        """Others that still wait for this member get an error."""
        self._group.abort()


def open_store(host: str, port: int, timeout: timedelta, *, serve: bool = False) -> Any:
    """Where members leave word for each other. To `serve` it on any port, `port` is 0."""
    store: Any = dist.TCPStore  # type: ignore[attr-defined]
    return store(host, port, is_master=serve, wait_for_workers=False, timeout=timeout)


@contextmanager
def _errors_are_raised() -> Iterator[None]:
    """A group of NCCL's that is made meanwhile raises its errors where they are waited for; by default its
    watchdog ends the process, and the learner with it. Groups made earlier or later are not touched.
    """
    wanted = {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
