"""Weights that lie in memory for other processes to read."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ludus.engines.shared_weights import SharedWeights, lay_out, read

SHAPES = {"a": (3, 5), "b": (7,), "head": (2, 2, 2)}


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.dictionaries(
        st.text("abc.", min_size=1, max_size=4),
        st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
        min_size=1,
        max_size=6,
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_what_is_written_is_read(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype):
    shared = SharedWeights(shapes, dtype)
    for _ in range(2):
        weights = {name: torch.randn(shape) for name, shape in shapes.items()}
        shared.write({**weights, "lm_head.weight": torch.zeros(1)})
        found = read(shared.path, shared.places, dtype)
        assert found.keys() == weights.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, weights[name].to(dtype))
    shared.close()


def test_places_lie_apart_and_on_even_addresses():
    places, size = lay_out(SHAPES, torch.bfloat16)
    assert [(p.name, p.shape, p.offset) for p in places] == [
        ("a", (3, 5), 0),  # 30 bytes
        ("b", (7,), 64),  # 14 bytes
        ("head", (2, 2, 2), 128),  # 16 bytes
    ]
    assert size == 192


def test_another_process_reads_and_cannot_write():
    shared = SharedWeights(SHAPES, torch.float32)
    weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    shared.write(weights)
    code = """
import json, sys, torch
from ludus.engines.shared_weights import Place, read
path, places = json.loads(sys.argv[1])
found = read(path, [Place(*place) for place in places], torch.float32)
print(json.dumps({name: tensor.tolist() for name, tensor in found.items()}))
found["a"].zero_()
"""
    what = json.dumps([shared.path, [(p.name, p.shape, p.offset) for p in shared.places]])
    done = subprocess.run([sys.executable, "-c", code, what], capture_output=True, text=True, check=True)
    for name, values in json.loads(done.stdout).items():
        assert torch.equal(torch.tensor(values), weights[name])
    assert torch.equal(read(shared.path, shared.places, torch.float32)["a"], weights["a"])
    path = shared.path
    shared.close()
    shared.close()  # twice does no harm
    with pytest.raises(OSError):
        read(path, shared.places, torch.float32)


def test_memory_is_given_back():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        shared = SharedWeights(SHAPES, torch.float32)
        shared.write({name: torch.zeros(shape) for name, shape in SHAPES.items()})
        shared.close()
    assert len(os.listdir("/proc/self/fd")) == before
