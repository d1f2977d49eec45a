"""Players: what a language model is asked and how its reply is read; the random player's fairness."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from ludus.engines.torch_engine import TorchEngine
from ludus.games.registry import make
from ludus.learner.model import load_model
from ludus.players import Ask, LanguagePlayer, Past, RandomPlayer
from ludus.text.prompter import Prompter
from ludus.text.templates import detect
from ludus.text.tokenizer import Tokenizer
from ludus.types import Completion, Request, Sampling, Stop


def ask(game: str, seed: int = 0, moves: Sequence[str] = (), past: tuple[Past, ...] = (), **args: Any) -> Ask:
    made = make(game, **args)
    match = made.start(11)
    for move in moves:
        match.play({match.to_act()[0]: move})
    (seat,) = match.to_act()
    problem = past[-1].problem if past else None
    return Ask(
        game,
        seat,
        made.roles[seat],
        match.observe(seat),
        seed,
        int(problem is not None),
        problem,
        past,
        match,
    )


# --- random ---


def test_the_random_player_is_uniform_over_the_legal_moves() -> None:
    picked = Counter(
        asyncio.run(RandomPlayer().answer(ask("tic_tac_toe", seed, ["5", "1"]))).action
        for seed in range(1400)
    )
    assert sorted(str(move) for move in picked) == ["2", "3", "4", "6", "7", "8", "9"]
    assert all(abs(n - 200) < 66 for n in picked.values())  # five standard deviations


def test_the_random_player_draws_from_the_asks_seed_alone() -> None:
    question = ask("negotiation", seed=3)
    first = asyncio.run(RandomPlayer().answer(question))
    assert asyncio.run(RandomPlayer().answer(question)) == first
    assert first.action == question.match.sample(question.seat, Random(3))
    assert (first.prompt_ids, first.completion.ids, first.text) == ([], [], "")


def test_the_random_player_is_legal_where_moves_are_too_many_to_list() -> None:
    for seed in range(50):
        question = ask("negotiation", seed, ["offer 1 wood for 9 gold"])
        action = asyncio.run(RandomPlayer().answer(question)).action
        assert action is not None
        question.match.play({question.seat: action})


# --- a language model ---


@dataclass
class Saying:
    """An engine that answers with what it was given, and remembers the request."""

    completion: Completion
    asked: list[Request] = field(default_factory=list)

    async def generate(self, request: Request) -> Completion:
        self.asked.append(request)
        return self.completion

    async def score(
        self, policy: str, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        raise NotImplementedError("this engine only speaks")

    def load(self, policy: str, weights: Mapping[str, torch.Tensor], version: int) -> None: ...

    async def close(self) -> None: ...


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.load(tiny_model)


def prompter(tokenizer: Tokenizer, context: str = "board") -> Prompter:
    return Prompter(tokenizer, detect(tokenizer), context=context, rules=False)  # type: ignore[arg-type]


def test_the_request_carries_prompt_seed_sampling_and_stop(tokenizer: Tokenizer) -> None:
    rendered = prompter(tokenizer)
    ids = [*rendered.spell("bet", "I hold K."), tokenizer.control("<|im_end|>")]
    said = Completion(ids, [-0.5] * len(ids), Stop.EOS, version=9)
    engine = Saying(said)
    player = LanguagePlayer("past/3", engine, rendered, Sampling(17, temperature=0.7, top_k=5))
    question = ask("kuhn_poker", seed=12345)
    reply = asyncio.run(player.answer(question))
    (request,) = engine.asked
    expected = rendered.prompt(question.observation)
    assert (request.policy, request.seed, request.sampling) == ("past/3", 12345, player.sampling)
    assert (request.prompt_ids, request.messages, request.stop) == (
        expected.ids,
        expected.messages,
        rendered.stop,
    )
    assert (reply.action, reply.prompt_ids, reply.completion) == ("bet", expected.ids, said)
    assert "I hold K." in reply.text


def test_a_reply_without_an_action_lets_nothing_out(tokenizer: Tokenizer) -> None:
    thought = tokenizer.encode("I think of \\boxed{bet} but say nothing")
    engine = Saying(Completion(thought, [-1.0] * len(thought), Stop.LENGTH, 0))
    reply = asyncio.run(
        LanguagePlayer("self", engine, prompter(tokenizer), Sampling(64)).answer(ask("kuhn_poker"))
    )
    assert reply.action is None
    assert "say nothing" in reply.text


def test_an_engine_that_speaks_text_is_read_as_text(tokenizer: Tokenizer) -> None:
    spoken = "<think>K is high</think>So \\boxed{bet}"
    engine = Saying(Completion([], [], Stop.EOS, 0, text=spoken))
    reply = asyncio.run(
        LanguagePlayer("server", engine, prompter(tokenizer), Sampling(64)).answer(ask("kuhn_poker"))
    )
    assert (reply.action, reply.text, reply.completion.ids) == ("bet", spoken, [])
    (request,) = engine.asked
    assert request.messages[-1][0] == "user"
    assert "Legal: pass bet" in request.messages[-1][1]


@pytest.mark.parametrize("context", ["board", "chat"])
def test_a_retry_shows_the_model_why_it_was_refused(tokenizer: Tokenizer, context: str) -> None:
    rendered = prompter(tokenizer, context)
    before = ask("kuhn_poker")
    opened = rendered.prompt(before.observation)
    refused = Completion(tokenizer.encode("hm"), [-1.0], Stop.LENGTH, 0)
    past = (Past(before.observation, opened.ids, refused, "no such move"),)
    engine = Saying(Completion([], [], Stop.EOS, 0))
    asyncio.run(LanguagePlayer("self", engine, rendered, Sampling(8)).answer(ask("kuhn_poker", past=past)))
    prompt_ids = list(engine.asked[0].prompt_ids)
    assert "Refused: no such move" in tokenizer.decode(prompt_ids)
    whole = opened.ids + refused.ids
    assert (prompt_ids[: len(whole)] == whole) == (context == "chat")


def test_a_real_model_answers_in_the_format_it_was_warmed_up_on(
    tiny_model: Path, tokenizer: Tokenizer
) -> None:
    torch.set_num_threads(1)
    engine = TorchEngine.from_model(load_model(tiny_model), slots=8, context=256)
    player = LanguagePlayer("self", engine, prompter(tokenizer), Sampling(24), trainable=True)

    async def several() -> list[str | None]:
        replies = await asyncio.gather(*(player.answer(ask("kuhn_poker", seed)) for seed in range(16)))
        return [reply.action for reply in replies]

    actions = asyncio.run(several())
    assert sum(action in ("pass", "bet") for action in actions) >= 14
    assert asyncio.run(several()) == actions  # the seeds decide
