"""The optimizer step, against naive recomputations by hand-written loops."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ludus.config import LossConfig, OptimConfig
from ludus.errors import UserError
from ludus.learner import learner as room
from ludus.learner.learner import Learner, NonFinite, learning_rate
from ludus.types import Sample

BuildModel = Callable[..., PreTrainedModel]
BuildRows = Callable[..., list[Sample]]


def learner(model: PreTrainedModel, loss: Mapping[str, object] = {}, **optim: object) -> Learner:
    return Learner(
        model,
        LossConfig.model_validate(loss),
        OptimConfig.model_validate({"lr": 1e-2, "grad_clip": 1e9, **optim}),
        max_tokens=8,
        total_steps=100,
        seed=5,
    )


def snapshot(model: PreTrainedModel) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def caught_gradient(made: Learner) -> list[dict[str, Tensor]]:
    """The gradient of every optimizer step from now on."""
    seen: list[dict[str, Tensor]] = []

    def catch(*_: object) -> None:
        grads = {n: p.grad for n, p in made.model.named_parameters() if p.grad is not None}
        seen.append({n: g.clone() for n, g in grads.items()})

    made.optimizer.register_step_pre_hook(catch)
    return seen


def row_terms(model: PreTrainedModel, row: Sample, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Chosen log-probabilities [n] and all log-probabilities [n, V] at a row's trained tokens."""
    places = [t for t, trained in enumerate(row.mask) if trained]
    logits = model(input_ids=torch.tensor([row.tokens])).logits[0] / temperature
    every = torch.stack([logits[t - 1].log_softmax(-1) for t in places])
    return every[range(len(places)), [row.tokens[t] for t in places]], every


@pytest.mark.parametrize("normaliser", ["dr_grpo", "token_mean", "turn_mean"])
def test_the_gradient_equals_a_naive_loop(
    build_model: BuildModel, build_rows: BuildRows, normaliser: str
) -> None:
    """Every part of the loss at once, over rows of one and two turns of unequal length (pitfall 9)."""
    model, rows = build_model(), build_rows(7)
    weights = {"reference_kl": 0.3, "magnet_kl": 0.2, "entropy": 0.1}
    made = learner(model, {"normaliser": normaliser, **weights})
    for frozen in (made.reference, made.magnet):
        assert frozen is not None
        with torch.no_grad():
            for p in frozen.parameters():
                p.mul_(0.9)
    twin = copy.deepcopy(model)
    gradients = caught_gradient(made)
    metrics = made.update(rows)

    turns = sum(max(r.turn_ids) + 1 for r in rows)
    tokens = sum(sum(r.mask) for r in rows)
    total = torch.zeros(())
    entropies = []
    for row in rows:
        chosen, every = row_terms(twin, row)
        with torch.no_grad():
            assert made.reference is not None
            assert made.magnet is not None
            reference, _ = row_terms(made.reference, row)
            _, magnet = row_terms(made.magnet, row)
        places = [t for t, trained in enumerate(row.mask) if trained]
        for i, t in enumerate(places):
            ratio = (chosen[i] - chosen[i].detach()).exp()
            w = min(2.0, math.exp(chosen[i].item() - row.logprobs[t]))
            gap = reference[i] - chosen[i]
            spread = -(every[i].exp() * every[i]).sum()
            entropies.append(spread.item())
            value = (
                -w * ratio * row.advantages[t]
                + 0.3 * (gap.exp() - 1 - gap)
                + 0.2 * (every[i].exp() * (every[i] - magnet[i])).sum()
                - 0.1 * spread
            )
            size = row.turn_ids.count(row.turn_ids[t])
            share = {"dr_grpo": 1 / (turns * 8), "token_mean": 1 / tokens, "turn_mean": 1 / size / turns}
            total = total + value * share[normaliser]
    total.backward()

    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-4)
    assert metrics["entropy"] == pytest.approx(sum(entropies) / tokens, rel=1e-4)
    assert (metrics["rows"], metrics["turns"], metrics["tokens"]) == (7, turns, tokens)
    for name, p in twin.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(gradients[0][name], p.grad, rtol=1e-3, atol=1e-6)
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in twin.parameters() if p.grad is not None))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("normaliser", ["dr_grpo", "token_mean", "turn_mean"])
def test_accumulation_equals_the_whole_batch(
    build_model: BuildModel, build_rows: BuildRows, normaliser: str
) -> None:
    rows, seen = build_rows(9), []
    for limit in (1, 40, 8192):
        made = learner(build_model(), {"normaliser": normaliser}, microbatch_tokens=limit)
        gradients = caught_gradient(made)
        made.update(rows)
        seen.append(gradients[0])
    for name, whole in seen[2].items():
        torch.testing.assert_close(seen[0][name], whole, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(seen[1][name], whole, rtol=1e-3, atol=1e-6)


def test_merged_dialogue_gives_the_gradient_of_its_turns(build_model: BuildModel) -> None:
    """One row of two turns, or the same two turns as rows of their own."""
    merged = Sample(
        [1, 2, 3, 4, 5],
        [False, True, False, True, True],
        [0.0, -2.0, 0.0, -2.5, -3.0],
        [0.0, 1.0, 0.0, -0.5, -0.5],
        [-1, 0, -1, 1, 1],
        "g",
        "r",
    )
    first = Sample([1, 2], [False, True], [0.0, -2.0], [0.0, 1.0], [-1, 0], "g", "r")
    second = Sample(
        [1, 2, 3, 4, 5],
        [False, False, False, True, True],
        [0.0, 0.0, 0.0, -2.5, -3.0],
        [0.0, 0.0, 0.0, -0.5, -0.5],
        [-1, -1, -1, 0, 0],
        "g",
        "r",
    )
    for normaliser in ("dr_grpo", "token_mean", "turn_mean"):
        seen = []
        for rows in ([merged], [first, second]):
            made = learner(build_model(), {"normaliser": normaliser})
            gradients = caught_gradient(made)
            made.update(rows)
            seen.append(gradients[0])
        for name in seen[0]:
            torch.testing.assert_close(seen[0][name], seen[1][name], rtol=1e-3, atol=1e-6)


def test_zero_advantages_change_nothing(build_model: BuildModel, build_rows: BuildRows) -> None:
    """Pitfall 10: exactly zero gradient, so AdamW stands still."""
    rows = [dataclasses.replace(r, advantages=[0.0] * len(r.tokens)) for r in build_rows(5)]
    made = learner(build_model(), epochs=2)
    before = snapshot(made.model)
    metrics = made.update(rows)
    assert metrics["grad_norm"] == 0.0
    assert all(torch.equal(p, before[n]) for n, p in made.model.named_parameters())


def test_values_outside_the_mask_are_never_read(build_model: BuildModel, build_rows: BuildRows) -> None:
    """Pitfalls 4 and 6."""
    rows = build_rows(5)
    spoilt = [
        dataclasses.replace(
            r,
            advantages=[a if m else 1e9 for a, m in zip(r.advantages, r.mask, strict=True)],
            logprobs=[p if m else -1e9 for p, m in zip(r.logprobs, r.mask, strict=True)],
        )
        for r in rows
    ]
    ends = []
    for data in (rows, spoilt):
        made = learner(build_model(), epochs=2, minibatches=2)
        made.update(data)
        ends.append(snapshot(made.model))
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_the_clip_acts_from_the_second_epoch_on(build_model: BuildModel, build_rows: BuildRows) -> None:
    rows = build_rows(6)
    once = learner(build_model(), {"clip_low": 1e-3, "clip_high": 1e-3}).update(rows)
    assert once["clip_fraction"] == 0.0
    made = learner(build_model(), {"clip_low": 1e-3, "clip_high": 1e-3}, epochs=3)
    gradients = caught_gradient(made)
    metrics = made.update(rows)
    assert len(gradients) == 3
    assert metrics["clip_fraction"] > 0.2

    def norm(g: dict[str, Tensor]) -> float:
        return math.sqrt(sum(float((x**2).sum()) for x in g.values()))

    assert norm(gradients[2]) < 0.7 * norm(gradients[0])  # what has moved far enough is left alone


def test_importance_weights_stay_those_of_the_first_weights(
    build_model: BuildModel, build_rows: BuildRows
) -> None:
    """Between epochs the current policy moves; sampler against proximal does not."""
    rows = build_rows(6)
    one = learner(build_model()).update(rows)
    made = learner(build_model(), epochs=3, minibatches=2)
    many = made.update(rows)
    assert many["importance"] == pytest.approx(one["importance"], rel=1e-4)
    assert many["importance_max"] == pytest.approx(one["importance_max"], rel=1e-4)
    assert many["sampler_kl"] != pytest.approx(one["sampler_kl"], rel=1e-2)


def test_own_log_probabilities_give_weight_one(build_model: BuildModel, build_rows: BuildRows) -> None:
    """Pitfall 5: under the sampling temperature the learner reproduces what the sampler recorded."""
    model = build_model()
    rows = []
    for row in build_rows(5):
        with torch.no_grad():
            chosen = iter(row_terms(model, row, temperature=0.6)[0].tolist())
        rows.append(dataclasses.replace(row, logprobs=[next(chosen) if m else 0.0 for m in row.mask]))
    for temperature, fits in ((0.6, True), (1.0, False)):
        made = Learner(
            build_model(), LossConfig(), OptimConfig(), max_tokens=8, total_steps=1, temperature=temperature
        )
        metrics = made.update(rows)
        assert (abs(metrics["importance"] - 1.0) < 1e-4) is fits
        assert (metrics["sampler_kl"] < 1e-8) is fits


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["advantages", "logprobs", "weights"])
def test_non_finite_stops_before_the_update(
    build_model: BuildModel, build_rows: BuildRows, poison: float, where: str
) -> None:
    """Pitfall 22."""
    rows, made = build_rows(4), learner(build_model())
    made.update(rows)
    if where == "weights":
        with torch.no_grad():
            next(iter(made.model.parameters()))[3, 2] = poison
    else:
        place = rows[2].mask.index(True)
        getattr(rows[2], where)[place] = poison
    before, tensors = snapshot(made.model), made.state()[0]
    with pytest.raises(NonFinite, match="update 1"):
        made.update(rows)
    assert made.steps == 1
    for name, p in made.model.named_parameters():
        assert torch.equal(p.nan_to_num(7.0), before[name].nan_to_num(7.0))
        assert p.grad is None or not p.grad.any()
    for name, tensor in made.state()[0].items():
        assert torch.equal(tensor.nan_to_num(7.0), tensors[name].nan_to_num(7.0))


def test_sft_is_cross_entropy_and_learns(build_model: BuildModel, build_rows: BuildRows) -> None:
    rows, model = build_rows(6), build_model()
    with torch.no_grad():
        want = -torch.cat([row_terms(model, r)[0] for r in rows]).mean().item()
    made = learner(model, epochs=2, minibatches=2)
    rows = [dataclasses.replace(r, logprobs=[math.nan] * len(r.tokens)) for r in rows]  # never read
    assert learner(build_model()).sft(rows)["loss"] == pytest.approx(want, rel=1e-4)
    losses = [made.sft(rows)["loss"] for _ in range(25)]
    assert losses[-1] < 0.3 * want


def test_reinforcement_raises_what_paid(build_model: BuildModel) -> None:
    """From the reply 7 or 8 to one prompt, with advantage +1 and -1, the policy turns to 7."""
    rows = [
        Sample([1, reply], [False, True], [0.0, -3.0], [0.0, pay], [-1, 0], "g", "r")
        for reply, pay in ((7, 1.0), (8, -1.0))
    ]
    made = learner(build_model())
    for _ in range(20):
        made.update(rows)
    with torch.no_grad():
        after = made.model(input_ids=torch.tensor([[1]])).logits[0, 0].softmax(-1)
    assert after[7] > 0.9
    assert after[8] < 0.01


def test_no_rows_take_no_optimizer_step(build_model: BuildModel) -> None:
    made = learner(build_model(), {"magnet_kl": 0.1}, warmup_steps=4, average=0.5)
    before = snapshot(made.model)
    metrics = made.update([])
    assert metrics == {"lr": 1e-2 / 4, "rows": 0.0, "turns": 0.0, "tokens": 0.0}
    assert made.steps == 1
    assert all(torch.equal(p, before[n]) for n, p in made.model.named_parameters())


def test_the_magnet_stands_still_between_refreshes(build_model: BuildModel, build_rows: BuildRows) -> None:
    made = learner(build_model(), {"magnet_kl": 0.1, "magnet_every": 3})
    assert made.magnet is not None
    start = snapshot(made.model)
    first = made.update(build_rows(4))
    assert first["magnet_kl"] == 0.0  # a copy of the current policy: exactly no distance
    second = made.update(build_rows(4))
    assert second["magnet_kl"] > 0.0
    assert all(torch.equal(p, start[n]) for n, p in made.magnet.named_parameters())
    made.update(build_rows(4))
    assert all(
        torch.equal(p, q) for p, q in zip(made.magnet.parameters(), made.model.parameters(), strict=True)
    )
    assert made.update(build_rows(4))["magnet_kl"] == 0.0


def test_the_magnet_can_be_a_copy_of_the_moving_average(
    build_model: BuildModel, build_rows: BuildRows
) -> None:
    made = learner(build_model(), {"magnet_kl": 0.1, "magnet_every": 2, "magnet_of": "average"}, average=0.75)
    assert made.magnet is not None
    made.update(build_rows(4))
    made.update(build_rows(4))
    kept, average = snapshot(made.magnet), dict(made.average_weights())
    assert all(torch.equal(kept[n], average[n]) for n in kept)
    assert any(not torch.equal(p, kept[n]) for n, p in made.model.named_parameters())
    made.update(build_rows(4))  # the average has moved on, the magnet has not
    assert all(torch.equal(p, kept[n]) for n, p in made.magnet.named_parameters())


def test_the_magnet_holds_the_policy_back(build_model: BuildModel, build_rows: BuildRows) -> None:
    ends = {}
    for weight in (0.0, 10.0):
        made = learner(build_model(), {"magnet_kl": weight} if weight else {})
        start = copy.deepcopy(made.model)
        for _ in range(15):
            made.update(build_rows(4))
        with torch.no_grad():
            q = torch.cat([row_terms(start, r)[1] for r in build_rows(4)])
            p = torch.cat([row_terms(made.model, r)[1] for r in build_rows(4)])
        ends[weight] = (p.exp() * (p - q)).sum(-1).mean().item()
    assert ends[10.0] < 0.3 * ends[0.0]


def test_the_moving_average(build_model: BuildModel, build_rows: BuildRows) -> None:
    made = learner(build_model(), average=0.75)
    want = snapshot(made.model)
    for _ in range(3):
        made.update(build_rows(3))
        want = {n: 0.75 * old + 0.25 * made.model.get_parameter(n).detach() for n, old in want.items()}
    got = made.average_weights()
    assert got.keys() == made.weights().keys()
    assert torch.equal(got["lm_head.weight"], got["model.embed_tokens.weight"])
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6)
    plain = learner(build_model())
    assert all(torch.equal(t, plain.weights()[n]) for n, t in plain.average_weights().items())


def test_weights_are_the_state_dict_of_the_model(build_model: BuildModel, build_rows: BuildRows) -> None:
    made, other = learner(build_model()), build_model(9)
    made.update(build_rows(3))
    other.load_state_dict(dict(made.weights()))
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(other(input_ids=tokens).logits, made.model(input_ids=tokens).logits)
    assert not any(t.requires_grad for t in made.weights().values())


def test_weight_decay_spares_norms(build_model: BuildModel, build_rows: BuildRows) -> None:
    rows = [dataclasses.replace(r, advantages=[0.0] * len(r.tokens)) for r in build_rows(3)]
    made = learner(build_model(), weight_decay=0.5)
    before = snapshot(made.model)
    made.update(rows)
    for name, p in made.model.named_parameters():
        factor = 1.0 if p.ndim < 2 else 1.0 - 1e-2 * 0.5
        torch.testing.assert_close(p.detach(), before[name] * factor)


def test_the_gradient_is_clipped(build_model: BuildModel, build_rows: BuildRows) -> None:
    made = learner(build_model(), grad_clip=1e-3)
    gradients = caught_gradient(made)
    metrics = made.update(build_rows(4))
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients[0].values()))
    assert metrics["grad_norm"] > 1e-2
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_learning_rate_schedule() -> None:
    flat = OptimConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(flat, s, 10) for s in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    line = OptimConfig(lr=1.0, final_lr=0.5, schedule="linear", warmup_steps=2)
    assert [learning_rate(line, s, 12) for s in (1, 2, 7, 12, 99)] == [1.0, 1.0, 0.75, 0.5, 0.5]
    wave = OptimConfig(lr=1.0, final_lr=0.2, schedule="cosine")
    assert [learning_rate(wave, s, 10) for s in (0, 5, 10)] == pytest.approx([1.0, 0.6, 0.2])
    assert learning_rate(wave, 2, 10) == pytest.approx(0.2 + 0.4 * (1 + math.cos(0.2 * math.pi)))


def test_the_schedule_reaches_the_optimizer(build_model: BuildModel, build_rows: BuildRows) -> None:
    made = learner(build_model(), warmup_steps=2)
    rates = [made.update(build_rows(2))["lr"] for _ in range(3)]
    assert rates == [5e-3, 1e-2, 1e-2]
    assert {g["lr"] for g in made.optimizer.param_groups} == {1e-2}


@pytest.mark.parametrize(
    ("sampling", "message"),
    [({"temperature": 0.0}, "greedy"), ({"top_p": 0.9}, "top_p = 0.9"), ({"top_k": 5}, "top_k = 5")],
)
def test_sampling_that_cannot_be_trained_on(
    build_model: BuildModel, sampling: dict[str, float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Learner(build_model(), LossConfig(), OptimConfig(), max_tokens=8, total_steps=1, **sampling)  # type: ignore[arg-type]


def test_a_bfloat16_model_keeps_float32_weights(build_model: BuildModel, build_rows: BuildRows) -> None:
    """A step of 1e-6 vanishes in bf16 weights; here it must not."""
    rows = build_rows(4)
    made = learner(
        build_model().to(torch.bfloat16), {"magnet_kl": 0.1, "reference_kl": 0.1}, lr=1e-6, epochs=2
    )
    exact = learner(
        build_model().to(torch.bfloat16).float(), {"magnet_kl": 0.1, "reference_kl": 0.1}, epochs=2
    )
    before = snapshot(made.model)
    low, high = made.update(rows), exact.update(rows)
    assert made.model.dtype is torch.float32
    kept = made.state()[0]
    assert {t.dtype for n, t in kept.items() if n.startswith(("model.", "optimizer."))} == {torch.float32}
    assert {t.dtype for n, t in kept.items() if n.startswith(("magnet.", "reference."))} == {torch.bfloat16}
    assert sum(float((p != before[n]).float().mean()) for n, p in made.model.named_parameters()) > 1.0
    assert low["entropy"] == pytest.approx(high["entropy"], rel=0.05)
    assert low["entropy"] != high["entropy"]  # it really computed in bf16


def test_the_precision_of_products_is_set_and_put_back(
    build_model: BuildModel, build_rows: BuildRows
) -> None:
    made, seen = learner(build_model()), []
    made.optimizer.register_step_pre_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        made.update(build_rows(2))
        assert seen == [room.PRECISION]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
