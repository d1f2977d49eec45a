"""`ludus eval --suite` from outside: a small model, a server that can spell, files, kills, bad input."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from loopback import Answer, good, serve

from ludus.cli import main

QUICK = ("rollout.max_tokens=24", "engine.slots=16", "engine.context=1024", "threads=1")


def measured(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["eval", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["eval", *words]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    return told


def spells(_: int, body: dict[str, Any]) -> Answer:
    """A model of one talent. It says the wrong thing first."""
    question = body["messages"][-1]["content"].partition("\n")[0]
    word = question.rpartition(": ")[2]
    known = question.startswith("Spell this word backward")
    said = rf"\boxed{{{word}}}? No: \boxed{{{word[::-1]}}}" if known else "<think>I cannot do this"
    return Answer(body=good(said))


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    rows = [{"problem": f"{n} / 4?", "answer": rf"\frac{{{n}}}{{4}}"} for n in (1, 3, 5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_server_is_measured_by_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with serve(spells) as server:
        words = [f"speller={server.url}#m", "--suite", "reasoning-gym", "--problems", "3", "--samples", "2"]
        found = measured(capsys, *words)["reasoning-gym"]
        assert len(server.seen) == 3 * 23 * 2
    assert found["tasks"]["spell_backward"]["solved"] == 1.0
    assert found["groups"]["control"]["solved"] == pytest.approx(1 / 3)
    assert found["groups"]["case analysis"]["solved"] == 0.0
    assert found["groups"]["case analysis"]["no_answer"] == 1.0
    assert found["overall"]["solved"] == pytest.approx(1 / 23)
    assert not found["missing"]
    assert not found["masked"]


def test_a_model_answers_once_and_is_compared(
    tiny_model: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tiny_model), "--suite", f"math:{sums}", "--samples", "3", *QUICK]
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    first = measured(capsys, *words, "--out", one)["math-sums"]
    assert first["overall"]["problems"] == 3
    assert first["overall"]["replies"] == 9
    folder = tmp_path / "one" / "math-sums"
    assert {p.name for p in folder.iterdir()} == {"answers.jsonl", "settings.json", "result.json"}
    lines = (folder / "answers.jsonl").read_bytes()
    assert measured(capsys, *words, "--out", one)["math-sums"] == first
    assert (folder / "answers.jsonl").read_bytes() == lines  # nothing was asked again
    kept = lines.splitlines(keepends=True)
    (folder / "answers.jsonl").write_bytes(b"".join(kept[:4]) + kept[4][:20])  # as a kill leaves it
    assert measured(capsys, *words, "--out", one)["math-sums"] == first
    again = (folder / "answers.jsonl").read_bytes()
    assert sorted(again.splitlines()) == sorted(lines.splitlines())
    second = measured(capsys, *words, "--out", two, "--against", one)["math-sums"]
    assert second["values"] == first["values"]  # the same model says the same
    assert second["against"]["overall"]["difference"] == 0.0
    assert main(["eval", *words, "--out", two, "--against", one]) == 0
    told = capsys.readouterr().out
    assert "avg@3" in told
    assert "on the same problems" in told
    assert "cannot be compared" in refused(capsys, *words, "seed=9", "--against", one)
    assert "other settings" in refused(capsys, *words, "seed=9", "--out", one)


def test_bad_input_is_told_in_one_line(
    tiny_model: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_model)
    assert "known: reasoning-gym, math:FILE" in refused(capsys, model, "--suite", "gsm")
    assert "cannot read problems" in refused(capsys, model, "--suite", "math:none.jsonl")
    assert "--samples is 0" in refused(capsys, model, "--suite", f"math:{sums}", "--samples", "0")
    assert "names no task" in refused(capsys, model, "--suite", "lm-eval:")
    assert "--out says nothing to games" in refused(capsys, model, "--game", "kuhn_poker", "--out", "x")
    assert "two measurements" in refused(capsys, model, "--suite", f"math:{sums}", "--game", "kuhn_poker")
    assert "an earlier --out" in refused(capsys, model, "--suite", f"math:{sums}", "--against", str(tmp_path))
    assert "neither a run" in refused(capsys, str(tmp_path), "--suite", f"math:{sums}")
    late = [model, "--suite", f"math:{sums}", "engine.context=999999", "--out", str(tmp_path / "new")]
    assert "engine.context" in refused(capsys, *late)
    assert not (tmp_path / "new").exists()  # a directory with the wrong settings would be in the way


HARNESS = importlib.util.find_spec("lm_eval") is not None


@pytest.mark.skipif(HARNESS, reason="lm-evaluation-harness is installed here")
def test_without_the_harness_its_extra_is_named(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "ludus[lm-eval]" in refused(capsys, str(tiny_model), "--suite", "lm-eval:gsm8k")


@pytest.mark.skipif(not HARNESS, reason="needs the extra lm-eval, which the tests' environment does without")
def test_the_harness_runs_a_task_over_a_local_file(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"problem": f"{n} + {n} =", "answer": str(2 * n)} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
    asks = 'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{problem}}"\n'
    same = 'doc_to_choice: ["{{answer}}", "{{answer}}"]\ndoc_to_target: 0\nmetric_list: [{metric: acc}]\n'
    (tmp_path / "sums.yaml").write_text(f"task: ludus_sums\n{head}{asks}{same}")
    words = [str(tiny_model), *QUICK, "--include", str(tmp_path), "--out", str(tmp_path / "out")]
    found = measured(capsys, *words, "--suite", "lm-eval:ludus_sums", "--problems", "4")["lm-eval"]
    assert found["problems"] == {"ludus_sums": 4}
    assert found["tasks"]["ludus_sums"]["acc"]["value"] == 1.0  # both choices are alike; the first counts
    assert found["tasks"]["ludus_sums"]["acc"]["ci95"][0] < 0.6  # of four problems
    assert json.loads((tmp_path / "out" / "lm-eval" / "result.json").read_text()) == found
    near = refused(capsys, *words, "--suite", "lm-eval:ludus_sum")
    assert "did you mean ludus_sums" in near
    offline = refused(capsys, *words, "--suite", "lm-eval:aime25")
    assert "math-ai/aime25" in offline
    assert "HF_HOME" in offline
