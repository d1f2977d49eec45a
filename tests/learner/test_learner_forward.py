"""Log-probabilities, entropies and KL equal those of a naive full forward pass of the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import FAMILIES, make_model
from transformers import CohereConfig, CohereForCausalLM, PreTrainedModel

from ludus.errors import UserError
from ludus.learner import forward
from ludus.learner.batching import collate
from ludus.learner.forward import check_model, matmul_precision, spread, token_terms
from ludus.types import Batch, Sample

CPU = torch.device("cpu")
BuildModel = Callable[..., PreTrainedModel]
BuildRows = Callable[..., list[Sample]]


def naive(model: PreTrainedModel, rows: list[Sample], temperature: float) -> list[torch.Tensor]:
    """Log-softmax [V] at every trained token, one row at a time, unpadded."""
    out = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.tokens])).logits[0] / temperature
        out += [logits[t - 1].log_softmax(-1) for t, trained in enumerate(row.mask) if trained]
    return out


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("at_once", [2**25, 3 * 23])  # whole, and in pieces of three tokens
def test_terms_equal_the_full_forward(
    build_model: BuildModel,
    build_rows: BuildRows,
    temperature: float,
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", at_once)
    model, other, rows = build_model(1), build_model(2), build_rows(6)
    batch = collate(rows, CPU)
    terms = token_terms(model, batch, temperature, other)
    assert terms.kl is not None
    targets = [t for row in rows for t, trained in zip(row.tokens, row.mask, strict=True) if trained]
    want, theirs = naive(model, rows, temperature), naive(other, rows, temperature)
    for i, (p, q, target) in enumerate(zip(want, theirs, targets, strict=True)):
        assert terms.logprobs[i].item() == pytest.approx(p[target].item(), abs=2e-5)
        assert terms.entropy[i].item() == pytest.approx(-(p.exp() * p).sum().item(), abs=2e-5)
        assert terms.kl[i].item() == pytest.approx((p.exp() * (p - q)).sum().item(), abs=2e-5)


def test_pieces_give_the_same_gradient(
    build_model: BuildModel, build_rows: BuildRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other, batch = build_model(1), build_model(2), collate(build_rows(5), CPU)
    gradients = []
    for at_once in (2**25, 4 * 23):
        monkeypatch.setattr(forward, "LOGITS_AT_ONCE", at_once)
        model.zero_grad()
        terms = token_terms(model, batch, 1.0, other, entropy_gradient=True)
        assert terms.kl is not None
        (terms.logprobs.sum() + terms.entropy.sum() + terms.kl.sum()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert all(p.grad is None for p in other.parameters())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


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
