"""The in-process engine: one KV cache with slots that refill as sequences end.

    generate(request) -> waiting -> prefill (chunks of similar lengths) -> a row -> decode, ... -> future

Callers await one request each. A driver task steps the engine while there is work and yields to the event
loop between steps, so a match that gets its reply asks its next question while others decode: no barrier.
The same requests in the same order give the same results bit for bit; there is no clock and no set in the
way. Policies with weights of their own share the rows: each step runs one forward pass per set of weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ludus.engines.base import Adapter, PolicyWeights
from ludus.engines.checks import check_pairs, check_request
from ludus.engines.decoder import Attention, Cache, Decoder
from ludus.engines.graphs import CudaCapture, Graphs
from ludus.engines.rows import BROKEN, EOS, LIMIT, TRIGGER, Rows, Running
from ludus.engines.shelf import Kept, Shelf
from ludus.engines.slots import Slots
from ludus.engines.weights import Architecture, Weights
from ludus.errors import UserError
from ludus.memory import within_memory
from ludus.types import Completion, Request, Stop, StopRule

Precision = Literal["highest", "high", "medium"]
_PATIENCE = 8  # steps that a request waits for company before it is prefilled in a smaller chunk
_COLDEST = 1e-4  # lower temperatures overflow float32 logits
_SCORE_POSITIONS = 4096  # continuation tokens whose logits are held at once


class TorchEngine:
    """Generates and scores with any number of policies of one architecture: Qwen3, Qwen2, Llama, Gemma 3.

    `slots` rows are decoded together, each of at most `context` tokens (prompt and reply): the cache holds
    slots * context * layers * 2 * kv_heads * head_dim numbers of `dtype`. `prefill_batch` prompts of similar
    lengths are prefilled together, equal ones once.

    Replies of a dialogue leave their keys and values for its next turn, `keep` tokens of them in all at most;
    None is half of what the cache holds. Memory is taken as they come. Where there is no room, the next turn
    of a dialogue is computed from its beginning.

    `matmul` is the precision of float32 products: "highest" is exact; "medium" multiplies in bfloat16 where
    the hardware can, and log-probabilities then differ from an exact recomputation by some 1e-2. It holds
    inside the engine's own steps only, and so do `threads`, the CPU threads of a product (0: torch's own
    number; a model of a few hundred thousand parameters is fastest on 1). `attention` is chosen for the
    device when None, and so are `graphs`: decode steps recorded as CUDA graphs, on CUDA. On other devices
    True takes the same static steps without recording them.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        slots: int,
        context: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        matmul: Precision = "highest",
        attention: Attention | None = None,
        prefill_batch: int = 8,
        keep: int | None = None,
        threads: int = 0,
        graphs: bool | None = None,
    ) -> None:
        """Raises UserError for an architecture that the engine cannot run or a context beyond the model's."""
        for name, value in (("slots", slots), ("context", context), ("prefill_batch", prefill_batch)):
            if value < 1:
                raise UserError(f"engine.{name} is {value}; it must be at least 1")
        self.arch = Architecture.of(config)
        if context > config.max_position_embeddings:
            raise UserError(
                f"engine.context is {context}, but the model's max_position_embeddings is "
                f"{config.max_position_embeddings}; lower engine.context or take another model"
            )
        self.device = torch.device(device)
        self.dtype = dtype
        self.context = context
        self.matmul = matmul
        self.threads = threads
        if attention is None:
            attention = "bmm" if self.device.type == "cpu" else "sdpa"
        if graphs is None:
            graphs = self.device.type == "cuda"
        ropes = self.arch.rope_tables(config, context, dtype, self.device)
        self._decoder = Decoder(self.arch, ropes, attention)
        self._less = f"lower engine.slots (now {slots}) or engine.context (now {context})"
        with within_memory("for the sampling engine's cache", self._less):
            spare = int(graphs)  # a row for what a static step computes in vain
            self._cache = Cache(self.arch, slots + spare, context, dtype, self.device, few_spans=graphs)
            self._rows = Rows(slots + spare, context, self.arch.vocab, self.device)
        capture = CudaCapture(self.device) if graphs and self.device.type == "cuda" else None
        self._graphs = Graphs(self._decoder, self._cache, self._rows, capture) if graphs else None
        self._slots: Slots[Running] = Slots(slots)
        self._shelf = Shelf(slots * context // 2 if keep is None else keep)
        self._chunk = min(prefill_batch, slots)
        self._weights: dict[str, Weights] = {}
        # Those before them, once replaced in flight: the next ones go there, where they find their graphs.
        self._resting: dict[str, Weights] = {}
        self._finished: list[tuple[Running, Completion]] = []  # not told to their callers yet
        self._waiting: list[Running] = []
        self._patience = _PATIENCE
        self._clock = 0  # decode steps so far
        self._reach = 0  # no live row holds more positions than this
        self._serial = 0
        self._driver: asyncio.Task[None] | None = None
        self._closed = False

    @staticmethod
    def from_model(
        model: PreTrainedModel, policy: str = "self", version: int = 0, **options: Any
    ) -> TorchEngine:
        """An engine for a Hugging Face model, with its weights loaded; options as for the constructor."""
        engine = TorchEngine(model.config, **options)
        engine.load(policy, model.state_dict(), version)
        return engine

    # ------------------------------------------------------------------ policies

    @property
    def versions(self) -> dict[str, int]:
        """Policy id -> version of the weights held."""
        return {policy: weights.version for policy, weights in self._weights.items()}

    def load(self, policy: str, weights: PolicyWeights, version: int) -> None:
        """Replace (or add) the weights of `policy`: a state dict of Hugging Face's, or an adapter's.

        The tensors are copied; but an adapter shares its base's, and keeps them should the base be replaced.
        Sequences in flight go on with the weights that they began with, for their cached keys and values
        belong to those: until the last of them ends both sets are in memory (with graphs until `unload`, and
        then the two take turns), and each step runs a forward pass for either. Requests that still wait for
        a row are sampled with, and stamped by, the new version.
        Raises UserError for weights that do not fit, before anything changes.
        """
        held = self._weights.get(policy)
        idle = [w for w in (held, self._resting.get(policy)) if w is not None and not self._in_flight(w)]
        room = idle[0] if idle else None
        if isinstance(weights, Adapter):
            made = self._require(weights.base).adapted(policy, weights, version)
            if room is None or not room.take(made):
                room = made
        else:
            if room is None or room.lent:
                fewer = f"{self._less}, or league.resident, or set engine.dtype = 'bfloat16'"
                with within_memory(f"for the weights of policy {policy!r} in the sampling engine", fewer):
                    room = Weights(self.arch, self.dtype, self.device)
            room.load_state_dict(policy, weights, version)
        if self._graphs is not None and held is not None and self._in_flight(held):
            self._resting[policy] = held
        self._weights[policy] = room
        self._forget(policy)

    def lend(self, policy: str) -> dict[str, Tensor]:
        """The policy's own tensors by Hugging Face's names, for others to read; not those that are held in
        another form. They stay as they are from now on, whatever is loaded."""
        return self._require(policy).lend()

    def unload(self, policy: str) -> None:
        """Free the weights of `policy`; later requests for it raise UserError."""
        in_flight = sum(row is not None and row.policy == policy for row in self._slots.rows)
        if in_flight:
            raise RuntimeError(f"{in_flight} sequences of policy {policy!r} are in flight; await them first")
        self._require(policy)
        if any(running.policy == policy for running in self._waiting):
            raise RuntimeError(f"policy {policy!r} still has requests waiting; await them before unload")
        self._forget(policy)
        del self._weights[policy]
        self._resting.pop(policy, None)
        self._slots.forget(self._weights.values())

    def _forget(self, policy: str) -> None:
        """What dialogues left is not of the weights that `policy` has from now on."""
        self._shelf.forget(policy)
        for running in self._waiting:
            if running.policy == policy:
                running.kept = None

    def rest(self) -> None:
        """Nothing: rows, cache and weights stay where they are, beside the learner."""

    def _in_flight(self, weights: Weights) -> bool:
        return any(row is not None and row.weights is weights for row in self._slots.rows)

    def _require(self, policy: str) -> Weights:
        if policy not in self._weights:
            known = ", ".join(repr(p) for p in sorted(self._weights)) or "none"
            raise UserError(
                f"the engine holds no policy {policy!r} (loaded: {known}); load its weights first"
            )
        return self._weights[policy]

    # ------------------------------------------------------------------ generation

    async def generate(self, request: Request) -> Completion:
        """Sample one completion.

        Raises UserError for an unknown policy, an empty prompt, ids outside the vocabulary, impossible
        sampling parameters, and a prompt that leaves no room for max_tokens. Whatever else goes
        wrong in a step is raised to every caller that waits. Cancelling the caller frees its row.
        """
        if self._closed:
            raise RuntimeError("the engine is closed")
        weights = self._require(request.policy)
        check_request(request, vocab=self.arch.vocab, context=self.context, coldest=_COLDEST)
        loop = asyncio.get_running_loop()
        if self._driver is not None and self._driver.get_loop() is not loop:
            self._abandon()  # an earlier event loop ended in the middle of its work
        running = Running(request, loop.create_future(), self._serial)
        if request.dialogue is not None:
            running.kept = self._shelf.find(request.dialogue, weights, request.prompt_ids)
        self._serial += 1
        self._waiting.append(running)
        if self._driver is None:
            self._start()
        try:
            return await running.future
        except asyncio.CancelledError:
            self._withdraw(running)
            raise

    async def close(self) -> None:
        """Stop. Callers that still wait are cancelled; the engine takes no more requests."""
        self._closed = True
        if self._driver is not None:
            self._driver.cancel()
            await asyncio.wait([self._driver])

    def _start(self) -> None:
        self._driver = asyncio.get_running_loop().create_task(self._drive())
        self._driver.add_done_callback(self._stopped)

    async def _drive(self) -> None:
        while self._waiting or self._slots.live:
            await asyncio.sleep(0)  # whoever got a reply, or has just started, asks before the next step
            try:
                self._step()
            finally:  # what ended before a step failed has ended all the same
                finished, self._finished = self._finished, []
                for running, completion in sorted(finished, key=lambda pair: pair[0].serial):
                    if not running.future.done():
                        running.future.set_result(completion)
        self._slots.forget(self._weights.values())

    def _stopped(self, driver: asyncio.Task[None]) -> None:
        self._driver = None
        if driver.cancelled():
            for running in self._abandon():
                running.future.cancel()
        elif (error := driver.exception()) is not None:
            for running in self._abandon():
                if not running.future.done():
                    running.future.set_exception(error)
        elif self._waiting:  # asked between the driver's last look and now
            self._start()

    def _abandon(self) -> list[Running]:
        """Forget all work; who waited for it, oldest first."""
        left = [running for running in self._slots.rows if running is not None] + self._waiting
        self._waiting = []
        self._slots.clear()
        self._shelf.clear()
        self._cache.wipe()
        self._driver = None
        return sorted(left, key=lambda running: running.serial)

    def _withdraw(self, running: Running) -> None:
        if running in self._waiting:
            self._waiting.remove(running)
        elif running in self._slots.rows:
            self._slots.free(running)
            self._rows.retire([running.row])

    # ------------------------------------------------------------------ one step

    def _step(self) -> None:
        """Fill free rows, then sample one token for every live row."""
        with self._working("while sampling"):
            while chunk := self._admit():
                self._prefill(chunk)
            if self._slots.live:
                self._decode()
            else:
                self._arrange([], 0)

    @contextmanager
    def _working(self, doing: str) -> Iterator[None]:
        with (
            within_memory(doing, self._less),
            torch.inference_mode(),
            _settings(self.matmul, self.threads),
        ):
            yield

    def _admit(self) -> list[Running]:
        """The next chunk to prefill: the oldest request and those of its policy nearest in work, so many
        prompts, and all that are equal to one of them.

        Empty while too few wait or fit: a small chunk costs nearly as much as a full one, and an empty row
        little.
        """
        free = self._slots.size - self._slots.live
        possible = min(free, len(self._waiting))
        if not possible:
            self._patience = _PATIENCE
            return []
        if possible < self._chunk and self._slots.live and self._patience > 0:
            self._patience -= 1
            return []
        oldest = self._waiting[0]
        company = [
            running
            for running in self._waiting
            if running.policy == oldest.policy and (running.kept is None) == (oldest.kept is None)
        ]
        company.sort(key=lambda running: (abs(running.fresh - oldest.fresh), running.serial))
        chunk: list[Running] = []
        prompts: set[int] = set()
        for running in company:
            if len(chunk) < free and (running.alike in prompts or len(prompts) < self._chunk):
                chunk.append(running)
                prompts.add(running.alike)
        taken = {running.serial for running in chunk}
        self._waiting = [running for running in self._waiting if running.serial not in taken]
        self._patience = _PATIENCE
        return chunk

    def _prefill(self, chunk: list[Running]) -> None:
        weights = self._require(chunk[0].policy)
        longest = max(running.prompt_length for running in chunk)
        for running in chunk:
            running.weights = weights
        self._arrange(chunk, longest)
        for running in chunk:
            running.admitted = self._clock
        rows = torch.tensor([running.row for running in chunk], device=self.device)
        self._rows.admit(chunk, rows)
        take = self._begin if chunk[0].kept is None else self._extend
        logits = take(weights, chunk, rows)
        self._settle(self._rows.draw(logits, rows), chunk)

    def _begin(self, weights: Weights, chunk: list[Running], rows: Tensor) -> Tensor:
        """Whole prompts into rows [N], equal ones computed once; logits [N, V] after their last tokens."""
        places: dict[tuple[int, ...], int] = {}
        which = [places.setdefault(tuple(running.request.prompt_ids), len(places)) for running in chunk]
        longest = max(map(len, places))
        ids = torch.zeros(len(places), longest, dtype=torch.int64)
        for prompt, i in places.items():
            ids[i, : len(prompt)] = torch.tensor(prompt)
        last = torch.tensor([len(prompt) - 1 for prompt in places], device=self.device)
        firsts = [which.index(i) for i in range(len(places))]
        logits = self._decoder.prefill(weights, ids.to(self.device), last, self._cache, rows[firsts])
        if len(places) == len(chunk):
            return logits
        others = [i for i in range(len(chunk)) if i != firsts[which[i]]]
        self._cache.move(rows[[firsts[which[i]] for i in others]], rows[others], longest)
        return logits[which]

    def _extend(self, weights: Weights, chunk: list[Running], rows: Tensor) -> Tensor:
        """The same where prompts begin with what their dialogues left: the rest of each is computed."""
        starts = [running.prompt_length - running.fresh for running in chunk]
        for running in chunk:
            assert running.kept is not None
            assert running.request.dialogue is not None
            self._cache.put(running.row, running.kept.caches)
            running.kept = None
            self._shelf.drop(running.request.dialogue)
        ids = [list(r.request.prompt_ids[start:]) for r, start in zip(chunk, starts, strict=True)]
        return self._decoder.extend(weights, ids, starts, self._cache, rows)

    def _decode(self) -> None:
        if self._slots.holes and (not self._waiting or self._slots.holes * 8 > self._slots.live):
            self._arrange([], 0)
        self._clock += 1
        self._reach += 1
        self._cache.reserve(self._reach, len(self._slots.rows))
        if self._graphs is not None:
            codes = self._graphs.step(self._slots.segments)
        else:
            parts = [self._logits(*segment) for segment in self._slots.segments]
            logits = parts[0] if len(parts) == 1 else torch.cat(parts)
            codes = self._rows.draw(logits, slice(0, len(logits)))
        self._settle(codes, self._slots.rows)

    def _logits(self, weights: Weights, first: int, end: int) -> Tensor:
        """Logits [N, V] after the newest tokens of rows [first, end)."""
        read, rows = slice(first, end), torch.arange(first, end, device=self.device)
        token, position = self._rows.token[read], self._rows.position[read]
        return self._decoder.decode(weights, token, position, self._cache, rows, read)

    def _arrange(self, arrivals: list[Running], positions: int) -> None:
        """Close the holes, seat the arrivals, and make room for `positions` per row."""
        moves = self._slots.arrange(arrivals)
        self._rows.note(self._slots.rows)
        filled = [
            running.prompt_length + self._clock - running.admitted
            for running in self._slots.rows
            if running is not None and running.admitted >= 0
        ]
        if moves:
            old, new = (torch.tensor(side, device=self.device) for side in zip(*moves, strict=True))
            self._cache.move(old, new, max(filled))
            self._rows.move(old, new)
        self._reach = max([*filled, positions])
        self._cache.reserve(self._reach, len(self._slots.rows))

    def _settle(self, codes: list[int], tenants: Sequence[Running | None]) -> None:
        """Turn the codes of a draw into completions, and free the rows of what has ended."""
        noticed = [
            (running, code)
            for running, code in zip(tenants, codes, strict=True)
            if code and running is not None
        ]
        if not noticed:
            return
        for running, code in noticed:
            if code & BROKEN:
                raise FloatingPointError(
                    f"policy {running.policy!r} (version {running.version}) gave logits that are not finite"
                )
        counts = [1 + self._clock - running.admitted for running, _ in noticed]
        sampled = self._rows.sampled([running.row for running, _ in noticed], counts)
        finished = [
            (running, Completion(ids, logprobs, stop, running.version))
            for (running, code), (ids, logprobs) in zip(noticed, sampled, strict=True)
            if (stop := _stop(running.request.stop, code, ids)) is not None
        ]
        if finished:
            for running, completion in finished:
                self._keep(running, completion)
                self._slots.free(running)
            self._rows.retire([running.row for running, _ in finished])
            self._finished += finished

    def _keep(self, running: Running, completion: Completion) -> None:
        """Put aside what the next turn of its dialogue begins with. The newest token is in no cache yet."""
        request = running.request
        weights = self._weights.get(request.policy)
        if request.dialogue is None or weights is None or weights is not running.weights:
            return
        tokens = [*request.prompt_ids, *completion.ids[:-1]]
        if self._shelf.fits(request.dialogue, len(tokens)):
            caches = self._cache.copy(running.row, len(tokens))
            self._shelf.put(request.dialogue, Kept(request.policy, weights, tokens, caches))

    # ------------------------------------------------------------------ scoring

    async def score(
        self, policy: str, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Log-probability (nats, temperature 1, no filters) of each continuation token after its prompt.

        Runs at once, without the cache and without waiting for what is being generated. Raises UserError for
        an unknown policy, an empty prompt, ids outside the vocabulary, and a sequence beyond the context.
        """
        weights = self._require(policy)
        check_pairs(prompts, continuations, vocab=self.arch.vocab, context=self.context)
        scores: list[list[float]] = [[] for _ in prompts]
        todo = [i for i in range(len(prompts)) if continuations[i]]
        todo.sort(key=lambda i: len(prompts[i]) + len(continuations[i]))  # little padding within a chunk
        with self._working("while scoring"):
            for at in range(0, len(todo), self._chunk):
                chunk = todo[at : at + self._chunk]
                found = self._score([(prompts[i], continuations[i]) for i in chunk], weights)
                for i, logprobs in zip(chunk, found, strict=True):
                    scores[i] = logprobs
        return scores

    def _score(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], weights: Weights
    ) -> list[list[float]]:
        # The last token of a continuation is predicted and never read.
        sequences = [[*prompt, *continuation[:-1]] for prompt, continuation in pairs]
        width = max(map(len, sequences))
        ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences], device=self.device)
        reads = [
            row * width + position
            for row, (prompt, continuation) in enumerate(pairs)
            for position in range(len(prompt) - 1, len(prompt) + len(continuation) - 1)
        ]
        hidden = self._decoder.hidden(weights, ids, torch.tensor(reads, device=self.device))
        targets = torch.tensor([t for _, continuation in pairs for t in continuation], device=self.device)
        flat: list[float] = []
        for at in range(0, len(reads), _SCORE_POSITIONS):
            part = slice(at, at + _SCORE_POSITIONS)
            logprobs = self._decoder.logits(weights, hidden[part]).float().log_softmax(-1)
            flat += logprobs.gather(1, targets[part, None])[:, 0].tolist()
        ends = list(accumulate(len(continuation) for _, continuation in pairs))
        return [flat[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _stop(rule: StopRule, code: int, ids: list[int]) -> Stop | None:
    """Why a completion with this code is over, or None. A completed action outranks the limit."""
    if code & EOS:
        return Stop.EOS
    if code & TRIGGER and rule.closed is not None and rule.closed(ids):
        return Stop.ACTION
    return Stop.LENGTH if code & LIMIT else None


@contextmanager
def _settings(matmul: Precision, threads: int) -> Iterator[None]:
    """Precision of float32 products and CPU threads in this block only: torch's own settings are global."""
    before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision(matmul)
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        if threads:
            torch.set_num_threads(before[1])
