"""Rollouts on a real Ray on this machine: the same run, actors killed in the middle, and bad input.

One cluster serves all tests here. It and its actors cost seconds each to start, so there are few runs, and
each shows several things.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
from loopback import Answer, serve
from rank_process import free_port
from test_train_adapters import adapted
from test_train_ranks import assert_same_run, ranks, shared
from tiny_run import ROOT, config, episodes, newest, trained

from ludus import config as configuration
from ludus.config import ClusterConfig, RunConfig
from ludus.doctor import missing
from ludus.errors import UserError
from ludus.records import Record, read_metrics
from ludus.train.cluster import broadcast, crew
from ludus.train.cluster import connect as connecting
from ludus.train.cluster.broadcast import Broadcasts
from ludus.train.cluster.buckets import Bucket, unpack
from ludus.train.cluster.connect import connect
from ludus.train.cluster.group import Group
from ludus.train.loop import train
from ludus.train.rundir import RunDir
from ludus.types import MatchPlan

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.timeout(1200)  # on a machine with other work, actors take long to start

RAY: dict[str, Any] = {"kind": "ray", "cpus": 0.5, "patience": 240.0}  # a busy machine starts actors slowly


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two cores, to which this process is connected."""
    cores = connecting._cores
    connecting._cores = lambda: 2
    try:
        assert connect(ClusterConfig(kind="ray"))
    finally:
        connecting._cores = cores
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def league(directory: Path, **sections: Any) -> RunConfig:
    """Ten steps against past selves, with a measurement in the middle and at the end."""
    settled: dict[str, Any] = {
        "rollout": {"matches": 24, "in_flight": 16},
        "train": {"steps": 10, "checkpoint_every": 1},
        "optim": {"schedule": "constant", "lr": 3e-3},
        "league": {
            "self_weight": 1.0,
            "snapshot_every": 3,
            "keep": 3,
            "payoff_matches": 2,
            "opponents": [{"policy": "past/uniform"}, {"policy": "random", "weight": 0.5}],
        },
        "eval": {"every": 5, "opponents": ["random", "past/0"]},
    }
    return config(directory, **{**settled, **sections})


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run without a cluster. Read-only."""
    out = tmp_path_factory.mktemp("cluster") / "finished"
    train(league(tiny_model), out)
    return out


def kill_after(steps: set[int], monkeypatch: pytest.MonkeyPatch, ray_kills: ModuleType) -> list[int]:
    """Have an actor killed, with SIGKILL, as soon as each of these steps is written down; whom, in the end.

    Not by a clock, or a quick machine would be done before and a slow one killed too early.
    """
    killed: list[int] = []
    append = RunDir.append

    def and_kill(run: RunDir, record: Record) -> None:
        append(run, record)
        if "learn" in record and record["step"] in steps:
            victim = min({process.pid for process in ray_kills.actors()} - set(killed))
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)

    monkeypatch.setattr(RunDir, "append", and_kill)
    return killed


def until_gone(ray_kills: ModuleType) -> None:
    """Ray ends an actor's process a moment after it was told to, and then counts its cores as free."""
    while ray_kills.actors() or ray.available_resources().get("CPU") != 2.0:
        time.sleep(0.1)


# --- the same run ---


def assert_bit_for_bit(run: Path, other: Path, kills: ModuleType) -> None:
    """All that is written, but for clocks and what the first run's records say of its actors."""
    assert kills.differences(run, other) == ["metrics"]
    clocks = {*kills.OF_THE_CLOCK, "crew"}
    plain = [
        [{k: v for k, v in record.items() if k not in clocks} for record in read_metrics(x / "metrics.jsonl")]
        for x in (run, other)
    ]
    assert plain[0] == plain[1]


def test_ten_steps_on_one_actor_are_those_of_a_run_without_a_cluster(
    cluster: str,
    finished: Path,
    tiny_model: Path,
    tmp_path: Path,
    kills: ModuleType,
    ray_kills: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, past selves and measurements included. Half of them are done by an actor that is killed,
    which here ends the run; the rest by the command line, in another process, with broadcasts of weights.
    """
    monkeypatch.setattr(crew, "_IN_VAIN", 1)
    run = tmp_path / "run"
    killed = kill_after({5}, monkeypatch, ray_kills)
    with pytest.raises(UserError, match=r"1 rollout actors died one after another .*go on with --resume"):
        train(league(tiny_model, cluster=RAY), run)
    until_gone(ray_kills)
    assert (len(killed), len(trained(run))) == (1, 5)

    recipe = tmp_path / "recipe.toml"
    recipe.write_text(configuration.dump(league(tiny_model)))
    words = ["cluster=ray", f"cluster.address={cluster}", "cluster.cpus=0.5", "cluster.patience=240"]
    words += ["cluster.transport=collective"]
    command = [sys.executable, "-m", "ludus.cli", "train", str(recipe), "--out", str(run), "--resume"]
    home = {**os.environ, "HOME": str(tmp_path / "home")}
    ended = subprocess.run(
        [*command, *words, "cluster.bucket_mib=1"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=home,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert not (tmp_path / "home" / ".ray").exists()
    undisturbed = {"actors": 1, "deaths": 0, "played_again": 0}
    crews = [record["crew"] for record in trained(run)]
    assert crews[:5] == [undisturbed] * 5
    assert crews[5:] == [
        {**undisturbed, "broadcasts": n} for n in (2, 1, 1, 1, 1)
    ]  # the checkpoint's as well
    assert_bit_for_bit(run, finished, kills)


def test_adapters_on_one_actor_are_those_of_a_run_without_a_cluster(
    cluster: str, tiny_model: Path, tmp_path: Path, kills: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two policies and past selves, all adapters of one base: of which nothing travels."""
    wanted = adapted(tiny_model, train={"steps": 3})
    train(wanted, tmp_path / "alone")
    sent: list[Bucket] = []
    put = ray.put

    def and_note(value: Any) -> Any:
        if isinstance(value, Bucket):
            sent.append(value)
        return put(value)

    monkeypatch.setattr(ray, "put", and_note)
    there = adapted(tiny_model, train={"steps": 3}, cluster=RAY)
    train(there, tmp_path / "run")
    assert_bit_for_bit(tmp_path / "run", tmp_path / "alone", kills)
    names = {name for bucket in sent for place in bucket.layout.places for name in place.names}
    assert all(".lora_" in name for name in names)
    met = {seat for e in episodes(tmp_path / "run") for seat in e.seats if seat.startswith("past/")}
    assert len(met) > 1
    assert len(sent) >= 2 * (3 + 2)  # two policies: three times new weights, and two past selves at the least


def test_ranks_that_share_a_learner_learn_from_what_actors_play(
    cluster: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Two ranks, one actor: the first rank speaks with it, and both get all episodes."""
    wanted = shared(tiny_model, train={"steps": 2})
    train(wanted, tmp_path / "alone")
    there = shared(tiny_model, train={"steps": 2}, cluster={**RAY, "address": cluster})
    started = ranks(2, there, tmp_path / "run")
    assert set(started.finish(900.0)) == {0}, started.said()
    assert_same_run(tmp_path / "run", tmp_path / "alone")
    assert [record["crew"]["actors"] for record in trained(tmp_path / "run")] == [1, 1]


# --- kills ---


def test_actors_may_be_killed_and_every_match_counts_once(
    cluster: str,
    tiny_model: Path,
    tmp_path: Path,
    ray_kills: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two actors, running a step ahead of the learner, which broadcasts an adapter; two kills."""
    run = tmp_path / "run"
    wanted = config(
        tiny_model,
        adapter={"rank": 4},
        cluster={**RAY, "actors": 2, "transport": "collective"},
        rollout={"matches": 40, "in_flight": 16, "max_lag": 1},
        train={"steps": 8, "checkpoint_every": 4},
    )
    killed = kill_after({2, 4}, monkeypatch, ray_kills)
    train(wanted, run)
    assert len(killed) == 2
    assert ray_kills.problems(wanted, run) == []
    records = trained(run)
    assert sum(record["crew"]["deaths"] for record in records) == 2
    assert any("worker process has died" in r["crew"].get("last_death", "") for r in records)
    assert [record["stale"] for record in records] == [0] * 8
    assert (
        sum(record["crew"]["broadcasts"] for record in records) >= 8 - 2
    )  # but where one had just been killed


def test_an_actor_may_be_killed_when_weights_are_broadcast(
    cluster: str,
    tiny_model: Path,
    tmp_path: Path,
    kills: ModuleType,
    ray_kills: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the middle of one, and just before another. Who takes its place gets them from the object store,
    and the next ones by broadcast; it plays as if nothing had been.
    """
    short: dict[str, Any] = {"train": {"steps": 5, "checkpoint_every": 5}}
    train(config(tiny_model, **short), tmp_path / "alone")
    there = config(tiny_model, **short, cluster={**RAY, "transport": "collective"})
    broadcasts = {"in": 0, "before": 0}

    def kill_at(number: int, stage: str) -> None:
        broadcasts[stage] += 1
        if broadcasts[stage] == number:
            (victim,) = ray_kills.actors()
            victim.kill()
            victim.wait()

    for number, stage, (owner, name) in (
        (2, "in", (Group, "broadcast")),
        (4, "before", (Broadcasts, "send")),
    ):
        kill = partial(kill_at, number, stage)
        monkeypatch.setattr(owner, name, after(kill, getattr(owner, name)))
    train(there, tmp_path / "run")
    crews = [record["crew"] for record in trained(tmp_path / "run")]
    assert [crew["broadcasts"] for crew in crews] == [1, 0, 1, 0, 1]
    assert [crew["deaths"] for crew in crews] == [0, 0, 1, 0, 1]
    assert ["broadcast_failed" in crew for crew in crews] == [False, True, False, True, False]
    assert_bit_for_bit(tmp_path / "run", tmp_path / "alone", kills)


def after(what: Callable[[], None], call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, but `what` comes first."""

    def both(*args: Any) -> Any:
        what()
        return call(*args)

    return both


@pytest.mark.parametrize(
    ("sections", "device", "backend"),
    [
        ({}, "cpu", None),
        ({"transport": "collective"}, "cpu", "gloo"),
        ({"gpus": 1.0}, "cuda", "nccl"),
        ({"gpus": 0.5}, "cuda", None),
        ({"gpus": 0.5, "transport": "collective"}, "cuda", "gloo"),
        ({"gpus": 1.0, "transport": "objects"}, "cuda", None),
        ({"gpus": 1.0}, "cpu", None),
    ],
)
def test_weights_are_broadcast_by_nccl_between_whole_gpus(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    sections: dict[str, Any],
    device: str,
    backend: str | None,
) -> None:
    monkeypatch.setattr(broadcast, "resolve_device", lambda _: torch.device(device))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    assert Broadcasts(config(tiny_model, cluster={"kind": "ray", **sections})).backend == backend
    if backend == "nccl":  # a vLLM's weights are in another process
        theirs = config(tiny_model, cluster={"kind": "ray", **sections}, engine={"kind": "vllm"})
        assert Broadcasts(theirs).backend is None


# --- bad input ---


def test_more_than_the_cluster_has_is_told_at_once(
    cluster: str, tiny_model: Path, tmp_path: Path, ray_kills: ModuleType
) -> None:
    until_gone(ray_kills)
    for wanted, says in (
        (
            {"actors": 3, "cpus": 1.0},
            r"cluster\.actors = 3 with 1 CPU each do not fit: the cluster has 2 CPU, of which 2 CPU free; "
            r"lower cluster\.actors, cluster\.cpus or cluster\.gpus",
        ),
        (
            {"gpus": 1.0},
            r"with 0\.5 CPU and 1 GPU each .* 2 CPU and 0 GPU, of which 2 CPU and 0 GPU free; lower",
        ),
    ):
        with pytest.raises(UserError, match=says):  # who has waited says for how long
            train(league(tiny_model, cluster={**RAY, **wanted}), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_learners_are_counted_where_there_is_no_room(cluster: str, ray_kills: ModuleType) -> None:
    until_gone(ray_kills)
    says = (
        r"cluster\.learners = 2 with 1 CPU and 1 GPU each and cluster\.actors = 1 with 0\.5 CPU each do not "
        r"fit: the cluster has 2 CPU and 0 GPU, of which .* free; lower cluster\.learners, cluster\.actors, "
    )
    with pytest.raises(UserError, match=says):
        connecting.place(ClusterConfig(kind="ray", cpus=0.5, learners=2, learner_gpus=1))


def test_no_room_on_a_cluster_that_may_grow_is_told_in_the_end(cluster: str, ray_kills: ModuleType) -> None:
    until_gone(ray_kills)
    with pytest.raises(UserError, match=r"of which 2 CPU free, and 0\.2 s brought no more"):
        connecting.place(ClusterConfig(kind="ray", address=cluster, actors=5, patience=0.2))


@pytest.fixture
def short_path() -> Iterator[str]:
    """Ray makes sockets in its directory, and their paths are at most 107 bytes long."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as path:
        yield path


def test_a_cluster_that_dies_in_the_middle_ends_the_run_which_goes_on_by_resume(
    tiny_model: Path, tmp_path: Path, short_path: str
) -> None:
    """A cluster that was started by hand, all of whose processes are killed at once."""
    address = f"127.0.0.1:{free_port()}"
    start = ["start", "--head", "--block", "--num-cpus=1", f"--port={address.rpartition(':')[2]}"]
    quiet = ["--include-dashboard=false", "--disable-usage-stats", "--temp-dir", short_path]
    long = config(tiny_model, train={"steps": 100_000, "checkpoint_every": 1})
    (tmp_path / "recipe.toml").write_text(configuration.dump(long))
    run = tmp_path / "run"
    ludus = [sys.executable, "-m", "ludus", "train", str(tmp_path / "recipe.toml"), "--out", str(run)]
    there = ["cluster=ray", f"cluster.address={address}", "cluster.cpus=0.5", "cluster.patience=240"]
    with open(tmp_path / "log.txt", "w") as log:
        head = psutil.Popen([str(Path(sys.executable).with_name("ray")), *start, *quiet], stdout=log)
        driver = None
        try:
            until(lambda: answers(address), head)
            driver = psutil.Popen([*ludus, *there], cwd=ROOT, stdout=log, stderr=subprocess.PIPE, text=True)
            until(lambda: (run / "checkpoints" / "step_00000002").exists(), driver)
        finally:
            for process in [*head.children(recursive=True), head]:
                process.kill()
    _, errors = driver.communicate(timeout=240)
    said = errors.splitlines()[0]
    port = address.rpartition(":")[2]
    assert re.match(rf"ludus: the Ray cluster at [\d.]+:{port} is gone \(.*go on with --resume$", said), (
        errors
    )
    assert driver.returncode == 2
    done = int(newest(run).name.removeprefix("step_"))
    train(
        long.model_copy(update={"train": long.train.model_copy(update={"steps": done + 1})}), run, resume=True
    )
    assert newest(run).name == f"step_{done + 1:08d}"


def until(there: Callable[[], bool], process: psutil.Popen) -> None:
    """Wait for it, as long as `process` lives."""
    while not there():
        assert process.poll() is None, f"{process} has ended"
        time.sleep(0.1)


def answers(address: str) -> bool:
    try:
        connecting._answers(address)
    except UserError:
        return False
    return True


def test_what_an_actor_raises_when_it_opens_is_told_as_it_is(
    cluster: str, tiny_model: Path, ray_kills: ModuleType
) -> None:
    settled = league(tiny_model, cluster=RAY)
    elsewhere = settled.model_copy(
        update={"model": settled.model.model_copy(update={"path": "/nowhere/model"})}
    )
    with pytest.raises(UserError, match=r"^no model directory at /nowhere/model"):
        crew.RayCrew(elsewhere, None, None, {})  # type: ignore[arg-type]
    until_gone(ray_kills)


@pytest.fixture
def alone(cluster: str, tiny_model: Path, ray_kills: ModuleType) -> Iterator[crew.RayCrew]:
    """A crew of one actor, whose weights are to be broadcast."""
    wanted = league(tiny_model, cluster={**RAY, "transport": "collective"})
    found = crew.RayCrew(wanted, None, None, {})  # type: ignore[arg-type]
    yield found
    found.close()
    until_gone(ray_kills)


def test_what_keeps_a_crew_from_its_work_is_told(
    alone: crew.RayCrew, tmp_path: Path, ray_kills: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broadcasts that fail though nobody dies are given up; and why nobody takes the place of the dead."""

    def no_route(*_: Any) -> None:
        raise RuntimeError("no route")

    monkeypatch.setattr(broadcast, "Group", no_route)
    weights = {"a": torch.arange(3.0)}
    for number in (1, 2, 3):
        buckets, have = alone._broadcasts.send([alone._seats[0].actor], "self", number, None, weights)
        assert have == []
        assert torch.equal(unpack(buckets)["a"], weights["a"])
        said = alone.report()["crew"]
        assert said["broadcasts"] == 0
        more = "; 3 in a row: weights go through the object store from now on" if number == 3 else ""
        assert said["broadcast_failed"] == f"no route{more}"
    assert alone._broadcasts.backend is None
    assert alone.report()["crew"] == {"actors": 1, "deaths": 0, "played_again": 0}

    model = alone.config.model.model_copy(update={"path": str(tmp_path / "nowhere")})
    alone.config = alone.config.model_copy(update={"model": model})  # as where its disk is gone
    (actor,) = ray_kills.actors()
    actor.kill()
    with pytest.raises(UserError, match=r"^no model directory at "):
        asyncio.run(alone.play([MatchPlan(0, 0, "kuhn_poker", ("self", "self"), 0, 0)]))
    said = alone.report()["crew"]
    assert said["deaths"] == 1
    for report in (said, alone.report()["crew"]):
        assert report["actors"] == 0
        assert report["last_death"].startswith("nobody takes its place: no model directory at ")


def test_why_an_actor_did_not_get_a_broadcast_is_told_in_a_sentence(alone: crew.RayCrew) -> None:
    """One that has left the group: what it says of that, without Ray's account of where it was raised."""
    broadcasts, (seat,) = alone._broadcasts, alone._seats
    group = broadcasts._meet([seat.actor])
    assert group is not None
    ray.get(seat.actor.part.remote(group.meeting))
    _, have = broadcasts.send([seat.actor], "self", 1, None, {})
    assert have == []
    assert broadcasts.report() == {"broadcasts": 0, "broadcast_failed": "an actor has not joined the group"}


@pytest.fixture
def stranger() -> Iterator[tuple[int, int]]:
    """Two ports: one on which a program listens that says nothing, one on which nobody does."""
    with socket.socket() as mute, socket.socket() as closed:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        closed.bind(("127.0.0.1", 0))
        yield mute.getsockname()[1], closed.getsockname()[1]


def test_addresses_where_there_is_no_ray(
    stranger: tuple[int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(connecting, "_ANSWER", 0.5)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    mute, closed = stranger
    for address, says in (
        (f"127.0.0.1:{closed}", r"no Ray cluster answers at 127\.0\.0\.1:\d+ \(.*refused.*\); start it"),
        (f"127.0.0.1:{mute}", r"no Ray cluster answers at .*timed out"),
        ("no-such-host.invalid:6379", r"no Ray cluster answers at no-such-host\.invalid:6379"),
        ("127.0.0.1:99999", r"no Ray cluster answers at 127\.0\.0\.1:99999"),
        ("auto", r"'auto' finds no Ray cluster on this machine: start one"),
        ("somewhere", r"is 'somewhere'; it must be 'auto' or HOST:PORT"),
        ("ray://127.0.0.1:10001", r"not ray://: run ludus on a machine of the cluster"),
    ):
        with pytest.raises(UserError, match=says):
            connect(ClusterConfig(kind="ray", address=address))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{closed}")  # as a killed one leaves it
    with pytest.raises(UserError, match=r"no Ray cluster answers at 127"):
        connect(ClusterConfig(kind="ray", address="auto"))


def test_a_port_that_another_program_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with serve(lambda n, body: Answer()) as server:
        address = server.url.removeprefix("http://").removesuffix("/v1")
        with pytest.raises(UserError, match="is not Ray: another program uses that port"):
            connect(ClusterConfig(kind="ray", address=address))


def test_ray_is_an_extra(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"Ray, which is not installed: pip install 'ludus\[ray\]'"):
        connect(ClusterConfig(kind="ray"))
    monkeypatch.setattr("ludus.doctor._version", lambda name: None)
    assert missing(league(tiny_model, cluster=RAY)) == [
        "Ray, for cluster.kind = 'ray': pip install 'ludus[ray]'"
    ]
    assert missing(league(tiny_model)) == []
