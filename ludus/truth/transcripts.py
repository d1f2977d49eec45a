"""What a model answered and what a judge said of it, on disk: nothing is asked twice, nothing said is lost.

    settings.json   of which model, suites and judge (if any); nothing of other settings is ever added
    answers.jsonl   a line per prompt: {"suite", "id", "prompt", "answer", "masked", "cut"}; without an
                    answer, `masked` says why
    verdicts.jsonl  a line per verdict: {"suite", "id", "of", "verdict", "raw"}; `of` is "model", or
                    "recorded" for an answer that the suite's file holds. What got no verdict has no line.

The texts may be harmful: directory and files are for their owner alone.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

from ludus.errors import UserError
from ludus.judges.base import FIELDS, Verdict

SETTINGS, ANSWERS, VERDICTS = "settings.json", "answers.jsonl", "verdicts.jsonl"
Of = Literal["model", "recorded"]
Key = tuple[str, str]  # suite, id of the prompt


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said, thoughts left out; None and the reason where there is no answer."""

    text: str | None
    masked: str | None = None
    cut: bool = False  # at the limit of tokens


class Answers:
    """The answers in one directory, held by one writer at a time."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Read what is kept in `folder`, or make it. `settings` are plain data.

        Raises UserError for a directory of something else or of other settings, for a damaged file, and while
        another process writes. A last line cut short by a kill is dropped.
        """
        self.answers: dict[Key, Answer] = {}
        self._files: list[BinaryIO] = []
        try:
            _open_folder(folder)
            self._open(folder, json.loads(json.dumps(settings)))
        except OSError as e:
            self._close()
            raise UserError(f"cannot write to {folder}: {e.strerror}; choose another --out") from e
        except BaseException:
            self._close()
            raise

    def _open(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._answers = self._held(folder / ANSWERS)
        _agree(folder / SETTINGS, settings)
        _read(self._answers, self._take_answer)

    def answered(self, key: Key, prompt: str, answer: Answer) -> None:
        """Keep an answer. Raises UserError where the disk takes no more."""
        self.answers[key] = answer
        line = {"suite": key[0], "id": key[1], "prompt": prompt, "answer": answer.text}
        _append(self._answers, {**line, "masked": answer.masked, "cut": answer.cut})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        for file in self._files:
            file.close()

    def _held(self, path: Path) -> BinaryIO:
        file = open(path, "r+b", opener=_private)  # noqa: SIM115
        self._files.append(file)
        os.fchmod(file.fileno(), 0o600)  # it may have been copied here with other rights
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(
                f"another process is writing {path}: wait until it ends, or choose another --out"
            ) from e
        return file

    def _take_answer(self, entry: Mapping[str, Any]) -> None:
        text, masked = entry["answer"], entry["masked"]
        if (text is None) == (masked is None):
            raise ValueError("either an answer or a reason is wanted")
        answer = Answer(text and str(text), masked and str(masked), bool(entry["cut"]))
        self.answers[str(entry["suite"]), str(entry["id"])] = answer


class Transcripts(Answers):
    """Answers, and what a judge said of them."""

    def _open(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.verdicts: dict[tuple[str, str, str], Verdict] = {}
        super()._open(folder, settings)
        self._verdicts = self._held(folder / VERDICTS)
        _read(self._verdicts, self._take_verdict)

    def judged(self, key: Key, of: Of, verdict: Verdict) -> None:
        """Keep a verdict. Raises UserError where the disk takes no more."""
        self.verdicts[*key, of] = verdict
        line = {"suite": key[0], "id": key[1], "of": of}
        _append(
            self._verdicts, {**line, "verdict": [getattr(verdict, f) for f in FIELDS], "raw": verdict.raw}
        )

    def _take_verdict(self, entry: Mapping[str, Any]) -> None:
        said = entry["verdict"]
        if not all(x is None or isinstance(x, bool) for x in said):
            raise ValueError(f"yes, no or nothing is wanted of {FIELDS}")
        key = (str(entry["suite"]), str(entry["id"]), str(entry["of"]))
        request_harmful, answer_harmful, refusal = said
        self.verdicts[key] = Verdict(request_harmful, answer_harmful, refusal, raw=str(entry["raw"]))


def _private(path: str, flags: int) -> int:
    """Opens for its owner alone what it makes."""
    return os.open(path, flags | os.O_CREAT, 0o600)


def _open_folder(folder: Path) -> None:
    ours = (folder / SETTINGS).is_file() or (folder / ANSWERS).is_file()
    if folder.is_dir() and any(folder.iterdir()) and not ours:
        raise UserError(f"{folder} holds something else; choose another --out")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)


def _agree(path: Path, wanted: Mapping[str, Any]) -> None:
    """Refuse to mix what was said under different settings."""
    if not path.exists():
        if (path.parent / ANSWERS).stat().st_size:
            raise UserError(f"{path} is missing, so nobody knows whose {ANSWERS} is; choose another --out")
        write_private(path, wanted)
        return
    try:
        stored = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as e:
        raise UserError(f"{path} is damaged ({e}); choose another --out") from e
    for key in sorted(stored.keys() | wanted.keys()):
        if stored.get(key) != wanted.get(key):
            raise UserError(
                f"{path.parent} holds answers under other settings ({key} was {json.dumps(stored.get(key))}, "
                f"now {json.dumps(wanted.get(key))}): go back to those, or choose another --out"
            )


def write_private(path: Path, value: Mapping[str, Any]) -> None:
    """Replace `path` by `value` as JSON, for its owner alone. Raises OSError."""
    temporary = path.with_name(f".tmp-{path.name}")
    with open(temporary, "w", opener=_private) as file:
        file.write(json.dumps(value, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)


def _read(file: BinaryIO, take: Callable[[Mapping[str, Any]], None]) -> None:
    end = 0
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            break
        end += len(line)
        try:
            take(json.loads(line))
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{file.name}, line {number}: damaged ({e}); remove that line") from e
    file.truncate(end)  # a last line that was cut off while it was written
    file.seek(end)


def _append(file: BinaryIO, line: Mapping[str, Any]) -> None:
    try:
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
    except OSError as e:
        raise UserError(
            f"cannot write to {file.name}: {e.strerror}; what was kept before stays: free space, then run "
            "the same command again"
        ) from e
