"""Policies, versions, refusals, cancellation and failure of the torch engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from engine_models import make_requests, run
from families import SIZES, VOCAB, make_model
from transformers import (
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen3Config,
)

from ludus.engines.torch_engine import TorchEngine
from ludus.errors import UserError
from ludus.types import Request, Sampling, Stop, StopRule

FOREVER = StopRule(frozenset())


def engine_of(model: PreTrainedModel, **options: object) -> TorchEngine:
    return TorchEngine.from_model(model, **{"slots": 6, "context": 128, "prefill_batch": 3, **options})


def request(prompt: int = 5, tokens: int = 10, policy: str = "self", seed: int = 1) -> Request:
    return Request(policy, [i % VOCAB for i in range(prompt)], seed, Sampling(tokens), FOREVER)


# ---------------------------------------------------------------------- policies and versions


def test_policies_live_side_by_side(model: PreTrainedModel):
    names = ["self", "past/3", "past/7"]
    models = {name: make_model(seed=i) for i, name in enumerate(names)}
    requests = [replace(r, policy=names[i % 3]) for i, r in enumerate(make_requests(30))]
    engine = engine_of(models["self"], slots=7)
    engine.load("past/3", models["past/3"].state_dict(), 3)
    engine.load("past/7", models["past/7"].state_dict(), 7)
    mixed = run(engine, requests)
    assert engine.versions == {"self": 0, "past/3": 3, "past/7": 7}
    for i, name in enumerate(names):
        alone = run(engine_of(models[name], policy=name, version=engine.versions[name]), requests[i::3])
        for a, b in zip(mixed[i::3], alone, strict=True):
            assert (a.ids, a.stop, a.version) == (b.ids, b.stop, b.version)
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_new_weights_change_replies_and_stamps(model: PreTrainedModel):
    other = make_model(seed=9)
    requests = make_requests(10)
    engine = engine_of(model)
    before = run(engine, requests)
    engine.load("self", other.state_dict(), 1)
    after = run(engine, requests)
    assert {c.version for c in before} == {0}
    assert {c.version for c in after} == {1}
    assert after == run(engine_of(other, version=1), requests)
    assert [c.ids for c in after] != [c.ids for c in before]
    engine.load("self", model.state_dict(), 0)
    assert run(engine, requests) == before


def test_loaded_weights_are_a_copy():
    model = make_model()
    requests = make_requests(4)
    engine = engine_of(model)
    before = run(engine, requests)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert run(engine, requests) == before


def test_a_tied_model_needs_no_head_and_ignores_one(model: PreTrainedModel):
    bare = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    headed = {**bare, "lm_head.weight": model.get_input_embeddings().weight}
    requests = make_requests(4)
    for state in (bare, headed):
        engine = TorchEngine(model.config, slots=4, context=128)
        engine.load("self", state, 0)
        assert run(engine, requests) == run(engine_of(model, slots=4, prefill_batch=8), requests)


def test_weights_never_change_under_a_sequence(model: PreTrainedModel):
    """It is sampled to its end by those that it began with; whoever asks later meets the new ones."""
    other = make_model(seed=9)
    long = [replace(r, sampling=Sampling(40), stop=FOREVER) for r in make_requests(4)]
    late = [replace(r, sampling=Sampling(8), stop=FOREVER) for r in make_requests(5, seed=50)]

    async def go() -> None:
        engine = engine_of(model, slots=14)  # nobody waits for a row
        first = [asyncio.create_task(engine.generate(r)) for r in long]
        for _ in range(12):
            await asyncio.sleep(0)
        engine.load("self", other.state_dict(), 1)
        with pytest.raises(RuntimeError, match="4 sequences of policy 'self' are in flight"):
            engine.unload("self")
        second = [asyncio.create_task(engine.generate(r)) for r in late]
        for _ in range(12):  # with a little patience, all of them are in a row
            await asyncio.sleep(0)
        assert not any(task.done() for task in first)  # three versions of one policy, side by side
        engine.load("self", model.state_dict(), 2)
        third = [asyncio.create_task(engine.generate(r)) for r in late]
        for version, tasks, weights, requests in (
            (0, first, model, long),
            (1, second, other, late),
            (2, third, model, late),
        ):
            found = await asyncio.gather(*tasks)
            assert engine.versions == {"self": 2}
            alone = await asyncio.gather(*map(engine_of(weights).generate, requests))
            for a, b in zip(found, alone, strict=True):
                assert (a.version, a.ids) == (version, b.ids)
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)

    asyncio.run(asyncio.wait_for(go(), 60))


def test_unloading_frees_and_refuses(model: PreTrainedModel):
    engine = engine_of(model)
    engine.load("past", model.state_dict(), 4)
    engine.unload("past")
    assert engine.versions == {"self": 0}
    with pytest.raises(UserError, match=r"no policy 'past' \(loaded: 'self'\)"):
        run(engine, [request(policy="past")])
    with pytest.raises(UserError, match="no policy 'past'"):
        asyncio.run(engine.score("past", [[1]], [[2]]))


def test_weights_that_do_not_fit_change_nothing(model: PreTrainedModel):
    engine = engine_of(model)
    requests = make_requests(3)
    before = run(engine, requests)
    state = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    name = "model.layers.1.mlp.down_proj.weight"
    bad = {
        "missing": {k: v for k, v in state.items() if k != name},
        "unknown": {**state, "model.layers.9.mlp.down_proj.weight": state[name]},
        "has shape": {**state, name: state[name][:, :-1]},
    }
    for complaint, weights in bad.items():
        with pytest.raises(UserError, match=complaint):
            engine.load("self", weights, 1)
        with pytest.raises(UserError, match=complaint):
            engine.load("new", weights, 1)
    assert engine.versions == {"self": 0}
    assert run(engine, requests) == before


# ---------------------------------------------------------------------- what users may get wrong


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (request(prompt=100, tokens=29), "100 tokens and max_tokens = 29 need 129 .* engine.context is 128"),
        (request(prompt=0), "the prompt is empty"),
        (request(tokens=0), "max_tokens is 0"),
        (request(policy="nobody"), "no policy 'nobody'"),
        (request(seed=-1), "seed -1"),
        (request(seed=2**63), "seed"),
        (replace(request(), prompt_ids=[1, VOCAB]), f"from 1 to {VOCAB}, the model knows 0 to {VOCAB - 1}"),
        (replace(request(), prompt_ids=[-1]), "from -1 to -1"),
        (replace(request(), stop=StopRule(frozenset({VOCAB}))), "stop rule"),
        (replace(request(), sampling=Sampling(4, temperature=-1.0)), "temperature"),
        (replace(request(), sampling=Sampling(4, temperature=1e-9)), "temperature is 1e-09"),
        (replace(request(), sampling=Sampling(4, temperature=float("nan"))), "temperature"),
        (replace(request(), sampling=Sampling(4, top_p=0.0)), "top_p"),
        (replace(request(), sampling=Sampling(4, top_k=-1)), "top_k"),
    ],
)
def test_bad_requests_are_refused_alone(model: PreTrainedModel, bad: Request, complaint: str):
    engine = engine_of(model)

    async def go() -> list[object]:
        return await asyncio.gather(engine.generate(request()), engine.generate(bad), return_exceptions=True)

    fine, refused = asyncio.run(go())
    assert isinstance(refused, UserError)
    with pytest.raises(UserError, match=complaint):
        raise refused
    assert [fine] == run(engine, [request()])


def test_a_sequence_may_fill_the_context_to_the_brim(model: PreTrainedModel):
    engine = engine_of(model)
    edge = [request(prompt=100, tokens=28), request(prompt=127, tokens=1), request(prompt=1, tokens=127)]
    for r, c in zip(edge, run(engine, edge), strict=True):
        assert (len(c.ids), c.stop) == (r.sampling.max_tokens, Stop.LENGTH)


@pytest.mark.parametrize(
    ("prompts", "continuations", "complaint"),
    [
        ([[1]], [[2], [3]], "1 prompts but 2 continuations"),
        ([[]], [[2]], "empty"),
        ([[1]], [[VOCAB]], "continuation has token ids"),
        ([[1] * 100], [[2] * 29], "129 positions, but engine.context is 128"),
    ],
)
def test_bad_scores_are_refused(model: PreTrainedModel, prompts, continuations, complaint: str):
    with pytest.raises(UserError, match=complaint):
        asyncio.run(engine_of(model).score("self", prompts, continuations))


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (lambda: GPT2Config(), "cannot run model type 'gpt2'; it knows gemma3_text, llama, qwen2, qwen3"),
        (lambda: Qwen3Config(**SIZES, hidden_act="gelu"), "silu, gelu_pytorch_tanh, not 'gelu'"),
        (lambda: Gemma3TextConfig(**SIZES, head_dim=8, attn_logit_softcapping=50.0), "capped attention"),
        (lambda: Gemma3TextConfig(**SIZES, head_dim=8, use_bidirectional_attention=True), "both sides"),
        (lambda: Gemma3Config(), "model type 'gemma3'"),
        (
            lambda: LlamaConfig(
                **SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
            ),
            "not 'dynamic'",
        ),
    ],
)
def test_decoders_that_it_cannot_run(config: Callable[[], object], complaint: str):
    with pytest.raises(UserError, match=complaint):
        TorchEngine(config(), slots=2, context=16)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"context": 257}, "engine.context is 257, .* is 256"),
        ({"slots": 0}, "engine.slots is 0"),
        ({"prefill_batch": 0}, "prefill_batch is 0"),
    ],
)
def test_sizes_that_cannot_be(model: PreTrainedModel, options: dict[str, int], complaint: str):
    with pytest.raises(UserError, match=complaint):
        engine_of(model, **options)


# ---------------------------------------------------------------------- failures


def test_a_step_that_fails_reaches_everybody_and_the_engine_goes_on(model: PreTrainedModel):
    engine = engine_of(model)
    requests = make_requests(14)
    before = run(engine, requests)

    def explode(ids: object) -> bool:
        raise ZeroDivisionError("in the middle of a step")

    bomb = replace(request(), stop=StopRule(frozenset(), frozenset(range(VOCAB)), explode))

    async def go() -> list[object]:
        return await asyncio.gather(
            *map(engine.generate, [*requests, bomb, *requests]), return_exceptions=True
        )

    results = asyncio.run(asyncio.wait_for(go(), 30))
    failed = [isinstance(result, ZeroDivisionError) for result in results]
    assert failed[14]
    assert 0 < sum(failed) < len(results)  # what had ended before, in the same step even, has its reply
    for wanted, result in zip([*before, None, *before], results, strict=True):
        if not isinstance(result, ZeroDivisionError):
            assert result.ids == wanted.ids
    assert run(engine, requests) == before


def test_broken_weights_are_an_error_and_leave_no_trace(model: PreTrainedModel):
    engine = engine_of(model)
    requests = make_requests(8)
    before = run(engine, requests)
    for temperature in (1.0, 0.0):
        broken = {k: v.clone() for k, v in model.state_dict().items()}
        broken["model.norm.weight"][3] = float("nan")
        broken["model.layers.0.self_attn.v_proj.weight"][0] = float("nan")
        engine.load("self", broken, 7)
        bad = [replace(r, sampling=Sampling(8, temperature=temperature)) for r in requests]
        with pytest.raises(FloatingPointError, match=r"'self' \(version 7\) gave logits that are not finite"):
            run(engine, bad)
        engine.load("self", model.state_dict(), 0)
        assert run(engine, requests) == before


def test_cancelling_frees_the_row(model: PreTrainedModel):
    engine = engine_of(model, slots=2, prefill_batch=1)
    (alone,) = run(engine, [request(seed=3)])

    async def go() -> None:
        stuck = [asyncio.create_task(engine.generate(request(tokens=100, seed=i))) for i in range(2)]
        queued = asyncio.create_task(engine.generate(request(seed=4)))
        last = asyncio.create_task(engine.generate(request(seed=3)))
        for _ in range(5):
            await asyncio.sleep(0)
        for task in (stuck[0], queued):
            task.cancel()
        completion = await last
        assert not stuck[1].done()  # the cancelled row was enough
        assert (completion.ids, completion.stop) == (alone.ids, alone.stop)
        assert len((await stuck[1]).ids) == 100
        results = await asyncio.gather(stuck[0], queued, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        engine.load("self", model.state_dict(), 1)  # nothing is in flight any more

    asyncio.run(asyncio.wait_for(go(), 30))


def test_an_interrupted_loop_leaves_a_working_engine(model: PreTrainedModel):
    engine = engine_of(model)
    requests = make_requests(9)
    before = run(engine, requests)

    async def interrupted() -> None:
        tasks = [asyncio.create_task(engine.generate(r)) for r in requests]
        for _ in range(4):
            await asyncio.sleep(0)
        assert not all(task.done() for task in tasks)

    asyncio.run(interrupted())  # cancels what is left
    assert run(engine, requests) == before
    loop = asyncio.new_event_loop()  # a loop that is dropped without a word
    task = loop.create_task(engine.generate(request(tokens=60)))
    loop.call_later(0.01, loop.stop)
    loop.run_forever()
    assert not task.done()
    assert run(engine, requests) == before
    task.get_coro().close()
    loop.close()


def test_close_lets_nobody_wait(model: PreTrainedModel):
    engine = engine_of(model)

    async def go() -> None:
        task = asyncio.create_task(engine.generate(request(tokens=100)))
        for _ in range(5):
            await asyncio.sleep(0)
        await engine.close()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(RuntimeError, match="closed"):
            await engine.generate(request())

    asyncio.run(asyncio.wait_for(go(), 30))


def test_replies_wake_their_askers_in_order_and_the_next_turn_joins(model: PreTrainedModel):
    """Hundreds of matches ask turn after turn; the order of events is the same every time."""

    async def play() -> list[tuple[int, int, tuple[int, ...]]]:
        engine = engine_of(model)
        log: list[tuple[int, int, tuple[int, ...]]] = []

        async def match(i: int) -> None:
            for turn in range(3):
                r = replace(make_requests(1, seed=100 * i + turn)[0])
                log.append((i, turn, tuple((await engine.generate(r)).ids)))

        await asyncio.gather(*map(match, range(20)))
        return log

    first = asyncio.run(play())
    assert len(first) == 60
    assert asyncio.run(play()) == first


def test_the_matmul_setting_is_put_back(model: PreTrainedModel):
    torch.set_float32_matmul_precision("highest")
    run(engine_of(model, matmul="medium"), make_requests(2))
    assert torch.get_float32_matmul_precision() == "highest"
