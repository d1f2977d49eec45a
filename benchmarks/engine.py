"""How fast the engines sample, against `model.generate` on the same work.

    taskset -c 0,1 python benchmarks/engine.py --threads 2 [--size 30m --sequences 64 --batches 64]
    taskset -c 0,1 .venv-vllm/bin/python benchmarks/engine.py --threads 2 --vllm  # see `make test-vllm`

The work: a Qwen3 model of about 1M or 30M random parameters, 256 prompts of 120 to 180 tokens, replies that
end after 8 to 32 tokens (a random limit per request stands for the end-of-turn token), temperature 1, with
the log-probability of every sampled token. Only tokens up to a reply's own limit count as useful, for
everybody. vLLM samples through our engine for it, with and without compiling the model; its processes stand
still in the rounds of the others.

`model.generate` gets its prompts sorted by length (left-padded, little padding) and runs each batch until its
last row is done. Everybody runs at each batch size and in each precision; the best time of several rounds
counts, rounds of the contestants alternating, because a shared machine is noisy. How threads wait for one
another matters more than anything else here: OMP_WAIT_POLICY=PASSIVE halves the engine's speed on idle cores,
and spinning (the default) ruins everybody's on busy ones.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from ludus.config import EngineConfig, VllmConfig
from ludus.engines.base import Engine
from ludus.engines.torch_engine import Precision, TorchEngine
from ludus.engines.vllm_engine import VllmEngine
from ludus.types import Request, Sampling, StopRule

VOCAB = 512
Round = Callable[[], float]  # does the whole work once; seconds


@dataclass(frozen=True, slots=True)
class Work:
    """Prompts and how many tokens each reply has."""

    prompts: list[list[int]]
    limits: list[int]

    @property
    def useful(self) -> int:
        return sum(self.limits)


SIZES = {
    "1m": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 32},
    "30m": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 9, "head_dim": 64},
}


def make_model(size: str) -> Qwen3ForCausalLM:
    """Random weights."""
    torch.manual_seed(0)
    sizes = SIZES[size]
    heads = sizes["hidden_size"] // sizes["head_dim"]
    config = Qwen3Config(
        vocab_size=VOCAB,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **sizes,
    )
    return Qwen3ForCausalLM(config).eval()


def make_work(
    sequences: int,
    vocabulary: int = VOCAB,
    prompt: tuple[int, int] = (120, 180),
    reply: tuple[int, int] = (8, 32),
) -> Work:
    """Random prompts; `prompt` and `reply` are the shortest and the longest, in tokens."""
    rng = random.Random(0)
    prompts = [[rng.randrange(2, vocabulary) for _ in range(rng.randint(*prompt))] for _ in range(sequences)]
    return Work(prompts, [rng.randint(*reply) for _ in prompts])


def run_engine(engine: Engine, work: Work) -> None:
    """All requests at once; the engine batches and refills."""
    stop = StopRule(ids=frozenset())

    async def everything() -> None:
        completions = await asyncio.gather(
            *(
                engine.generate(Request("self", prompt, i, Sampling(limit), stop))
                for i, (prompt, limit) in enumerate(zip(work.prompts, work.limits, strict=True))
            )
        )
        assert sum(len(c.logprobs) for c in completions) == work.useful

    asyncio.run(everything())


def run_generate(model: Qwen3ForCausalLM, work: Work, batch: int, logprobs: bool = True) -> None:
    """`model.generate` over batches of similar prompt lengths, with log-probabilities of what was sampled.

    Without `logprobs` it need not keep the logits of all steps, which at a large vocabulary fill a GPU.
    """
    order = sorted(range(len(work.prompts)), key=lambda i: len(work.prompts[i]))
    counted = 0
    for at in range(0, len(order), batch):
        members = order[at : at + batch]
        width = max(len(work.prompts[i]) for i in members)
        ids = torch.zeros(len(members), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(members):
            ids[row, width - len(work.prompts[i]) :] = torch.tensor(work.prompts[i])
            mask[row, width - len(work.prompts[i]) :] = 1
        with torch.inference_mode():
            out = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max(work.limits[i] for i in members),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=0,
                eos_token_id=None,
                output_logits=logprobs,
                return_dict_in_generate=True,
            )
            chosen = out.sequences[:, width:].tolist()
            if logprobs:
                every = torch.stack(out.logits, 1).float().log_softmax(-1)
                chosen = every.gather(2, out.sequences[:, width:, None])[..., 0].tolist()
        counted += sum(len(row[: work.limits[i]]) for row, i in zip(chosen, members, strict=True))
    assert counted == work.useful


def contestants(work: Work, size: str, batches: list[int], context: int) -> dict[str, Round]:
    """Name -> one round of the whole work."""
    found: dict[str, Round] = {}
    settings: list[tuple[str, torch.dtype, Precision]] = [
        ("fp32", torch.float32, "highest"),
        ("fp32-medium", torch.float32, "medium"),
        ("bf16", torch.bfloat16, "highest"),
    ]
    for label, dtype, matmul in settings:
        for batch in batches:
            engine = TorchEngine.from_model(
                make_model(size), slots=batch, context=context, dtype=dtype, matmul=matmul
            )
            found[f"engine {label} x{batch}"] = timed(partial(run_engine, engine, work))
        if matmul == "highest":
            model = make_model(size).to(dtype)
            for batch in batches:
                found[f"generate {label} x{batch}"] = timed(partial(run_generate, model, work, batch))
    return found


def measure(rounds: dict[str, Round], repeats: int, useful: int) -> dict[str, float]:
    """Useful tokens per second by name: the best of `repeats` rounds after one to warm up."""
    best: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for name, once in rounds.items():
            speed = useful / once()
            if repeat:
                best[name] = max(best.get(name, 0.0), speed)
    return best


def timed(work: Callable[[], None]) -> Round:
    def once() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return once


@contextmanager
def vllm(work: Work, size: str, options: EngineConfig) -> Iterator[Round]:
    """The same work under vLLM, in processes of its own that stand still between its rounds."""
    model = make_model(size)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine = VllmEngine(Path(folder), options)
        engine.load("self", model.state_dict(), version=0)
    processes = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("VLLM")][-2:]
    one = timed(partial(run_engine, engine, work))

    def once() -> float:
        for process in processes:
            process.resume()
        try:
            return one()
        finally:
            for process in processes:
                process.suspend()

    for process in processes:
        process.suspend()
    try:
        yield once
    finally:
        for process in processes:
            process.resume()
        asyncio.run(engine.close())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--context", type=int, default=256, help="of the engine's slots, in tokens")
    parser.add_argument("--only", default="", help="run only contestants whose name contains this")
    parser.add_argument("--size", choices=list(SIZES), default="1m")
    parser.add_argument("--vllm", action="store_true", help="vLLM too, in bfloat16, at the largest batch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    work = make_work(args.sequences)
    rounds = {
        k: v for k, v in contestants(work, args.size, args.batches, args.context).items() if args.only in k
    }
    with ExitStack() as stack:
        for label, eager in (("vllm", False), ("vllm-eager", True)) if args.vllm else ():
            slots = max(args.batches)
            sizes = {"slots": slots, "context": args.context, "threads": args.threads}
            options = EngineConfig(kind="vllm", dtype="bfloat16", vllm=VllmConfig(eager=eager), **sizes)
            rounds[f"{label} bf16 x{slots}"] = stack.enter_context(vllm(work, args.size, options))
        speeds = measure(rounds, args.repeats, work.useful)

    print(f"{args.sequences} sequences, {work.useful} useful tokens, {args.threads} threads; tokens/s")
    for name, speed in speeds.items():
        print(f"  {name:24} {speed:8.0f}")
    best: dict[str, float] = {}
    for name, speed in speeds.items():
        kind = name.rsplit(" ", 1)[0]
        best[kind] = max(best.get(kind, 0.0), speed)
    for ours in (kind for kind in best if kind.startswith("engine")):
        for theirs in (kind for kind in best if not kind.startswith("engine")):
            print(f"{ours} / {theirs}: {best[ours] / best[theirs]:.2f}x")


if __name__ == "__main__":
    main()
