"""Two and four ranks learn what one process learns: real gloo processes on the CPU, a very small model."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import sharding_work
import torch
from once import once
from safetensors.torch import load_file
from torch import Tensor

RANKS = 4
# Sums are taken in another order, so results differ by rounding. Weights are of the order of 1 (float32 tells
# 6e-8 apart there) and move by 1e-2 in ten updates.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what the processes made."""
    return once(tmp_path_factory, "sharding", _run)


def _run(folder: Path) -> None:
    folder.mkdir()
    # The server imports torch once; the ranks are forked from it, so that they start at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ludus.learner.sharding", "transformers.models.qwen3.modeling_qwen3"])
    ranks = [context.Process(target=sharding_work.work, args=(folder, r, RANKS)) for r in range(RANKS)]
    for rank in ranks:
        rank.start()
    while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
        time.sleep(0.05)
    if any(rank.exitcode for rank in ranks):
        for rank in ranks:
            rank.kill()
    for rank in ranks:
        rank.join()
    told = "\n".join(path.read_text() for path in sorted(folder.glob("rank-*.txt")))
    assert [rank.exitcode for rank in ranks] == [0] * RANKS, told


def made(results: Path, job: str, size: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    name = f"{job}-{size}"
    return load_file(results / f"{name}.safetensors"), json.loads((results / f"{name}.json").read_text())


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference between two sets of tensors, which must bear the same names."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def assert_measured_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    for before, after in zip(one["measured"], other["measured"], strict=True):
        assert after == pytest.approx(before, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("size", [2, 4])
def test_ten_updates_of_several_ranks_equal_those_of_one_process(results: Path, size: int) -> None:
    """Weights, moments, magnet, reference, average and what is handed to an engine; and what was measured."""
    tensors, values = made(results, "ten", 1)
    theirs, measured = made(results, "ten", size)
    assert distance(tensors, theirs) <= TOLERANCE
    assert_measured_alike(values, measured)
    assert measured["optimizer_steps"] == values["optimizer_steps"]
    start = dict(sharding_work.make_model().named_parameters())
    moved = max(float((tensors[f"model.{name}"] - p).detach().abs().max()) for name, p in start.items())
    assert moved > 1e-3  # else equality would say nothing


@pytest.mark.parametrize(("job", "size"), [("rest_of_two", 1), ("rest_of_two", 4), ("rest_of_one", 4)])
def test_a_state_resumes_on_another_number_of_ranks(results: Path, job: str, size: int) -> None:
    tensors, values = made(results, "ten", 1)
    theirs, measured = made(results, job, size)
    assert distance(tensors, theirs) <= TOLERANCE
    assert_measured_alike({"measured": values["measured"][sharding_work.HALF :]}, measured)


@pytest.mark.parametrize(
    ("job", "size"),
    [
        *(("blocked", 2), ("packed", 2), ("recomputing", 2)),
        *(("untied", 4), ("supervised", 4), ("mixed", 4), ("adapter", 4)),
    ],
)
def test_other_ways_to_train_are_the_same_too(results: Path, job: str, size: int) -> None:
    tensors, values = made(results, job, 1)
    theirs, measured = made(results, job, size)
    assert distance(tensors, theirs) <= TOLERANCE
    assert_measured_alike(values, measured)


def test_a_bfloat16_model_keeps_its_weights_in_float32(results: Path) -> None:
    """One process rounds the results of products, ranks round the weights that they gather as well."""
    tensors, values = made(results, "half_precision", 1)
    theirs, measured = made(results, "half_precision", 2)
    assert {t.dtype for name, t in theirs.items() if name.startswith("model.")} == {torch.float32}
    assert {t.dtype for name, t in theirs.items() if name.startswith("reference.")} == {torch.bfloat16}
    for name in ("loss", "grad_norm", "entropy", "importance"):
        assert measured["measured"][0][name] == pytest.approx(values["measured"][0][name], rel=0.05, abs=0.02)
    assert (
        distance(tensors, theirs) <= 4 * sharding_work.OPTIM.lr
    )  # two steps of AdamW, whichever way they go


def test_gradients_are_added_up_once_per_optimizer_step(results: Path) -> None:
    """Once for each of the two layers and once for the rest, however many micro-batches there are."""
    assert made(results, "syncs", 2)[1]["reductions"] == [3, 3]


def test_all_ranks_refuse_a_loss_that_is_not_finite(results: Path) -> None:
    tensors, values = made(results, "nonfinite", 2)
    assert "this optimizer step was not taken" in values["refused"]
    start = sharding_work.make_model().state_dict()
    assert all(torch.equal(tensors[f"shipped.{name}"], tensor) for name, tensor in start.items())
