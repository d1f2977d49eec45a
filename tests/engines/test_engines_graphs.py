"""Static decode steps against plain ones, and what is recorded of them.

Where there is no GPU, `recorded` stands for CUDA's recording and is as strict: it keeps the very tensors and
the very numbers that each operation got, and replays those, so that whatever a graph's key forgets, a test
sees. It also refuses what CUDA cannot record.
"""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_models import make_requests, run
from families import EOS, VOCAB, make_model
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from ludus.engines import graphs
from ludus.engines.base import Adapter
from ludus.engines.graphs import grid_down, grid_up
from ludus.engines.torch_engine import TorchEngine
from ludus.types import Completion, Request, Sampling, StopRule

ON_CUDA = torch.cuda.is_available()


class _Recording(TorchDispatchMode):
    """Every operation with its arguments; tensors that it made itself are told from those of before."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert torch.Tag.data_dependent_output not in func.tags, f"{func} waits for the device"
        if torch.Tag.dynamic_output_shape in func.tags:  # known beforehand only where indices are integers
            assert func is torch.ops.aten.index.Tensor
            assert all(i is None or i.dtype == torch.int64 for i in args[1])
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out


def recorded(work: Callable[[], None]) -> Callable[[], None]:
    """A recording of `work`, which is done at once, so that the first replay does nothing."""
    recording = _Recording()
    with recording:
        work()
    fresh = True

    def replay() -> None:
        nonlocal fresh
        if fresh:
            fresh = False
            return
        made: dict[int, torch.Tensor] = {}

        def now(x: Any) -> Any:
            return made.get(id(x), x) if isinstance(x, torch.Tensor) else x

        for func, args, kwargs, out in recording.operations:
            again = func(*tree_map(now, args), **tree_map(now, kwargs))
            for before, after in zip(_tensors(out), _tensors(again), strict=True):
                made[id(before)] = after

    return replay


def _tensors(out: Any) -> list[torch.Tensor]:
    return [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]


def plain(model: PreTrainedModel, **options: Any) -> TorchEngine:
    return TorchEngine.from_model(model, **{"slots": 20, "context": 200, "graphs": False, **options})


def static(model: PreTrainedModel, capture: Any = recorded, **options: Any) -> TorchEngine:
    engine = plain(model, **{**options, "graphs": True})
    assert engine._graphs is not None
    if not ON_CUDA:
        engine._graphs._capture = capture
    return engine


def same(found: list[Completion], wanted: list[Completion]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a.ids, a.stop, a.version) == (b.ids, b.stop, b.version)
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-5)


def held(engine: TorchEngine) -> int:
    assert engine._graphs is not None
    return engine._graphs.count


def mixed(count: int, policies: list[str], seed: int = 0) -> list[Request]:
    """Requests of many lengths, greedy ones and filtered ones among them."""
    rng = random.Random(seed)
    out = []
    for i, request in enumerate(make_requests(count, seed)):
        sampling = Sampling(rng.randint(1, 90), *rng.choice([(1.0,), (1.0,), (0.0,), (0.7, 0.9, 5)]))
        rule = StopRule(frozenset({EOS, i % VOCAB}))
        out.append(replace(request, policy=policies[i % len(policies)], sampling=sampling, stop=rule))
    return out


# ---------------------------------------------------------------------- static steps are steps


@pytest.mark.parametrize("capture", [None, recorded], ids=["eager", "recorded"])
@pytest.mark.parametrize("family", ["qwen3-tied", "qwen2-sliding", "gemma3-capped"])
def test_static_steps_sample_what_plain_steps_sample(family: str, capture: Any):
    """Growing spans, holes, refills, rows that move; greedy, filtered and plain rows together."""
    model = make_model(family)
    requests = mixed(60, ["self"])
    same(run(static(model, capture), requests), run(plain(model), requests))


def test_graphs_are_replayed_and_kept_over_loads_in_place(model: PreTrainedModel):
    other, requests = make_model(seed=9), make_requests(40)
    engine = static(model)
    same(run(engine, requests), run(plain(model), requests))
    count = held(engine)
    assert count > 0
    assert engine._graphs is not None
    for version, weights in ((1, other), (2, model)):
        engine.load("self", weights.state_dict(), version)
        assert held(engine) >= count
        same(run(engine, requests), run(plain(weights, version=version), requests))


def test_policies_beside_one_another_keep_to_their_rows(model: PreTrainedModel):
    """Segments that begin and end off the grid, whose boundaries move."""
    names = ["self", "past/3", "past/7"]
    requests = mixed(40, names)

    def loaded(make: Callable[..., TorchEngine]) -> TorchEngine:
        engine = make(model, slots=23)
        for i, name in enumerate(names[1:], start=1):
            engine.load(name, make_model(seed=i).state_dict(), i)
        return engine

    engine, other = loaded(static), loaded(plain)
    for _ in range(2):
        same(run(engine, requests), run(other, requests))


def test_a_static_step_touches_no_row_but_its_own(model: PreTrainedModel):
    """Rows 3 to 5 of 20, of which [0, 8) are computed: every other row stays as it is, bit for bit."""
    engine = static(model, None)
    for tensor in engine._cache._flat:
        tensor.normal_()
    rows, cache, steps = engine._rows, engine._cache, engine._graphs
    assert steps is not None
    rows.position[:] = torch.randint(5, cache.span - 1, rows.position.shape)
    rows.position[-1] = 0
    rows._alive[:-1] = 1
    rows._limit[:] = 90
    names = [n for n, x in vars(rows).items() if isinstance(x, torch.Tensor) and len(x) == 21]
    assert len(names) == 12
    before = {n: vars(rows)[n].clone() for n in names}
    stored = [x.clone() for x in (*cache.keys, *cache.values)]
    with torch.inference_mode():
        steps._place(steps._shape(3, 6), 3, 6)
        steps._static_step(engine._weights["self"], steps._shape(3, 6))
    assert steps._shape(3, 6)[:2] == (0, 8)
    others = [i for i in range(20) if not 3 <= i < 6]
    for n in names:
        assert torch.equal(vars(rows)[n][others], before[n][others]), n
    for x, old in zip((*cache.keys, *cache.values), stored, strict=True):
        assert torch.equal(x[others], old[others])
        assert not torch.equal(x[3:6], old[3:6])
    assert torch.equal(rows.position[3:6], before["position"][3:6] + 1)
    assert rows.position[-1] == rows._count[-1] == rows._alive[-1] == 0


def test_a_static_step_needs_nothing_of_the_host(model: PreTrainedModel):
    """On a device other than the CPU, no operation is given a tensor of the CPU's."""
    engine = static(model, None, device="meta")
    steps = engine._graphs
    assert steps is not None
    recording = _Recording()
    for engine._rows.plain, engine._rows.filtered in ((True, False), (False, False), (False, True)):
        shape = steps._shape(3, 6)
        steps._place(shape, 3, 6)
        with torch.inference_mode(), recording:
            steps._static_step(engine._weights["self"], shape)
    used = [x for _, args, kwargs, _ in recording.operations for x in tree_leaves((args, kwargs))]
    assert {x.device.type for x in used if isinstance(x, torch.Tensor)} == {"meta"}


def test_weights_that_change_mid_way(model: PreTrainedModel):
    """Sequences in flight keep theirs; the next weights go where the ones before were, and find their graphs.
    Once unloaded, all of it is gone."""
    other = make_model(seed=9)
    long = [replace(r, sampling=Sampling(60), stop=StopRule(frozenset())) for r in make_requests(7)]
    late = [replace(r, sampling=Sampling(60), stop=StopRule(frozenset())) for r in make_requests(6, seed=50)]

    async def go(engine: TorchEngine) -> list[Completion]:
        first = [asyncio.create_task(engine.generate(r)) for r in long]
        for _ in range(20):
            await asyncio.sleep(0)
        engine.load("self", other.state_dict(), 1)
        second = [asyncio.create_task(engine.generate(r)) for r in late]
        return await asyncio.gather(*first, *second)

    engine = static(model)
    old = weakref.ref(engine._weights["self"])
    same(asyncio.run(go(engine)), asyncio.run(go(plain(model))))
    assert old() is engine._resting["self"]
    before = set(engine._graphs._held) if engine._graphs else set()
    assert before == {old(), engine._weights["self"]}
    same(asyncio.run(go(engine)), asyncio.run(go(plain(other, version=1))))
    assert engine._graphs is not None
    assert set(engine._graphs._held) == before  # the two take turns
    before.clear()
    engine.unload("self")
    gc.collect()
    assert old() is None
    assert held(engine) == 0


def test_many_stop_rules_change_the_table_under_the_graphs(model: PreTrainedModel):
    requests = [
        replace(r, stop=StopRule(frozenset({i % VOCAB, (7 * i + 1) % VOCAB})))
        for i, r in enumerate(make_requests(90))
    ]
    engine = static(model)
    for part in (requests[:10], requests, requests[40:]):
        same(run(engine, part), run(plain(model), part))


def test_each_way_of_sampling_has_graphs_of_its_own(model: PreTrainedModel):
    engine = static(model)
    for sampling in ({}, {"temperature": 0.5}, {"top_k": 3}, {"temperature": 0.0}, {}, {"top_p": 0.5}):
        requests = make_requests(20, **sampling)
        same(run(engine, requests), run(plain(model), requests))


# ---------------------------------------------------------------------- adapters


def adapter(model: PreTrainedModel, seed: int) -> Adapter:
    torch.manual_seed(seed)
    q = model.model.layers[1].self_attn.q_proj.weight
    place = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    tensors = {f"{place}A.weight": torch.randn(2, q.shape[1]), f"{place}B.weight": torch.randn(len(q), 2)}
    return Adapter("base", 2, 4, tensors)


def test_an_adapter_that_is_trained_keeps_its_graphs(model: PreTrainedModel):
    requests = [replace(r, policy="lora") for r in make_requests(30)]
    engine, other = static(model, policy="base"), plain(model, policy="base")
    counts = []
    for version in range(3):
        for e in (engine, other):
            e.load("lora", adapter(model, seed=version), version)
        same(run(engine, requests), run(other, requests))
        counts.append(held(engine))
    assert counts[0] == counts[1] == counts[2] > 0


def test_an_adapter_in_flight_or_on_another_base_is_not_written_over(model: PreTrainedModel):
    long = [replace(r, policy="lora", sampling=Sampling(40)) for r in make_requests(4)]

    async def go(engine: TorchEngine) -> list[Completion]:
        engine.load("lora", adapter(model, seed=0), 0)
        first = [asyncio.create_task(engine.generate(r)) for r in long]
        for _ in range(12):
            await asyncio.sleep(0)
        engine.load("lora", adapter(model, seed=1), 1)
        engine.load("base", make_model(seed=5).state_dict(), 1)
        second = [asyncio.create_task(engine.generate(r)) for r in long]
        return await asyncio.gather(*first, *second)

    found = asyncio.run(go(static(model, policy="base")))
    assert {c.version for c in found[:4]} == {0}
    for version, part in ((0, found[:4]), (1, found[4:])):
        alone = plain(model, policy="base")
        alone.load("lora", adapter(model, seed=version), version)
        same(part, run(alone, long))
    engine = plain(model, policy="base")
    engine.load("lora", adapter(model, seed=0), 0)
    engine.load("base", make_model(seed=5).state_dict(), 1)
    engine.load("lora", adapter(model, seed=0), 1)
    wanted = plain(make_model(seed=5), policy="base")
    wanted.load("lora", adapter(model, seed=0), 1)
    same(run(engine, long), run(wanted, long))


# ---------------------------------------------------------------------- how many, and where it cannot be


def test_the_graph_that_has_waited_longest_goes_first(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(graphs, "MOST", 3)
    requests = mixed(60, ["self"])
    engine = static(model)
    wanted = run(plain(model), requests)
    for _ in range(2):
        same(run(engine, requests), wanted)
        assert held(engine) == 3


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("no")])
def test_a_recording_that_fails_says_so_once(model: PreTrainedModel, error: RuntimeError):
    tried = 0

    def fails(work: Callable[[], None]) -> Callable[[], None]:
        nonlocal tried
        tried += 1
        if tried < 3:
            return recorded(work)
        raise error

    requests = make_requests(40)
    engine = static(model, fails)
    with pytest.warns(RuntimeWarning, match=f"CUDA graph .{error}.; .* engine.graphs = false") as told:
        same(run(engine, requests), run(plain(model), requests))
    assert len(told) == 1
    assert (tried, held(engine)) == (3, 0)


@given(st.integers(1, 5000))
def test_the_grid_is_coarse_and_never_far(count: int):
    up, down = grid_up(count), grid_down(count)
    assert down <= count <= up
    assert up - count < max(8, count / 4)
    assert grid_up(up) == grid_down(up) == up
    assert down == 0 or grid_down(down) == down


def test_spans_take_few_values(model: PreTrainedModel):
    engine = static(model, None, context=256)
    spans = set()
    for positions in range(1, 257):
        engine._cache.reserve(positions, 0)
        assert engine._cache.span >= positions
        spans.add(engine._cache.span)
    assert spans <= {*range(32, 257, 32)}


def test_the_cpu_has_no_graphs_unless_asked(model: PreTrainedModel):
    assert TorchEngine.from_model(model, slots=2, context=16)._graphs is None
    assert TorchEngine.from_model(model, slots=2, context=16, graphs=True)._graphs is not None


@pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_replays_what_it_records(model: PreTrainedModel, dtype: torch.dtype):
    requests = mixed(60, ["self", "past"])
    engines = [plain(model, device="cuda", dtype=dtype, graphs=graphs) for graphs in (True, False)]
    for engine in engines:
        engine.load("past", make_model(seed=3).state_dict(), 3)
    for _ in range(2):
        found, wanted = (run(engine, requests) for engine in engines)
        if dtype == torch.float32:
            same(found, wanted)
        assert held(engines[0]) > 0
