"""What is said where vLLM cannot be used. (With it, see test_engines_vllm.py.)"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from ludus.config import EngineConfig
from ludus.engines.vllm_engine import VllmEngine
from ludus.engines.vllm_process import _environment, _gpus, unusable
from ludus.errors import UserError

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
