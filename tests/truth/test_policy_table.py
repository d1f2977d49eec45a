"""Policies written out of a language model whose law over replies is known."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyspiel
import pytest
import torch
from table_engine import Law, TableEngine, kuhn_equilibrium
from transformers import Qwen3Config, Qwen3ForCausalLM

from ludus.engines.base import EngineUnavailable
from ludus.engines.torch_engine import TorchEngine
from ludus.errors import UserError
from ludus.games.base import HasSpiel
from ludus.games.registry import make
from ludus.text.prompter import Prompter
from ludus.text.templates import detect
from ludus.text.tokenizer import Tokenizer
from ludus.text.train_tokenizer import train_tokenizer
from ludus.truth.exploitability import exploitability
from ludus.truth.policy_table import PolicyTable, tabulate
from ludus.truth.sequence_form import InformationSet, sequence_form
from ludus.types import Completion, Request, Sampling, Stop

SAMPLING = Sampling(max_tokens=64)
WORDS = ("pass", "bet")


@pytest.fixture(scope="module")
def kuhn() -> HasSpiel:
    game = make("kuhn_poker")
    assert isinstance(game, HasSpiel)
    return game


def prompter_of(tokenizer: Tokenizer, **options: Any) -> Prompter:
    return Prompter(tokenizer, detect(tokenizer), rules=False, **options)


def engine_of(kuhn: HasSpiel, prompter: Prompter, law: Callable[[InformationSet], Law]) -> TableEngine:
    return TableEngine(
        {
            tuple(prompter.prompt(kuhn.observe_state(s.state, s.seat)).ids): law(s)
            for s in sequence_form(kuhn).sets
        }
    )


def write(game: HasSpiel, engine: Any, prompter: Prompter, **options: Any) -> PolicyTable:
    options = {"thoughts": 16, "seed": 5, **options}
    sampling = options.pop("sampling", SAMPLING)
    return asyncio.run(tabulate(game, engine, "me", prompter, sampling, **options))


def musing(prompter: Prompter) -> Callable[[InformationSet], Law]:
    """Thoughts that decide, an odd spelling in one action only, illegal words, thoughts that never end."""
    encode = prompter.tokenizer.encode

    def law(s: InformationSet) -> Law:
        bold = 0.2 + 0.05 * (len(s.key) + int(s.key[0]))
        closed: list[tuple[list[int], float]] = [
            (prompter.spell("bet", "I hold a high card."), bold * 0.5),
            (prompter.spell("pass", "I hold a high card."), bold * 0.3),
            ([*prompter.spell("", "I hold a high card.")[:-2], *encode("\n\\boxed{ bet }")], bold * 0.2),
            (prompter.spell("bet", "low"), (1 - bold) * 0.1),
            (prompter.spell("pass", "low"), (1 - bold) * 0.6),
            (prompter.spell("fold", "low"), (1 - bold) * 0.2),
        ]
        replies: Law = [(tuple(ids), Stop.ACTION, p) for ids, p in closed]
        return [*replies, (tuple(encode("I hold a low card " * 3)), Stop.LENGTH, (1 - bold) * 0.1)]

    return law


def true_bet(s: InformationSet) -> tuple[float, float]:
    """(P(bet | legal), P(illegal)) of `musing`."""
    bold = 0.2 + 0.05 * (len(s.key) + int(s.key[0]))
    legal = bold + (1 - bold) * 0.7
    return (bold * 0.7 + (1 - bold) * 0.1) / legal, 1 - legal


def test_sampled_thoughts_find_the_true_policy(kuhn: HasSpiel, kuhn_tokenizer: Tokenizer) -> None:
    prompter = prompter_of(kuhn_tokenizer)
    engine = engine_of(kuhn, prompter, musing(prompter))
    table = write(kuhn, engine, prompter, thoughts=600)
    assert table.thoughts == 600
    for s, estimate in zip(table.sets, table.estimates, strict=True):
        bet, illegal = true_bet(s)
        assert estimate.probs[1] == pytest.approx(bet, abs=0.06), s.key
        assert estimate.illegal == pytest.approx(illegal, abs=0.06), s.key
    # Averaged over the sets the noise is 1/sqrt(12) of that: a bias would show.
    bias = [e.probs[1] - true_bet(s)[0] for s, e in zip(table.sets, table.estimates, strict=True)]
    assert abs(np.mean(bias)) < 0.02
    truth = exploitability(kuhn, {s.key: {0: 1 - true_bet(s)[0], 1: true_bet(s)[0]} for s in table.sets})
    measured = exploitability(kuhn, table)
    assert measured.exploitability == pytest.approx(truth.exploitability, abs=0.03)
    low, high = measured.ci95
    assert low <= truth.exploitability <= high
    assert measured.illegal_ci95 is not None
    mean_illegal = np.mean([true_bet(s)[1] for s in table.sets])
    assert measured.illegal_ci95[0] < mean_illegal < measured.illegal_ci95[1]
    assert 0.05 < table.unscored < 0.2  # the odd spelling
    assert table.disagreement < 3 / math.sqrt(12 * 600)


@pytest.mark.parametrize("format", ["boxed", "answer"])
def test_scores_are_sharper_than_frequencies(kuhn: HasSpiel, kuhn_tokenizer: Tokenizer, format: str) -> None:
    """One thought only, then a fair choice: scored it is exact, whatever was drawn."""
    prompter = prompter_of(kuhn_tokenizer, format=format)
    replies: Law = [(tuple(prompter.spell(word, "low")), Stop.ACTION, 0.5) for word in WORDS]
    engine = engine_of(kuhn, prompter, lambda s: replies)
    table = write(kuhn, engine, prompter, thoughts=5)
    for estimate in table.estimates:
        assert estimate.probs == pytest.approx([0.5, 0.5], abs=1e-12)
    assert engine.generated == 60
    assert engine.scored == 24  # the same thought at the same set is scored once
    result = exploitability(kuhn, table)
    assert result.ci95 == pytest.approx((result.exploitability, result.exploitability))


@pytest.mark.parametrize("alpha", [0.0, 0.15, 1 / 3])
def test_a_model_that_answers_at_once_is_exact(
    kuhn: HasSpiel, kuhn_tokenizer: Tokenizer, alpha: float
) -> None:
    prompter = prompter_of(kuhn_tokenizer, think=False)
    policy = kuhn_equilibrium(alpha)
    engine = engine_of(
        kuhn,
        prompter,
        lambda s: [(tuple(prompter.spell(WORDS[a])), Stop.ACTION, p) for a, p in policy[s.key].items()],
    )
    result = exploitability(kuhn, write(kuhn, engine, prompter))
    assert result.exploitability < 1e-9
    assert result.illegal_mass == pytest.approx(0, abs=1e-12)
    assert result.thoughts == 0
    assert engine.generated == 0


def test_without_a_thought_only_chatty_sets_are_sampled(kuhn: HasSpiel, kuhn_tokenizer: Tokenizer) -> None:
    prompter = prompter_of(kuhn_tokenizer, think=False)
    encode = kuhn_tokenizer.encode

    def law(s: InformationSet) -> Law:
        if s.key != "1pb":
            return [(tuple(prompter.spell("bet")), Stop.ACTION, 1.0)]
        chat = [(tuple(encode(f"Well. \\boxed{{{w}}}")), Stop.ACTION, 0.3) for w in WORDS]
        return [*chat, (tuple(prompter.spell("bet")), Stop.ACTION, 0.4)]

    engine = engine_of(kuhn, prompter, law)
    table = write(kuhn, engine, prompter, thoughts=400)
    assert engine.generated == 400
    assert table.policy["1pb"][1] == pytest.approx(0.7, abs=0.05)
    assert table.policy["0"][1] == 1.0
    forced = write(kuhn, engine, prompter, thoughts=0)
    assert forced.policy["1pb"] == {0: 0.0, 1: 1.0}
    assert forced.illegal[forced.sets.index(next(s for s in forced.sets if s.key == "1pb"))] == pytest.approx(
        0.6
    )


def test_end_markers_are_part_of_the_answer(kuhn: HasSpiel, kuhn_tokenizer: Tokenizer) -> None:
    """Without stop_on_action a reply ends with its marker, and may do so for one action more than another."""
    prompter = prompter_of(kuhn_tokenizer, stop_on_action=False)
    end = min(prompter.template.end_ids)
    more = kuhn_tokenizer.encode(" I hold")
    bet, passing = (tuple(prompter.spell(w, "low")) for w in ("bet", "pass"))
    replies: Law = [
        ((*bet, end), Stop.EOS, 0.2),
        ((*bet, *more, end), Stop.EOS, 0.4),
        ((*passing, end), Stop.EOS, 0.4),
    ]
    engine = engine_of(kuhn, prompter, lambda s: replies)
    table = write(kuhn, engine, prompter, thoughts=800)
    assert np.mean([e.probs[1] for e in table.estimates]) == pytest.approx(0.6, abs=0.02)
    assert table.unscored == pytest.approx(0.4, abs=0.03)


def test_an_answer_beyond_the_limit_has_no_mass(kuhn: HasSpiel, tmp_path: Path) -> None:
    train_tokenizer(["to bet or to bet or to bet"], tmp_path, 290)
    prompter = prompter_of(Tokenizer.load(tmp_path))  # it knows the word "bet" and spells out "pass"
    short, long = (tuple(prompter.spell(word, "low")) for word in ("bet", "pass"))
    assert len(short) < len(long)
    engine = engine_of(kuhn, prompter, lambda s: [(ids, Stop.ACTION, 0.5) for ids in (short, long)])
    whole = write(kuhn, engine, prompter, sampling=Sampling(max_tokens=len(long)))
    assert whole.policy["0"] == pytest.approx({0: 0.5, 1: 0.5})
    cut = write(kuhn, engine, prompter, sampling=Sampling(max_tokens=len(short)))
    assert cut.policy["0"] == {0: 0.0, 1: 1.0}
    assert cut.illegal.mean() == pytest.approx(0.5, abs=0.15)


def test_nothing_but_illegal_words(kuhn: HasSpiel, kuhn_tokenizer: Tokenizer) -> None:
    prompter = prompter_of(kuhn_tokenizer)
    raises = tuple(prompter.spell("raise"))
    table = write(kuhn, engine_of(kuhn, prompter, lambda s: [(raises, Stop.ACTION, 1.0)]), prompter)
    assert table.problem is not None
    assert "100.0% of the model's replies hold no legal action" in table.problem
    assert ascii(prompter.read(raises).text) in table.problem
    result = exploitability(kuhn, table)
    assert result.illegal_mass == 1.0
    assert result.exploitability_with_forfeits == 2.0  # every match is given away, 2 chips a time
    assert all(row.probs == (0.5, 0.5) for row in result.table)


def test_a_little_legality_is_a_policy(kuhn: HasSpiel, kuhn_tokenizer: Tokenizer) -> None:
    prompter = prompter_of(kuhn_tokenizer)
    raises, bets = (tuple(prompter.spell(word)) for word in ("raise", "bet"))
    law: Law = [(raises, Stop.ACTION, 0.95), (bets, Stop.ACTION, 0.05)]
    table = write(kuhn, engine_of(kuhn, prompter, lambda s: law), prompter)
    assert 0.9 < table.illegal.mean() < 0.99
    assert table.problem is None
    assert table.illegal_reply == prompter.read(raises).text


def test_leducs_936_information_sets_in_one_call(kuhn_tokenizer: Tokenizer) -> None:
    """All replies wait together and all actions are scored together, whatever the engine then batches."""
    game = make("leduc_poker", suits=True)
    assert isinstance(game, HasSpiel)
    solver = pyspiel.CFRPlusSolver(game.spiel)
    for _ in range(40):
        solver.evaluate_and_update_policy()
    average = solver.tabular_average_policy()
    policy = {key: dict(row) for key, row in average.policy_table().items()}
    theirs = pyspiel.nash_conv(game.spiel, average)

    class Counting(TableEngine):
        calls = waiting = most = 0

        async def score(self, policy: str, prompts: Any, continuations: Any) -> list[list[float]]:
            self.calls += 1
            return await super().score(policy, prompts, continuations)

        async def generate(self, request: Request) -> Completion:
            self.waiting += 1
            self.most = max(self.most, self.waiting)
            await asyncio.sleep(0)
            self.waiting -= 1
            return await super().generate(request)

    def engine(prompter: Prompter, thought: str) -> Counting:
        laws: dict[tuple[int, ...], Law] = {}
        for s in sequence_form(game).sets:
            texts = {a: game.action_text(s.state, a) for a in s.actions}
            laws[tuple(prompter.prompt(game.observe_state(s.state, s.seat)).ids)] = [
                (tuple(prompter.spell(texts[a], thought)), Stop.ACTION, p) for a, p in policy[s.key].items()
            ]
        assert len(laws) == 936  # every information set has a prompt of its own
        return Counting(laws)

    def nash_conv(table: PolicyTable) -> float:
        return float(sequence_form(game).evaluate(table.column).nash_conv[0])

    at_once, musing = prompter_of(kuhn_tokenizer, think=False), prompter_of(kuhn_tokenizer)
    scored = engine(at_once, "")
    assert nash_conv(write(game, scored, at_once)) == pytest.approx(theirs, abs=1e-6)
    assert (scored.calls, scored.generated) == (1, 0)
    sampled = engine(musing, "low")
    table = write(game, sampled, musing, thoughts=2, in_flight=10_000)
    assert nash_conv(table) == pytest.approx(theirs, abs=1e-6)
    assert (sampled.calls, sampled.generated, sampled.most) == (1, 1872, 1872)


def test_the_same_seed_gives_the_same_table(kuhn: HasSpiel, kuhn_tokenizer: Tokenizer) -> None:
    prompter = prompter_of(kuhn_tokenizer)
    engine = engine_of(kuhn, prompter, musing(prompter))
    one, two, other = (
        exploitability(kuhn, write(kuhn, engine, prompter, seed=seed, in_flight=n))
        for seed, n in ((1, 3), (1, 100), (2, 3))
    )
    assert one == two
    assert one != other


def test_the_torch_engine_scores_what_the_model_says(kuhn: HasSpiel, kuhn_tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=kuhn_tokenizer.vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=256,
            initializer_range=0.3,
        )
    ).eval()
    prompter = prompter_of(kuhn_tokenizer, think=False)
    engine = TorchEngine.from_model(model, "me", slots=8, context=256)
    table = write(kuhn, engine, prompter, thoughts=0)
    for s in table.sets[:4]:
        prompt = prompter.prompt(kuhn.observe_state(s.state, s.seat)).ids
        masses = []
        for word in WORDS:
            answer = prompter.spell(word)
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
            at = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            masses.append(math.exp(sum(float(logits[i, t]) for i, t in zip(at, answer, strict=True))))
        assert table.policy[s.key][1] == pytest.approx(masses[1] / sum(masses), abs=1e-5)
        assert table.illegal[table.sets.index(s)] == pytest.approx(1 - sum(masses), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "arguments", "said"),
    [
        ({}, {"sampling": Sampling(64, temperature=0.7)}, "temperature 0.7"),
        ({}, {"sampling": Sampling(64, top_p=0.9)}, "top_p"),
        ({"context": "chat"}, {}, "chat context"),
        ({}, {"thoughts": 0}, "at least 2"),
        ({}, {"thoughts": 1}, "at least 2"),
    ],
)
def test_settings_without_exact_probabilities_are_refused(
    kuhn: HasSpiel,
    kuhn_tokenizer: Tokenizer,
    options: dict[str, Any],
    arguments: dict[str, Any],
    said: str,
) -> None:
    prompter = prompter_of(kuhn_tokenizer, **options)
    with pytest.raises(UserError, match=said):
        write(kuhn, TableEngine({}), prompter, **arguments)


def test_engines_of_text_and_lost_engines_are_told_apart(kuhn: HasSpiel, kuhn_tokenizer: Tokenizer) -> None:
    prompter = prompter_of(kuhn_tokenizer)

    class Served(TableEngine):
        completion: Completion

        async def generate(self, request: Request) -> Completion:
            return self.completion

    served = Served({})
    served.completion = Completion([], [], Stop.EOS, 0, text="\\boxed{bet}")
    with pytest.raises(UserError, match="served as text"):
        write(kuhn, served, prompter)
    served.completion = Completion([], [], Stop.ABORTED, 0)
    with pytest.raises(EngineUnavailable, match="aborted"):
        write(kuhn, served, prompter)
