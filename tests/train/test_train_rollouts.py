"""Matches that run ahead of the learner: none too old, none lost, none twice, whatever ends first."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train_loop import crashed
from tiny_run import config, episodes, newest, trained
from torch import Tensor

from ludus import config as configuration
from ludus.config import RunConfig
from ludus.errors import UserError
from ludus.games.base import Game
from ludus.games.registry import make
from ludus.league.matchmaker import Matchmaker
from ludus.players import Ask, RandomPlayer, Reply
from ludus.records import read_metrics
from ludus.rollout.play import HouseRules
from ludus.train.loop import train
from ludus.train.past import snapshots
from ludus.train.rollouts import LocalCrew, Rollouts
from ludus.types import Completion, Episode, MatchPlan, Stop

GAMES: dict[str, Game] = {name: make(name) for name in ("kuhn_poker", "tic_tac_toe")}


@dataclass
class Slow:
    """Plays at random with the weights' version of the moment, after pauses that follow no rule."""

    pauses: random.Random = field(default_factory=lambda: random.Random(0))
    policy: str = "self"
    trainable: bool = True
    version: int = 0
    trouble: Exception | None = None

    async def answer(self, ask: Ask) -> Reply:
        version = self.version
        for _ in range(self.pauses.randrange(4)):
            await asyncio.sleep(0)
        if self.trouble is not None:
            raise self.trouble
        reply = await RandomPlayer().answer(ask)
        return Reply(reply.action, [1], Completion([2], [-0.5], Stop.EOS, version))


class Late(LocalCrew):
    """Hands on each version only when the next one, or so many more, have come."""

    def __init__(self, player: Slow, behind: int) -> None:
        super().__init__(None, GAMES, {"self": player}, None, HouseRules(), 50)  # type: ignore[arg-type]
        self.player, self.behind = player, behind

    def load(self, policy: str, weights: Mapping[str, Tensor], version: int) -> None:
        self.player.version = max(version - self.behind, 0)


def matchmaker(matches: int = 12, group_size: int = 1) -> Matchmaker:
    return Matchmaker(
        7,
        dict.fromkeys(GAMES, 2),
        {"kuhn_poker": 2.0, "tic_tac_toe": 1.0},
        matches=matches,
        group_size=group_size,
        self_weight=1.0,
        opponents={},
    )


async def walk(rollouts: Rollouts, maker: Matchmaker, steps: int, lag: int) -> list[list[Episode]]:
    """What the loop does, without learning."""
    found = []
    for step in range(steps):
        for ahead in range(step, min(step + lag, steps - 1) + 1):
            if ahead not in rollouts:
                rollouts.begin(ahead, maker.plan(ahead))
        taken = await rollouts.take(step, version=step)
        assert [len(g.episodes) for g in taken.groups] == [maker.group_size] * len(taken.groups)
        found.append(taken.episodes)
        rollouts.crew.load("self", {}, step + 1)
    return found


# --- the producer alone ---


@given(lag=st.integers(0, 4), group_size=st.sampled_from([1, 3]), pauses=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_each_step_gets_its_own_matches_whoever_is_quick(lag: int, group_size: int, pauses: int) -> None:
    player, maker = Slow(random.Random(pauses)), matchmaker(group_size=group_size)
    rollouts = Rollouts(Late(player, 0), lag)
    found = asyncio.run(walk(rollouts, maker, 6, lag))
    for step, episodes_ in enumerate(found):
        plans = maker.plan(step)
        assert [(e.id, e.game, e.seed, e.seats) for e in episodes_] == [
            (p.episode, p.game, p.match_seed, p.seats) for p in plans
        ]
        assert Counter(e.game for e in episodes_) == Counter({"kuhn_poker": 8, "tic_tac_toe": 4}) or (
            group_size == 3 and Counter(e.game for e in episodes_)["kuhn_poker"] == 9
        )
        oldest = min(t.version for e in episodes_ for t in e.turns)
        assert max(step - lag, 0) <= oldest <= step
        if lag == 0:
            assert {t.version for e in episodes_ for t in e.turns} == {step}


def test_matches_of_later_steps_run_beside_and_each_turn_bears_its_version() -> None:
    async def go() -> None:
        player = Slow()
        rollouts = Rollouts(Late(player, 0), 1)
        maker = matchmaker()
        rollouts.begin(0, maker.plan(0))
        first = await rollouts.take(0, 0)
        assert (first.stale, first.lag) == (0, {"mean": 0.0, "max": 0.0})
        rollouts.begin(1, maker.plan(1))
        for _ in range(6):
            await asyncio.sleep(0)  # in the middle of the matches
        player.version = 1
        second = await rollouts.take(1, 1)
        ages = [1 - t.version for e in second.episodes for t in e.turns]
        assert set(ages) == {0, 1}
        assert second.lag == {"mean": sum(ages) / len(ages), "max": 1.0}
        assert second.stale == 0

    asyncio.run(go())


def test_groups_that_are_too_old_are_dropped_counted_and_played_again() -> None:
    """The engine takes the weights of version 3 only after the matches of step 3 are played."""

    async def go() -> None:
        player, maker = Slow(), matchmaker(group_size=2)
        rollouts = Rollouts(Late(player, 0), 1)
        player.version = 1
        rollouts.begin(3, maker.plan(3)[:6] + maker.plan(3)[6:])
        old = asyncio.create_task(rollouts.take(3, 3))
        for _ in range(7):
            await asyncio.sleep(0)
        player.version = 3  # in time for some of the turns, too late for most groups
        taken = await old
        assert 0 < taken.stale <= 6
        plans = maker.plan(3)
        assert [(e.id, e.seed, e.game) for e in taken.episodes] == [
            (p.episode, p.match_seed, p.game) for p in plans
        ]
        assert all(t.version >= 2 for e in taken.episodes for t in e.turns)
        for (
            group
        ) in taken.groups:  # a group is dropped as a whole: none is half of one playing, half of another
            assert len({e.seed for e in group.episodes}) == 1

    asyncio.run(go())


def test_an_engine_that_never_takes_new_weights_ends_the_run() -> None:
    rollouts = Rollouts(Late(Slow(), 2), 1)
    with pytest.raises(UserError, match=r"step 3: .*version 2.*rollout\.max_lag = 1 behind; raise"):
        asyncio.run(walk(rollouts, matchmaker(), 6, 1))


def test_only_trained_turns_are_too_old() -> None:
    """Programs and frozen players have versions of their own, which say nothing."""
    player = Slow(trainable=False)
    taken = asyncio.run(walk(Rollouts(Late(player, 99), 0), matchmaker(), 3, 0))
    assert {t.version for e in taken[2] for t in e.turns} == {0}


def test_what_goes_wrong_in_a_later_step_is_told_when_its_turn_comes_and_close_waits_for_nobody() -> None:
    async def go() -> None:
        player = Slow()
        before = asyncio.all_tasks()
        rollouts = Rollouts(Late(player, 0), 2)
        maker = matchmaker()
        rollouts.begin(0, maker.plan(0))
        assert len((await rollouts.take(0, 0)).groups) == 12
        player.trouble = ZeroDivisionError("in a match")
        rollouts.begin(1, maker.plan(1))
        rollouts.begin(2, maker.plan(2))
        with pytest.raises(ZeroDivisionError):
            await rollouts.take(1, 1)
        player.trouble = None
        rollouts.begin(3, maker.plan(3))
        await rollouts.close()
        assert 2 not in rollouts
        assert 3 not in rollouts
        assert asyncio.all_tasks() == before

    asyncio.run(asyncio.wait_for(go(), 30))


def test_busy_is_the_time_in_which_a_match_is_alive() -> None:
    class Timed(Late):
        """Two calls, one inside the other, then nothing."""

        async def play(self, plans: Sequence[MatchPlan]) -> list[Episode]:
            await asyncio.sleep(0.05 * len(plans))
            return []

    async def go() -> None:
        rollouts = Rollouts(Timed(Slow(), 0), 1)
        plans = matchmaker().plan(0)
        began = time.perf_counter()
        rollouts.begin(0, plans[:2])
        rollouts.begin(1, plans[:6])
        await asyncio.sleep(0.01)
        assert 0 < rollouts.busy <= time.perf_counter() - began
        await rollouts._steps[1][1]
        ended = time.perf_counter() - began
        assert 0.3 <= rollouts.busy <= ended
        before = rollouts.busy
        await asyncio.sleep(0.05)
        assert rollouts.busy == before

    asyncio.run(go())


# --- whole runs ---


def ahead(directory: Path, lag: int = 2, **sections: Any) -> RunConfig:
    settled: dict[str, Any] = {
        "rollout": {"max_lag": lag},
        "train": {"steps": 6},
        "optim": {"schedule": "constant", "lr": 3e-3},
    }
    for name, section in sections.items():
        settled[name] = {**settled.get(name, {}), **section} if isinstance(section, dict) else section
    return config(directory, **settled)


def same_matches(run: Path, steps: int = 6, matches: int = 8) -> None:
    """Each match of the recipe is there once, in its step, with its deal; none is too old."""
    played = episodes(run)
    assert [e.id for e in played] == list(range(steps * matches))
    lag = configuration.load(run / "config.toml").rollout.max_lag
    for step, record in enumerate(trained(run)):
        batch = played[matches * step : matches * (step + 1)]
        ages = [step - t.version for e in batch for t in e.turns if t.trainable]
        assert 0 <= min(ages) <= max(ages) <= lag
        assert record["lag"] == {"mean": sum(ages) / len(ages), "max": max(ages)}
        assert record["stale"] == 0
        assert record["version"] == step + 1
        assert record["learn"]["turns"] == len(ages)
        assert {g: x["matches"] for g, x in record["games"].items()} == {"kuhn_poker": 4, "tic_tac_toe": 4}


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ahead") / "finished"
    train(ahead(tiny_model), out)
    return out


def test_a_run_ahead_plays_the_matches_of_a_run_in_turns(
    finished: Path, tiny_model: Path, tmp_path: Path
) -> None:
    same_matches(finished)
    train(ahead(tiny_model, 0), tmp_path / "turns")
    for a, b in zip(episodes(finished), episodes(tmp_path / "turns"), strict=True):
        assert (a.id, a.game, a.seed, a.seats) == (b.id, b.game, b.seed, b.seats)
    assert max(record["lag"]["max"] for record in trained(finished)) == 2
    for run, beside in ((finished, True), (tmp_path / "turns", False)):
        for record in trained(run):
            spent = record["seconds"]
            whole = sum(spent[k] for k in ("league", "rollout", "learn", "load", "write"))
            assert spent["idle_learner"] == pytest.approx(whole - spent["learn"])
            assert 0 <= spent["overlap"] <= spent["learn"]
            assert 0 <= spent["idle_rollout"] <= whole
            if not beside:
                assert spent["overlap"] == 0
        assert any(record["seconds"]["overlap"] > 0 for record in trained(run)) == beside


def test_importance_weights_tell_older_samplers_from_the_learner(finished: Path) -> None:
    importance = [record["learn"]["importance_max"] for record in trained(finished)]
    assert importance[0] == pytest.approx(1, abs=1e-3)  # sampled by the very weights that learn from it
    assert min(importance[2:]) > 1.01


def test_a_crash_loses_no_match_and_repeats_none(finished: Path, tiny_model: Path, tmp_path: Path) -> None:
    run = crashed(finished, tmp_path / "run")
    train(ahead(tiny_model), run, resume=True)
    same_matches(run)
    for a, b in zip(episodes(run), episodes(finished), strict=True):
        assert (a.id, a.game, a.seed, a.seats) == (b.id, b.game, b.seed, b.seats)
    again = episodes(run)[32:]  # what was in flight at the checkpoint of step 4 begins anew, with its weights
    assert {t.version for e in again[:8] for t in e.turns} == {4}


# Ends as by kill -9 when step 3 is written down and its checkpoint is not.
KILLED = """
import os, signal, sys
from ludus.cli import main
from ludus.train.rundir import RunDir

append = RunDir.append

def last(self, record):
    append(self, record)
    if record["step"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)

RunDir.append = last
main(sys.argv[1:])
"""


def test_a_kill_loses_no_match_and_repeats_none(tiny_model: Path, tmp_path: Path) -> None:
    wanted = ahead(tiny_model, train={"steps": 6, "checkpoint_every": 1, "save_episodes": True})
    (tmp_path / "recipe.toml").write_text(configuration.dump(wanted))
    run = tmp_path / "run"
    ludus = [sys.executable, "-c", KILLED, "train", str(tmp_path / "recipe.toml"), "--out", str(run)]
    assert subprocess.run(ludus, stdout=subprocess.DEVNULL, check=False).returncode == -signal.SIGKILL
    assert newest(run).name == "step_00000002"
    train(wanted, run, resume=True)
    same_matches(run)
    steps = [(r["step"], "eval" in r) for r in read_metrics(run / "metrics.jsonl")]
    assert steps == [(0, True), *((s, False) for s in range(1, 7)), (6, True)]


LEAGUE: dict[str, Any] = {
    "self_weight": 0.05,
    "snapshot_every": 1,
    "keep": 3,  # so that who plays in a later step is often thinned out before its matches are counted
    "resident": 2,
    "payoff_matches": 2,
    "opponents": [{"policy": "past/uniform"}, {"policy": "random", "weight": 0.3}],
}


def test_past_selves_stay_until_their_matches_are_counted_and_are_the_same_after_a_crash(
    tiny_model: Path, tmp_path: Path
) -> None:
    wanted = ahead(tiny_model, league=LEAGUE, eval={"every": 1, "opponents": ["random", "past/0"]})
    train(wanted, tmp_path / "whole")
    same_matches(tmp_path / "whole")
    met = [{s for s in e.seats if s.startswith("past/")} for e in episodes(tmp_path / "whole")]
    assert len(set.union(*met)) > 2
    for e in episodes(tmp_path / "whole"):
        assert {t.version for t in e.turns if t.policy.startswith("past/")} <= {
            int(s.removeprefix("past/")) for s in e.seats if s.startswith("past/")
        }
    kept = json.loads((newest(tmp_path / "whole") / "trainer" / "state.json").read_text())["league"]
    assert kept["playing"] == {}
    known = {"random", "self", *(f"past/{step}" for step in kept["snapshots"])}
    for rows in kept["payoffs"].values():  # of who is gone nothing is kept, however late its matches ended
        assert set(rows) | {name for columns in rows.values() for name in columns} <= known

    run = crashed(tmp_path / "whole", tmp_path / "run")
    train(wanted, run, resume=True)
    same_matches(run)
    drawn = [[e.seats for e in episodes(x)[32:]] for x in (tmp_path / "whole", run)]
    assert drawn[0] == drawn[1]  # steps 5 and 6 had begun at the checkpoint of step 4
    assert {step for step, _ in snapshots(run)} >= {
        int(p.removeprefix("past/")) for p in trained(run)[-1]["league"]["population"]
    }


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"loss": {"proximal": "sampler"}}, "set loss.proximal = 'learner'"),
        ({"engine": {"matmul": "medium"}}, "where rollout.max_lag > 0; set it to 'highest'"),
    ],
)
def test_what_does_not_go_together(sections: dict[str, Any], says: str, tiny_model: Path) -> None:
    config(tiny_model, **sections)
    with pytest.raises(UserError, match=says):
        ahead(tiny_model, **sections)
