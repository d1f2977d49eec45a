"""Figures of suites by hand-worked numbers, and what is kept of answers and verdicts."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from ludus.errors import UserError
from ludus.judges.base import Failure, Verdict
from ludus.suites import METRICS, Item, Suite
from ludus.truth.intervals import wilson
from ludus.truth.suite_eval import Results, figures
from ludus.truth.transcripts import ANSWERS, SETTINGS, VERDICTS, Answer, Transcripts


def item(name: str, harmful: bool | None, category: str = "", response: str | None = None) -> Item:
    metrics = () if harmful is None else METRICS[harmful]
    known = None if response is None else response.startswith("I decline")
    return Item(
        name, category, harmful, metrics, "a prompt", response, None if known is None else False, known
    )


def test_figures_by_hand() -> None:
    suite = Suite(
        "s",
        "ludus",
        "0",
        (
            item("h1", True, "a/b"),  # harmful answer
            item("h2", True, "a"),  # refused; the judge takes the request for harmless
            item("h3", True, "a"),  # the judge does not say whether the answer is harmful
            item("h4", True, "c"),  # no verdict
            item("h5", True, "c"),  # no answer
            item("b1", False, "a", "I decline."),  # refused
            item("b2", False, "c", "Boil it."),  # answered
            item("none", None, "d", "Boil it."),  # never asked
        ),
    )
    answers = {("s", i.id): Answer("an answer") for i in suite.items if i.harmful is not None}
    answers["s", "h5"] = Answer(None, "no_answer")
    answers["s", "b2"] = Answer("an answer", cut=True)
    results: Results = {
        ("s", "h1", "model"): Verdict(True, True, False),
        ("s", "h2", "model"): Verdict(False, False, True),
        ("s", "h3", "model"): Verdict(True, None, False),
        ("s", "h4", "model"): Failure("timeout"),
        ("s", "b1", "model"): Verdict(True, False, True),
        ("s", "b2", "model"): Verdict(False, False, False),
        ("s", "b1", "recorded"): Verdict(False, False, True),
        ("s", "b2", "recorded"): Verdict(False, True, True),
        ("s", "none", "recorded"): Failure("parse"),
    }
    found = figures(suite, answers, results)
    assert (found["prompts"], found["unlabelled"], found["cut"]) == (8, 1, 1)
    assert found["masked"] == {"judge: timeout": 1, "no_answer": 1}
    whole = found["categories"][""]
    assert whole["attack_success"] == {"rate": 1 / 2, "ci95": list(wilson(1 / 2, 2)), "n": 2, "unsaid": 1}
    assert whole["refusal"] == {"rate": 1 / 3, "ci95": list(wilson(1 / 3, 3)), "n": 3, "unsaid": 0}
    assert whole["over_refusal"] == {"rate": 1 / 2, "ci95": list(wilson(1 / 2, 2)), "n": 2, "unsaid": 0}
    assert list(found["categories"]) == ["", "a", "a/b", "c"]
    assert found["categories"]["a"]["attack_success"]["n"] == 2
    assert found["categories"]["a/b"]["attack_success"]["rate"] == 1.0
    nothing = {"rate": None, "ci95": [0.0, 1.0], "n": 0, "unsaid": 0}
    assert found["categories"]["c"]["refusal"] == nothing
    tables = {
        name: tuple(table[k] for k in ("both_yes", "only_label", "only_judge", "both_no", "unsaid"))
        for name, table in found["confusion"].items()
    }
    assert tables == {
        "request_harmful": (2, 1, 1, 1, 0),
        "recorded answer_harmful": (0, 0, 1, 1, 1),
        "recorded refusal": (1, 0, 1, 0, 1),
    }


def test_a_metric_leaves_the_others_out() -> None:
    suite = Suite("s", "ludus", "0", (Item("x", "", True, ("refusal",), "a prompt"),))
    found = figures(suite, {("s", "x"): Answer("yes")}, {("s", "x", "model"): Verdict(True, True, False)})
    assert list(found["categories"][""]) == ["refusal"]


def keep(folder: Path, **settings: object) -> Transcripts:
    return Transcripts(folder, {"seed": 0, **settings})


def test_transcripts_come_back_and_are_private(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    old = os.umask(0o000)
    try:
        with keep(folder) as kept:
            kept.answered(("s", "a"), "a prompt", Answer("caf\u00e9", cut=True))
            kept.answered(("s", "b"), "a prompt", Answer(None, "timeout"))
            kept.judged(("s", "a"), "model", Verdict(True, None, False, raw="said"))
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {ANSWERS: 0o600, VERDICTS: 0o600, SETTINGS: 0o600}
    (folder / ANSWERS).chmod(0o644)
    with (folder / ANSWERS).open("ab") as torn:
        torn.write(b'{"suite": "s", "id": "c", "pro')
    with keep(folder) as kept:
        assert kept.answers == {
            ("s", "a"): Answer("caf\u00e9", cut=True),
            ("s", "b"): Answer(None, "timeout"),
        }
        assert kept.verdicts == {("s", "a", "model"): Verdict(True, None, False, raw="said")}
        kept.answered(("s", "b"), "a prompt", Answer("at last"))
    assert stat.S_IMODE((folder / ANSWERS).stat().st_mode) == 0o600
    with keep(folder) as kept:
        assert kept.answers["s", "b"] == Answer("at last")
        assert len(kept.answers) == 2


def test_transcripts_refuse_to_mix(tmp_path: Path) -> None:
    with keep(tmp_path / "out") as kept:
        kept.answered(("s", "a"), "a prompt", Answer("yes"))
        with pytest.raises(UserError, match="another process is writing"):
            keep(tmp_path / "out")
    with pytest.raises(UserError, match=r"other settings \(seed was 0, now 1\)"):
        Transcripts(tmp_path / "out", {"seed": 1})
    (tmp_path / "out" / SETTINGS).unlink()
    with pytest.raises(UserError, match="is missing, so nobody knows"):
        keep(tmp_path / "out")
    (tmp_path / "else").mkdir(mode=0o755)
    (tmp_path / "else" / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        keep(tmp_path / "else")
    assert stat.S_IMODE((tmp_path / "else").stat().st_mode) == 0o755


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (ANSWERS, {"suite": "s", "id": "a"}),
        (ANSWERS, {"suite": "s", "id": "a", "answer": None, "masked": None, "cut": False}),
        (VERDICTS, {"suite": "s", "id": "a", "of": "model", "verdict": [True, 1, None], "raw": ""}),
        (VERDICTS, {"suite": "s", "id": "a", "of": "model", "verdict": [True], "raw": ""}),
        (VERDICTS, 7),
    ],
)
def test_damage_is_told_with_its_line(name: str, line: object, tmp_path: Path) -> None:
    with keep(tmp_path / "out"):
        pass
    (tmp_path / "out" / name).write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=f"{name}, line 1: damaged"):
        keep(tmp_path / "out")
