"""Weights in buckets: what comes out is what went in, in pieces of the size asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ludus.train.cluster.buckets import Bucket, pack, unpack

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@given(st.lists(st.tuples(st.sampled_from(DTYPES), shapes), max_size=12), st.integers(1, 2000))
@settings(max_examples=60, deadline=None)
def test_what_comes_out_is_what_went_in(kinds: list[tuple[torch.dtype, tuple[int, ...]]], size: int) -> None:
    torch.manual_seed(0)
    weights = {str(i): (torch.randn(shape) * 3).to(dtype) for i, (dtype, shape) in enumerate(kinds)}
    buckets = list(pack(weights, size))
    found = unpack(buckets)
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert found[name].dtype is tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)
    for bucket in buckets:
        assert bucket.data.nbytes <= size or len(bucket.layout.places) == 1


def test_tensors_that_are_tied_travel_once() -> None:
    embedding = torch.randn(100, 8)
    weights: dict[str, Tensor] = {"embed": embedding, "norm": torch.ones(8), "head": embedding.detach()}
    (bucket,) = pack(weights, 10_000)
    assert [place.names for place in bucket.layout.places] == [("embed", "head"), ("norm",)]
    assert bucket.data.nbytes == 100 * 8 * 4 + 8 * 4
    found = unpack([bucket])
    assert found["head"] is found["embed"]
    assert torch.equal(found["norm"], torch.ones(8))


def test_a_view_travels_as_it_looks() -> None:
    whole = torch.arange(12.0).view(3, 4)
    found = unpack(list(pack({"row": whole[1], "turned": whole.T}, 64)))
    assert torch.equal(found["row"], whole[1])
    assert torch.equal(found["turned"], whole.T)


@pytest.mark.filterwarnings("error")
def test_what_was_sent_is_read_where_it_lies_without_a_word() -> None:
    """As the object store hands it over: read-only."""
    (bucket,) = pack({"a": torch.ones(5)}, 100)
    bucket.data.setflags(write=False)
    tensor = unpack([Bucket(bucket.layout, bucket.data)])["a"]
    assert np.shares_memory(tensor.numpy(), bucket.data)
