"""Makes the small model: transcripts, tokenizer, configuration, warm start, one Hugging Face directory."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from ludus.config import LossConfig, OptimConfig
from ludus.errors import UserError
from ludus.games import registry
from ludus.learner.batching import passes
from ludus.learner.learner import Learner
from ludus.learner.model import save_model
from ludus.seeding import derive
from ludus.sft.encode import Encoder
from ludus.sft.files import dialogue
from ludus.sft.transcripts import Line, Seating, exchange, watch
from ludus.small.apprentices import apprentice
from ludus.text.actions import Format
from ludus.text.prompter import Prompter
from ludus.text.templates import detect
from ludus.text.tokenizer import Tokenizer
from ludus.text.train_tokenizer import train_tokenizer
from ludus.types import Sample


@dataclass(frozen=True, slots=True)
class Course:
    """A game that the model is warmed up on, with its options, and how many replies it sees of it."""

    game: str
    replies: int
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SmallSpec:
    """What the small model is made of. The defaults are the demo's: about a fifth of a million parameters."""

    # A hand of cards is soon learnt, a board is not.
    courses: tuple[Course, ...] = (
        Course("kuhn_poker", 5_000),
        Course("tic_tac_toe", 50_000, {"view": "cells"}),
        Course("negotiation", 18_000),
    )
    rules: bool = False  # whether its prompts carry the rules of the game (`text.rules` of its recipes)
    format: Format = "boxed"  # how its replies mark their action (`text.format` of its recipes)
    hidden: int = 64
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 256
    vocab: int = 512
    context: int = 512  # max_position_embeddings
    batch: int = 64  # rows per optimizer step
    epochs: int = 1
    lr: float = 3e-3
    init: float = 0.08  # standard deviation of the first weights
    seed: int = 0


def make(out: Path, spec: SmallSpec = SmallSpec(), tell: Callable[[str], None] = print) -> None:
    """Make the model and save it into `out`, which must not exist yet.

    Raises UserError where `out` exists or cannot be made, and for sizes that do not fit together. The same
    spec gives the same files on the same machine and number of threads. Whatever happens before the end,
    `out` is either absent or complete.
    """
    if out.exists():
        raise UserError(
            f"{out} exists already, and nothing is overwritten: use it, remove it, or name another"
        )
    _check(spec)
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
    except OSError as e:
        raise UserError(f"cannot make {unfinished}: {e.strerror}; name another directory") from e
    try:
        lines = transcripts(spec)
        tell(f"{len(lines):,} replies of apprentices in {', '.join(course.game for course in spec.courses)}")
        train_tokenizer((text for line in lines for text in _texts(line)), unfinished, spec.vocab)
        tokenizer = Tokenizer.load(unfinished)
        prompter = Prompter(tokenizer, detect(tokenizer), rules=spec.rules, format=spec.format)
        model = _blank(spec, tokenizer)
        tell(f"{sum(p.numel() for p in model.parameters()):,} parameters, {tokenizer.vocab_size} tokens")
        warm_up(model, [_row(prompter, line) for line in lines], spec, tell)
        save_model(model, unfinished)
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _check(spec: SmallSpec) -> None:
    """Raise UserError for a spec that cannot work, before anything slow begins."""
    for name in ("hidden", "layers", "heads", "kv_heads", "ffn", "context", "batch"):
        if getattr(spec, name) < 1:
            raise UserError(f"{name} is {getattr(spec, name)}; it must be at least 1")
    if spec.hidden % (2 * spec.heads):
        raise UserError(
            f"hidden is {spec.hidden}; with heads = {spec.heads} it must be a multiple of {2 * spec.heads}, "
            "so that each head has an even width"
        )
    if spec.heads % spec.kv_heads:
        raise UserError(f"heads is {spec.heads}; it must be a multiple of kv_heads = {spec.kv_heads}")
    replies = sum(course.replies for course in spec.courses)
    if replies < spec.batch:
        raise UserError(
            f"the courses hold {replies} replies, not even one batch of {spec.batch}: ask for more"
        )


def transcripts(spec: SmallSpec) -> list[Line]:
    """The replies of every course, by apprentices in all seats; the same for the same seed."""
    return [line for course in spec.courses for line in _attend(course, spec.seed)]


def _attend(course: Course, seed: int) -> list[Line]:
    name, game = course.game, registry.make(course.game, **course.args)
    seats = (apprentice(name),) * len(game.roles)
    lines: list[Line] = []
    played = 0
    while len(lines) < course.replies:
        seatings = [
            Seating(seats, derive(seed, "warm-up", name, k), derive(seed, "apprentice", name, k))
            for k in range(played, played + 100)
        ]
        for match in asyncio.run(watch(name, game, seatings)):
            lines += match.lines
        played += len(seatings)
    return lines[: course.replies]


def warm_up(
    model: PreTrainedModel, rows: Sequence[Sample], spec: SmallSpec, tell: Callable[[str], None]
) -> None:
    """Supervised training on the transcripts, in place: cross-entropy on the replies' tokens alone."""
    total = spec.epochs * (len(rows) // spec.batch)
    learner = Learner(
        model,
        LossConfig(),
        OptimConfig(
            lr=spec.lr,
            schedule="cosine",
            warmup_steps=min(50, total),
            weight_decay=0.01,
            microbatch_tokens=2048,
        ),
        max_tokens=spec.context,
        total_steps=total,
        seed=derive(spec.seed, "learner"),
    )
    batches = passes(len(rows), spec.batch, spec.epochs, derive(spec.seed, "shuffle"))
    for update, picked in enumerate(batches, start=1):
        said = learner.sft([rows[i] for i in picked])
        epoch, rest = divmod(update * spec.epochs, total)
        if not rest:
            tell(f"warm start, pass {epoch} of {spec.epochs}: loss {said['loss']:.3f} nats per token")


def _blank(spec: SmallSpec, tokenizer: Tokenizer) -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=tokenizer.vocab_size,
        hidden_size=spec.hidden,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.hidden // spec.heads,
        intermediate_size=spec.ffn,
        max_position_embeddings=spec.context,
        tie_word_embeddings=True,
        initializer_range=spec.init,
        bos_token_id=None,
        eos_token_id=tokenizer.control("<|im_end|>"),
        pad_token_id=tokenizer.pad_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(derive(spec.seed, "weights"))
        model = Qwen3ForCausalLM(config)
    model.set_attn_implementation("eager")  # the fastest on the CPU, as in `load_model`
    return model


def _texts(line: Line) -> tuple[str, ...]:
    seen = line.observation
    legal = "Legal: " + " ".join(seen.legal or ())
    return (seen.rules, seen.state, legal, line.thought, str(line.action))


def _row(prompter: Prompter, line: Line) -> Sample:
    messages = dialogue(exchange(line, prompter))
    return Encoder(prompter.tokenizer, prompter.template).dialogue(messages).sample(line.game)
