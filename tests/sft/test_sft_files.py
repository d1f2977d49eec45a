"""Supervised data on the disk: what is read, and what bad rows are called."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
import zstandard

from ludus.errors import UserError
from ludus.records import encode_episodes
from ludus.sft.files import BadRow, Message, Row, rows
from ludus.types import Episode, Stop, Turn

ASK = {"role": "user", "content": "How are you?"}
SAY = {"role": "assistant", "content": "Well."}
EPISODE = Episode(
    3,
    "kuhn_poker",
    1,
    ("self", "self"),
    ("a", "b"),
    [Turn(0, "a", 0, "self", 2, [1, 2], [3], [-0.5], Stop.ACTION, "bet", text="c")],
    (1.0, -1.0),
)


def write(path: Path, *lines: object) -> Path:
    data = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()
    path.write_bytes(zstandard.ZstdCompressor().compress(data) if path.suffix == ".zst" else data)
    return path


def read(path: Path) -> list[Any]:
    return [row.read() for row in rows(path)]


def message(given: Mapping[str, Any]) -> Message:
    found = Row("here", {"messages": [ASK, given]}).read()
    assert isinstance(found, tuple)
    return found[1]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.zst"])
def test_dialogues_and_pairs_are_read_line_by_line(tmp_path: Path, name: str) -> None:
    path = write(
        tmp_path / name,
        {"messages": [{"role": "system", "content": "Be kind."}, ASK, SAY, ASK, SAY], "game": "chat"},
        "",
        {"prompt": "How are you?", "completion": "Well."},
        {"prompt": [ASK, SAY, ASK], "completion": [SAY], "messages": None},
    )
    ask, say = Message("user", "How are you?"), Message("assistant", "Well.")
    assert read(path) == [
        (Message("system", "Be kind."), ask, say, ask, say),
        (ask, say),
        (ask, say, ask, say),
    ]
    assert [row.where for row in rows(path)] == [f"{path}, line {n}" for n in (1, 3, 4)]


def test_frames_of_zstandard_written_one_after_the_other_are_one_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.zst"
    line = json.dumps({"messages": [ASK, SAY]}).encode() + b"\n"
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(line) for _ in range(3)))
    assert len(read(path)) == 3


def test_episodes_are_read_with_their_tokens(tmp_path: Path) -> None:
    for name in ("episodes", "alone.jsonl.zst"):
        path = tmp_path / name
        if name == "episodes":
            path.mkdir()
        file = path / "step_00000001.jsonl.zst" if path.is_dir() else path
        file.write_bytes(encode_episodes([EPISODE, EPISODE]))
        assert read(path) == [EPISODE, EPISODE]
    assert read(tmp_path) == [EPISODE, EPISODE]  # the run that the directory is of


@pytest.mark.parametrize(
    ("content", "thought", "said"),
    [
        ("Plain.", None, "Plain."),
        ("<think>a b</think>\\boxed{bet}", "a b", "\\boxed{bet}"),
        ("<think></think>\\boxed{bet}", "", "\\boxed{bet}"),
        ("<think>\nAs Qwen3 does it.\n</think>\n\nSo.", "As Qwen3 does it.\n", "\n\nSo."),
        ("<think>\n\n</think>\n\nSo.", None, "So."),  # Qwen3 with thinking off
        ("<think>one</think>two</think>three", "one", "two</think>three"),  # the first marker ends it
        ("In <think>words</think> only.", None, "In <think>words</think> only."),
    ],
)
def test_a_reply_may_begin_with_a_thought(content: str, thought: str | None, said: str) -> None:
    assert message({"role": "assistant", "content": content}) == Message("assistant", said, thought)


def test_a_thought_may_stand_apart_as_in_qwen3s_own_template() -> None:
    apart = message({"role": "assistant", "content": "\nSo.", "reasoning_content": "\nAs it does.\n"})
    together = message({"role": "assistant", "content": "<think>\nAs it does.\n</think>\n\nSo."})
    assert apart == together
    assert message({**SAY, "reasoning_content": None}) == Message("assistant", "Well.")


def test_what_others_say_is_no_thought() -> None:
    found = Row("here", {"prompt": "<think>x</think>y", "completion": "z"}).read()
    assert found == (Message("user", "<think>x</think>y"), Message("assistant", "z"))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"messages": [', "not JSON"),
        ("[1]", "no object"),
        ({"text": "How are you?"}, "neither messages, nor prompt and completion.*keys: text"),
        ({"prompt": "How are you?"}, "neither messages"),
        ({"prompt": 3, "completion": "x"}, "a text or a list of messages"),
        ({"messages": []}, "at least a question and a reply"),
        ({"messages": "hello"}, "must be a list"),
        ({"messages": [ASK, "Well."]}, "message 2 is not of the form"),
        ({"messages": [ASK, {"role": "model", "content": "x"}]}, "message 2 has the role 'model'"),
        ({"messages": [ASK, {"role": "assistant", "content": None}]}, "message 2 .assistant.*no text"),
        ({"messages": [ASK, {"role": "assistant", "content": " \n"}]}, "message 2 .assistant. says nothing"),
        ({"messages": [ASK, {"role": "assistant", "content": "<think>x</think>"}]}, "says nothing"),
        ({"messages": [ASK, {"role": "assistant", "content": "<think>x"}]}, "never closes it"),
        ({"messages": [ASK, {**SAY, "reasoning_content": 3}]}, "reasoning_content must be a text"),
        ({"messages": [SAY]}, "begins with a user's message"),
        ({"messages": [SAY, ASK, SAY]}, "begins with a user's message"),
        ({"messages": [{"role": "system", "content": "x"}, SAY]}, "begins with a user's message"),
        ({"messages": [ASK, SAY, {"role": "system", "content": "x"}, SAY]}, "message 3 is a system message"),
        ({"messages": [ASK, SAY, ASK]}, "message 3, the last, is no reply"),
        ({"turns": [], "seats": []}, "damaged episode"),
    ],
)
def test_a_bad_row_is_told(tmp_path: Path, line: object, problem: str) -> None:
    found = list(rows(write(tmp_path / "rows.jsonl", {"messages": [ASK, SAY]}, line)))
    assert found[1].where == f"{tmp_path / 'rows.jsonl'}, line 2"
    with pytest.raises(BadRow, match=problem):
        found[1].read()


def test_bytes_that_are_no_text_are_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"messages": "\xff\xfe"}\n')
    with pytest.raises(BadRow, match="not UTF-8"):
        read(tmp_path / "rows.jsonl")


def test_a_data_set_saved_by_the_library_is_read_row_by_row(tmp_path: Path) -> None:
    """Columns that some rows lack are null there, as Arrow has it."""
    apart = {"role": "assistant", "content": "So.", "reasoning_content": "Hm."}
    table = [{"messages": [ASK, SAY], "n": 1}, {"messages": [ASK, apart], "n": 2}]
    datasets.Dataset.from_list(table).save_to_disk(tmp_path / "saved")
    ask = Message("user", "How are you?")
    assert read(tmp_path / "saved") == [
        (ask, Message("assistant", "Well.")),
        (ask, Message("assistant", "\n\nSo.", "Hm.\n")),
    ]
    assert [row.where for row in rows(tmp_path / "saved")] == [f"{tmp_path}/saved, row {n}" for n in (1, 2)]

    pairs = datasets.Dataset.from_dict({"prompt": ["How are you?"], "completion": ["Well."]})
    datasets.DatasetDict(train=pairs, test=pairs).save_to_disk(tmp_path / "both")
    with pytest.raises(UserError, match=r"name one of them: .*both/\{test,train\}"):
        read(tmp_path / "both")
    assert read(tmp_path / "both" / "train") == [(ask, Message("assistant", "Well."))]

    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"no arrow")
    with pytest.raises(UserError, match=r"saved cannot be read: .*save it again"):
        read(tmp_path / "saved")


def test_parquet_is_read_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([{"messages": [ASK, SAY]}] * 3).to_parquet(path)
    assert read(path) == [(Message("user", "How are you?"), Message("assistant", "Well."))] * 3
    assert [row.where for row in rows(path)] == [f"{path}, row {n}" for n in (1, 2, 3)]
    path.write_bytes(b"no parquet")
    with pytest.raises(UserError, match="no Parquet file that can be read"):
        read(path)


def test_a_library_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.Dataset.from_list([{"messages": [ASK, SAY]}]).save_to_disk(tmp_path / "saved")
    (tmp_path / "rows.parquet").write_bytes(b"")
    for name, path in (("datasets", "saved"), ("pyarrow.parquet", "rows.parquet")):
        monkeypatch.setitem(sys.modules, name, None)  # what Python itself does to say: there is none
        with pytest.raises(
            UserError, match=rf"needs the library {name.partition('.')[0]}, .*pip install 'ludus"
        ):
            read(tmp_path / path)


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    (tmp_path / "torn.jsonl.zst").write_bytes(b"no zstandard at all")
    (tmp_path / "rows.csv").write_text("a,b\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "splits" / "train").mkdir(parents=True)
    (tmp_path / "splits" / "dataset_dict.json").write_text("{}")
    for name, problem in {
        "absent.jsonl": "No such file",
        "torn.jsonl.zst": "is damaged",
        "rows.csv": r"unknown kind.*\.jsonl",
        "empty": "neither a data set saved by save_to_disk nor a run's episodes",
        "splits": r"name one of them: .*/splits/\{train\}",
    }.items():
        with pytest.raises(UserError, match=problem):
            list(rows(tmp_path / name))
