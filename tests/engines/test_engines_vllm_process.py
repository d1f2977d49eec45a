"""What is said where vLLM cannot be used. (With it, see test_engines_vllm.py.)"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from ludus.config import EngineConfig
from ludus.engines.base import Adapter
from ludus.engines.vllm_adapters import WrittenAdapter, nothing, room_for
from ludus.engines.vllm_engine import VllmEngine
from ludus.engines.vllm_process import _check_room, _environment, _gpus, unusable
from ludus.errors import UserError
from ludus.learner import adapters

absent = pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")


@absent
def test_without_vllm_the_remedy_is_told(tmp_path: Path):
    assert "pip install 'ludus[vllm]'" in str(unusable())
    with pytest.raises(UserError, match=r"engine\.kind = 'vllm': vLLM is not installed"):
        VllmEngine(tmp_path, EngineConfig(kind="vllm"))


@absent
def test_a_broken_installation_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As where one of its many dependencies does not fit."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert unusable() == ("vLLM is installed but does not load: ImportError: torchvision::nms does not exist")


def test_each_rank_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert _gpus(2) == [0, 1]
    with pytest.raises(UserError, match="tensor_parallel is 8, but torch sees 4 GPUs"):
        _gpus(8)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert _gpus(1) == [3]
    with pytest.raises(UserError, match="tensor_parallel is 2, but each rank of torchrun has one GPU"):
        _gpus(2)


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.delenv("VLLM_NO_USAGE_STATS", raising=False)
    for name in ("RANK", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "1")
    before = dict(os.environ)
    with _environment({"OMP_NUM_THREADS": "3"}):
        assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
        assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"  # the user's own choice
        assert os.environ["OMP_NUM_THREADS"] == "3"
        assert not {"RANK", "TORCHELASTIC_USE_AGENT_STORE"} & os.environ.keys()  # said to us, not to vLLM
        os.environ["LD_PRELOAD"] = "as vLLM does"
    assert dict(os.environ) == before


def test_a_gpu_that_is_too_full_is_told_with_the_setting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: ((30 - 20 * device) * 2**30, 80 * 2**30))
    _check_room(0.3, [0])
    with pytest.raises(
        UserError, match=r"memory = 0.3 asks for 24.0 GiB of GPU 1, of which 10.0 .* lower it"
    ):
        _check_room(0.3, [0, 1])


def test_the_rank_that_vllm_is_started_for():
    assert [room_for(rank) for rank in (0, 1, 2, 8, 16, 33, 512, 513)] == [0, 1, 8, 8, 16, 64, 512, 0]


def test_an_adapter_is_written_as_peft_writes_it(tmp_path: Path):
    """Ludus reads it back as any other adapter; each version has a name, a number and a place of its own."""
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    given = {f"{stem}A.weight": torch.randn(2, 6), f"{stem}B.weight": torch.randn(4, 2)}
    adapter = Adapter("base", 2, 5.0, given)
    first, second = (WrittenAdapter("a", adapter, tmp_path, torch.bfloat16) for _ in range(2))
    found = adapters.read(first.directory, "base")
    assert (found.rank, found.alpha) == (2, 5.0)
    assert found.tensors.keys() == given.keys()
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor, given[name].bfloat16())
    second.remove()
    assert list(tmp_path.iterdir()) == [first.directory]
    with pytest.raises(UserError, match=r"cannot write the adapter of policy 'a' .* set TMPDIR"):
        WrittenAdapter("a", adapter, tmp_path / "gone", torch.float32)


def test_nothing_changes_nothing():
    plain = nothing({"model.embed_tokens.weight": (9, 6), "model.layers.0.self_attn.q_proj.weight": (4, 6)})
    a, b = plain.tensors.values()
    assert (a.shape, b.shape) == ((1, 6), (4, 1))
    assert not (b @ a).any()
