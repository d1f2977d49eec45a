"""The run directory: one writer, nothing overwritten, and a resume that forgets exactly what it must."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ludus.config import RunConfig, load, validate
from ludus.errors import UserError
from ludus.records import encode_episodes, encode_record, read_episodes, read_metrics
from ludus.train.rundir import RunDir
from ludus.types import Episode, Stop, Turn

ROOT = Path(__file__).parents[2]


def config(**changes: object) -> RunConfig:
    data: dict[str, object] = {"name": "t", "model": {"path": "m"}, "games": [{"name": "kuhn_poker"}]}
    return validate({**data, **changes}, where="test")


def episode(number: int, text: str = "I hold 2.\n\\boxed{bet}") -> Episode:
    turn = Turn(
        seat=0,
        role="player_0",
        index=0,
        policy="self",
        version=3,
        prompt_ids=[1, 2, 3],
        completion_ids=[4, 5],
        logprobs=[-0.1, -2.0 / 3.0],
        stop=Stop.ACTION,
        action="bet",
        text=text,
        rewards={"format": 0.25},
    )
    refused = Turn(1, "player_1", 1, "random", 0, [], [], [], Stop.EOS, None, legal=False, attempt=1)
    return Episode(
        id=number,
        game="kuhn_poker",
        seed=2**62 + number,
        seats=("self", "random"),
        roles=("player_0", "player_1"),
        turns=[turn, refused],
        returns=(2.0, -2.0),
        forfeit=1,
    )


# --- who may write ---


def test_create_stores_the_configuration_resolved(tmp_path: Path) -> None:
    wanted = config(seed=7)
    with RunDir.create(tmp_path / "a" / "b", wanted) as run:
        assert load(run.path / "config.toml") == wanted


def test_create_refuses_a_directory_that_holds_anything(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not empty.*--resume.*another --out"):
        RunDir.create(tmp_path, config())
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_create_says_where_it_cannot_make_the_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make run directory"):
        RunDir.create(tmp_path / "file" / "run", config())


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run directory.*leave out --resume"):
        RunDir.open(tmp_path / "absent", config())
    assert not (tmp_path / "absent").exists()


def test_a_second_writer_is_refused_with_the_first_ones_pid(tmp_path: Path) -> None:
    with RunDir.create(tmp_path / "run", config()):
        code = (
            "from pathlib import Path; from ludus.train.rundir import RunDir; "
            f"RunDir.open(Path({str(tmp_path / 'run')!r}))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert done.returncode != 0
        assert f"is being written by process {os.getpid()}" in done.stderr
    RunDir.open(tmp_path / "run").close()


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    RunDir.create(tmp_path / "run", config()).close()
    code = textwrap.dedent(
        f"""
        import time
        from pathlib import Path
        from ludus.train.rundir import RunDir
        run = RunDir.open(Path({str(tmp_path / "run")!r}))
        print("held", flush=True)
        time.sleep(600)
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid}"):
            RunDir.open(tmp_path / "run")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    RunDir.open(tmp_path / "run").close()


def test_a_kill_right_after_the_lock_was_made_does_not_block_a_new_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "lock").write_text("4711\n")
    (run / ".tmp-config.toml").write_text("na")
    RunDir.create(run, config()).close()
    assert (run / "config.toml").is_file()


# --- what may change on a resume ---


def test_resume_takes_up_what_may_change(tmp_path: Path) -> None:
    RunDir.create(tmp_path / "run", config()).close()
    wanted = config(
        train={"steps": 500, "checkpoint_every": 7, "keep": 5},
        eval={"every": 10, "matches": 8},
        alarms={"illegal": 0.5, "stop": ["entropy", "any"]},
        # A run whose memory ran out goes on with less of it.
        optim={"microbatch_tokens": 512},
        engine={"slots": 8},
        rollout={"in_flight": 16},
        model={"path": config().model.path, "gradient_checkpointing": True},
    )
    with RunDir.open(tmp_path / "run", wanted) as run:
        assert run.config == wanted
    assert load(tmp_path / "run" / "config.toml") == wanted


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"seed": 1}, [r"seed \(was 0, now 1\)"]),
        ({"optim": {"lr": 0.5}}, [r"optim.lr \(was 1e-06, now 0.5\)"]),
        (
            {"games": [{"name": "kuhn_poker", "args": {"rounds": 5}}]},
            [r"games.0.args.rounds \(was 'absent', now 5\)"],
        ),
        ({"games": [{"name": "kuhn_poker"}, {"name": "tic_tac_toe"}]}, ["games.1.name"]),
        ({"seed": 1, "train": {"steps": 9, "save_episodes": False}}, ["seed", "train.save_episodes"]),
        ({"league": {"opponents": [{"policy": "random"}]}}, ["league.opponents"]),
    ],
)
def test_resume_refuses_other_changes_and_names_them(
    changes: dict[str, object], names: list[str], tmp_path: Path
) -> None:
    RunDir.create(tmp_path / "run", config()).close()
    stored = (tmp_path / "run" / "config.toml").read_bytes()
    with pytest.raises(UserError, match=".*".join(names)) as caught:
        RunDir.open(tmp_path / "run", config(**changes))
    assert "train.steps" not in str(caught.value)
    assert (tmp_path / "run" / "config.toml").read_bytes() == stored


# --- metrics ---


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    with RunDir.create(tmp_path / "run", config()) as run:
        run.append({"step": 1, "learn": {"loss": 0.1}})
        run.append({"step": 1, "eval": {"games": {}}})
        assert run.records() == [{"step": 1, "learn": {"loss": 0.1}}, {"step": 1, "eval": {"games": {}}}]


def test_numbers_that_are_not_finite_become_null() -> None:
    line = encode_record({"step": 1, "learn": {"loss": float("nan"), "kl": [float("inf"), 1.5]}})
    assert json.loads(line) == {"step": 1, "learn": {"loss": None, "kl": [None, 1.5]}}


def test_rewind_forgets_what_lies_beyond_the_checkpoint(tmp_path: Path) -> None:
    with RunDir.create(tmp_path / "run", config()) as run:
        for step in range(1, 6):
            run.append({"step": step})
            run.write_episodes(step, [episode(step)])
        run.rewind(3)
        assert [r["step"] for r in run.records()] == [1, 2, 3]
        assert [p.name for p in sorted((run.path / "episodes").iterdir())] == [
            f"step_0000000{k}.jsonl.zst" for k in (1, 2, 3)
        ]
        run.append({"step": 4})
        assert [r["step"] for r in run.records()] == [1, 2, 3, 4]
        run.rewind(-1)
        assert run.records() == []


@settings(max_examples=25, deadline=None)
@given(kept=st.integers(0, 4), torn=st.integers(1, 40))
def test_a_torn_last_line_is_cut_wherever_the_kill_fell(
    kept: int, torn: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("torn") / "run"
    records = [{"step": k, "learn": {"loss": k / 7}} for k in range(1, 6)]
    with RunDir.create(path, config()) as run:
        for record in records[:kept]:
            run.append(record)
    line = encode_record(records[kept])
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(line[: min(torn, len(line) - 1)])
    assert read_metrics(path / "metrics.jsonl") == records[:kept]
    with RunDir.open(path) as run:
        run.rewind(100)
        run.append(records[kept])
        assert run.records() == records[: kept + 1]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: not a metrics record"):
        read_metrics(file)
    file.write_bytes(b'{"step": 1}\n[2]\n')
    with pytest.raises(UserError, match=r"line 2: a metrics record without a step"):
        read_metrics(file)


# --- episodes ---


def test_episodes_come_back_field_by_field(tmp_path: Path) -> None:
    episodes = [episode(1), episode(2, text="naïve \ud800 \x00 “quote”\u2028")]
    with RunDir.create(tmp_path / "run", config()) as run:
        assert read_episodes(run.write_episodes(12, episodes)) == episodes
    assert (tmp_path / "run" / "episodes" / "step_00000012.jsonl.zst").is_file()


def test_the_same_episodes_give_the_same_bytes() -> None:
    many = [episode(k, text="x" * k) for k in range(300)]
    again = [episode(k, text="x" * k) for k in range(300)]
    assert encode_episodes(many) == encode_episodes(again)


def test_damaged_episodes_are_named(tmp_path: Path) -> None:
    file = tmp_path / "step_00000001.jsonl.zst"
    raw = encode_episodes([episode(k) for k in range(50)])
    file.write_bytes(raw[:-20])
    with pytest.raises(UserError, match=r"step_00000001\.jsonl\.zst are damaged"):
        read_episodes(file)
    flipped = bytearray(raw)
    flipped[len(raw) // 2] ^= 4
    file.write_bytes(flipped)
    with pytest.raises(UserError, match=r"step_00000001\.jsonl\.zst are damaged"):
        read_episodes(file)
    with pytest.raises(UserError, match="cannot read episodes"):
        read_episodes(tmp_path / "absent.zst")


def test_leftovers_of_a_kill_are_cleared_at_the_next_start(tmp_path: Path) -> None:
    with RunDir.create(tmp_path / "run", config()) as run:
        run.write_episodes(1, [episode(1)])
    (tmp_path / "run" / "episodes" / ".tmp-step_00000002.jsonl.zst").write_bytes(b"half")
    (tmp_path / "run" / "checkpoints" / ".tmp-step_00000002-99").mkdir(parents=True)
    RunDir.open(tmp_path / "run").close()
    assert [p.name for p in (tmp_path / "run" / "episodes").iterdir()] == ["step_00000001.jsonl.zst"]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_log_lines_are_single_lines_with_a_time(tmp_path: Path) -> None:
    with RunDir.create(tmp_path / "run", config()) as run:
        run.log("one\ntwo")
        run.log("three")
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert [line[20:] for line in lines] == ["one two", "three"]
