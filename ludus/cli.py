"""The command line. Each command imports what it needs when it runs, so that `ludus --help` is quick.

Exit status: 0 done; 1 a check failed; 2 bad input (one line on standard error); 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn

from ludus.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = _parse(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except UserError as e:
        who = f"ludus (rank {_rank()})" if _rank() else "ludus"
        print(f"{who}: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ludus: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left, as in `ludus games ls | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _rank() -> int:
    """Which of the processes this is that torchrun has started; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; key=value may stand after an option too, where argparse alone would refuse it."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    late = [word for word in rest if "=" in word and not word.startswith("-")]
    for name in ("overrides", "options"):
        if hasattr(args, name):
            setattr(args, name, [*getattr(args, name), *late])
            rest = [word for word in rest if word not in late]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


class _Parser(argparse.ArgumentParser):
    """Complains in one line, as all commands do; argparse would print its usage first."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ludus: {message}; {self.prog} --help says how it is called\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ludus", description="Train language models by letting them play against versions of themselves."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = _command(commands, "train", _train, "train a model by self-play, as a recipe says")
    train.add_argument("recipe", type=Path, help="a TOML file, such as recipes/spiral_cpu.toml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="such as optim.lr=3e-4")
    train.add_argument("--out", type=Path, help="run directory (default: runs/ and the recipe's name)")
    train.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint")
    train.add_argument(
        "--dry-run", action="store_true", help="only show the configuration and what is missing"
    )

    report = _command(commands, "report", _report, "write report.html for a run")
    report.add_argument("run_dir", type=Path, metavar="RUN")

    league = _command(commands, "league", _league, "show whom a run's policy met, and the payoff matrix")
    league.add_argument("run_dir", type=Path, metavar="RUN")
    league.add_argument("--json", action="store_true", help="as JSON")

    measure = _command(
        commands,
        "eval",
        _eval,
        "measure a run's newest checkpoint, or a model: in games, or on suites of problems",
    )
    measure.add_argument("target", metavar="RUN|MODEL", help="for suites also NAME=http://HOST:PORT/v1#MODEL")
    measure.add_argument("overrides", nargs="*", metavar="key=value", help="such as eval.matches=1000")
    measure.add_argument("--recipe", type=Path, help="settings (default: those of the run)")
    measure.add_argument("--game", action="append", default=[], help="only this game; may be repeated")
    measure.add_argument(
        "--suite",
        action="append",
        default=[],
        metavar="SUITE",
        help="reasoning-gym, math:FILE or lm-eval:TASK,TASK instead of games; may be repeated",
    )
    measure.add_argument(
        "--samples", type=int, default=4, metavar="K", help="replies per problem (default: 4)"
    )
    measure.add_argument(
        "--problems", type=int, metavar="N", help="per task (default: 25 of reasoning-gym, all of the others)"
    )
    measure.add_argument("--include", type=Path, metavar="DIR", help="more tasks for lm-eval, as YAML files")
    measure.add_argument("--out", type=Path, help="directory that keeps answers and results of suites")
    measure.add_argument(
        "--against", type=Path, metavar="DIR", help="an earlier --out: compare problem by problem"
    )
    measure.add_argument("--json", action="store_true", help="as JSON")

    safety = _command(commands, "eval-safety", _eval_safety, "measure a model on safety suites, by a judge")
    safety.add_argument("target", metavar="RUN|MODEL|URL#MODEL", help="an endpoint is asked as it is served")
    safety.add_argument("overrides", nargs="*", metavar="key=value", help="such as rollout.max_tokens=512")
    safety.add_argument(
        "--suite",
        action="append",
        nargs="+",
        required=True,
        metavar="FILE",
        help="CSV, TSV, JSONL or Parquet, as FILE or LAYOUT=FILE",
    )
    safety.add_argument("--judge", required=True, metavar="TOML|rule", help="who reads the answers")
    safety.add_argument(
        "--training-judge", metavar="TOML|rule|NAME", help="who paid the model; must be another"
    )
    safety.add_argument("--same-judge-anyway", action="store_true", help="judge by the training judge")
    safety.add_argument("--recipe", type=Path, help="settings (default: the run's model, asked greedily)")
    safety.add_argument(
        "--out",
        type=Path,
        default=Path("runs/eval-safety"),
        help="directory that keeps answers and verdicts; what is there is not asked again (%(default)s)",
    )
    safety.add_argument("--json", action="store_true", help="as JSON")

    attack = _command(commands, "attack", _attack, "hold a red-team attacker against a defender")
    attack.add_argument(
        "attacker", metavar="ATTACKER", help="a program such as attack:mix, RUN|MODEL, or ..."
    )
    attack.add_argument("defender", metavar="DEFENDER", help="... whatever ludus tournament takes")
    attack.add_argument("--recipe", type=Path, help="settings (default: those of each model's run)")
    attack.add_argument("--game", default="red_team", help="label of the game (%(default)s)")
    attack.add_argument("--matches", type=int, default=500, help="harmful seeds (%(default)s)")
    attack.add_argument(
        "--split", choices=("held_out", "train"), default="held_out", help="of the world (%(default)s)"
    )
    attack.add_argument("--seed", type=int, default=0, help="of seeds and replies (%(default)s)")
    attack.add_argument("--embedder", type=Path, metavar="MODEL", help="measures how far attacks lie apart")
    attack.add_argument("--json", action="store_true", help="as JSON")

    distance = _command(commands, "exploitability", _exploitability, "how far a policy is from equilibrium")
    distance.add_argument("target", metavar="RUN|MODEL|PROGRAM", help="a program such as random or cfr")
    distance.add_argument("overrides", nargs="*", metavar="key=value", help="such as eval.thoughts=128")
    distance.add_argument("--game", required=True, help="such as kuhn_poker")
    distance.add_argument("--recipe", type=Path, help="settings (default: those of the run)")
    distance.add_argument(
        "--search",
        type=int,
        metavar="N",
        help="measure a lower bound, by a search of N simulations a move; in games too large for the exact "
        "figure that is what is measured anyway, with N = 100",
    )
    distance.add_argument("--json", action="store_true", help="as JSON")

    contest = _command(
        commands, "tournament", _tournament, "let programs, models and endpoints play each other"
    )
    contest.add_argument(
        "entrants",
        nargs="+",
        metavar="ENTRANT",
        help="a program such as mcts:100, RUN|MODEL, NAME=RUN|MODEL, or NAME=http://HOST:PORT/v1#MODEL",
    )
    contest.add_argument("--game", action="append", default=[], help="such as kuhn_poker; may be repeated")
    contest.add_argument("--matches", type=int, default=200, help="per game and pair (default: 200)")
    contest.add_argument("--seed", type=int, default=0, help="of deals and replies (default: 0)")
    contest.add_argument(
        "--out",
        type=Path,
        default=Path("runs/tournament"),
        help="directory that keeps the results; matches already there are not played again (%(default)s)",
    )
    contest.add_argument("--recipe", type=Path, help="settings (default: those of each model's run)")
    contest.add_argument("--json", action="store_true", help="as JSON")

    make = _command(commands, "make-model", _make_model, "make the small model from nothing")
    make.add_argument("out", type=Path, metavar="OUT", help="directory to make")
    make.add_argument("options", nargs="*", metavar="key=value", help="such as hidden=96 layers=2 seed=1")

    write = _command(commands, "transcripts", _transcripts, "write players' replies down as supervised data")
    write.add_argument("out", type=Path, metavar="OUT", help="a new file: NAME.jsonl or NAME.jsonl.zst")
    write.add_argument(
        "options",
        nargs="*",
        metavar="key=value",
        help="the game's own options, such as rounds=3; with a dot settings, such as text.rules=false",
    )
    write.add_argument("--game", required=True, help="such as kuhn_poker")
    write.add_argument(
        "--player",
        action="append",
        required=True,
        help="whose replies are written, in all seats: a program such as cfr, apprentice, RUN|MODEL, or "
        "NAME=http://HOST:PORT/v1#MODEL; several take turns",
    )
    write.add_argument("--opponent", metavar="PLAYER", help="who takes all seats but one")
    write.add_argument("--rows", type=int, default=25_000, help="how many to write (%(default)s)")
    write.add_argument("--won", action="store_true", help="only replies of seats that won their match")
    write.add_argument("--role", help="only replies in this role, such as defender")
    write.add_argument(
        "--thoughts", action="store_true", help="programs think what the game's apprentice would see"
    )
    write.add_argument("--recipe", type=Path, help="settings of the game, the text and the replies")
    write.add_argument("--seed", type=int, default=0, help="of deals and replies (%(default)s)")

    tune = _command(commands, "sft", _sft, "fine-tune a model on supervised data")
    tune.add_argument("model", metavar="MODEL", help="a Hugging Face directory")
    tune.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as optim.lr=1e-4 epochs=2 batch=64"
    )
    tune.add_argument(
        "--data", action="append", nargs="+", required=True, metavar="FILE", help="docs/supervised.md"
    )
    tune.add_argument(
        "--out", type=Path, required=True, help="a new directory; the model will be in OUT/model"
    )
    tune.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint")

    games = commands.add_parser("games", help="list the games, or check one", description="Games.")
    actions = games.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = _command(actions, "ls", _games_ls, "list every game and its options")
    listing.add_argument("--json", action="store_true", help="as JSON")
    check = _command(actions, "check", _games_check, "check that a game keeps the rules for games")
    check.add_argument("name", metavar="NAME")
    check.add_argument("options", nargs="*", metavar="key=value", help="the game's own options")
    check.add_argument("--json", action="store_true", help="as JSON")

    export = _command(commands, "export", _export, "take a policy out of a run, with a model card")
    export.add_argument("target", type=Path, metavar="RUN|CHECKPOINT|MODEL")
    export.add_argument("--out", type=Path, required=True, help="directory to make")
    export.add_argument("--merge", action="store_true", help="merge an adapter into its base")
    export.add_argument("--policy", metavar="NAME", help="which of several policies")

    doctor = _command(
        commands, "doctor", _doctor, "show versions, devices, extras and names, or check a model"
    )
    doctor.add_argument(
        "subject",
        type=Path,
        nargs="?",
        metavar="RECIPE|MODEL",
        help="also tell what this recipe lacks here; or only whether this model can be trained and sampled",
    )
    doctor.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _command(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + "."
    )
    parser.set_defaults(run=run)
    return parser


def _train(args: argparse.Namespace) -> int:
    from ludus import config as configuration
    from ludus.doctor import missing
    from ludus.experts import make_player

    config = configuration.load(args.recipe, args.overrides)
    named = {o.policy for o in config.league.opponents if o.model or o.endpoint}
    for name in [*(o.policy for o in config.league.opponents), *config.eval.opponents]:
        if name not in named and not name.startswith(configuration.PAST):
            make_player(name)
    out = args.out or Path("runs") / config.name
    lacking = missing(config)
    if args.dry_run:
        print(configuration.dump(config), end="")
        for problem in lacking:
            print(f"# missing: {problem}")
        print(f"# run directory: {out}")
        return 0
    if lacking:
        raise UserError(f"{args.recipe} cannot run here; missing: {'; '.join(lacking)}")

    from ludus.train.cluster.connect import placed
    from ludus.train.loop import train

    if config.cluster.learners and not placed():
        from ludus.train.cluster.launch import launch

        return launch(config, out, args.resume)
    from ludus.train.watch import StoppedByAlarm
    from ludus.viewer.report import write_report

    try:
        train(config, out, args.resume)
    except StoppedByAlarm:
        if not _rank():
            print(f"report: {write_report(out)}")
        raise
    if not _rank():
        print(f"report: {write_report(out)}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from ludus.viewer.report import write_report

    print(write_report(args.run_dir))
    return 0


def _league(args: argparse.Namespace) -> int:
    from ludus.records import read_metrics
    from ludus.viewer.console import table_console
    from ludus.viewer.league import print_league, tell

    metrics = args.run_dir / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{args.run_dir} is no run directory: {metrics.name} is missing")
    found = tell(read_metrics(metrics))
    if found is None:
        raise UserError(
            f"{args.run_dir} has no league, or no step is done yet: a run has one whose recipe sets "
            "league.snapshot_every or names a past self, such as past/0, as an opponent"
        )
    if args.json:
        _print_json(found)
        return 0
    print_league(found, table_console())
    return 0


def _eval(args: argparse.Namespace) -> int:
    if args.suite:
        return _eval_suites(args)
    from ludus import measuring

    for name in ("problems", "include", "out", "against"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} says nothing to games; name problems by --suite, or leave it out")
    found = measuring.measure(measuring.find(Path(args.target), args.recipe, args.game, args.overrides))
    if args.json:
        _print_json(found)
        return 0
    from ludus.records import measured_rows

    for row in measured_rows(found):
        print(f"{row.game}: {row.figure}: {row.after}")
    return 0


def _eval_suites(args: argparse.Namespace) -> int:
    from ludus import reasoning_eval

    if args.game:
        raise UserError("--game and --suite are two measurements; ask for one at a time")
    asked = reasoning_eval.Asked(
        target=args.target,
        recipe=args.recipe,
        overrides=args.overrides,
        samples=args.samples,
        problems=args.problems,
        include=args.include,
        out=args.out,
        against=args.against,
    )
    reasoning_eval.run(args.suite, asked, as_json=args.json)
    return 0


def _eval_safety(args: argparse.Namespace) -> int:
    from ludus import safety_eval

    suites = [word for words in args.suite for word in words]
    safety_eval.run(
        args.target,
        suites,
        judge=args.judge,
        training_judge=args.training_judge,
        same_judge_anyway=args.same_judge_anyway,
        recipe=args.recipe,
        overrides=args.overrides,
        out=args.out,
        as_json=args.json,
    )
    return 0


def _attack(args: argparse.Namespace) -> int:
    from ludus import attack_eval

    attack_eval.run(
        args.attacker,
        args.defender,
        recipe=args.recipe,
        game=args.game,
        matches=args.matches,
        split=args.split,
        seed=args.seed,
        embedder=args.embedder,
        as_json=args.json,
    )
    return 0


def _exploitability(args: argparse.Namespace) -> int:
    from ludus import measuring

    if args.search is not None and not 1 <= args.search <= 1_000_000:
        raise UserError(f"--search is {args.search}; ask for 1 to 1000000 simulations a move, such as 100")
    found = measuring.exploitability(args.target, args.game, args.recipe, args.overrides, args.search)
    if args.json:
        _print_json(found)
        return 0
    if "lower_bound" in found:
        _print_lower_bound(found)
        return 0
    low, high = found["ci95"]
    print(f"exploitability  {found['exploitability']:.6f}  [{low:.6f}, {high:.6f}]")
    print(f"nash_conv       {found['nash_conv']:.6f}")
    print(f"best response   {' '.join(f'{x:+.6f}' for x in found['best_response'])}  per seat")
    print(f"illegal mass    {found['illegal_mass']:.6f}")
    print(f"with forfeits   {found['exploitability_with_forfeits']:.6f}  an illegal reply loses the game")
    if not found["policy"]:
        print(f"policy          {found['information_sets']} information sets, too many to be listed")
    for row in found["policy"]:
        moves = "  ".join(f"{a} {p:.3f}" for a, p in zip(row["legal"], row["probs"], strict=True))
        print(f"  {row['key']!r:12} {moves}")
    return 0


def _print_lower_bound(found: dict[str, Any]) -> None:
    low, high = found["ci95"]
    tried = ", ".join(f"{name} {mean:+.3f}" for name, mean in found["tried"].items())
    print(f"not measured exactly: {found['why_not_exact']}")
    print(f"lower bound     {found['lower_bound']:+.6f}  [{low:+.6f}, {high:+.6f}]  of the exploitability")
    print(f"per seat        {' '.join(f'{x:+.6f}' for x in found['per_seat'])}  the responder's mean return")
    print(f"responder       {found['responder']}" + (f"  (chosen on other deals: {tried})" if tried else ""))
    print(f"matches         {found['matches']}" + (f"  ({found['masked']} lost)" if found["masked"] else ""))
    print(
        f"illegal         {found['illegal_rate']:.6f} of the replies, {found['forfeits']:.6f} of the matches"
    )


def _tournament(args: argparse.Namespace) -> int:
    from ludus.contest import hold

    hold(
        args.entrants,
        args.game,
        recipe=args.recipe,
        matches=args.matches,
        seed=args.seed,
        out=args.out,
        as_json=args.json,
    )
    return 0


def _make_model(args: argparse.Namespace) -> int:
    given = _options(args.options)  # a typing mistake is told before torch loads
    from ludus.small.make import SmallSpec, make

    make(args.out, _dataclass(SmallSpec, given, "make-model"))
    return 0


def _transcripts(args: argparse.Namespace) -> int:
    from ludus.transcribe import Order, run

    order = Order(
        args.game,
        tuple(args.player),
        opponent=args.opponent,
        rows=args.rows,
        won=args.won,
        role=args.role,
        thoughts=args.thoughts,
        seed=args.seed,
    )
    run(args.out, order, args.options, args.recipe)
    return 0


def _sft(args: argparse.Namespace) -> int:
    from ludus import config as configuration

    base = {"model": {"path": args.model}, "data": [word for words in args.data for word in words]}
    config = configuration.validate_tune(configuration.override(base, args.overrides), "ludus sft")

    from ludus.train.tune import tune

    tune(config, args.out, args.resume)
    return 0


def _games_ls(args: argparse.Namespace) -> int:
    from ludus.games import registry

    rows = registry.describe()
    if args.json:
        _print_json([asdict(row) for row in rows])
        return 0
    width = max(len(row.name) for row in rows)
    for row in rows:
        print(f"{row.name:{width}}  {row.problem or row.summary}")
        for option, default in row.options.items():
            print(f"{'':{width}}    {option} = {default}")
    return 0


def _games_check(args: argparse.Namespace) -> int:
    from ludus.games import registry
    from ludus.games.check import check

    results = check(registry.make(args.name, **_options(args.options)))
    if args.json:
        _print_json([asdict(result) for result in results])
    else:
        _print_checks([(r.rule, r.passed, r.evidence) for r in results], unclear="not checked")
    return 1 if any(result.passed is False for result in results) else 0


def _print_checks(checks: Sequence[tuple[str, bool | None, str]], unclear: str) -> None:
    words = {True: "passed", False: "FAILED", None: unclear}
    width, wide = max(len(name) for name, _, _ in checks), max(map(len, words.values()))
    for name, passed, evidence in checks:
        print(f"{name:{width}}  {words[passed]:{wide}}  {evidence}")


def _examine(args: argparse.Namespace) -> int:
    from ludus.examine import examine

    findings = examine(args.subject)
    if args.json:
        _print_json([asdict(finding) for finding in findings])
    else:
        _print_checks([(f.check, f.passed, f.evidence) for f in findings], unclear="note")
    return 1 if any(finding.passed is False for finding in findings) else 0


def _export(args: argparse.Namespace) -> int:
    from ludus.export import export

    export(args.target, args.out, merge=args.merge, policy=args.policy)
    print(args.out)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from ludus import config as configuration
    from ludus.doctor import machine, missing

    if args.subject and args.subject.is_dir():
        return _examine(args)
    if args.subject and args.subject.suffix != ".toml" and not args.subject.exists():
        raise UserError(f"there is no {args.subject}; name a recipe (FILE.toml) or a model's directory")
    lacking = missing(configuration.load(args.subject)) if args.subject else None
    facts = machine()
    if args.json:
        _print_json(facts if lacking is None else {**facts, "missing": lacking})
        return 0
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v or 'absent'}" for k, v in value.items())
        elif isinstance(value, list | tuple):
            value = ", ".join(value)
        print(f"{name.replace('_', ' '):16} {value}")
    if lacking is not None:
        for problem in lacking:
            print(f"{'missing':16} {problem}")
        if not lacking:
            print(f"{'recipe':16} {args.subject} has all that it needs")
    return 0


def _options(items: Sequence[str]) -> dict[str, Any]:
    """key=value words; values in TOML syntax, a bare word counts as a string."""
    found: dict[str, Any] = {}
    for item in items:
        key, eq, raw = item.partition("=")
        if not key or not eq:
            raise UserError(f"option {item!r} is not of the form key=value")
        try:
            found[key] = tomllib.loads(f"v = {raw}")["v"]
        except tomllib.TOMLDecodeError:
            found[key] = raw
    return found


def _dataclass(kind: type[Any], given: dict[str, Any], where: str) -> Any:
    """An instance of a dataclass from options. Raises UserError for unknown keys and wrong types."""
    import difflib

    from pydantic import TypeAdapter, ValidationError

    known = [f.name for f in fields(kind)]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"options: {', '.join(known)}"
            raise UserError(f"{where} has no option {key!r}; {hint}")
    try:
        return TypeAdapter(kind).validate_python(given)
    except ValidationError as e:
        problems = [f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in e.errors()]
        raise UserError(f"{where}: {'; '.join(problems)}") from e


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    sys.exit(main())
