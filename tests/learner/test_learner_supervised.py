"""Supervised rows beside self-play: the draw, and the gradient of a mixed step."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from ludus.config import LossConfig, OptimConfig
from ludus.learner.learner import Learner, NonFinite
from ludus.learner.placement import Solo
from ludus.learner.supervised import Row, Source, Supervised
from ludus.types import Sample

BuildModel = Callable[..., PreTrainedModel]
BuildRows = Callable[..., list[Sample]]


def learner(model: PreTrainedModel, supervised: Supervised | None = None, **optim: object) -> Learner:
    return Learner(
        model,
        LossConfig(),
        OptimConfig.model_validate({"lr": 1e-2, "grad_clip": 1e9, **optim}),
        max_tokens=8,
        total_steps=100,
        seed=5,
        supervised=supervised,
    )


def gradients(made: Learner) -> list[dict[str, Tensor]]:
    """The gradient of every optimizer step from now on."""
    seen: list[dict[str, Tensor]] = []

    def catch(*_: object) -> None:
        seen.append({n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None})

    made.optimizer.register_step_pre_hook(catch)
    return seen


def numbered(*weights: float, rows: int = 6) -> list[Source]:
    """Sources whose rows tell where they come from: row k of source i is [i, k, ...]."""
    return [
        Source(f"file {i}", weight, [Row(array("i", [i, k, 3, 4]), ((1, 4),)) for k in range(rows)])
        for i, weight in enumerate(weights)
    ]


# --- rows ---


def test_a_row_trains_its_stretches_alone() -> None:
    sample = Row(array("i", [7, 8, 9, 10, 11, 12]), ((1, 3), (5, 6))).sample("talk")
    assert sample.tokens == [7, 8, 9, 10, 11, 12]
    assert sample.mask == [False, True, True, False, False, True]
    assert sample.turn_ids == [-1, 0, 0, -1, -1, 1]
    assert sample.advantages == [0.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    assert sample.logprobs == [0.0] * 6
    assert (sample.game, sample.role) == ("talk", "")


# --- the draw ---


@given(
    where=st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 3), st.integers(0, 3)),
    batch=st.integers(1, 40),
)
@settings(max_examples=30, deadline=None)
def test_the_draw_depends_on_where_it_is_for_and_repeats_as_little_as_it_can(
    where: tuple[int, int, int, int], batch: int
) -> None:
    made = Supervised(numbered(1.0, 2.0), weight=0.5, batch=batch)
    drawn = [tuple(s.tokens[:2]) for s in made.draw(*where)]
    again = [tuple(s.tokens[:2]) for s in Supervised(numbered(1.0, 2.0), weight=9, batch=batch).draw(*where)]
    assert drawn == again
    assert len(drawn) == batch
    for source in (0, 1):
        counts = Counter(k for i, k in drawn if i == source)
        if counts:
            assert max(counts.values()) - (min(counts.values()) if len(counts) == 6 else 0) <= 1


def test_draws_differ_between_seeds_updates_epochs_and_minibatches() -> None:
    made = Supervised(numbered(1.0, rows=1000), weight=1.0, batch=8)
    places = [(s, u, e, m) for s in (0, 1) for u in (0, 1) for e in (0, 1) for m in (0, 1)]
    assert len({str(made.draw(*place)) for place in places}) == len(places)


def test_sources_share_by_their_weights() -> None:
    made = Supervised(numbered(1.0, 3.0), weight=1.0, batch=4)
    drawn = Counter(s.tokens[0] for update in range(1000) for s in made.draw(0, update, 0, 0))
    assert abs(drawn[1] - 3000) < 5 * (4000 * 0.25 * 0.75) ** 0.5  # five standard deviations


def test_the_digest_tells_rows_and_weights_apart() -> None:
    def digest(*sources: Source) -> str:
        return Supervised(sources, weight=1.0, batch=1).digest

    one, other = Row(array("i", [1, 2, 3]), ((1, 3),)), Row(array("i", [1, 2, 3]), ((2, 3),))
    found = [
        digest(Source("a", 1.0, [one])),
        digest(Source("a", 1.0, [other])),
        digest(Source("a", 2.0, [one])),
        digest(Source("a", 1.0, [one, one])),
        digest(Source("a", 1.0, [Row(array("i", [1, 2, 4]), ((1, 3),))])),
    ]
    assert len(set(found)) == len(found)
    assert digest(Source("a", 1.0, [one])) == found[0]


# --- the mixed step ---


@pytest.mark.parametrize(
    "optim",
    [{}, {"minibatches": 2, "microbatch_tokens": 20}, {"epochs": 2, "minibatches": 2}],
    ids=["one step", "minibatches", "epochs"],
)
def test_the_gradient_of_a_mixed_step_is_the_weighted_sum(
    build_model: BuildModel, build_rows: BuildRows, optim: dict[str, Any]
) -> None:
    """RL gradient + weight * gradient of the mean cross-entropy, for every optimizer step.

    The learning rate is so small that all steps of an update start from the same weights.
    """
    rows, tiny = build_rows(6, logprob=-2.0), {"lr": 1e-12, **optim}
    sources = [Source("a", 1.0, [_as_row(sample) for sample in build_rows(9, seed=1)])]
    supervised = Supervised(sources, weight=0.3, batch=4)
    mixed = learner(build_model(), supervised, **tiny)
    plain = learner(build_model(), **tiny)
    seen, alone = gradients(mixed), gradients(plain)
    said, without = mixed.update(rows), plain.update(rows)

    steps = [(e, m) for e in range(optim.get("epochs", 1)) for m in range(optim.get("minibatches", 1))]
    assert len(seen) == len(alone) == len(steps)
    expected_loss, tokens = 0.0, 0
    for number, (epoch, minibatch) in enumerate(steps):
        drawn = supervised.draw(5, 0, epoch, minibatch)
        model = build_model()
        loss = _cross_entropy(model, drawn)
        loss.backward()
        expected_loss += loss.item() / len(steps)
        tokens += sum(sum(sample.mask) for sample in drawn)
        for name, p in model.named_parameters():
            assert p.grad is not None
            torch.testing.assert_close(
                seen[number][name], alone[number][name] + 0.3 * p.grad, rtol=1e-3, atol=1e-6
            )
    assert said["sft_loss"] == pytest.approx(expected_loss, rel=1e-4)
    assert said["sft_tokens"] == tokens
    assert said["loss"] == pytest.approx(without["loss"] + 0.3 * expected_loss, rel=1e-4)
    assert {k: said[k] for k in ("rows", "turns", "tokens")} == {
        k: without[k] for k in ("rows", "turns", "tokens")
    }
    assert said["entropy"] == pytest.approx(without["entropy"], rel=1e-6)  # of the played tokens alone


def test_without_supervised_rows_nothing_is_said_of_them(
    build_model: BuildModel, build_rows: BuildRows
) -> None:
    assert not {"sft_loss", "sft_tokens"} & learner(build_model()).update(build_rows(3)).keys()


def test_threads_add_up_to_the_same_gradient(build_model: BuildModel, build_rows: BuildRows) -> None:
    supervised = Supervised(
        [Source("a", 1.0, [_as_row(s) for s in build_rows(9, seed=1)])], weight=0.3, batch=6
    )
    seen = []
    for workers in (1, 2):
        made = learner(build_model(), supervised, microbatch_tokens=20)
        assert isinstance(made.placement, Solo)
        made.placement.lanes = workers
        caught = gradients(made)
        made.update(build_rows(6))
        seen.append(caught[0])
    for name, one in seen[0].items():
        torch.testing.assert_close(seen[1][name], one, rtol=1e-4, atol=1e-7)


def test_a_step_with_nothing_played_takes_nothing_from_the_data(build_model: BuildModel) -> None:
    """All matches masked: the update stands still, as without supervised rows."""
    model = build_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    made = learner(model, Supervised(numbered(1.0), weight=1.0, batch=2))
    assert made.update([])["rows"] == 0
    assert made.steps == 1
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_an_infinite_supervised_loss_stops_before_the_weights(
    build_model: BuildModel, build_rows: BuildRows
) -> None:
    model = build_model()
    made = learner(model, Supervised(numbered(1.0), weight=1e38, batch=2))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(NonFinite, match="not taken"):
        made.update(build_rows(3))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_a_resumed_learner_draws_on(build_model: BuildModel, build_rows: BuildRows) -> None:
    """Nothing but the counters is saved, and the next draws are those of the undisturbed learner."""
    supervised = Supervised(numbered(1.0, 1.0, rows=20), weight=0.5, batch=4)
    whole = learner(build_model(), supervised, minibatches=2)
    for seed in range(3):
        whole.update(build_rows(6, seed=seed))
    first = learner(build_model(), supervised, minibatches=2)
    for seed in range(2):
        first.update(build_rows(6, seed=seed))
    tensors, values = first.state()
    assert set(values) == {"steps", "seed", "optimizer_steps"}
    second = learner(build_model(seed=1), supervised, minibatches=2)
    second.load_state(tensors, values)
    second.update(build_rows(6, seed=2))
    for (name, p), (_, q) in zip(
        whole.model.named_parameters(), second.model.named_parameters(), strict=True
    ):
        assert torch.equal(p, q), name


def _as_row(sample: Sample) -> Row:
    """A row of the same tokens that trains the last of them."""
    return Row(array("i", sample.tokens), ((len(sample.tokens) - 2, len(sample.tokens)),))


def _cross_entropy(model: PreTrainedModel, samples: list[Sample]) -> Tensor:
    """Mean over all trained tokens, one row and one token after the other."""
    losses = []
    for sample in samples:
        logits = model(input_ids=torch.tensor([sample.tokens])).logits[0]
        for t, trained in enumerate(sample.mask):
            if trained:
                losses.append(-logits[t - 1].log_softmax(-1)[sample.tokens[t]])
    return torch.stack(losses).mean()
