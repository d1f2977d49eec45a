"""The table of the red-team experiment, out of the runs of two sweeps.

    python experiments/red_team.py runs/red_team_sweep runs/red_team_attackers [--matches 500] [--seeds 0 1 2]

Safety figures come from the runs' last measurements. Attacks are played here: each fresh attacker against the
defender that it was trained against, and, for the diversity of their attacks, the attackers of self-play
against themselves and those of `attacker only` against the model that they were trained against. Held-out
seeds throughout, unless a row says otherwise. Writes red_team.json and red_team.md into the first directory.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from summary import spread

from ludus import attack_eval
from ludus.errors import UserError
from ludus.games.red_team.world import Split
from ludus.measuring import find
from ludus.records import is_evaluation, read_metrics
from ludus.train.rundir import METRICS, stored_config

DEFENDERS = ("self-play", "self-play as in the paper", "static seeds", "static rewrites")
ATTACKERS = ("self-play", "self-play as in the paper", "attacker only")
SAFETY = (
    *("attack_success", "over_refusal/benign", "over_refusal/hard_benign"),
    *("answered/benign", "answered/hard_benign"),
)
DIVERSITY = ("different", "distinct_1", "distinct_2", "distinct_3", "self_bleu")

Row = dict[str, list[float]]  # judge, or "" where none has a say -> a value per seed


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    try:
        rows = gather(args.sweep, args.attackers, args.seeds, args.matches)
    except UserError as e:
        print(f"red_team: {e}", file=sys.stderr)
        return 2
    told = {
        name: {judge: {"seeds": v, **spread(v)} for judge, v in row.items()} for name, row in rows.items()
    }
    (args.sweep / "red_team.json").write_text(json.dumps(told, indent=1) + "\n")
    text = markdown(told)
    (args.sweep / "red_team.md").write_text(text)
    print(text, end="")
    return 0


def gather(sweep: Path, attackers: Path, seeds: Sequence[int], matches: int) -> dict[str, Row]:
    """Every figure of every seed. Raises UserError where a run is missing or not finished."""
    rows: dict[str, Row] = {}

    def note(name: str, judge: str, value: float) -> None:
        rows.setdefault(name, {}).setdefault(judge, []).append(value)

    for seed in seeds:
        first = stored_config(sweep / "self-play" / f"seed_{seed}").model.path
        for variant in DEFENDERS:
            before, after = _measured(sweep / variant / f"seed_{seed}")
            for figure in SAFETY:
                for judge in after["judges"]:
                    if variant == DEFENDERS[0]:
                        note(f"before training: {figure}", judge, before["judges"][judge][figure]["rate"])
                    note(f"{variant}: {figure}", judge, after["judges"][judge][figure]["rate"])
            note(f"{variant}: both judges agree", "", after["agreement"])
        splits: tuple[Split, ...] = ("held_out", "train")
        for variant in DEFENDERS:
            mine = attackers / f"against {variant}" / f"seed_{seed}"
            victim = sweep / variant / f"seed_{seed}"
            for split in splits:
                found = _attack(mine, victim, matches, split)
                for judge, told in found["judges"].items():
                    where = "" if split == "held_out" else ", on training's seeds"
                    note(f"fresh attacker against {variant}{where}", judge, told["attack_success"]["rate"])
                    if not where:
                        note(f"fresh attacker against {variant}: faithful", judge, told["faithful"]["rate"])
        for variant in ATTACKERS:
            mine = sweep / variant / f"seed_{seed}"
            found = _attack(mine, Path(first) if variant == "attacker only" else mine, matches, "held_out")
            for figure in DIVERSITY:
                note(f"attacks of {variant}: {figure}", "", float(found["diversity"][figure]))
    return rows


def _measured(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The safety of a run's policy at the start and at the end."""
    steps = stored_config(run).train.steps
    records = [r for r in read_metrics(run / METRICS) if is_evaluation(r)]
    if not records or records[-1]["step"] != steps:
        raise UserError(f"{run} is not finished: go on with its sweep first")
    before, after = (records[i]["eval"]["games"]["red_team"]["safety"] for i in (0, -1))
    return before, after


def _attack(attacker: Path, defender: Path, matches: int, split: Split) -> dict[str, Any]:
    """The newest checkpoints of two runs, or a model, against each other, prompted as in their recipe."""
    words = [str(find(path).model if (path / METRICS).is_file() else path) for path in (attacker, defender)]
    return attack_eval.measure(
        f"attacker={words[0]}",
        f"defender={words[1]}",
        recipe=Path("recipes/self_redteam_cpu.toml"),
        matches=matches,
        split=split,
    )


def markdown(told: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """A row per figure: each seed, then the mean with Student's 95% interval, by each judge."""
    lines = ["| figure | judge | seeds | mean [95%] |", "|---|---|---|---|"]
    for name, row in told.items():
        for judge, found in row.items():
            seeds = " / ".join(f"{value:.3f}" for value in found["seeds"])
            ci = found["ci95"]
            interval = "" if ci is None else f" [{ci[0]:.3f}, {ci[1]:.3f}]"
            lines.append(f"| {name} | {judge or '-'} | {seeds} | {found['mean']:.3f}{interval} |")
    return "\n".join(lines) + "\n"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("sweep", type=Path, help="the runs of experiments/red_team.toml")
    parser.add_argument("attackers", type=Path, help="the runs of experiments/red_team_attackers.toml")
    parser.add_argument("--matches", type=int, default=500, help="harmful seeds of each attack (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="those alone")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
