"""Rows carry the sampler's own tokens and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ludus.learner.rows import rows
from ludus.types import Episode, Group, Stop, Turn


def turn(
    seat: int,
    prompt: list[int],
    reply: list[int],
    *,
    trainable: bool = True,
    stop: Stop = Stop.EOS,
    logprobs: list[float] | None = None,
) -> Turn:
    return Turn(
        seat=seat,
        role=f"role_{seat}",
        index=0,
        policy="self",
        version=0,
        prompt_ids=prompt,
        completion_ids=reply,
        logprobs=[-0.1 * token for token in reply] if logprobs is None else logprobs,
        stop=stop,
        action=None,
        trainable=trainable,
    )


def group(*turns: Turn, masked: str | None = None) -> list[Group]:
    episode = Episode(
        3, "g", 0, ("self", "self"), ("role_0", "role_1"), list(turns), (0.0, 0.0), masked=masked
    )
    return [Group([episode])]


def test_board_turns_are_rows_of_their_own() -> None:
    made = rows(group(turn(0, [1, 2], [3, 4]), turn(0, [1, 5], [6])), [[[0.5, -0.5]]])
    assert [r.tokens for r in made] == [[1, 2, 3, 4], [1, 5, 6]]
    assert made[0].mask == [False, False, True, True]
    assert made[0].advantages == [0.0, 0.0, 0.5, 0.5]
    assert made[0].logprobs == [0.0, 0.0, -0.1 * 3, -0.1 * 4]
    assert made[0].turn_ids == [-1, -1, 0, 0]
    assert (made[0].game, made[0].role) == ("g", "role_0")


def test_dialogue_is_merged_per_seat() -> None:
    made = rows(
        group(turn(0, [1], [2]), turn(1, [9], [8]), turn(0, [1, 2, 3], [4, 5]), turn(1, [9, 8, 7], [6])),
        [[[0.5, 1.0, -0.5, 2.0]]],
    )
    assert [r.role for r in made] == ["role_0", "role_1"]
    assert made[0].tokens == [1, 2, 3, 4, 5]
    assert made[0].mask == [False, True, False, True, True]
    assert made[0].advantages == [0.0, 0.5, 0.0, -0.5, -0.5]
    assert made[0].turn_ids == [-1, 0, -1, 1, 1]
    assert made[1].tokens == [9, 8, 7, 6]


def test_a_rewritten_history_is_not_merged() -> None:
    """Pitfall 2: a template that drops the thought of an earlier turn opens a new row."""
    made = rows(group(turn(0, [1], [2, 3]), turn(0, [1, 3, 4], [5])), [[[1.0, 1.0]]])
    assert [r.tokens for r in made] == [[1, 2, 3], [1, 3, 4, 5]]


def test_what_is_left_out() -> None:
    kept = turn(0, [1], [2])
    out = (
        turn(0, [1], [3], stop=Stop.ABORTED, logprobs=[]),
        turn(1, [1], [4], trainable=False, logprobs=[]),
        turn(0, [1], []),
    )
    made = rows(group(*out, kept), [[[9.0, 9.0, 9.0, 1.0]]])
    assert [r.tokens for r in made] == [[1, 2]]
    assert rows(group(kept, masked="judge failed"), [[[0.0]]]) == []


def test_the_opponents_tokens_in_a_dialogue_are_read_but_not_trained() -> None:
    """Pitfall 4. An untrained turn of the same seat becomes part of the prompt as well."""
    frozen = turn(0, [1, 2, 3], [4], trainable=False)
    made = rows(group(turn(0, [1], [2]), frozen, turn(0, [1, 2, 3, 4, 5], [6])), [[[1.0, 0.0, 2.0]]])
    assert len(made) == 1
    assert made[0].mask == [False, True, False, False, False, True]


def test_missing_log_probabilities_are_an_error() -> None:
    """Pitfall 5: never filled with zeros."""
    with pytest.raises(ValueError, match=r"episode 3 of g, turn 0 of seat 0: 2 sampled tokens but 1"):
        rows(group(turn(0, [1], [2, 3], logprobs=[-1.0])), [[[1.0]]])
    with pytest.raises(ValueError, match="prompt is empty"):
        rows(group(turn(0, [], [2, 3])), [[[1.0]]])


def test_advantages_must_fit() -> None:
    with pytest.raises(ValueError, match="zip"):
        rows(group(turn(0, [1], [2])), [[[1.0, 2.0]]])


ids = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@given(
    st.lists(st.tuples(st.integers(0, 1), ids, st.lists(st.integers(1, 9), max_size=4), st.booleans())),
)
@settings(max_examples=50, deadline=None)
def test_ids_under_the_mask_are_the_samplers(script: list[tuple[int, list[int], list[int], bool]]) -> None:
    """Pitfall 1, with append-only dialogue and fresh prompts mixed at random."""
    history: dict[int, list[int]] = {0: [], 1: []}
    turns = []
    for seat, read, wrote, fresh in script:
        prompt = read if fresh else history[seat] + read
        turns.append(turn(seat, prompt, wrote))
        history[seat] = prompt + wrote
    made = rows(group(*turns), [[[float(k) for k in range(len(turns))]]])
    for seat in (0, 1):
        mine = [r for r in made if r.role == f"role_{seat}"]
        under_mask = [
            (t, p, a)
            for r in mine
            for t, p, a, m in zip(r.tokens, r.logprobs, r.advantages, r.mask, strict=True)
            if m
        ]
        sampled = [
            (token, logprob, float(k))
            for k, t in enumerate(turns)
            if t.seat == seat
            for token, logprob in zip(t.completion_ids, t.logprobs, strict=True)
        ]
        assert under_mask == sampled
    for row in made:
        assert not row.mask[0]
        assert all(
            a == p == 0.0 for a, p, m in zip(row.advantages, row.logprobs, row.mask, strict=True) if not m
        )
