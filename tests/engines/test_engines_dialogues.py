"""What need not be computed again: a dialogue's next turn uses what its last one left in the cache, and equal
prompts are computed once. Both are sampled as if it were otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
import torch
from engine_models import run
from families import FAMILIES, VOCAB, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from ludus.engines.shelf import Kept, Shelf
from ludus.engines.torch_engine import TorchEngine
from ludus.engines.weights import Architecture, Weights
from ludus.types import Completion, Dialogue, Request, Sampling, StopRule

STOP = StopRule(frozenset({1, 2, 3}))


def engine_of(model: PreTrainedModel, **options: object) -> TorchEngine:
    return TorchEngine.from_model(model, **{"slots": 5, "context": 200, "prefill_batch": 3, **options})


class Computed:
    """Counts the tokens of prompts that an engine computes."""

    def __init__(self, engine: TorchEngine) -> None:
        self.begun = self.extended = 0
        prefill, extend = engine._decoder.prefill, engine._decoder.extend

        def count_prefill(weights, ids, last, *rest):
            self.begun += int((last + 1).sum())
            return prefill(weights, ids, last, *rest)

        def count_extend(weights, ids, *rest):
            self.extended += sum(map(len, ids))
            return extend(weights, ids, *rest)

        engine._decoder.prefill, engine._decoder.extend = count_prefill, count_extend


async def talk(
    engine: TorchEngine, number: int, turns: int, seed: int = 0
) -> list[tuple[Request, Completion]]:
    """One dialogue: what the other side says between two replies has 1 to 90 tokens, sometimes more than a
    block of queries."""
    rng = Random(f"{seed} {number}")
    prompt = [rng.randrange(4, VOCAB) for _ in range(rng.randint(1, 30))]
    dialogue = Dialogue()
    done = []
    for turn in range(turns):
        sampling = Sampling(rng.randint(1, 12), temperature=0.8)
        request = Request("self", tuple(prompt), 1000 * number + turn, sampling, STOP, dialogue=dialogue)
        completion = await engine.generate(request)
        done.append((request, completion))
        room = 200 - 12 - len(prompt) - len(completion.ids)
        said = [rng.randrange(4, VOCAB) for _ in range(rng.choice([1, 3, 9, 90]))][:room]
        if not said:
            break
        prompt += [*completion.ids, *said]
    return done


def talks(engine: TorchEngine, count: int, turns: int, seed: int = 0) -> list[tuple[Request, Completion]]:
    async def go() -> list[tuple[Request, Completion]]:
        spoken = await asyncio.gather(*(talk(engine, n, turns, seed) for n in range(count)))
        return [turn for one in spoken for turn in one]

    return asyncio.run(go())


def alike(some: Sequence[Completion], others: Sequence[Completion]) -> None:
    for a, b in zip(some, others, strict=True):
        assert (a.ids, a.stop, a.version) == (b.ids, b.stop, b.version)
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-4)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("attention", ["bmm", "sdpa"])
def test_later_turns_are_what_a_fresh_prompt_gives(family: str, attention: str):
    model = make_model(family)
    engine = engine_of(model, attention=attention, keep=10_000)
    computed = Computed(engine)
    spoken = talks(engine, count=11, turns=4)
    alike([c for _, c in spoken], run(engine_of(model, attention=attention), [r for r, _ in spoken]))
    # Of a later turn the newest token of the last reply is computed, and what was said since.
    last: dict[Dialogue | None, int] = {}
    wanted = 0
    for request, completion in spoken:
        wanted += len(request.prompt_ids) - last.get(request.dialogue, 0)
        last[request.dialogue] = len(request.prompt_ids) + len(completion.ids) - 1
    assert computed.begun + computed.extended == wanted < sum(len(r.prompt_ids) for r, _ in spoken) * 0.7


def test_the_same_talk_gives_the_same_bits(model: PreTrainedModel):
    """Where there is room for some of the dialogues, too."""
    for keep in (None, 150):
        fresh = [c for _, c in talks(engine_of(model, keep=keep), 9, 3)]
        engine = engine_of(model, keep=keep)
        computed = Computed(engine)
        assert [c for _, c in talks(engine, 9, 3)] == fresh
        assert computed.extended > 0
        alike(fresh, run(engine_of(model), [r for r, _ in talks(engine_of(model), 9, 3)]))


def test_without_room_every_prompt_is_computed_whole(model: PreTrainedModel):
    engine = engine_of(model, keep=0)
    computed = Computed(engine)
    spoken = talks(engine, 5, 3)
    assert computed.extended == 0
    assert computed.begun == sum(len(r.prompt_ids) for r, _ in spoken)


def test_new_weights_never_meet_the_keys_of_old_ones(model: PreTrainedModel):
    other = make_model(seed=9)
    engine = engine_of(model)

    async def go(engine: TorchEngine) -> None:
        [(request, first)] = await talk(engine, 1, 1)
        longer = replace(request, prompt_ids=(*request.prompt_ids, *first.ids, 7, 8), seed=3)
        engine.load("self", other.state_dict(), 1)
        computed = Computed(engine)
        second = await engine.generate(longer)
        assert (second.version, computed.extended) == (1, 0)
        alike([second], run_in_thread(engine_of(other, version=1), longer))
        # While it waits for a row, too.
        longest = replace(longer, prompt_ids=(*longer.prompt_ids, *second.ids, 9), seed=4)
        waits = asyncio.create_task(engine.generate(longest))
        await asyncio.sleep(0)
        engine.load("self", model.state_dict(), 2)
        third = await waits
        assert third.version == 2
        alike([third], run_in_thread(engine_of(model, version=2), longest))

    def run_in_thread(engine: TorchEngine, request: Request) -> list[Completion]:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(run, engine, [request]).result()

    asyncio.run(go(engine))


def test_a_prompt_that_begins_otherwise_is_computed_whole(model: PreTrainedModel):
    """Another text under a dialogue's number, a shorter one, the same again, another policy's."""
    engine = engine_of(model)
    engine.load("past/0", make_model(seed=9).state_dict(), 0)

    async def go() -> None:
        [(request, first)] = await talk(engine, 1, 1)
        ids = (*request.prompt_ids, *first.ids)
        computed = Computed(engine)
        for changed in (
            replace(request, prompt_ids=((ids[0] + 1) % VOCAB, *ids[1:], 7)),
            replace(request, prompt_ids=ids[:1]),
            request,
            replace(request, prompt_ids=(*ids, 7), policy="past/0"),
            replace(request, prompt_ids=(*ids, 7), dialogue=Dialogue()),
            replace(request, prompt_ids=(*ids, 7), dialogue=None),
        ):
            await talk(engine, 1, 1)
            await engine.generate(changed)
        assert computed.extended == 0

    asyncio.run(go())


def test_what_ends_leaves_nothing(model: PreTrainedModel):
    engine = engine_of(model)
    spoken = talks(engine, 3, 2)
    assert engine._shelf.tokens > 0
    for request, _ in spoken:
        assert request.dialogue is not None
        request.dialogue.end()
    assert engine._shelf.tokens == 0


def test_equal_prompts_that_wait_together_are_computed_once(model: PreTrainedModel):
    """Forty requests for four prompts, in rows for thirty and chunks of two prompts."""
    prompts = [[7, 8, 9], [9, 8, 7], [5] * 40, [7, 8, 9, 10]]
    requests = [
        Request("self", tuple(prompts[i % 4]), i, Sampling(1 + i % 9, temperature=0.8), STOP)
        for i in range(40)
    ]
    engine = engine_of(model, slots=30, prefill_batch=2)
    computed = Computed(engine)
    found = run(engine, requests)
    # Those of the first thirty rows once each; the ten that waited come in as rows get free.
    assert 50 <= computed.begun <= 50 + sum(sorted(len(prompts[i % 4]) for i in range(40))[-10:])
    alike(found, [run(engine_of(model), [request])[0] for request in requests])
    assert len({tuple(c.ids) for c in found}) > 10  # each by its own seed


# ---------------------------------------------------------------------- the shelf itself

WEIGHTS = Weights(Architecture.of(make_model().config), torch.float32, torch.device("cpu"))


def kept(*tokens: int, policy: str = "self") -> Kept:
    return Kept(policy, WEIGHTS, list(tokens), torch.empty(0))


def test_newcomers_find_no_room_until_somebody_ends():
    shelf = Shelf(6)
    one, two, three = Dialogue(), Dialogue(), Dialogue()
    shelf.put(one, kept(1, 2))
    shelf.put(two, kept(3, 4, 5))
    assert shelf.tokens == 5
    assert not shelf.fits(three, 2)
    assert shelf.fits(one, 3)  # in place of its own two
    assert not shelf.fits(one, 4)
    found = shelf.find(two, WEIGHTS, [3, 4, 5, 9])
    assert found is not None
    assert found.tokens == [3, 4, 5]
    assert shelf.find(two, WEIGHTS, [3, 4, 5]) is None  # nothing would be left to compute
    assert shelf.find(two, WEIGHTS, [3, 4, 6, 9]) is None
    assert shelf.find(three, WEIGHTS, [1, 2, 9]) is None
    two.end()
    two.end()
    assert shelf.tokens == 2
    shelf.put(three, kept(7, 8, policy="past/0"))
    shelf.forget("self")
    assert shelf.tokens == 2
    assert shelf.find(one, WEIGHTS, [1, 2, 9]) is None


OPS = st.tuples(st.sampled_from(["put", "end", "drop"]), st.integers(0, 5), st.integers(1, 6))


@settings(max_examples=50, deadline=None)
@given(st.lists(OPS, max_size=40), st.integers(0, 12))
def test_a_shelf_never_holds_more_than_it_may(ops: list[tuple[str, int, int]], limit: int):
    """Against a plain dict."""
    shelf, plain = Shelf(limit), dict[int, int]()
    dialogues = [Dialogue() for _ in range(6)]
    for what, number, size in ops:
        dialogue, others = dialogues[number], sum(n for d, n in plain.items() if d != number)
        if what == "put":
            assert shelf.fits(dialogue, size) == (others + size <= limit)
            if others + size <= limit:
                shelf.put(dialogue, kept(*range(size)))
                plain[number] = size
        else:
            dialogue.end() if what == "end" else shelf.drop(dialogue)
            plain.pop(number, None)
        assert shelf.tokens == sum(plain.values()) <= limit
        for other, size in enumerate(plain.get(i, 0) for i in range(6)):
            assert (shelf.find(dialogues[other], WEIGHTS, range(99)) is not None) == (size > 0)
