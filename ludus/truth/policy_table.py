r"""The policy of a language model in a small game, written out: a probability per action and information set.

At an information set the model writes a reply: a lead-in (its thought, and whatever else it says before
the answer), then the action in the marks of its format, such as `\boxed{ACTION}`. Its probability of an
action is an average over lead-ins, and there are too many of those to sum; so replies are sampled, and each
is improved upon (Rao-Blackwell): given its lead-in, the exact probabilities of all legal actions are scored,
renormalised, and stand in for the one action that was drawn. A reply that spells its action in another way
than the tokenizer's plain one is left as it was drawn. For a lead-in L followed by the spelling s,
P(legal, a) is estimated by the mean over replies of

    [s plain, legal] P(a plain | L) / sum_b P(b plain | L)  +  [s legal, not plain] [s plays a]

which is unbiased. Where the model answers at once (no thought, and at least 99% of its probability on plain
spellings of legal actions), those probabilities are the policy: exact, one call, no sampling.

Scored is the first attempt at a move, in the `board` context, at temperature 1 without filters.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ludus.engines.base import Engine, EngineUnavailable
from ludus.errors import UserError
from ludus.games.base import HasSpiel, Observation
from ludus.seeding import derive
from ludus.text.prompter import Prompter
from ludus.truth.illegal import hopeless
from ludus.truth.intervals import wilson
from ludus.truth.sequence_form import Floats, InformationSet, sequence_form
from ludus.types import Completion, Request, Sampling, Stop

DIRECT = 0.01  # probability that may lie elsewhere where a model counts as answering at once


@dataclass(frozen=True, slots=True)
class Estimate:
    """What is known of one information set.

    Row k of `laws` [K, actions] is the law of sampled reply k (all 0 where it was illegal); K = 1 where the
    law is exact. `illegal` is the probability of no legal action.
    """

    laws: Floats
    illegal: float

    @property
    def probs(self) -> Floats:
        """The law given that a legal action is played, [actions]; uniform where none ever was."""
        return self.normalised(self.laws.sum(axis=0))

    def normalised(self, sums: Floats) -> Floats:
        total = float(sums.sum())
        return sums / total if total > 0 else np.full(len(sums), 1 / len(sums))


@dataclass(frozen=True, slots=True)
class PolicyTable:
    """A policy over all information sets of a game.

    `thoughts` is the number of replies sampled per set (0: exact everywhere). The probabilities of `policy`
    are those given that the reply is legal; `illegal` is the probability of anything else, per set, and
    where it is scored instead of sampled an upper bound: all that is not plainly spelled. `unscored` is the
    share of the legal sampled replies that were not plainly spelled. `disagreement` is the largest
    difference, over action texts, between the mean probability here and the frequency among the very same
    replies: by chance about 1 / sqrt(sets * thoughts) at most, more only if what is scored is not what
    samples. `illegal_reply` is one of the illegal ones, as it was said.
    """

    sets: tuple[InformationSet, ...]
    estimates: tuple[Estimate, ...]
    thoughts: int
    unscored: float = 0.0
    disagreement: float = 0.0
    illegal_reply: str | None = None

    @staticmethod
    def of(game: HasSpiel, policy: Mapping[str, Mapping[int, float]]) -> PolicyTable:
        """A known policy {information state: {action: probability}}; UserError where it is none."""
        form = sequence_form(game)
        column = form.behaviour(policy)[:, 0]
        rows = [
            column[first : first + len(s.actions)] for s, first in zip(form.sets, form.first, strict=True)
        ]
        return PolicyTable(form.sets, tuple(Estimate(row[None], 0.0) for row in rows), thoughts=0)

    @property
    def policy(self) -> dict[str, dict[int, float]]:
        """{information state: {action: probability}}, given that the reply is legal."""
        return {
            s.key: dict(zip(s.actions, map(float, e.probs), strict=True))
            for s, e in zip(self.sets, self.estimates, strict=True)
        }

    @property
    def illegal(self) -> Floats:
        """Probability of no legal action, per set."""
        return np.array([e.illegal for e in self.estimates])

    @property
    def problem(self) -> str | None:
        """Why there is no policy here to measure: hardly any reply was legal. None where there is one."""
        return hopeless(float(self.illegal.mean()), self.illegal_reply)

    @property
    def illegal_ci95(self) -> tuple[float, float] | None:
        """95% interval of the mean of `illegal`; None where nothing was sampled."""
        sampled = [e for e in self.estimates if len(e.laws) > 1]
        if not sampled:
            return None
        trials = sum(len(e.laws) for e in sampled)
        low, high = wilson(sum(e.illegal * len(e.laws) for e in sampled) / trials, trials)
        scored = sum(e.illegal for e in self.estimates if len(e.laws) <= 1)
        n = len(self.estimates)
        return (scored + low * len(sampled)) / n, (scored + high * len(sampled)) / n

    @property
    def column(self) -> Floats:
        """The policy as a behaviour [cells, 1] of the game's sequence form."""
        return np.concatenate([e.probs for e in self.estimates])[:, None]

    def resample(self, count: int, rng: np.random.Generator) -> Floats:
        """`count` bootstrap policies [cells, count]: replies drawn anew from the sampled ones, set by set."""
        blocks = []
        for estimate in self.estimates:
            replies = len(estimate.laws)
            weights = rng.multinomial(replies, np.full(replies, 1 / replies), size=count)
            sums = weights @ estimate.laws
            totals = sums.sum(axis=1, keepdims=True)
            drawn = np.divide(sums, totals, out=np.tile(estimate.probs, (count, 1)), where=totals > 0)
            blocks.append(drawn.T)
        return np.concatenate(blocks)


async def tabulate(
    game: HasSpiel,
    engine: Engine,
    policy: str | Sequence[str],
    prompter: Prompter,
    sampling: Sampling,
    *,
    thoughts: int,
    seed: int,
    in_flight: int = 512,
) -> PolicyTable:
    """Write out `policy`, as the module says, with `thoughts` replies sampled per information set.

    `policy` is one in the engine, or one for each seat.
    `thoughts` is at least 2, or 0 to forbid sampling (for models without a thought). At most `in_flight`
    replies are sampled at once. Raises UserError for a game without (few) information sets, for another
    sampling than temperature 1 without filters, for the `chat` context, where a reply depends on earlier
    thoughts, and for engines that speak text only.
    """
    _check(prompter, sampling, thoughts)
    questions = [_Question.of(game, s, prompter) for s in sequence_form(game).sets]
    policies = [policy, policy] if isinstance(policy, str) else policy
    scorer = _Scorer(engine, policies, prompter, sampling.max_tokens)
    estimates: dict[int, Estimate] = {}
    if not prompter.thinks:
        spans = await scorer.score([_Lead(q, (), "", ()) for q in range(len(questions))], questions)
        for number, masses in enumerate(spans):
            left = max(0.0, 1.0 - float(masses.sum()))
            if thoughts == 0 or left <= DIRECT:
                law = Estimate(masses[None], left).probs
                estimates[number] = Estimate(law[None], left)
    rest = [number for number in range(len(questions)) if number not in estimates]
    replies = await _sample(
        engine, policies, prompter, sampling, [questions[n] for n in rest], thoughts, seed, in_flight
    )
    drawn = [
        _Drawn.read(number, questions[number], completion, prompter)
        for number, row in zip(rest, replies, strict=True)
        for completion in row
    ]
    leads = list(dict.fromkeys(d.lead for d in drawn if d.lead is not None))
    laws = dict(zip(leads, await scorer.score(leads, questions), strict=True))
    unscored = 0
    gap: dict[str, float] = defaultdict(float)
    rows: dict[int, list[Floats]] = defaultdict(list)
    for reply in drawn:
        actions = questions[reply.number].texts
        seen = np.array([float(text == reply.action) for text in actions])
        law = seen
        if reply.lead is not None and laws[reply.lead].sum() > 0:
            law = laws[reply.lead] / laws[reply.lead].sum()
        elif reply.action is not None:
            unscored += 1
        rows[reply.number].append(law)
        for text, difference in zip(actions, law - seen, strict=True):
            gap[text] += float(difference)
    for number, found in rows.items():
        stacked = np.stack(found)
        estimates[number] = Estimate(stacked, float(1 - stacked.sum() / len(found)))
    legal = sum(d.action is not None for d in drawn)
    return PolicyTable(
        sets=tuple(q.set for q in questions),
        estimates=tuple(estimates[number] for number in range(len(questions))),
        thoughts=thoughts if rest else 0,
        unscored=unscored / legal if legal else 0.0,
        disagreement=max((abs(g) for g in gap.values()), default=0.0) / max(1, len(drawn)),
        illegal_reply=next((d.text for d in drawn if d.action is None), None),
    )


@dataclass(frozen=True, slots=True)
class _Question:
    """One information set as the model meets it."""

    set: InformationSet
    observation: Observation
    prompt_ids: list[int]
    messages: tuple[tuple[str, str], ...]
    texts: tuple[str, ...]  # of the set's actions, in their order

    @staticmethod
    def of(game: HasSpiel, information_set: InformationSet, prompter: Prompter) -> _Question:
        observation = game.observe_state(information_set.state, information_set.seat)
        prompt = prompter.prompt(observation)
        texts = tuple(game.action_text(information_set.state, a) for a in information_set.actions)
        return _Question(information_set, observation, prompt.ids, prompt.messages, texts)


@dataclass(frozen=True, slots=True)
class _Lead:
    """Where an answer begins: after the ids `before`, in the middle of a token that starts with `head`.

    `tail` is what must follow the box: the end marker, where the reply went on to sample one.
    """

    question: int
    before: tuple[int, ...]
    head: str
    tail: tuple[int, ...]

    def spell(self, text: str, prompter: Prompter) -> list[int]:
        said = f"{self.head}{prompter.grammar.opening}{text}{prompter.grammar.closing}"
        return [*prompter.tokenizer.encode(said), *self.tail]


@dataclass(frozen=True, slots=True)
class _Drawn:
    """One sampled reply, taken apart."""

    number: int  # of the question
    text: str  # all of it
    action: str | None  # None: illegal
    lead: _Lead | None  # where the answer is spelled plainly

    @staticmethod
    def read(number: int, question: _Question, completion: Completion, prompter: Prompter) -> _Drawn:
        read = prompter.read(completion.ids)
        text, action = read.text, read.action
        if action not in question.texts:
            return _Drawn(number, text, None, None)
        ids = list(completion.ids)
        tail = (ids.pop(),) if completion.stop is Stop.EOS else ()
        # The action begins in the last token from which the rest of the reply still spells its opening.
        for cut in range(len(ids) - 1, -1, -1):
            head, opening, _ = prompter.tokenizer.decode(ids[cut:]).rpartition(prompter.grammar.opening)
            if opening:
                lead = _Lead(number, tuple(ids[:cut]), head, tail)
                plain = lead.spell(action, prompter) == [*ids[cut:], *tail]
                return _Drawn(number, text, action, lead if plain else None)
        raise AssertionError(f"the reply plays {action!r} without having begun to")


@dataclass(frozen=True, slots=True)
class _Scorer:
    engine: Engine
    policies: Sequence[str]  # per seat
    prompter: Prompter
    max_tokens: int

    async def score(self, leads: Sequence[_Lead], questions: Sequence[_Question]) -> list[Floats]:
        """Per lead, the probability of each action's plain spelling after it; 0 beyond the token limit."""
        prompts: list[list[int]] = []
        answers: list[list[int]] = []
        places: list[tuple[int, int]] = []
        masses = [np.zeros(len(questions[lead.question].texts)) for lead in leads]
        for row, lead in enumerate(leads):
            question = questions[lead.question]
            for column, text in enumerate(question.texts):
                answer = lead.spell(text, self.prompter)
                if len(lead.before) + len(answer) <= self.max_tokens:
                    prompts.append([*question.prompt_ids, *lead.before])
                    answers.append(answer)
                    places.append((row, column))
        by = [self.policies[questions[leads[row].question].set.seat] for row, _ in places]
        for policy in dict.fromkeys(by):
            own = [i for i, name in enumerate(by) if name == policy]
            scores = await self.engine.score(policy, [prompts[i] for i in own], [answers[i] for i in own])
            for i, logprobs in zip(own, scores, strict=True):
                row, column = places[i]
                masses[row][column] = math.exp(math.fsum(logprobs))
        return masses


async def _sample(
    engine: Engine,
    policies: Sequence[str],
    prompter: Prompter,
    sampling: Sampling,
    questions: Sequence[_Question],
    thoughts: int,
    seed: int,
    in_flight: int,
) -> list[list[Completion]]:
    gate = asyncio.Semaphore(in_flight)

    async def one(question: _Question, number: int) -> Completion:
        policy = policies[question.set.seat]
        async with gate:
            completion = await engine.generate(
                Request(
                    policy=policy,
                    prompt_ids=question.prompt_ids,
                    seed=derive(seed, question.set.key, number),
                    sampling=sampling,
                    stop=prompter.stop,
                    messages=question.messages,
                )
            )
        if completion.text is not None:
            raise UserError(
                f"policy {policy!r} is served as text: its actions cannot be scored token by token, so it "
                "has no exploitability here; play it against fixed opponents instead"
            )
        if completion.stop is Stop.ABORTED:
            raise EngineUnavailable(policy, "aborted")
        return completion

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [[group.create_task(one(q, k)) for k in range(thoughts)] for q in questions]
    except BaseExceptionGroup as several:
        raise several.exceptions[0] from several
    return [[task.result() for task in row] for row in tasks]


def _check(prompter: Prompter, sampling: Sampling, thoughts: int) -> None:
    mend = "or switch eval.exploitability off"
    if sampling.temperature != 1 or sampling.top_p != 1 or sampling.top_k != 0:
        raise UserError(
            f"the policy's probabilities are exact at temperature 1 without top_p and top_k only (got "
            f"temperature {sampling.temperature:g}, top_p {sampling.top_p:g}, top_k {sampling.top_k}); set "
            f"rollout.temperature = 1.0, rollout.top_p = 1.0, rollout.top_k = 0, {mend}"
        )
    if prompter.context != "board":
        raise UserError(
            "in the chat context a reply depends on the thoughts before it, so no table holds the policy; "
            f'set text.context = "board", {mend}'
        )
    if thoughts < 2 and (thoughts != 0 or prompter.thinks):
        raise UserError(
            f"{thoughts} thoughts per information set give no interval; ask for at least 2, {mend}"
        )
