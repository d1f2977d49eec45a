"""Splitting, sorting and padding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ludus.learner.batching import (
    collate,
    count_tokens,
    count_turns,
    fill_rounds,
    microbatches,
    minibatches,
    passes,
)
from ludus.types import Sample

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 120))
@settings(max_examples=60, deadline=None)
def test_microbatches_hold_every_row_once_within_the_limit(lengths: list[int], limit: int) -> None:
    made = microbatches(lengths, limit)
    assert sorted(i for part in made for i in part) == list(range(len(lengths)))
    for part in made:
        assert len(part) == 1 or len(part) * max(lengths[i] for i in part) <= limit
    order = [lengths[i] for part in made for i in part]
    assert order == sorted(lengths, reverse=True)


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 120))
@settings(max_examples=60, deadline=None)
def test_packed_microbatches_count_their_tokens_alone(lengths: list[int], limit: int) -> None:
    made = microbatches(lengths, limit, packed=True)
    assert [lengths[i] for part in made for i in part] == sorted(lengths, reverse=True)
    sizes = [sum(lengths[i] for i in part) for part in made]
    assert all(len(part) == 1 or size <= limit for part, size in zip(made, sizes, strict=True))
    for size, following in zip(sizes, made[1:], strict=False):
        assert size + lengths[following[0]] > limit  # the next row had no room


def test_a_row_over_the_limit_goes_alone() -> None:
    assert microbatches([3, 50, 4, 3], 10) == [[1], [2, 0], [3]]


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_rounds_are_filled_where_there_are_rows_enough(sizes: list[int], ranks: int) -> None:
    rows = iter(range(sum(sizes)))
    micros = [[next(rows) for _ in range(size)] for size in sizes]
    made = fill_rounds(micros, ranks)
    assert [i for part in made for i in part] == list(range(sum(sizes)))
    assert all(made)
    assert len(made) % ranks == 0 or len(made) == sum(sizes)
    assert 0 <= len(made) - len(micros) < ranks


def test_the_fullest_microbatch_is_split() -> None:
    assert fill_rounds([[0], [1, 2], [3, 4, 5, 6, 7]], 4) == [[0], [1, 2], [3, 4], [5, 6, 7]]


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_minibatches_split_evenly_and_repeatably(count: int, parts: int, step: int) -> None:
    made = minibatches(count, parts, seed=7, step=step, epoch=0)
    assert made == minibatches(count, parts, seed=7, step=step, epoch=0)
    assert sorted(i for part in made for i in part) == list(range(count))
    assert len(made) == min(parts, count)
    assert max(map(len, made)) - min(map(len, made)) <= 1


def test_the_split_differs_between_epochs_steps_and_seeds() -> None:
    splits = [minibatches(50, 2, *key) for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))]
    assert len({str(s) for s in splits}) == 4


def test_collate_pads_on_the_right() -> None:
    long = Sample(
        [5, 6, 7, 8],
        [False, True, False, True],
        [0.0, -1.0, 0.0, -2.0],
        [0.0, 0.5, 0.0, 0.25],
        [-1, 0, -1, 1],
        "g",
        "r",
    )
    short = Sample([9, 1, 2], [False, True, True], [0.0, -3.0, -4.0], [0.0, 2.0, 2.0], [-1, 0, 0], "g", "r")
    batch = collate([long, short], CPU, proximal=[torch.tensor([0.0, 1, 0, 2]), torch.tensor([0.0, 3, 4])])
    assert batch.tokens.tolist() == [[5, 6, 7, 8], [9, 1, 2, 0]]
    assert batch.mask.tolist() == [[False, True, False, True], [False, True, True, False]]
    assert batch.behaviour_logprobs.tolist() == [[0, -1, 0, -2], [0, -3, -4, 0]]
    assert batch.advantages.tolist() == [[0, 0.5, 0, 0.25], [0, 2, 2, 0]]
    assert batch.turn_weights.tolist() == [[0, 1, 0, 1], [0, 0.5, 0.5, 0]]
    assert batch.lengths.tolist() == [4, 3]
    assert batch.proximal_logprobs is not None
    assert batch.proximal_logprobs.tolist() == [[0, 1, 0, 2], [0, 3, 4, 0]]
    assert count_tokens([long, short]) == 4
    assert count_turns([long, short]) == 3


def test_every_turn_weighs_one(build_rows: Callable[..., list[Sample]]) -> None:
    made = build_rows(9)
    assert abs(collate(made, CPU).turn_weights.sum().item() - count_turns(made)) < 1e-5


@given(count=st.integers(1, 40), batch=st.integers(1, 10), epochs=st.integers(1, 3), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_passes_go_over_all_rows_in_whole_batches(count: int, batch: int, epochs: int, seed: int) -> None:
    batches = list(passes(count, batch, epochs, seed))
    assert batches == list(passes(count, batch, epochs, seed))
    each = count // batch
    assert [len(one) for one in batches] == [batch] * (each * epochs)
    for epoch in range(epochs):
        rows = [i for one in batches[epoch * each : (epoch + 1) * each] for i in one]
        assert len(set(rows)) == len(rows) == each * batch
        assert set(rows) <= set(range(count))
