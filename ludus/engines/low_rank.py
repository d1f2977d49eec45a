"""An adapter's low-rank changes: stacked for the torch engine, merged, or held against a model's shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ludus.engines.base import Adapter
from ludus.errors import UserError

if TYPE_CHECKING:
    from ludus.engines.weights import Architecture

# A tensor as peft names it in files: of which layer and product, and whether it is A or B.
_NAME = re.compile(
    r"base_model\.model\.model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)_proj\.lora_([AB])\.weight"
)


@dataclass(frozen=True, slots=True)
class Change:
    """What is added to a stacked product: W + B A. Each of its parts has an A of its own."""

    a: Tensor  # [parts * rank, in]
    b: Tensor  # [out, parts * rank], with the factor alpha / rank in it; 0 where a row is another part's

    def added(self, out: Tensor, x: Tensor, rows: slice) -> Tensor:
        """`out` [N, rows], which is W[rows] x, and the change's share of `x` [N, in] with it."""
        return torch.addmm(out, F.linear(x, self.a), self.b[rows].T)


def stacked_changes(
    policy: str, adapter: Adapter, arch: Architecture, dtype: torch.dtype, device: torch.device
) -> list[dict[str, Change]]:
    """Per layer, the changes by the stack's name: "qkv", "out", "gate_up", "down". The tensors are copied.

    Raises UserError for tensors that are no low-rank change of a product of this architecture.
    """
    stacks = _stacks(arch)
    halves = _by_place(policy, adapter, arch)
    rank = adapter.rank
    out: list[dict[str, Change]] = []
    for layer in range(arch.layers):
        changes: dict[str, Change] = {}
        for stack, (inner, parts) in stacks.items():
            if not any((layer, part) in halves for part in parts):
                continue
            a = torch.zeros(len(parts) * rank, inner, dtype=dtype, device=device)
            b = torch.zeros(sum(parts.values()), len(parts) * rank, dtype=dtype, device=device)
            blocks = zip(parts, torch.split(a, rank), torch.split(b, list(parts.values())), strict=True)
            for number, (part, a_part, b_rows) in enumerate(blocks):
                given = halves.get((layer, part), {})
                if given:
                    _check_shapes(
                        policy, f"layer {layer}, {part}_proj", given, a_part.shape, b_rows[:, :rank].shape
                    )
                    a_part.copy_(given["A"])
                    b_rows[:, number * rank : (number + 1) * rank] = given["B"] * (adapter.alpha / rank)
            changes[stack] = Change(a, b)
        out.append(changes)
    return out


def merged(policy: str, base: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """A state dict in which the adapter's changes are part of the weights. `base` stays as it is.

    Raises UserError for changes of what `base` does not have.
    """
    check_fits(policy, adapter, {name: tensor.shape for name, tensor in base.items()})
    out = dict(base)
    for name, b in adapter.tensors.items():
        if ".lora_B." in name:
            change = b.float() @ adapter.tensors[name.replace(".lora_B.", ".lora_A.")].float()
            place = _weight(name)
            change = (change * (adapter.alpha / adapter.rank)).to(out[place].device)
            out[place] = (out[place].float() + change).to(out[place].dtype)
    return out


def check_fits(policy: str, adapter: Adapter, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise UserError unless the adapter changes products of attention and MLP, and nothing else, of a model
    whose weights have these shapes by name."""
    for name in adapter.tensors:
        match = _NAME.fullmatch(name)
        if match is None or _weight(name) not in shapes:
            raise UserError(
                f"adapter of policy {policy!r}: the engine's model has no place for {name}; take an adapter "
                "of this model's products of attention and MLP alone, or merge it into its base"
            )
        rows, inner = shapes[_weight(name)]
        stem = name.removesuffix(f"{match[4]}.weight")
        given = {half: adapter.tensors.get(f"{stem}{half}.weight") for half in "AB"}
        there = {half: tensor for half, tensor in given.items() if tensor is not None}
        where = f"layer {match[1]}, {match[3]}_proj"
        _check_shapes(policy, where, there, (adapter.rank, inner), (rows, adapter.rank))


def _weight(name: str) -> str:
    """The weight that a tensor of an adapter changes, by Hugging Face's name."""
    return name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] + ".weight"


def _stacks(arch: Architecture) -> dict[str, tuple[int, dict[str, int]]]:
    """Stack -> (width of its input, rows per part); parts by Hugging Face's names without "_proj"."""
    q, kv = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    return {
        "qkv": (arch.hidden, {"q": q, "k": kv, "v": kv}),
        "out": (q, {"o": arch.hidden}),
        "gate_up": (arch.hidden, {"gate": arch.inner, "up": arch.inner}),
        "down": (arch.inner, {"down": arch.hidden}),
    }


def _by_place(policy: str, adapter: Adapter, arch: Architecture) -> dict[tuple[int, str], dict[str, Tensor]]:
    """(layer, part) -> {"A": ..., "B": ...}, for tensors that belong to the architecture."""
    known = {part for _, parts in _stacks(arch).values() for part in parts}
    found: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in adapter.tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or match[3] not in known or int(match[1]) >= arch.layers:
            raise UserError(
                f"adapter of policy {policy!r}: the engine's {arch.kind} model of {arch.layers} layers has "
                f"no place for {name}; take an adapter of this model's products of attention and MLP alone, "
                "or merge it into its base"
            )
        found.setdefault((int(match[1]), match[3]), {})[match[4]] = tensor
    return found


def _check_shapes(
    policy: str, where: str, given: Mapping[str, Tensor], a: Sequence[int], b: Sequence[int]
) -> None:
    for half, shape in (("A", tuple(a)), ("B", tuple(b))):
        if half not in given or tuple(given[half].shape) != shape:
            has = f"has shape {tuple(given[half].shape)}" if half in given else "is missing"
            raise UserError(
                f"adapter of policy {policy!r}: lora_{half} of {where} {has}, where the engine's "
                f"configuration says {shape}; it belongs to another base"
            )
