"""vLLM as the engine: it samples in processes of its own, with weights that we hand over.

    generate(request) -> our thread -> the policy's weights are in place -> AsyncLLM -> tokens

vLLM's client runs on an event loop in a thread of its own, so that `load` can be called from anywhere and
nothing depends on the caller's loop. vLLM holds one set of whole weights at a time; the others lie beside it
in shared memory. A request for one of those waits until nothing over the present ones is in flight, then the
weights change places. Matches between such policies therefore go in phases: all that one has to say, then all
of the other. Policies that are adapters of one base need no turns: each request names its adapter, and vLLM
decodes those of several together.

A reply that may end with its action stops after every token that could close it; where it did not, it goes on
as a new request that finds its prefix in vLLM's cache. So nothing is sampled and thrown away, and what is
recorded is exactly what was sampled.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ludus.config import EngineConfig
from ludus.engines.base import Adapter, EngineUnavailable, PolicyWeights
from ludus.engines.checks import check_pairs, check_request
from ludus.engines.low_rank import check_fits, merged
from ludus.engines.shared_weights import SharedWeights
from ludus.engines.vllm_adapters import WrittenAdapter, nothing, room_for
from ludus.engines.vllm_process import on_cpu, start, unusable
from ludus.errors import UserError
from ludus.seeding import derive
from ludus.types import Completion, Request, Stop

T = TypeVar("T")
_COLDEST = 0.01  # vLLM raises lower temperatures to this, save 0
_NAME = "vllm"  # as EngineUnavailable names the endpoint


@dataclass(slots=True, eq=False)
class _Policy:
    """One version of a policy; a newer one takes its place while requests of this one are in flight."""

    weights: SharedWeights  # its own, or those of an adapter's base
    version: int
    adapter: WrittenAdapter | None = None
    in_flight: int = 0


class VllmEngine:
    """Generates and scores with any policies of one architecture, those over the same whole weights together.

    Sampling is reproducible per request as far as vLLM makes it so: a request's random numbers depend on its
    seed and position alone, but logits depend a little on what else is in the batch, and a draw that
    falls between can go either way. On the CPU only the lower 32 bits of a seed count. Log-probabilities are
    those of the distribution sampled from.
    """

    def __init__(self, model: Path, config: EngineConfig, rank: int = 0) -> None:
        """Start vLLM for the architecture in `model`/config.json; the weights come by `load`.

        Adapters of up to `rank` are sampled from as such; those of a higher one, or any where
        engine.vllm.adapters is 0, are merged into whole weights.

        Raises UserError where vLLM is missing, does not know the model, or cannot start here.
        """
        if problem := unusable():
            raise UserError(f"engine.kind = 'vllm': {problem}")
        described: PreTrainedConfig = AutoConfig.from_pretrained(model, local_files_only=True)
        text = described.get_text_config()
        if config.context > text.max_position_embeddings:
            raise UserError(
                f"engine.context is {config.context}, but the model's max_position_embeddings is "
                f"{text.max_position_embeddings}; lower engine.context or take another model"
            )
        self.context = config.context
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self._vocab: int = text.vocab_size
        self._sleeps = config.vllm.sleep
        self._shapes, self._names = _tensors(described)
        self._policies: dict[str, _Policy] = {}
        self._resident: SharedWeights | None = None  # the whole weights that vLLM holds
        self._outdated = False  # what lies there is newer, and waits to take their place
        self._in_flight = 0  # requests over them
        self._changed = asyncio.Condition()  # of the three above
        self._asleep = False
        self._closed = False
        self._serial = count()
        self._rank = room_for(rank) if config.vllm.adapters else 0
        self._folder = TemporaryDirectory(prefix=f"ludus-adapters-{os.getpid()}-", ignore_cleanup_errors=True)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ludus-vllm", daemon=True)
        self._thread.start()
        try:
            self._llm = self._wait(start(model, config, text, self._rank, self._folder.name))
            needed = self._rank and on_cpu()
            self._nothing = self._written("", nothing(self._shapes)) if needed else None
        except BaseException:
            self._stop_loop()
            self._folder.cleanup()
            raise

    # ------------------------------------------------------------------ policies

    @property
    def versions(self) -> dict[str, int]:
        """Policy id -> version of the weights held."""
        return {name: policy.version for name, policy in self._policies.items()}

    def load(self, policy: str, weights: PolicyWeights, version: int) -> None:
        """Replace (or add) the weights of `policy`: a state dict of Hugging Face's, or an adapter's.

        The tensors are copied. vLLM takes whole weights at once where it holds those of this policy or none,
        and forgets what it has cached of prefixes. Requests in flight over them are let go on to their end
        first; those that come meanwhile wait for them, and are sampled with the new version. For an adapter
        nobody waits: it gets a name of its own in vLLM, which requests bear from now on. What its base
        becomes later does not change it.
        Raises UserError for weights that do not fit, before anything changes, and where vLLM has died.
        """
        if isinstance(weights, Adapter):
            base = self._require(weights.base)
            if base.adapter is not None:
                raise UserError(
                    f"adapter of policy {policy!r}: its base {weights.base!r} is an adapter itself; load it "
                    "over whole weights"
                )
            if weights.rank <= self._rank:
                check_fits(policy, weights, self._shapes)
                written = self._written(policy, weights) if weights.tensors else None
                self._wait(self._load_adapter(policy, _Policy(base.weights, version, written)))
                return
            weights = merged(policy, base.weights.tensors, weights)
        self._check_weights(policy, weights)
        self._wait(self._load(policy, weights, version))

    def unload(self, policy: str) -> None:
        """Forget the weights of `policy`; later requests for it raise UserError."""
        self._wait(self._unload(policy))

    def rest(self) -> None:
        """Leave the GPU to the learner, where `engine.vllm.sleep` says so, until the next `load`."""
        if self._sleeps:
            self._wait(self._rest())

    async def _load(self, policy: str, weights: Mapping[str, Tensor], version: int) -> None:
        async with self._changed:  # nobody reads what is written here
            held = self._policies.get(policy)
            sharing = [p for p in self._policies.values() if held is not None and p.weights is held.weights]
            own = held.weights if held is not None and sharing == [held] else None
            place = own or SharedWeights(self._shapes, self.dtype)
            place.write(weights)
            self._exchange(policy, _Policy(place, version))
            if self._resident in (place, None):
                self._outdated = True
                if not self._in_flight:
                    await self._put_in_place(place)
        await self._check_alive()

    async def _load_adapter(self, policy: str, new: _Policy) -> None:
        self._exchange(policy, new)
        await self._check_alive()

    async def _check_alive(self) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self._llm.check_health()
        except EngineDeadError as e:
            raise _dead() from e

    def _exchange(self, policy: str, new: _Policy | None) -> None:
        """Have `new` be what the policy is from now on, or nothing."""
        old = self._policies.pop(policy, None)
        if new is not None:
            self._policies[policy] = new
        if old is not None:
            self._tidy(old)

    def _tidy(self, held: _Policy) -> None:
        """Give back what only a version had that is neither held any more nor in flight."""
        if held.in_flight or held in self._policies.values():
            return
        if held.adapter is not None:
            held.adapter.remove()
        if all(other.weights is not held.weights for other in self._policies.values()):
            held.weights.close()
            if self._resident is held.weights:
                self._resident = None

    async def _unload(self, policy: str) -> None:
        if in_flight := self._require(policy).in_flight:
            raise RuntimeError(f"{in_flight} sequences of policy {policy!r} are in flight; await them")
        self._exchange(policy, None)

    async def _rest(self) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        async with self._changed:
            assert not self._in_flight, "nothing may be in flight while vLLM sleeps"
            try:
                await self._llm.sleep(level=2)  # the weights are dropped: they are put in place anew
            except EngineDeadError as e:
                raise _dead() from e
            self._asleep, self._resident = True, None

    def _written(self, policy: str, adapter: Adapter) -> WrittenAdapter:
        return WrittenAdapter(policy, adapter, Path(self._folder.name), self.dtype)

    def _check_weights(self, policy: str, weights: Mapping[str, Tensor]) -> None:
        missing = [name for name in self._shapes if name not in weights]
        unknown = [name for name in weights if name not in self._names and not name.endswith(".inv_freq")]
        if missing or unknown:
            found = f"missing {missing[:3]}" if missing else f"unknown {unknown[:3]}"
            raise UserError(
                f"weights of policy {policy!r} do not fit the engine's model: {found} ({len(missing)} "
                f"missing, {len(unknown)} unknown); load a model of the same configuration"
            )
        for name, shape in self._shapes.items():
            if tuple(weights[name].shape) != shape:
                raise UserError(
                    f"weights of policy {policy!r}: {name} has shape {tuple(weights[name].shape)}, but the "
                    f"engine's configuration says {shape}; load a model of the same configuration"
                )

    def _require(self, policy: str) -> _Policy:
        if policy not in self._policies:
            known = ", ".join(repr(p) for p in sorted(self._policies)) or "none"
            raise UserError(
                f"the engine holds no policy {policy!r} (loaded: {known}); load its weights first"
            )
        return self._policies[policy]

    async def _put_in_place(self, weights: SharedWeights) -> None:
        """Hand whole weights to vLLM. Called by the holder of `_changed`, with nothing in flight."""
        from vllm.v1.engine.exceptions import EngineDeadError

        self._resident = None  # until all is done
        places = [(place.name, list(place.shape), place.offset) for place in weights.places]
        dtype = str(self.dtype).removeprefix("torch.")
        try:
            if self._asleep:
                await self._llm.wake_up()
                self._asleep = False
            await self._llm.collective_rpc("receive_weights", args=(weights.path, places, dtype))
            await self._llm.reset_prefix_cache(reset_running_requests=True)
        except EngineDeadError as e:
            raise _dead() from e
        self._resident, self._outdated = weights, False

    @asynccontextmanager
    async def _in_place(self, policy: str) -> AsyncIterator[_Policy]:
        """Have vLLM hold the weights of `policy` for as long as this lasts; gives the version."""

        def ready() -> bool:
            return self._resident is self._require(policy).weights and not self._outdated

        async with self._changed:
            await self._changed.wait_for(lambda: not self._in_flight or ready())
            held = self._require(policy)
            if not ready():
                await self._put_in_place(held.weights)
            held.in_flight += 1
            self._in_flight += 1
        try:
            yield held
        finally:
            held.in_flight -= 1
            self._in_flight -= 1
            self._tidy(held)
            if not self._in_flight:  # who waits must hear of it, even if this request is cancelled just now
                await asyncio.shield(self._wake())

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    # ------------------------------------------------------------------ generation

    async def generate(self, request: Request) -> Completion:
        """Sample one completion.

        Raises UserError for an unknown policy, an empty prompt, ids outside the vocabulary, impossible
        sampling parameters, and a prompt that leaves no room for max_tokens; EngineUnavailable where vLLM's
        processes have died. Cancelling the caller ends the request.
        """
        self._require(request.policy)
        check_request(request, vocab=self._vocab, context=self.context, coldest=_COLDEST)
        return await self._hand_over(self._generate(request))

    async def score(
        self, policy: str, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Log-probability (nats, temperature 1, no filters) of each continuation token after its prompt.

        Raises UserError for an unknown policy, an empty prompt, ids outside the vocabulary, and a sequence
        beyond the context; EngineUnavailable where vLLM's processes have died.
        """
        self._require(policy)
        check_pairs(prompts, continuations, vocab=self._vocab, context=self.context)
        return await self._hand_over(self._score(policy, prompts, continuations))

    async def close(self) -> None:
        """Stop vLLM. Callers that still wait are cancelled; the engine takes no more requests."""
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._shut_down)

    async def _generate(self, request: Request) -> Completion:
        async with self._in_place(request.policy) as held:
            ids: list[int] = []
            logprobs: list[float] = []
            while True:
                more, their_logprobs = await self._sample(request, ids, held)
                ids += more
                logprobs += their_logprobs
                if (stop := _stop(request, ids)) is not None:
                    return Completion(ids, logprobs, stop, held.version)

    async def _sample(self, request: Request, ids: list[int], held: _Policy) -> tuple[list[int], list[float]]:
        """Go on behind `ids` up to the next token that may end the reply, or to its limit."""
        sampling, stop = request.sampling, request.stop
        output = await self._ask(
            held,
            [*request.prompt_ids, *ids],
            _parameters(
                max_tokens=sampling.max_tokens - len(ids),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=derive(request.seed, len(ids)) if ids else request.seed,
                stop_token_ids=sorted(stop.ids | stop.triggers),
                logprobs=0,
            ),
        )
        found = output.outputs[0]
        sampled, logprobs = list(found.token_ids), [float(x) for x in found.logprobs.logprobs]
        if not all(map(isfinite, logprobs)):
            raise FloatingPointError(f"policy {request.policy!r} gave logits that are not finite")
        if sampling.temperature == 0:
            logprobs = [0.0] * len(sampled)  # what was sampled was certain
        return sampled, logprobs

    async def _score(
        self, policy: str, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        async with self._in_place(policy) as held:
            return await asyncio.gather(*map(partial(self._score_one, held), prompts, continuations))

    async def _score_one(
        self, held: _Policy, prompt: Sequence[int], continuation: Sequence[int]
    ) -> list[float]:
        """The last token is not read but asked for, as one of those that might come next."""
        if not continuation:
            return []
        *read, last = [*prompt, *continuation]
        output = await self._ask(
            held,
            read,
            _parameters(
                max_tokens=1,
                temperature=0.0,
                logprob_token_ids=[last],
                prompt_logprobs=0 if len(continuation) > 1 else None,
            ),
        )
        scores = [] if len(continuation) == 1 else list(output.prompt_logprobs.logprobs)[len(prompt) - 1 :]
        final = output.outputs[0].logprobs
        return [*map(float, scores), float(final.logprobs[final.token_ids.index(last)])]

    async def _ask(self, held: _Policy, prompt: list[int], sampling: Any) -> Any:
        """One request to vLLM; its only output. Raises EngineUnavailable."""
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        output = None
        adapter = held.adapter or self._nothing
        lora = None if adapter is None else adapter.request
        try:
            name = str(next(self._serial))
            outputs = self._llm.generate(tokens_input(prompt), sampling, name, lora_request=lora)
            async for output in outputs:  # noqa: B007
                pass
        except EngineDeadError as e:
            raise EngineUnavailable(_NAME, "died") from e
        assert output is not None
        reason = output.outputs[0].finish_reason
        if reason not in ("stop", "length"):
            raise EngineUnavailable(_NAME, str(reason))
        return output

    # ------------------------------------------------------------------ the thread

    async def _hand_over(self, work: Coroutine[Any, Any, T]) -> T:
        """Do the work on our own loop while the caller's goes on; cancelling the caller cancels it."""
        return await asyncio.wrap_future(self._submit(work))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return self._submit(work).result()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self._closed:
            work.close()
            raise RuntimeError("the engine is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _shut_down(self) -> None:
        self._cancel_all()  # requests, whose callers learn of it, and vLLM's own tasks
        self._llm.shutdown()
        del self._llm  # while vLLM's modules are still there for its __del__
        self._stop_loop()
        for policy in self._policies.values():
            policy.weights.close()
        self._folder.cleanup()

    def _cancel_all(self) -> None:
        async def cancel() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(cancel(), self._loop).result()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _parameters(**given: Any) -> Any:
    """vLLM's SamplingParams: no ends but those that are given, no text, and one answer at the end."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    kind = RequestOutputKind.FINAL_ONLY
    return SamplingParams(ignore_eos=True, detokenize=False, flat_logprobs=True, output_kind=kind, **given)


def _tensors(config: PreTrainedConfig) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Shapes of the model's weights by name, shared ones once; and every name that its state dict has."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return {name: tuple(p.shape) for name, p in model.named_parameters()}, set(model.state_dict())


def _stop(request: Request, ids: list[int]) -> Stop | None:
    """Why a reply is over, or None. A completed action outranks the limit."""
    rule = request.stop
    if ids[-1] in rule.ids:
        return Stop.EOS
    if ids[-1] in rule.triggers and rule.closed is not None and rule.closed(ids):
        return Stop.ACTION
    return Stop.LENGTH if len(ids) == request.sampling.max_tokens else None


def _dead() -> UserError:
    return UserError(
        "vLLM's processes have died; what they wrote above may say why. Nothing is lost: go on from the last "
        "checkpoint with --resume"
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
