"""Weights on their way from the learner to rollout actors, in buckets of bounded size.

A bucket is a flat array of bytes. Ray's object store keeps it once per machine, however many actors there
read it, and a reader sees it without a copy; a broadcast (`broadcast.py`) fills each actor's own. Each tensor
lies whole in one bucket, so a bucket is as large as asked, or as one tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNED = 64  # bytes: no element of any dtype lies across such a border


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in its bucket. Tied tensors have one place and several names."""

    names: tuple[str, ...]
    dtype: str  # of torch, such as "bfloat16"
    shape: tuple[int, ...]
    start: int  # bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """What lies in one bucket, and where."""

    places: tuple[Place, ...]
    size: int  # bytes

    def room(self, device: torch.device) -> Tensor:
        """Bytes for such a bucket, in which nothing lies yet."""
        return torch.empty(self.size, dtype=torch.uint8, device=device)

    def fill(self, weights: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """The bytes of this part of `weights`."""
        data = self.room(device)
        for place in self.places:
            tensor = weights[place.names[0]].detach().to(device)
            data[place.start :][: tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8)
        return data

    def read(self, data: Tensor) -> dict[str, Tensor]:
        """The tensors that lie in `data`, as views into it."""
        found: dict[str, Tensor] = {}
        for place in self.places:
            dtype: torch.dtype = getattr(torch, place.dtype)
            tensor = torch.empty(place.shape, dtype=dtype, device=data.device)
            if tensor.numel():
                tensor = data[place.start :][: tensor.nbytes].view(dtype).view(place.shape)
            found |= dict.fromkeys(place.names, tensor)
        return found


@dataclass(frozen=True, slots=True)
class Bucket:
    """Some of the tensors, as the object store takes them."""

    layout: Layout
    data: NDArray[np.uint8]


def lay_out(weights: Mapping[str, Tensor], size: int) -> list[Layout]:
    """The tensors, in order, in buckets of at most `size` bytes, or of one tensor."""
    together: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in weights.items():
        together.setdefault((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()), []).append(name)
    layouts: list[Layout] = []
    places: list[Place] = []
    end = 0
    for names in together.values():
        tensor = weights[names[0]]
        start = -(-end // _ALIGNED) * _ALIGNED
        if places and start + tensor.nbytes > size:
            layouts.append(Layout(tuple(places), end))
            places, start = [], 0
        dtype = str(tensor.dtype).removeprefix("torch.")
        places.append(Place(tuple(names), dtype, tuple(tensor.shape), start))
        end = start + tensor.nbytes
    if places:
        layouts.append(Layout(tuple(places), end))
    return layouts


def pack(weights: Mapping[str, Tensor], size: int) -> Iterator[Bucket]:
    """The tensors in buckets, see `lay_out`. One bucket at a time."""
    for layout in lay_out(weights, size):
        yield Bucket(layout, layout.fill(weights, torch.device("cpu")).numpy())


def unpack(buckets: Sequence[Bucket]) -> dict[str, Tensor]:
    """The tensors, as views into the buckets: they must not be written to."""
    weights: dict[str, Tensor] = {}
    for bucket in buckets:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            whole = torch.from_numpy(bucket.data)
        weights |= bucket.layout.read(whole)
    return weights
