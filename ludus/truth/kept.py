"""The matches of a tournament on disk, so that nothing is played twice and nothing played is lost.

    settings.json   what was played: seed, rule, games, entrants; nothing else may be added to the results
    matches.jsonl   one line per deal and pair of entrants, written as the deal ends

A line is {"game", "pair": [a, b], "deal", "matches": [{"returns", "replies", "refused", "masked"}, ...]} with
its two matches, a in seat 0 and then b in seat 0, seat 0 always first within a match. Where a deal has
several lines the last one counts: matches that an engine's failure ended are played again later.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from ludus.errors import UserError
from ludus.truth.score import Result

SETTINGS = "settings.json"
MATCHES = "matches.jsonl"
ADDABLE = ("games", "entrants")  # settings by name, to which an old directory takes new names

Key = tuple[str, str, str, int]  # game, pair of entrants in alphabetical order, deal
Deal = tuple[Result, Result]  # the first of the pair in seat 0, then the second


class Kept:
    """The results in one directory, held by one writer at a time; in memory alone where `folder` is None."""

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        """Read what `folder` holds, and make it where it is missing.

        `settings` is plain data; an old directory takes new names below those of `ADDABLE`.
        Raises UserError where anything else differs from what was played there, for a damaged file, and
        while another process writes.
        """
        self.deals: dict[Key, Deal] = {}
        self._file: BinaryIO | None = None
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = _held(folder / MATCHES)
        except OSError as e:
            raise UserError(f"cannot write to {folder}: {e.strerror}; choose another --out") from e
        try:
            _agree(folder, json.loads(json.dumps(settings)))
            end = self._read(folder / MATCHES)
            self._file.truncate(end)  # a last line that was cut off while it was written
            self._file.seek(end)
        except BaseException:
            self._file.close()
            raise

    def add(self, key: Key, deal: Deal) -> None:
        """Keep one deal; it is out of this process's hands when this returns."""
        self.deals[key] = deal
        if self._file is not None:
            game, a, b, number = key
            line = {"game": game, "pair": [a, b], "deal": number, "matches": [asdict(r) for r in deal]}
            try:
                self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
                self._file.flush()
            except OSError as e:
                raise UserError(
                    f"cannot write to {self._file.name}: {e.strerror}; what was played before is kept: free "
                    "space, then run the same command again"
                ) from e

    def __enter__(self) -> Kept:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()

    def _read(self, path: Path) -> int:
        """Fill `deals`; returns where the last whole line ends."""
        end = 0
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break
            end += len(line)
            try:
                entry = json.loads(line)
                a, b = entry["pair"]
                first, second = (_result(match) for match in entry["matches"])
                self.deals[str(entry["game"]), str(a), str(b), int(entry["deal"])] = (first, second)
            except (ValueError, KeyError, TypeError) as e:
                raise UserError(f"{path}, line {number}: no result of a deal ({e}); remove that line") from e
        return end


def _result(data: Mapping[str, Any]) -> Result:
    (a, b), (m, n), (v, w) = data["returns"], data["replies"], data["refused"]
    masked = data["masked"]
    return Result((float(a), float(b)), (int(m), int(n)), (int(v), int(w)), masked and str(masked))


def _held(path: Path) -> BinaryIO:
    """The file, open for this process alone."""
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        file.close()
        raise UserError(
            f"another process is writing {path}: wait until it ends, or choose another --out"
        ) from e
    return file


def _agree(folder: Path, wanted: dict[str, Any]) -> None:
    """Refuse to mix results of different settings; else write down old and new names together."""
    path = folder / SETTINGS
    stored: dict[str, Any] = {}
    if path.exists():
        try:
            stored = json.loads(path.read_bytes())
            old = {key: dict(stored[key]) if isinstance(wanted[key], dict) else stored[key] for key in wanted}
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{path} is damaged ({e}); choose another --out") from e
        for key, value in wanted.items():
            if key not in ADDABLE:
                _same(folder, key, old[key], value)
                continue
            for name in value.keys() & old[key].keys():
                _same(folder, f"{key}: {name}", old[key][name], value[name])
            wanted[key] = {**old[key], **value}
    elif (folder / MATCHES).stat().st_size:
        raise UserError(f"{path} is missing, so nobody knows what {MATCHES} holds; choose another --out")
    if wanted != stored:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(wanted, indent=1, sort_keys=True) + "\n")
        temporary.replace(path)


def _same(folder: Path, what: str, old: Any, new: Any) -> None:
    """Raise UserError that names the first setting, however deep, in which `old` and `new` differ."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        for key in old:
            _same(folder, f"{what}.{key}", old[key], new[key])
    elif old != new:
        raise UserError(
            f"{folder} holds results of other settings ({what} was {json.dumps(old)}, now "
            f"{json.dumps(new)}): go back to those, or choose another --out"
        )
