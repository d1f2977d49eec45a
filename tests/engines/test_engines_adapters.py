"""Policies that are adapters over a shared base: held against the model that peft merges."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import replace

import pytest
import torch
from engine_models import make_requests, reference_logprobs, run
from families import FAMILIES, VOCAB, make_model
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import PreTrainedModel

from ludus.engines.base import Adapter
from ludus.engines.low_rank import merged
from ludus.engines.torch_engine import TorchEngine
from ludus.errors import UserError
from ludus.types import Completion

EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 3, 7


def adapted(
    model: PreTrainedModel,
    seed: int = 1,
    targets: tuple[str, ...] = EVERY,
    base: str = "base",
    std: float = 0.3,
) -> tuple[Adapter, PreTrainedModel]:
    """A random adapter that changes much, and the model that it amounts to."""
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets), task_type="CAUSAL_LM")
    wrapped: PeftModel = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=std)
    tensors = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(wrapped).items()}
    return Adapter(base, RANK, ALPHA, tensors), wrapped.merge_and_unload()


def engine_with(model: PreTrainedModel, **adapters: Adapter) -> TorchEngine:
    engine = TorchEngine.from_model(model, policy="base", slots=6, context=128, prefill_batch=3)
    for number, (policy, adapter) in enumerate(adapters.items(), start=1):
        engine.load(policy, adapter, number)
    return engine


def close(found: list[Completion], wanted: list[Completion]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a.ids, a.stop) == (b.ids, b.stop)
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-4)  # merging rounds too


# --- the same as merged ---


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_plays_as_the_merged_model_does(family: str) -> None:
    model = make_model(family)
    adapter, whole = adapted(model)
    requests = [replace(r, policy="a") for r in make_requests(12)]
    close(
        run(engine_with(model, a=adapter), requests),
        run(engine_with(whole, a=Adapter("base", 1, 1.0, {})), requests),
    )


@pytest.mark.parametrize(
    "targets", [("v_proj",), ("q_proj", "k_proj"), ("o_proj", "up_proj"), ("down_proj",)]
)
def test_an_adapter_of_some_products_leaves_the_others(targets: tuple[str, ...]) -> None:
    model = make_model()
    adapter, whole = adapted(model, targets=targets)
    requests = make_requests(6)
    for request, completion in zip(
        requests, run(engine_with(model, a=adapter), [replace(r, policy="a") for r in requests]), strict=True
    ):
        exact = reference_logprobs(whole, request.prompt_ids, completion.ids)
        wanted = exact.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, atol=2e-4, rtol=0)


def test_scores_are_those_of_the_merged_model() -> None:
    model = make_model()
    adapter, whole = adapted(model)
    prompts, continuations = [[1, 2, 3], [4] * 30], [[7, 8], [9, 10, 11]]
    scores = asyncio.run(engine_with(model, a=adapter).score("a", prompts, continuations))
    for prompt, continuation, found in zip(prompts, continuations, scores, strict=True):
        exact = reference_logprobs(whole, prompt, continuation)
        assert found == pytest.approx([float(exact[i, t]) for i, t in enumerate(continuation)], abs=2e-4)


def test_base_and_adapters_share_the_rows() -> None:
    model = make_model()
    (a, merged_a), (b, merged_b) = adapted(model, 1), adapted(model, 2)
    names = ["base", "a", "b"]
    requests = [replace(r, policy=names[i % 3]) for i, r in enumerate(make_requests(24))]
    mixed = run(engine_with(model, a=a, b=b), requests)
    assert {c.version for c in mixed[1::3]} == {1}
    for i, alone in enumerate((model, merged_a, merged_b)):
        wanted = run(engine_with(alone), [replace(r, policy="base") for r in requests[i::3]])
        close(mixed[i::3], wanted)
    assert [c.ids for c in mixed[1::3]] != [c.ids for c in mixed[2::3]]


def test_in_bfloat16_it_stays_near() -> None:
    model = make_model()
    adapter, whole = adapted(model)
    engine = TorchEngine.from_model(model, policy="base", slots=6, context=128, dtype=torch.bfloat16)
    engine.load("a", adapter, 0)
    requests = make_requests(12)
    gaps: list[float] = []
    for request, completion in zip(
        requests, run(engine, [replace(r, policy="a") for r in requests]), strict=True
    ):
        exact = reference_logprobs(whole, request.prompt_ids, completion.ids)
        wanted = exact.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        gaps += (torch.tensor(completion.logprobs) - wanted).abs().tolist()
    assert 0 < sum(gaps) / len(gaps) < 0.2


def test_merging_by_hand_is_what_peft_does() -> None:
    model = make_model()
    adapter, wanted = adapted(model)
    found = merged("a", model.state_dict(), adapter)
    for name, tensor in wanted.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)
    broken = replace(adapter, tensors={_Q + "B.weight": torch.zeros(5, RANK)})
    with pytest.raises(UserError, match=r"lora_A of layer 0, q_proj is missing"):
        merged("a", model.state_dict(), broken)


# --- one base in memory ---


def test_the_bases_tensors_are_there_once() -> None:
    model = make_model()
    engine = engine_with(model, a=adapted(model, 1)[0], b=adapted(model, 2)[0])
    base, a, b = (engine._weights[name] for name in ("base", "a", "b"))
    for other in (a, b):
        assert (other.embed, other.norm, other.head) == (base.embed, base.norm, base.head)  # by identity
        for mine, theirs in zip(other.layers, base.layers, strict=True):
            assert mine.qkv is theirs.qkv
            assert mine.out is theirs.out
            assert mine.gate_up is theirs.gate_up
            assert mine.down is theirs.down
    own = sum(c.a.numel() + c.b.numel() for layer in a.layers for c in layer.changes.values())
    assert own == 3 * RANK * ((3 * 32 + 64) + (32 + 32) + (2 * 32 + 2 * 2 * 48) + (48 + 32) + 2 * 64)


def test_whatever_happens_to_its_base_an_adapter_keeps_what_it_has() -> None:
    model, other = make_model(), make_model(seed=9)
    adapter, _ = adapted(model)
    requests = [replace(r, policy="a") for r in make_requests(6)]
    engine = engine_with(model, a=adapter)
    before = run(engine, requests)
    engine.load("base", other.state_dict(), 5)
    assert run(engine, requests) == before
    engine.unload("base")
    assert run(engine, requests) == before
    with pytest.raises(UserError, match="holds no policy 'base'"):
        engine.load("a", adapter, 2)


def test_whole_weights_in_an_adapters_place_leave_the_base_alone() -> None:
    model, other = make_model(), make_model(seed=9)
    engine = engine_with(model, a=adapted(model)[0])
    requests = make_requests(6)
    of_base = [replace(r, policy="base") for r in requests]
    before = run(engine, of_base)
    engine.load("a", other.state_dict(), 3)
    close(run(engine, [replace(r, policy="a") for r in requests]), run(engine_with(other), of_base))
    assert run(engine, of_base) == before


def test_loaded_tensors_are_a_copy() -> None:
    model = make_model()
    adapter, _ = adapted(model)
    engine = engine_with(model, a=adapter)
    requests = [replace(r, policy="a") for r in make_requests(4)]
    before = run(engine, requests)
    for tensor in adapter.tensors.values():
        tensor.zero_()
    assert run(engine, requests) == before


# --- what does not fit ---

_Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {_Q + "A.weight": torch.zeros(RANK, 31)},
            r"lora_A of layer 0, q_proj has shape \(3, 31\), where .* \(3, 32\)",
        ),
        ({_Q + "B.weight": torch.zeros(VOCAB, RANK)}, r"lora_B of layer 0, q_proj has shape \(48, 3\)"),
        ({_Q + "B.weight": None}, "lora_B of layer 0, q_proj is missing"),
        (
            {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(RANK, 32)},
            "model of 3 layers has no place for .*layers.7",
        ),
        (
            {"base_model.model.lm_head.lora_A.weight": torch.zeros(RANK, 32)},
            "no place for base_model.model.lm_head.lora_A.weight; take an adapter of",
        ),
    ],
)
def test_an_adapter_of_something_else_is_refused_and_changes_nothing(
    changes: dict[str, torch.Tensor | None], said: str
) -> None:
    model = make_model()
    adapter, _ = adapted(model)
    engine = engine_with(model, a=adapter)
    tensors = {name: t for name, t in {**adapter.tensors, **changes}.items() if t is not None}
    with pytest.raises(UserError, match=said):
        engine.load("a", replace(adapter, tensors=tensors), 2)
    assert engine.versions == {"base": 0, "a": 1}


def test_an_adapter_needs_its_base() -> None:
    with pytest.raises(UserError, match="holds no policy 'gone'"):
        engine_with(make_model()).load("a", Adapter("gone", 1, 1.0, {}), 0)
