"""Real failures to get memory, under a limit that the kernel keeps."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from ludus.memory import OutOfMemory, within_memory

LIMIT = """
import resource


def limit(mib):
    '''From here on this process may map so much more memory, and no more.'''
    pages = int(open("/proc/self/statm").read().split()[0])
    size = pages * resource.getpagesize() + mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))
"""
MODEL = """
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

torch.set_num_threads(1)
config = Qwen3Config(
    vocab_size=64, hidden_size=64, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, max_position_embeddings=1 << 20,
)
model = Qwen3ForCausalLM(config)
"""


def run(script: str) -> str:
    """What a Python script prints, one CPU thread and the limit at hand."""
    done = subprocess.run(
        [sys.executable, "-c", LIMIT + MODEL + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_learner_says_what_to_lower_and_keeps_its_weights() -> None:
    said = run(
        """
        from ludus.config import LossConfig, OptimConfig
        from ludus.learner.learner import Learner
        from ludus.memory import OutOfMemory
        from ludus.types import Sample

        def row(length):
            read = length - 4
            mask = [False] * read + [True] * 4
            numbers = [-1] * read + [0] * 4
            return Sample([1] * length, mask, [-2.0] * length, [1.0] * length, numbers, "g", "r")

        learner = Learner(model, LossConfig(), OptimConfig(lr=1e-2), max_tokens=8, total_steps=9)
        learner.update([row(40)])
        before = {n: p.detach().clone() for n, p in learner.model.named_parameters()}
        limit(256)
        try:
            learner.update([row(200_000)])
        except OutOfMemory as e:
            print(e)
        print(all(torch.equal(p, before[n]) for n, p in learner.model.named_parameters()), learner.steps)
        learner.update([row(40)])
        print(learner.steps)
        """
    )
    assert said.startswith("memory ran out in update 1 of the learner (")
    assert "lower optim.microbatch_tokens (now 8192)" in said
    assert said.splitlines()[1:] == ["True 1", "2"]


def test_the_engine_says_what_to_lower() -> None:
    said = run(
        """
        from ludus.engines.torch_engine import TorchEngine
        from ludus.memory import OutOfMemory

        limit(256)
        try:
            TorchEngine.from_model(model, slots=4096, context=32768)
        except OutOfMemory as e:
            print(e)
        engine = TorchEngine.from_model(model, slots=4, context=128)
        print(engine.versions)
        try:
            for k in range(1000):
                engine.load(f"past/{k}", model.state_dict(), 0)
        except OutOfMemory as e:
            print(e)
        """
    )
    cache, versions, weights = said.splitlines()
    assert cache.startswith("memory ran out for the sampling engine's cache (")
    assert cache.endswith("lower engine.slots (now 4096) or engine.context (now 32768)")
    assert versions == "{'self': 0}"
    assert "for the weights of policy 'past/" in weights
    assert "league.resident" in weights


def test_a_step_of_the_engine_that_fails_tells_everybody_who_waits() -> None:
    said = run(
        """
        import asyncio
        from ludus.engines.torch_engine import TorchEngine
        from ludus.types import Request, Sampling, StopRule

        engine = TorchEngine.from_model(model, slots=8, context=1 << 16, prefill_batch=8)
        limit(256)

        async def ask(length):
            asked = Request("self", [1] * length, 0, Sampling(2), StopRule(frozenset()))
            return await engine.generate(asked)

        async def go():
            found = await asyncio.gather(*(ask(60_000) for _ in range(8)), return_exceptions=True)
            print(len(found), {type(x).__name__ for x in found}, found[0])
            print(len((await ask(10)).ids))

        asyncio.run(go())
        """
    )
    assert said.startswith("8 {'OutOfMemory'} memory ran out while sampling (")
    assert said.splitlines()[-1] == "2"


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="shapes"), within_memory("here", "do that"):
        raise RuntimeError("shapes do not fit")
    for failure in (MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")):
        with (
            pytest.raises(OutOfMemory, match=r"^memory ran out here.*; do that$"),
            within_memory("here", "do that"),
        ):
            raise failure
