"""`ludus export`: one policy out of a run as a directory of its own, with a card that says what it is.

A whole model is copied. An adapter is copied too, in peft's format, or merged into its base. The directory
appears when all of it is there, and nothing that exists is overwritten.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ludus import measuring
from ludus.config import RunConfig
from ludus.errors import UserError
from ludus.model_files import (
    ADAPTER_FILE,
    BASE_FILE,
    base_path,
    digests,
    is_adapter,
    is_model,
    policies_in,
    read_json,
)
from ludus.records import changes, is_evaluation, read_metrics
from ludus.train import checkpoint
from ludus.train.rundir import CONFIG, METRICS, stored_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARD = "README.md"
_LIBRARIES = ("ludus", "torch", "transformers", "peft")


@dataclass(frozen=True, slots=True)
class Source:
    """One policy in a directory: its name where it is one of several, and the run and step that it is of."""

    directory: Path
    policy: str | None
    run: Path | None
    step: int | None


def export(word: Path, out: Path, *, merge: bool = False, policy: str | None = None) -> None:
    """Write the policy that `word` names (a run, a checkpoint, a model directory) to `out`.

    `policy` names one of several; `merge` merges an adapter into its base. Raises UserError, and leaves
    nothing behind, for what is missing, damaged, or in the way.
    """
    source = find(word, policy)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; name another --out, nothing is overwritten")
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        if is_adapter(source.directory) and merge:
            _merge(source, temporary)
        else:
            _copy(source, temporary)
        (temporary / CARD).write_text(card(source, merged=merge), encoding="utf-8")
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except OSError as e:
        raise UserError(
            f"cannot write to {out}: {e.strerror or e}; free space or choose another --out"
        ) from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def find(word: Path, policy: str | None) -> Source:
    """The policy that `word` and `policy` name. Raises UserError for none, for several, and for damage."""
    inner = word / "model"
    model, run = measuring.locate(inner if not (word / CONFIG).is_file() and inner.is_dir() else word)
    _refuse_damaged(model)
    several = policies_in(model)
    if several and policy is None:
        raise UserError(
            f"{model} holds several policies: {', '.join(several)}; name one: --policy {min(several)}"
        )
    if policy is not None and policy not in several:
        there = ", ".join(several) or "one that plays every role; leave --policy out"
        raise UserError(f"{model} holds no policy {policy!r}; it holds {there}")
    directory = several[policy] if policy is not None else model
    if policy is None and run is not None and directory.name in {p.name for p in stored_config(run).policies}:
        policy = directory.name
    return Source(directory, policy, run, _step(directory))


def _refuse_damaged(model: Path) -> None:
    """Raise UserError where a checkpoint or snapshot is not as it was written."""
    for sealed in (model, *model.resolve().parents[:2]):
        step = _number(sealed)
        if step is not None and (problem := checkpoint.verify(sealed, step)):
            raise UserError(f"{sealed} is damaged: {problem}; export another checkpoint")


def _step(directory: Path) -> int | None:
    found = [_number(path) for path in (directory.resolve(), *directory.resolve().parents[:2])]
    return next((step for step in found if step is not None), None)


def _number(sealed: Path) -> int | None:
    """The step of a checkpoint's or snapshot's directory, by its name."""
    digits = sealed.name.removeprefix("step_").removeprefix("past_")
    return int(digits) if digits != sealed.name and digits.isdigit() else None


def _copy(source: Source, to: Path) -> None:
    for path in source.directory.iterdir():
        if path.is_file() and path.name != checkpoint.MANIFEST:
            shutil.copyfile(path, to / path.name)
    if is_adapter(source.directory):
        _copy_tokenizer(base_path(source.directory), to)


def _copy_tokenizer(home: Path, to: Path) -> None:
    from ludus.learner.model import TOKENIZER_FILES

    for name in TOKENIZER_FILES:
        if (home / name).is_file():
            shutil.copyfile(home / name, to / name)


def _merge(source: Source, to: Path) -> None:
    import torch

    from ludus.learner.adapters import check_base, merged
    from ludus.learner.model import load_model, save_model

    home = base_path(source.directory)
    if not is_model(home):
        raise UserError(
            f"the base of {source.directory} is not at {home}; put it there, or name its place in "
            f"{source.directory / ADAPTER_FILE} (base_model_name_or_path)"
        )
    check_base(source.directory, home, "export")
    told = read_json(home / "config.json")
    model: PreTrainedModel = merged(load_model(home), source.directory)  # in float32
    stored = getattr(torch, str(told.get("dtype") or told.get("torch_dtype") or "float32"))
    model.to(stored)
    save_model(model, to, like=home)


# ------------------------------------------------------------------ the card


def card(source: Source, *, merged: bool) -> str:
    """README.md: YAML front matter for model hubs, then words, tables and versions."""
    from huggingface_hub import ModelCardData

    config = stored_config(source.run) if source.run is not None else None
    adapter = is_adapter(source.directory)
    start = config.model.path if config else str(base_path(source.directory)) if adapter else None
    front = ModelCardData(
        base_model=start,
        library_name="peft" if adapter and not merged else "transformers",
        pipeline_tag="text-generation",
        tags=["ludus", *(game.label for game in config.games)] if config else ["ludus"],
    ).to_yaml()
    parts = [f"---\n{front}\n---\n", f"# {_title(source, config)}\n", _what(source, config, start, merged)]
    if config is not None and source.run is not None:
        parts += [_games(source, config), _results(source, source.run), _training(source, config, source.run)]
    parts.append(_bytes(source))
    return "\n".join(part for part in parts if part)


def _title(source: Source, config: RunConfig | None) -> str:
    name = config.name if config is not None else source.directory.name
    return f"{name}, {source.policy}" if source.policy else name


def _what(source: Source, config: RunConfig | None, start: str | None, merged: bool) -> str:
    kind = "A language model"
    if is_adapter(source.directory):
        kind = "A LoRA adapter, merged into its base" if merged else "A LoRA adapter"
    when = f" after step {source.step} of {config.train.steps}" if config and source.step is not None else ""
    trained = f", trained by self-play with Ludus{when}" if config else ""
    origin = f". It was trained from `{start}`" if start else ""
    return f"{kind}{trained}{origin}.\n"


def _games(source: Source, config: RunConfig) -> str:
    lines = ["## Games\n", "| game | of the kind | options | share |", "|---|---|---|---|"]
    total = sum(game.weight for game in config.games)
    for game in config.games:
        options = ", ".join(f"{k} = {v}" for k, v in game.args.items()) or "-"
        lines.append(f"| {game.label} | {game.name} | {options} | {game.weight / total:.0%} |")
    roles = next((p.roles for p in config.policies if p.name == source.policy), ())
    text = config.text
    lines.append(
        f"\nIt plays {'the roles ' + ', '.join(roles) if roles else 'every role'}. Prompts: context "
        f"`{text.context}`, format `{text.format}`, {'with' if text.think else 'without'} private thoughts.\n"
    )
    return "\n".join(lines)


def _results(source: Source, run: Path) -> str:
    """The last evaluation up to the policy's step, beside the first one."""
    measured = [r for r in read_metrics(run / METRICS) if is_evaluation(r)]
    known = [r for r in measured if source.step is None or r["step"] <= source.step]
    if not known:
        return ""
    first, last = known[0], known[-1]
    rows = changes(first["eval"], last["eval"])
    lines = [
        "## Results\n",
        f"Measured by the run itself, with 95% intervals{_team(source)}.\n",
        f"| game | figure | after step {first['step']} | after step {last['step']} |",
        "|---|---|---|---|",
        *(f"| {row.game} | {row.figure} | {row.before} | {row.after} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _team(source: Source) -> str:
    return ", together with the other policies of its run" if source.policy else ""


def _training(source: Source, config: RunConfig, run: Path) -> str:
    loss, optim = config.loss, config.optim
    facts: dict[str, Any] = {
        "recipe": config.name,
        "configuration (SHA-256 of config.toml)": f"`{_sha256(run / CONFIG)}`",
        "seed": config.seed,
        "steps": f"{source.step if source.step is not None else '?'} of {config.train.steps}, "
        f"{config.rollout.matches} matches each",
        "credit": config.algo.estimator,
        "loss": f"PPO clip {loss.clip_low:g} / {loss.clip_high:g}, KL to the start {loss.reference_kl:g}, "
        f"KL to the magnet {loss.magnet_kl:g}, entropy {loss.entropy:g}",
        "optimizer": f"AdamW, rate {optim.lr:g}, {optim.schedule}",
    }
    if config.adapter is not None:
        a = config.adapter
        facts["adapter"] = f"rank {a.rank}, alpha {a.alpha}, of {', '.join(a.targets)}"
    facts["exported with"] = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in _LIBRARIES if _has(n))
    facts["Python"] = platform.python_version()
    return "## Training\n\n| | |\n|---|---|\n" + "".join(f"| {k} | {v} |\n" for k, v in facts.items())


def _has(library: str) -> bool:
    try:
        importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _bytes(source: Source) -> str:
    """What the weights came from, by their bytes."""
    lines = ["## Bytes\n", "| file | SHA-256 |", "|---|---|"]
    lines += [f"| exported from: {name} | `{digest}` |" for name, digest in digests(source.directory).items()]
    known: Mapping[str, Any] = {}
    if (source.directory / BASE_FILE).is_file():
        known = read_json(source.directory / BASE_FILE)["digests"]
    lines += [f"| base: {name} | `{digest}` |" for name, digest in known.items()]
    return "\n".join(lines) + "\n"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
