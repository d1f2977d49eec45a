"""The runner of sweeps: a real one, interrupted and taken up again; and what it refuses before it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import sweep
import tomli_w

from ludus.errors import UserError
from ludus.records import is_evaluation, read_metrics
from ludus.train import checkpoint

RUNNER = Path(sweep.__file__)

RECIPE = {
    "name": "tiny",
    "threads": 1,
    "games": [{"name": "kuhn_poker"}],
    "text": {"rules": False},
    "engine": {"slots": 16, "context": 256},
    "rollout": {"matches": 8, "max_tokens": 24},
    "optim": {"lr": 1e-3},
    "train": {"steps": 2, "checkpoint_every": 1},
    "eval": {"matches": 2, "final_matches": 2, "thoughts": 2},
}
SWEEP = {
    "seeds": [0, 1],
    "overrides": ["rollout.matches=6"],
    "variants": [
        {"name": "plain"},
        {"name": "league", "overrides": ['league.opponents=[{policy="past/0",weight=0.3}]']},
        {"name": "broken", "overrides": ['model.path="no such model"']},
    ],
    "figures": [
        {"path": "eval.games.kuhn_poker.exploitability.exploitability", "title": "exploitability"},
        {"path": "learn.grad_norm", "window": 2},
        {"path": "thoughts.kuhn_poker"},
    ],
}


def written(folder: Path, model: Path | str, **changes: object) -> Path:
    """A sweep file beside its recipe."""
    recipe = folder / "tiny.toml"
    recipe.write_text(tomli_w.dumps({**RECIPE, "model": {"path": str(model)}}))
    file = folder / "sweep.toml"
    file.write_text(tomli_w.dumps({"recipe": str(recipe), **SWEEP, **changes}))
    return file


def run(file: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(file, out, *options), capture_output=True, text=True)


def command(file: Path, out: Path, *options: str) -> list[str]:
    return [sys.executable, str(RUNNER), str(file), "--out", str(out), "--cores", "1", *options]


def two() -> str:
    """Two runs at once, where there are two cores."""
    return str(min(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1))


def test_a_sweep_survives_an_interrupt_and_a_variant_that_fails(tiny_model: Path, tmp_path: Path) -> None:
    file, out = written(tmp_path, tiny_model), tmp_path / "out"
    first = out / "plain" / "seed_0"

    process = subprocess.Popen(command(file, out, "--jobs", "1"), stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (first / "config.toml").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    said, _ = process.communicate()
    assert process.returncode == 130
    assert said.splitlines() == ["6 runs, 0 of them finished", "started: plain, seed 0"]
    assert not checkpoint.steps(first) or checkpoint.steps(first)[-1][0] < 2

    done = run(file, out, "--jobs", two())
    assert done.returncode == 1, done.stderr
    assert "resumed: plain, seed 0" in done.stdout
    for name, seed in (("plain", 1), ("league", 0), ("league", 1)):
        assert f"started: {name}, seed {seed}" in done.stdout
    assert "FAILED: broken, seed 0, status 2" in done.stdout
    assert "no such model" in done.stdout  # the end of its log
    assert done.stderr.strip() == "failed: broken, seed 0, broken, seed 1"
    assert not (out / "broken" / "seed_0").exists()

    found = json.loads((out / "summary.json").read_text())
    assert list(found["variants"]) == ["plain", "league"]
    last = read_metrics(out / "league" / "seed_1" / "metrics.jsonl")[-1]
    assert is_evaluation(last)
    measured = last["eval"]["games"]["kuhn_poker"]["exploitability"]["exploitability"]
    league = found["variants"]["league"]["runs"]["1"]
    assert league["figures"]["eval.games.kuhn_poker.exploitability.exploitability"]["last"] == measured
    assert (league["finished"], league["steps"], league["matches"]) == (True, 2, 12)
    assert 3 < league["figures"]["thoughts.kuhn_poker"]["last"] < 24
    assert "| league | " in (out / "summary.md").read_text()
    ElementTree.parse(out / "figure.svg")

    # A second time there is nothing to do, and the same data give the same bytes.
    before = {name: (out / name).read_bytes() for name in ("summary.json", "summary.md", "figure.svg")}
    again = run(file, out, "--only", "plain", "league")
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("4 runs, 4 of them finished\nsummary: ")
    assert {name: (out / name).read_bytes() for name in before} == before

    # A figure that nothing records is a typing mistake.
    mistyped = written(tmp_path, tiny_model, figures=[{"path": "learn.grad_nrm"}])
    noted = run(mistyped, out, "--report")
    assert noted.returncode == 0
    assert noted.stderr.strip() == "no run has recorded 'learn.grad_nrm' so far; is that the figure's path?"

    # Runs of another configuration are not mixed in: ludus says what differs.
    changed = run(written(tmp_path, tiny_model, overrides=["rollout.matches=8"]), out)
    assert changed.returncode == 2
    assert "rollout.matches (was 6, now 8)" in changed.stderr
    assert changed.stdout == ""


# --- what is refused before anything starts ---


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"varients": []}, [], "varients: Extra inputs"),
        ({"variants": []}, [], "variants: Tuple should have at least 1 item"),
        ({"variants": [{"name": "a"}, {"name": "a"}]}, [], r"sweep\.toml: variants: a is there twice"),
        ({"variants": [{"name": "../a"}]}, [], "variants.0.name: String should match"),
        ({"seeds": [1, 1]}, [], "seeds: 1 is there twice"),
        ({"overrides": ["optim.rl=1"]}, [], "variant 'plain': .*unknown key 'optim.rl'; did you mean"),
        ({"recipe": "absent.toml"}, [], "cannot read recipe absent.toml"),
        ({"figures": [{"path": "games.chess.turns"}]}, [], "no variant plays 'chess'; played: kuhn_poker"),
        ({}, ["--only", "magnet"], "the sweep has no variant magnet; it has plain, league, broken"),
        ({}, ["--seeds", "7"], "the sweep has no seed 7; it has 0, 1"),
        ({}, ["--jobs", "9999"], "cores, not 9999 times 1"),
        ({"overrides": ["threads=3"]}, [], "asks for 3 threads and --cores gives a run 1"),
        ({}, ["--report"], "has recorded anything yet"),
    ],
)
def test_bad_input_is_told_before_anything_starts(
    changes: dict[str, object],
    options: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, out = written(tmp_path, "no such model", **changes), tmp_path / "out"
    assert sweep.main([str(file), "--out", str(out), "--cores", "1", *options]) == 2
    assert_matches(words, capsys.readouterr().err)
    assert not out.exists()


def assert_matches(words: str, text: str) -> None:
    with pytest.raises(UserError, match=words):
        raise UserError(text)


def test_a_sweep_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*absent\.toml: No such file"):
        sweep.load(tmp_path / "absent.toml")


def test_opponents_can_be_overridden_as_a_list_of_tables(tmp_path: Path) -> None:
    file = written(tmp_path, "model")
    jobs = sweep.plan(sweep.load(file), tmp_path / "out")
    (opponent,) = jobs["league", 1].config.league.opponents
    assert (opponent.policy, opponent.weight) == ("past/0", 0.3)
    assert jobs["league", 1].config.seed == 1
    assert jobs["league", 1].config.rollout.matches == 6
    assert jobs["plain", 0].config.league.opponents == ()


def test_an_override_may_name_the_seed(tmp_path: Path) -> None:
    victim = 'league.opponents=[{policy="victim", model="runs/seed_{seed}/model"}]'
    jobs = sweep.plan(sweep.load(written(tmp_path, "m", overrides=[victim])), tmp_path)
    assert [jobs["plain", k].config.league.opponents[0].model for k in (0, 1)] == [
        "runs/seed_0/model",
        "runs/seed_1/model",
    ]
    assert jobs["plain", 1].config.seed == 1


def test_the_first_seed_of_all_variants_comes_first(tmp_path: Path) -> None:
    jobs = sweep.plan(sweep.load(written(tmp_path, "model")), tmp_path / "out")
    assert list(jobs)[:4] == [("plain", 0), ("league", 0), ("broken", 0), ("plain", 1)]


def test_runs_have_cores_of_their_own(tmp_path: Path) -> None:
    slots = sweep.cores([], None, 1)
    assert len(slots) == len({core for slot in slots for core in slot})
    if hasattr(os, "sched_getaffinity"):
        assert {core for slot in slots for core in slot} == os.sched_getaffinity(0)


@pytest.mark.parametrize("file", sorted(RUNNER.parent.glob("*.toml")), ids=lambda file: file.stem)
def test_the_sweeps_that_come_along_are_whole(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(RUNNER.parents[1])
    given = sweep.load(file)
    jobs = sweep.plan(given, tmp_path)
    assert len(jobs) == len(given.variants) * len(given.seeds)
    assert all(job.config.threads <= 2 for job in jobs.values())
