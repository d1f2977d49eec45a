"""Verdicts that were given before, by what was asked: in memory, and on disk where a file is named.

The file holds one verdict per line. It names questions by a hash alone and repeats the judge's own words,
never the judged texts; its owner alone may read it. Failures are not kept: what failed is asked again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import OrderedDict
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

from ludus.errors import UserError
from ludus.judges.base import FIELDS, Verdict


def key(judge: str, request: str, answer: str | None) -> str:
    """What names one call: 128 bits of BLAKE2b of judge, request and answer (or that there is none)."""
    asked = json.dumps([judge, request, answer]).encode()
    return blake2b(asked, digest_size=16).hexdigest()


class Cache:
    """The `size` verdicts that were last asked for, and all of them on disk.

    One process at a time writes a file. Every line is out of this process's hands as soon as it is added, so
    a kill loses nothing but a last line cut short, which is dropped when the file is opened again.
    """

    def __init__(self, size: int, path: Path | None = None) -> None:
        """Raises UserError for a file that cannot be written, is damaged or is held by another process."""
        self._size = size
        self._kept: OrderedDict[str, Verdict] = OrderedDict()
        self._file: BinaryIO | None = None
        if path is None:
            return
        self._file = _held(path)
        try:
            end = self._read(path)
            self._file.truncate(end)
            self._file.seek(end)
        except BaseException:
            self._file.close()
            raise

    def get(self, key: str) -> Verdict | None:
        verdict = self._kept.get(key)
        if verdict is not None:
            self._kept.move_to_end(key)
        return verdict

    def add(self, key: str, verdict: Verdict) -> None:
        """Raises UserError where the file takes no more."""
        self._keep(key, verdict)
        if self._file is None:
            return
        line = {"key": key, "verdict": [getattr(verdict, name) for name in FIELDS], "raw": verdict.raw}
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
        except OSError as e:
            raise UserError(
                f"cannot write to {self._file.name}: {e.strerror}; what was kept before stays: free "
                "space, then resume"
            ) from e

    def close(self) -> None:
        """Lets go of the file; what is in memory stays."""
        file, self._file = self._file, None
        if file is not None:
            os.fsync(file.fileno())
            file.close()

    def __len__(self) -> int:
        return len(self._kept)

    def _keep(self, key: str, verdict: Verdict) -> None:
        self._kept[key] = verdict
        self._kept.move_to_end(key)
        if len(self._kept) > self._size:
            self._kept.popitem(last=False)

    def _read(self, path: Path) -> int:
        """Fill the memory; returns where the last whole line ends."""
        end = 0
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                try:
                    entry = json.loads(line)
                    request_harmful, answer_harmful, refusal = said = entry["verdict"]
                    if not all(value is None or isinstance(value, bool) for value in said):
                        raise ValueError(f"{said} where yes, no or nothing is said of {FIELDS}")
                    verdict = Verdict(request_harmful, answer_harmful, refusal, raw=str(entry["raw"]))
                    self._keep(str(entry["key"]), verdict)
                except (ValueError, KeyError, TypeError) as e:
                    raise UserError(f"{path}, line {number}: no verdict ({e}); remove that line") from e
        return end


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o600)


def _held(path: Path) -> BinaryIO:
    """The file, readable by its owner alone and open for this process alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "r+b", opener=_private)  # noqa: SIM115
    except OSError as e:
        raise UserError(f"cannot write verdicts to {path}: {e.strerror}; choose another cache_file") from e
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        file.close()
        raise UserError(f"another process is writing {path}: wait until it ends, or name another") from e
    return file
