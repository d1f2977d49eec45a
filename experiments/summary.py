"""What a sweep found: one number per run and figure, a table of them, and their curves.

Everything here is a function of the runs' records. The same records give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from scipy.stats import t as students_t

from ludus.config import Count, Section
from ludus.records import Record, is_evaluation

Axis = Literal["step", "matches"]

# Okabe and Ito's (2008) colours, told apart by the colour-blind; yellow is left out, as paper is white. The
# dashes tell them apart in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 1)))

# Which key beside a figure holds its 95% interval.
_INTERVALS = {
    "exploitability": "ci95",
    "score": "ci95",
    "mean_return": "return_ci95",
    "illegal_mass": "illegal_ci95",
    "rate": "ci95",
}
_FEW_LINES = 6  # so many curves can carry their intervals and still be read


class Figure(Section):
    """One number to compare the variants by; one panel."""

    # Into a record, such as learn.grad_norm, games.G.reply_tokens or eval.games.G.opponents.random.score; or
    # thoughts.G, the tokens of a thought in game G.
    path: str
    title: str = ""  # the path, unless given
    window: Count = 1  # running mean over the last so many records: for the noisy figures of single steps
    log: bool = False  # a logarithmic axis
    target: float | None = None  # a value to reach, drawn as a thin line


@dataclass(frozen=True, slots=True)
class Run:
    """What there is of one run."""

    records: Sequence[Record]
    finished: bool


@dataclass(frozen=True, slots=True)
class Point:
    """One value of a figure, `at` a step or a number of matches, with its interval where one was measured."""

    at: float
    value: float
    interval: tuple[float, float] | None = None


Runs = Mapping[str, Mapping[int, Run]]  # variant -> seed -> run


def lookup(record: Mapping[str, Any], path: str) -> float | None:
    """The number at a dotted path, list indices included; None where there is none."""
    node: Any = record
    for part in path.split("."):
        if isinstance(node, Mapping):
            node = node.get(part)
        elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        else:
            return None
    return float(node) if isinstance(node, int | float) and not isinstance(node, bool) else None


def curve(records: Sequence[Record], figure: Figure, axis: Axis = "step") -> list[Point]:
    """All values of a figure in a run, each the mean of the last `figure.window` ones (of as many as there
    are at the start). Intervals are left out where values are averaged."""
    parent, _, leaf = figure.path.rpartition(".")
    played = matches(records)
    values: list[float] = []
    found: list[Point] = []
    for record in records:
        value = lookup(record, figure.path)
        if value is None:
            continue
        values.append(value)
        interval = None
        if figure.window == 1 and leaf in _INTERVALS:
            bounds = [lookup(record, f"{parent}.{_INTERVALS[leaf]}.{k}") for k in (0, 1)]
            if bounds[0] is not None and bounds[1] is not None:
                interval = (bounds[0], bounds[1])
        step = record["step"]
        at = step if axis == "step" else played.get(step, 0)
        found.append(Point(at, fmean(values[-figure.window :]), interval))
    return found


def matches(records: Sequence[Record]) -> dict[int, int]:
    """Matches played until the end of each training step."""
    total = 0
    played = {}
    for record in records:
        if not is_evaluation(record):
            total += sum(game["matches"] for game in record["games"].values())
            played[record["step"]] = total
    return played


def mean_curve(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """The mean over runs, wherever every one of them has a value."""
    tables = [{p.at: p.value for p in points} for points in curves if points]
    if not tables:
        return []
    shared = sorted(set(tables[0]).intersection(*tables[1:]))
    return [Point(at, fmean(table[at] for table in tables)) for at in shared]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, Student's 95% interval of it (None for a single value), least and largest."""
    if not values:
        return {"mean": None, "ci95": None, "range": None}
    n, mean = len(values), fmean(values)
    interval = None
    if n > 1:
        half = float(students_t.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n)
        interval = [mean - half, mean + half]
    return {"mean": mean, "ci95": interval, "range": [min(values), max(values)]}


def summarise(runs: Runs, figures: Sequence[Figure]) -> dict[str, Any]:
    """The content of summary.json. Means are over the finished runs alone."""
    return {
        "figures": [figure.model_dump(mode="json", exclude_none=True) for figure in figures],
        "variants": {
            name: {
                "runs": {str(seed): _run(run, figures) for seed, run in sorted(seeds.items())},
                "means": {f.path: _means(seeds, f) for f in figures},
            }
            for name, seeds in runs.items()
        },
    }


def _run(run: Run, figures: Sequence[Figure]) -> dict[str, Any]:
    training = [r for r in run.records if not is_evaluation(r)]
    played = matches(run.records)
    values = {}
    for figure in figures:
        points = curve(run.records, figure)
        values[figure.path] = (
            {"first": _first(run, figure), "last": points[-1].value, "at_step": points[-1].at}
            if points
            else None
        )
    return {
        "finished": run.finished,
        "steps": training[-1]["step"] if training else 0,
        "matches": played[training[-1]["step"]] if training else 0,
        "seconds": training[-1]["wall"] if training else 0.0,
        "figures": values,
    }


def _first(run: Run, figure: Figure) -> float:
    """The first value; of an averaged figure the first full mean, or as full as it gets."""
    points = curve(run.records, figure)
    return points[min(figure.window, len(points)) - 1].value


def _means(seeds: Mapping[int, Run], figure: Figure) -> dict[str, Any]:
    ends = [
        (_first(run, figure), points[-1].value)
        for _, run in sorted(seeds.items())
        if run.finished and (points := curve(run.records, figure))
    ]
    return {"first": spread([a for a, _ in ends]), "last": spread([b for _, b in ends])}


def markdown(summary: Mapping[str, Any], seeds: Sequence[int]) -> str:
    """summary.md: a table per figure, one of the times, and what is not finished."""
    parts = ["![curves](figure.svg)"]
    variants = summary["variants"]
    heads = " | ".join(f"seed {seed}" for seed in seeds)
    rule = "|---" * (len(seeds) + 4) + "|"
    for figure in summary["figures"]:
        path = figure["path"]
        window = f", mean of {figure['window']} steps" if figure["window"] > 1 else ""
        lines = [
            f"### {figure['title'] or path}",
            f"`{path}`{window}: at the start (mean over seeds), and at the end.",
            "",
            f"| variant | start | {heads} | mean [95%] | range |",
            rule,
        ]
        for name, variant in variants.items():
            found = variant["means"][path]
            cells = [_cell(variant["runs"].get(str(seed)), path) for seed in seeds]
            lines.append(
                f"| {name} | {_number(found['first']['mean'])} | {' | '.join(cells)} "
                f"| {_mean(found['last'])} | {_range(found['last'])} |"
            )
        parts.append("\n".join(lines))
    parts.append(_times(variants, seeds, heads))
    unfinished = [
        f"{name}, seed {seed}: step {run['steps']}"
        for name, variant in variants.items()
        for seed, run in variant["runs"].items()
        if not run["finished"]
    ]
    if unfinished:
        parts.append(f"Not finished, and in no mean: {'; '.join(unfinished)}.")
    return "\n\n".join(parts) + "\n"


def _times(variants: Mapping[str, Any], seeds: Sequence[int], heads: str) -> str:
    lines = [
        "### Seconds of training",
        "Measurements and checkpoints not counted.",
        "",
        f"| variant | steps | matches | {heads} |",
        "|---" * (len(seeds) + 3) + "|",
    ]
    for name, variant in variants.items():
        runs = [variant["runs"].get(str(seed)) for seed in seeds]
        steps = max((run["steps"] for run in runs if run), default=0)
        played = max((run["matches"] for run in runs if run), default=0)
        cells = [f"{run['seconds']:.0f}" if run else "-" for run in runs]
        lines.append(f"| {name} | {steps} | {played:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(run: Mapping[str, Any] | None, path: str) -> str:
    if run is None or run["figures"][path] is None:
        return "-"
    found = run["figures"][path]
    later = "" if run["finished"] else f" (step {found['at_step']:g})"
    return _number(found["last"]) + later


def _mean(found: Mapping[str, Any]) -> str:
    if found["ci95"] is None:
        return _number(found["mean"])
    low, high = found["ci95"]
    return f"{_number(found['mean'])} [{_number(low)}, {_number(high)}]"


def _range(found: Mapping[str, Any]) -> str:
    return "-" if found["range"] is None else " to ".join(_number(x) for x in found["range"])


def _number(value: float | None) -> str:
    """Three significant digits, and no exponent for what is shorter without."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:#.3g}".rstrip(".")


def draw(runs: Runs, figures: Sequence[Figure], axis: Axis, file: Path) -> None:
    """Write the curves as SVG, a panel per figure: a colour per variant, thin lines for the seeds, a thick
    one for their mean. The measurements' own 95% intervals are there where lines are few."""
    from matplotlib import figure as plotting
    from matplotlib import rc_context

    across = min(2, len(figures))
    down = math.ceil(len(figures) / across)
    with rc_context({"svg.hashsalt": "ludus", "svg.fonttype": "none", "font.size": 9}):
        sheet = plotting.Figure(figsize=(5.2 * across, 3.6 * down + 0.5), layout="constrained")
        panels = sheet.subplots(down, across, squeeze=False).flatten()
        for panel, figure in zip(panels, figures, strict=False):
            _panel(panel, runs, figure, axis)
        for panel in panels[len(figures) :]:
            panel.set_visible(False)
        handles, labels = panels[0].get_legend_handles_labels()
        if handles:
            sheet.legend(
                handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False
            )
        sheet.savefig(file, metadata={"Date": None})


def _panel(panel: Any, runs: Runs, figure: Figure, axis: Axis) -> None:
    lines = sum(len(seeds) for seeds in runs.values())
    for number, (name, seeds) in enumerate(runs.items()):
        style = {"color": COLOURS[number % len(COLOURS)]}
        curves = [curve(run.records, figure, axis) for _, run in sorted(seeds.items())]
        for points in curves:
            panel.plot([p.at for p in points], [p.value for p in points], lw=0.7, alpha=0.45, **style)
            if lines <= _FEW_LINES:
                for p in points:
                    if p.interval is not None:
                        panel.plot([p.at, p.at], p.interval, lw=0.7, alpha=0.45, **style)
        mean = mean_curve(curves)
        dash = DASHES[number % len(DASHES)]
        panel.plot([p.at for p in mean], [p.value for p in mean], lw=2, ls=dash, label=name, **style)
    if figure.target is not None:
        panel.axhline(figure.target, color="0.4", lw=0.8)
    if figure.log:
        panel.set_yscale("log")
    smooth = f" (running mean of {figure.window})" if figure.window > 1 else ""
    panel.set_title((figure.title or figure.path) + smooth, parse_math=False, fontsize=9)
    panel.set_xlabel("training steps" if axis == "step" else "matches played")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(alpha=0.25, lw=0.5)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
