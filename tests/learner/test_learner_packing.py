"""Packed rows see nothing of each other: they give what each row gives alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import FAMILIES, make_model
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel, TrOCRConfig, TrOCRForCausalLM

from ludus.config import LossConfig, OptimConfig
from ludus.errors import UserError
from ludus.learner import packing
from ludus.learner.batching import collate
from ludus.learner.forward import token_terms
from ludus.learner.learner import Learner
from ludus.types import Sample

CPU = torch.device("cpu")
BuildModel = Callable[..., PreTrainedModel]
BuildRows = Callable[..., list[Sample]]
LENGTHS = (
    31,
    31,
    12,
    12,
    12,
    7,
    1,
)  # beyond the windows of sliding families; runs; a single token


def tokens_of(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    padded = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in zip(padded, lengths, strict=True):
        row[:length] = torch.randint(48, (length,), generator=generator)
    return padded, torch.tensor(lengths)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_architecture_reads_packed_rows_as_single_ones(family: str, checkpointing: bool) -> None:
    """Logits and gradients equal those of one row at a time, unpadded, by transformers' own attention."""
    tokens, lengths = tokens_of(LENGTHS)
    weights = torch.randn(int(lengths.sum()), 48)
    model = make_model(family)
    single = torch.cat([model(row[None, :n]).logits[0] for row, n in zip(tokens, LENGTHS, strict=True)])
    (single * weights).sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}

    model = make_model(family)
    packing.prepare(model)
    assert packing.is_prepared(model)
    if checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[no-untyped-call]
        model.train()
    assert packing.starts(lengths).tolist() == [0, 31, 62, 74, 86, 98, 105]
    states = packing.decode(model, tokens, lengths)
    logits = model.lm_head(states)
    if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    torch.testing.assert_close(logits, single, rtol=1e-4, atol=1e-4)
    (logits * weights).sum().backward()
    for name, p in model.named_parameters():
        whole = wanted[name]
        assert whole is not None
        torch.testing.assert_close(p.grad, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize("family", ["qwen3-tied", "gemma3"])
def test_another_rows_tokens_change_no_bit(family: str) -> None:
    model = make_model(family)
    packing.prepare(model)
    tokens, lengths = tokens_of(LENGTHS)
    before = packing.decode(model, tokens, lengths)
    tokens[0] = (tokens[0] + 1) % 48
    tokens[3, :12] = (tokens[3, :12] + 5) % 48
    after = packing.decode(model, tokens, lengths)
    changed = [0, 3]
    for row, (a, b) in enumerate(zip(before.split(LENGTHS), after.split(LENGTHS), strict=True)):
        assert torch.equal(a, b) is (row not in changed)


def test_a_prepared_model_still_reads_padded_rows() -> None:
    """Its attention does without transformers' masks then too, sliding windows included."""
    tokens, _ = tokens_of((31, 31))
    model = make_model("gemma3")
    with torch.no_grad():
        wanted = model(tokens).logits
        packing.prepare(model)
        torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("limit", [20, 8192])
def test_packed_training_is_sorted_training(
    build_model: BuildModel, build_rows: BuildRows, limit: int
) -> None:
    rows, seen = build_rows(12), []
    loss = LossConfig(magnet_kl=0.2, magnet_every=1, reference_kl=0.1, entropy=0.01)
    for batching in ("sorted", "packed"):
        optim = OptimConfig.model_validate(
            {"lr": 1e-3, "epochs": 2, "minibatches": 2, "batching": batching, "microbatch_tokens": limit}
        )
        made = Learner(build_model(), loss, optim, max_tokens=8, total_steps=4)
        metrics = [made.update(rows) for _ in range(2)]
        seen.append((metrics, {n: p.detach().clone() for n, p in made.model.named_parameters()}))
    (metrics, weights), (packed_metrics, packed_weights) = seen
    for one, two in zip(metrics, packed_metrics, strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
    for name, p in weights.items():
        torch.testing.assert_close(packed_weights[name], p, rtol=1e-3, atol=1e-5)


def test_terms_of_packed_rows(build_model: BuildModel, build_rows: BuildRows) -> None:
    model, batch = build_model(), collate(build_rows(6), CPU)
    wanted = token_terms(model, batch, 0.7)
    packing.prepare(model)
    packed = token_terms(model, batch, 0.7)
    torch.testing.assert_close(packed.logprobs, wanted.logprobs, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(packed.entropy, wanted.entropy, rtol=1e-4, atol=2e-5)


def test_models_that_cannot_be_packed() -> None:
    sizes = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    capped = Gemma2Config(**sizes, intermediate_size=16, num_key_value_heads=1, head_dim=8)
    older = TrOCRConfig(vocab_size=23, d_model=16, decoder_layers=1, decoder_attention_heads=2)
    for model in (Gemma2ForCausalLM(capped), TrOCRForCausalLM(older)):
        with pytest.raises(UserError, match=r"packed rows; set optim\.batching = 'sorted'"):
            packing.prepare(model.eval())


@pytest.mark.parametrize("window", [None, 4])
def test_the_kernel_of_a_gpu_is_called_as_torch_declares_it(window: int | None) -> None:
    """Shapes alone, on tensors without storage: there need be no such device."""
    q = torch.empty(1, 4, 8, 16, device="meta", dtype=torch.bfloat16)
    k, v = (torch.empty(1, 2, 8, 16, device="meta", dtype=torch.bfloat16) for _ in range(2))
    packed = packing.Packed((5, 3), torch.empty(3, device="meta", dtype=torch.int32))
    assert packing._varlen(q, k, v, packed, 0.25, window).shape == (1, 8, 4, 16)
