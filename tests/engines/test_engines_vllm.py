"""The vLLM engine against Hugging Face, with vLLM for CPUs. Skipped where vLLM is not: see `make test-vllm`.

Starting vLLM takes some twenty seconds, so most tests share one engine; each loads the weights it wants.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import make_requests, reference_logprobs, run
from families import EOS, SIZES, VOCAB
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from vllm_start import CONTEXT, WIDE, assert_exact, shaken, start

from ludus.config import LossConfig, OptimConfig
from ludus.engines.vllm_engine import VllmEngine
from ludus.errors import UserError
from ludus.learner.learner import Learner
from ludus.seeding import derive
from ludus.types import Completion, Request, Sample, Sampling, Stop, StopRule

pytest.importorskip("vllm")
pytestmark = pytest.mark.timeout(1800)  # on a busy machine each start of vLLM takes minutes


def make_model(seed: int = 0) -> PreTrainedModel:
    """A tied Qwen3: the layout whose hand-over has the most traps."""
    return shaken(Qwen3ForCausalLM(Qwen3Config(**WIDE, tie_word_embeddings=True)), seed)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    engine = start(make_model(), tmp_path_factory.mktemp("model"))
    yield engine
    asyncio.run(engine.close())


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model()


@pytest.fixture
def engine(started: VllmEngine, model: PreTrainedModel) -> Iterator[VllmEngine]:
    started.load("self", model.state_dict(), version=7)
    yield started
    for policy in list(started.versions):
        started.unload(policy)


def greedy(model: PreTrainedModel, request: Request) -> list[int]:
    prompt = torch.tensor([list(request.prompt_ids)])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=request.sampling.max_tokens,
        do_sample=False,
        eos_token_id=sorted(request.stop.ids),
        pad_token_id=0,
    )
    return out[0, prompt.shape[1] :].tolist()


# ---------------------------------------------------------------------- what is sampled


def test_greedy_equals_generate(engine: VllmEngine, model: PreTrainedModel):
    requests = make_requests(20, temperature=0.0)  # more than there are slots
    for request, completion in zip(requests, run(engine, requests), strict=True):
        assert completion.ids == greedy(model, request)
        assert completion.logprobs == [0.0] * len(completion.ids)
        assert completion.stop is (Stop.EOS if completion.ids[-1] == EOS else Stop.LENGTH)
        assert completion.version == 7


def test_sampled_logprobs_match_a_recomputation(engine: VllmEngine, model: PreTrainedModel):
    requests = make_requests(20)
    for request, completion in zip(requests, run(engine, requests), strict=True):
        assert_exact(model, request, completion)


def test_logprobs_are_of_the_distribution_sampled_from(engine: VllmEngine, model: PreTrainedModel):
    requests = make_requests(12, temperature=0.8, top_k=7, top_p=0.9)
    for request, completion in zip(requests, run(engine, requests), strict=True):
        exact = reference_logprobs(model, request.prompt_ids, completion.ids) / 0.8
        for row, token, logprob in zip(exact, completion.ids, completion.logprobs, strict=True):
            best = row.topk(7)
            probs = best.values.softmax(-1)
            kept = (probs.cumsum(-1) - probs) < 0.9  # the mass before it
            law = dict(
                zip(best.indices[kept].tolist(), (probs / probs[kept].sum())[kept].tolist(), strict=True)
            )
            assert logprob == pytest.approx(math.log(law[token]), abs=1e-4)


def test_the_first_token_is_drawn_as_often_as_it_should_be(engine: VllmEngine, model: PreTrainedModel):
    prompt, n = [1, 2, 3], 1500
    requests = [Request("self", prompt, i, Sampling(1), StopRule(frozenset())) for i in range(n)]
    counts = torch.bincount(torch.tensor([c.ids[0] for c in run(engine, requests)]), minlength=VOCAB).double()
    expected = reference_logprobs(model, prompt, [0])[0].exp().double() * n
    common = expected >= 5
    rare = torch.stack([counts[~common].sum()]), torch.stack([expected[~common].sum()])
    counts, expected = (torch.cat([x[common], r]) for x, r in zip((counts, expected), rare, strict=True))
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(counts) - 1
    assert freedom >= 5
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5 + 5


def test_a_seed_draws_the_same_alone_and_among_others(engine: VllmEngine):
    """Up to ties: vLLM promises it for the draws, not for the last bits of the logits."""
    requests = make_requests(16)
    together = run(engine, requests)
    backwards = run(engine, requests[::-1])[::-1]
    for request, a, b in zip(requests, together, backwards, strict=True):
        (alone,) = run(engine, [request])
        assert a.ids == b.ids == alone.ids
        assert a.stop is b.stop is alone.stop
        assert a.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_other_seeds_give_other_tokens(engine: VllmEngine):
    """On the CPU the lower 32 bits count: our seeds are hashes, so they differ there."""
    request = make_requests(1)[0]
    seeds = [0, 1, 2, 2**31, 2**32 - 1, *(derive("a seed", i) for i in range(8))]
    requests = [replace(request, seed=s, sampling=Sampling(12), stop=StopRule(frozenset())) for s in seeds]
    assert len({tuple(c.ids) for c in run(engine, requests)}) == len(seeds)


# ---------------------------------------------------------------------- stops


def stops_of(engine: VllmEngine, request: Request, stop: StopRule, limit: int) -> Completion:
    (completion,) = run(engine, [replace(request, stop=stop, sampling=Sampling(limit))])
    return completion


def test_where_a_completion_ends(engine: VllmEngine):
    request = replace(make_requests(1, seed=3)[0], seed=11)
    free = stops_of(engine, request, StopRule(frozenset()), 10)
    assert (len(free.ids), free.stop) == (10, Stop.LENGTH)
    at = next(i for i in range(2, 10) if free.ids[i] not in free.ids[:i])
    token, cut = free.ids[at], free.ids[: at + 1]
    for limit in (at + 1, 10):
        done = stops_of(engine, request, StopRule(frozenset({token})), limit)
        assert (done.ids, done.stop) == (cut, Stop.EOS)
        done = stops_of(engine, request, StopRule(frozenset(), frozenset({token}), lambda ids: True), limit)
        assert (done.ids, done.stop) == (cut, Stop.ACTION)
        assert len(done.logprobs) == len(done.ids)
    both = StopRule(frozenset({token}), frozenset({token}), lambda ids: True)
    assert stops_of(engine, request, both, 10).stop is Stop.EOS


def test_a_reply_that_was_not_closed_goes_on(engine: VllmEngine, model: PreTrainedModel):
    """`closed` is asked after triggers only and sees all so far; what follows is sampled as it should be."""
    request = replace(make_requests(1, seed=3, longest=70)[0], seed=11)
    asked: list[list[int]] = []

    def closed(ids: Any) -> bool:
        asked.append(list(ids))
        return len(ids) >= 9

    triggers = frozenset(range(0, VOCAB, 2))
    done = stops_of(engine, request, StopRule(frozenset(), triggers, closed), 40)
    assert done.stop is Stop.ACTION
    assert len(done.ids) >= 9
    assert asked == [done.ids[: i + 1] for i, token in enumerate(done.ids) if token in triggers]
    assert len(asked) > 1
    assert_exact(model, request, done)
    assert stops_of(engine, request, StopRule(frozenset(), triggers, closed), 40) == done
    never = stops_of(engine, request, StopRule(frozenset(), triggers, lambda ids: False), 40)
    assert (len(never.ids), never.stop) == (40, Stop.LENGTH)
    assert_exact(model, request, never)


def test_requests_with_different_rules_run_together(engine: VllmEngine):
    requests = [
        replace(r, stop=StopRule(frozenset({i % VOCAB, (i + 9) % VOCAB})))
        for i, r in enumerate(make_requests(40))
    ]
    for request, completion in zip(requests, run(engine, requests), strict=True):
        assert not set(completion.ids[:-1]) & request.stop.ids
        ended = completion.ids[-1] in request.stop.ids
        assert (completion.stop is Stop.EOS) == ended
        assert ended or len(completion.ids) == request.sampling.max_tokens


# ---------------------------------------------------------------------- scoring


def test_scores_match_a_forward_pass(engine: VllmEngine, model: PreTrainedModel):
    requests = make_requests(17, longest=90)
    prompts = [list(r.prompt_ids) for r in requests]
    continuations = [list(r.prompt_ids)[: i % 6] for i, r in enumerate(requests)]
    for _ in range(2):  # the second time, prefixes are cached
        scores = asyncio.run(engine.score("self", prompts, continuations))
        for prompt, continuation, score in zip(prompts, continuations, scores, strict=True):
            assert len(score) == len(continuation)
            if continuation:
                exact = reference_logprobs(model, prompt, continuation)
                wanted = exact.gather(1, torch.tensor(continuation)[:, None])[:, 0]
                torch.testing.assert_close(torch.tensor(score), wanted, atol=1e-4, rtol=0)


# ---------------------------------------------------------------------- hand-over


def make_rows(seed: int) -> list[Sample]:
    rng = random.Random(seed)
    rows = []
    for _ in range(8):
        tokens = [rng.randrange(VOCAB) for _ in range(24)]
        mask = [i >= 12 for i in range(24)]
        rows.append(
            Sample(
                tokens=tokens,
                mask=mask,
                logprobs=[-math.log(VOCAB) if m else 0.0 for m in mask],
                advantages=[rng.choice([-1.0, 1.0]) if m else 0.0 for m in mask],
                turn_ids=[0 if m else -1 for m in mask],
                game="g",
                role="r",
            )
        )
    return rows


def test_every_step_of_training_is_handed_over(engine: VllmEngine, model: PreTrainedModel):
    """Pitfall 6. The same long prompts each time: what was cached of them must not be read again."""
    learner = Learner(
        model,
        LossConfig(),
        OptimConfig.model_validate({"lr": 0.02}),
        max_tokens=12,
        total_steps=10,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        seed=1,
    )
    rng = random.Random(5)
    prompts = [[rng.randrange(VOCAB) for _ in range(100)] for _ in range(6)]
    greedily = [Request("self", p, 0, Sampling(16, temperature=0.0), StopRule(frozenset())) for p in prompts]
    sampled = [replace(r, seed=i, sampling=Sampling(16)) for i, r in enumerate(greedily)]
    seen = []
    for step in range(10):
        learner.update(make_rows(step))
        engine.load("self", learner.weights(), version=step)
        replies = run(engine, [*greedily, *sampled])
        assert {c.version for c in replies} == {step}
        assert [c.ids for c in replies[:6]] == [greedy(model, r) for r in greedily]
        for request, completion in zip(sampled, replies[6:], strict=True):
            assert_exact(model, request, completion)
        seen.append([c.ids for c in replies[:6]])
    assert all(a != b for a, b in pairwise(seen))  # the steps could be told apart


def test_stale_prefixes_would_be_noticed(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch):
    """The test above can fail: without the reset, the old policy's keys and values are read."""
    other = make_model(1)
    request = Request("self", [i % VOCAB for i in range(100)], 0, Sampling(8), StopRule(frozenset()))
    run(engine, [request])

    async def nothing(**_: Any) -> bool:
        return True

    with monkeypatch.context() as patch:
        patch.setattr(engine._llm, "reset_prefix_cache", nothing)
        engine.load("self", other.state_dict(), version=8)
    (stale,) = run(engine, [request])
    with pytest.raises(AssertionError):
        assert_exact(other, request, stale)
    engine.load("self", other.state_dict(), version=9)
    (fresh,) = run(engine, [request])
    assert_exact(other, request, fresh)


def test_several_policies_take_turns(engine: VllmEngine, model: PreTrainedModel):
    models = {"self": model, "past/3": make_model(3), "past/5": make_model(5)}
    engine.load("past/3", models["past/3"].state_dict(), version=3)
    rounded = {name: tensor.bfloat16() for name, tensor in models["past/5"].state_dict().items()}
    engine.load("past/5", rounded, version=5)
    models["past/5"].load_state_dict(rounded)
    assert engine.versions == {"self": 7, "past/3": 3, "past/5": 5}
    rng = random.Random(0)
    requests = [replace(r, policy=rng.choice([*models])) for r in make_requests(40)]

    async def conversations() -> list[Completion]:
        """Each asks its next question as soon as it has a reply, of whatever policy."""

        async def one(mine: list[Request]) -> list[Completion]:
            return [await engine.generate(request) for request in mine]

        parts = [requests[i::8] for i in range(8)]
        found = await asyncio.gather(*map(one, parts))
        return [found[i % 8][i // 8] for i in range(len(requests))]

    for request, completion in zip(requests, asyncio.run(conversations()), strict=True):
        assert completion.version == engine.versions[request.policy]
        assert_exact(models[request.policy], request, completion)
    engine.unload("past/3")
    with pytest.raises(UserError, match="holds no policy 'past/3'"):
        run(engine, [replace(requests[0], policy="past/3")])
    (again,) = run(engine, [replace(requests[0], policy="self")])
    assert_exact(model, requests[0], again)


def test_new_weights_wait_for_the_requests_in_flight(engine: VllmEngine, model: PreTrainedModel):
    """A completion is sampled from its first token to its last by the version that it bears."""
    other = make_model(1)
    long = Request("self", [1], 1, Sampling(CONTEXT - 1), StopRule(frozenset()))

    async def go() -> tuple[Completion, Completion]:
        running = asyncio.create_task(engine.generate(long))
        while not engine._in_flight:
            await asyncio.sleep(0.001)
        with pytest.raises(RuntimeError, match="in flight"):
            engine.unload("self")
        engine.load("self", other.state_dict(), version=8)
        later = asyncio.create_task(engine.generate(long))
        return await running, await later

    before, after = asyncio.run(go())
    assert (before.version, after.version) == (7, 8)
    assert_exact(model, long, before)
    assert_exact(other, long, after)


def test_weights_that_do_not_fit_change_nothing(engine: VllmEngine, model: PreTrainedModel):
    state = dict(model.state_dict())
    name = "model.layers.0.mlp.up_proj.weight"
    wrong: dict[str, dict[str, torch.Tensor]] = {
        "1 missing": {k: v for k, v in state.items() if k != name},
        "1 unknown": {**state, "model.layers.9.mlp.up_proj.weight": state[name]},
        "shape": {**state, name: state[name][:, 1:]},
    }
    for said, weights in wrong.items():
        with pytest.raises(UserError, match=said):
            engine.load("self", weights, version=8)
    without_head = {k: v for k, v in state.items() if k != "lm_head.weight"}  # it is tied
    engine.load("other", without_head, version=1)
    assert engine.versions == {"self": 7, "other": 1}
    request = make_requests(1)[0]
    for policy in ("self", "other"):
        (completion,) = run(engine, [replace(request, policy=policy)])
        assert_exact(model, request, completion)


def test_a_nap_between_steps(engine: VllmEngine, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch):
    """The order of calls; vLLM for CPUs keeps its memory all the same."""
    monkeypatch.setattr(engine, "_sleeps", True)
    request = make_requests(1)[0]
    run(engine, [request])
    engine.rest()
    assert engine._resident is None
    other = make_model(4)
    engine.load("self", other.state_dict(), version=8)
    (completion,) = run(engine, [request])
    assert_exact(other, request, completion)
    engine.rest()  # and nobody loads anything
    (completion,) = run(engine, [request])
    assert_exact(other, request, completion)


# ---------------------------------------------------------------------- what cannot be done


def test_the_context_is_told_before_it_overflows(engine: VllmEngine, model: PreTrainedModel):
    full = Request("self", [1] * (CONTEXT - 4), 1, Sampling(4), StopRule(frozenset()))
    (completion,) = run(engine, [full])
    assert (len(completion.ids), completion.stop) == (4, Stop.LENGTH)
    with pytest.raises(UserError, match=r"raise engine\.context or lower max_tokens"):
        run(engine, [replace(full, sampling=Sampling(5))])
    ((score, *_),) = asyncio.run(engine.score("self", [[1] * (CONTEXT - 3)], [[2, 3, 4]]))
    assert score == pytest.approx(reference_logprobs(model, [1] * (CONTEXT - 3), [2])[0, 2].item(), abs=1e-4)
    with pytest.raises(UserError, match=r"raise engine\.context"):
        asyncio.run(engine.score("self", [[1] * (CONTEXT - 3)], [[2, 3, 4, 5]]))


def test_bad_requests_are_refused(engine: VllmEngine):
    good = make_requests(1)[0]
    for bad, said in (
        (replace(good, policy="nobody"), "holds no policy"),
        (replace(good, prompt_ids=[]), "empty"),
        (replace(good, prompt_ids=[VOCAB]), "token ids"),
        (replace(good, sampling=Sampling(4, temperature=0.001)), "temperature"),
        (replace(good, sampling=Sampling(0)), "max_tokens"),
        (replace(good, seed=2**63), "seed"),
    ):
        with pytest.raises(UserError, match=said):
            run(engine, [bad])


def test_a_cancelled_request_leaves_the_engine_in_order(engine: VllmEngine, model: PreTrainedModel):
    async def go() -> None:
        long = Request("self", [1], 1, Sampling(CONTEXT - 1), StopRule(frozenset()))
        running = [asyncio.create_task(engine.generate(replace(long, seed=i))) for i in range(12)]
        while engine._in_flight < 12:
            await asyncio.sleep(0.001)
        for task in running:
            task.cancel()
        assert all(
            isinstance(x, asyncio.CancelledError)
            for x in await asyncio.gather(*running, return_exceptions=True)
        )
        while engine._in_flight:
            await asyncio.sleep(0.001)

    asyncio.run(go())
    engine.load("self", model.state_dict(), version=8)
    request = make_requests(1)[0]
    (completion,) = run(engine, [request])
    assert completion.version == 8
    assert_exact(model, request, completion)


def test_who_is_cancelled_while_leaving_still_lets_others_in(engine: VllmEngine, model: PreTrainedModel):
    """The last request of one policy ends, and is cancelled before it could say so to those of another."""
    for policy in ("self", "other"):
        engine.load(policy, model.state_dict(), version=9)

    async def go() -> None:
        leave = asyncio.Event()

        async def first() -> None:
            async with engine._in_place("self"):
                await leave.wait()

        async def second() -> None:
            async with engine._in_place("other"):
                pass

        leaving = asyncio.create_task(first())
        while not engine._in_flight:
            await asyncio.sleep(0.001)
        waiting = asyncio.create_task(second())
        for _ in range(20):
            await asyncio.sleep(0)
        async with engine._changed:
            leave.set()
            while engine._in_flight:
                await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.sleep(0)
        await asyncio.wait_for(waiting, 60)

    engine._wait(go())


def test_a_model_whose_heads_are_too_narrow_is_refused(tmp_path: Path):
    narrow = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16))
    with pytest.raises(UserError, match=r"head_dim of 32, 64.*this one has 16"):
        start(narrow, tmp_path)


def test_a_model_that_vllm_does_not_know_is_refused(tmp_path: Path):
    from transformers import XGLMConfig, XGLMForCausalLM

    strange = XGLMForCausalLM(
        XGLMConfig(vocab_size=48, d_model=64, num_layers=1, attention_heads=2, ffn_dim=64)
    )
    with pytest.raises(UserError, match="vLLM refuses"):
        start(strange, tmp_path)


def test_what_a_cpu_cannot_do_is_told_before_vllm_starts(tmp_path: Path):
    model = make_model()
    with pytest.raises(UserError, match=r"engine\.vllm\.sleep .* vLLM on the CPU .* set it to false"):
        start(model, tmp_path, vllm={"sleep": True})
    with pytest.raises(UserError, match=r"engine\.slots = 2000000000 of .* GiB for vLLM's cache.* lower one"):
        start(model, tmp_path, slots=2_000_000_000)
