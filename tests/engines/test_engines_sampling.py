"""The sampler: its hash against pure Python, its inverse against exact fractions, its filters by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ludus.engines.sampling import Knobs, inverse_cdf, kept, mix64, sample, uniform_bits

M64 = 2**64 - 1
words = st.integers(0, 2**63 - 1)


def reference_mix64(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def reference_bits(seed: int, position: int) -> int:
    gamma = 0x9E3779B97F4A7C15
    start = reference_mix64((seed + gamma) & M64)
    return reference_mix64((start + (position + 1) * gamma) & M64) >> 16


def knobs(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, rows: int = 1) -> Knobs:
    return Knobs(
        temperature=torch.full((rows,), temperature),
        top_k=torch.full((rows,), top_k),
        top_p=torch.full((rows,), top_p),
        plain=temperature == 1.0 and not top_k and top_p == 1.0,
        filtered=top_k > 0 or top_p < 1.0,
    )


def seeds(count: int) -> torch.Tensor:
    return uniform_bits(torch.arange(count), torch.zeros(count, dtype=torch.int64))


def test_splitmix64_gives_its_published_stream():
    # The first outputs of splitmix64 seeded with 1234567, as in the reference implementation's test vectors.
    gamma, state = 0x9E3779B97F4A7C15, 1234567
    states = torch.tensor([((state + (i + 1) * gamma) & M64) - 2**63 for i in range(3)]) - 2**63
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [x & M64 for x in mix64(states).tolist()] == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(words, st.integers(0, 2**20)), min_size=1, max_size=20))
def test_the_hash_equals_pure_python(pairs: list[tuple[int, int]]):
    seed, position = torch.tensor(pairs).unbind(1)
    assert uniform_bits(seed, position).tolist() == [reference_bits(*pair) for pair in pairs]


@pytest.mark.parametrize("direction", ["seeds", "positions", "both"])
def test_neighbouring_draws_are_uniform_and_independent(direction: str):
    n = torch.arange(40_000)
    zero = torch.zeros_like(n)
    seed, position = {"seeds": (n, zero), "positions": (zero, n), "both": (n // 200, n % 200)}[direction]
    u = uniform_bits(seed, position).double() / 2**48
    assert u.min() >= 0
    assert u.max() < 1
    cells = (u * 20).long()
    for counts in (
        torch.bincount(cells, minlength=20),
        torch.bincount(cells[:-1] * 20 + cells[1:], minlength=400),
    ):
        expected = counts.sum() / len(counts)
        chi2 = ((counts - expected) ** 2 / expected).sum().item()
        freedom = len(counts) - 1
        assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1e-12, 1e-9, 1e-3, 0.2, 0.5, 1.0]), min_size=1, max_size=12),
    st.one_of(st.sampled_from([0, 1, 2**24 - 1, 2**24, 2**47, 2**48 - 1]), st.integers(0, 2**48 - 1)),
)
def test_the_inverse_is_exact_and_never_picks_a_zero(weights: list[float], bits: int):
    if sum(weights) < 1e-3:
        weights[0] = 1.0
    probs = torch.tensor([weights]) / sum(weights)
    token = int(inverse_cdf(probs, torch.tensor([bits])))
    mass = [round(Fraction(p) * 2**37) for p in probs[0].tolist()]
    target = sum(mass) * bits // 2**48
    assert mass[token] > 0
    assert sum(mass[:token]) <= target < sum(mass[: token + 1])


def test_tokens_come_as_often_as_their_probability_says():
    probs = torch.tensor([0.5, 0.25, 0.125, 0.1, 0.02, 0.005, 0.0, 0.0])
    n = 100_000
    tokens, logprobs = sample(probs.log().expand(n, -1), seeds(n), knobs(rows=n))
    counts = torch.bincount(tokens, minlength=8).double()
    assert counts[6:].sum() == 0
    expected = probs[:6].double() * n
    chi2 = ((counts[:6] - expected) ** 2 / expected).sum().item()
    assert chi2 < 25.7  # 5 degrees of freedom: exceeded once in 10,000
    torch.testing.assert_close(logprobs, probs[tokens].log())


def test_temperature_sharpens():
    logits = torch.tensor([2.0, 1.0, 0.0])
    n = 50_000
    tokens, logprobs = sample(logits.expand(n, -1), seeds(n), knobs(temperature=0.5, rows=n))
    wanted = (logits / 0.5).softmax(-1)
    torch.testing.assert_close(logprobs, wanted.log()[tokens])
    torch.testing.assert_close(torch.bincount(tokens).double() / n, wanted.double(), atol=0.01, rtol=0)


def test_greedy_takes_the_likeliest_with_certainty():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = sample(logits, seeds(50), knobs(temperature=0.0, rows=50))
    assert tokens.tolist() == logits.argmax(-1).tolist()
    assert logprobs.tolist() == [0.0] * 50


# 0.4, 0.3, 0.2, 0.1 in another order: ids 2, 0, 3, 1.
PROBS = torch.tensor([0.3, 0.1, 0.4, 0.2])


@pytest.mark.parametrize(
    ("top_k", "top_p", "survivors"),
    [
        (0, 1.0, {0, 1, 2, 3}),
        (1, 1.0, {2}),
        (3, 1.0, {0, 2, 3}),
        (9, 1.0, {0, 1, 2, 3}),
        (0, 0.05, {2}),
        (0, 0.39, {2}),
        (0, 0.41, {0, 2}),
        (0, 0.69, {0, 2}),
        (0, 0.71, {0, 2, 3}),
        (2, 0.5, {2}),  # of 0.4 and 0.3, renormalised, the first holds 0.571
        (2, 0.6, {0, 2}),
    ],
)
def test_filters_keep_what_they_should(top_k: int, top_p: float, survivors: set[int]):
    keep = kept(PROBS.log()[None], torch.tensor([top_k]), torch.tensor([top_p]))
    assert set(keep[0].nonzero().flatten().tolist()) == survivors
    n = 2000
    tokens, logprobs = sample(PROBS.log().expand(n, -1), seeds(n), knobs(top_k=top_k, top_p=top_p, rows=n))
    assert set(tokens.tolist()) == survivors
    total = sum(float(PROBS[i]) for i in survivors)
    torch.testing.assert_close(logprobs, (PROBS[tokens] / total).log())


def test_top_k_keeps_exactly_k_of_equals():
    keep = kept(torch.zeros(1, 5), torch.tensor([2]), torch.tensor([1.0]))
    assert keep.tolist() == [[True, True, False, False, False]]


def test_rows_with_different_settings_do_not_disturb_one_another():
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(1))
    settings_ = [(1.0, 0, 1.0), (0.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.6)]
    mixed = Knobs(
        torch.tensor([s[0] for s in settings_]),
        torch.tensor([s[1] for s in settings_]),
        torch.tensor([s[2] for s in settings_]),
        plain=False,
        filtered=True,
    )
    bits = seeds(4)
    tokens, logprobs = sample(logits, bits, mixed)
    for row, (temperature, top_k, top_p) in enumerate(settings_):
        token, logprob = sample(logits[row : row + 1], bits[row : row + 1], knobs(temperature, top_k, top_p))
        assert token.item() == tokens[row].item()
        assert logprob.item() == logprobs[row].item()


def test_broken_logits_show_in_the_logprob():
    for value in (float("nan"), float("inf")):
        logits = torch.zeros(1, 4)
        logits[0, 1] = value
        for k in (knobs(), knobs(temperature=0.0), knobs(top_k=2)):
            token, logprob = sample(logits, seeds(1), k)
            assert 0 <= token.item() < 4
            assert not logprob.isfinite().item()
