"""Which device the weights live on."""

from __future__ import annotations

import torch

from ludus.errors import UserError


def resolve_device(name: str = "auto") -> torch.device:
    """The device called `name`; `auto` takes CUDA, else MPS, else the CPU. Raises UserError if absent."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, here in present.items() if here))
    if not present.get(name.partition(":")[0], False):
        here = ", ".join(kind for kind, yes in present.items() if yes)
        raise UserError(f"device {name!r} is not available here; set model.device to one of: auto, {here}")
    return torch.device(name)
