"""Charts: what is drawn stands where the numbers say."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ludus.viewer.charts import Series, line_chart, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 0.45, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        (-1.0, 1.0, [-1.0, -0.5, 0.0, 0.5, 1.0]),
        (0.0, 400.0, [0.0, 100.0, 200.0, 300.0, 400.0]),
        (0.0, 0.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


@settings(max_examples=100, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_enclose_what_is_drawn(low: float, width: float) -> None:
    marks = ticks(low, low + width)
    slack = 1e-6 * (marks[1] - marks[0])
    assert marks[0] <= low + slack
    assert marks[-1] >= low + width - slack
    assert 2 <= len(marks) <= 8
    assert marks == sorted(set(marks))


def test_points_stand_where_the_axes_say() -> None:
    chart = line_chart("t", [Series("s", [(0, 0.0), (10, 1.0)], dots=True)], str)
    circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', chart)
    # Plot area: x from 52 to 460 - 12, y from 230 - 28 up to 10; y axis 0 to 1.
    assert circles == [("52.0", "202.0"), ("448.0", "10.0")]


def test_intervals_are_drawn_where_there_are_some() -> None:
    series = Series("s", [(0, 0.5), (10, 0.5), (20, 0.5)], [(0.0, 1.0), None, (0.25, 0.75)], dots=True)
    bars = re.findall(
        r'class="bar" x1="([\d.]+)" x2="[\d.]+" y1="([\d.]+)" y2="([\d.]+)"', line_chart("t", [series], str)
    )
    assert bars == [("52.0", "202.0", "10.0"), ("448.0", "154.0", "58.0")]


def test_long_series_become_means_over_equal_stretches() -> None:
    chart = line_chart("t", [Series("s", [(k, 1.0) for k in range(3200)])], str)
    line = re.search(r'<polyline points="([^"]+)"', chart)
    assert line is not None
    assert len(line[1].split()) == 160
    assert len({point.split(",")[1] for point in line[1].split()}) == 1


def test_nothing_to_draw_is_nothing() -> None:
    assert line_chart("t", [], str) == ""
    assert line_chart("t", [Series("s", [])], str) == ""


def test_one_point_is_drawn() -> None:
    assert "<circle" in line_chart("t", [Series("s", [(0, 0.5)], dots=True)], str)


def test_names_are_escaped() -> None:
    chart = line_chart("<b>&", [Series('"><script>', [(0, 1.0)], dots=True)], lambda y: f"<{y}>")
    ET.fromstring(chart)
    assert "<script>" not in chart
    assert "<b>" not in chart
