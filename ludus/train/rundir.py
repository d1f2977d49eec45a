"""The run directory: who may write it, and how each file gets there whole.

    runs/NAME/ config.toml  metrics.jsonl  report.html  log.txt  lock
               episodes/*.jsonl.zst  checkpoints/step_N/  league/past_N/

Every file is either replaced by a rename or appended to and fsynced line by line, so that a kill leaves
at worst a torn last line, which a resume cuts off. What the files hold is told in `ludus.records`.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from ludus import config as configuration
from ludus.config import RunConfig, TuneConfig
from ludus.errors import UserError
from ludus.records import (
    Record,
    encode_episodes,
    encode_record,
    episode_files,
    episode_name,
    read_metrics,
    scan_metrics,
)
from ludus.train import checkpoint

CONFIG = "config.toml"
TUNE = "sft.toml"  # the same of `ludus sft`
METRICS = "metrics.jsonl"
LOG = "log.txt"
LOCK = "lock"

# What may differ between a run and its resume; anything else would change what was already computed. The keys
# of memory change the rounding of what is yet to come, and a run whose memory ran out must be able to go on.
CHANGEABLE = (
    *("optim.microbatch_tokens", "model.gradient_checkpointing", "rollout.in_flight"),
    *("engine.slots", "engine.graphs"),
    *("train.steps", "train.checkpoint_every", "train.keep", "train.patience", "eval.", "alarms."),
    "cluster.",
    *("checkpoint_every", "keep"),  # of `ludus sft`
)

_TEMPORARY = ".tmp-"

Settings = RunConfig | TuneConfig


class RunDir:
    """One run's directory, held by one writer at a time. Use `create` or `open`; close it, or use `with`."""

    def __init__(self, path: Path, config: Settings, lock: BinaryIO) -> None:
        self.path = path
        self.config = config
        self._lock = lock
        self._metrics = (path / METRICS).open("ab")

    @classmethod
    def create(cls, path: Path, config: Settings) -> RunDir:
        """Start a new run. Raises UserError where `path` holds anything already, or cannot be made."""
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"cannot make run directory {path}: {e.strerror}; choose another --out") from e
        _refuse_occupied(path)
        lock = _take_lock(path)
        try:
            _refuse_occupied(path)  # once more: another writer may have come first
            replace(path / _file(config), configuration.dump(config).encode())
            return cls(path, config, lock)
        except BaseException:
            lock.close()
            raise

    @classmethod
    def open(cls, path: Path, config: Settings | None = None) -> RunDir:
        """Take up an existing run; clears away what a killed writer left half done.

        `config` is what the user asks for now: UserError where it differs from the stored one in a key
        that cannot change any more (see CHANGEABLE), else it becomes the stored one. None: as stored.
        """
        stored = stored_tune(path) if isinstance(config, TuneConfig) else stored_config(path)
        if config is not None:
            refuse_changes(stored, config, str(path))
        lock = _take_lock(path)
        try:
            if config is not None and config != stored:
                replace(path / _file(config), configuration.dump(config).encode())
            for folder in (path / "checkpoints", path / "league"):
                checkpoint.sweep(folder)
            for folder in (path, path / "episodes"):
                for leftover in folder.glob(f"{_TEMPORARY}*"):
                    leftover.unlink()
            return cls(path, config or stored, lock)
        except BaseException:
            lock.close()
            raise

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record to metrics.jsonl; it is on the disk when this returns."""
        try:
            self._metrics.write(encode_record(record))
            self._metrics.flush()
            os.fsync(self._metrics.fileno())
        except OSError as e:
            raise UserError(
                f"cannot write {self.path / METRICS}: {e.strerror}; free space or mend the cause, then go on "
                "with --resume"
            ) from e

    def records(self) -> list[Record]:
        """All records of metrics.jsonl."""
        return read_metrics(self.path / METRICS)

    def write_episodes(self, step: int, episodes: Sequence[Any]) -> Path:
        """Write a step's episodes as one file, whole or not at all; replaces the same step's file."""
        folder = self.path / "episodes"
        folder.mkdir(exist_ok=True)
        target = folder / episode_name(step)
        replace(target, encode_episodes(episodes))
        return target

    def rewind(self, step: int) -> None:
        """Forget what lies beyond `step` (the checkpoint's): metrics, a torn last line, episodes."""
        self.truncate_after(step)
        self.drop_after(step)

    def truncate_after(self, step: int) -> None:
        """Cut metrics.jsonl before the first record beyond `step`, and before a torn last line."""
        file = self.path / METRICS
        end = 0
        for record, offset in scan_metrics(file.read_bytes(), str(file)):
            if record["step"] > step:
                break
            end = offset
        self._metrics.truncate(end)
        os.fsync(self._metrics.fileno())

    def drop_after(self, step: int) -> None:
        """Remove the episode files beyond `step`."""
        for number, path in episode_files(self.path):
            if number > step:
                path.unlink()

    def log(self, message: str) -> None:
        """Add one line to log.txt, with the time (UTC)."""
        stamp = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
        with (self.path / LOG).open("a", encoding="utf-8") as file:
            file.write(f"{stamp} {' '.join(message.split())}\n")

    def close(self) -> None:
        """Give the directory back."""
        self._metrics.close()
        self._lock.close()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Onlooker(RunDir):
    """A run's directory for the ranks beside the one that writes: nothing that they write goes anywhere."""

    def __init__(self, path: Path, config: Settings) -> None:
        self.path = path
        self.config = config

    def append(self, record: Mapping[str, Any]) -> None:
        """Nothing."""

    def write_episodes(self, step: int, episodes: Sequence[Any]) -> Path:
        """Nothing; where the file lies."""
        return self.path / "episodes" / episode_name(step)

    def rewind(self, step: int) -> None:
        """Nothing."""

    def log(self, message: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def stored_config(path: Path) -> RunConfig:
    """The configuration of an existing run. Raises UserError where there is no run."""
    file = path / CONFIG
    if not file.is_file():
        raise UserError(f"{path} is no run directory ({CONFIG} is missing); to start one, leave out --resume")
    return configuration.load(file)


def stored_tune(path: Path) -> TuneConfig:
    """The same of a directory that `ludus sft` made."""
    file = path / TUNE
    if not file.is_file():
        raise UserError(f"{path} was not made by ludus sft ({TUNE} is missing); to start, leave out --resume")
    return configuration.validate_tune(configuration.read_toml(file, "settings"), str(file))


def refuse_changes(stored: Settings, wanted: Settings, where: str) -> None:
    """Raise UserError that names every key which differs and may not; see CHANGEABLE.

    A run that kept no past selves cannot be measured against them either: past/0 is gone.
    """
    old, new = _compared(stored), _compared(wanted)
    different = [
        f"{key} (was {old.get(key, 'absent')!r}, now {new.get(key, 'absent')!r})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(CHANGEABLE)
    ]
    if different:
        raise UserError(
            f"cannot resume {where} with another configuration: {', '.join(different)}; "
            f"use the settings of that run ({where}/{_file(stored)}), or another --out"
        )
    if isinstance(wanted, RunConfig) and isinstance(stored, RunConfig) and wanted.has_past > stored.has_past:
        raise UserError(
            f"{where} kept no past selves, as nothing asked for any until now: take past/0 out of "
            "eval.opponents, or start anew with another --out"
        )


def replace(path: Path, data: bytes) -> None:
    """Write a file whole: beside it, to the disk, then one rename. Raises UserError on a full disk."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    try:
        temporary.write_bytes(data)
        checkpoint.fsync(temporary)
        temporary.replace(path)
        checkpoint.fsync(path.parent)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {e.strerror}; free space or mend the cause") from e


def _file(config: Settings) -> str:
    return TUNE if isinstance(config, TuneConfig) else CONFIG


def _refuse_occupied(path: Path) -> None:
    if any(p.name != LOCK and not p.name.startswith(_TEMPORARY) for p in path.iterdir()):
        raise UserError(
            f"run directory {path} is not empty, and nothing is overwritten: go on with it by --resume, "
            "or choose another --out"
        )


def _take_lock(path: Path) -> BinaryIO:
    """Hold `lock` until the file is closed or the process dies, however it dies."""
    file = (path / LOCK).open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        file.seek(0)
        holder = file.read().decode(errors="replace").strip() or "unknown"
        file.close()
        raise UserError(
            f"run directory {path} is being written by process {holder}: wait until it ends, or choose "
            "another --out"
        ) from e
    file.truncate(0)
    file.write(f"{os.getpid()}\n".encode())
    file.flush()
    return file


def _compared(config: Settings) -> dict[str, Any]:
    """What a resume is held to. A judge may be served elsewhere, if it is the same one."""
    plain = config.model_dump(mode="json")
    if isinstance(config, RunConfig):
        plain["judges"] = {name: judge.identity for name, judge in config.judges.items()}
    return _flat(plain)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested sections and lists as dotted keys."""
    items: Any
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list) and value:
        items = enumerate(value)
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return flat
