"""Weights on their way from the learner to rollout actors, in buckets of bounded size.

A bucket is a flat array of bytes that Ray's object store keeps once per machine, however many actors there
read it, and that a reader sees without a copy. Each tensor lies whole in one bucket, so a bucket is as large
as asked, or as one tensor. Where sender and receivers have GPUs of their own, a broadcast by NCCL could carry
the same buckets; that is not built.
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
class Bucket:
    """Some of the tensors."""

    places: tuple[Place, ...]
    data: NDArray[np.uint8]


def pack(weights: Mapping[str, Tensor], size: int) -> Iterator[Bucket]:
    """The tensors, in order, in buckets of at most `size` bytes, or of one tensor. One bucket at a time."""
    together: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in weights.items():
        together.setdefault((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()), []).append(name)
    places: list[Place] = []
    held: list[Tensor] = []
    end = 0
    for names in together.values():
        tensor = weights[names[0]]
        start = -(-end // _ALIGNED) * _ALIGNED
        if held and start + tensor.nbytes > size:
            yield _bucket(places, held, end)
            places, held, start = [], [], 0
        places.append(
            Place(tuple(names), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), start)
        )
        held.append(tensor)
        end = start + tensor.nbytes
    if held:
        yield _bucket(places, held, end)


def _bucket(places: Sequence[Place], tensors: Sequence[Tensor], size: int) -> Bucket:
    data = np.empty(size, dtype=np.uint8)
    for place, tensor in zip(places, tensors, strict=True):
        flat = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
        data[place.start : place.start + tensor.nbytes] = flat.numpy()
    return Bucket(tuple(places), data)


def unpack(buckets: Sequence[Bucket]) -> dict[str, Tensor]:
    """The tensors, as views into the buckets: they must not be written to."""
    weights: dict[str, Tensor] = {}
    for bucket in buckets:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            whole = torch.from_numpy(bucket.data)
        for place in bucket.places:
            dtype: torch.dtype = getattr(torch, place.dtype)
            tensor = torch.empty(place.shape, dtype=dtype)
            if tensor.numel():
                tensor = whole[place.start :][: tensor.nbytes].view(dtype).view(place.shape)
            weights |= dict.fromkeys(place.names, tensor)
    return weights
