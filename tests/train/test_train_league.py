"""Runs with past selves: who plays with which weights, what is kept, and that a kill loses nothing of it."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import config, dealt_kills, episodes, newest, trained
from torch import Tensor
from transformers import AutoModelForCausalLM

from ludus import measuring
from ludus.cli import main
from ludus.config import RunConfig
from ludus.engines.torch_engine import TorchEngine
from ludus.errors import UserError
from ludus.learner.learner import NonFinite
from ludus.records import read_metrics
from ludus.rollout.scheduler import play_all
from ludus.seeding import derive
from ludus.train import checkpoint
from ludus.train.assemble import house_rules, open_games, open_model, open_player
from ludus.train.loop import Trainer, train
from ludus.train.past import folder, open_past, snapshots
from ludus.train.rundir import RunDir, stored_config
from ludus.types import MatchPlan, Turn

LEAGUE: dict[str, Any] = {
    "self_weight": 0.5,
    "snapshot_every": 1,
    "keep": 4,
    "payoff_matches": 4,
    "opponents": [
        {"policy": "past/hard"},
        {"policy": "past/latest:2"},
        {"policy": "past/uniform", "games": ["tic_tac_toe"]},
        {"policy": "random", "games": ["kuhn_poker"]},
    ],
}


def league(directory: Path, **sections: Any) -> RunConfig:
    """Six steps of twelve matches against past selves and a program; a checkpoint after every other one."""
    settled: dict[str, Any] = {
        "rollout": {"matches": 12},
        "train": {"steps": 6},
        "optim": {"schedule": "constant", "lr": 3e-3},
        "league": LEAGUE,
        "eval": {"opponents": ["random", "past/0"]},
    }
    for name, section in sections.items():
        settled[name] = {**settled.get(name, {}), **section} if isinstance(section, dict) else section
    return config(directory, **settled)


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of it. Read-only."""
    out = tmp_path_factory.mktemp("league") / "finished"
    train(league(tiny_model), out)
    return out


def on_disk(run: Path) -> list[int]:
    return [step for step, _ in snapshots(run)]


def state(found: Path) -> dict[str, Any]:
    kept: dict[str, Any] = json.loads((found / "trainer" / "state.json").read_text())
    return kept


def weights(model: Path) -> dict[str, Tensor]:
    return load_file(model / "model.safetensors")


def copy(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


def damage(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes(raw)


# --- who plays, with which weights, and who learns ---


def test_past_selves_play_under_their_own_names_and_are_never_trained_on(finished: Path) -> None:
    played = episodes(finished)
    for step, record in enumerate(trained(finished)):
        batch = played[12 * step : 12 * step + 12]
        turns = [turn for episode in batch for turn in episode.turns]
        assert all(turn.trainable == (turn.policy == "self") for turn in turns)
        assert all(turn.policy == episode.seats[turn.seat] for episode in batch for turn in episode.turns)
        mine = [turn for turn in turns if turn.policy == "self"]
        assert record["learn"]["turns"] == len(mine)
        assert record["learn"]["tokens"] == sum(len(turn.completion_ids) for turn in mine)
        assert {turn.version for turn in mine} == {step}
        for turn in turns:
            if turn.policy.startswith("past/"):
                assert turn.version == int(turn.policy.removeprefix("past/")) <= step
        met = Counter(seat for episode in batch for seat in set(episode.seats) - {"self"})
        assert record["league"]["met"] == dict(met)
        assert set(met) <= {*(f"past/{n}" for n in range(step + 1)), "random"}


def test_against_the_frozen_every_seat_is_trained(finished: Path) -> None:
    seats = [(e.game, e.seats.index("self")) for e in episodes(finished) if set(e.seats) != {"self"}]
    assert {game: {seat for g, seat in seats if g == game} for game, _ in seats} == {
        "kuhn_poker": {0, 1},
        "tic_tac_toe": {0, 1},
    }


def test_opponents_keep_to_their_games(finished: Path) -> None:
    assert {e.game for e in episodes(finished) if "random" in e.seats} == {"kuhn_poker"}


def test_an_opponent_with_a_role_of_its_own_never_leaves_it(tiny_model: Path, tmp_path: Path) -> None:
    """Nor does its role learn, and the policy's record against it is that of the other seat alone."""
    opponents = [{"policy": "past/0", "roles": ["player_1"]}, {"policy": "random", "roles": ["player_0"]}]
    wanted = league(
        tiny_model,
        games=[{"name": "kuhn_poker"}],
        league={**LEAGUE, "self_weight": 0, "opponents": opponents},
        train={"steps": 2},
        eval={"opponents": ["past/0"]},
    )
    train(wanted, tmp_path / "run")
    played = episodes(tmp_path / "run")
    assert {e.seats for e in played} == {("self", "past/0"), ("random", "self")}
    assert all(turn.trainable == (turn.policy == "self") for e in played for turn in e.turns)
    counts = state(newest(tmp_path / "run"))["league"]["payoffs"]["kuhn_poker"]
    records = trained(tmp_path / "run")
    met = {name: sum(r["league"]["met"][name] for r in records) for name in ("past/0", "random")}
    # Each of two snapshots met past/0 in two deals and both seatings, of which one is the league's; and each
    # of three met the program in four deals, always in the same seat.
    assert counts["self"]["past/0"][0] == met["past/0"] + 2 * 2
    assert counts["self"]["random"][0] == met["random"] + 3 * 4
    assert counts["past/1"]["past/0"][0] == counts["past/2"]["past/0"][0] == 4
    assert counts["past/2"]["random"][0] == 4


def replies_of(model: Path, turns: list[Turn]) -> list[list[float]]:
    """The log-probabilities of recorded replies under the model in a directory, by transformers alone."""
    network = AutoModelForCausalLM.from_pretrained(model)
    found = []
    for turn in turns:
        ids = torch.tensor([[*turn.prompt_ids, *turn.completion_ids]])
        with torch.inference_mode():
            law = network(ids).logits[0].float().log_softmax(-1)
        first = len(turn.prompt_ids)
        found.append([float(law[first + k - 1, token]) for k, token in enumerate(turn.completion_ids)])
    return found


def test_a_past_self_speaks_with_the_weights_of_its_step(finished: Path, tiny_model: Path) -> None:
    turns = [turn for episode in episodes(finished) for turn in episode.turns]
    checked = 0
    for step, where in snapshots(finished):
        said = [turn for turn in turns if turn.policy == f"past/{step}"][:6]
        for turn, logprobs in zip(said, replies_of(where, said), strict=True):
            assert turn.logprobs == pytest.approx(logprobs, abs=2e-4)
            checked += 1
        other = folder(finished, 6 if step == 0 else 0)
        worst = max(
            (
                abs(a - b)
                for turn, logprobs in zip(said, replies_of(other, said), strict=True)
                for a, b in zip(turn.logprobs, logprobs, strict=True)
            ),
            default=1.0,
        )
        assert worst > 0.01  # or else the comparison above would prove nothing
    assert checked >= 12


def test_snapshots_are_the_weights_after_their_steps(finished: Path, tiny_model: Path) -> None:
    first, start = weights(folder(finished, 0)), weights(tiny_model)
    assert first.keys() == start.keys()
    assert all(torch.equal(first[name], start[name]) for name in start)
    for step, found in checkpoint.steps(finished):
        learner = load_file(found / "trainer" / "learner.safetensors")
        for name, tensor in weights(folder(finished, step)).items():
            assert torch.equal(tensor, learner[f"model.{name}"])
    model = AutoModelForCausalLM.from_pretrained(folder(finished, 6))  # an ordinary model directory
    assert model.config.hidden_size == 32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_newest_snapshot_and_the_policy_itself_are_one(
    dtype: str, tiny_model: Path, tmp_path: Path
) -> None:
    """To the last bit, also where the recipe's model is in bfloat16: its weights are kept in float32."""
    wanted = league(tiny_model, model={"dtype": dtype})
    trainer = Trainer(wanted)

    async def scores() -> dict[str, list[list[float]]]:
        with RunDir.create(tmp_path / "run", wanted) as run:
            await trainer.begin(run)
            await trainer.step(run, 0)
            for past in ("past/0", "past/1"):
                open_past(trainer.me, run.path, past)
        return {
            p: await trainer.me.engine.score(p, [[5, 6]], [[7, 8, 9]]) for p in trainer.me.engine.versions
        }

    found = asyncio.run(scores())
    assert found["past/1"] == found["self"] != found["past/0"]


def test_a_snapshot_is_the_policy_and_not_its_moving_average(tiny_model: Path, tmp_path: Path) -> None:
    wanted = league(
        tiny_model,
        optim={"average": 0.9},
        train={"steps": 2},
        league={**LEAGUE, "payoff_matches": 0},
        eval={"opponents": ["random"]},
    )
    train(wanted, tmp_path / "run")
    learner = load_file(newest(tmp_path / "run") / "trainer" / "learner.safetensors")
    shipped = weights(newest(tmp_path / "run") / "model")
    for name, tensor in weights(folder(tmp_path / "run", 2)).items():
        assert torch.equal(tensor, learner[f"model.{name}"])
        assert torch.equal(shipped[name], learner[f"average.{name}"])
    assert any(not torch.equal(shipped[n], learner[f"model.{n}"]) for n in shipped)


# --- the payoff matrix ---


def test_the_matrix_says_what_two_snapshots_get_from_each_other(finished: Path) -> None:
    """Its cells are played again from the directories alone."""
    (matrix,) = [r["league"]["matrix"] for r in trained(finished) if r["step"] == 6]
    assert matrix["names"] == ["past/0", "past/2", "past/5", "past/6", "random"]
    where = measuring.find(folder(finished, 6))
    me = open_player(where.config, open_model(where.config))
    players = {"self": me, "past/2": open_past(me, finished, "past/2")}
    games = open_games(where.config)
    for game in games:
        plans = [
            MatchPlan(
                0,
                0,
                game,
                ("self", "past/2") if seat == 0 else ("past/2", "self"),
                derive(3, "payoff", game, deal),
                derive(3, "payoff", game, "past/6", "past/2", deal, seat),
            )
            for deal in (0, 1)
            for seat in (0, 1)
        ]
        again = asyncio.run(play_all(plans, games, players, rule=house_rules(where.config, games)))
        mean = sum(e.returns[plan.seats.index("self")] for e, plan in zip(again, plans, strict=True)) / 4
        margins = matrix["margins"][game]
        assert margins[3][1] == mean
        assert margins[1][3] == -mean


def test_who_never_met_has_no_margin(finished: Path) -> None:
    matrices = {r["step"]: r["league"]["matrix"] for r in trained(finished)}
    assert list(matrices) == [1, 2, 3, 4, 5, 6]
    for matrix in matrices.values():
        names, others = matrix["names"], matrix["names"].index("random")
        for game, rows in matrix["margins"].items():
            for i in range(len(names)):
                for j in range(len(names)):
                    met = i != j and (game == "kuhn_poker" or others not in (i, j))
                    assert (rows[i][j] is not None) == met
                    if met:
                        assert rows[i][j] == -rows[j][i]


def test_scores_are_told_of_everyone_met_who_is_still_there(finished: Path) -> None:
    for record in trained(finished):
        said = record["league"]
        before = {f"past/{n}" for n in range(record["step"])}
        assert set(said["scores"]) == {"kuhn_poker", "tic_tac_toe"}
        assert set(said["scores"]["tic_tac_toe"]) <= before
        assert set(said["scores"]["kuhn_poker"]) <= {*before, "random"}
        assert {name for name in said["met"] if name in said["population"]} <= {
            name for scores in said["scores"].values() for name in scores
        }
        assert all(0 <= score <= 1 for scores in said["scores"].values() for score in scores.values())


def test_a_checkpoint_holds_no_more_than_the_living_have_played(finished: Path) -> None:
    """Or else a long run's checkpoints would grow with every snapshot."""
    kept = state(newest(finished))["league"]
    living = {"past/0", "past/2", "past/5", "past/6"}
    assert kept["snapshots"] == [0, 2, 5, 6]
    for rows in kept["payoffs"].values():
        assert set(rows) <= {"self", *living}
        assert all(set(columns) <= {*living, "random"} for columns in rows.values())


def test_the_policys_own_record_fades_step_by_step(finished: Path) -> None:
    """A step leaves 0.9 of it and adds its matches, and those of its snapshot; none was masked."""
    weight, matches = 4.0, 4  # of the first snapshot against the program
    for record in trained(finished):
        met = record["league"]["met"].get("random", 0) + 4
        weight, matches = 0.9 * weight + met, matches + met
    kept = state(newest(finished))["league"]["payoffs"]["kuhn_poker"]
    assert kept["self"]["random"][:2] == [matches, pytest.approx(weight)]
    assert kept["past/6"]["random"][:2] == [4, 4.0]


# --- what is kept, on disk and in memory ---


def test_snapshots_stay_while_the_population_or_a_checkpoint_names_them(finished: Path) -> None:
    told = [record["league"]["population"] for record in trained(finished)]
    assert told[2:4] == [[f"past/{n}" for n in steps] for steps in ([0, 1, 2, 3], [0, 2, 3, 4])]
    assert told[5] == ["past/0", "past/2", "past/5", "past/6"]
    named = {step: state(path)["league"]["snapshots"] for step, path in checkpoint.steps(finished)}
    assert named == {4: [0, 2, 3, 4], 6: [0, 2, 5, 6]}
    assert on_disk(finished) == [0, 2, 3, 4, 5, 6]
    assert all(checkpoint.verify(path, step) is None for step, path in snapshots(finished))
    assert [p.name for p in (finished / "league").glob(".*")] == []


@pytest.mark.parametrize("resident", [1, 2])
def test_no_more_past_selves_are_in_memory_than_allowed(
    resident: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[set[str]] = []
    load = TorchEngine.load

    def watched(engine: TorchEngine, policy: str, weights: Mapping[str, Tensor], version: int) -> None:
        load(engine, policy, weights, version)
        held.append({name for name in engine.versions if name.startswith("past/")})

    monkeypatch.setattr(TorchEngine, "load", watched)
    opponents = [{"policy": "past/uniform"}]
    wanted = league(tiny_model, league={**LEAGUE, "resident": resident, "keep": 6, "opponents": opponents})
    train(wanted, tmp_path / "run")
    assert max(map(len, held)) == resident
    assert len(set().union(*held)) >= 5  # though many came and went


# --- resumes ---


def test_kill_9_at_random_moments_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    settled = league(tiny_model, train={"steps": 4})
    last = dealt_kills(settled, tiny_model, tmp_path, kills=4, seed=2)
    assert last.startswith("4 kills in ")
    assert ", 0 different" in last


def test_a_crash_between_snapshots_and_checkpoint_is_taken_back(
    finished: Path, tiny_model: Path, tmp_path: Path, kills: ModuleType
) -> None:
    """Snapshots beyond the checkpoint, half written and half removed ones are cleared away."""
    run = copy(finished, tmp_path / "run")
    shutil.rmtree(newest(run))
    copy(folder(run, 6), run / "league" / "past_00000009")
    for leftover in (".tmp-past_00000006-4711", ".tmp-past_00000002"):
        (run / "league" / leftover).mkdir()
        (run / "league" / leftover / "config.json").write_text("{")
    folder(run, 5).rename(run / "league" / ".old-past_00000005")
    train(league(tiny_model), run, resume=True)
    assert kills.differences(run, finished) == []


def test_a_kill_before_the_last_pruning_is_made_good_when_the_run_is_taken_up(
    finished: Path, tiny_model: Path, tmp_path: Path, kills: ModuleType
) -> None:
    run = copy(finished, tmp_path / "run")
    copy(folder(run, 0), folder(run, 1))
    assert kills.differences(run, finished) == ["league"]
    train(league(tiny_model), run, resume=True)
    assert kills.differences(run, finished) == []


def test_without_a_checkpoint_the_population_begins_anew(
    finished: Path, tiny_model: Path, tmp_path: Path, kills: ModuleType
) -> None:
    run = copy(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    train(league(tiny_model), run, resume=True)
    assert kills.differences(run, finished) == []


@pytest.mark.parametrize(
    ("victim", "said"),
    [
        ("checkpoints/step_00000006/model/model.safetensors", "step_00000006 is damaged: model/model"),
        ("league/past_00000006/model.safetensors", "past_00000006, model.safetensors has another SHA-256"),
        ("league/past_00000005", "past_00000005, MANIFEST.json cannot be read"),
    ],
    ids=["checkpoint", "snapshot", "missing snapshot"],
)
def test_what_is_damaged_is_named_and_made_anew_from_the_checkpoint_before(
    victim: str, said: str, finished: Path, tiny_model: Path, tmp_path: Path, kills: ModuleType
) -> None:
    run = copy(finished, tmp_path / "run")
    if (run / victim).is_dir():
        shutil.rmtree(run / victim)
    else:
        damage(run / victim)
    train(league(tiny_model), run, resume=True)
    log = (run / "log.txt").read_text()
    assert said in log
    assert "using the one before it" in log
    assert "resumed from" in log
    assert kills.differences(run, finished) == []


def test_a_checkpoint_made_whole_by_a_snapshot_made_anew_is_not_ahead_of_its_metrics(
    finished: Path, tiny_model: Path, tmp_path: Path, kills: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of step 6 lacks a snapshot of step 5; killed after it was made anew, the run still
    lacks the records of step 6."""
    run = copy(finished, tmp_path / "run")
    damage(folder(run, 5) / "model.safetensors")
    step = Trainer.step

    async def killed(trainer: Trainer, run: RunDir, number: int) -> dict[str, Any]:
        if number == 5:
            raise KeyboardInterrupt
        return await step(trainer, run, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(league(tiny_model), run, resume=True)
    assert checkpoint.verify(folder(run, 5), 5) is None
    train(league(tiny_model), run, resume=True)
    assert kills.differences(run, finished) == []


def test_a_snapshot_that_every_checkpoint_needs_stops_the_resume(
    finished: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run = copy(finished, tmp_path / "run")
    damage(folder(run, 0) / "model.safetensors")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name not in ("log.txt", "lock")}
    with pytest.raises(
        UserError, match=r"past_00000000, model.safetensors has another .*no whole checkpoint"
    ):
        train(league(tiny_model), run, resume=True)
    assert {p: p.read_bytes() for p in before} == before


def test_snapshots_and_checkpoints_need_not_fall_together_and_steps_may_be_added(
    tiny_model: Path, tmp_path: Path, kills: ModuleType
) -> None:
    every = {"league": {**LEAGUE, "snapshot_every": 2, "keep": 3}}
    whole = league(tiny_model, **every, train={"steps": 8, "checkpoint_every": 3})
    part = league(tiny_model, **every, train={"steps": 5, "checkpoint_every": 3})
    train(whole, tmp_path / "whole")
    train(part, tmp_path / "parts")
    shutil.rmtree(newest(tmp_path / "parts"))  # the checkpoint of step 5; that of step 3 knows past/2 alone
    assert on_disk(tmp_path / "parts") == [0, 2, 4]
    train(whole, tmp_path / "parts", resume=True)
    assert kills.differences(tmp_path / "parts", tmp_path / "whole") == []


def test_a_foreign_directory_among_the_snapshots_is_left_alone(
    finished: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run = copy(finished, tmp_path / "run")
    (run / "league" / "past_best").mkdir()
    shutil.rmtree(newest(run))
    train(league(tiny_model), run, resume=True)
    assert (run / "league" / "past_best").is_dir()


def test_the_comparison_notices_other_snapshots_and_another_matrix(
    finished: Path, tmp_path: Path, kills: ModuleType
) -> None:
    def changed(name: str, change: Callable[[Path], None]) -> list[str]:
        run = copy(finished, tmp_path / name)
        change(run)
        found: list[str] = kills.differences(run, finished)
        return found

    def payoff(run: Path) -> None:
        kept = state(newest(run))
        kept["league"]["payoffs"]["kuhn_poker"]["self"]["past/0"][2] += 1e-9
        (newest(run) / "trainer" / "state.json").write_text(json.dumps(kept))

    def matrix(run: Path) -> None:
        file = run / "metrics.jsonl"
        file.write_text(file.read_text().replace('"past/2"', '"past/1"', 1))

    assert changed("weights", lambda run: damage(folder(run, 5) / "model.safetensors")) == ["league"]
    assert changed("gone", lambda run: shutil.rmtree(folder(run, 5))) == ["league"]
    assert changed("left", lambda run: (run / "league" / ".tmp-x").write_text("")) == ["league"]
    assert changed("payoff", payoff) == ["trainer/state.json of step 6"]
    assert changed("matrix", matrix) == ["metrics"]


def test_a_run_that_kept_no_first_model_cannot_be_measured_against_it_later(
    tiny_model: Path, tmp_path: Path
) -> None:
    train(config(tiny_model, train={"steps": 1}, optim={"schedule": "constant"}), tmp_path / "run")
    wanted = config(
        tiny_model, train={"steps": 2}, optim={"schedule": "constant"}, eval={"opponents": ["past/0"]}
    )
    with pytest.raises(UserError, match=r"kept no past selves.*take past/0 out of eval\.opponents"):
        train(wanted, tmp_path / "run", resume=True)
    assert len(trained(tmp_path / "run")) == 1
    assert stored_config(tmp_path / "run").eval.opponents == ("random",)  # a refusal leaves all as it was


def test_weights_that_are_not_finite_become_no_snapshot(tiny_model: Path, tmp_path: Path) -> None:
    wanted = league(tiny_model, optim={"lr": 1e39, "warmup_steps": 0})
    with pytest.raises(NonFinite, match="no checkpoint or snapshot of this step"):
        train(wanted, tmp_path / "run")
    assert on_disk(tmp_path / "run") == [0]


# --- measuring against past selves ---


def test_past_0_is_the_model_before_the_first_step(finished: Path, tiny_model: Path) -> None:
    target = measuring.find(finished, overrides=['eval.opponents=["past/0"]'])
    me = open_player(target.config, open_model(target.config))
    first = open_past(me, finished, "past/0")
    assert (first.policy, first.trainable) == ("past/0", False)
    (turn, *_) = [t for e in episodes(finished) for t in e.turns if t.completion_ids]
    pairs = [turn.prompt_ids], [turn.completion_ids]
    for policy, directory in (("past/0", tiny_model), ("self", newest(finished) / "model")):
        (scored,) = asyncio.run(me.engine.score(policy, *pairs))
        (wanted,) = replies_of(directory, [turn])
        assert scored == pytest.approx(wanted, abs=2e-4)
    measured = measuring.measure(target)
    for game in ("kuhn_poker", "tic_tac_toe"):
        assert list(measured["games"][game]["opponents"]) == ["past/0"]


def test_a_schedule_measures_against_past_0(finished: Path) -> None:
    for record in read_metrics(finished / "metrics.jsonl"):
        if "eval" in record:
            assert set(record["eval"]["games"]["kuhn_poker"]["opponents"]) == {"random", "past/0"}


def test_who_is_not_there_or_not_whole_is_told(
    finished: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(finished), 'eval.opponents=["past/1"]']) == 2
    err = capsys.readouterr().err
    assert "no snapshot of step 1; it has past/0, past/2, past/3, past/4, past/5, past/6" in err
    run = copy(finished, tmp_path / "run")
    damage(folder(run, 2) / "model.safetensors")
    assert main(["eval", str(run), 'eval.opponents=["past/2"]']) == 2
    assert "past_00000002 is damaged: model.safetensors has another SHA-256" in capsys.readouterr().err
    alone = ["eval", str(tiny_model), "--game", "kuhn_poker", 'eval.opponents=["past/0"]']
    assert main(alone) == 2
    assert "lies in no run, so 'past/0' is nobody" in capsys.readouterr().err


def test_snapshots_play_a_tournament(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entrants = [f"{step}={folder(finished, step)}" for step in (0, 4, 6)]
    options = ["--game", "kuhn_poker", "--matches", "4", "--out", str(tmp_path / "out"), "--json"]
    assert main(["tournament", *entrants, *options]) == 0
    game = json.loads(capsys.readouterr().out)["games"]["kuhn_poker"]
    assert {standing["name"] for standing in game["standings"]} == {"0", "4", "6"}
    assert main(["tournament", "past/0", "random", "--game", "kuhn_poker"]) == 2
    assert "name its directory: RUN/league/past_00000000" in capsys.readouterr().err


# --- recipes that cannot work ---


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"league": {"opponents": [{"policy": "past/hard"}]}}, "'past/hard' needs past selves"),
        ({"league": {**LEAGUE, "opponents": [{"policy": "past/foo"}]}}, "'past/foo' is no rule for past"),
        ({"league": {**LEAGUE, "opponents": [{"policy": "past/25"}]}}, "'past/25' is no rule for past"),
        ({"league": {**LEAGUE, "opponents": [{"policy": "past/latest:0"}]}}, "'past/latest:0' is no rule"),
        (
            {"league": {**LEAGUE, "opponents": [{"policy": "past/latest:4"}]}},
            "'past/latest:4' needs as many snapshots beside the first one; set league.keep to at least 5",
        ),
        (
            {"league": {**LEAGUE, "opponents": [{"policy": "past/0", "model": "m"}]}},
            "'past/0' names a past self; choose another name",
        ),
        ({"league": {**LEAGUE, "keep": 1}}, "league.keep"),
        ({"eval": {"opponents": ["past/uniform"]}}, "'past/uniform' is no fixed opponent"),
        ({"eval": {"opponents": ["past/25"]}}, "'past/25' is not there from a run's beginning to its end"),
    ],
    ids=lambda v: None if isinstance(v, dict) else v[:24],
)
def test_a_recipe_that_cannot_work_is_told_before_anything_is_written(
    sections: dict[str, Any], said: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        train(config(tiny_model, **sections), tmp_path / "run")
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []
