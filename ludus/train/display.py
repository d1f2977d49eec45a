"""What a person sees while a run trains: a live table on a terminal, one plain line per step elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ludus.config import RunConfig
from ludus.records import Record, changes, is_evaluation, learnt, percent
from ludus.train.rundir import RunDir
from ludus.truth.alarms import Alarm

_GAME_COLUMNS = ("game", "matches", "return per seat", "illegal", "draws", "forfeits", "reply tokens")


class Display:
    """Shows training records and evaluations as they come (see `ludus.records` for their form).

    `stream` decides the form: a live table where it is a terminal, plain lines otherwise.
    """

    def __init__(self, config: RunConfig, run: RunDir, stream: TextIO | None = None) -> None:
        self._run = run
        self._name = config.name
        self._steps = config.train.steps
        self._console = Console(file=stream or sys.stdout, highlight=False)
        self._console.soft_wrap = not self._console.is_terminal  # one step stays one line in a log
        self._live: Live | None = None
        self._started = time.monotonic()
        self._shown = 0  # steps shown since then
        self._evaluation: Mapping[str, Any] = {}
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=False)
            self._live.start()
        self._console.print(f"run {config.name}: {run.path}, {config.train.steps} steps", markup=False)

    def step(self, record: Record, sounding: Sequence[Alarm] = ()) -> None:
        """Show one training step, and the alarms that sound after it."""
        self._shown += 1
        if self._live is not None:
            self._live.update(self._table(record, sounding), refresh=True)
        else:
            line = _line(record, self._steps, self._times(record))
            if sounding:
                line += " | alarms: " + ", ".join(f"{alarm.name} ({alarm.where})" for alarm in sounding)
            self._console.print(line, markup=False)

    def evaluation(self, record: Record) -> None:
        """Show one evaluation."""
        self._evaluation = record["eval"]
        for line in evaluation_lines(record["eval"]):
            self._console.print(f"step {record['step']} measured: {line}", markup=False)
        self._started = time.monotonic()  # the estimate of what is left is made of training steps alone
        self._shown = 0

    def note(self, message: str) -> None:
        """Print one line above the table."""
        self._console.print(message, markup=False)

    def close(self) -> None:
        """Leave the terminal in order; safe to call twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def summary(self) -> None:
        """Print the first and the last evaluation of the whole run side by side."""
        self.close()
        print_summary(self._run.records(), self._console)
        self._console.print(f"run directory: {self._run.path}", markup=False)

    def _times(self, record: Record) -> tuple[float, float]:
        """Seconds since the run began, and seconds still to go."""
        each = (time.monotonic() - self._started) / max(self._shown, 1)
        return record.get("wall") or 0.0, each * max(self._steps - record["step"], 0)

    def _table(self, record: Record, sounding: Sequence[Alarm]) -> Group:
        elapsed, left = self._times(record)
        speed = record.get("speed", {})
        head = Text(
            f"{self._name}  step {record['step']}/{self._steps}  {_clock(elapsed)} elapsed, "
            f"{_clock(left)} to go  {_number(speed.get('games_per_s'))} games/s  "
            f"{_number(speed.get('tokens_per_s'))} tokens/s"
        )
        table = Table(*_GAME_COLUMNS, box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name, game in record.get("games", {}).items():
            table.add_row(*_game_cells(name, game))
        alarms = [Text(f"alarm: {alarm}", style="bold red") for alarm in sounding]
        return Group(head, table, Text(_learn(record)), *alarms)


def print_summary(records: list[Record], console: Console | None = None) -> None:
    """Print "before -> after" from the first and the last evaluation among `records`."""
    out = console or Console(highlight=False)
    evaluations = [r for r in records if is_evaluation(r)]
    if not evaluations:
        out.print("nothing was measured in this run")
        return
    first, last = evaluations[0], evaluations[-1]
    rows = changes(first["eval"], last["eval"])
    table = Table(
        "game",
        "figure",
        f"before (step {first['step']})",
        f"after (step {last['step']})",
        title="Before and after",
        title_justify="left",
    )
    for row in rows:
        style = {True: "green", False: "red", None: ""}[row.better]
        table.add_row(Text(row.game), Text(row.figure), Text(row.before), Text(row.after, style=style))
    if out.is_terminal:
        out.print(table)
        return
    for row in rows:
        out.print(f"{row.game}: {row.figure}: {row.before} -> {row.after}", markup=False)


def evaluation_lines(evaluation: Mapping[str, Any]) -> list[str]:
    """One short line per game of an evaluation."""
    lines = []
    for name, game in evaluation.get("games", {}).items():
        parts = []
        exact = game.get("exploitability")
        if exact:
            parts.append(f"exploitability {_number(exact.get('exploitability'))}")
            if exact.get("exploitability") is None:
                parts[-1] += f" (illegal {_percent(exact.get('illegal_mass'))})"
        for opponent, result in game.get("opponents", {}).items():
            parts.append(
                f"score vs {opponent} {_percent(result.get('score'))} "
                f"(illegal {_percent(result.get('illegal_rate'))})"
            )
        lines.append(f"{name}: " + ", ".join(parts))
    return lines


def _line(record: Record, steps: int, times: tuple[float, float]) -> str:
    speed = record.get("speed", {})
    parts = [f"step {record['step']}/{steps}"]
    for name, game in record.get("games", {}).items():
        _, matches, returns, illegal, draws, forfeits, tokens = _game_cells(name, game)
        parts.append(
            f"{name}: {matches} matches, return {returns}, illegal {illegal}, draws {draws}, "
            f"forfeits {forfeits}, reply {tokens} tokens"
        )
    parts.append(_learn(record))
    parts.append(
        f"{_number(speed.get('games_per_s'))} games/s, {_number(speed.get('tokens_per_s'))} tokens/s, "
        f"{_clock(times[0])} elapsed, {_clock(times[1])} to go"
    )
    return " | ".join(parts)


def _game_cells(name: str, game: Mapping[str, Any]) -> tuple[str, ...]:
    returns = " ".join(f"{role} {_signed(value)}" for role, value in game.get("returns", {}).items())
    return (
        name,
        str(game.get("matches", "-")),
        returns,
        _percent(game.get("illegal_rate")),
        _percent(game.get("draw_rate")),
        _percent(game.get("forfeit_rate")),
        _number(game.get("reply_tokens")),
    )


def _learn(record: Record) -> str:
    text = "; ".join(
        f"{name}{': ' if name else ''}loss {_number(learn.get('loss'))}, gradient "
        f"{_number(learn.get('grad_norm'))}, entropy {_number(learn.get('entropy'))}"
        + (f", supervised {_number(learn['sft_loss'])}" if "sft_loss" in learn else "")
        for name, learn in learnt(record).items()
    )
    masked = {reason: count for reason, count in record.get("masked", {}).items() if count}
    if masked:
        text += ", masked " + " ".join(f"{reason} {count}" for reason, count in masked.items())
    return text


def _percent(value: float | None) -> str:
    return "-" if value is None else percent(value)


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def _number(value: float | None) -> str:
    """Three or more significant figures, without exponents where a person reads them easily."""
    if value is None:
        return "-"
    if value != 0 and abs(value) < 0.001:
        return f"{value:.1e}"
    if abs(value) < 10:
        return f"{value:.3f}"
    return f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"
