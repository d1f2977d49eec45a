"""The state of every row on the device, so that one decode step costs one transfer to the host.

Shapes: R rows of the engine, N rows of one draw, V vocabulary.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ludus.engines.sampling import Knobs, sample, uniform_bits
from ludus.engines.shelf import Kept
from ludus.engines.weights import Weights
from ludus.types import Completion, Request, StopRule

EOS, TRIGGER, LIMIT, BROKEN = 1, 2, 4, 8  # bits of a draw's code: why a row needs the host's attention
_RULES_KEPT = 32  # distinct stop rules that there is always room for


@dataclass(slots=True, eq=False)
class Running:
    """One request on its way, as the host sees it."""

    request: Request
    future: asyncio.Future[Completion]
    serial: int  # order of arrival
    row: int = -1
    weights: Weights | None = None  # those that sample it, from its prompt to its end; None: it still waits
    admitted: int = -1  # the engine's clock when it was prefilled; -1: not yet
    kept: Kept | None = None  # what its dialogue's last turn left for it, until it is prefilled
    digest: int = field(init=False)  # of the prompt

    def __post_init__(self) -> None:
        self.digest = hash(tuple(self.request.prompt_ids))

    @property
    def kin(self) -> Weights | None:
        return self.weights

    @property
    def version(self) -> int:
        return -1 if self.weights is None else self.weights.version

    @property
    def policy(self) -> str:
        return self.request.policy

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def fresh(self) -> int:
        """Tokens of the prompt that have to be computed."""
        return self.prompt_length - (0 if self.kept is None else len(self.kept.tokens))

    @property
    def alike(self) -> int:
        """The same for requests that begin with equal prompts; their own for those that a dialogue left
        something."""
        return self.serial if self.kept is not None else self.digest

    @property
    def plain(self) -> bool:
        sampling = self.request.sampling
        return sampling.temperature == 1.0 and not self.filtered

    @property
    def filtered(self) -> bool:
        sampling = self.request.sampling
        return sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1.0)


class Rows:
    """Per-row tensors. A row that is not alive is computed along and ignored; its position stands still."""

    def __init__(self, slots: int, context: int, vocab: int, device: torch.device) -> None:
        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.token = integers(slots)  # the newest token, not yet in the cache
        self.position = integers(slots)  # where the newest token belongs
        self._count = integers(slots)  # tokens sampled
        self._limit = integers(slots)  # max_tokens
        self._alive = integers(slots)
        self._seed = integers(slots)
        self._rule = integers(slots)  # index into the stop table
        self._top_k = integers(slots)
        self._top_p = torch.ones(slots, device=device)
        self._temperature = torch.ones(slots, device=device)
        self._ids = integers(slots, context)
        self._logprobs = torch.zeros(slots, context, device=device)
        self._vocab, self._device = vocab, device
        self._rules: dict[tuple[frozenset[int], frozenset[int]], int] = {}
        self.table = 0  # the number of the stop table: how many there were before it
        self._stops = self._new_stops(_RULES_KEPT)
        self.plain, self.filtered = True, False  # of all rows in use: see Knobs

    def admit(self, arrivals: Sequence[Running], rows: Tensor) -> None:
        """Set the rows [N] of new sequences, before their first draw."""
        facts = [
            (
                running.prompt_length - 1,
                running.request.sampling.max_tokens,
                running.request.seed,
                self._rule_of(running.request.stop),
                running.request.sampling.top_k,
            )
            for running in arrivals
        ]
        position, limit, seed, rule, top_k = torch.tensor(facts, device=self._device).unbind(1)
        knobs = [(r.request.sampling.temperature, r.request.sampling.top_p) for r in arrivals]
        temperature, top_p = torch.tensor(knobs, dtype=torch.float32, device=self._device).unbind(1)
        self.position[rows] = position
        self._limit[rows] = limit
        self._seed[rows] = seed
        self._rule[rows] = rule
        self._top_k[rows] = top_k
        self._temperature[rows] = temperature
        self._top_p[rows] = top_p
        self._count[rows] = 0
        self._alive[rows] = 1

    def note(self, tenants: Sequence[Running | None]) -> None:
        """See which shortcuts hold for all rows in use."""
        live = [running for running in tenants if running is not None]
        self.plain = all(running.plain for running in live)
        self.filtered = any(running.filtered for running in live)
        if not live and len(self._rules) > _RULES_KEPT:
            self._rules.clear()
            self._stops = self._new_stops(_RULES_KEPT)
            self.table += 1

    def draw(self, logits: Tensor, rows: Tensor | slice) -> list[int]:
        """Sample the next token of some rows from logits [N, V]; a code per row, 0 = nothing to see."""
        codes: list[int] = self.advance(logits, rows).tolist()
        return codes

    def advance(self, logits: Tensor, rows: Tensor | slice) -> Tensor:
        """`draw`, whose codes [N] stay on the device. Rows that are not alive may be named more than once."""
        count = self._count[rows].clone()  # it moves on below
        knobs = Knobs(
            self._temperature[rows], self._top_k[rows], self._top_p[rows], self.plain, self.filtered
        )
        token, logprob = sample(logits, uniform_bits(self._seed[rows], count), knobs)
        where = (
            torch.arange(*rows.indices(len(self.token)), device=self._device)
            if isinstance(rows, slice)
            else rows
        )
        self._ids[where, count] = token
        self._logprobs[where, count] = logprob
        alive = self._alive[rows]
        self.token[rows] = token
        self.position[rows] += alive
        self._count[rows] += alive
        code = self._stops[self._rule[rows], token].long()
        code += (self._count[rows] >= self._limit[rows]) * LIMIT
        code += ~logprob.isfinite() * BROKEN
        return code

    def sampled(self, rows: Sequence[int], counts: Sequence[int]) -> list[tuple[list[int], list[float]]]:
        """Ids and log-probabilities sampled so far in some rows, fetched together."""
        index, longest = torch.tensor(rows, device=self._device), max(counts)
        ids = self._ids[index, :longest].tolist()
        logprobs = self._logprobs[index, :longest].tolist()
        return [(i[:count], p[:count]) for i, p, count in zip(ids, logprobs, counts, strict=True)]

    def retire(self, rows: Sequence[int]) -> None:
        self._alive[torch.tensor(rows, device=self._device)] = 0

    def move(self, old: Tensor, new: Tensor) -> None:
        """Copy the state of rows `old` to rows `new`, as if all at once."""
        for state in (
            self.token,
            self.position,
            self._count,
            self._limit,
            self._alive,
            self._seed,
            self._rule,
            self._top_k,
            self._top_p,
            self._temperature,
            self._ids,
            self._logprobs,
        ):
            state[new] = state[old]

    def _rule_of(self, stop: StopRule) -> int:
        key = (stop.ids, stop.triggers)
        if key not in self._rules:
            row = torch.zeros(self._vocab, dtype=torch.uint8)
            row[sorted(stop.triggers)] |= TRIGGER
            row[sorted(stop.ids)] |= EOS
            number = self._rules[key] = len(self._rules)
            if number == len(self._stops):
                self._stops = torch.cat([self._stops, self._new_stops(number)])
                self.table += 1
            self._stops[number] = row.to(self._device)
        return self._rules[key]

    def _new_stops(self, rules: int) -> Tensor:
        """A table [rules, V] of EOS | TRIGGER."""
        return torch.zeros(rules, self._vocab, dtype=torch.uint8, device=self._device)
