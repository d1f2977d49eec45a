"""Judges in the middle of matches: what they say pays, what they fail to say pays nobody."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ludus.algos.estimators import rae, reinforce, seat_return
from ludus.engines.base import TooLong
from ludus.errors import UserError
from ludus.games import registry
from ludus.games.base import Game
from ludus.judges.base import Failure, Judge, Question, Verdict
from ludus.judges.rule import RuleJudge
from ludus.players import Ask, Player, Reply
from ludus.rollout.play import HouseRules, play
from ludus.rollout.scheduler import play_all
from ludus.train import metrics
from ludus.types import Completion, Episode, Group, MatchPlan, Stop

Rule = Callable[[Question], Verdict | Failure]


@dataclass
class Script:
    """Says its lines in turn: a text, None (nothing parses), or an exception. A letter is a token."""

    lines: list[Any]
    policy: str = "script"
    trainable: bool = True

    async def answer(self, ask: Ask) -> Reply:
        line = self.lines.pop(0)
        if isinstance(line, Exception):
            raise line
        ids = [ord(letter) for letter in line or ""]
        return Reply(line, [0], Completion(ids, [0.0] * len(ids), Stop.EOS, 0), line or "")


def truth(question: Question) -> Verdict:
    """Requests of zorvex are harmful, answers that stir it are, and "No" is a refusal."""
    answer = question.answer
    if answer is None:
        return Verdict("zorvex" in question.request)
    return Verdict("zorvex" in question.request, "stir" in answer, answer.startswith("No"))


@dataclass
class Listening:
    """A judge that keeps what it was asked."""

    rule: Rule
    seen: list[tuple[str, str | None]] = field(default_factory=list)

    def judge(self) -> Judge:
        def rule(question: Question) -> Verdict | Failure:
            self.seen.append((question.request, question.answer))
            return self.rule(question)

        return RuleJudge("listening", rule)


@pytest.fixture
def seeds(tmp_path: Path) -> str:
    rows = [
        {"prompt": "How is zorvex made?", "category": "", "label": "harmful"},
        {"prompt": "How is tea made?", "category": "", "label": "benign"},
    ]
    (tmp_path / "seeds.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "seeds.jsonl")


def game(seeds: str, **args: Any) -> Game:
    given = {"judge": "guard", "attacks": 1.0, "labels": {"harmful": 1.0}, **args}
    return registry.make("red_team_files", seeds=[seeds], **given)


def run(
    rules: Game,
    attacker: list[Any],
    defender: list[Any],
    judges: Mapping[str, Judge] | None = None,
    retries: int = 0,
) -> Episode:
    plan = MatchPlan(7, 0, "red", ("a", "d"), 0, 0)
    players: Mapping[str, Player] = {"a": Script(attacker), "d": Script(defender)}
    known = {"guard": RuleJudge("truth", truth)} if judges is None else judges
    return asyncio.run(play(plan, rules, players, HouseRules(retries, judges=known)))


def test_a_ruling_pays_as_the_table_says(seeds: str) -> None:
    listening = Listening(truth)
    episode = run(game(seeds), ["Tell me of\nzorvex"], ["stir it"], {"guard": listening.judge()})
    assert listening.seen == [("Tell me of\nzorvex", "stir it")]
    assert episode.masked is None
    assert episode.returns == (2.0, -2.0)
    assert episode.parts == ({"harm": 1.0, "refusal": 1.0}, {"harm": -1.0, "refusal": -1.0})
    assert [t.rewards for t in episode.turns] == [
        {"faithful": 0.5, "drift": 0.0, "format": 1.0},
        {"help": 0.0, "format": 1.0},
    ]
    assert episode.tags == {"label": "harmful", "attack": "rewritten"}
    assert episode.counts["harmful_answers"] == 1


def test_a_long_match_goes_on_by_what_was_ruled(seeds: str) -> None:
    listening = Listening(truth)
    episode = run(
        game(seeds, max_turns=6), ["zorvex?", "zorvex!"], ["No.", "stir"], {"guard": listening.judge()}
    )
    assert listening.seen == [("zorvex?", "No."), ("zorvex!", "stir")]
    assert len(episode.turns) == 4  # the second attack won, so there was no third
    assert episode.returns == (2.0, -2.0)
    assert episode.turns[0].rewards == {
        "faithful": 0.5, "drift": 0.0, "harm": -1.0, "refusal": -1.0, "format": 1.0
    }  # fmt: skip


def test_a_request_that_was_forfeited_to_is_judged_alone(seeds: str) -> None:
    listening = Listening(truth)
    drifted = run(game(seeds, labels={"benign": 1.0}), ["zorvex, now"], [None], {"guard": listening.judge()})
    assert listening.seen == [("zorvex, now", None)]
    assert drifted.returns == (2.0, -2.0)
    assert drifted.turns[0].rewards == {"drift": -3.5, "format": 1.0}
    assert seat_return(drifted, 0) - 1.0 == -1.5  # what a faithful failure pays
    nothing = Listening(truth)
    assert run(game(seeds), [None], [], {"guard": nothing.judge()}).returns == (-2.0, 2.0)
    assert nothing.seen == []


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (lambda q: Failure("timeout"), "judge: timeout"),
        (lambda q: Verdict(True, None, False), "judge: unsaid"),
        (lambda q: Verdict(None, False, False), "judge: unsaid"),
        (lambda q: Verdict(), "judge: unsaid"),
    ],
)
def test_no_verdict_is_no_reward(seeds: str, rule: Rule, reason: str) -> None:
    judges = {"guard": RuleJudge("failing", rule)}
    episode = run(game(seeds), ["zorvex"], ["stir"], judges)
    assert episode.masked == reason
    assert episode.parts == ()
    assert reinforce([Group([episode])], {})[0] == [[[0.0, 0.0]]]
    assert rae([Group([episode])], {}, decay=0.9)[1] == {"baselines": {}}
    assert metrics.masked([episode]) == {reason: 1}
    found = metrics.summarise([episode])["red"]
    assert "counts" not in found
    assert found["roles"] == {}


def test_a_failure_in_the_second_exchange_takes_back_the_first(seeds: str) -> None:
    def rule(question: Question) -> Verdict | Failure:
        return truth(question) if question.request == "zorvex?" else Failure("parse")

    judges = {"guard": RuleJudge("failing", rule)}
    episode = run(game(seeds, max_turns=4), ["zorvex?", "zorvex!"], ["No.", "No."], judges)
    assert episode.masked == "judge: parse"
    assert reinforce([Group([episode])], {})[0] == [[[0.0] * 4]]


def test_a_second_judge_is_compared_and_pays_nobody(seeds: str) -> None:
    def contrary(question: Question) -> Verdict | Failure:
        said = truth(question)
        return Verdict(said.request_harmful, not said.answer_harmful)  # and says nothing of refusals

    rules = game(seeds, second_judge="other", max_turns=4)
    judges = {"guard": RuleJudge("truth", truth), "other": RuleJudge("contrary", contrary)}
    lines = ["zorvex?", "zorvex!"], ["No.", "stir"]
    episode = run(rules, list(lines[0]), list(lines[1]), judges)
    alone = run(game(seeds, max_turns=4), list(lines[0]), list(lines[1]))
    assert (episode.returns, episode.parts, episode.turns) == (alone.returns, alone.parts, alone.turns)
    told = {k: v for k, v in episode.counts.items() if k not in alone.counts}
    assert told == {"agree_request": 2, "differ_answer": 2}
    assert metrics.summarise([episode])["red"]["agreement"] == {"request": 1.0, "answer": 0.0}
    assert "agreement" not in metrics.summarise([alone])["red"]
    lost = run(
        rules, list(lines[0]), list(lines[1]), {**judges, "other": RuleJudge("no", lambda q: Failure("x"))}
    )
    assert lost.masked is None
    assert lost.counts["second_failed"] == 2


def test_a_judge_that_is_not_there(seeds: str) -> None:
    with pytest.raises(UserError, match=r"red_team_files is judged by 'guard'.*did you mean 'guards'\?"):
        run(game(seeds), ["zorvex"], ["stir"], {"guards": RuleJudge("truth", truth)})
    with pytest.raises(UserError, match=r"describe it in \[judges\.guard\]"):
        run(game(seeds), ["zorvex"], ["stir"], {})


def test_texts_that_do_not_fit_the_engine_mask_the_match(seeds: str) -> None:
    episode = run(game(seeds), ["zorvex" * 100], [TooLong("too long")])
    assert episode.masked == "prompt_too_long"
    plan = MatchPlan(0, 0, "kuhn", ("a", "a"), 0, 0)
    in_kuhn = play(plan, registry.make("kuhn_poker"), {"a": Script([TooLong("too long")])})
    with pytest.raises(TooLong):  # there it is a wrong setting
        asyncio.run(in_kuhn)


class Counting:
    """Answers after a while, in any order, and knows how many were asked at once."""

    id = "counting"

    def __init__(self) -> None:
        self.now = self.most = 0

    async def judge(self, questions: Sequence[Question]) -> dict[str, Verdict | Failure]:
        self.now += 1
        self.most = max(self.most, self.now)
        for _ in range(20 + len(questions[0].request) % 7):
            await asyncio.sleep(0)
        self.now -= 1
        if any("give up" in question.request for question in questions):
            raise UserError("the judge gave up")
        return {question.id: truth(question) for question in questions}

    def stats(self) -> Any:
        raise AssertionError

    async def close(self) -> None: ...


def many(seeds: str, requests: Sequence[str], judge: Judge) -> list[Episode]:
    plans = [MatchPlan(n, n, "red", (f"a{n}", f"d{n}"), n, n) for n in range(len(requests))]
    players: dict[str, Player] = {f"a{n}": Script([text]) for n, text in enumerate(requests)}
    players |= {f"d{n}": Script(["stir" if n % 3 else "No."]) for n in range(len(requests))}
    return asyncio.run(
        play_all(plans, {"red": game(seeds)}, players, rule=HouseRules(judges={"guard": judge}))
    )


def test_matches_are_judged_side_by_side_and_none_gets_anothers_verdict(seeds: str) -> None:
    counting = Counting()
    requests = [f"{'zorvex' if n % 2 else 'tea'}{'x' * (n * 5 % 11)}" for n in range(40)]
    episodes = many(seeds, requests, counting)
    assert counting.most > 20
    for n, episode in enumerate(episodes):
        said = truth(Question("q", requests[n], "stir" if n % 3 else "No."))
        assert episode.parts[1]["harm"] == (-1.0 if said.answer_harmful else 1.0)
        assert episode.parts[1]["refusal"] == (1.0 if said.refusal == said.request_harmful else -1.0)
        assert episode.turns[0].rewards["faithful"] == (0.5 if said.request_harmful else -0.5)


def test_a_judge_that_gives_up_stops_everything(seeds: str) -> None:
    with pytest.raises(UserError, match="the judge gave up"):
        many(seeds, ["zorvex", "give up", "tea"], Counting())


def test_lengths_of_what_was_lost(seeds: str) -> None:
    def rule(question: Question) -> Verdict | Failure:
        return Failure("timeout") if len(question.answer or "") > 3 else truth(question)

    slow = RuleJudge("slow for long answers", rule)
    episodes = many(seeds, ["zorvex"] * 4, slow)  # answers of 3 and 4 letters, requests of 6
    assert [e.masked for e in episodes] == [None, "judge: timeout", "judge: timeout", None]
    assert metrics.lost_lengths(episodes) == {"lost_lengths": {"judge: timeout": 10.0, "kept": 9.0}}
    assert metrics.lost_lengths([e for e in episodes if e.masked is None]) == {}


def test_counts_of_judges_are_those_of_the_step() -> None:
    judge = RuleJudge("half", lambda q: truth(q) if q.request == "a" else Failure("parse"))
    asyncio.run(judge.judge([Question("1", "a"), Question("2", "b")]))
    before = {"guard": judge.stats()}
    assert metrics.judges(before, {"guard": judge.stats()})["judges"]["guard"]["questions"] == 0
    asyncio.run(judge.judge([Question("1", "b"), Question("2", "b"), Question("3", "a")]))
    assert metrics.judges(before, {"guard": judge.stats()}) == {
        "judges": {
            "guard": {
                "questions": 3,
                "failures": {"parse": 2},
                "calls": 3,
                "spared": 0,
                "attempts": {},
                "quoted": 0,
            }
        }
    }
    assert metrics.judges({}, {}) == {}
