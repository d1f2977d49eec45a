"""The report: complete, self-contained, and safe whatever a model wrote."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ludus.config import validate
from ludus.errors import UserError
from ludus.train.rundir import RunDir
from ludus.types import Episode, Stop, Turn
from ludus.viewer.report import write_report

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> \" ' & \x00 \x1b[31m \ud800 <|im_end|>"


class Page(HTMLParser):
    """What a browser would see: elements, their attributes, and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def evaluation(step: int, distance: float, score: float) -> dict[str, Any]:
    policy = [{"key": "0pb", "legal": ["pass", "bet"], "probs": [0.75, 0.25], "equilibrium": [1.0, 0.0]}]
    return {
        "step": step,
        "eval": {
            "games": {
                "kuhn_poker": {
                    "opponents": {
                        "random": {
                            "score": score,
                            "ci95": [score - 0.05, score + 0.05],
                            "illegal_rate": 0.125,
                        }
                    },
                    "exploitability": {"exploitability": distance, "ci95": [0.0, 0.5], "policy": policy},
                }
            }
        },
    }


def training(step: int) -> dict[str, Any]:
    game = {"matches": 8, "turns": 20, "tokens": 100, "returns": {"player_0": 0.5, "player_1": -0.5}}
    rates = {
        "illegal_rate": 0.0,
        "forfeit_rate": 0.0,
        "draw_rate": 0.0,
        "truncated_rate": 0.0,
        "reply_tokens": 5.0,
    }
    return {
        "step": step,
        "wall": 60.0 * step,
        "games": {"kuhn_poker": {**game, **rates}},
        "learn": {"loss": 0.1, "grad_norm": None, "entropy": 0.5},
        "speed": {"games_per_s": 4.0, "turns_per_s": 10.0, "tokens_per_s": 50.0},
        "memory_mib": 700.0,
    }


def episode(text: str, action: str | None = "bet", role: str = "player_0") -> Episode:
    turn = Turn(
        0, role, 0, "self", 2, [1], [2, 3], [-0.1, -0.2], Stop.ACTION, action, action is not None, text=text
    )
    return Episode(1, "kuhn_poker", 7, ("self", "self"), (role, "player_1"), [turn], (1.0, -1.0), forfeit=0)


def make_run(path: Path, episodes: list[Episode], records: list[dict[str, Any]], name: str = "t") -> Path:
    config = validate({"name": name, "model": {"path": "m"}, "games": [{"name": "kuhn_poker"}]}, "test")
    with RunDir.create(path, config) as run:
        for record in records:
            run.append(record)
        if episodes:
            run.write_episodes(2, episodes)
    return path


def test_the_page_holds_every_part(tmp_path: Path) -> None:
    records = [evaluation(0, 0.4, 0.5), training(1), training(2), evaluation(2, 0.1, 0.9)]
    run = make_run(tmp_path / "demo", [episode("I hold K.")], records)
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    for expected in (
        "2 steps, 16 matches, 200 sampled tokens, 2.0 minutes, at most 700 MiB resident.",
        "0.400 [0.000, 0.500]",
        "0.100 [0.000, 0.500]",
        "50.0% [45.0%, 55.0%]",
        "90.0% [85.0%, 95.0%]",
        "12.5%",
        "75.0%",
        "in an equilibrium",
        "I hold K.",
        "private",
        "forfeit by player_0",
        'name = "t"',
    ):
        assert expected in page.text, expected
    assert page.tags.count("svg") == 9 + 2  # gradient norm was never a number, one chart less
    assert [p.name for p in run.iterdir() if p.name.startswith(".")] == []


def test_the_page_tells_of_alarms_and_marks_them_in_the_charts(tmp_path: Path) -> None:
    told = {"name": "illegal", "where": f"kuhn_poker, {HOSTILE[:40]}", "value": 0.75, "limit": 0.2}
    records = [training(1), {**training(2), "alarms": [{**told, "message": "75.0% of <b>its</b> replies"}]}]
    page = Page(write_report(make_run(tmp_path / "r", [], records)).read_text(encoding="utf-8"))
    assert "75.0% of <b>its</b> replies" in page.text
    assert "2, still sounding" in page.text
    assert not {"script", "b"} & set(page.tags)
    assert page.tags.count("rect") == 1
    silent = make_run(tmp_path / "silent", [], [{**training(1), "alarms": []}])
    assert "No alarm sounded." in Page(write_report(silent).read_text(encoding="utf-8")).text


def test_the_page_needs_no_network_and_runs_no_script(tmp_path: Path) -> None:
    page = Page(
        write_report(make_run(tmp_path / "r", [episode("x")], [training(1)])).read_text(encoding="utf-8")
    )
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(page.tags)
    assert not [a for a in page.attributes if a[0] in ("src", "href") or a[0].startswith("on")]
    policy = next(value for _, value in page.attributes if "default-src" in value)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    records = [training(1)]
    records[0]["games"][HOSTILE.replace("\ud800", "")] = {"returns": {"<i>": 1.0}, "illegal_rate": 0.1}
    run = make_run(
        tmp_path / "r", [episode(HOSTILE, HOSTILE, role="<u>"), episode("y", None)], records, "<s>"
    )
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert not {"script", "img", "i", "u", "s"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "</pre><script>alert(1)</script><img src=x onerror=alert(2)>" in page.text
    assert "\x00" not in page.text
    assert "\x1b" not in page.text
    assert "no action refused" in page.text


def test_a_run_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "r", [], [])).read_text(encoding="utf-8"))
    assert "No training step has been recorded yet." in page.text
    assert "Nothing was measured in this run." in page.text
    assert "svg" not in page.tags


def test_a_report_replaces_the_one_before(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", [], [training(1)])
    first = write_report(run).read_bytes()
    with RunDir.open(run) as directory:
        directory.append(training(2))
    assert write_report(run).read_bytes() != first


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run directory: config\.toml is missing"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_prompts_are_shown_where_a_checkpoint_has_the_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    run = make_run(tmp_path / "r", [episode("x")], [training(1)])
    model = run / "checkpoints" / "step_00000001" / "model"
    model.mkdir(parents=True)
    Tokenizer(WordLevel({"<unk>": 0, "<you-hold-K>": 1}, unk_token="<unk>")).save(
        str(model / "tokenizer.json")
    )
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "<you-hold-K>" in page.text


def test_rewards_are_drawn_by_name_where_a_game_names_them(tmp_path: Path) -> None:
    def paid(step: int) -> dict[str, Any]:
        record = training(step)
        terms = {"harm": 0.1 * step, "harm/benign": 0.5, "format": 1.0}
        record["games"]["kuhn_poker"]["roles"] = {"player_0": {"terms": terms}, "player_1": {}}
        return record

    page = write_report(make_run(tmp_path / "r", [], [paid(1), paid(2)])).read_text(encoding="utf-8")
    assert "kuhn_poker: what the player_0 is paid for" in page
    assert "what the player_1 is paid for" not in page
    assert "harm/benign" not in page
