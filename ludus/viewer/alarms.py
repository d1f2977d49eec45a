"""When which alarm sounded, out of the records of a run: a table, and stretches of steps for the charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ludus.records import Record, is_evaluation
from ludus.viewer.markup import text

_MOST_ROWS = 100


@dataclass(slots=True)
class Span:
    """An alarm from the first to the last record in a row after which it sounded, and it at its worst."""

    name: str
    where: str
    start: int
    end: int
    value: float
    limit: float
    message: str
    still: bool = True  # it sounds at the end of the records


def spans(records: Sequence[Record]) -> list[Span]:
    """All spans in a run's records, by their first step."""
    steps = [r for r in records if not is_evaluation(r)]
    evaluations = [r for r in records if is_evaluation(r)]
    return sorted(_spans(steps) + _spans(evaluations), key=lambda span: span.start)


def alarm_table(records: Sequence[Record]) -> str:
    """One row per span; a sentence where there is none."""
    if not any("alarms" in record for record in records):
        return "<p>Nothing was watched for alarms.</p>"
    found = spans(records)
    if not found:
        return "<p>No alarm sounded.</p>"
    rows = "".join(_row(span) for span in found[-_MOST_ROWS:])
    titles = ("alarm", "where", "from step", "to step", "at its worst", "threshold", "what it says")
    note = (
        "<p>Red bars along the steps of a chart mark when an alarm about its figure sounded. What each alarm "
        "means is told in docs/truth.md.</p>"
    )
    if len(found) > _MOST_ROWS:
        note += f"<p>{len(found) - _MOST_ROWS} earlier ones are left out; metrics.jsonl has them all.</p>"
    return f"<table><tr>{''.join(f'<th>{title}</th>' for title in titles)}</tr>{rows}</table>{note}"


def _spans(records: Sequence[Record]) -> list[Span]:
    found: list[Span] = []
    sounding: dict[tuple[str, str], Span] = {}
    for record in records:
        alarms = {(a["name"], a["where"]): a for a in record.get("alarms", [])}
        for key in sounding.keys() - alarms.keys():
            sounding.pop(key).still = False
        for key, alarm in alarms.items():
            if key not in sounding:
                sounding[key] = Span(start=record["step"], end=record["step"], **alarm)
                found.append(sounding[key])
            span = sounding[key]
            span.end = record["step"]
            above = alarm["value"] > alarm["limit"]
            if alarm["value"] > span.value if above else alarm["value"] < span.value:
                span.value, span.limit, span.message = alarm["value"], alarm["limit"], alarm["message"]
    return found


def _row(span: Span) -> str:
    end = f"{span.end}, still sounding" if span.still else f"{span.end}"
    figures = (f"{span.start}", end, f"{span.value:.3g}", f"{span.limit:.3g}", span.message)
    cells = "".join(f"<td>{text(cell)}</td>" for cell in (span.where, *figures))
    return f'<tr><td class="worse">{text(span.name)}</td>{cells}</tr>'
