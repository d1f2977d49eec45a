"""The optimizer's side of a run: rows in, new weights out.

    rows -> minibatches (one optimizer step each) -> micro-batches (one forward and backward each)
         -> gradient (beside it, where asked for, that of a supervised batch), clipped -> finite? -> AdamW
         -> moving average, magnet

Precision on the CPU: float32 products run at torch's "highest" precision. At the sizes that a CPU trains
(0.5 to 3 million parameters) "medium", which computes in bf16 inside oneDNN, was faster by 0 to 5% only, and
2 to 3 times slower with SDPA attention. The setting is process-wide in torch; it is set for the length of a
call and put back.

A bfloat16 model is trained in bf16 autocast: its weights are kept in float32, because a step of 1e-6 is
smaller than bf16 can tell apart.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ludus.algos.losses import (
    Normaliser,
    Sums,
    denominator,
    kl_k3,
    merge_sums,
    normalise,
    policy_loss,
    sft_loss,
)
from ludus.config import LossConfig, OptimConfig
from ludus.errors import UserError
from ludus.learner.batching import collate, count_tokens, count_turns, microbatches, minibatches
from ludus.learner.forward import check_model, matmul_precision, spread
from ludus.learner.head import Terms
from ludus.learner.narrow import narrow
from ludus.learner.packing import prepare
from ludus.learner.placement import Placement, Solo
from ludus.learner.supervised import Supervised
from ludus.memory import within_memory
from ludus.types import Batch, Sample

PRECISION = "highest"
# On the CPU bigger ones fall out of the caches; and many small ones are shared out better among threads.
CPU_MICROBATCH_TOKENS, CPU_SHARED_TOKENS = 2048, 1024

_COPIES = (
    "AdamW keeps two numbers per weight, and loss.reference_kl, loss.magnet_kl and optim.average each keep a "
    "copy of the model"
)

Compute = Callable[[Batch], tuple[Tensor, Sums]]  # a micro-batch's share of the loss, and its sums


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of an optimizer step that share a loss. Their sums are merged into `totals`."""

    samples: Sequence[Sample]
    compute: Compute
    totals: Sums
    proximal: Sequence[Tensor] | None = None


class NonFinite(UserError):
    """A loss, gradient or input is NaN or infinite. The optimizer step that it belongs to was not taken."""


def learning_rate(optim: OptimConfig, step: int, total: int) -> float:
    """The rate of update `step` (from 0) out of `total`.

    Rises linearly over `warmup_steps` updates to `lr`, reached by update `warmup_steps - 1`; then stays, or
    falls to `final_lr`, which it would reach at update `total`.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    done = min(1.0, (step - optim.warmup_steps) / max(1, total - optim.warmup_steps))
    if optim.schedule == "linear":
        return optim.lr + (optim.final_lr - optim.lr) * done
    if optim.schedule == "cosine":
        return optim.final_lr + (optim.lr - optim.final_lr) * (1.0 + math.cos(math.pi * done)) / 2.0
    return optim.lr


class Learner:
    """Trains one model in place: the parameters that require a gradient, all or those of an adapter.

    `max_tokens` is the most tokens that a reply may have (the constant of Dr. GRPO); `total_steps` the number
    of updates that the schedule is laid out for; `temperature` the one that replies are sampled at, because
    log-probabilities must be those of the distribution that was sampled from. Top-p and top-k cut away tokens
    that the learner still gives probability to, which no importance weight can put right, so training
    refuses them. `supervised` rows, where given, have a share in every optimizer step of `update`.
    `placement` says where the weights lie, this process alone if it is left out. Raises
    UserError for such sampling and for models that cannot be trained here.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        loss: LossConfig,
        optim: OptimConfig,
        *,
        max_tokens: int,
        total_steps: int,
        seed: int = 0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        supervised: Supervised | None = None,
        placement: Placement | None = None,
    ) -> None:
        if temperature <= 0.0:
            raise UserError(
                "rollout.temperature is 0 (greedy): there is nothing to learn from replies without chance; "
                "set it above 0, such as 1.0"
            )
        if top_p != 1.0 or top_k != 0:
            raise UserError(
                f"rollout.top_p = {top_p} and rollout.top_k = {top_k} filter the sampled tokens, which the "
                "policy gradient cannot account for; train with top_p = 1 and top_k = 0"
            )
        self.model = model
        self.loss = loss
        self.optim = optim
        self.max_tokens = max_tokens
        self.total_steps = total_steps
        self.seed = seed
        self.temperature = temperature
        self.supervised = supervised
        self.steps = 0  # updates done
        self.device = next(model.parameters()).device
        self.placement: Placement = placement or Solo(self.device)
        self.autocast = next(model.parameters()).dtype is torch.bfloat16
        self._names = {name for name, p in model.named_parameters() if p.requires_grad}
        if all(p.requires_grad for p in model.parameters()):  # a frozen base may stay in half the memory
            model.to(torch.float32)  # type: ignore[arg-type]  # the decorator of `to` hides its signature
        recomputes = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        model.train(recomputes)  # no dropout; but transformers checkpoints in training mode alone
        check_model(model)
        if optim.batching == "packed":
            prepare(model)
        narrow(model)
        with within_memory("for the learner's copies of the model", f"do without some of them: {_COPIES}"):
            self.reference = self._frozen_copy() if loss.reference_kl > 0 else None
            self.magnet = self._frozen_copy() if loss.magnet_kl > 0 else None
            self.placement.spread(model, half=self.autocast)
            self.optimizer = self._adamw()
            self.average: dict[str, Tensor] | None = None
            if optim.average > 0:
                self.average = {name: p.detach().clone() for name, p in self._learning().items()}

    def update(self, samples: Sequence[Sample]) -> dict[str, float]:
        """One reinforcement step on the rows of a batch: `epochs` passes of `minibatches` optimizer steps.

        Returns what was measured. Per trained token, averaged over all passes: `entropy` (exact, nats),
        `clip_fraction`, `importance` (sampler-to-learner weight; `importance_max`), `sampler_kl`, and where
        used `reference_kl`, `magnet_kl`. Per optimizer step: `loss`, `grad_norm` (before clipping).
        Counts of the batch: `rows`, `turns`, `tokens` (trained ones). `lr` of this update. With supervised
        rows, whose weighted cross-entropy is part of each step's loss and gradient: `sft_loss`, their mean
        cross-entropy (nats per token, mean over optimizer steps), and `sft_tokens`, how many were trained on.
        Without any row, no optimizer step is taken, but the schedule moves on.
        Raises NonFinite before the optimizer step that would have spoilt the weights.
        """
        for sample in samples:
            if not all(map(math.isfinite, sample.advantages)) or not all(map(math.isfinite, sample.logprobs)):
                raise NonFinite(
                    f"update {self.steps}: an advantage or a sampler's log-probability is not finite in a "
                    f"row of {sample.game} ({sample.role}); no weight was changed"
                )
        several = self.optim.epochs * min(self.optim.minibatches, len(samples)) > 1
        with self._working():
            proximal = self._proximal(samples) if several else None
            return self._train(samples, proximal, self._policy_compute, self.supervised)

    def sft(self, samples: Sequence[Sample]) -> dict[str, float]:
        """One supervised step: mean cross-entropy of the rows' masked tokens, at temperature 1.

        Epochs, minibatches, schedule and clipping as in `update`; advantages and log-probabilities of the
        rows are not read. Returns `loss`, `grad_norm`, `entropy`, `lr`, `rows`, `turns`, `tokens`.
        """
        with self._working():
            return self._train(samples, None, self._sft_compute)

    @contextmanager
    def _working(self) -> Iterator[None]:
        remedy = (
            f"lower optim.microbatch_tokens (now {self.optim.microbatch_tokens}), set model."
            f"gradient_checkpointing = true, or leave the sampling engine less (engine.slots); {_COPIES}"
        )
        with within_memory(f"in update {self.steps} of the learner", remedy), matmul_precision(PRECISION):
            yield

    def weights(self) -> Mapping[str, Tensor]:
        """The current weights, whole, named as in the state dict; of an adapter, its tensors alone. They may
        be live views, which the next update changes. Where the learner is spread over processes, all of them
        must ask, and each gets all.
        """
        return self._named(lambda p: p)

    def average_weights(self) -> Mapping[str, Tensor]:
        """The weights' moving average over updates, named alike; the current weights if none is kept."""
        if self.average is None:
            return self.weights()
        averages: dict[Tensor, Tensor] = {p: self.average[n] for n, p in self._learning().items()}
        return self._named(lambda p: averages.get(p, p))

    def _named(self, choose: Callable[[Tensor], Tensor]) -> Mapping[str, Tensor]:
        """The model's state dict, with what `choose` puts for each tensor. A tied head goes by two names."""
        made: dict[Tensor, Tensor] = {}
        out: dict[str, Tensor] = {}
        frozen = {p for p in self.model.parameters() if not p.requires_grad}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if tensor in frozen:
                continue
            if tensor not in made:
                made[tensor] = self.placement.whole(choose(tensor).detach())
            out[name] = made[tensor]
        return out

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next update depends on: tensors (copies on the CPU) and plain JSON values.

        Weights, both moments of AdamW, magnet, reference and moving average. The random split into
        minibatches needs no more than `seed` and `steps`. Where the learner is spread over processes, all of
        them must ask; one gets the tensors, gathered one after another, and the others none.
        """
        tensors: dict[str, Tensor] = {f"model.{n}": p for n, p in self._learning().items()}
        counts: dict[str, int] = {}  # a parameter that never had a gradient has no moments
        for name, p in self._learning().items():
            if p in self.optimizer.state:
                moments = self.optimizer.state[p]
                counts[name] = int(moments["step"])
                tensors[f"optimizer.exp_avg.{name}"] = moments["exp_avg"]
                tensors[f"optimizer.exp_avg_sq.{name}"] = moments["exp_avg_sq"]
        for role, frozen in (("magnet", self.magnet), ("reference", self.reference)):
            if frozen is not None:
                tensors.update({f"{role}.{n}": p for n, p in self._learning(frozen).items()})
        if self.average is not None:
            tensors.update({f"average.{n}": kept for n, kept in self.average.items()})
        copies: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            whole = self.placement.whole(tensor.detach())
            if self.placement.keeps:
                copies[name] = whole.to("cpu", copy=True).contiguous()
        return copies, {"steps": self.steps, "seed": self.seed, "optimizer_steps": counts}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Become the learner that `state` was taken from. Raises UserError, and changes nothing, if it does
        not fit.
        """
        counts: dict[str, int] = values["optimizer_steps"]
        homes = self._homes(counts)
        problems = sorted(homes.keys() ^ tensors.keys())
        problems += sorted(n for n in homes.keys() & tensors.keys() if homes[n].shape != tensors[n].shape)
        if problems:
            raise UserError(
                f"the saved learner does not fit this one: {len(problems)} tensors differ, such as "
                f"{problems[0]}; resume with the model and the settings that the run was started with"
            )
        with torch.no_grad():
            for name, home in homes.items():
                self.placement.put(home, tensors[name])
        self.optimizer.state.clear()
        for name, p in self._learning().items():
            if name in counts:
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(counts[name]), device=p.device),
                    "exp_avg": homes[f"optimizer.exp_avg.{name}"],
                    "exp_avg_sq": homes[f"optimizer.exp_avg_sq.{name}"],
                }
        self.steps = values["steps"]
        self.seed = values["seed"]

    def _homes(self, counts: Mapping[str, int]) -> dict[str, Tensor]:
        """Where each tensor of a saved state belongs; moments get fresh room."""
        homes: dict[str, Tensor] = {}
        for name, p in self._learning().items():
            homes[f"model.{name}"] = p
            if name in counts:
                homes[f"optimizer.exp_avg.{name}"] = torch.zeros_like(p)
                homes[f"optimizer.exp_avg_sq.{name}"] = torch.zeros_like(p)
            if self.average is not None:
                homes[f"average.{name}"] = self.average[name]
        for role, frozen in (("magnet", self.magnet), ("reference", self.reference)):
            if frozen is not None:
                homes.update({f"{role}.{n}": p for n, p in self._learning(frozen).items()})
        return homes

    def _learning(self, model: PreTrainedModel | None = None) -> dict[str, Tensor]:
        """The parameters that learn, or what they are in a frozen copy, by name."""
        named = (model or self.model).named_parameters()
        return {name: p for name, p in named if name in self._names}

    # One optimizer step after another

    def _train(
        self,
        samples: Sequence[Sample],
        proximal: Sequence[Tensor] | None,
        make_compute: Callable[[Sequence[Sample]], Compute],
        supervised: Supervised | None = None,
    ) -> dict[str, float]:
        lr = learning_rate(self.optim, self.steps, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        totals: Sums = {}
        norms: list[float] = []
        losses: list[list[float]] = []  # per optimizer step, the shares of its parts
        sft_tokens = 0
        for epoch in range(self.optim.epochs if samples else 0):
            split = minibatches(len(samples), self.optim.minibatches, self.seed, self.steps, epoch)
            for number, picked in enumerate(split):
                chosen = [samples[i] for i in picked]
                known = None if proximal is None else [proximal[i] for i in picked]
                parts = [_Part(chosen, make_compute(chosen), totals, known)]
                if supervised is not None:
                    drawn = supervised.draw(self.seed, self.steps, epoch, number)
                    parts.append(_Part(drawn, self._sft_compute(drawn, supervised.weight), {}))
                    sft_tokens += count_tokens(drawn)
                shares, norm = self._optimizer_step(parts)
                losses.append(shares)
                norms.append(norm)
        self._after_update()
        out = {
            "lr": lr,
            "rows": float(len(samples)),
            "turns": float(count_turns(samples)),
            "tokens": float(count_tokens(samples)),
        }
        if not losses:
            return out
        totals = self.placement.total(totals)
        passes = self.optim.epochs * out["tokens"]
        measured = {n: float(v) / (1.0 if n.endswith("_max") else passes) for n, v in totals.items()}
        steps = len(losses)
        if supervised is not None:
            beside = sum(share for _, share in losses) / supervised.weight
            measured |= {"sft_loss": beside / steps, "sft_tokens": float(sft_tokens)}
        return {
            "loss": sum(map(sum, losses)) / steps,
            "grad_norm": sum(norms) / steps,
            **measured,
            **out,
        }

    def _optimizer_step(self, parts: Sequence[_Part]) -> tuple[list[float], float]:
        """Accumulate the gradient over all micro-batches and move once.

        Returns each part's share of the loss, and the gradient's norm.
        """
        self.optimizer.zero_grad(set_to_none=True)
        totals = [torch.zeros((), device=self.device) for _ in parts]
        for part, total in zip(parts, totals, strict=True):

            def share(micro: list[int], part: _Part = part) -> tuple[Tensor, Sums]:
                known = None if part.proximal is None else [part.proximal[i] for i in micro]
                return part.compute(collate([part.samples[i] for i in micro], self.device, known))

            micros, last = self._microbatches(part.samples), part is parts[-1]
            for loss, sums in self.placement.backward(self.model, share, micros, last=last):
                total += loss
                merge_sums(part.totals, sums)
        whole = self.placement.total({f"part {i}": total for i, total in enumerate(totals)})
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.grad_clip)
        losses = [float(whole[f"part {i}"]) for i in range(len(parts))]
        length = float(self.placement.whole(norm))
        if not all(map(math.isfinite, [*losses, length])):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFinite(
                f"update {self.steps}: the loss is {sum(losses)} and the gradient's norm {length}; this "
                "optimizer step was not taken. Lower optim.lr, or look at the rows of this step"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # their memory is the engine's until the next update
        return losses, length

    def _after_update(self) -> None:
        self.steps += 1
        if self.average is not None:
            with torch.no_grad():
                for name, p in self._learning().items():
                    self.average[name].lerp_(p, 1.0 - self.optim.average)
        if self.magnet is not None and self.steps % self.loss.magnet_every == 0:
            source = self.average if self.loss.magnet_of == "average" else None
            weights = source or self._learning()
            with torch.no_grad():
                for name, frozen in self._learning(self.magnet).items():
                    self.placement.put(frozen, weights[name])

    def _policy_compute(self, minibatch: Sequence[Sample]) -> Compute:
        """The loss of a micro-batch, divided by the constant of its whole minibatch."""
        config = self.loss
        normaliser: Normaliser = config.normaliser
        divisor = denominator(
            normaliser,
            turns=count_turns(minibatch),
            tokens=count_tokens(minibatch),
            max_tokens=self.max_tokens,
        )

        def compute(batch: Batch) -> tuple[Tensor, Sums]:
            terms = self._terms(
                self.model, batch, self.temperature, self.magnet, entropy_gradient=config.entropy > 0
            )
            loss, sums = policy_loss(
                spread(terms.logprobs, batch),
                batch,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                is_cap=config.is_cap,
                normaliser=normaliser,
                denominator=divisor,
            )

            def add(name: str, weight: float, values_N: Tensor) -> Tensor:
                sums[name] = values_N.detach().sum()
                return weight * normalise(spread(values_N, batch), batch, normaliser, divisor)

            sums["entropy"] = terms.entropy.detach().sum()
            if config.entropy > 0:
                loss = loss + add("entropy", -config.entropy, terms.entropy)
            if terms.kl is not None:
                loss = loss + add("magnet_kl", config.magnet_kl, terms.kl)
            if self.reference is not None:
                with torch.no_grad():
                    reference = self._terms(self.reference, batch, self.temperature).logprobs
                loss = loss + add("reference_kl", config.reference_kl, kl_k3(terms.logprobs, reference))
            return loss, sums

        return compute

    def _sft_compute(self, minibatch: Sequence[Sample], weight: float = 1.0) -> Compute:
        divisor = float(count_tokens(minibatch)) / weight

        def compute(batch: Batch) -> tuple[Tensor, Sums]:
            terms = self._terms(self.model, batch, temperature=1.0)
            loss = sft_loss(spread(terms.logprobs, batch), batch, divisor)
            return loss, {"entropy": terms.entropy.detach().sum()}

        return compute

    def _terms(
        self,
        model: PreTrainedModel,
        batch: Batch,
        temperature: float,
        other: PreTrainedModel | None = None,
        entropy_gradient: bool = False,
    ) -> Terms:
        """`token_terms` in the learner's precision. Autocast is entered anew for every pass, because it keeps
        bf16 copies of weights that the next optimizer step makes stale.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self.placement.terms(model, batch, temperature, other, entropy_gradient)

    def _proximal(self, samples: Sequence[Sample]) -> list[Tensor]:
        """The log-probabilities before the first of several optimizer steps, one tensor per row."""
        if self.loss.proximal == "sampler":
            return [torch.tensor(s.logprobs, dtype=torch.float32) for s in samples]

        @torch.no_grad()  # in here, because each thread has a mode of its own
        def logprobs(micro: list[int]) -> Tensor:
            batch = collate([samples[i] for i in micro], self.device)
            return spread(self._terms(self.model, batch, self.temperature).logprobs, batch)

        lengths = [len(s.tokens) for s in samples]
        return self.placement.per_row(self.model, logprobs, self._microbatches(samples), lengths)

    def _microbatches(self, samples: Sequence[Sample]) -> list[list[int]]:
        lengths = [len(s.tokens) for s in samples]
        limit, lanes = self.optim.microbatch_tokens, self.placement.lanes
        if self.device.type == "cpu":
            limit = min(limit, CPU_MICROBATCH_TOKENS if lanes == 1 else CPU_SHARED_TOKENS)
        if self.device.type == "cpu" or lanes > 1:
            limit = min(limit, int(1.1 * sum(lengths) / lanes) + 1)
        return microbatches(lengths, limit, self.optim.batching == "packed")

    # Set-up

    def _adamw(self) -> torch.optim.AdamW:
        """Weight decay on matrices alone: norms and biases are left in peace."""
        matrices = [p for p in self._learning().values() if p.ndim >= 2]
        vectors = [p for p in self._learning().values() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self.optim.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups, lr=self.optim.lr, betas=self.optim.betas, eps=self.optim.eps, fused=True
        )

    def _frozen_copy(self) -> PreTrainedModel:
        # What does not learn is the same in the copy: the same tensors.
        shared: dict[int, Any] = {id(p): p for p in self.model.parameters() if not p.requires_grad}
        frozen = copy.deepcopy(self.model, shared)
        frozen.requires_grad_(False).train(False)
        if self.autocast:
            frozen.to(torch.bfloat16)  # type: ignore[arg-type]
        self.placement.spread_frozen(frozen)
        return frozen
