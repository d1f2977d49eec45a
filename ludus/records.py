"""The files of a run directory that people and reports read: metrics, evaluations, episodes.

`metrics.jsonl` holds one JSON object per line, steps never decreasing:

    training   {"step", "version", "wall", "games": {game: {...}}, "learn": {...}, "speed": {...}, ...}
    evaluation {"step", "eval": {"games": {game: {"opponents": {...}, "exploitability": {...}}}}}

A red-team game's evaluation also has "safety": {...} beside its "opponents".
`episodes/step_00000012.jsonl.zst` holds one `Episode` per line, all fields of its turns included.
Whoever writes these files is `ludus.train.rundir`; everybody may read them, so the formats live down here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import zstandard

from ludus.errors import UserError
from ludus.types import Episode, Stop, Turn

Record = dict[str, Any]

_EPISODE_FIELDS = tuple(f.name for f in fields(Episode))
_TURN_FIELDS = tuple(f.name for f in fields(Turn))


def is_evaluation(record: Mapping[str, Any]) -> bool:
    """Whether a metrics record is an evaluation (else it is a training step)."""
    return "eval" in record


def learnt(record: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """What a training record's "learn" says, by policy; by "" where only one learns."""
    learn = record.get("learn", {})
    several = bool(learn) and all(isinstance(figures, Mapping) for figures in learn.values())
    return learn if several else {"": learn}


def encode_record(record: Mapping[str, Any]) -> bytes:
    """One line of metrics.jsonl. Numbers that are not finite become null, as JSON has none."""
    return json.dumps(_finite(record), allow_nan=False, separators=(", ", ": ")).encode() + b"\n"


def read_metrics(path: Path) -> list[Record]:
    """All whole records of a metrics.jsonl; [] where there is none.

    A last line without its newline is a write that was cut off, and is left out. Raises UserError where
    any other line is not a record.
    """
    if not path.exists():
        return []
    return [record for record, _ in scan_metrics(path.read_bytes(), str(path))]


def scan_metrics(data: bytes, where: str) -> list[tuple[Record, int]]:
    """The whole records in `data`, each with the byte offset just after its line. Raises UserError."""
    found: list[tuple[Record, int]] = []
    end = 0
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        end += len(line)
        if not line.endswith(b"\n"):
            break  # cut off while it was written: the last line, and no record yet
        try:
            record = json.loads(line)
        except ValueError as e:
            raise UserError(f"{where}, line {number}: not a metrics record ({e}); remove that line") from e
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise UserError(f"{where}, line {number}: a metrics record without a step; remove that line")
        found.append((record, end))
    return found


def encode_episodes(episodes: Iterable[Episode]) -> bytes:
    """Compressed JSON lines. The same episodes give the same bytes."""
    lines = [
        json.dumps(_episode_dict(episode), allow_nan=False, separators=(",", ":")) + "\n"
        for episode in episodes
    ]
    return zstandard.ZstdCompressor(level=3, write_checksum=True).compress("".join(lines).encode())


def decode_episodes(data: bytes) -> list[Episode]:
    """What `encode_episodes` was given."""
    lines = zstandard.ZstdDecompressor().decompress(data).splitlines()
    return [decode_episode(json.loads(line)) for line in lines]


def read_episodes(path: Path) -> list[Episode]:
    """The episodes of one step's file. Raises UserError where it is missing or damaged."""
    try:
        return decode_episodes(path.read_bytes())
    except OSError as e:
        raise UserError(f"cannot read episodes {path}: {e.strerror}") from e
    except (zstandard.ZstdError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"episodes {path} are damaged: {e}") from e


def decode_episode(data: dict[str, Any]) -> Episode:
    """The episode of one line's object. Raises KeyError, TypeError or ValueError where it is none."""
    turns = [Turn(**{**turn, "stop": Stop(turn["stop"])}) for turn in data["turns"]]
    return Episode(
        **{
            **data,
            "seats": tuple(data["seats"]),
            "roles": tuple(data["roles"]),
            "returns": tuple(data["returns"]),
            "parts": tuple(data.get("parts", ())),  # absent in files written before games named their pay
            "turns": turns,
        }
    )


def episode_files(run: Path) -> list[tuple[int, Path]]:
    """(step, file) of a run's episode files, in order of steps."""
    found = []
    for path in (run / "episodes").glob("step_*.jsonl.zst"):
        digits = path.name.removeprefix("step_").removesuffix(".jsonl.zst")
        if digits.isdigit():
            found.append((int(digits), path))
    return sorted(found)


def episode_name(step: int) -> str:
    """File name of a step's episodes."""
    return f"step_{step:08d}.jsonl.zst"


@dataclass(frozen=True, slots=True)
class Change:
    """One measured figure before and after training, ready to print."""

    game: str
    figure: str  # "exploitability", "score vs random", "illegal replies vs random"
    before: str
    after: str
    better: bool | None  # None: equal, or not measured on both sides


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Compare two evaluations (the "eval" objects of two records), game by game."""
    rows: list[Change] = []
    old_games, new_games = before.get("games", {}), after.get("games", {})
    for game in new_games:
        old, new = old_games.get(game, {}), new_games[game]
        if new.get("exploitability"):
            rows.append(
                _change(
                    game,
                    "exploitability",
                    (old.get("exploitability") or {}, "exploitability", "ci95"),
                    (new["exploitability"], "exploitability", "ci95"),
                    _plain,
                    lower_is_better=True,
                )
            )
        rows += _safety_changes(game, old.get("safety") or {}, new.get("safety") or {})
        for opponent, result in new.get("opponents", {}).items():
            was = old.get("opponents", {}).get(opponent, {})
            for words, key, interval, lower in (
                ("score", "score", "ci95", False),
                ("illegal replies", "illegal_rate", "", True),
            ):
                figure = f"{words} vs {opponent}"
                old_new = (was, key, interval), (result, key, interval)
                rows.append(_change(game, figure, *old_new, percent, lower_is_better=lower))
    return rows


def _safety_changes(game: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """The red-team game's figures by the judge that pays, those of single families left out."""
    was, now = (record.get("judges", {}).get("exact", {}) for record in (old, new))
    return [
        _change(
            game,
            figure.replace("_", " ").replace("/", ", "),
            (was.get(figure, {}), "rate", "ci95"),
            (now[figure], "rate", "ci95"),
            percent,
            lower_is_better=not figure.startswith("answered"),
        )
        for figure in now
        if not figure.startswith("attack_success/")
    ]


def measured_rows(evaluation: Mapping[str, Any]) -> list[Change]:
    """The figures of one evaluation, as `after`; nothing is compared."""
    return changes({}, evaluation)


def percent(value: float) -> str:
    """0.1234 -> '12.3%'."""
    return f"{100 * value:.1f}%"


def _plain(value: float) -> str:
    return f"{value:.3f}"


def _change(
    game: str,
    figure: str,
    old: tuple[Mapping[str, Any], str, str],
    new: tuple[Mapping[str, Any], str, str],
    show: Any,
    *,
    lower_is_better: bool,
) -> Change:
    a, b = old[0].get(old[1]), new[0].get(new[1])
    better = None
    if a is not None and b is not None and a != b:
        better = (b < a) == lower_is_better
    return Change(game, figure, _with_interval(*old, show), _with_interval(*new, show), better)


def _with_interval(source: Mapping[str, Any], key: str, interval: str, show: Any) -> str:
    value = source.get(key)
    if value is None:
        return "-"
    bounds = source.get(interval)
    if not isinstance(bounds, list | tuple) or len(bounds) != 2 or None in bounds:
        return str(show(value))
    return f"{show(value)} [{show(bounds[0])}, {show(bounds[1])}]"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def _episode_dict(episode: Episode) -> dict[str, Any]:
    data = {name: getattr(episode, name) for name in _EPISODE_FIELDS}
    data["turns"] = [{name: getattr(turn, name) for name in _TURN_FIELDS} for turn in episode.turns]
    return data
