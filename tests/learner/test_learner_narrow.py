"""A last layer that works for the asked tokens alone says of them what a whole one says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import FAMILIES, SIZES, make_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ludus.config import LossConfig, OptimConfig
from ludus.learner import packing
from ludus.learner.batching import collate
from ludus.learner.forward import hidden_states, token_terms
from ludus.learner.learner import Learner
from ludus.learner.narrow import narrow
from ludus.types import Batch, Sample

BuildRows = Callable[..., list[Sample]]


def products(model: PreTrainedModel) -> list[int]:
    """How many tokens the last layer's MLP takes in each forward pass from now on."""
    seen: list[int] = []
    gate = model.base_model.layers[-1].mlp.gate_proj
    gate.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    return seen


def batch_of(build_rows: BuildRows) -> Batch:
    return collate(build_rows(6), torch.device("cpu"))


def learnt(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities, and the gradient of their sum."""
    logprobs = token_terms(model, batch, 1.0).logprobs
    logprobs.sum().backward()
    return logprobs, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("packed", [False, True])
def test_asked_tokens_and_all_gradients_stay_what_they_were(
    family: str, packed: bool, build_rows: BuildRows
) -> None:
    batch = batch_of(build_rows)
    model, plain = make_model(family), make_model(family)
    if packed:
        packing.prepare(model)
        packing.prepare(plain)
    narrow(model)
    seen = products(model)
    found, gradients = learnt(model, batch)
    wanted, whole = learnt(plain, batch)
    assert seen == [int(batch.mask.sum())]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == whole.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, whole[name], rtol=1e-4, atol=1e-5 * float(whole[name].abs().max())
        )


def test_who_asks_for_nothing_gets_everything(build_rows: BuildRows) -> None:
    batch = batch_of(build_rows)
    model, plain = make_model("qwen3-tied"), make_model("qwen3-tied")
    narrow(model)
    assert torch.equal(model(batch.tokens).logits, plain(batch.tokens).logits)


def test_copies_and_threads_ask_for_themselves(build_rows: BuildRows) -> None:
    """Threads run one model, and its frozen copy, on batches of different shapes at once."""
    model = make_model("qwen3-tied")
    narrow(model)
    frozen = copy.deepcopy(model)
    rows = build_rows(12)
    batches = [collate(rows[i : i + 1 + i % 3], torch.device("cpu")) for i in range(9)]
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        alone = [hidden_states(model, batch) for batch in batches]
        for together in (model, frozen):
            for one, many in zip(alone, pool.map(hidden_states, [together] * 9, batches), strict=True):
                torch.testing.assert_close(one, many.detach())


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_experts_are_chosen_for_the_asked_tokens_alone(kind: str, build_rows: BuildRows) -> None:
    """They take three dimensions and no fewer; those of the second kind say whom they chose, too."""
    experts = {
        "num_experts_per_tok": 2,
        "num_experts": 4,
        "num_local_experts": 4,
        "moe_intermediate_size": 16,
    }
    config = AutoConfig.for_model(kind, **{**SIZES, **experts, "head_dim": 8})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    plain = copy.deepcopy(model)
    narrow(model)
    seen: list[int] = []
    mlp = model.base_model.layers[-1].mlp
    mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    batch = batch_of(build_rows)
    found, gradients = learnt(model, batch)
    wanted, whole = learnt(plain, batch)
    assert seen == [int(batch.mask.sum())]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients.items():
        bound = 1e-4 * float(whole[name].abs().max()) + 1e-6
        torch.testing.assert_close(gradient, whole[name], rtol=1e-3, atol=bound)


def test_a_layer_that_mixes_tokens_stays_whole(build_rows: BuildRows) -> None:
    class Mixing(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            mixed: Tensor = self.inner(x.cumsum(-2))
            return mixed

    model = make_model("qwen3-tied")
    last = model.base_model.layers[-1]
    last.mlp = Mixing(last.mlp)
    plain = copy.deepcopy(model)
    narrow(model)
    batch = batch_of(build_rows)
    torch.testing.assert_close(hidden_states(model, batch), hidden_states(plain, batch))


def test_a_layer_that_is_computed_again_stays_whole(build_rows: BuildRows) -> None:
    model = make_model("qwen3-tied")
    model.gradient_checkpointing_enable()  # type: ignore[no-untyped-call]
    optim = OptimConfig.model_validate({"lr": 1e-3})
    learner = Learner(model, LossConfig(), optim, max_tokens=8, total_steps=1)
    seen = products(model)
    rows = build_rows(4)
    learner.update(rows)
    assert seen  # the pass forward, and the same again in the backward pass
    assert min(seen) > sum(sum(row.mask) for row in rows) / len(seen)
