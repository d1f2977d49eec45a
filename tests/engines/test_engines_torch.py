"""What the torch engine samples and scores, against Hugging Face and against itself."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import pytest
import torch
from engine_models import make_requests, reference_logprobs, run
from families import EOS, FAMILIES, VOCAB, make_model
from transformers import PreTrainedModel

from ludus.engines.torch_engine import TorchEngine
from ludus.types import Request, Sampling, Stop, StopRule


def engine_of(model: PreTrainedModel, **options: object) -> TorchEngine:
    return TorchEngine.from_model(model, **{"slots": 6, "context": 128, "prefill_batch": 3, **options})


def greedy_by_generate(model: PreTrainedModel, request: Request) -> list[int]:
    prompt = torch.tensor([list(request.prompt_ids)])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=request.sampling.max_tokens,
        do_sample=False,
        eos_token_id=sorted(request.stop.ids),
        pad_token_id=0,
    )
    return out[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("attention", ["bmm", "sdpa"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_greedy_equals_generate(family: str, attention: str):
    model = make_model(family)
    requests = make_requests(20, temperature=0.0)  # far more than there are slots
    for request, completion in zip(
        requests, run(engine_of(model, attention=attention), requests), strict=True
    ):
        assert completion.ids == greedy_by_generate(model, request)
        assert completion.logprobs == [0.0] * len(completion.ids)
        ended = completion.ids[-1] == EOS
        assert completion.stop is (Stop.EOS if ended else Stop.LENGTH)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_sampled_logprobs_match_a_recomputation(family: str):
    model = make_model(family)
    requests = make_requests(20)
    for request, completion in zip(requests, run(engine_of(model), requests), strict=True):
        exact = reference_logprobs(model, request.prompt_ids, completion.ids)
        wanted = exact.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, atol=2e-5, rtol=0)


def test_logprobs_are_of_the_distribution_sampled_from(model: PreTrainedModel):
    requests = make_requests(12, temperature=0.8, top_k=7, top_p=0.9)
    for request, completion in zip(requests, run(engine_of(model), requests), strict=True):
        exact = reference_logprobs(model, request.prompt_ids, completion.ids) / 0.8
        for row, token, logprob in zip(exact, completion.ids, completion.logprobs, strict=True):
            probs = sorted(((p, i) for i, p in enumerate(row.softmax(-1).tolist())), reverse=True)[:7]
            total, kept, mass = sum(p for p, _ in probs), {}, 0.0
            for p, i in probs:
                if mass < 0.9:
                    kept[i] = p
                mass += p / total
            assert token in kept
            assert logprob == pytest.approx(math.log(kept[token] / sum(kept.values())), abs=2e-5)


@pytest.mark.parametrize("family", ["qwen3-tied", "gemma3"])
@pytest.mark.parametrize("attention", ["bmm", "sdpa"])
def test_long_prompts_cross_the_blocks(family: str, attention: str):
    model = make_model(family)
    requests = [
        Request("self", [(7 * i + n) % VOCAB for i in range(n)], n, Sampling(5), StopRule(frozenset()))
        for n in (63, 64, 65, 128, 129, 200)
    ]
    engine = engine_of(model, context=220, attention=attention)
    for request, completion in zip(requests, run(engine, requests), strict=True):
        exact = reference_logprobs(model, request.prompt_ids, completion.ids)
        wanted = exact.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, atol=2e-5, rtol=0)


def test_the_first_token_is_drawn_as_often_as_it_should_be(model: PreTrainedModel):
    prompt, n = [1, 2, 3], 3000
    requests = [Request("self", prompt, i, Sampling(1), StopRule(frozenset())) for i in range(n)]
    completions = run(engine_of(model, slots=256, prefill_batch=256), requests)
    counts = torch.bincount(torch.tensor([c.ids[0] for c in completions]), minlength=VOCAB).double()
    expected = reference_logprobs(model, prompt, [0])[0].exp().double() * n
    common = expected >= 5
    rare = torch.stack([counts[~common].sum()]), torch.stack([expected[~common].sum()])
    counts, expected = (torch.cat([x[common], r]) for x, r in zip((counts, expected), rare, strict=True))
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(counts) - 1
    assert freedom >= 5
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5 + 5


def test_results_do_not_depend_on_the_company(model: PreTrainedModel):
    requests = make_requests(16)
    together = run(engine_of(model), requests)
    backwards = run(engine_of(model, slots=4, prefill_batch=2), requests[::-1])[::-1]
    for request, a, b in zip(requests, together, backwards, strict=True):
        (alone,) = run(engine_of(model, slots=1), [request])
        assert a.ids == b.ids == alone.ids
        assert a.stop is b.stop is alone.stop
        assert a.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
        assert b.logprobs == pytest.approx(alone.logprobs, abs=1e-5)


def test_two_runs_are_equal_bit_for_bit(model: PreTrainedModel):
    requests = make_requests(20)
    first = run(engine_of(model), requests)
    engine = engine_of(model)
    assert run(engine, requests) == first
    assert run(engine, requests) == first  # a cache that was used before changes nothing


def test_other_seeds_give_other_tokens(model: PreTrainedModel):
    request = make_requests(1)[0]
    requests = [replace(request, seed=i, sampling=Sampling(12), stop=StopRule(frozenset())) for i in range(8)]
    assert len({tuple(c.ids) for c in run(engine_of(model), requests)}) == 8


def test_bfloat16_runs_and_stays_near(model: PreTrainedModel):
    requests = make_requests(12)
    completions = run(engine_of(model, dtype=torch.bfloat16), requests)
    gaps = []
    for request, completion in zip(requests, completions, strict=True):
        exact = reference_logprobs(model, request.prompt_ids, completion.ids)
        wanted = exact.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        gaps += (torch.tensor(completion.logprobs) - wanted).abs().tolist()
    assert 0 < sum(gaps) / len(gaps) < 0.2


# ---------------------------------------------------------------------- stops


def stops_of(engine: TorchEngine, request: Request, stop: StopRule, limit: int):
    (completion,) = run(engine, [replace(request, stop=stop, sampling=Sampling(limit))])
    return completion


def test_where_a_completion_ends(model: PreTrainedModel):
    """Pitfall 7: what ends exactly at the limit says why it really ended."""
    engine = engine_of(model)
    request = replace(make_requests(1, seed=3)[0], seed=11)
    free = stops_of(engine, request, StopRule(frozenset()), 10)
    assert (len(free.ids), free.stop) == (10, Stop.LENGTH)
    # the first place whose token has not come up before
    at = next(i for i in range(2, 10) if free.ids[i] not in free.ids[:i])
    token, cut = free.ids[at], free.ids[: at + 1]
    for limit in (at + 1, 10):
        done = stops_of(engine, request, StopRule(frozenset({token})), limit)
        assert (done.ids, done.stop) == (cut, Stop.EOS)
        done = stops_of(engine, request, StopRule(frozenset(), frozenset({token}), lambda ids: True), limit)
        assert (done.ids, done.stop) == (cut, Stop.ACTION)
        assert len(done.logprobs) == len(done.ids)
    # an id that is both an end and a trigger is an end
    both = StopRule(frozenset({token}), frozenset({token}), lambda ids: True)
    assert stops_of(engine, request, both, 10).stop is Stop.EOS
    one = stops_of(engine, request, StopRule(frozenset()), 1)
    assert (one.ids, one.stop) == (free.ids[:1], Stop.LENGTH)
    one = stops_of(engine, request, StopRule(frozenset({free.ids[0]})), 5)
    assert (one.ids, one.stop) == (free.ids[:1], Stop.EOS)


def test_closed_is_asked_after_triggers_only_and_sees_all_so_far(model: PreTrainedModel):
    engine = engine_of(model)
    request = replace(make_requests(1, seed=3)[0], seed=11)
    free = stops_of(engine, request, StopRule(frozenset()), 12)
    triggers = frozenset(free.ids[2:9:2])
    asked: list[list[int]] = []

    def closed(ids):
        asked.append(list(ids))
        return len(ids) >= 9

    done = stops_of(engine, request, StopRule(frozenset(), triggers, closed), 12)
    expected = [free.ids[: i + 1] for i in range(12) if free.ids[i] in triggers]
    last = next(i for i, ids in enumerate(expected) if len(ids) >= 9)
    assert asked == expected[: last + 1]
    assert (done.ids, done.stop) == (expected[last], Stop.ACTION)


def test_requests_with_different_rules_run_together(model: PreTrainedModel):
    requests = [
        replace(r, stop=StopRule(frozenset({i % VOCAB, (i + 9) % VOCAB})))
        for i, r in enumerate(make_requests(60))
    ]
    engine = engine_of(model)
    together = run(engine, requests)
    assert run(engine, requests) == together
    for request, completion in zip(requests, together, strict=True):
        assert not set(completion.ids[:-1]) & request.stop.ids
        ended = completion.ids[-1] in request.stop.ids
        assert (completion.stop is Stop.EOS) == ended
        assert ended or len(completion.ids) == request.sampling.max_tokens


# ---------------------------------------------------------------------- scoring


@pytest.mark.parametrize("family", list(FAMILIES))
def test_scores_match_a_forward_pass(family: str):
    model = make_model(family)
    engine = engine_of(model)
    requests = make_requests(17, longest=90)
    prompts = [list(r.prompt_ids) for r in requests]
    continuations = [list(r.prompt_ids)[: i % 6] for i, r in enumerate(requests)]
    scores = asyncio.run(engine.score("self", prompts, continuations))
    for prompt, continuation, score in zip(prompts, continuations, scores, strict=True):
        assert len(score) == len(continuation)
        if continuation:
            exact = reference_logprobs(model, prompt, continuation)
            wanted = exact.gather(1, torch.tensor(continuation)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(score), wanted, atol=1e-5, rtol=0)


def test_scores_sum_to_one_over_the_vocabulary(model: PreTrainedModel):
    scores = asyncio.run(engine_of(model).score("self", [[1, 2]] * VOCAB, [[i] for i in range(VOCAB)]))
    assert sum(torch.tensor(scores)[:, 0].exp().tolist()) == pytest.approx(1, abs=1e-5)


def test_nothing_to_score(model: PreTrainedModel):
    engine = engine_of(model)
    assert asyncio.run(engine.score("self", [], [])) == []
    assert asyncio.run(engine.score("self", [[1], [2]], [[], []])) == [[], []]
