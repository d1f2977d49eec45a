"""Losses on hand-worked numbers, and what must never reach a gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ludus.algos.losses import (
    Normaliser,
    denominator,
    entropy,
    kl_exact,
    kl_k3,
    merge_sums,
    normalise,
    policy_loss,
    sft_loss,
)
from ludus.types import Batch

SETTINGS = {"clip_low": 0.2, "clip_high": 0.3, "is_cap": 2.0}


def batch(
    mask: list[list[int]],
    advantages: list[list[float]],
    behaviour: list[list[float]],
    proximal: list[list[float]] | None = None,
    turn_weights: list[list[float]] | None = None,
) -> Batch:
    mask_BT = torch.tensor(mask, dtype=torch.bool)
    return Batch(
        tokens=torch.zeros_like(mask_BT, dtype=torch.int64),
        mask=mask_BT,
        behaviour_logprobs=torch.tensor(behaviour),
        proximal_logprobs=None if proximal is None else torch.tensor(proximal),
        advantages=torch.tensor(advantages),
        turn_weights=mask_BT.float() if turn_weights is None else torch.tensor(turn_weights),
        lengths=torch.full((len(mask),), mask_BT.shape[1]),
    )


def logs(*values: float) -> list[float]:
    return [math.log(v) for v in values]


def test_policy_gradient_by_hand() -> None:
    """One optimizer step per batch: the gradient of a log-probability is -w * A / denominator."""
    data = batch([[0, 1, 1]], [[0.0, 2.0, -1.0]], [logs(1.0, 0.5, 0.1)])
    current = torch.tensor([logs(1.0, 0.25, 0.8)], requires_grad=True)
    loss, sums = policy_loss(current, data, normaliser="dr_grpo", denominator=10.0, **SETTINGS)
    # w = 0.25 / 0.5 = 0.5, and 0.8 / 0.1 = 8 capped at 2
    assert loss.item() == pytest.approx(-(0.5 * 2.0 + 2.0 * -1.0) / 10.0)
    loss.backward()
    assert current.grad is not None
    assert current.grad.tolist() == [[0.0, pytest.approx(-0.1), pytest.approx(0.2)]]
    assert sums["importance"].item() == pytest.approx(8.5)
    assert sums["importance_max"].item() == pytest.approx(8.0)
    assert sums["clip_fraction"].item() == 0.0
    k3 = (0.5 - 1 - math.log(0.5)) + (8 - 1 - math.log(8))
    assert sums["sampler_kl"].item() == pytest.approx(k3)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [  # clip to [0.8, 1.3]: the gradient stops only where going on would pay
        (1.1, 1.0, 1.1),
        (1.4, 1.0, 0.0),
        (1.4, -1.0, -1.4),
        (0.7, 1.0, 0.7),
        (0.7, -1.0, 0.0),
        (0.9, -1.0, -0.9),
    ],
)
def test_the_clip_acts_where_it_should(ratio: float, advantage: float, slope: float) -> None:
    data = batch([[1]], [[advantage]], [logs(0.5)], proximal=[logs(0.5)])
    current = torch.tensor([logs(0.5 * ratio)], requires_grad=True)
    loss, sums = policy_loss(current, data, normaliser="token_mean", denominator=1.0, **SETTINGS)
    loss.backward()
    assert current.grad is not None
    assert current.grad.item() == pytest.approx(-slope)
    assert sums["clip_fraction"].item() == float(slope == 0.0)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
def test_nothing_leaks_from_outside_the_mask(poison: float) -> None:
    """Pitfalls 4 and 6."""
    p = poison
    mask = [[0, 1, 0]]
    clean = batch(mask, [[0.0, 1.0, 0.0]], [logs(1.0, 0.5, 1.0)], [logs(1.0, 0.4, 1.0)])
    dirty = batch(mask, [[p, 1.0, p]], [[p, math.log(0.5), p]], [[p, math.log(0.4), p]], [[p, 1.0, p]])
    values = []
    for data, outside in ((clean, 0.0), (dirty, p)):
        current = torch.tensor([[outside, math.log(0.45), outside]], requires_grad=True)
        loss, sums = policy_loss(current, data, normaliser="dr_grpo", denominator=2.0, **SETTINGS)
        loss = loss + sft_loss(current, data, 3.0) + normalise(current, data, "token_mean", 4.0)
        loss.backward()
        assert current.grad is not None
        assert current.grad[0, 0].item() == 0.0
        assert current.grad[0, 2].item() == 0.0
        values.append((loss.item(), current.grad[0, 1].item(), {k: v.item() for k, v in sums.items()}))
    assert values[0] == values[1]


def test_zero_advantages_give_exactly_zero_gradient() -> None:
    """Pitfall 10."""
    data = batch([[1, 1]], [[0.0, 0.0]], [logs(0.9, 0.01)], [logs(0.3, 0.2)])
    current = torch.tensor([logs(0.2, 0.7)], requires_grad=True)
    loss, _ = policy_loss(current, data, normaliser="dr_grpo", denominator=2.0, **SETTINGS)
    loss.backward()
    assert current.grad is not None
    assert current.grad.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("normaliser", "constant", "weights"),
    [
        ("dr_grpo", 2 * 8, [1 / 16] * 4),
        ("token_mean", 4, [1 / 4] * 4),
        ("turn_mean", 2, [1 / 2, 1 / 6, 1 / 6, 1 / 6]),
    ],
)
def test_normalisers_on_turns_of_unequal_length(
    normaliser: Normaliser, constant: float, weights: list[float]
) -> None:
    """Pitfall 9: one turn of one token, one of three."""
    data = batch(
        [[0, 1, 0, 0], [0, 1, 1, 1]],
        [[1.0] * 4] * 2,
        [[0.0] * 4] * 2,
        turn_weights=[[0, 1.0, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3]],
    )
    d = denominator(normaliser, turns=2, tokens=4, max_tokens=8)
    assert d == constant
    values = torch.zeros(2, 4, requires_grad=True)
    normalise(values, data, normaliser, d).backward()
    assert values.grad is not None
    assert values.grad[data.mask].tolist() == pytest.approx(weights)


def random_logprobs(rows: int, vocabulary: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2.0 * torch.randn(rows, vocabulary, generator=generator)).log_softmax(-1)


def test_exact_kl_and_entropy_equal_the_naive_sums() -> None:
    p, q = random_logprobs(3, 7, 1), random_logprobs(3, 7, 2)
    for i in range(3):
        probabilities = [math.exp(x) for x in p[i].tolist()]
        kl = sum(a * (math.log(a) - b) for a, b in zip(probabilities, q[i].tolist(), strict=True))
        assert kl_exact(p, q)[i].item() == pytest.approx(kl, rel=1e-5)
        assert entropy(p)[i].item() == pytest.approx(-sum(a * math.log(a) for a in probabilities), rel=1e-5)
    assert kl_exact(p, p).tolist() == [0.0, 0.0, 0.0]


def test_k3_estimates_the_exact_kl_without_bias() -> None:
    """Its expectation over tokens of the policy, summed over the whole vocabulary."""
    p, q = random_logprobs(4, 9, 3), random_logprobs(4, 9, 4)
    expected = (p.exp() * kl_k3(p, q)).sum(-1)
    assert expected.tolist() == pytest.approx(kl_exact(p, q).tolist(), rel=1e-4)
    assert (kl_k3(p, q) >= 0).all()
    assert kl_k3(p, p).abs().max().item() == 0.0


def test_sums_add_up_and_maxima_do_not() -> None:
    total: dict[str, Tensor] = {}
    for value in (1.0, 3.0, 2.0):
        merge_sums(total, {"importance": torch.tensor(value), "importance_max": torch.tensor(value)})
    assert {k: v.item() for k, v in total.items()} == {"importance": 6.0, "importance_max": 3.0}
