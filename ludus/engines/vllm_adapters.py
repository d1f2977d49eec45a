"""Adapters as vLLM takes them: directories of peft's, and requests that name one (`LoRARequest`).

vLLM's workers read a directory when the first request that names it comes, keep those that they used last,
and read one again that they have let go. Every version of every adapter has a name, a number and a directory
of its own. vLLM's prefix cache goes by name and directory, so no keys and values are read by another one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ludus.engines.base import Adapter
from ludus.errors import UserError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can make room for
PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def room_for(rank: int) -> int:
    """The rank that vLLM has to be started with for adapters of up to `rank`; 0 where there is none."""
    return next((room for room in RANKS if room >= rank > 0), 0)


def nothing(shapes: Mapping[str, Sequence[int]]) -> Adapter:
    """One that changes nothing, for a model whose weights have these shapes by name.

    vLLM on the CPU (0.32) adds to the products of a request without an adapter what lies in its last place
    for one: it takes index -1, which means none, for the last. So there every request names an adapter.
    """
    place = next(name for name in shapes if name.endswith(".q_proj.weight"))
    rows, inner = shapes[place]
    stem = f"base_model.model.{place.removesuffix('.weight')}.lora_"
    tensors = {f"{stem}A.weight": torch.zeros(1, inner), f"{stem}B.weight": torch.zeros(rows, 1)}
    return Adapter("", 1, 1.0, tensors)


class WrittenAdapter:
    """One version of an adapter where vLLM's workers can read it, for as long as requests name it."""

    _numbers = count(1)

    def __init__(self, policy: str, adapter: Adapter, folder: Path, dtype: torch.dtype) -> None:
        """Write it to a directory of its own in `folder`, in the precision that vLLM computes in.

        Raises UserError where that fails.
        """
        number = next(self._numbers)
        self.directory = folder / str(number)
        config = {
            "peft_type": "LORA",
            "r": adapter.rank,
            "lora_alpha": adapter.alpha,
            "target_modules": sorted({name.split(".")[-3] for name in adapter.tensors}),
        }
        tensors = {name: t.detach().to("cpu", dtype).contiguous() for name, t in adapter.tensors.items()}
        try:
            self.directory.mkdir()
            (self.directory / "adapter_config.json").write_text(json.dumps(config))
            save_file(tensors, self.directory / "adapter_model.safetensors")
        except (OSError, SafetensorError) as e:
            self.remove()
            raise UserError(
                f"cannot write the adapter of policy {policy!r} for vLLM into {folder}: {e}; make room "
                "there, or set TMPDIR to a directory that has some"
            ) from e
        self._told = {"lora_name": f"{policy} ({number})", "lora_int_id": number}

    @property
    def request(self) -> Any:
        """What a request to vLLM bears to be answered by this adapter."""
        from vllm.lora.request import LoRARequest

        return LoRARequest(**self._told, lora_path=str(self.directory))

    def remove(self) -> None:
        """Forget it; vLLM's workers let go of it when they want its place."""
        shutil.rmtree(self.directory, ignore_errors=True)
