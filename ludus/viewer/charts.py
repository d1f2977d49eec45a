"""Line charts as inline SVG: no script, no network, readable in light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ludus.viewer.markup import text

Point = tuple[float, float]

COLOURS = 6  # the style sheet has .c0 ... .c5
_WIDTH, _HEIGHT = 460, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 28
_MOST_POINTS = 160


@dataclass(frozen=True, slots=True)
class Series:
    """One line. `bounds[k]` is the interval around point k, or None where there is none."""

    name: str
    points: Sequence[Point]
    bounds: Sequence[tuple[float, float] | None] = ()
    dots: bool = False  # mark each point: for few, measured ones


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of the horizontal axis that is marked, both ends included."""

    name: str
    start: float
    end: float


def line_chart(
    title: str,
    series: Sequence[Series],
    show: Callable[[float], str],
    *,
    zero: bool = False,
    marked: Sequence[Stretch] = (),
) -> str:
    """A <figure> with one chart; "" where no series has a point.

    `show` writes a value of the vertical axis. `zero` puts 0 on that axis. Long series are drawn as means
    over equal stretches of steps. What is `marked` is a bar along the horizontal axis.
    """
    drawn = [s if s.dots else _thinned(s) for s in series if s.points]
    if not drawn:
        return ""
    xs = [x for s in drawn for x, _ in s.points]
    ys = [y for s in drawn for _, y in s.points]
    ys += [edge for s in drawn for pair in s.bounds if pair is not None for edge in pair]
    ticks_y = ticks(min(ys + [0.0] * zero), max(ys + [0.0] * zero))
    ticks_x = [t for t in ticks(min(xs), max(xs)) if t == round(t)]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = ticks_y[0], ticks_y[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{text(title)}">']
    for tick in ticks_y:
        _, y = at(x_low, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text(show(tick))}</text>')
    for tick in ticks_x:
        if x_low <= tick <= x_high:
            x, _ = at(tick, y_low)
            parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{tick:g}</text>')
    for stretch in marked:
        (left, floor), (right, _) = (
            at(min(max(x, x_low), x_high), y_low) for x in (stretch.start, stretch.end)
        )
        place = f'x="{left - 1:.1f}" width="{right - left + 2:.1f}" y="{floor - 2:.1f}" height="4"'
        label = text(f"{stretch.name}, steps {stretch.start:g} to {stretch.end:g}")
        parts.append(f'<rect class="alarm" {place}><title>{label}</title></rect>')
    parts += [_drawing(s, k % COLOURS, at, show) for k, s in enumerate(drawn)]
    parts.append("</svg>")
    legend = "".join(f'<span class="key c{k % COLOURS}">{text(s.name)}</span>' for k, s in enumerate(drawn))
    return (
        f"<figure><figcaption>{text(title)}</figcaption>{''.join(parts)}"
        f'<div class="legend">{legend}</div></figure>'
    )


def ticks(low: float, high: float) -> list[float]:
    """A few round numbers that enclose [low, high]."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = (low - 0.5 * abs(low), high + 0.5 * abs(high)) if low else (0.0, 1.0)
    rough = (high - low) / 5
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _drawing(
    series: Series,
    colour: int,
    at: Callable[[float, float], tuple[float, float]],
    show: Callable[[float], str],
) -> str:
    path = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in series.points)
    parts = [f'<g class="c{colour}"><polyline points="{path}"/>']
    for (x, _), pair in zip(series.points, series.bounds, strict=False):
        if pair is not None:
            (px, low), (_, high) = at(x, pair[0]), at(x, pair[1])
            parts.append(f'<line class="bar" x1="{px:.1f}" x2="{px:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
    if series.dots:
        for x, y in series.points:
            px, py = at(x, y)
            label = text(f"{series.name}, step {x:g}: {show(y)}")
            parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3"><title>{label}</title></circle>')
    parts.append("</g>")
    return "".join(parts)


def _thinned(series: Series) -> Series:
    """Means over equal stretches, where there are more points than the eye can tell apart."""
    total = len(series.points)
    if total <= _MOST_POINTS:
        return series
    edges = [k * total // _MOST_POINTS for k in range(_MOST_POINTS + 1)]
    stretches = [series.points[a:b] for a, b in pairwise(edges)]
    means = [(math.fsum(x for x, _ in s) / len(s), math.fsum(y for _, y in s) / len(s)) for s in stretches]
    return Series(series.name, means)
