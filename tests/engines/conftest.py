"""The model that most of these tests run."""

from __future__ import annotations

import pytest
from families import make_model
from transformers import PreTrainedModel


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    return make_model()
