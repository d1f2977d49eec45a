"""Policies that are adapters, as LoRA requests to vLLM: held against the models that peft merges.

Skipped where vLLM is not: see `make test-vllm`.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from engine_models import make_requests, run
from families import VOCAB
from test_engines_adapters import EVERY, RANK
from test_engines_adapters import adapted as adapted_by
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from vllm_start import CONTEXT, WIDE, assert_exact, shaken, start

from ludus.engines.base import Adapter, EngineUnavailable
from ludus.engines.torch_engine import TorchEngine
from ludus.engines.vllm_engine import VllmEngine
from ludus.errors import UserError
from ludus.types import Completion, Request, Sampling, StopRule

pytest.importorskip("vllm")
pytestmark = pytest.mark.timeout(1800)  # on a busy machine vLLM takes minutes to start

SOME = {"a": EVERY, "b": ("k_proj", "up_proj"), "c": ("o_proj", "down_proj")}  # more than decode together


def make_model(seed: int = 2) -> PreTrainedModel:
    """Another family than the rest of the engine's tests, and a head of its own."""
    return shaken(LlamaForCausalLM(LlamaConfig(**{**WIDE, "num_key_value_heads": 4})), seed)


def adapted(
    model: PreTrainedModel, seed: int = 1, targets: tuple[str, ...] = EVERY
) -> tuple[Adapter, PreTrainedModel]:
    """One that changes much, but not so much that a float32's last bits show in the log-probabilities."""
    return adapted_by(model, seed, targets, std=0.1)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    """Room for two adapters at a time. Ports that the environment names are in use, and in nobody's way."""
    with socket.socket() as taken, pytest.MonkeyPatch.context() as patch:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name in ("VLLM_PORT", "MASTER_PORT"):
            patch.setenv(name, str(taken.getsockname()[1]))
        engine = start(make_model(), tmp_path_factory.mktemp("model"), RANK, vllm={"adapters": 2})
    yield engine
    asyncio.run(engine.close())
    assert not files_of(engine)


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model()


@pytest.fixture
def engine(started: VllmEngine, model: PreTrainedModel) -> Iterator[VllmEngine]:
    started.load("base", model.state_dict(), version=7)
    yield started
    for policy in list(started.versions):
        started.unload(policy)
    assert not files_of(started)


def files_of(engine: VllmEngine) -> list[Path]:
    """The adapters that are written down for vLLM."""
    assert engine._nothing is not None
    return [path for path in Path(engine._folder.name).glob("*") if path != engine._nothing.directory]


def load_some(engine: VllmEngine, model: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """Base and adapters, each as the model that it amounts to; adapters have versions from 1."""
    whole = {"base": model}
    for number, (name, targets) in enumerate(SOME.items(), start=1):
        adapter, whole[name] = adapted(model, number, targets)
        engine.load(name, adapter, version=number)
    return whole


def long_request(policy: str, seed: int = 1) -> Request:
    return Request(policy, [1], seed, Sampling(CONTEXT - 1), StopRule(frozenset()))


def test_base_and_adapters_are_sampled_together(engine: VllmEngine, model: PreTrainedModel):
    whole = load_some(engine, model)
    names = list(whole)
    requests = [replace(r, policy=names[i % 4]) for i, r in enumerate(make_requests(32))]
    for _ in range(2):  # the second time, prefixes are cached
        for request, completion in zip(requests, run(engine, requests), strict=True):
            assert completion.version == engine.versions[request.policy]
            assert_exact(whole[request.policy], request, completion)


def test_the_torch_engine_gives_the_same(engine: VllmEngine, model: PreTrainedModel):
    load_some(engine, model)
    other = TorchEngine.from_model(model, policy="base", slots=6, context=CONTEXT)
    for number, (name, targets) in enumerate(SOME.items(), start=1):
        other.load(name, adapted(model, number, targets)[0], number)
    for name in SOME:
        requests = [replace(r, policy=name) for r in make_requests(10)]
        found = run(engine, requests)
        prompts, replies = [list(r.prompt_ids) for r in requests], [c.ids for c in found]
        ours = asyncio.run(engine.score(name, prompts, replies))
        theirs = asyncio.run(other.score(name, prompts, replies))
        for completion, score, wanted in zip(found, ours, theirs, strict=True):
            assert completion.logprobs == pytest.approx(wanted, abs=1e-4)
            assert score == pytest.approx(wanted, abs=1e-4)
        greedy = [replace(r, sampling=replace(r.sampling, temperature=0.0)) for r in requests]
        assert [c.ids for c in run(engine, greedy)] == [c.ids for c in run(other, greedy)]


def test_nobody_waits_for_another_adapter_or_a_newer_version(engine: VllmEngine, model: PreTrainedModel):
    """A reply ends with the version that it began with, whose files are there for so long."""
    (first, old), (second, new), (third, other) = (adapted(model, seed) for seed in (1, 2, 3))
    engine.load("a", first, version=1)
    engine.load("b", third, version=5)

    async def go() -> tuple[list[Completion], Completion]:
        running = [asyncio.create_task(engine.generate(long_request(name))) for name in ("a", "base", "b")]
        while engine._in_flight < 3:
            await asyncio.sleep(0.001)
        with pytest.raises(RuntimeError, match="in flight"):
            engine.unload("a")
        engine.load("a", second, version=2)
        assert len(files_of(engine)) == 3
        later = asyncio.create_task(engine.generate(long_request("a")))
        while engine._in_flight < 4:
            assert not running[0].done()
            await asyncio.sleep(0.001)
        return [await task for task in running], await later

    (before, plain, beside), after = asyncio.run(go())
    assert (before.version, plain.version, beside.version, after.version) == (1, 7, 5, 2)
    for policy, found in ((old, before), (model, plain), (other, beside), (new, after)):
        assert_exact(policy, long_request("any"), found)
    assert len(files_of(engine)) == 2


def test_no_version_reads_what_was_cached_of_another(engine: VllmEngine, model: PreTrainedModel):
    """Pitfall 6: the same long prompts for every version, for two adapters and their base."""
    rng = random.Random(5)
    prompts = [[rng.randrange(VOCAB) for _ in range(100)] for _ in range(3)]
    for version in range(4):
        (a, whole_a), (b, whole_b) = adapted(model, 2 * version), adapted(model, 2 * version + 1)
        engine.load("a", a, version)
        engine.load("b", b, version)
        for name, whole in (("a", whole_a), ("b", whole_b), ("base", model)):
            asked = [Request(name, p, i, Sampling(6), StopRule(frozenset())) for i, p in enumerate(prompts)]
            for request, completion in zip(asked, run(engine, asked), strict=True):
                assert_exact(whole, request, completion)
    assert len(files_of(engine)) == 2


def test_whatever_happens_to_its_base_an_adapter_keeps_what_it_has(
    engine: VllmEngine, model: PreTrainedModel
):
    adapter, whole = adapted(model)
    other = make_model(9)
    engine.load("a", adapter, 1)
    engine.load("base", other.state_dict(), 8)
    requests = [replace(r, policy=name) for r in make_requests(6) for name in ("a", "base")]
    for request, completion in zip(requests, run(engine, requests), strict=True):
        assert_exact(whole if request.policy == "a" else other, request, completion)
    engine.unload("base")
    assert_exact(whole, requests[0], run(engine, requests[:1])[0])
    with pytest.raises(UserError, match="holds no policy 'base'"):
        engine.load("a", adapter, 2)
    engine.load("a", other.state_dict(), 3)
    assert_exact(other, requests[0], run(engine, requests[:1])[0])


def test_one_that_changes_nothing_plays_as_its_base(engine: VllmEngine, model: PreTrainedModel):
    engine.load("a", Adapter("base", RANK, 1.0, {}), version=0)
    request = replace(make_requests(1)[0], policy="a")
    (completion,) = run(engine, [request])
    assert completion.version == 0
    assert_exact(model, request, completion)


def test_one_of_too_high_a_rank_is_merged(engine: VllmEngine, model: PreTrainedModel):
    """vLLM was started for ranks up to 8."""
    adapter, whole = adapted(model)
    wider = {
        name: torch.cat([t, *[torch.zeros_like(t)] * 2], dim=0 if "lora_A" in name else 1)
        for name, t in adapter.tensors.items()
    }
    engine.load("a", replace(adapter, rank=3 * RANK, alpha=3 * adapter.alpha, tensors=wider), version=1)
    assert not files_of(engine)
    request = replace(make_requests(1)[0], policy="a")
    assert_exact(whole, request, run(engine, [request])[0])


def test_what_comes_while_vllm_sleeps_arrives(
    engine: VllmEngine, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
):
    """The order of calls; vLLM for CPUs keeps its memory all the same, and we do not let it try."""
    monkeypatch.setattr(engine, "_sleeps", True)
    (first, old), (second, new) = adapted(model, 1), adapted(model, 2)
    requests = [replace(r, policy=name) for r in make_requests(4) for name in ("a", "b")]
    engine.load("a", first, 1)
    engine.load("b", first, 1)
    before = run(engine, requests)
    engine.rest()
    engine.load("a", second, 2)
    for request, was, completion in zip(requests, before, run(engine, requests), strict=True):
        assert_exact(new if request.policy == "a" else old, request, completion)
        assert request.policy == "a" or completion == was


_Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {_Q + "A.weight": torch.zeros(RANK, 31)},
            r"lora_A of layer 0, q_proj has shape \(3, 31\), .* \(3, 64\)",
        ),
        ({_Q + "B.weight": None}, "lora_B of layer 0, q_proj is missing"),
        (
            {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(RANK, 64)},
            "no place for .*layers.7",
        ),
        (  # of another vocabulary
            {"base_model.model.lm_head.lora_B.weight": torch.zeros(VOCAB + 1, RANK)},
            "no place for base_model.model.lm_head.lora_B.weight; take an adapter of",
        ),
        (
            {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(RANK, VOCAB + 1)},
            "no place for base_model.model.model.embed_tokens",
        ),
    ],
)
def test_an_adapter_of_something_else_is_refused_and_changes_nothing(
    engine: VllmEngine, model: PreTrainedModel, changes: dict[str, torch.Tensor | None], said: str
):
    adapter, whole = adapted(model)
    engine.load("a", adapter, 1)
    tensors = {name: t for name, t in {**adapter.tensors, **changes}.items() if t is not None}
    with pytest.raises(UserError, match=said):
        engine.load("a", replace(adapter, tensors=tensors), 2)
    with pytest.raises(UserError, match="its base 'a' is an adapter itself"):
        engine.load("b", replace(adapter, base="a"), 2)
    assert engine.versions == {"base": 7, "a": 1}
    request = replace(make_requests(1)[0], policy="a")
    assert_exact(whole, request, run(engine, [request])[0])


def test_at_last_vllm_dies_in_the_middle_of_its_work(engine: VllmEngine, model: PreTrainedModel):
    adapter, _ = adapted(model)
    engine.load("a", adapter, 1)

    async def die() -> list[Any]:
        asked = [long_request(name, seed) for seed in range(10) for name in ("a", "base")]
        running = [asyncio.create_task(engine.generate(request)) for request in asked]
        while not engine._in_flight:
            await asyncio.sleep(0.001)
        (core,) = (p for p in psutil.Process().children() if p.name() == "VLLM::EngineCore")
        os.kill(core.pid, signal.SIGKILL)
        return await asyncio.gather(*running, return_exceptions=True)

    ends = asyncio.run(die())
    assert all(isinstance(end, EngineUnavailable) and end.reason == "died" for end in ends)
    with pytest.raises(EngineUnavailable, match="died"):
        run(engine, [long_request("a")])
    for weights in (adapter, model.state_dict()):
        with pytest.raises(UserError, match="go on from the last checkpoint with --resume"):
            engine.load("base" if weights is not adapter else "a", weights, version=2)
