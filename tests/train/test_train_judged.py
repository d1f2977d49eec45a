"""Training with a judge at the other end of a line that breaks: real servers, real runs, nothing invented."""

from __future__ import annotations

import csv
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from judge_server import honest, process, reply, rule
from loopback import Answer, Server, good, serve

from ludus import config as configuration
from ludus.cli import main
from ludus.config import RunConfig
from ludus.errors import UserError
from ludus.judges.base import Question
from ludus.small.make import Course, SmallSpec, make
from ludus.train.loop import train
from ludus.types import Episode

Section = dict[str, Any]
Behaviour = Callable[[int, dict[str, Any]], Answer]
PAPER = Path(__file__).parents[2] / "recipes" / "self_redteam_qwen2.5_7b.toml"
FILLING = "it hums at dawn and fades at noon"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that has learnt to think and to answer in tags, often enough to play."""
    torch.set_num_threads(1)
    made = tmp_path_factory.mktemp("judged") / "model"
    size = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "ffn": 64, "batch": 4}
    courses = (Course("red_team", 1200),)
    make(made, SmallSpec(courses, init=0.07, lr=6e-3, format="answer", **size), tell=lambda _: None)
    return made


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> str:
    """WildJailbreak's schema, of invented words."""
    path = tmp_path_factory.mktemp("seeds") / "train.tsv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["vanilla", "adversarial", "completion", "data_type"])
        for n in range(12):
            filling = " ".join([FILLING] * (n % 4))
            rows.writerow([f"How do I make zorvex? {filling}".strip(), "", "", "vanilla_harmful"])
            rows.writerow([f"How do I make vornat? {filling}".strip(), "", "", "vanilla_benign"])
    return str(path)


def recipe(
    model: Path, seeds: str, url: str, judge: Section | None = None, matches: int = 24, **sections: Any
) -> RunConfig:
    endpoint = {"base_url": url, "model": "guard", "timeout": 5.0, "backoff": 0.02, "concurrency": 8}
    guard = {"endpoints": [endpoint], "rest": 0.1, "max_failed": 1.0, **(judge or {})}
    args = {"seeds": [seeds], "judge": "guard", **sections.pop("args", {})}
    return tiny_run.config(
        model,
        games=[{"name": "red_team_files", "label": "red", "args": args}],
        judges={"guard": guard, **sections.pop("judges", {})},
        text={"format": "answer"},
        engine={"slots": 32, "context": 384},
        rollout={"matches": matches, "in_flight": 24, "max_tokens": 80},
        optim={"lr": 1e-4},
        train={"steps": 2, "checkpoint_every": 1},
        eval={"matches": 2, "final_matches": 2},
        **sections,
    )


def check_pay(episodes: list[Episode]) -> int:
    """Whatever was paid for a rewritten seed is what the rule gives for these words; returns how many."""
    paid = 0
    for episode in episodes:
        asked, *answered = [t for t in episode.turns if t.legal] or [None]
        if episode.masked or episode.forfeit is not None or episode.tags["attack"] == "direct":
            continue
        assert asked is not None
        truth = rule(Question("q", asked.action or "", answered[0].action))
        terms = episode.parts[1]
        assert terms["harm"] == (-1.0 if truth.answer_harmful else 1.0)
        assert terms["refusal"] == (1.0 if truth.refusal == truth.request_harmful else -1.0)
        kept = truth.request_harmful == (episode.tags["label"] == "harmful")
        assert asked.rewards["faithful"] == (0.5 if kept else -0.5)
        paid += 1
    return paid


def test_a_run_with_an_honest_judge(model: Path, seeds: str, tmp_path: Path) -> None:
    judges = {"other": {"endpoints": [{"base_url": "", "model": "other"}]}}
    with serve(honest) as server, serve(contrary) as second:
        judges["other"]["endpoints"][0]["base_url"] = second.url
        config = recipe(model, seeds, server.url, judges=judges, args={"second_judge": "other"})
        train(config, tmp_path / "run")
    episodes = tiny_run.episodes(tmp_path / "run")
    assert len(episodes) == 48
    assert all(e.masked is None for e in episodes)
    assert check_pay(episodes) > 6
    for record in tiny_run.trained(tmp_path / "run"):
        game = record["games"]["red"]
        assert game["counts"]["exchanges"] > 0
        assert {"harm", "refusal", "format"} <= game["roles"]["defender"]["terms"].keys()
        assert game["agreement"] == {"request": 1.0, "answer": 1.0, "refusal": 0.0}
        asked = record["judges"]["guard"]
        assert asked["failures"] == {}
        assert asked["questions"] == record["judges"]["other"]["questions"] > 0
        assert "lost_lengths" not in record
    texts = [json.dumps(body, ensure_ascii=False) for body in server.seen]
    assert not any("<think>" in text or "<answer>" in text for text in texts)  # thoughts stay private


def contrary(n: int, body: dict[str, Any]) -> Answer:
    lines = reply(body).splitlines()
    lines[1] = lines[1].replace("yes", "?").replace("no", "yes").replace("?", "no")
    return Answer(body=good("\n".join(lines), model=body["model"]))


def troubled(servers: list[Server]) -> Behaviour:
    """Of every twelve requests eight go wrong, each in another way. The others are answered truly."""

    def answer(n: int, body: dict[str, Any]) -> Answer:
        asked = servers[0].headers[n]["x-request-id"]
        said = good(reply(body), model=body["model"], id=f"chatcmpl-{asked}")
        match n * 5 % 12:
            case 0:
                return Answer(status=429, headers={"Retry-After": "0.01"})
            case 1:
                return Answer(status=503)
            case 2:
                return Answer(body=said, cut=True)  # half a body
            case 3:
                return Answer(body=said[: len(said) // 2])  # bad JSON
            case 4:
                return Answer(body=good(reply(body), model="another model", id=f"chatcmpl-{asked}"))
            case 5:
                return Answer(body=b'{"choices": []}', headers={"X-Request-Id": asked})
            case 6:
                return Answer(body=good(reply(body), model=body["model"], id="chatcmpl-another"))
            case 7:
                return Answer(body=said, delay=1.5)  # beyond the endpoint's patience
            case _:
                return Answer(body=said)

    return answer


def test_trouble_costs_time_and_nothing_else(model: Path, seeds: str, tmp_path: Path) -> None:
    servers: list[Server] = []
    with serve(troubled(servers)) as server:
        servers.append(server)
        config = recipe(model, seeds, server.url, {"strikes": 50, "request_ids": True})
        endpoint = config.judges["guard"].endpoints[0].model_copy(update={"timeout": 1.0, "retries": 30})
        guard = config.judges["guard"].model_copy(update={"endpoints": (endpoint,)})
        train(config.model_copy(update={"judges": {"guard": guard}}), tmp_path / "run")
    episodes = tiny_run.episodes(tmp_path / "run")
    assert [e.masked for e in episodes] == [None] * 48
    assert check_pay(episodes) > 6
    attempts: dict[str, int] = {}
    for record in tiny_run.trained(tmp_path / "run"):
        for reason, count in record["judges"]["guard"]["attempts"].items():
            attempts[reason] = attempts.get(reason, 0) + count
    ways = {"http_429", "http_503", "connection", "bad_json", "wrong_model", "bad_shape"}
    assert {*ways, "wrong_id", "timeout"} <= attempts.keys()


def test_a_judge_that_is_killed_and_comes_back(model: Path, seeds: str, tmp_path: Path) -> None:
    """The run waits for it, goes on by itself, and pays what is true."""
    verdicts = tmp_path / "verdicts.jsonl"
    options = {"cache_file": str(verdicts), "patience": 300.0, "rest": 1.0}
    with process() as server:
        config = recipe(model, seeds, server.url, options)
        failed: list[BaseException] = []

        def run() -> None:
            try:
                train(config, tmp_path / "run")
            except BaseException as e:  # noqa: BLE001  the test's thread must hear of it
                failed.append(e)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            wait_for(lambda: lines(verdicts) >= 10 or bool(failed))
            server.kill()
            time.sleep(0.5)
            before = lines(verdicts)
        finally:
            server.start()
        back = time.monotonic()
        wait_for(lambda: lines(verdicts) > before or not thread.is_alive())
        print(f"first verdict {time.monotonic() - back:.2f} s after the judge was back")
        thread.join()
    assert failed == []
    episodes = tiny_run.episodes(tmp_path / "run")
    assert [e.masked for e in episodes] == [None] * 48
    assert check_pay(episodes) > 6


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not what():
        assert time.monotonic() < end, "nothing happened for two minutes"
        time.sleep(0.02)


def lost(pick: Callable[[int, str], bool]) -> Behaviour:
    """A judge that refuses for good whatever is picked, by its number or its answer."""

    def answer(n: int, body: dict[str, Any]) -> Answer:
        prompt = body["messages"][0]["content"]
        said = prompt.split("AI assistant:\n", 1)[1].split("\n\n---")[0]
        return Answer(status=400) if pick(n, said) else honest(n, body)

    return answer


@pytest.mark.parametrize("how", ["by number", "by length"])
def test_what_survives_and_what_was_lost(how: str, model: Path, seeds: str, tmp_path: Path) -> None:
    """Trouble that looks at no words takes long and short alike; trouble with long answers shows."""
    picks: dict[str, Callable[[int, str], bool]] = {
        "by number": lambda n, said: n % 3 == 0,
        "by length": lambda n, said: len(said) > 24,
    }
    with serve(lost(picks[how])) as server:
        config = recipe(model, seeds, server.url, matches=96)
        train(config, tmp_path / "run")
    episodes = tiny_run.episodes(tmp_path / "run")
    masked = [e for e in episodes if e.masked is not None]
    assert {e.masked for e in masked} == {"judge: http_400"}
    assert check_pay([e for e in episodes if e.masked is None]) > 12
    records = tiny_run.trained(tmp_path / "run")
    assert sum(r["masked"]["judge: http_400"] for r in records) == len(masked)
    kept, gone = (
        sum(r["lost_lengths"][key] for r in records) / len(records) for key in ("kept", "judge: http_400")
    )
    # Forfeits ask nobody and are short, so only judged matches are compared.
    judged = [e for e in episodes if e.forfeit is None]
    lengths = {m: [answer_length(e) for e in judged if (e.masked is not None) is m] for m in (False, True)}
    means = {m: sum(found) / len(found) for m, found in lengths.items()}
    spread = (sum((x - means[m]) ** 2 for m, found in lengths.items() for x in found) / len(judged)) ** 0.5
    error = spread * (1 / len(lengths[False]) + 1 / len(lengths[True])) ** 0.5
    if how == "by number":
        assert abs(means[True] - means[False]) < 4 * error
    else:
        assert min(lengths[True]) > 24 >= max(lengths[False])
        assert gone > kept


def answer_length(episode: Episode) -> int:
    return len(episode.turns[-1].action or "")


def test_too_many_failures_end_the_run_and_it_can_go_on(model: Path, seeds: str, tmp_path: Path) -> None:
    broken = threading.Event()

    def answer(n: int, body: dict[str, Any]) -> Answer:
        return Answer(status=400) if broken.is_set() else honest(n, body)

    with serve(answer) as server:
        whole = recipe(model, seeds, server.url, {"max_failed": 0.3, "window": 24})
        first = whole.model_copy(update={"train": whole.train.model_copy(update={"steps": 1})})
        train(first, tmp_path / "run")
        broken.set()
        with pytest.raises(
            UserError, match=r"brought no verdict \(http_400 \d+\); mend the judge and resume"
        ):
            train(whole, tmp_path / "run", resume=True)
        assert [r["step"] for r in tiny_run.trained(tmp_path / "run")] == [1]
        broken.clear()
    with serve(honest) as elsewhere:  # the same judge at another address
        moved = recipe(model, seeds, elsewhere.url, {"max_failed": 0.3, "window": 24})
        train(moved, tmp_path / "run", resume=True)
        assert [r["step"] for r in tiny_run.trained(tmp_path / "run")] == [1, 2]
        with Path(seeds).open("a") as file:
            file.write("How do I keep tea?\t\t\tvanilla_benign\n")
        with pytest.raises(UserError, match=r"the seeds \(games\) are no longer what"):
            train(moved, tmp_path / "run", resume=True)
        other = recipe(model, seeds, elsewhere.url, {"format": "qwen3guard"})
        with pytest.raises(UserError, match=r"judges\.guard\.format \(was 'wildguard', now 'qwen3guard'\)"):
            train(other, tmp_path / "run", resume=True)


@pytest.fixture
def silent() -> Iterator[Server]:
    with serve(lambda n, body: Answer(status=503)) as server:
        yield server


def test_a_silent_judge_is_found_before_the_run_directory_exists(
    model: Path, seeds: str, silent: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(configuration.dump(recipe(model, seeds, silent.url)))
    out = tmp_path / "run"
    assert main(["train", str(path), "--out", str(out)]) == 2
    assert "the judge 'guard' at" in capsys.readouterr().err
    assert not out.exists()
    assert main(["train", str(path), "--out", str(out), "--dry-run"]) == 0
    assert "brought no verdict (http_503)" in capsys.readouterr().out
    assert main(["doctor", str(path)]) == 0
    assert "brought no verdict (http_503)" in capsys.readouterr().out
    wrong = ['games.0.args.judge="gard"', "--out", str(out)]
    assert main(["train", str(path), *wrong]) == 2
    assert "red is judged by 'gard', and there is no such judge here; did you mean 'guard'?" in (
        capsys.readouterr().err
    )
    assert main(["train", str(path), "judges.guard.format=llama_guard", "--out", str(out)]) == 2
    assert "never says refusal" in capsys.readouterr().err
    assert not out.exists()


def test_the_papers_recipe_says_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    config = configuration.load(PAPER)
    assert (config.optim.lr, config.rollout.matches, config.rollout.max_tokens) == (5e-7, 128, 2048)
    assert (config.train.steps, config.loss.reference_kl, config.loss.clip_high) == (200, 0.01, 0.2)
    assert (config.algo.estimator, config.text.format) == ("reinforce_pp", "answer")
    assert main(["train", str(PAPER), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for lacking in ("the model: ", "data for the game red_team_files: there is no", "the judge 'guard' at"):
        assert f"# missing: {lacking}" in out
    variants = ["text.think=false", "algo.estimator=rae", "sft.data=[]", "league.self_weight=0.0"]
    opponents = 'league.opponents=[{policy="past/0", roles=["defender"]}]'
    assert main(["train", str(PAPER), "--dry-run", *variants, opponents]) == 0


@pytest.mark.parametrize(
    "overrides",
    [
        ["text.think=false"],
        ["algo.estimator=rae", "games.0.args.max_turns=4", "games.0.args.attacks=1.0"],
        ["algo.estimator=marshal", 'games.0.args.payoff="general_sum"', "games.0.args.attacks=0.0"],
        ["league.self_weight=0.0", 'league.opponents=[{policy="past/0", roles=["defender"]}]'],
    ],
    ids=["no thoughts", "several turns", "defender alone", "attacker alone"],
)
def test_variants_of_the_paper_are_overrides(
    overrides: list[str], model: Path, seeds: str, tmp_path: Path
) -> None:
    with serve(honest) as server:
        path = tmp_path / "recipe.toml"
        path.write_text(configuration.dump(recipe(model, seeds, server.url)))
        train(configuration.load(path, [*overrides, "train.steps=1"]), tmp_path / "run")
    episodes = tiny_run.episodes(tmp_path / "run")
    assert all(e.masked is None for e in episodes)
    replies = [t for e in episodes for t in e.turns if t.trainable]
    assert replies
    if overrides[0] == "text.think=false":  # the model has never seen that, so hardly anything parses
        assert not any(t.legal for t in replies if "</think>" in t.text)
    elif overrides[0].startswith("league"):
        assert {t.role for t in replies} == {"attacker"}
    else:
        assert any(t.legal for t in replies)
        assert any(e.parts and e.forfeit is None for e in episodes)
