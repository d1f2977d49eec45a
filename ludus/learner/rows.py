"""From finished matches and their advantages to training rows. Tokens are copied, never encoded again."""

from __future__ import annotations

from collections.abc import Sequence

from ludus.algos.estimators import Advantages
from ludus.types import Episode, Group, Sample, Stop, Turn


def rows(groups: Sequence[Group], advantages: Advantages) -> list[Sample]:
    """One row per trainable turn, or per stretch of one seat's dialogue.

    A turn whose `prompt_ids` begin with exactly all the tokens of the same seat's previous row (append-only
    dialogue, the `chat` context) continues that row, so that the shared history is computed once; any
    other turn (the `board` context) opens a row of its own. Both give the same gradient.

    Left out: masked episodes, turns of policies that are not trained, turns that the engine aborted, and
    turns without a sampled token. Order: groups, episodes, then each row at its first turn.
    `advantages` is what an estimator returned for the same groups.
    Raises ValueError for a trainable turn without a prompt or with a missing log-probability.
    """
    out: list[Sample] = []
    for group, per_episode in zip(groups, advantages, strict=True):
        for episode, per_turn in zip(group.episodes, per_episode, strict=True):
            if episode.masked is None:
                out.extend(_episode_rows(episode, per_turn))
    return out


def _episode_rows(episode: Episode, per_turn: Sequence[float]) -> list[Sample]:
    made: list[Sample] = []
    newest: dict[int, Sample] = {}  # by seat
    for turn, advantage in zip(episode.turns, per_turn, strict=True):
        if not turn.trainable or turn.stop is Stop.ABORTED or not turn.completion_ids:
            continue
        _check(turn, episode)
        row = newest.get(turn.seat)
        if row is None or turn.prompt_ids[: len(row.tokens)] != row.tokens:
            row = Sample([], [], [], [], [], game=episode.game, role=turn.role)
            newest[turn.seat] = row
            made.append(row)
        _append(row, turn, advantage)
    return made


def _append(row: Sample, turn: Turn, advantage: float) -> None:
    read = turn.prompt_ids[len(row.tokens) :]  # what stands before the reply and is not in the row yet
    wrote = turn.completion_ids
    number = max(row.turn_ids, default=-1) + 1
    row.tokens.extend([*read, *wrote])
    row.mask.extend([False] * len(read) + [True] * len(wrote))
    row.logprobs.extend([0.0] * len(read) + turn.logprobs)
    row.advantages.extend([0.0] * len(read) + [advantage] * len(wrote))
    row.turn_ids.extend([-1] * len(read) + [number] * len(wrote))


def _check(turn: Turn, episode: Episode) -> None:
    where = f"episode {episode.id} of {episode.game}, turn {turn.index} of seat {turn.seat}"
    if len(turn.logprobs) != len(turn.completion_ids):
        raise ValueError(
            f"{where}: {len(turn.completion_ids)} sampled tokens but {len(turn.logprobs)} log-probabilities; "
            "an engine whose turns are trained on must return one for each token"
        )
    if not turn.prompt_ids:
        raise ValueError(f"{where}: the prompt is empty; the first token of a row cannot be trained on")
