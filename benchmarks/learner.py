"""How fast the learner's batching is: sorted micro-batches against one padded batch, in one run.

    python benchmarks/learner.py [--width 96] [--rows 256] [--shortest 30] [--longest 100] [--threads 2]

Both sides do the same work: forward, backward and AdamW on the same rows with the same random model. The
padded side is what a plain script does: all rows in one tensor with an attention mask, logits for every
position. Prints real (unpadded) tokens per second, the best of `--repeats`, and how far the gradients of
the two sides differ in norm. The sides take turns, so that a busy machine disturbs both alike.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from ludus.config import LossConfig, OptimConfig
from ludus.learner.batching import collate, count_tokens
from ludus.learner.learner import Learner
from ludus.types import Sample

VOCABULARY = 512


def main() -> None:
    args = _arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = _rows(args.rows, args.shortest, args.longest)
    optim = OptimConfig(lr=1e-4, grad_clip=1e9, microbatch_tokens=args.microbatch_tokens)
    learner = Learner(_model(args.width), LossConfig(), optim, max_tokens=64, total_steps=10**6)
    padded = _PaddedBatch(_model(args.width), optim)

    sides: dict[str, Callable[[Sequence[Sample]], float]] = {
        "sorted micro-batches": lambda s: learner.sft(s)["grad_norm"],
        "one padded batch": padded.step,
    }
    best = dict.fromkeys(sides, float("inf"))
    gap = 0.0
    for _ in range(args.repeats + 1):  # the first warms up
        norms = []
        for name, step in sides.items():
            began = time.perf_counter()
            norms.append(step(rows))
            best[name] = min(best[name], time.perf_counter() - began)
        gap = max(gap, abs(norms[0] - norms[1]) / norms[1])

    tokens = sum(len(s.tokens) for s in rows)
    size = sum(p.numel() for p in learner.model.parameters())
    print(f"{size:,} parameters, {len(rows)} rows, {tokens:,} tokens, {torch.get_num_threads()} threads")
    for name, seconds in best.items():
        print(f"{name:22} {seconds:7.3f} s  {tokens / seconds:9,.0f} tokens/s")
    ratio = best["one padded batch"] / best["sorted micro-batches"]
    print(f"ratio {ratio:.2f}x, largest relative difference of gradient norms {gap:.1e}")


class _PaddedBatch:
    """Cross-entropy over one padded batch, the plain way."""

    def __init__(self, model: PreTrainedModel, optim: OptimConfig) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=0.0
        )

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
            intermediate_size=3 * width,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=width // 4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    )


def _rows(count: int, shortest: int, longest: int) -> list[Sample]:
    """Random prompts, and replies that make up the last quarter of a row."""
    rng = random.Random(0)
    out = []
    for _ in range(count):
        length = rng.randint(shortest, longest)
        reply = max(1, length // 4)
        read = length - reply
        out.append(
            Sample(
                tokens=[rng.randrange(VOCABULARY) for _ in range(length)],
                mask=[False] * read + [True] * reply,
                logprobs=[0.0] * length,
                advantages=[0.0] * length,
                turn_ids=[-1] * read + [0] * reply,
                game="none",
                role="none",
            )
        )
    return out


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--width", type=int, default=96, help="hidden width of the model")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--shortest", type=int, default=30, help="tokens of the shortest row")
    parser.add_argument("--longest", type=int, default=100, help="tokens of the longest row")
    parser.add_argument("--microbatch-tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
