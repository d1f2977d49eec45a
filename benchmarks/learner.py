"""How fast the learner's batching is against one padded batch, on transcripts of three games, in one run.

    python benchmarks/learner.py [--rows 256] [--rules] [--width 64] [--threads 1] [--repeats 5]

All sides do the same work: forward, backward and AdamW on the same rows with the same random model. The rows
are replies of apprentices in Kuhn poker, tic-tac-toe and negotiation, in the mix of the demo's matches; with
`--rules` their prompts hold the rules of the game, which makes them longer and more alike. The padded side is
what a plain script does: all rows in one tensor with an attention mask, logits for every position. Prints the
best of `--repeats`, as time and as the time of all cores that was used for it, and how far the gradients
differ in norm. The sides take turns, so that a busy machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from ludus.config import LossConfig, OptimConfig
from ludus.learner.batching import collate, count_tokens
from ludus.learner.learner import Learner
from ludus.sft.transcripts import Line
from ludus.small.make import Course, SmallSpec, transcripts
from ludus.text.prompter import Prompter
from ludus.text.templates import detect
from ludus.text.tokenizer import Tokenizer
from ludus.text.train_tokenizer import train_tokenizer
from ludus.types import Sample

VOCABULARY = 512
PADDED = "one padded batch"
SHARES = {"kuhn_poker": 24, "tic_tac_toe": 56, "negotiation": 20}  # percent of a step's turns, about


def main() -> None:
    args = _arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = _rows(args.rows, args.rules)
    sides: dict[str, Callable[[Sequence[Sample]], float]] = {
        **{batching: _learner(args, batching) for batching in ("sorted", "packed")},
        PADDED: _PaddedBatch(_model(args.width)).step,
    }
    best = {name: (float("inf"), float("inf")) for name in sides}
    gap = 0.0
    for _ in range(args.repeats + 1):  # the first warms up
        norms = []
        for name, step in sides.items():
            began, used = time.perf_counter(), time.process_time()
            norms.append(step(rows))
            taken = time.perf_counter() - began, time.process_time() - used
            best[name] = min(best[name][0], taken[0]), min(best[name][1], taken[1])
        gap = max(gap, *(abs(norm - norms[-1]) / norms[-1] for norm in norms))

    lengths = [len(s.tokens) for s in rows]
    size = sum(p.numel() for p in _model(args.width).parameters())
    print(f"{size:,} parameters, {torch.get_num_threads()} threads; {len(rows)} rows of {min(lengths)} to")
    print(f"{max(lengths)} tokens, {sum(lengths):,} in all, {count_tokens(rows):,} of them trained")
    for name, (seconds, cores) in best.items():
        ratios = f"{best[PADDED][0] / seconds:5.2f}x {best[PADDED][1] / cores:5.2f}x"
        speed = sum(lengths) / seconds
        print(f"{name:18} {seconds:7.3f} s  {cores:7.3f} s of cores  {ratios}  {speed:9,.0f} tokens/s")
    print(f"largest relative difference of gradient norms {gap:.1e}")


def _learner(args: argparse.Namespace, batching: str) -> Callable[[Sequence[Sample]], float]:
    optim = OptimConfig.model_validate({"lr": 1e-4, "grad_clip": 1e9, "batching": batching})
    learner = Learner(_model(args.width), LossConfig(), optim, max_tokens=64, total_steps=10**6)
    return lambda rows: learner.sft(rows)["grad_norm"]


class _PaddedBatch:
    """Cross-entropy over one padded batch, the plain way."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, rows: Sequence[Sample]) -> float:
        """One update; returns the gradient's norm."""
        batch = collate(rows, torch.device("cpu"))
        seen = torch.arange(batch.tokens.shape[1])[None] < batch.lengths[:, None]
        logits = self.model(input_ids=batch.tokens, attention_mask=seen.long(), use_cache=False).logits
        logprobs = logits[:, :-1].log_softmax(-1).gather(-1, batch.tokens[:, 1:, None]).squeeze(-1)
        loss = -(logprobs * batch.mask[:, 1:]).sum() / count_tokens(rows)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1e9)
        self.optimizer.step()
        return float(norm)


def _model(width: int) -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=width // 4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    )


def _rows(count: int, rules: bool) -> list[Sample]:
    """Replies of apprentices, each a row: prompt, thought, action, end."""
    courses = [
        Course(game, count * share // 100 + 1, {"view": "cells"} if game == "tic_tac_toe" else {})
        for game, share in SHARES.items()
    ]
    lines = transcripts(SmallSpec(courses=tuple(courses)))
    with tempfile.TemporaryDirectory() as directory:
        train_tokenizer(_texts(lines), Path(directory), VOCABULARY)
        tokenizer = Tokenizer.load(Path(directory))
    prompter = Prompter(tokenizer, detect(tokenizer), rules=rules)
    return [_row(prompter, line) for line in lines][:count]


def _texts(lines: Sequence[Line]) -> Iterator[str]:
    for line in lines:
        seen = line.observation
        yield from (seen.rules, seen.state, " ".join(seen.legal or ()), line.thought, str(line.action))


def _row(prompter: Prompter, line: Line) -> Sample:
    prompt = prompter.prompt(line.observation).ids
    reply = [*prompter.spell(str(line.action), line.thought), min(prompter.template.end_ids)]
    n, m = len(prompt), len(reply)
    return Sample(
        tokens=[*prompt, *reply],
        mask=[False] * n + [True] * m,
        logprobs=[0.0] * (n + m),
        advantages=[0.0] * (n + m),
        turn_ids=[-1] * n + [0] * m,
        game=line.game,
        role="",
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rules", action="store_true", help="prompts hold the rules of the game")
    parser.add_argument("--width", type=int, default=64, help="hidden width of the model")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
