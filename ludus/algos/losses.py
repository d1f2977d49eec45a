"""What is minimised: pure functions on tensors, free of models.

Shape legend: B rows, T positions, N trained tokens, V vocabulary. [B, T] tensors are aligned as in
`ludus.types.Batch`: entry [b, t] speaks of `tokens[b, t]`. All logarithms are natural (nats).

Every loss is a sum over tokens divided by a constant that the caller states (`denominator`), computed over
the whole minibatch. Micro-batches therefore add up to exactly the gradient of the whole. Entries outside
the mask are replaced *before* any exponential, so whatever stands there, infinities and NaN included,
reaches neither the value nor the gradient.

Statistics come as `Sums`: detached scalars to be added over micro-batches and divided by the number of
trained tokens at the end; names that end in `_max` are combined by the maximum instead.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ludus.types import Batch

Normaliser = Literal["dr_grpo", "token_mean", "turn_mean"]
Sums = dict[str, Tensor]


def denominator(normaliser: Normaliser, *, turns: int, tokens: int, max_tokens: int) -> float:
    """The constant that a minibatch's sum is divided by. All counts are of the whole minibatch.

    `dr_grpo`: turns * max_tokens, where max_tokens is the most that a reply may have (arXiv 2503.20783): a
    token weighs the same in long and short replies, in this step and the next. Turns are counted, not rows,
    so that merging the turns of a dialogue into one row changes nothing.
    `token_mean`: the number of trained tokens. `turn_mean`: the number of turns (tokens then weigh
    `Batch.turn_weights`).
    """
    counts = {"dr_grpo": turns * max_tokens, "token_mean": tokens, "turn_mean": turns}
    return float(counts[normaliser])


def normalise(values_BT: Tensor, batch: Batch, normaliser: Normaliser, denominator: float) -> Tensor:
    """Sum of a per-token quantity over the trained tokens, weighted and divided as `normaliser` says."""
    values = torch.where(batch.mask, values_BT, 0.0)
    if normaliser == "turn_mean":
        values = values * batch.turn_weights
    return values.sum() / denominator


def policy_loss(
    logprobs_BT: Tensor,
    batch: Batch,
    *,
    clip_low: float,
    clip_high: float,
    is_cap: float,
    normaliser: Normaliser,
    denominator: float,
) -> tuple[Tensor, Sums]:
    """PPO's clipped objective with truncated importance sampling between sampler and learner.

    With x the sampler's, p the learner's (before the first update of this batch) and l the current
    log-probability of a token, w = min(is_cap, exp(p - x)), a constant, and ratio = exp(l - p):

        loss = - sum of w * min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) / denominator

    PPO: arXiv 1707.06347, eq. 7. The factor w makes up for sampler and learner disagreeing (precision,
    kernels, older weights) and is capped so that its variance stays bounded (IMPALA, arXiv 1802.01561). Where
    `proximal_logprobs` is None, p is l without its gradient: one optimizer step per batch.

    Sums: `clip_fraction` (tokens whose gradient the clip has cut), `importance` (w before the cap),
    `importance_max`, `sampler_kl` (KL from sampler to current policy, k3 estimate).
    """
    mask = batch.mask
    current = torch.where(mask, logprobs_BT, 0.0)
    behaviour = torch.where(mask, batch.behaviour_logprobs, 0.0)
    advantages = torch.where(mask, batch.advantages, 0.0)
    if batch.proximal_logprobs is None:
        proximal = current.detach()
    else:
        proximal = torch.where(mask, batch.proximal_logprobs, 0.0)

    importance = torch.exp(proximal - behaviour)
    ratio = torch.exp(current - proximal)
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages) * importance.clamp(max=is_cap)
    loss = -normalise(objective, batch, normaliser, denominator)

    with torch.no_grad():
        cut = ((advantages > 0) & (ratio > 1.0 + clip_high)) | ((advantages < 0) & (ratio < 1.0 - clip_low))
        drift = current - behaviour  # tokens are drawn from the sampler, so this is -log of its k3 ratio
        sums = {
            "clip_fraction": cut.sum().float(),
            "importance": torch.where(mask, importance, 0.0).sum(),
            "importance_max": torch.where(mask, importance, 0.0).max(),
            "sampler_kl": (torch.expm1(drift) - drift).sum(),
        }
    return loss, sums


def sft_loss(logprobs_BT: Tensor, batch: Batch, denominator: float) -> Tensor:
    """Cross-entropy of the trained tokens: -sum of their log-probabilities / denominator."""
    return -torch.where(batch.mask, logprobs_BT, 0.0).sum() / denominator


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference) from tokens drawn from the policy; any shape.

    exp(r) - 1 - r with r = reference - policy: unbiased, never negative, 0 where both agree (Schulman 2020,
    "Approximating KL divergence", k3).
    """
    r = reference_logprobs - logprobs
    return torch.expm1(r) - r


def kl_exact(logprobs_NV: Tensor, other_NV: Tensor) -> Tensor:
    """KL(p || q) [N] over the full vocabulary; both inputs are log-probabilities (normalised)."""
    return (logprobs_NV.exp() * (logprobs_NV - other_NV)).sum(-1)


def entropy(logprobs_NV: Tensor) -> Tensor:
    """Entropy [N] in nats over the full vocabulary of normalised log-probabilities."""
    return -(logprobs_NV.exp() * logprobs_NV).sum(-1)


def merge_sums(total: Sums, part: Sums) -> None:
    """Fold the sums of one micro-batch into `total`, in place."""
    for name, value in part.items():
        if name not in total:
            total[name] = value
        elif name.endswith("_max"):
            total[name] = torch.maximum(total[name], value)
        else:
            total[name] = total[name] + value
