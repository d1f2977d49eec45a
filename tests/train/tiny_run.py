"""Runs of a very small model, as the tests of this room make and read them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from ludus import config as configuration
from ludus.config import RunConfig
from ludus.records import episode_files, read_episodes, read_metrics
from ludus.train import checkpoint
from ludus.types import Episode

ROOT = Path(__file__).parents[2]


def recipe(directory: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Four steps of eight matches; sections given are merged over these."""
    data: dict[str, Any] = {
        "name": "tiny",
        "seed": 3,
        "threads": 1,
        "games": [{"name": "kuhn_poker"}, {"name": "tic_tac_toe"}],
        "model": {"path": str(directory)},
        "text": {"rules": False},
        "engine": {"slots": 16, "context": 256},
        "rollout": {"matches": 8, "in_flight": 8, "max_tokens": 24, "retries": 1},
        "optim": {"lr": 1e-2, "warmup_steps": 2, "schedule": "linear"},
        "train": {"steps": 4, "checkpoint_every": 2},
        "eval": {"matches": 2, "final_matches": 2, "exploitability": False},
    }
    for name, section in sections.items():
        data[name] = {**data[name], **section} if isinstance(data.get(name), dict) else section
    return data


def config(directory: Path, **sections: Any) -> RunConfig:
    return configuration.validate(recipe(directory, **sections), where="test")


def episodes(run: Path) -> list[Episode]:
    return [episode for _, path in episode_files(run) for episode in read_episodes(path)]


def trained(run: Path) -> list[dict[str, Any]]:
    """The training records."""
    return [record for record in read_metrics(run / "metrics.jsonl") if "learn" in record]


def newest(run: Path) -> Path:
    return checkpoint.steps(run)[-1][1]


def dealt_kills(recipe: RunConfig, model: Path, folder: Path, *, kills: int, seed: int) -> str:
    """The last line that benchmarks/kills.py prints over `recipe`, for a handful of kills."""
    (folder / "tiny.toml").write_text(configuration.dump(recipe))
    script = [sys.executable, str(ROOT / "benchmarks" / "kills.py")]
    options = ["--kills", str(kills), "--seed", str(seed), "--recipe", str(folder / "tiny.toml")]
    done = subprocess.run(
        [*script, *options, "--model", str(model)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]
