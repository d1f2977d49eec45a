"""What `gpu.py` measures: per part, what stands at the head of a row, and what finds the rest of it."""

from __future__ import annotations

import asyncio
import gc
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from engine import Work, make_work, run_engine, run_generate, timed
from loss_memory import measure as loss_memory
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ludus import config as configuration
from ludus.config import EngineConfig, LossConfig, OptimConfig, VllmConfig
from ludus.engines.torch_engine import TorchEngine
from ludus.engines.vllm_engine import VllmEngine
from ludus.engines.vllm_process import unusable
from ludus.errors import UserError
from ludus.games import registry
from ludus.learner.learner import Learner
from ludus.learner.model import save_model
from ludus.records import episode_files, read_episodes
from ludus.text.tokenizer import Tokenizer
from ludus.text.train_tokenizer import train_tokenizer
from ludus.train.loop import Trainer
from ludus.train.rundir import RunDir
from ludus.types import Sample

Row = dict[str, Any]
Measure = tuple[Row, Callable[[], Row]]
DTYPE = torch.bfloat16
VOCABULARY = 151_936
GENERATE, GRAPHS = "generate", "engine, graphs"
RECOMPUTED = ("4b",)  # sizes that learn with gradient checkpointing
_NUMBERS = ("hidden", "inner", "layers", "heads", "kv_heads", "head_dim", "vocabulary")
SIZES: dict[str, dict[str, int]] = {
    name: dict(zip(_NUMBERS, shape, strict=True))
    for name, shape in {
        "tiny": (64, 128, 2, 4, 2, 32, 512),
        "0.1b": (512, 1536, 8, 8, 4, 128, VOCABULARY),
        "0.6b": (1024, 3072, 28, 16, 8, 128, VOCABULARY),  # as Qwen3-0.6B
        "4b": (2560, 9728, 36, 32, 8, 128, VOCABULARY),  # as Qwen3-4B
    }.items()
}


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything is run."""

    device: torch.device
    sequences: tuple[int, ...] = (64, 128, 256)
    prompt: int = 256  # tokens, mean
    reply: int = 128  # tokens
    repeats: int = 3
    row: int = 1024  # tokens of a row to learn from
    rows: int = 32
    microbatch: int = 16_384
    matches: int = 64
    max_tokens: int = 256
    steps: int = 3  # that count; one more warms up
    loss_tokens: int = 8192
    loss_vocabulary: int = VOCABULARY
    copied: int = 2**32  # bytes
    product: int = 8192  # width of the square product

    def quick(self) -> Plan:
        """The same, small enough for a CPU."""
        work = {"sequences": (4,), "prompt": 24, "reply": 6, "repeats": 1, "row": 32, "rows": 4}
        steps = {"matches": 2, "max_tokens": 8, "steps": 1, "microbatch": 256}
        sizes = {"loss_tokens": 64, "loss_vocabulary": 2048, "copied": 2**24, "product": 256}
        return replace(self, **work, **steps, **sizes)


@dataclass(frozen=True, slots=True)
class Machine:
    """What was measured of the device, per second."""

    bandwidth: float  # bytes
    peak: float  # bfloat16 operations


# ---------------------------------------------------------------------- decode


def decode(plan: Plan, machine: Machine, size: str) -> Iterator[Measure]:
    """A row per number of sequences and contestant."""
    for sequences in plan.sequences:
        for name in (GENERATE, GRAPHS, "engine", "vllm"):
            head = {"size": size, "sequences": sequences, "contestant": name}
            yield head, partial(_decode, plan, machine, size, sequences, name)


def _decode(plan: Plan, machine: Machine, size: str, sequences: int, name: str) -> Row:
    seconds = _decode_seconds(plan, size, sequences, name) / plan.reply
    if seconds <= 0:
        raise UserError("the long replies took no longer than those of one token: too noisy to tell")
    limit = machine.bandwidth / _bytes_of_step(plan, size, sequences)
    speed = {"tokens/s": sequences / seconds, "limit": sequences * limit, "of the limit": 1 / seconds / limit}
    return {**speed, "ms a step": 1e3 * seconds}


def _decode_seconds(plan: Plan, size: str, sequences: int, name: str) -> float:
    """Seconds for `plan.reply` steps of all sequences, beyond the first token of each."""
    context = plan.prompt * 5 // 4 + plan.reply + 1
    works = [
        make_work(
            sequences,
            SIZES[size]["vocabulary"],
            (plan.prompt * 3 // 4, plan.prompt * 5 // 4),
            (reply, reply),
        )
        for reply in (1, plan.reply + 1)
    ]
    best = [float("inf")] * 2
    with _contestant(plan, size, sequences, context, name) as run:
        for repeat in range(plan.repeats + 2):  # two to warm up: a graph is recorded the second time
            for i, work in enumerate(works):
                synchronize(plan.device)
                seconds = timed(partial(run, work))()  # ends with numbers on the host
                if repeat > 1:
                    best[i] = min(best[i], seconds)
    return best[1] - best[0]


@contextmanager
def _contestant(
    plan: Plan, size: str, sequences: int, context: int, name: str
) -> Iterator[Callable[[Work], None]]:
    """What does some work, all its sequences abreast. Raises UserError for vLLM where there is none."""
    if name == "vllm" and (problem := unusable()):
        raise UserError(problem)
    model = make_model(size, plan.device)
    if name == GENERATE:
        yield partial(run_generate, model, batch=sequences, logprobs=False)
        return
    engine: TorchEngine | VllmEngine
    if name == "vllm":
        sizes = {"dtype": "bfloat16", "slots": sequences, "context": context}
        options = EngineConfig(kind="vllm", **sizes, vllm=VllmConfig(memory=0.6))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            weights = model.cpu().state_dict()  # the GPU is vLLM's
            free()
            engine = VllmEngine(Path(folder), options)
        engine.load("self", weights, version=0)
    else:
        fits = {"slots": sequences, "context": context, "device": plan.device, "dtype": DTYPE}
        engine = TorchEngine.from_model(model, **fits, graphs=name == GRAPHS)
        del model  # it has a copy
    try:
        yield partial(run_engine, engine)
    finally:
        asyncio.run(engine.close())


def _bytes_of_step(plan: Plan, size: str, sequences: int) -> float:
    """What one decode step has to read."""
    s = SIZES[size]
    position = 2 * s["layers"] * s["kv_heads"] * s["head_dim"] * DTYPE.itemsize
    weights = DTYPE.itemsize * (body_weights(size) + s["vocabulary"] * s["hidden"])
    return weights + sequences * (plan.prompt + plan.reply / 2) * position


# ---------------------------------------------------------------------- learn


def learn(plan: Plan, machine: Machine, size: str) -> Iterator[Measure]:
    """A row per way of batching."""
    for batching in ("sorted", "packed"):
        yield {"size": size, "batching": batching}, partial(_learn, plan, machine, size, batching)


def _learn(plan: Plan, machine: Machine, size: str, batching: str) -> Row:
    model = make_model(size, plan.device)
    if size in RECOMPUTED:
        model.gradient_checkpointing_enable()
    if plan.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    options = {"lr": 1e-9, "batching": batching, "microbatch_tokens": plan.microbatch}
    optim = OptimConfig.model_validate(options)
    learner = Learner(model, LossConfig(), optim, max_tokens=plan.row, total_steps=10**6)
    samples = _samples(plan, SIZES[size]["vocabulary"])
    best = float("inf")
    for repeat in range(plan.repeats + 1):
        synchronize(plan.device)
        began = time.perf_counter()
        learner.update(samples)
        synchronize(plan.device)
        if repeat:
            best = min(best, time.perf_counter() - began)
    used = learn_operations(size, plan.rows, plan.row) / best
    peak = torch.cuda.max_memory_allocated() / 2**30 if plan.device.type == "cuda" else None
    speed = {"tokens/s": plan.rows * plan.row / best, "TFLOP/s": used / 1e12}
    return {**speed, "of the peak": used / machine.peak, "GiB": peak}


def _samples(plan: Plan, vocabulary: int) -> list[Sample]:
    rng, half = random.Random(0), plan.row // 2
    return [
        Sample(
            tokens=[rng.randrange(vocabulary) for _ in range(plan.row)],
            mask=[False] * half + [True] * (plan.row - half),
            logprobs=[-1.0] * plan.row,
            advantages=[rng.choice((-1.0, 1.0))] * plan.row,
            turn_ids=[-1] * half + [0] * (plan.row - half),
            game="random",
            role="",
        )
        for _ in range(plan.rows)
    ]


def body_weights(size: str) -> int:
    """Weights of all products between embedding and head."""
    s = SIZES[size]
    attention = 2 * (s["heads"] + s["kv_heads"]) * s["head_dim"] * s["hidden"]
    return s["layers"] * (attention + 3 * s["hidden"] * s["inner"])


def learn_operations(size: str, rows: int, length: int) -> float:
    """Operations of one update's products, as the head of this file has it; half of each row is trained."""
    s = SIZES[size]
    trained = length - length // 2
    products = body_weights(size) * length + s["vocabulary"] * s["hidden"] * trained
    if size not in RECOMPUTED:  # see learner/narrow.py
        last = s["heads"] * s["head_dim"] * s["hidden"] + 3 * s["hidden"] * s["inner"]
        products -= last * (length - trained)
    attention = s["layers"] * s["heads"] * s["head_dim"] * length**2
    return 6.0 * rows * (products + attention)


# ---------------------------------------------------------------------- step


def step(plan: Plan, _: Machine, size: str) -> Iterator[Measure]:
    """One row: the stages of a self-play step."""
    yield {"size": size}, partial(_step, plan, size)


def _step(plan: Plan, size: str) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        _write_model(size, model, plan.device)
        return asyncio.run(_stages(plan, size, model, Path(folder) / "run"))


def _write_model(size: str, out: Path, device: torch.device) -> None:
    observation = registry.make("kuhn_poker").start(0).observe(0)
    out.mkdir(parents=True)
    train_tokenizer([observation.rules, observation.state], out, 400)
    tokenizer = Tokenizer.load(out)
    model = make_model(size, device)
    model.config.eos_token_id, model.config.pad_token_id = tokenizer.eos_id, tokenizer.pad_id
    save_model(model, out)


async def _stages(plan: Plan, size: str, model: Path, out: Path) -> Row:
    data = {
        "name": "gpu",
        "model": {
            "path": str(model),
            "dtype": "bfloat16",
            "device": plan.device.type,
            "gradient_checkpointing": size in RECOMPUTED,
        },
        "games": [{"name": "kuhn_poker"}],
        "text": {"stop_on_action": False},
        "engine": {"dtype": "bfloat16", "slots": plan.matches, "context": 1024 + plan.max_tokens},
        "rollout": {"matches": plan.matches, "max_tokens": plan.max_tokens, "retries": 3},
        "optim": {"lr": 1e-9, "microbatch_tokens": plan.microbatch},
        "train": {"steps": 10**6},
        "eval": {"exploitability": False},
    }
    config = configuration.validate(data, where="the benchmark's recipe")
    trainer = Trainer(config)
    records: list[Row] = []
    try:
        with RunDir.create(out, config) as run:
            for number in range(plan.steps + 1):
                records.append(await trainer.step(run, number))
            counted = records[1:]
            score = await _score(trainer, episode_files(out)[-1][1])
        hand_over = median(_hand_over(trainer, plan.device) for _ in counted)
    finally:
        await trainer.close()
    stages = {stage: median(r["seconds"][stage] for r in counted) for stage in ("rollout", "learn")}
    whole = median(sum(r["seconds"][stage] for stage in (*stages, "load")) for r in counted)
    sampled = median(sum(g["tokens"] for g in r["games"].values()) for r in counted)
    found = {"seconds": whole, **stages, "hand-over": hand_over, "score": score}
    return {**found, "hand-over's share": hand_over / whole, "sampled tokens/s": sampled / whole}


def _hand_over(trainer: Trainer, device: torch.device) -> float:
    """Seconds until the engine has the learner's weights; `Trainer.step` does not wait for the device."""
    synchronize(device)
    began = time.perf_counter()
    trainer._hand_over()
    synchronize(device)
    return time.perf_counter() - began


async def _score(trainer: Trainer, written: Path) -> float:
    """Seconds for the engine to score the replies of the episodes in a file."""
    turns = [turn for episode in read_episodes(written) for turn in episode.turns]
    pairs = [(turn.prompt_ids, turn.completion_ids) for turn in turns if turn.completion_ids]
    began = time.perf_counter()
    await trainer.me.engine.score("self", *map(list, zip(*pairs, strict=True)))
    return time.perf_counter() - began


# ---------------------------------------------------------------------- loss


def loss(plan: Plan, _: Machine, size: str) -> Iterator[Measure]:
    """One row: the memory of the loss, at the hidden width of a size."""
    width, tokens, words = SIZES[size]["hidden"], plan.loss_tokens, plan.loss_vocabulary
    head = {"width": width, "tokens": tokens, "words": words}
    yield head, lambda: {**loss_memory(tokens, words, width, plan.device)}


# ---------------------------------------------------------------------- models


def make_model(size: str, device: torch.device) -> Qwen3ForCausalLM:
    """Random weights, made on the device."""
    torch.manual_seed(0)
    s = SIZES[size]
    config = Qwen3Config(
        vocab_size=s["vocabulary"],
        hidden_size=s["hidden"],
        intermediate_size=s["inner"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s["kv_heads"],
        head_dim=s["head_dim"],
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with device:
        model: Qwen3ForCausalLM = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    return model.eval()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
