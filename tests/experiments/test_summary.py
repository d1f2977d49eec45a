"""Numbers of a sweep, worked out by hand from small made-up metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import thoughts
from summary import Figure, Point, Run, curve, draw, lookup, markdown, matches, mean_curve, spread, summarise

DISTANCE = Figure(path="eval.games.kuhn.exploitability.exploitability", title="distance", target=0.05)
NORM = Figure(path="learn.grad_norm", window=2)


def step(number: int, norm: float | None) -> dict[str, Any]:
    games = {"kuhn": {"matches": 5}, "ttt": {"matches": 2}}
    return {"step": number, "wall": 1.5 * number, "games": games, "learn": {"grad_norm": norm}}


def measured(number: int, distance: float) -> dict[str, Any]:
    found = {"exploitability": distance, "ci95": [distance - 0.01, distance + 0.02]}
    return {"step": number, "eval": {"games": {"kuhn": {"exploitability": found}}}}


def run(*distances: float, norms: tuple[float | None, ...] = (4.0, 2.0, 1.0), finished: bool = True) -> Run:
    """Measured before the first and after each step."""
    records = [measured(0, distances[0])]
    for k, distance in enumerate(distances[1:], start=1):
        records += [step(k, norms[k - 1]), measured(k, distance)]
    return Run(records, finished)


RUNS = {
    "plain": {0: run(0.4, 0.3, 0.1), 1: run(0.4, 0.3, 0.2), 2: run(0.4, 0.3, 0.3)},
    "magnet": {0: run(0.4, 0.2, 0.05, 0.04), 1: run(0.4, 0.25, finished=False)},
}


def test_lookup() -> None:
    record = {"a": {"b": [1, {"c": 2.5}], "no": None, "flag": True, "word": "x"}}
    assert lookup(record, "a.b.0") == 1.0
    assert lookup(record, "a.b.1.c") == 2.5
    for path in ("a.b.2", "a.b.x", "a.no", "a.flag", "a.word", "a.b", "z.b", "a.word.c"):
        assert lookup(record, path) is None


def test_measurements_keep_their_intervals_and_training_curves_are_averaged() -> None:
    records = run(0.4, 0.3, 0.1, 0.2).records
    points = curve(records, DISTANCE)
    assert [(p.at, p.value) for p in points] == [(0, 0.4), (1, 0.3), (2, 0.1), (3, 0.2)]
    assert points[1].interval == pytest.approx((0.29, 0.32))
    # The mean of the last two of 4, 2, 1; the first has only itself.
    assert curve(records, NORM) == [Point(1, 4.0), Point(2, 3.0), Point(3, 1.5)]


def test_a_missing_number_is_left_out() -> None:
    records = run(0.4, 0.3, 0.1, 0.2, norms=(4.0, None, 1.0)).records
    assert curve(records, NORM) == [Point(1, 4.0), Point(3, 2.5)]
    assert curve(records, Figure(path="learn.magnet_kl")) == []


def test_curves_over_matches() -> None:
    records = run(0.4, 0.3, 0.1).records
    assert matches(records) == {1: 7, 2: 14}
    assert [p.at for p in curve(records, DISTANCE, "matches")] == [0, 7, 14]
    assert [p.at for p in curve(records, NORM, "matches")] == [7, 14]


def test_the_mean_curve_ends_where_the_first_run_does() -> None:
    curves = [curve(r.records, DISTANCE) for r in RUNS["magnet"].values()]
    assert mean_curve(curves) == [Point(0, 0.4), Point(1, 0.225)]
    assert mean_curve([[], []]) == []


def test_spread() -> None:
    found = spread([1.0, 2.0, 3.0])
    assert (found["mean"], found["range"]) == (2.0, [1.0, 3.0])
    # Student's t with 2 degrees of freedom: 4.30265 standard errors of 1 / sqrt(3).
    assert found["ci95"] == pytest.approx([2.0 - 2.48414, 2.0 + 2.48414], abs=1e-5)
    assert spread([2.0]) == {"mean": 2.0, "ci95": None, "range": [2.0, 2.0]}
    assert spread([]) == {"mean": None, "ci95": None, "range": None}


def test_summary() -> None:
    found = summarise(RUNS, [DISTANCE, NORM])["variants"]
    plain = found["plain"]["runs"]["2"]
    assert plain["figures"][DISTANCE.path] == {"first": 0.4, "last": 0.3, "at_step": 2}
    # First and last full mean of two steps: both (4 + 2) / 2.
    assert plain["figures"][NORM.path] == {"first": 3.0, "last": 3.0, "at_step": 2}
    assert (plain["steps"], plain["matches"], plain["seconds"]) == (2, 14, 3.0)
    last = found["plain"]["means"][DISTANCE.path]["last"]
    assert last["mean"] == pytest.approx(0.2)
    assert last["range"] == [0.1, 0.3]
    # The run that is not finished counts in no mean.
    assert found["magnet"]["means"][DISTANCE.path]["last"] == {
        "mean": 0.04,
        "ci95": None,
        "range": [0.04] * 2,
    }


def test_tables() -> None:
    text = markdown(summarise(RUNS, [DISTANCE]), seeds=[0, 1, 2])
    assert "| variant | start | seed 0 | seed 1 | seed 2 | mean [95%] | range |" in text
    assert "| plain | 0.400 | 0.100 | 0.200 | 0.300 | 0.200 [-0.0484, 0.448] | 0.100 to 0.300 |" in text
    assert "| magnet | 0.400 | 0.0400 | 0.250 (step 1) | - | 0.0400 | 0.0400 to 0.0400 |" in text
    assert "| plain | 2 | 14 | 3 | 3 | 3 |" in text
    assert "Not finished, and in no mean: magnet, seed 1: step 1." in text


def test_numbers_of_a_thousand_have_no_exponent() -> None:
    text = markdown(summarise({"big": {0: run(999.6, 1234.0)}}, [DISTANCE]), seeds=[0])
    assert "| big | 1,000 | 1,234 | 1,234 | 1,234 to 1,234 |" in text


def test_the_figure_is_the_same_for_the_same_data(tmp_path: Path) -> None:
    figures = [DISTANCE, NORM, Figure(path="learn.absent", title="nothing <yet>", log=True)]
    for name in ("a.svg", "b.svg"):
        draw(RUNS, figures, "step", tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    texts = [
        node.text for node in ElementTree.parse(tmp_path / "a.svg").iter("{http://www.w3.org/2000/svg}text")
    ]
    for word in ("distance", "learn.grad_norm (running mean of 2)", "nothing <yet>", "plain", "magnet"):
        assert word in texts


def test_length_of_a_thought() -> None:
    closing = 9
    assert thoughts.length([1, 2, 3, 9, 5], closing) == 3
    assert thoughts.length([1, 9, 3, 9, 5], closing) == 3  # the last one opens the answer
    assert thoughts.length([9, 5], closing) == 0
    assert thoughts.length([1, 2], closing) == 2  # cut off while it was thinking
    assert thoughts.length([], closing) == 0
