"""A learner spread over several processes by torch's FSDP2: each holds a shard of every tensor that learns.

A minibatch's micro-batches, sorted by length, are dealt to the ranks in turn, so that neighbours in length
are computed side by side:

    round 0    rank 0: micro-batch 0    rank 1: micro-batch 1    ...
    round 1    rank 0: micro-batch N    ...

In every round each rank gathers the layers one after another, computes, and lets go of them again. Gradients
stay with their rank until the last round, where one reduce-scatter per layer adds them up: one
synchronisation per optimizer step, however many micro-batches there are. The price is a whole gradient in
float32 on every rank between the rounds. Losses are divided by constants of the whole minibatch, so gradients
are added up over the ranks, not averaged, and do not depend on how many there are (but for rounding).

FSDP2: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from ludus.algos.losses import Sums
from ludus.learner.batching import fill_rounds
from ludus.learner.forward import token_terms
from ludus.learner.head import Terms
from ludus.learner.placement import Share
from ludus.types import Batch


class Sharded:
    """One of the ranks of a process group, which all hold the same rows and call the same methods."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.lanes = group.size()
        self.keeps = group.rank() == 0
        self._rank = group.rank()
        self._group = group
        self._device = device
        self._mesh = DeviceMesh.from_group(group, device.type)

    def spread(self, model: PreTrainedModel, half: bool) -> None:
        """Shard layer by layer; embedding, last norm and head are the root's and are gathered together.

        With `half` each rank gathers bfloat16 copies of its float32 shards, and gradients are added up in
        float32.
        """
        policy = MixedPrecisionPolicy()
        if half:
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for layer in _layers(model):
            fully_shard(layer, mesh=self._mesh, mp_policy=policy)
        fully_shard(model, mesh=self._mesh, mp_policy=policy)
        for module in _sharded(model):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # a plain sum, which gloo knows too
        # Decoder and head are run apart, so the forward pass that FSDP hooks is ours, not the model's own.
        whole: Any = model
        whole.token_terms = MethodType(_fresh_terms, model)
        register_fsdp_forward_method(model, "token_terms")

    def spread_frozen(self, model: PreTrainedModel) -> None:
        """Shard the layers. Embedding, last norm and head stay whole on every rank: the head is needed again
        in the backward pass of a model that is not this one.
        """
        layers = _layers(model)
        inside = {p for layer in layers for p in layer.parameters()}
        outside = {p for p in model.parameters() if p not in inside}
        for layer in layers:
            fully_shard(layer, mesh=self._mesh)
        fully_shard(model.base_model, mesh=self._mesh, ignored_params=outside)

    def terms(
        self,
        model: PreTrainedModel,
        batch: Batch,
        temperature: float,
        other: PreTrainedModel | None,
        entropy_gradient: bool,
    ) -> Terms:
        """See `Placement`."""
        if not isinstance(model, FSDPModule):  # a frozen one, whose hooks sit on its decoder
            return token_terms(model, batch, temperature, other, entropy_gradient)
        terms: Terms = cast(Any, model).token_terms(batch, temperature, other, entropy_gradient)
        return terms

    def backward(
        self, model: PreTrainedModel, share: Share, micros: Sequence[list[int]], last: bool
    ) -> Iterator[tuple[Tensor, Sums]]:
        """See `Placement`. A rank without a micro-batch in a round computes some row with weight 0, because
        all ranks must gather and reduce together.
        """
        root = cast(FSDPModule, model)
        rounds = self._rounds(micros)
        for number, (micro, mine) in enumerate(rounds, start=1):
            root.set_requires_gradient_sync(last and number == len(rounds))
            loss, sums = share(micro)
            loss = loss * float(mine)
            loss.backward()  # type: ignore[no-untyped-call]
            yield loss.detach(), {name: value * float(mine) for name, value in sums.items()}

    def per_row(
        self,
        model: PreTrainedModel,
        values: Callable[[list[int]], Tensor],
        micros: Sequence[list[int]],
        lengths: Sequence[int],
    ) -> list[Tensor]:
        """See `Placement`. The rows travel end to end in one tensor, in which each has one rank's values and
        otherwise zeros.
        """
        flat = torch.zeros(sum(lengths), device=self._device)
        out = list(torch.split(flat, list(lengths)))
        for micro, mine in self._rounds(micros):
            values_BT = values(micro)
            if mine:
                for i, row in zip(micro, values_BT, strict=True):
                    out[i].copy_(row[: lengths[i]])
        cast(FSDPModule, model).reshard()  # FSDP keeps the root's tensors for a backward pass
        dist.all_reduce(flat, group=self._group)
        return out

    def total(self, sums: Sums) -> Sums:
        """See `Placement`. Every rank gives the same names."""
        largest = {name: value for name, value in sums.items() if name.endswith("_max")}
        added = {name: value for name, value in sums.items() if name not in largest}
        out: Sums = {}
        for part, how in ((added, dist.ReduceOp.SUM), (largest, dist.ReduceOp.MAX)):
            if part:
                values = torch.stack([value.float() for value in part.values()])
                dist.all_reduce(values, how, group=self._group)
                out |= dict(zip(part, values, strict=True))
        return out

    def whole(self, tensor: Tensor) -> Tensor:
        """Gathered on every rank's device."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def put(self, home: Tensor, value: Tensor) -> None:
        """See `Placement`. Each rank takes its own shard of a whole `value`, which all of them have."""
        if not isinstance(home, DTensor):
            home.copy_(self.whole(value))
        elif isinstance(value, DTensor):
            home.copy_(value)
        else:
            here = value.to(home.device)
            home.copy_(distribute_tensor(here, home.device_mesh, home.placements, src_data_rank=None))

    def _rounds(self, micros: Sequence[list[int]]) -> list[tuple[list[int], bool]]:
        """This rank's micro-batch of each round, and whether it is its own or stands in for none."""
        filled = fill_rounds(micros, self.lanes)
        spare = filled[-1][-1:]  # the shortest row
        rounds = []
        for first in range(0, len(filled), self.lanes):
            at = first + self._rank
            rounds.append((filled[at], True) if at < len(filled) else (spare, False))
        return rounds


def _fresh_terms(model: PreTrainedModel, *given: Any) -> Terms:
    """`token_terms` with tensors of their own: FSDP hangs its hooks on them, which a view could lose."""
    logprobs, entropies, kl = token_terms(model, *given)
    return Terms(logprobs.clone(), entropies.clone(), None if kl is None else kl.clone())


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's blocks, by the names that transformers gives for what must stay in one piece."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def _sharded(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))
