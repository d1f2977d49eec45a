"""`ludus eval-safety`: from words on the command line to a model, suites and a judge, then to figures.

A judge is a TOML file with the keys of JudgeConfig, or `rule` (`rule:keywords`), the exact judges of the
invented world of the red-team game. Prompts and answers are written to files that their owner alone may read,
and never printed.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ludus import subjects
from ludus.config import JudgeConfig, RunConfig
from ludus.errors import UserError
from ludus.games.red_team.judge import JUDGES, Request
from ludus.judges.base import Failure, Judge, Question, Verdict
from ludus.judges.make import load_config, make_judge
from ludus.judges.rule import RuleJudge
from ludus.suites import Suite, load_all
from ludus.truth.suite_eval import evaluate_suites
from ludus.truth.transcripts import Transcripts, write_private

RESULT = "safety.json"
_FIGURES = ("attack_success", "refusal", "over_refusal")


@dataclass(frozen=True, slots=True)
class Judged:
    """A judge that a word names. `models` tell two of them apart: what they are, not where they run."""

    word: str
    models: frozenset[str]


def run(
    target: str,
    suites: Sequence[str],
    *,
    judge: str,
    training_judge: str | None,
    same_judge_anyway: bool,
    recipe: Path | None,
    overrides: Sequence[str],
    out: Path,
    as_json: bool,
) -> None:
    """Measure, or finish what an earlier call in `out` left to do; print figures and write them.

    Raises UserError for bad input, for the judge that the model was trained by, and where the judge gives up:
    what was judged until then is kept.
    """
    loaded = load_all(list(suites))
    chosen = _judged(judge)
    config, identity = subjects.settings(target, recipe, overrides, temperature=0.0)
    trained_by = _training_judges(training_judge, subjects.run_of(target), config)
    same = [other.word for other in trained_by if other.models & chosen.models]
    if same and not same_judge_anyway:
        raise UserError(
            f"the judge {judge} is the one that this model was trained by ({same[0]}), so its verdicts say "
            "how well the model learnt to please it; name another --judge, or insist by --same-judge-anyway"
        )
    result = asyncio.run(_measure(target, config, identity, loaded, judge, out))
    found = {
        "model": target,
        "judge": judge,
        "training_judges": [other.word for other in trained_by],
        "same_judge": bool(same),
        **result,
    }
    try:
        write_private(out / RESULT, found)
    except OSError as e:
        raise UserError(f"cannot write to {out}: {e.strerror}; answers and verdicts are kept") from e
    if same:
        print(
            f"ludus: WARNING: {judge} IS THE JUDGE THAT THIS MODEL WAS TRAINED BY. These figures show how "
            "well it pleases that judge, not how safe it is.",
            file=sys.stderr,
        )
    if as_json:
        json.dump(found, sys.stdout, indent=1)
        print()
    else:
        _print(found)
        print(f"results: {out} (the transcripts there may hold harmful text)")


def _judged(word: str) -> Judged:
    """Raises UserError for a word that names no judge."""
    if _is_rule(word):
        return Judged(word, frozenset({_rule_of(word)}))
    path = Path(word)
    if path.suffix != ".toml" and not path.is_file():
        raise UserError(f"judge {word!r} is neither a TOML file nor rule; known rules: rule, rule:keywords")
    return Judged(word, _models(load_config(path)))


def _is_rule(word: str) -> bool:
    return word == "rule" or word.startswith("rule:")


def _rule_of(word: str) -> str:
    name = word.partition(":")[2] or "exact"
    if name not in JUDGES:
        raise UserError(f"unknown rule {word!r}; known: rule, {', '.join(f'rule:{n}' for n in JUDGES)}")
    return f"rule:{name}"


def _short(model: str) -> str:
    """allenai/wildguard and /models/wildguard are the same model."""
    return model.rstrip("/").rpartition("/")[2].lower()


def _training_judges(word: str | None, run: Path | None, config: RunConfig) -> list[Judged]:
    """Those named, by a judge's word or by the name of its model, and those that the run's games pay by."""
    found = []
    if word is not None:
        path = Path(word)
        named = _is_rule(word) or path.suffix == ".toml" or path.is_file()
        found.append(_judged(word) if named else Judged(word, frozenset({_short(word)})))
    if run is not None and any(game.name == "red_team" for game in config.games):
        found.append(_judged("rule:exact"))
    for name in dict.fromkeys(game.args.get("judge") for game in config.games) if run is not None else ():
        if name in config.judges:
            found.append(Judged(f"{name} of the run", _models(config.judges[name])))
    return found


def _models(config: JudgeConfig) -> frozenset[str]:
    models = [endpoint.model for endpoint in config.endpoints] or [config.model or ""]
    return frozenset(_short(model) for model in models)


def _open_judge(word: str) -> Judge:
    if not _is_rule(word):
        return make_judge(load_config(Path(word)))
    name = _rule_of(word).removeprefix("rule:")
    read = JUDGES[name]

    def rule(question: Question) -> Verdict | Failure:
        said = read(question.request, question.answer or "")
        if said.request is Request.NOTHING:
            return Failure("not_understood")  # it is a request of another world
        harmful = said.request is Request.HARMFUL
        return Verdict(harmful) if question.answer is None else Verdict(harmful, said.harm, said.refusal)

    return RuleJudge(name, rule)


async def _measure(
    target: str,
    config: RunConfig,
    identity: dict[str, Any],
    suites: Sequence[Suite],
    word: str,
    out: Path,
) -> dict[str, Any]:
    judge = _open_judge(word)
    try:
        settings = {
            "model": identity,
            "seed": config.seed,
            "judge": judge.id,
            "suites": {s.name: {"layout": s.layout, "sha256": s.digest} for s in suites},
        }
        with Transcripts(out, settings) as kept:
            subject = subjects.open_subject(target, config)
            columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            console = Console(stderr=True)
            try:
                with Progress(
                    *columns, console=console, transient=True, disable=not console.is_terminal
                ) as bar:
                    task = bar.add_task("prompts")
                    found = await evaluate_suites(
                        suites,
                        subject,
                        judge,
                        kept,
                        seed=config.seed,
                        in_flight=config.rollout.in_flight,
                        tell=lambda done, total: bar.update(task, completed=done, total=total),
                    )
            finally:
                await subject.engine.close()
        return {"settings": settings, "suites": found}
    finally:
        await judge.close()


def _print(found: dict[str, Any]) -> None:
    trained_by = ", ".join(found["training_judges"]) or "not named, so nobody checked that it is another"
    print(f"judge           {found['judge']}")
    print(f"training judge  {trained_by}{'  THE SAME JUDGE' if found['same_judge'] else ''}")
    for name, suite in found["suites"].items():
        print(f"\n{name}: {suite['prompts']} prompts, layout {suite['layout']}")
        width = max([len(category) for category in suite["categories"]] + [3])
        for category, rates in suite["categories"].items():
            for figure in _FIGURES:
                if figure in rates:
                    print(f"  {category or 'all':{width}}  {figure:14}  {_rate(rates[figure])}")
        for field, table in suite["confusion"].items():
            told = "  ".join(
                f"{key} {table[key]}" for key in ("both_yes", "only_label", "only_judge", "both_no")
            )
            print(f"  label against judge, {field}: {told}  unsaid {table['unsaid']}")
        notes = [f"{n} without a label" for n in [suite["unlabelled"]] if n]
        notes += [f"{n} cut at the token limit" for n in [suite["cut"]] if n]
        notes += [f"masked: {reason} {n}" for reason, n in suite["masked"].items()]
        for note in notes:
            print(f"  {note}")


def _rate(entry: dict[str, Any]) -> str:
    unsaid = f"  ({entry['unsaid']} unsaid)" if entry["unsaid"] else ""
    if entry["rate"] is None:
        return f"nothing judged{unsaid}"
    low, high = entry["ci95"]
    return f"{entry['rate']:.3f}  [{low:.3f}, {high:.3f}]  of {entry['n']}{unsaid}"
