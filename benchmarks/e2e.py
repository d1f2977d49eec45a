"""Whole self-play steps of Ludus against TRL's GRPOTrainer playing the same games: turns per second.

    python -m venv .venv-trl
    .venv-trl/bin/pip install -c constraints.txt -e . trl==1.16.0
    taskset -c 0,1 python benchmarks/e2e.py --trl-python .venv-trl/bin/python [--game tic_tac_toe] [--bf16]

The work: the demo's three games, or one of them; one model of about a million parameters in both seats,
`--matches` matches a step, one dialogue per seat that grows turn by turn (`text.context = "chat"`),
temperature 1, replies that end with their action or after 48 tokens, an illegal move that ends the match, one
optimizer step of AdamW on all dialogues. Both sides use the same weights, rules, prompts and stopping tokens;
turns and sampled tokens are counted where they are sampled.

Ludus is its own training step (`Trainer.step`): playing, credit, learning, hand-over, and the transcripts on
disk. TRL is `GRPOTrainer.train` with a `rollout_func` (`e2e_trl.py`): it plays all matches abreast, a batched
`generate` for each turn, prompts sorted by length, and trains on the dialogues with the other side's tokens
masked; no reference model, no logging, no checkpoints, no gradient checkpointing. `--trl` are sizes of its
batches, each a contestant of its own; quote the best. Contestants are processes that take turns, a step
each, and wait without work in between; medians and ratios are over rounds, after one to warm up. CPU seconds
(of all threads) say more than wall seconds where others use the same cores; then set OMP_WAIT_POLICY=PASSIVE.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ludus.games import registry
from ludus.learner.rows import rows
from ludus.players import Ask, Player, Reply
from ludus.rollout.scheduler import grouped, play_all
from ludus.seeding import derive
from ludus.small.apprentices import apprentice
from ludus.text.prompter import Prompter
from ludus.text.templates import detect
from ludus.text.tokenizer import Tokenizer
from ludus.types import Completion, MatchPlan, Sample, Stop

HERE = Path(__file__).parent
MARK = "STEP "
# The demo's mix: a game, its options, its share of the matches, and on how many the model is warmed up.
GAMES: dict[str, tuple[dict[str, Any], int, int]] = {
    "kuhn_poker": ({}, 16, 300),
    "tic_tac_toe": ({"view": "cells"}, 12, 1500),
    "negotiation": ({}, 5, 500),
}
MAX_TOKENS, CONTEXT = 48, 1024
LR = 1e-6  # so small that the policy, and with it the work, stays what it is


@dataclass(frozen=True, slots=True)
class Step:
    """One training step of one side."""

    seconds: float
    cpu: float  # seconds of all threads together
    turns: int
    tokens: int  # sampled


def main() -> None:
    args = _arguments()
    if args.side:
        asyncio.run(_ludus(args))
        return
    if not (args.model / "config.json").is_file():
        make(args.model)
    precision = ["--bf16"] if args.bf16 else []
    games = [word for game in args.game for word in ("--game", game)]
    common = ["--model", str(args.model), "--matches", str(args.matches), *games, *precision]
    ours = ["--batch", str(args.batch)] if args.batch else []
    commands = {"ludus": [sys.executable, str(HERE / "e2e.py"), "--side", *common, *ours]}
    for word in args.trl if args.trl_python else ():
        learn, play = word.split("/")
        more = ["--batch", learn, "--generate-batch", play, "--attention", args.trl_attention]
        commands[f"trl {word}"] = [args.trl_python, str(HERE / "e2e_trl.py"), *common, *more]
    with ExitStack() as stack:
        sides = {name: stack.enter_context(_side(words, args.threads)) for name, words in commands.items()}
        steps: dict[str, list[Step]] = {name: [] for name in sides}
        for round_ in range(args.rounds + 1):
            for name, side in sides.items():
                step = next(side)
                print(f"{name:10} {step}", file=sys.stderr, flush=True)
                if round_:
                    steps[name].append(step)
    _tell(steps)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/e2e"))
    parser.add_argument("--trl-python", help="interpreter that has TRL")
    parser.add_argument(
        "--trl",
        nargs="+",
        default=["6/33", "33/66"],
        metavar="ROWS/PROMPTS",
        help="of a forward pass of TRL's",
    )
    parser.add_argument("--trl-attention", default="sdpa", help="sdpa or eager")
    parser.add_argument("--game", action="append", default=[], choices=list(GAMES), help="not the whole mix")
    parser.add_argument("--matches", type=int, default=66, help="a multiple of 33")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--bf16", action="store_true", help="bfloat16 products, float32 weights, on both sides"
    )
    parser.add_argument("--batch", type=int, help="tokens per micro-batch of Ludus (default: 4096)")
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


@contextmanager
def _side(words: Sequence[str], threads: int) -> Iterator[Iterator[Step]]:
    """A contestant's process; each `next` makes it do one step."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "TRL_EXPERIMENTAL_SILENCE": "1"}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as child,
    ):

        def steps() -> Iterator[Step]:
            assert child.stdin is not None
            assert child.stdout is not None
            while True:
                print("go", file=child.stdin, flush=True)
                line = next((x for x in child.stdout if x.startswith(MARK)), None)
                if line is None:
                    log.seek(0)
                    raise SystemExit(f"{' '.join(words)} ended early:\n{log.read()[-3000:]}")
                yield Step(**json.loads(line.removeprefix(MARK)))

        try:
            yield steps()
        finally:
            child.kill()


def _tell(steps: dict[str, list[Step]]) -> None:
    for name, of in steps.items():
        turns = median(s.turns for s in of)
        per = median(s.tokens / s.turns for s in of)
        wall, cpu = median(s.turns / s.seconds for s in of), median(s.turns / s.cpu for s in of)
        work = f"{turns:.0f} turns of {per:.1f} tokens"
        print(f"{name:10} {wall:7.1f} turns/s, {cpu:7.1f} per CPU second; {work}")
    ours = steps.pop("ludus")
    for name, of in steps.items():
        wall = sorted(a.turns / a.seconds / (b.turns / b.seconds) for a, b in zip(ours, of, strict=True))
        cpu = sorted(a.turns / a.cpu / (b.turns / b.cpu) for a, b in zip(ours, of, strict=True))
        print(
            f"ludus : {name}  {median(wall):.2f}x [{wall[0]:.2f}, {wall[-1]:.2f}] of its turns/s, "
            f"{median(cpu):.2f}x [{cpu[0]:.2f}, {cpu[-1]:.2f}] per CPU second"
        )


async def _ludus(args: argparse.Namespace) -> None:
    """Ludus's side: a step for every line on standard input."""
    from ludus import config as configuration
    from ludus.train.loop import Trainer
    from ludus.train.rundir import RunDir

    dtype = "bfloat16" if args.bf16 else "float32"
    mix = chosen(args.game)
    recipe = {
        "name": "e2e",
        "threads": int(os.environ["OMP_NUM_THREADS"]),
        "model": {"path": str(args.model), "dtype": dtype},
        "games": [{"name": name, "args": args, "weight": n} for name, (args, n, _) in mix.items()],
        "text": {"context": "chat", "rules": False},
        "engine": {"slots": 2 * args.matches, "context": CONTEXT, "dtype": dtype},
        "rollout": {"matches": args.matches, "max_tokens": MAX_TOKENS},
        "optim": {"lr": LR, "microbatch_tokens": args.batch or 4096},
        "train": {"steps": 10**6},
    }
    config = configuration.validate(recipe, "benchmarks/e2e.py")
    trainer = Trainer(config)
    with (
        tempfile.TemporaryDirectory() as folder,
        RunDir.create(Path(folder) / "run", config) as run,
    ):
        for number, _ in enumerate(sys.stdin):
            began, cpu = time.perf_counter(), time.process_time()
            record = await trainer.step(run, number)
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            counts = {key: sum(g[key] for g in record["games"].values()) for key in ("turns", "tokens")}
            told: dict[str, Any] = {"seconds": seconds, "cpu": cpu, **counts}
            print(MARK + json.dumps(told), flush=True)
            print(record["seconds"], file=sys.stderr, flush=True)


def chosen(games: Sequence[str]) -> dict[str, tuple[dict[str, Any], int, int]]:
    """Those of `GAMES`, or all."""
    return {name: GAMES[name] for name in games or GAMES}


def make(out: Path) -> None:
    """The model: a Qwen3 warmed up on dialogues of the games, so that its replies have the form of moves."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from ludus.learner.model import save_model
    from ludus.small.make import Course, SmallSpec, transcripts, warm_up
    from ludus.text.train_tokenizer import train_tokenizer

    torch.set_num_threads(2)
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    lines = transcripts(
        SmallSpec(courses=tuple(Course(name, 300, args) for name, (args, _, _) in GAMES.items()))
    )
    train_tokenizer((text for x in lines for text in (x.observation.state, x.thought)), out, 384)
    tokenizer = Tokenizer.load(out)
    shape = Qwen3Config(
        vocab_size=tokenizer.vocab_size,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    model = Qwen3ForCausalLM(shape).eval()
    spec = SmallSpec(batch=16)
    warm_up(model, asyncio.run(_dialogues(tokenizer)), spec, print)
    save_model(model, out)


async def _dialogues(tokenizer: Tokenizer) -> list[Sample]:
    """Rows out of matches between two apprentices whose replies are spelt by `tokenizer`."""
    prompter = Prompter(tokenizer, detect(tokenizer), "chat", rules=False)
    made: list[Sample] = []
    for name, (args, _, matches) in GAMES.items():
        player = _Spelling(apprentice(name), prompter)
        seats = (player.policy,) * 2
        plans = [MatchPlan(k, k, name, seats, derive(k, "deal"), derive(k, "reply")) for k in range(matches)]
        games = {name: registry.make(name, **args)}
        episodes = await play_all(plans, games, {player.policy: player}, in_flight=1)
        made += rows(grouped(plans, episodes), [[[1.0] * len(e.turns)] for e in episodes])
    return made


@dataclass(frozen=True, slots=True)
class _Spelling:
    """A program whose replies count as sampled tokens."""

    program: Player
    prompter: Prompter
    policy: str = "apprentice"
    trainable: bool = True

    async def answer(self, ask: Ask) -> Reply:
        reply = await self.program.answer(ask)
        past = [(p.observation, p.prompt_ids, p.completion.ids, p.problem) for p in ask.past]
        prompt = self.prompter.prompt(ask.observation, past)
        ids = self.prompter.spell(reply.action or "", reply.text)
        return Reply(reply.action, prompt.ids, Completion(ids, [0.0] * len(ids), Stop.ACTION, 0))


if __name__ == "__main__":
    main()
