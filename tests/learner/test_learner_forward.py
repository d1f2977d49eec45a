"""Log-probabilities, entropies and KL equal those of a naive full forward pass of the model."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import FAMILIES, make_model
from torch import Tensor
from transformers import CohereConfig, CohereForCausalLM, Gemma3ForCausalLM, PreTrainedModel

from ludus.errors import UserError
from ludus.learner import head
from ludus.learner.batching import collate
from ludus.learner.forward import check_model, matmul_precision, spread, token_terms
from ludus.learner.head import Head, head_terms
from ludus.types import Batch, Sample

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
BuildModel = Callable[..., PreTrainedModel]
BuildRows = Callable[..., list[Sample]]


def capped(model: PreTrainedModel, cap: float | None) -> PreTrainedModel:
    """The same model with Gemma's cap on its logits."""
    model.config.final_logit_softcapping = cap
    return model


def in_blocks(monkeypatch: pytest.MonkeyPatch, words: int | None, tokens: int) -> None:
    """From now on the vocabulary is taken in blocks of so many words, and the tokens in two parts."""
    if words is not None:
        half = -(-tokens // 2)
        monkeypatch.setattr(head, "WHOLE_BYTES", 0)
        monkeypatch.setitem(head.BLOCK_BYTES, "cpu", 4 * half * words)
        monkeypatch.setattr(head, "TOKENS_AT_ONCE", half)


def naive(model: PreTrainedModel, rows: list[Sample], temperature: float) -> list[torch.Tensor]:
    """Log-softmax [V] at every trained token, one row at a time, unpadded."""
    out = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.tokens])).logits[0]
        cap = getattr(model.config, "final_logit_softcapping", None)
        if cap is not None and not isinstance(model, Gemma3ForCausalLM):  # which has it by nature
            logits = torch.tanh(logits / cap) * cap
        logits = logits / temperature
        out += [logits[t - 1].log_softmax(-1) for t, trained in enumerate(row.mask) if trained]
    return out


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("words", [None, 1, 5, 23, 99])  # whole, and in blocks of so many
@pytest.mark.parametrize("cap", [None, 3.0])
def test_terms_equal_the_full_forward(
    build_model: BuildModel,
    build_rows: BuildRows,
    temperature: float,
    words: int | None,
    cap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, other, rows = capped(build_model(1), cap), capped(build_model(2), cap), build_rows(6)
    batch = collate(rows, CPU)
    in_blocks(monkeypatch, words, int(batch.mask.sum()))
    terms = token_terms(model, batch, temperature, other)
    assert terms.kl is not None
    targets = [t for row in rows for t, trained in zip(row.tokens, row.mask, strict=True) if trained]
    want, theirs = naive(model, rows, temperature), naive(other, rows, temperature)
    for i, (p, q, target) in enumerate(zip(want, theirs, targets, strict=True)):
        assert terms.logprobs[i].item() == pytest.approx(p[target].item(), abs=2e-5)
        assert terms.entropy[i].item() == pytest.approx(-(p.exp() * p).sum().item(), abs=2e-5)
        assert terms.kl[i].item() == pytest.approx((p.exp() * (p - q)).sum().item(), abs=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("parts", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, -0.3, 0.5)])
def test_blocks_give_the_gradient_of_the_whole(
    build_rows: BuildRows,
    temperature: float,
    cap: float | None,
    parts: tuple[float, float, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of log-probability, entropy and KL, alone and together, for a head with a bias, tokens in two parts."""
    model, other = (capped(make_model("qwen2", seed=s, vocab_size=23), cap) for s in (1, 2))
    for x in (model, other):
        x.lm_head.bias = torch.nn.Parameter(torch.randn(23))
    batch = collate(build_rows(5), CPU)
    weights = torch.randn(3, int(batch.mask.sum())) * torch.tensor(parts)[:, None]
    gradients = []
    for words in (None, 1, 7, 23):
        in_blocks(monkeypatch, words, int(batch.mask.sum()))
        model.zero_grad()
        terms = token_terms(model, batch, temperature, other, entropy_gradient=True)
        assert terms.kl is not None
        (torch.stack([terms.logprobs, terms.entropy, terms.kl]) * weights).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert all(p.grad is None for p in other.parameters())
    for blocked in gradients[1:]:
        for name, whole in gradients[0].items():
            assert whole is not None
            size = float(whole.abs().max())
            torch.testing.assert_close(blocked[name], whole, rtol=1e-3, atol=1e-5 * max(size, 1.0))


def test_blocks_pass_torchs_own_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against finite differences, in double precision."""
    in_blocks(monkeypatch, 4, 5)
    states, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((5, 3), (11, 3), (11,)))
    targets = torch.randint(11, (5,))
    other = Head(torch.randn(11, 3, dtype=torch.float64), None, None)
    theirs = torch.randn(5, 3, dtype=torch.float64)

    def terms(states: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor | None, ...]:
        return head_terms(states, targets, Head(weight, bias, 4.0), 0.8, (theirs, other), True)

    assert torch.autograd.gradcheck(
        terms, [x.requires_grad_() for x in (states, weight, bias)], eps=1e-3, atol=1e-2, rtol=1e-2
    )


def test_a_frozen_head_gets_no_gradient_and_hands_one_on(
    build_model: BuildModel, build_rows: BuildRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under adapters."""
    model, batch = build_model(tie_word_embeddings=False), collate(build_rows(3), CPU)
    model.lm_head.requires_grad_(False)
    seen = []
    for words in (None, 7):
        in_blocks(monkeypatch, words, int(batch.mask.sum()))
        model.zero_grad()
        token_terms(model, batch, 1.0).logprobs.sum().backward()
        assert model.lm_head.weight.grad is None
        seen.append(model.base_model.norm.weight.grad)
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-5)


def test_a_model_has_no_distance_to_itself_in_blocks(
    build_model: BuildModel, build_rows: BuildRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = build_model(), collate(build_rows(3), CPU)
    in_blocks(monkeypatch, 7, int(batch.mask.sum()))
    kl = token_terms(model, batch, 1.0, copy.deepcopy(model)).kl
    assert kl is not None
    assert (kl == 0).all()


def test_the_memory_of_the_loss_has_a_ceiling() -> None:
    """1,024 tokens of a vocabulary of 65,536, with entropy and KL: less than their logits would take."""
    script = [sys.executable, str(ROOT / "benchmarks" / "loss_memory.py"), "--json"]
    sizes = ["--tokens", "1024", "--vocabulary", "65536", "--width", "64", "--threads", "1"]
    done = subprocess.run(
        [*script, *sizes],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["logits_mib"] == 256
    assert measured["peak_mib"] < 256


def test_the_entropy_has_a_gradient_only_on_demand(build_model: BuildModel, build_rows: BuildRows) -> None:
    batch = collate(build_rows(2), CPU)
    assert not token_terms(build_model(), batch, 1.0).entropy.requires_grad
    assert token_terms(build_model(), batch, 1.0, entropy_gradient=True).entropy.requires_grad


def test_a_later_token_never_matters(build_model: BuildModel, build_rows: BuildRows) -> None:
    """Neither padding nor what follows a token changes its log-probability."""
    model, rows = build_model(), build_rows(4)
    whole = token_terms(model, collate(rows, CPU), 1.0).logprobs
    single = torch.cat([token_terms(model, collate([row], CPU), 1.0).logprobs for row in rows])
    torch.testing.assert_close(whole, single, rtol=1e-4, atol=2e-5)


def test_the_gradient_stays_inside_the_mask(build_model: BuildModel, build_rows: BuildRows) -> None:
    """Pitfall 4: logits of positions that predict no trained token get no gradient."""
    model, batch = build_model(), collate(build_rows(3), CPU)
    caught: list[torch.Tensor] = []
    handle = model.base_model.register_forward_hook(lambda _m, _i, out: caught.append(out.last_hidden_state))
    terms = token_terms(model, batch, 1.0)
    handle.remove()
    (gradient,) = torch.autograd.grad(spread(terms.logprobs, batch).sum(), caught[0])
    predicts = torch.zeros_like(batch.mask)
    predicts[:, :-1] = batch.mask[:, 1:]
    assert (gradient[~predicts] == 0).all()
    assert (gradient[predicts].abs().sum(-1) > 0).all()


def test_spread_lays_values_out_in_order() -> None:
    mask = torch.tensor([[False, True, True], [False, False, True]])
    empty = torch.zeros(2, 3)
    batch = Batch(empty.long(), mask, empty, None, empty, empty, torch.tensor([3, 3]))
    assert spread(torch.tensor([1.0, 2.0, 3.0]), batch).tolist() == [[0, 1, 2], [0, 0, 3]]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_architecture_gives_its_own_log_probabilities(family: str, build_rows: BuildRows) -> None:
    """Those of transformers' forward pass over one row at a time, with gradient checkpointing or not."""
    model, rows = make_model(family, vocab_size=23), build_rows(6)
    check_model(model)
    targets = [t for row in rows for t, trained in zip(row.tokens, row.mask, strict=True) if trained]
    every = naive(model, rows, 0.8)
    want = torch.stack([p[target] for p, target in zip(every, targets, strict=True)])
    (gradient,) = torch.autograd.grad(want.sum(), model.get_input_embeddings().weight)  # type: ignore[arg-type]
    model.gradient_checkpointing_enable()  # type: ignore[no-untyped-call]
    model.train()
    got = token_terms(model, collate(rows, CPU), 0.8)
    torch.testing.assert_close(got.logprobs, want, rtol=1e-4, atol=2e-5)
    spread_of = torch.stack([-(p.exp() * p).sum() for p in every])
    torch.testing.assert_close(got.entropy, spread_of, rtol=1e-4, atol=2e-5)
    (again,) = torch.autograd.grad(got.logprobs.sum(), model.get_input_embeddings().weight)  # type: ignore[arg-type]
    torch.testing.assert_close(again, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_scaled_logits_are_refused() -> None:
    config = CohereConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        logit_scale=0.0625,
        initializer_range=0.5,
    )
    with pytest.raises(UserError, match="CohereForCausalLM changes its logits"):
        check_model(CohereForCausalLM(config).eval())


def test_precision_is_put_back_even_after_an_error() -> None:
    before = torch.get_float32_matmul_precision()
    inside = []

    def fail() -> None:
        with matmul_precision("medium"):
            inside.append(torch.get_float32_matmul_precision())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert inside == ["medium"]
    assert torch.get_float32_matmul_precision() == before
