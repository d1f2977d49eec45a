"""When which alarm sounded, told from records alone."""

from __future__ import annotations

from typing import Any

from ludus.viewer.alarms import Span, alarm_table, spans
from ludus.viewer.charts import Series, Stretch, line_chart


def alarm(name: str, value: float, limit: float = 0.2, where: str = "kuhn, a") -> dict[str, Any]:
    return {"name": name, "where": where, "value": value, "limit": limit, "message": f"it is {value}"}


def step(number: int, *alarms: dict[str, Any]) -> dict[str, Any]:
    return {"step": number, "learn": {}, "alarms": list(alarms)}


def evaluation(number: int, *alarms: dict[str, Any]) -> dict[str, Any]:
    return {"step": number, "eval": {"games": {}}, "alarms": list(alarms)}


def test_spans_are_unbroken_and_know_their_worst() -> None:
    blind = alarm("ignores_observation", 0.01, 0.05, "kuhn")
    records = [
        evaluation(0, blind),
        step(1, alarm("illegal", 0.3)),
        step(2, alarm("illegal", 0.5), alarm("entropy", 0.01, 0.02, "learner")),
        evaluation(2),
        step(3, alarm("illegal", 0.4), alarm("entropy", 0.005, 0.02, "learner")),
        step(4, alarm("entropy", 0.015, 0.02, "learner")),
        step(5, alarm("illegal", 0.25, 0.1), alarm("illegal", 0.6, 0.1, "kuhn, b")),
    ]
    assert spans(records) == [
        Span("ignores_observation", "kuhn", 0, 0, 0.01, 0.05, "it is 0.01", still=False),
        Span("illegal", "kuhn, a", 1, 3, 0.5, 0.2, "it is 0.5", still=False),
        Span("entropy", "learner", 2, 4, 0.005, 0.02, "it is 0.005", still=False),
        Span("illegal", "kuhn, a", 5, 5, 0.25, 0.1, "it is 0.25"),
        Span("illegal", "kuhn, b", 5, 5, 0.6, 0.1, "it is 0.6"),
    ]


def test_the_table_says_what_still_sounds() -> None:
    table = alarm_table([step(7), step(8, alarm("illegal", 0.3)), step(9, alarm("illegal", 0.4))])
    assert "<td>8</td><td>9, still sounding</td><td>0.4</td><td>0.2</td><td>it is 0.4</td>" in table


def test_silence_and_blindness_are_told_apart() -> None:
    assert alarm_table([step(1), evaluation(1)]) == "<p>No alarm sounded.</p>"
    assert (
        alarm_table([{"step": 1, "learn": {}}]) == alarm_table([]) == "<p>Nothing was watched for alarms.</p>"
    )


def test_names_out_of_a_recipe_stay_text() -> None:
    table = alarm_table([step(1, alarm("<b>", 0.3, where="<script>alert(1)</script>"))])
    assert "<script>" not in table
    assert "<b>" not in table
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in table


def test_a_run_that_flickers_shows_its_newest_alarms() -> None:
    records = [step(n, *([alarm("illegal", 0.3)] if n % 2 else [])) for n in range(1, 301)]
    table = alarm_table(records)
    assert table.count('<td class="worse">illegal</td>') == 100
    assert "50 earlier ones are left out" in table
    assert "<td>299</td>" in table


def test_charts_mark_where_an_alarm_sounded() -> None:
    series = [Series("a", [(10.0, 1.0), (20.0, 2.0), (30.0, 3.0)])]
    chart = line_chart("t", series, str, marked=[Stretch("<x>", 20, 30), Stretch("early", 1, 10)])
    # The axis begins at 52 and is 396 wide; 20 is its middle; what lies before it is drawn where it begins.
    assert '<rect class="alarm" x="249.0" width="200.0"' in chart
    assert '<rect class="alarm" x="51.0" width="2.0"' in chart
    assert "<title>&lt;x&gt;, steps 20 to 30</title>" in chart
    assert "alarm" not in line_chart("t", series, str)
