"""One self-contained report.html over a run directory: figures, tables, transcripts, configuration.

Reads files alone. Everything that a model or a recipe wrote is escaped, and the page forbids scripts and
the network to itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ludus.errors import UserError
from ludus.records import (
    Record,
    changes,
    episode_files,
    is_evaluation,
    learnt,
    percent,
    read_episodes,
    read_metrics,
)
from ludus.types import Episode, Turn
from ludus.viewer.alarms import alarm_table, spans
from ludus.viewer.charts import Series, Stretch, line_chart
from ludus.viewer.league import league_section
from ludus.viewer.markup import text
from ludus.viewer.style import STYLE

_SAMPLES_PER_GAME = 2
_LAWS = ("probs", "equilibrium")  # of a policy's entries: what the model plays, what CFR+ found


def write_report(run: Path) -> Path:
    """Write run/report.html and return its path. Raises UserError where `run` is no run directory."""
    config = run / "config.toml"
    if not config.is_file():
        raise UserError(f"{run} is no run directory: {config.name} is missing")
    records = read_metrics(run / "metrics.jsonl")
    training = [r for r in records if not is_evaluation(r)]
    evaluations = [r for r in records if is_evaluation(r)]
    sections = [
        _before_after(evaluations),
        _section("The truth", _truth_charts(evaluations)),
        _section("Alarms", alarm_table(records)),
        _section("League", league_section(training)),
        _section("Training", _training_charts(training)),
        _section("Policy at the last measurement", _policies(evaluations)),
        _section("Transcripts of the last step on disk", _transcripts(run)),
        _section("Configuration", f"<pre>{text(config.read_text(encoding='utf-8'))}</pre>"),
    ]
    name = run.resolve().name
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Ludus: {text(name)}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{text(name)}</h1><p>{text(_summary(training))}</p></header>"
        f"<main>{''.join(sections)}</main></body></html>\n"
    )
    target = run / "report.html"
    temporary = run / f".tmp-report-{os.getpid()}.html"
    try:
        temporary.write_text(page, encoding="utf-8", errors="replace")  # lone surrogates become "?"
        temporary.replace(target)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {target}: {e.strerror}") from e
    return target


def _summary(training: Sequence[Record]) -> str:
    if not training:
        return "No training step has been recorded yet."
    games = sum(g.get("matches", 0) for r in training for g in r.get("games", {}).values())
    tokens = sum(g.get("tokens", 0) for r in training for g in r.get("games", {}).values())
    last = training[-1]
    line = f"{last['step']} steps, {games:,} matches, {tokens:,} sampled tokens"
    if last.get("wall"):
        line += f", {last['wall'] / 60:.1f} minutes"
    if last.get("memory_mib"):
        line += f", at most {last['memory_mib']:,.0f} MiB resident"
    return line + "."


def _section(title: str, body: str) -> str:
    return f"<section><h2>{text(title)}</h2>{body}</section>" if body else ""


def _before_after(evaluations: Sequence[Record]) -> str:
    if not evaluations:
        return _section("Before and after", "<p>Nothing was measured in this run.</p>")
    first, last = evaluations[0], evaluations[-1]
    rows = []
    for row in changes(first["eval"], last["eval"]):
        kind = {True: "better", False: "worse", None: ""}[row.better]
        cells = (row.game, row.figure, row.before)
        rows.append(
            "<tr>" + "".join(f"<td>{text(c)}</td>" for c in cells) + f'<td class="{kind}">'
            f"{text(row.after)}</td></tr>"
        )
    head = _head("game", "figure", f"before (step {first['step']})", f"after (step {last['step']})")
    note = "<p>In brackets: 95% intervals. A score is the share of wins plus half of the draws.</p>"
    return _section("Before and after", f"<table>{head}{''.join(rows)}</table>{note}")


def _truth_charts(evaluations: Sequence[Record]) -> str:
    exact: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    scores: dict[tuple[str, str], list[tuple[int, Mapping[str, Any]]]] = {}
    for record in evaluations:
        for game, result in record["eval"].get("games", {}).items():
            if result.get("exploitability"):
                exact.setdefault(game, []).append((record["step"], result["exploitability"]))
            for opponent, figures in result.get("opponents", {}).items():
                scores.setdefault((game, opponent), []).append((record["step"], figures))
    charts = [
        line_chart(
            "Exploitability (0 is an equilibrium)",
            [_measured(game, "exploitability", rows) for game, rows in exact.items()],
            _number,
            zero=True,
        )
    ]
    for game in dict.fromkeys(game for game, _ in scores):
        against = {opponent: rows for (g, opponent), rows in scores.items() if g == game}
        charts.append(
            line_chart(
                f"{game}: score against fixed opponents",
                [_measured(opponent, "score", rows) for opponent, rows in against.items()],
                percent,
            )
        )
    return "".join(charts)


def _measured(name: str, key: str, rows: Iterable[tuple[int, Mapping[str, Any]]]) -> Series:
    known = [(step, row) for step, row in rows if row.get(key) is not None]
    bounds = [
        (pair[0], pair[1]) if (pair := row.get("ci95")) and None not in pair else None for _, row in known
    ]
    return Series(name, [(step, row[key]) for step, row in known], bounds, dots=True)


def _training_charts(training: Sequence[Record]) -> str:
    games = list(dict.fromkeys(game for r in training for game in r.get("games", {})))
    alarms = spans(training)

    def sounded(*names: str, where: str | None = None) -> list[Stretch]:
        """Where the alarms that are about a chart's figure sounded."""
        mine = [s for s in alarms if s.name in names and where in (None, s.where)]
        return [Stretch(f"{s.name} ({s.where})", s.start, s.end) for s in mine]

    def per_game(title: str, key: str, show: Callable[[float], str], alarm: str) -> str:
        lines = [Series(game, _points(training, "games", game, key)) for game in games]
        return line_chart(title, lines, show, zero=True, marked=sounded(alarm))

    def overall(title: str, section: str, keys: Sequence[str]) -> str:
        lines = [Series(key, _points(training, section, key)) for key in keys]
        return line_chart(title, lines, _number)

    def per_policy(title: str, key: str, *names: str) -> str:
        policies = dict.fromkeys(policy for record in training for policy in learnt(record))
        paths = {policy: ("learn", policy, key) if policy else ("learn", key) for policy in policies}
        lines = [Series(policy or key, _points(training, *path)) for policy, path in paths.items()]
        return line_chart(title, lines, _number, marked=sounded(*names))

    charts = []
    for game in games:
        roles = list(
            dict.fromkeys(role for r in training for role in _path(r, "games", game, "returns") or ())
        )
        lines = [Series(role, _points(training, "games", game, "returns", role)) for role in roles]
        gaps = sounded("seat_gap", where=game)
        charts.append(line_chart(f"{game}: mean return per role", lines, _number, zero=True, marked=gaps))
        charts += [_named_rewards(training, game, role) for role in roles]
    charts += [
        per_game("Illegal replies", "illegal_rate", percent, "illegal"),
        per_game("Reply length (tokens)", "reply_tokens", _number, "thinking_collapse"),
        per_game("Draws", "draw_rate", percent, "draws"),
        per_game("Replies cut off at the token limit", "truncated_rate", percent, "truncated"),
        per_policy("Entropy (nats per token)", "entropy", "entropy"),
        per_policy("Gradient norm", "grad_norm", "gradient_vanished", "gradient_burst"),
        per_policy("Loss", "loss"),
        per_policy("Supervised loss (nats per token)", "sft_loss"),
        overall("Games per second", "speed", ["games_per_s"]),
        overall("Tokens per second", "speed", ["tokens_per_s"]),
        overall("Seconds per step", "seconds", ["rollout", "learn", "load", "league"]),
    ]
    return "".join(charts)


def _named_rewards(training: Sequence[Record], game: str, role: str) -> str:
    """The role's mean reward by name; nothing for games that do not name what they pay."""
    path = ("games", game, "roles", role, "terms")
    names = dict.fromkeys(name for r in training for name in _path(r, *path) or () if "/" not in name)
    lines = [Series(name, _points(training, *path, name)) for name in names]
    return line_chart(f"{game}: what the {role} is paid for", lines, _number, zero=True)


def _points(records: Sequence[Record], *path: str) -> list[tuple[float, float]]:
    return [(r["step"], value) for r in records if (value := _path(r, *path)) is not None]


def _path(record: Mapping[str, Any], *path: str) -> Any:
    node: Any = record
    for key in path:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _policies(evaluations: Sequence[Record]) -> str:
    if not evaluations:
        return ""
    parts = []
    for game, result in evaluations[-1]["eval"].get("games", {}).items():
        policy = (result.get("exploitability") or {}).get("policy")
        if not policy:
            continue
        rows = []
        for entry in policy:
            cells = [_moves(entry["legal"], entry[law]) if law in entry else "" for law in _LAWS]
            rows.append(
                f"<tr><td><code>{text(entry['key'])}</code></td>"
                + "".join(f"<td>{cell}</td>" for cell in cells)
                + "</tr>"
            )
        head = _head("information set", "probability of each action", "in an equilibrium")
        parts.append(f"<h3>{text(game)}</h3><table>{head}{''.join(rows)}</table>")
    return "".join(parts)


def _moves(actions: Sequence[str], probs: Sequence[float]) -> str:
    return " ".join(
        f'<span class="move"><b>{text(action)}</b> {percent(p)}'
        f'<i style="width:{max(0.0, min(1.0, p)) * 100:.0f}%"></i></span>'
        for action, p in zip(actions, probs, strict=True)
    )


def _transcripts(run: Path) -> str:
    files = episode_files(run)
    if not files:
        return ""
    step, path = files[-1]
    tokenizer = _tokenizer(run)
    chosen: dict[str, list[Episode]] = {}
    for episode in read_episodes(path):
        shown = chosen.setdefault(episode.game, [])
        if len(shown) < _SAMPLES_PER_GAME:
            shown.append(episode)
    note = (
        f"<p>Step {step}. What a seat thinks stays with it: only the action below each reply reached the "
        "other seats.</p>"
    )
    return note + "".join(_transcript(e, tokenizer) for episodes in chosen.values() for e in episodes)


def _transcript(episode: Episode, tokenizer: Tokenizer | None) -> str:
    returns = ", ".join(
        f"{role} {value:+g}" for role, value in zip(episode.roles, episode.returns, strict=True)
    )
    head = f"{episode.game}, match {episode.id}: {returns}"
    if episode.forfeit is not None:
        head += f"; forfeit by {episode.roles[episode.forfeit]}"
    if episode.masked is not None:
        head += f"; masked: {episode.masked}"
    turns = "".join(_turn(turn, tokenizer) for turn in episode.turns)
    return f"<details open><summary>{text(head)}</summary>{turns}</details>"


def _turn(turn: Turn, tokenizer: Tokenizer | None) -> str:
    read = ""
    if tokenizer is not None and turn.prompt_ids:
        prompt = tokenizer.decode(turn.prompt_ids, skip_special_tokens=False)
        read = f"<details><summary>what it read</summary><pre>{text(prompt)}</pre></details>"
    action = "no action" if turn.action is None else turn.action
    verdict = "" if turn.legal else '<span class="worse"> refused</span>'
    thought = (
        f'<pre class="private"><span class="tag">private</span>{text(turn.text)}</pre>' if turn.text else ""
    )
    who = (
        f"{turn.role} ({turn.policy}, version {turn.version}, {len(turn.completion_ids)} tokens, {turn.stop})"
    )
    return (
        f'<div class="turn seat{turn.seat % 2}"><div class="who">{text(who)}</div>{read}{thought}'
        f'<div class="action">{text(action)}{verdict}</div></div>'
    )


def _tokenizer(run: Path) -> Tokenizer | None:
    """That of the newest checkpoint, to show prompts as text; None where there is no checkpoint."""
    files = sorted(run.glob("checkpoints/step_*/model/tokenizer.json"))
    return Tokenizer.from_file(str(files[-1])) if files else None


def _head(*titles: str) -> str:
    return "<tr>" + "".join(f"<th>{text(t)}</th>" for t in titles) + "</tr>"


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
