"""What the tests of several rooms share: one very small model, made once per test session."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from once import once

# A busy machine fails nothing: neither an example that takes long, nor that examples are slow to be made.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: 32 thousand parameters that obey the format in Kuhn poker and tic-tac-toe.

    In Kuhn poker its replies are legal; in tic-tac-toe about a fifth of them are not. Test processes that run
    side by side share it. Treat it as read-only.
    """
    return once(tmp_path_factory, "tiny-model", _make)


def _make(directory: Path) -> None:
    import torch

    from ludus.small.make import Course, SmallSpec, make

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    courses = (Course("kuhn_poker", 800), Course("tic_tac_toe", 400))
    spec = SmallSpec(
        courses, hidden=32, layers=2, heads=2, kv_heads=1, ffn=64, init=0.07, context=1024, batch=4, lr=6e-3
    )
    make(directory, spec, tell=lambda _: None)
    torch.set_num_threads(threads)
