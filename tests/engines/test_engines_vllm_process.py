"""What is said where vLLM cannot be used. (With it, see test_engines_vllm.py.)"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from ludus.config import EngineConfig
from ludus.engines.vllm_engine import VllmEngine
from ludus.engines.vllm_process import _environment, unusable
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


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.delenv("VLLM_NO_USAGE_STATS", raising=False)
    before = dict(os.environ)
    with _environment({"OMP_NUM_THREADS": "3"}):
        assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
        assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"  # the user's own choice
        assert os.environ["OMP_NUM_THREADS"] == "3"
        os.environ["LD_PRELOAD"] = "as vLLM does"
    assert dict(os.environ) == before
