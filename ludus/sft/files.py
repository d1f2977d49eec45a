"""Supervised data as it lies on the disk. docs/supervised.md has the formats with examples.

    *.jsonl, *.jsonl.zst     one object per line
    *.parquet                one object per row (needs pyarrow)
    a directory              a data set that Hugging Face's `datasets` saved by save_to_disk (needs that
                             library), a run, or a run's episodes/

A row is a dialogue, {"messages": [{"role": "user", "content": "..."}, ...]} or {"prompt": ..., "completion":
...}, each a text or a list of messages; or one of our own episodes, whose tokens were recorded. Other keys
are left alone.
"""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from ludus.errors import UserError
from ludus.records import decode_episode, episode_files
from ludus.types import Episode

ROLES = ("system", "user", "assistant")
_NO_THOUGHT = "<think>\n\n</think>\n\n"  # how Qwen3 writes that thinking is off


class BadRow(Exception):
    """What is wrong with one row."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `thought` is None where none is told; "" where the reply thinks nothing."""

    role: str
    content: str
    thought: str | None = None


Content = tuple[Message, ...] | Episode


@dataclass(frozen=True, slots=True)
class Row:
    """One row and where it stands ("FILE, line 3"); `raw` is its line, or its values by column."""

    where: str
    raw: bytes | Mapping[str, Any]

    def read(self) -> Content:
        """The dialogue or the episode. Raises BadRow."""
        if isinstance(self.raw, bytes):
            try:
                data = json.loads(self.raw)
            except UnicodeDecodeError as e:
                raise BadRow(f"not UTF-8 ({e.reason} at byte {e.start})") from e
            except json.JSONDecodeError as e:
                raise BadRow(f"not JSON ({e.msg} at column {e.colno})") from e
        else:
            data = self.raw
        if not isinstance(data, Mapping):
            raise BadRow("no object with keys")
        return _content(data)


def rows(path: Path) -> Iterator[Row]:
    """The rows of a file or directory, one after the other. Raises UserError where it cannot be read."""
    if path.is_dir():
        yield from _directory(path)
        return
    kinds = {".jsonl": _lines, ".jsonl.zst": _lines, ".parquet": _parquet}
    read = next((kinds[end] for end in kinds if path.name.lower().endswith(end)), None)
    if read is None:
        raise UserError(f"{path}: unknown kind of supervised data; known are {', '.join(kinds)}, directories")
    try:
        yield from read(path)
    except OSError as e:
        raise UserError(f"cannot read supervised data {path}: {e.strerror or e}") from e
    except zstandard.ZstdError as e:
        raise UserError(f"supervised data {path} is damaged: {e}") from e


def _lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        stream: Any = file
        if path.suffix.lower() == ".zst":
            reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            stream = io.BufferedReader(reader)
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield Row(f"{path}, line {number}", line)


def _parquet(path: Path) -> Iterator[Row]:
    parquet = _library("pyarrow.parquet", path)
    try:
        file = parquet.ParquetFile(path)
    except _library("pyarrow", path).ArrowException as e:
        raise UserError(f"supervised data {path} is no Parquet file that can be read: {e}") from e
    number = 0
    for batch in file.iter_batches():
        for values in batch.to_pylist():
            number += 1
            yield Row(f"{path}, row {number}", values)


def _directory(path: Path) -> Iterator[Row]:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(part.name for part in path.iterdir() if part.is_dir())
        raise UserError(f"{path} holds several splits; name one of them: {path}/{{{','.join(splits)}}}")
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        yield from _dataset(path)
        return
    files = episode_files(path.parent if path.name == "episodes" else path)
    if not files:
        raise UserError(
            f"{path} holds no supervised data: neither a data set saved by save_to_disk nor a run's episodes"
        )
    for _, file in files:
        yield from rows(file)


def _dataset(path: Path) -> Iterator[Row]:
    library = _library("datasets", path)
    try:
        found = library.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"the data set in {path} cannot be read: {e}; save it again") from e
    for number, values in enumerate(found, start=1):
        yield Row(f"{path}, row {number}", values)


def _library(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        extra = {"datasets": "datasets"}.get(name, "parquet")
        raise UserError(
            f"{path} needs the library {name.partition('.')[0]}, which is not installed: pip install "
            f"'ludus[{extra}]', or save the rows as JSONL"
        ) from e


# What one row says


def _content(data: Mapping[str, Any]) -> Content:
    if "turns" in data and "seats" in data:
        try:
            return decode_episode(dict(data))
        except (KeyError, TypeError, ValueError) as e:
            raise BadRow(f"a damaged episode ({type(e).__name__}: {e})") from e
    if data.get("messages") is not None:
        return dialogue(data["messages"])
    if data.get("prompt") is not None and data.get("completion") is not None:
        prompt, completion = data["prompt"], data["completion"]
        first = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        last = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        if not isinstance(first, list) or not isinstance(last, list):
            raise BadRow("prompt and completion must each be a text or a list of messages")
        return dialogue([*first, *last])
    raise BadRow(
        f"neither messages, nor prompt and completion, nor an episode; its keys: {', '.join(map(str, data))}"
    )


def dialogue(given: Any) -> tuple[Message, ...]:
    """The messages of a row, as `{"role": ..., "content": ...}` each. Raises BadRow."""
    if not isinstance(given, list) or not given:
        raise BadRow("messages must be a list of at least a question and a reply")
    messages = tuple(_message(number, one) for number, one in enumerate(given, start=1))
    roles = [message.role for message in messages]
    late = next((n for n, role in enumerate(roles, start=1) if role == "system" and n > 1), None)
    if late is not None:
        raise BadRow(f"message {late} is a system message; there may be one, as message 1")
    if "user" not in roles or roles.index("user") > 1 or roles[0] == "assistant":
        raise BadRow("a dialogue begins with a user's message, or a system message and then a user's")
    if messages[-1].role != "assistant":
        raise BadRow(f"message {len(messages)}, the last, is no reply: nothing could be learnt from it")
    return messages


def _message(number: int, given: Any) -> Message:
    where = f"message {number}"
    if not isinstance(given, Mapping):
        raise BadRow(f'{where} is not of the form {{"role": ..., "content": ...}}')
    role, content = given.get("role"), given.get("content")
    if role not in ROLES:
        raise BadRow(f"{where} has the role {role!r}; known: {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise BadRow(f"{where} ({role}): its content is no text")
    if role != "assistant":
        return Message(role, content)
    thought, said = _thought(where, content, given.get("reasoning_content"))
    if not said.strip():
        raise BadRow(f"{where} (assistant) says nothing")
    return Message(role, said, thought)


def _thought(where: str, content: str, apart: Any) -> tuple[str | None, str]:
    """A reply's thought, as it stands at its beginning or apart from it, and what is said after it."""
    if apart is not None:
        if not isinstance(apart, str) or content.startswith("<think>"):
            raise BadRow(f"{where}: reasoning_content must be a text, and the content then without a thought")
        return apart.strip("\n") + "\n", "\n\n" + content.lstrip("\n")  # as Qwen3's own template writes it
    if content.startswith(_NO_THOUGHT):
        return None, content.removeprefix(_NO_THOUGHT)
    if not content.startswith("<think>"):
        return None, content
    thought, closed, said = content.removeprefix("<think>").partition("</think>")
    if not closed:
        raise BadRow(f"{where} opens a thought and never closes it")
    return thought.removeprefix("\n"), said  # the prompt's opening has that line break already
