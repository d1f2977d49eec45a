"""Where the learner's weights lie, and which process or thread computes which micro-batch.

    Solo       one process holds everything; on the CPU each thread takes whole micro-batches
    Sharded    (learner/sharding.py) several processes hold a shard of every tensor each, and share the work

The learner asks its placement wherever the two differ, and knows nothing else of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ludus.algos.losses import Sums
from ludus.learner.forward import token_terms
from ludus.learner.head import Terms
from ludus.types import Batch

Share = Callable[[list[int]], tuple[Tensor, Sums]]  # a micro-batch's share of the loss, and its sums


class Placement(Protocol):
    """What the learner needs to know. Every process of a run calls the same methods in the same order."""

    @property
    def lanes(self) -> int:
        """Micro-batches that are computed at once."""
        ...

    @property
    def keeps(self) -> bool:
        """Whether this process is the one that keeps gathered state, to write it down."""
        ...

    def spread(self, model: PreTrainedModel, half: bool) -> None:
        """Put the trained model where it will stay; `half`: it computes in bfloat16. Before the optimizer
        is made, as parameters may be replaced.
        """
        ...

    def spread_frozen(self, model: PreTrainedModel) -> None:
        """The same for a copy that gets no gradient."""
        ...

    def terms(
        self,
        model: PreTrainedModel,
        batch: Batch,
        temperature: float,
        other: PreTrainedModel | None,
        entropy_gradient: bool,
    ) -> Terms:
        """`token_terms` of a model that was spread."""
        ...

    def backward(
        self, model: PreTrainedModel, share: Share, micros: Sequence[list[int]], last: bool
    ) -> Iterator[tuple[Tensor, Sums]]:
        """Forward and backward of this process's part of `micros`; the gradients are added to the model's.

        Gives each micro-batch's loss, without its graph, and sums. After the `last` call before an optimizer
        step the gradients are those of all micro-batches of all processes since the step before.
        """
        ...

    def per_row(
        self,
        model: PreTrainedModel,
        values: Callable[[list[int]], Tensor],
        micros: Sequence[list[int]],
        lengths: Sequence[int],
    ) -> list[Tensor]:
        """For each row, its float32 values [length]: those that `values` gives for a micro-batch as [B, T].

        `micros` holds each row once. Without gradient. Every process gets all rows.
        """
        ...

    def total(self, sums: Sums) -> Sums:
        """What the processes measured, brought together: added up, or the largest where a name ends in
        `_max`.
        """
        ...

    def whole(self, tensor: Tensor) -> Tensor:
        """A parameter, gradient norm or moment as one tensor; itself where it is whole already."""
        ...

    def put(self, home: Tensor, value: Tensor) -> None:
        """Copy `value` into `home`; either may be whole or spread."""
        ...


class Solo:
    """All in this process."""

    keeps = True

    def __init__(self, device: torch.device) -> None:
        self.lanes = torch.get_num_threads() if device.type == "cpu" else 1
        self._pool: ThreadPoolExecutor | None = None

    def spread(self, model: PreTrainedModel, half: bool) -> None:
        """Nothing moves."""

    def spread_frozen(self, model: PreTrainedModel) -> None:
        """Nothing moves."""

    def terms(
        self,
        model: PreTrainedModel,
        batch: Batch,
        temperature: float,
        other: PreTrainedModel | None,
        entropy_gradient: bool,
    ) -> Terms:
        """See `Placement`."""
        return token_terms(model, batch, temperature, other, entropy_gradient)

    def backward(
        self, model: PreTrainedModel, share: Share, micros: Sequence[list[int]], last: bool
    ) -> Iterator[tuple[Tensor, Sums]]:
        """Gradients are summed in the order of `micros`.

        With several threads each micro-batch is one thread's: small products gain nothing from being split
        between cores, whole micro-batches do. The sum does not depend on which thread is done first.
        """
        if self.lanes == 1:
            for micro in micros:
                loss, sums = share(micro)
                loss.backward()  # type: ignore[no-untyped-call]
                yield loss.detach(), sums
            return
        params = [p for p in model.parameters() if p.requires_grad]

        def one(micro: list[int]) -> tuple[Tensor, Sums, tuple[Tensor | None, ...]]:
            loss, sums = share(micro)
            return loss.detach(), sums, torch.autograd.grad(loss, params, allow_unused=True)

        for loss, sums, gradients in self._threads().map(one, micros):
            pairs = [(p, g) for p, g in zip(params, gradients, strict=True) if g is not None]
            known = [(p.grad, g) for p, g in pairs if p.grad is not None]
            if known:
                torch._foreach_add_([total for total, _ in known], [g for _, g in known])
            for p, g in pairs:
                p.grad = g if p.grad is None else p.grad
            yield loss, sums

    def per_row(
        self,
        model: PreTrainedModel,
        values: Callable[[list[int]], Tensor],
        micros: Sequence[list[int]],
        lengths: Sequence[int],
    ) -> list[Tensor]:
        """See `Placement`."""
        out: list[Tensor] = [torch.empty(0)] * len(lengths)
        found = map(values, micros) if self.lanes == 1 else self._threads().map(values, micros)
        for micro, values_BT in zip(micros, found, strict=True):
            for i, row in zip(micro, values_BT, strict=True):
                out[i] = row[: lengths[i]]
        return out

    def total(self, sums: Sums) -> Sums:
        """As they are."""
        return sums

    def whole(self, tensor: Tensor) -> Tensor:
        """As it is."""
        return tensor

    def put(self, home: Tensor, value: Tensor) -> None:
        """See `Placement`."""
        home.copy_(value)

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.lanes, "learner", torch.set_num_threads, (1,))
        return self._pool
