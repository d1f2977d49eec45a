"""What the tests of the learner share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from learner_models import make_model, make_rows
from transformers import PreTrainedModel

from ludus.types import Sample


@pytest.fixture
def build_model() -> Callable[..., PreTrainedModel]:
    return make_model


@pytest.fixture
def build_rows() -> Callable[..., list[Sample]]:
    return make_rows


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
