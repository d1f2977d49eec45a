"""The whole walk on a very small model: exact resumes, kills, damage, bad input, infinite numbers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import config, dealt_kills, episodes, newest, trained
from transformers import AutoModelForCausalLM, AutoTokenizer

from ludus import config as configuration
from ludus.errors import UserError
from ludus.games import registry
from ludus.games.base import Game, Match, Observation, Payoff
from ludus.learner.learner import NonFinite
from ludus.records import episode_files, read_metrics
from ludus.train import checkpoint
from ludus.train.loop import train


def crashed(run: Path, to: Path) -> Path:
    """A copy of a finished run as a crash just before its last checkpoint would have left it."""
    shutil.copytree(run, to)
    shutil.rmtree(newest(to))
    with (to / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "learn": {"lo')  # cut off in the middle
    return to


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of the plain recipe. Read-only."""
    out = tmp_path_factory.mktemp("loop") / "finished"
    train(config(tiny_model), out)
    return out


# --- what a run leaves ---


def test_a_run_leaves_what_it_should(finished: Path, tiny_model: Path) -> None:
    records = read_metrics(finished / "metrics.jsonl")
    assert [(r["step"], "eval" in r) for r in records] == [
        (0, True),
        (1, False),
        (2, False),
        (3, False),
        (4, False),
        (4, True),
    ]
    assert [r["version"] for r in trained(finished)] == [1, 2, 3, 4]
    assert [step for step, _ in checkpoint.steps(finished)] == [2, 4]
    assert configuration.load(finished / "config.toml") == config(tiny_model)
    played = episodes(finished)
    assert [e.id for e in played] == list(range(32))
    assert {t.version for e in played[:8] for t in e.turns} == {0}  # each step plays with the newest weights
    assert {t.version for e in played[24:] for t in e.turns} == {3}
    assert all(sum(e.returns) == 0 for e in played)
    for record, number in zip(trained(finished), range(4), strict=True):
        batch = played[8 * number : 8 * number + 8]
        replies = [t for e in batch for t in e.turns]
        assert record["learn"]["turns"] == len(replies)
        assert record["learn"]["tokens"] == sum(len(t.completion_ids) for t in replies)
        assert sum(g["turns"] for g in record["games"].values()) == len(replies)


def test_the_last_checkpoint_loads_untouched_and_has_learnt(finished: Path, tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(newest(finished) / "model")
    AutoTokenizer.from_pretrained(newest(finished) / "model")
    before = load_file(tiny_model / "model.safetensors")
    state = load_file(newest(finished) / "trainer" / "learner.safetensors")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, state[f"model.{name}"])
    assert any(not torch.equal(weight, before[n]) for n, weight in model.named_parameters() if n in before)


def test_a_finished_run_may_be_resumed_and_stays_as_it_is(
    finished: Path, tiny_model: Path, tmp_path: Path, kills: ModuleType
) -> None:
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    train(config(tiny_model), again, resume=True)
    assert kills.differences(again, finished) == []


# --- four steps equal two, a crash, a resume and two more ---

OPTIM = {"lr": 1e-2, "epochs": 2, "minibatches": 2, "average": 0.9, "weight_decay": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "everything that the learner keeps": {
        "optim": OPTIM,
        "loss": {"magnet_kl": 0.1, "magnet_every": 3, "reference_kl": 0.05, "entropy": 0.01},
        "eval": {"every": 1, "exploitability": True, "thoughts": 2},
    },
    "grpo in chat against a random opponent": {
        "text": {"rules": False, "context": "chat"},
        "engine": {"slots": 16, "context": 1024},
        "rollout": {"group_size": 4, "retries": 1, "forfeit": "spiral", "max_tokens": 24},
        "league": {"self_weight": 1.0, "opponents": [{"policy": "random", "weight": 2.0}]},
        "algo": {"estimator": "grpo"},
    },
    "marshal, many in flight at once": {
        "algo": {"estimator": "marshal", "discount": 0.9},
        "engine": {"slots": 3},
        "rollout": {"matches": 12, "in_flight": 12, "max_tokens": 24, "temperature": 0.8},
    },
}


@pytest.mark.parametrize("variant", ["plain", *VARIANTS])
def test_a_resume_equals_the_undisturbed_run_bit_for_bit(
    variant: str, tiny_model: Path, finished: Path, tmp_path: Path, kills: ModuleType
) -> None:
    wanted = config(tiny_model, **VARIANTS.get(variant, {}))
    whole = finished
    if variant != "plain":
        whole = tmp_path / "whole"
        train(wanted, whole)
    resumed = crashed(whole, tmp_path / "resumed")
    assert [step for step, _ in checkpoint.steps(resumed)] == [2]
    train(wanted, resumed, resume=True)
    assert kills.differences(resumed, whole) == []
    for _, path in episode_files(whole):
        assert (resumed / "episodes" / path.name).read_bytes() == path.read_bytes()


def test_two_steps_extended_to_four_equal_four(tiny_model: Path, tmp_path: Path, kills: ModuleType) -> None:
    """With a constant rate the number of steps may still be raised when a run is taken up again."""
    optim = {"schedule": "constant"}
    train(config(tiny_model, optim=optim), tmp_path / "whole")
    train(config(tiny_model, optim=optim, train={"steps": 2}), tmp_path / "parts")
    train(config(tiny_model, optim=optim), tmp_path / "parts", resume=True)
    # The shorter run was measured at its end, step 2; nothing else tells the two apart.
    assert kills.differences(tmp_path / "parts", tmp_path / "whole") == ["metrics"]
    assert [r["learn"] for r in trained(tmp_path / "parts")] == [
        r["learn"] for r in trained(tmp_path / "whole")
    ]


def test_a_crash_before_the_first_checkpoint_starts_over(
    finished: Path, tiny_model: Path, tmp_path: Path, kills: ModuleType
) -> None:
    resumed = crashed(finished, tmp_path / "resumed")
    shutil.rmtree(resumed / "checkpoints")
    train(config(tiny_model), resumed, resume=True)
    assert kills.differences(resumed, finished) == []


def test_the_comparison_notices_differences(finished: Path, tmp_path: Path, kills: ModuleType) -> None:
    """Or else all the tests above would prove nothing."""

    def changed(name: str, change: Callable[[Path], None]) -> list[str]:
        copy = tmp_path / name
        shutil.copytree(finished, copy)
        change(copy)
        found: list[str] = kills.differences(copy, finished)
        return found

    def flip(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)

    def credit(run: Path) -> None:
        file = newest(run) / "trainer" / "state.json"
        state = json.loads(file.read_text())
        next(iter(state["credit"]["baselines"]["kuhn_poker"].values()))["mean"] += 1e-12
        file.write_text(json.dumps(state))

    def swap_episodes(run: Path) -> None:
        files = [path for _, path in episode_files(run)]
        files[1].write_bytes(files[2].read_bytes())

    def metrics(run: Path) -> None:
        file = run / "metrics.jsonl"
        file.write_text(file.read_text().replace('"turns": ', '"turns": 1', 1))

    assert changed("weights", lambda run: flip(newest(run) / "model" / "model.safetensors")) == [
        "model/model.safetensors of step 4"
    ]
    assert changed("optimizer", lambda run: flip(newest(run) / "trainer" / "learner.safetensors")) == [
        "trainer/learner.safetensors of step 4"
    ]
    assert changed("credit", credit) == ["trainer/state.json of step 4"]
    assert changed("episodes", swap_episodes) == ["episodes of step 2"]
    assert changed("lost", lambda run: episode_files(run)[0][1].unlink()) == [
        "episodes of steps [2, 3, 4] against [1, 2, 3, 4]"
    ]
    assert changed("metrics", metrics) == ["metrics"]
    assert changed("late", lambda run: shutil.rmtree(newest(run))) == ["last checkpoint [2] against [4]"]


# --- kills and damage ---


def test_kill_9_at_random_moments_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    settled = config(tiny_model, train={"steps": 6, "checkpoint_every": 1}, loss={"magnet_kl": 0.1})
    last = dealt_kills(settled, tiny_model, tmp_path, kills=5, seed=1)
    assert last.startswith("5 kills in ")
    assert ", 0 different" in last


def test_a_second_writer_is_refused(tiny_model: Path, finished: Path, tmp_path: Path) -> None:
    run = crashed(finished, tmp_path / "run")
    code = f"""
        import fcntl, time
        file = open({str(run / "lock")!r}, "a+b")
        fcntl.flock(file, fcntl.LOCK_EX)
        print("held", flush=True)
        time.sleep(600)
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
        with pytest.raises(UserError, match="is being written by process"):
            train(config(tiny_model), run, resume=True)
        with pytest.raises(UserError, match="is not empty, and nothing is overwritten"):
            train(config(tiny_model), run)
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    finally:
        holder.kill()
        holder.communicate()


@pytest.mark.parametrize("victim", ["model/model.safetensors", "trainer/state.json", "MANIFEST.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_leads_to_the_same_end(
    victim: str, finished: Path, tiny_model: Path, tmp_path: Path, kills: ModuleType
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    raw = bytearray((newest(run) / victim).read_bytes())
    raw[len(raw) // 2] ^= 4
    (newest(run) / victim).write_bytes(raw)
    train(config(tiny_model), run, resume=True)
    log = (run / "log.txt").read_text()
    assert f"{newest(run)} is damaged: {victim}" in log
    assert "using the one before it" in log
    assert "resumed from" in log
    assert kills.differences(run, finished) == []
    assert checkpoint.latest(run) == newest(run)  # whole again


# --- numbers that are not finite ---


def all_finite(run: Path) -> bool:
    return all(
        bool(tensor.isfinite().all())
        for _, path in checkpoint.steps(run)
        for file in path.rglob("*.safetensors")
        for tensor in load_file(file).values()
    )


@pytest.mark.parametrize("lr", [1e30, 1e39])
def test_an_absurd_rate_stops_the_run_before_a_checkpoint(
    lr: float, tiny_model: Path, tmp_path: Path
) -> None:
    """1e30 overflows in the next forward pass; 1e39 makes the weights themselves infinite."""
    wanted = config(
        tiny_model,
        optim={"lr": lr, "warmup_steps": 0, "schedule": "constant"},
        train={"checkpoint_every": 1},
        eval={"final_matches": 2},
    )
    with pytest.raises((NonFinite, FloatingPointError)):
        train(wanted, tmp_path / "run")
    assert all_finite(tmp_path / "run")
    assert len(trained(tmp_path / "run")) <= 2


def test_poisoned_weights_are_told_before_anything_is_written(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(tiny_model / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"not finite: its weights are damaged; copy or make it again"):
        train(config(tmp_path / "model"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_infinite_return_stops_before_the_update(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third party's game may pay anything; what was saved before it does stays good."""
    good = registry.make("kuhn_poker")

    class Broken:
        """Kuhn poker that pays infinitely much."""

        name, roles, payoff = "broken", good.roles, good.payoff
        max_turns, min_return = good.max_turns, -2.0

        def start(self, seed: int) -> Match:
            match = good.start(seed)
            match.returns = lambda: (float("inf"), float("-inf"))  # type: ignore[method-assign]
            return match

    monkeypatch.setitem(registry.GAMES, "broken", Broken)
    with pytest.raises(NonFinite, match=r"update 0: .* is not finite .*no weight was changed"):
        train(config(tiny_model, games=[{"name": "broken"}], eval={"opponents": []}), tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run") == []
    assert trained(tmp_path / "run") == []


# --- who plays ---


def test_a_frozen_opponent_is_played_in_every_seat_and_never_trained_on(
    tiny_model: Path, tmp_path: Path
) -> None:
    wanted = config(
        tiny_model,
        league={"self_weight": 0.0, "opponents": [{"policy": "random"}]},
        train={"steps": 2, "checkpoint_every": 2},
    )
    train(wanted, tmp_path / "run")
    played = episodes(tmp_path / "run")
    for game in ("kuhn_poker", "tic_tac_toe"):
        seats = [e.seats for e in played if e.game == game]
        assert seats == [("self", "random"), ("random", "self")] * 4
    for record, batch in zip(trained(tmp_path / "run"), (played[:8], played[8:]), strict=True):
        mine = [t for e in batch for t in e.turns if t.policy == "self"]
        assert all(t.trainable == (t.policy == "self") for e in batch for t in e.turns)
        assert record["learn"]["turns"] == len(mine)
        assert record["learn"]["tokens"] == sum(len(t.completion_ids) for t in mine)


def test_groups_share_deal_and_opponent_and_grpo_learns_from_them(tiny_model: Path, tmp_path: Path) -> None:
    wanted = config(tiny_model, **VARIANTS["grpo in chat against a random opponent"], train={"steps": 1})
    train(wanted, tmp_path / "run")
    played = episodes(tmp_path / "run")
    for first in (0, 4):
        group = played[first : first + 4]
        assert len({(e.game, e.seed, e.seats) for e in group}) == 1
    assert trained(tmp_path / "run")[0]["learn"]["grad_norm"] > 0


def test_chat_makes_one_row_of_a_seats_dialogue(tiny_model: Path, tmp_path: Path) -> None:
    wanted = config(
        tiny_model,
        games=[{"name": "tic_tac_toe"}],
        text={"context": "chat"},
        engine={"context": 1024},
        train={"steps": 1},
    )
    train(wanted, tmp_path / "run")
    learn = trained(tmp_path / "run")[0]["learn"]
    seats = {(e.id, t.seat) for e in episodes(tmp_path / "run") for t in e.turns}
    assert learn["rows"] == len(seats) < learn["turns"]


class Auction:
    """Three seats say pass or bet one after another; the last to bet wins 1 from each of the others."""

    name, roles, payoff = "auction", ("a", "b", "c"), Payoff.ZERO_SUM
    max_turns, min_return = 3, -1.0

    def start(self, seed: int) -> Match:
        return AuctionMatch()


class AuctionMatch:
    def __init__(self) -> None:
        self.said: list[str] = []

    def to_act(self) -> tuple[int, ...]:
        return (len(self.said),) if len(self.said) < 3 else ()

    def observe(self, seat: int) -> Observation:
        # In the words of Kuhn poker, which the model of these tests can answer.
        state = f"You are player {seat}. Your card: K. Moves: {' '.join(self.said) or 'none'}."
        return Observation("Bet last.", tuple(self.said), state, ("pass", "bet"), None)

    def play(self, actions: dict[int, str]) -> None:  # type: ignore[override]
        (said,) = actions.values()
        if said not in ("pass", "bet"):
            from ludus.games.base import IllegalAction

            raise IllegalAction(len(self.said), "no such move")
        self.said.append(said)

    def returns(self) -> tuple[float, ...]:
        bets = [seat for seat, said in enumerate(self.said) if said == "bet"]
        return tuple((2.0 if seat == bets[-1] else -1.0) if bets else 0.0 for seat in range(3))

    def sample(self, seat: int, rng: Any) -> str:
        return str(rng.choice(("pass", "bet")))


def test_a_game_of_three_seats_can_be_trained_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def auction() -> Game:
        """Three seats."""
        return Auction()  # type: ignore[return-value]

    monkeypatch.setitem(registry.GAMES, "auction", auction)
    wanted = config(tiny_model, games=[{"name": "auction"}, {"name": "kuhn_poker"}], train={"steps": 2})
    train(wanted, tmp_path / "run")
    three = [e for e in episodes(tmp_path / "run") if e.game == "auction"]
    assert len(three) == 8
    assert all(e.seats == ("self",) * 3 and sum(e.returns) == 0 for e in three)
    assert any({t.seat for t in e.turns} == {0, 1, 2} for e in three)
    measured = [r["eval"]["games"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval" in r]
    assert [list(games) for games in measured] == [["kuhn_poker"], ["kuhn_poker"]]
    state = json.loads((newest(tmp_path / "run") / "trainer" / "state.json").read_text())
    assert set(state["credit"]["baselines"]["auction"]) <= {"a", "b", "c"}


# --- recipes that cannot work leave nothing behind ---


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"model": {"path": "/nowhere/model"}}, "no model directory at /nowhere/model"),
        ({"games": [{"name": "kuhn"}]}, "unknown game 'kuhn'"),
        ({"engine": {"context": 4096}}, "the model sees at most 1024 tokens"),
        ({"league": {"opponents": [{"policy": "randm"}]}}, "unknown player 'randm'"),
        (
            {"league": {"opponents": [{"policy": "minimax"}]}},
            "league.opponents: 'minimax' cannot play kuhn_poker;",
        ),
        ({"eval": {"opponents": ["randm"]}}, "unknown player 'randm'"),
        (
            {"eval": {"opponents": ["fair_trader"]}},
            "eval.opponents: 'fair_trader' cannot play kuhn_poker, tic_tac_toe;",
        ),
        ({"rollout": {"temperature": 0.0}}, "rollout.temperature is 0"),
        ({"model": {"template": "llama3"}}, "choose the template that fits the model"),
        ({"eval": {"thoughts": 1}}, "eval.thoughts"),
    ],
    ids=lambda v: None if isinstance(v, dict) else v[:24],
)
def test_a_recipe_that_cannot_work_is_told_before_anything_is_written(
    sections: dict[str, Any], says: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        train(config(tiny_model, **sections), tmp_path / "runs" / "run")
    assert says in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_resume_refuses_another_recipe_and_changes_nothing(
    finished: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run = crashed(finished, tmp_path / "run")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"optim\.lr \(was 0\.01, now 0\.02\)"):
        train(config(tiny_model, optim={"lr": 2e-2}), run, resume=True)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
