"""How long the thoughts are: metrics count whole replies, and an offer takes more tokens than a refusal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from ludus.config import ModelConfig
from ludus.errors import UserError
from ludus.records import episode_files, read_episodes
from ludus.text.templates import detect
from ludus.text.tokenizer import Tokenizer


def thought_tokens(run: Path, model: ModelConfig) -> dict[int, dict[str, float]]:
    """step -> game -> mean tokens before the thought's end, over the trained policy's replies of the step.

    A thought that was never closed is as long as its reply. Raises UserError where the model's template
    marks no thoughts.
    """
    tokenizer = Tokenizer.load(Path(model.path))
    markers = detect(tokenizer, model.template).think_ids
    if markers is None:
        raise UserError(f"{model.path} has no <think> and </think>; leave the figures thoughts.* out")
    found = {}
    for step, file in episode_files(run):
        lengths: dict[str, list[int]] = {}
        for episode in read_episodes(file):
            if episode.masked is None:
                mine = [length(turn.completion_ids, markers[1]) for turn in episode.turns if turn.trainable]
                lengths.setdefault(episode.game, []).extend(mine)
        found[step] = {game: fmean(each) for game, each in lengths.items() if each}
    return found


def length(reply: Sequence[int], closing: int) -> int:
    """Tokens before the last `closing` in a reply; all of them where there is none."""
    for k in reversed(range(len(reply))):
        if reply[k] == closing:
            return k
    return len(reply)
