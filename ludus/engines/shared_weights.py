"""Weights in memory that processes of one machine share: the learner's process writes, the workers' read.

The memory has no name in any directory, so nothing is left behind, however the processes end.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor lies: its shape, and its first byte."""

    name: str
    shape: tuple[int, ...]
    offset: int


def lay_out(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> tuple[list[Place], int]:
    """A place for every tensor, and the bytes that all of them take."""
    places, end = [], 0
    for name, shape in shapes.items():
        places.append(Place(name, tuple(shape), end))
        end += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    return places, end


class SharedWeights:
    """Room for one set of weights, all of one type. Linux only."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> None:
        self.places, size = lay_out(shapes, dtype)
        self._file = os.memfd_create("ludus-weights")
        os.ftruncate(self._file, size)
        self._tensors = _views(mmap.mmap(self._file, size), self.places, dtype)

    @property
    def path(self) -> str:
        """What other processes of the same user open, for as long as this one lives and has not closed it."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What lies there now, by name: views."""
        return self._tensors

    def write(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the tensors in, from whatever type and device they have; further names are not read."""
        for name, room in self._tensors.items():
            room.copy_(weights[name].detach())

    def close(self) -> None:
        """Give the memory back, once nobody reads it any more."""
        if self._tensors:
            self._tensors = {}
            os.close(self._file)


def read(path: str, places: Sequence[Place], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that lie at `path`: views that see what is written there until they are written to."""
    with open(path, "rb") as file:
        return _views(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), places, dtype)


def _views(memory: mmap.mmap, places: Sequence[Place], dtype: torch.dtype) -> dict[str, Tensor]:
    whole = torch.frombuffer(memory, dtype=torch.uint8)

    def view(place: Place) -> Tensor:
        end = place.offset + math.prod(place.shape) * dtype.itemsize
        return whole[place.offset : end].view(dtype).view(place.shape)

    return {place.name: view(place) for place in places}
