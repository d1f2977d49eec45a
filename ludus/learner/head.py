"""What the output head says of the trained tokens, without ever holding all of their logits.

Shape legend: N tokens, D hidden width, V vocabulary, W words of one block of it.

The vocabulary is walked in blocks. One walk gathers what the softmax needs, for each token: the largest logit
so far, the sum of the exponentials, and their sums weighed by the logits (entropy) and by their distance to
another model's (KL). A second walk, in the backward pass, makes each block's logits again and from them its
part of the gradient in closed form. A few [N, W] tensors are all that is ever held, and each row of the
head's gradient is written once.

With l the logits, p their softmax, q the other model's, H the entropy, K the KL, t the chosen token:

    log p_t = l_t - lse        d log p_t / dl_v = [v = t] - p_v
    H = lse - sum p l          dH / dl_v = - p_v (log p_v + H)
    K = sum p (l - m) - lse(l) + lse(m), m the other's logits
                               dK / dl_v = p_v (log p_v - log q_v - K)

A softmax gathered block by block: Milakov and Gimelshein, arXiv 1805.02867; over a head's vocabulary, for
the cross-entropy alone: Wijmans et al., arXiv 2411.09009. torch's `linear_cross_entropy` has neither entropy
nor KL.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ludus.algos.losses import entropy, kl_exact

WHOLE_BYTES = 2**27  # of float32 logits [N, V]: so many are held at once, which is faster, and no more
# Of one block's float32 logits [N, W]. On the CPU a small one stays in the caches (measured, 1,024 tokens of
# 32,768 words: 1.6 times as fast as 64 MiB, twice as fast as the whole); elsewhere a launch wants more work.
BLOCK_BYTES = {"cpu": 2**24}
_BLOCK_BYTES_ELSEWHERE = 2**27
TOKENS_AT_ONCE = 8192  # more of them are taken one part after the other, so that blocks do not get narrow


class Head(NamedTuple):
    """A linear output head: logits = states @ weight.T + bias; capped, they are cap * tanh(logits / cap)."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    cap: float | None


class Terms(NamedTuple):
    """Per trained token [N]; `kl` is None without a second model."""

    logprobs: Tensor
    entropy: Tensor
    kl: Tensor | None  # exact KL(model || other)


def head_terms(
    states_ND: Tensor,
    targets_N: Tensor,
    head: Head,
    temperature: float,
    other: tuple[Tensor, Head] | None = None,
    entropy_gradient: bool = False,
) -> Terms:
    """Log-probability of each target, and entropy and KL of its distribution, all at `temperature`.

    `other` holds the other model's hidden states [N, D] and head. Gradients reach `states_ND` and `head`,
    never the other model; the entropy has one only on demand. Products run in autocast's precision where that
    is on, the rest in float32, and so is the result.
    """
    if 4 * len(targets_N) * len(head.weight) > WHOLE_BYTES:
        return _blocked(states_ND, targets_N, head, temperature, other, entropy_gradient)
    logprobs_NV = _log_softmax(head, states_ND, temperature)
    chosen = logprobs_NV.gather(-1, targets_N.unsqueeze(-1)).squeeze(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropies = entropy(logprobs_NV)
    if other is None:
        return Terms(chosen, entropies, None)
    with torch.no_grad():
        other_NV = _log_softmax(other[1], other[0], temperature)
    return Terms(chosen, entropies, kl_exact(logprobs_NV, other_NV))


def logits_of(head: Head, states: Tensor) -> Tensor:
    """All logits [..., V] of hidden states [..., D]."""
    logits = F.linear(states, head.weight, head.bias)
    return logits if head.cap is None else torch.tanh(logits / head.cap) * head.cap


def _log_softmax(head: Head, states_ND: Tensor, temperature: float) -> Tensor:
    logits_NV = logits_of(head, states_ND).float()
    if temperature != 1.0:
        logits_NV = logits_NV / temperature
    return logits_NV.log_softmax(-1)


def _blocked(
    states_ND: Tensor,
    targets_N: Tensor,
    head: Head,
    temperature: float,
    other: tuple[Tensor, Head] | None,
    entropy_gradient: bool,
) -> Terms:
    device = states_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    other_ND, other_head = (None, None) if other is None else other
    settings = _Settings(head.cap, temperature, dtype, entropy_gradient, other_head)
    found = [
        Terms(
            *_Walks.apply(  # type: ignore[no-untyped-call]
                states_ND[part],
                head.weight,
                head.bias,
                targets_N[part],
                None if other_ND is None else other_ND[part],
                settings,
            )
        )
        for part in _parts(len(targets_N), TOKENS_AT_ONCE)
    ]
    if len(found) == 1:
        return found[0]
    kls = [terms.kl for terms in found if terms.kl is not None]
    return Terms(
        torch.cat([terms.logprobs for terms in found]),
        torch.cat([terms.entropy for terms in found]),
        torch.cat(kls) if kls else None,
    )


class _Settings(NamedTuple):
    cap: float | None
    temperature: float
    dtype: torch.dtype  # of products
    entropy_gradient: bool
    other: Head | None  # gets no gradient


class _Walks(torch.autograd.Function):
    """The two walks over the vocabulary."""

    @staticmethod
    def forward(
        ctx: Any,
        states_ND: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets_N: Tensor,
        other_ND: Tensor | None,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        head, other = Head(weight, bias, settings.cap), settings.other
        sums, their_sums = _Sums(states_ND), _Sums(states_ND)
        weighed, apart, chosen = (torch.zeros_like(sums.mass) for _ in range(3))
        with torch.autocast(states_ND.device.type, enabled=False):
            for words in _blocks(states_ND, weight):
                logits_NW = _logits(head, states_ND, words, settings)
                chosen += _at_targets(logits_NW, targets_N, words)
                odds_NW, shrink = sums.add(logits_NW)
                weighed = weighed * shrink + _dot(odds_NW, logits_NW)
                if other is not None and other_ND is not None:
                    theirs_NW = _logits(other, other_ND, words, settings)
                    their_sums.add(theirs_NW)
                    apart = apart * shrink + _dot(odds_NW, logits_NW.sub_(theirs_NW))
        lse, other_lse = sums.lse(), their_sums.lse()
        spread = lse - weighed / sums.mass
        kl = None if other is None else apart / sums.mass - (lse - other_lse)
        ctx.save_for_backward(states_ND, weight, bias, targets_N, other_ND, lse, spread, kl, other_lse)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        if not settings.entropy_gradient:
            ctx.mark_non_differentiable(spread)
        return chosen - lse, spread, kl

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        settings: _Settings = ctx.settings
        states_ND, weight, bias, targets_N, other_ND, lse, spread, kl, other_lse = ctx.saved_tensors
        for_chosen, for_entropy, for_kl = gradients
        head = Head(weight, bias, settings.cap)
        wants_states, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        to_states = torch.zeros_like(states_ND, dtype=torch.float32) if wants_states else None
        to_weight = torch.empty_like(weight) if wants_weight else None
        to_bias = torch.empty_like(bias) if wants_bias else None
        read_ND = states_ND.to(settings.dtype)
        with torch.autocast(states_ND.device.type, enabled=False):
            for words in _blocks(states_ND, weight):
                logits_NW = _logits(head, states_ND, words, settings)
                bent_NW = None
                if settings.cap is not None:  # the slope of the cap, 1 - tanh^2
                    bent_NW = 1.0 - (logits_NW * (settings.temperature / settings.cap)).square_()
                logprobs_NW = logits_NW.sub_(lse[:, None])
                probs_NW = logprobs_NW.exp()
                pull_NW = torch.zeros_like(probs_NW)  # the gradient per unit of probability
                if for_chosen is not None:
                    pull_NW.sub_(for_chosen[:, None])
                if for_kl is not None and settings.other is not None:
                    theirs_NW = _logits(settings.other, other_ND, words, settings)
                    gap_NW = theirs_NW.sub_((other_lse - kl)[:, None]).neg_().add_(logprobs_NW)
                    pull_NW.addcmul_(gap_NW, for_kl[:, None])
                if for_entropy is not None:
                    pull_NW.addcmul_(logprobs_NW.add_(spread[:, None]), for_entropy[:, None], value=-1.0)
                slope_NW = pull_NW.mul_(probs_NW)
                if for_chosen is not None:
                    _add_at_targets(slope_NW, targets_N, words, for_chosen)
                if settings.temperature != 1.0:
                    slope_NW.div_(settings.temperature)
                if bent_NW is not None:
                    slope_NW.mul_(bent_NW)
                if to_bias is not None:
                    to_bias[words] = slope_NW.sum(0)
                slope_NW = slope_NW.to(settings.dtype)
                if to_weight is not None:
                    to_weight[words] = slope_NW.t() @ read_ND
                if to_states is not None:
                    to_states += slope_NW @ weight[words].to(settings.dtype)
        if to_states is not None:
            to_states = to_states.to(states_ND.dtype)
        return to_states, to_weight, to_bias, None, None, None


class _Sums:
    """What a softmax [N] sums up, relative to the largest logit so far."""

    def __init__(self, states_ND: Tensor) -> None:
        self.top = torch.full((len(states_ND),), float("-inf"), device=states_ND.device)
        self.mass = torch.zeros_like(self.top)

    def add(self, logits_NW: Tensor) -> tuple[Tensor, Tensor]:
        """One more block; its exponentials [N, W], and the factor [N] by which all earlier sums shrink."""
        highest = torch.maximum(self.top, logits_NW.amax(-1))
        shrink = torch.exp(self.top - highest)
        odds_NW = (logits_NW - highest[:, None]).exp_()
        self.mass = self.mass * shrink + odds_NW.sum(-1)
        self.top = highest
        return odds_NW, shrink

    def lse(self) -> Tensor:
        """The logarithm of the sum of all exponentials."""
        return self.top + self.mass.log()


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(at, min(at + size, count)) for at in range(0, count, size))


def _blocks(states_ND: Tensor, weight: Tensor) -> Iterator[slice]:
    """The vocabulary in blocks whose logits fill the device's BLOCK_BYTES."""
    fill = BLOCK_BYTES.get(states_ND.device.type, _BLOCK_BYTES_ELSEWHERE)
    return _parts(len(weight), max(1, fill // (4 * len(states_ND))))


def _logits(head: Head, states_ND: Tensor, words: slice, settings: _Settings) -> Tensor:
    """One block's logits [N, W] at the temperature, in float32; the caller may overwrite them."""
    dtype = settings.dtype
    bias = None if head.bias is None else head.bias[words].to(dtype)
    logits = F.linear(states_ND.to(dtype), head.weight[words].to(dtype), bias).float()
    if head.cap is not None:
        logits.div_(head.cap).tanh_().mul_(head.cap)
    return logits if settings.temperature == 1.0 else logits.div_(settings.temperature)


def _dot(a_NW: Tensor, b_NW: Tensor) -> Tensor:
    """Row by row, without holding the products."""
    return torch.bmm(a_NW[:, None], b_NW[..., None])[:, 0, 0]


def _at_targets(logits_NW: Tensor, targets_N: Tensor, words: slice) -> Tensor:
    """The logit of each target in this block, 0 for targets of other blocks."""
    here = (targets_N >= words.start) & (targets_N < words.stop)
    column = (targets_N - words.start).clamp(0, words.stop - words.start - 1)
    return torch.where(here, logits_NW.gather(-1, column[:, None])[:, 0], 0.0)


def _add_at_targets(slope_NW: Tensor, targets_N: Tensor, words: slice, values_N: Tensor) -> None:
    here = (targets_N >= words.start) & (targets_N < words.stop)
    column = (targets_N - words.start).clamp(0, words.stop - words.start - 1)
    slope_NW.scatter_add_(-1, column[:, None], torch.where(here, values_N, 0.0)[:, None])
