"""TRL's side of `e2e.py` (see there): GRPOTrainer, whose `rollout_func` plays the matches abreast."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from e2e import CONTEXT, LR, MARK, MAX_TOKENS, chosen
from transformers import GenerationConfig, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation

from ludus.games import registry
from ludus.games.base import IllegalAction
from ludus.games.forfeit import forfeit_returns
from ludus.seeding import derive
from ludus.text.prompter import Prompter
from ludus.text.templates import detect
from ludus.text.tokenizer import Tokenizer


class Seat:
    """One dialogue: the first prompt, and everything after it with a mask over the seat's own tokens."""

    def __init__(self) -> None:
        self.past: list[Any] = []
        self.prompt: list[int] = []
        self.tokens: list[int] = []
        self.mask: list[int] = []

    def ask(self, prompter: Prompter, observation: Any) -> list[int]:
        ids = prompter.prompt(observation, self.past).ids
        if not self.prompt:
            self.prompt = ids
        new = ids[len(self.prompt) + len(self.tokens) :]
        self.tokens += new
        self.mask += [0] * len(new)
        return ids

    def answer(self, observation: Any, prompt: list[int], reply: list[int]) -> None:
        self.tokens += reply
        self.mask += [1] * len(reply)
        self.past.append((observation, prompt, reply, None))


class SelfPlay:
    """The rollout function, and what it counted since it was last asked."""

    def __init__(self, model: str, games: Sequence[str], batch: int) -> None:
        self.tokenizer = Tokenizer.load(Path(model))
        self.prompter = Prompter(self.tokenizer, detect(self.tokenizer), "chat", rules=False)
        shares = [(registry.make(name, **args), share) for name, (args, share, _) in chosen(games).items()]
        self.mix = [game for game, share in shares for _ in range(share)]
        self.batch = batch
        self.stop = sorted(self.prompter.stop.ids | self.prompter.stop.triggers)
        self.turns = self.tokens = self.played = 0

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        games = [self.mix[k % len(self.mix)] for k in range(len(prompts) // 2)]
        matches = [game.start(derive(self.played + k, "deal")) for k, game in enumerate(games)]
        self.played += len(matches)
        seats = [(Seat(), Seat()) for _ in matches]
        returns: list[Sequence[float]] = [()] * len(matches)
        live = list(range(len(matches)))
        while live:
            asked = []
            for k in live:
                (seat,) = matches[k].to_act()
                seen = matches[k].observe(seat)
                asked.append((k, seat, seen, seats[k][seat].ask(self.prompter, seen)))
            replies = self.generate(trainer, [ids for *_, ids in asked])
            for (k, seat, seen, ids), reply in zip(asked, replies, strict=True):
                seats[k][seat].answer(seen, ids, reply)
                action = self.prompter.read(reply).action
                try:
                    if action is None:
                        raise IllegalAction(seat, "nothing parsed")
                    matches[k].play({seat: action})
                except IllegalAction:
                    returns[k] = forfeit_returns(games[k], seat, "zero_sum")
                else:
                    if not matches[k].to_act():
                        returns[k] = matches[k].returns()
            live = [k for k in live if not returns[k]]
        flat = [seat for pair in seats for seat in pair]
        nothing = [self.stop[0]]  # a seat that never came to act; masked
        return {
            "prompt_ids": [seat.prompt or nothing for seat in flat],
            "completion_ids": [seat.tokens or nothing for seat in flat],
            "env_mask": [seat.mask or [0] for seat in flat],
            "logprobs": None,
            "outcome": [x for pair in returns for x in pair],
        }

    def generate(self, trainer: GRPOTrainer, prompts: list[list[int]]) -> list[list[int]]:
        """A reply to each prompt, in batches of similar lengths, padded on the left."""
        config = GenerationConfig(
            max_new_tokens=MAX_TOKENS,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=self.stop,
            pad_token_id=self.tokenizer.pad_id,
        )
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        replies: list[list[int]] = [[]] * len(prompts)
        with (
            unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model,
            torch.no_grad(),
        ):
            for at in range(0, len(order), self.batch):
                some = order[at : at + self.batch]
                width = max(len(prompts[i]) for i in some)
                ids = torch.full((len(some), width), self.tokenizer.pad_id)
                mask = torch.zeros_like(ids)
                for row, i in enumerate(some):
                    ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                    mask[row, width - len(prompts[i]) :] = 1
                out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
                for i, sampled in zip(some, out[:, width:].tolist(), strict=True):
                    end = next((n for n, t in enumerate(sampled) if t in self.stop), len(sampled) - 1)
                    replies[i] = sampled[: end + 1]
        self.turns += len(replies)
        self.tokens += sum(map(len, replies))
        return replies


class OnDemand(TrainerCallback):  # type: ignore[misc]
    """Begins a step for every line on standard input, and tells what it took."""

    def __init__(self, play: SelfPlay) -> None:
        self.play = play

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if not sys.stdin.readline():
            raise SystemExit
        self.play.turns = self.play.tokens = 0
        self.began, self.cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        told = {
            "seconds": time.perf_counter() - self.began,
            "cpu": time.process_time() - self.cpu,
            "turns": self.play.turns,
            "tokens": self.play.tokens,
        }
        print(MARK + json.dumps(told), flush=True)


def outcome(completions: list[Any], outcome: list[float], **_: Any) -> list[float]:
    """What the seat's match returned."""
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--game", action="append", default=[])
    parser.add_argument("--matches", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--generate-batch", type=int, required=True)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    rows = 2 * args.matches
    play = SelfPlay(args.model, args.game, batch=args.generate_batch)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=args.bf16,
            gradient_checkpointing=False,
            per_device_train_batch_size=args.batch,
            gradient_accumulation_steps=rows // args.batch,
            num_generations=rows,
            max_completion_length=CONTEXT,
            beta=0.0,
            loss_type="dr_grpo",
            learning_rate=LR,
            lr_scheduler_type="constant",
            max_steps=10**6,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            model_init_kwargs={"dtype": "float32", "attn_implementation": args.attention},
        )
        trainer = GRPOTrainer(
            model=args.model,
            reward_funcs=outcome,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["match"] * 8}),
            rollout_func=play,
            callbacks=[OnDemand(play)],
        )
        trainer.train()


if __name__ == "__main__":
    main()
