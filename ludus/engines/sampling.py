"""Sampling: uniforms that depend on (seed, position) alone, and an exact inverse of the cumulative sum.

Nothing here knows about arrival order, batches or generators, so a request draws the same numbers whether
it runs alone or among others. All on the device, in integers, so that CPU, CUDA and MPS agree bit for bit on
every draw; only the logits themselves carry floating-point differences.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # constants of splitmix64, as signed 64-bit integers
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_UNIFORM_BITS = 48
_MASS_BITS = 37  # a probability becomes an integer in units of 2**-37


@dataclass(frozen=True, slots=True)
class Knobs:
    """Sampling parameters per row [N], and what the host knows of them, to skip work."""

    temperature: Tensor  # float32; 0 = greedy
    top_k: Tensor  # int64; 0 = off
    top_p: Tensor  # float32; 1 = off
    plain: bool  # every row samples at temperature 1 without filters
    filtered: bool  # some row has top_k or top_p


def mix64(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014) on int64, modulo 2**64."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def uniform_bits(seed: Tensor, position: Tensor) -> Tensor:
    """Integers uniform on [0, 2**48), one per (seed, position within the completion); int64 in and out."""
    start = mix64(seed + _GAMMA)  # seeds that follow one another must not give overlapping streams
    return _shift(mix64(start + (position + 1) * _GAMMA), 64 - _UNIFORM_BITS)


def sample(logits: Tensor, bits: Tensor, knobs: Knobs) -> tuple[Tensor, Tensor]:
    """Draw one token per row of logits [N, V]; returns tokens int64 [N] and log-probabilities float32 [N].

    The log-probability is that of the distribution really drawn from: after temperature, then top-k, then
    top-p. At temperature 0 that distribution is one point, the argmax, so its log-probability is 0.0.
    """
    logits = logits.float()
    if knobs.plain:
        logprobs = torch.log_softmax(logits, -1)
        tokens = inverse_cdf(logprobs.exp(), bits)
        return tokens, logprobs.gather(1, tokens[:, None])[:, 0]
    greedy = knobs.temperature == 0
    scaled = logits / torch.where(greedy, 1.0, knobs.temperature)[:, None]
    if knobs.filtered:
        scaled = scaled.masked_fill(~kept(scaled, knobs.top_k, knobs.top_p), float("-inf"))
    logprobs = torch.log_softmax(scaled, -1)
    tokens = inverse_cdf(logprobs.exp(), bits)
    chosen = logprobs.gather(1, tokens[:, None])[:, 0]
    # chosen * 0 and not 0: logits that are not finite must show.
    return torch.where(greedy, logits.argmax(-1), tokens), torch.where(greedy, chosen * 0.0, chosen)


def kept(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Which tokens survive the filters, bool [N, V]; the likeliest token always does.

    Top-k keeps exactly k (equal logits: the lower id first). Top-p then keeps, among those, the likeliest
    tokens up to and including the one that lifts their renormalised sum to top_p.
    """
    ordered, order = logits.sort(stable=True, dim=-1, descending=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    k = torch.where(top_k > 0, top_k, logits.shape[-1])
    keep = rank < k[:, None]
    probs = ordered.masked_fill(~keep, float("-inf")).softmax(-1)
    before = probs.cumsum(-1) - probs
    keep &= (before < top_p[:, None]) | (top_p >= 1.0)[:, None] | (rank == 0)
    return torch.zeros_like(keep).scatter_(1, order, keep)


def inverse_cdf(probs: Tensor, bits: Tensor) -> Tensor:
    """The token where the cumulative sum of probs [N, V] passes bits / 2**48 of its total.

    Sums are of integers, hence exact and the same in any order, and a token whose mass is 0 is never chosen:
    the target is below the total, and the cumulative sum does not move at such a token. Probabilities
    below 2**-38 count as 0.
    """
    mass = (probs * float(2**_MASS_BITS)).round_().long()
    cumulative = mass.cumsum(-1)
    total = cumulative[:, -1]
    # floor(total * bits / 2**48) in two halves of 24 bits: the whole product would not fit 64 bits.
    high, low = bits >> 24, bits & (2**24 - 1)
    target = (high * total + ((low * total) >> 24)) >> 24
    # The clamp matters only for logits that were not finite, which the caller reports.
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp_(max=probs.shape[-1] - 1)


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical right shift: torch's own carries the sign along."""
    return (x >> by) & ((1 << (64 - by)) - 1)
