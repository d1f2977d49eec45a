"""Four updates equal two, a saved state, and two more, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ludus.config import LossConfig, OptimConfig
from ludus.errors import UserError
from ludus.learner.learner import Learner
from ludus.types import Sample

BuildModel = Callable[..., PreTrainedModel]
BuildRows = Callable[..., list[Sample]]

LOSS = LossConfig(magnet_kl=0.2, magnet_every=3, reference_kl=0.1, entropy=0.01)
OPTIM = OptimConfig(
    lr=1e-2, schedule="cosine", warmup_steps=2, epochs=2, minibatches=2, microbatch_tokens=40, average=0.9
)


def learner(
    model: PreTrainedModel, loss: LossConfig = LOSS, optim: OptimConfig = OPTIM, seed: int = 3
) -> Learner:
    return Learner(model, loss, optim, max_tokens=8, total_steps=6, seed=seed)


def through_files(made: Learner, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors, values = made.state()
    save_file(tensors, path / "learner.safetensors")
    (path / "learner.json").write_text(json.dumps(values))
    return load_file(path / "learner.safetensors"), json.loads((path / "learner.json").read_text())


@pytest.mark.parametrize("stop_after", [0, 1, 2, 3])
@pytest.mark.parametrize(("tied", "batching"), [(True, "sorted"), (False, "sorted"), (True, "packed")])
def test_resume_is_exact(
    build_model: BuildModel, build_rows: BuildRows, tmp_path: Path, stop_after: int, tied: bool, batching: str
) -> None:
    optim = OPTIM.model_copy(update={"batching": batching})
    batches = [build_rows(6, seed=s) for s in range(4)]
    whole = learner(build_model(tie_word_embeddings=tied), optim=optim)
    metrics = [whole.update(b) for b in batches]

    first = learner(build_model(tie_word_embeddings=tied), optim=optim)
    for b in batches[:stop_after]:
        first.update(b)
    tensors, values = through_files(first, tmp_path)
    second = learner(
        build_model(seed=99, tie_word_embeddings=tied), optim=optim
    )  # every weight must come from the state
    second.load_state(tensors, values)
    assert [second.update(b) for b in batches[stop_after:]] == metrics[stop_after:]

    want, got = whole.state(), second.state()
    assert got[1] == want[1]
    assert got[0].keys() == want[0].keys()
    assert all(torch.equal(got[0][n], want[0][n]) for n in want[0])
    averages = second.average_weights()
    assert all(torch.equal(t, averages[n]) for n, t in whole.average_weights().items())


def test_the_state_is_a_copy(build_model: BuildModel, build_rows: BuildRows) -> None:
    made = learner(build_model())
    made.update(build_rows(4))
    tensors, values = made.state()
    kept = {n: t.clone() for n, t in tensors.items()}
    made.update(build_rows(4))
    assert all(torch.equal(tensors[n], kept[n]) for n in kept)
    assert values["steps"] == 1


def test_a_state_that_does_not_fit_changes_nothing(build_model: BuildModel, build_rows: BuildRows) -> None:
    source = learner(build_model())
    source.update(build_rows(4))
    tensors, values = source.state()
    plain = learner(build_model(), loss=LossConfig())
    with pytest.raises(UserError, match=r"does not fit this one: .* such as magnet"):
        plain.load_state(tensors, values)
    wide = learner(build_model(intermediate_size=32))
    before = wide.state()
    with pytest.raises(UserError, match="does not fit"):
        wide.load_state(tensors, values)
    after = wide.state()
    assert after[1] == before[1]
    assert all(torch.equal(after[0][n], t) for n, t in before[0].items())


def test_the_seed_decides_the_split(build_model: BuildModel, build_rows: BuildRows) -> None:
    ends = []
    for seed in (3, 3, 4):
        made = learner(build_model(), seed=seed)
        made.update(build_rows(8))
        ends.append(made.state()[0]["model.model.norm.weight"])
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_nothing_is_drawn_from_the_global_generator(build_model: BuildModel, build_rows: BuildRows) -> None:
    made = learner(build_model())
    before = torch.get_rng_state()
    made.update(build_rows(4))
    assert torch.equal(torch.get_rng_state(), before)
