"""benchmarks/gpu.py where there is no GPU: it runs from end to end, and its arithmetic holds."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ludus.errors import UserError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_parts")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def test_all_parts_run_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py", "--device=cpu", "--sizes=tiny", "--quick", f"--out={out}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text())
    assert told["about"]["torch"] == torch.__version__
    names = [row["contestant"] for row in told["decode"]]
    assert names == ["generate", "engine, graphs", "engine", "vllm"]
    for row in told["learn"] + told["step"] + told["loss"]:
        assert "note" not in row
        assert all(x > 0 for x in row.values() if isinstance(x, float))
    # Two matches of four replies of eight tokens, for nothing that random weights say is a legal move.
    (step,) = told["step"]
    assert step["sampled tokens/s"] * step["seconds"] == pytest.approx(2 * 4 * 8)
    for part in ("decode", "learn", "step", "loss"):
        assert f"## {part}" in done.stdout


def test_a_measure_that_fails_says_so_in_its_row(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def raising(error: Exception) -> Callable[[], dict[str, object]]:
        def measure() -> dict[str, object]:
            raise error

        return measure

    full = gpu._found(raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")))
    assert full["note"].startswith("memory ran out here (CUDA out of memory")
    assert gpu._found(raising(UserError("no vLLM"))) == {"note": "no vLLM"}
    assert capsys.readouterr().err == ""
    broken = gpu._found(raising(RuntimeError("an illegal access")))
    assert broken["note"] == "failed: RuntimeError: an illegal access"
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "millions"), [("0.1b", 109), ("0.6b", 596), ("4b", 4022)])
def test_weights_are_counted(parts: ModuleType, size: str, millions: int) -> None:
    model = parts.make_model(size, torch.device("meta"))
    products = [p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    assert parts.body_weights(size) == sum(products)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_operations_by_hand(parts: ModuleType) -> None:
    """Two layers of width 64, 4 and 2 heads of 32, an inner width of 128, 512 words; a row of 4 tokens."""
    body = 2 * ((128 + 64 + 64 + 128) * 64 + 3 * 64 * 128)
    assert parts.body_weights("tiny") == body == 98_304
    spared = 4 * 32 * 64 + 3 * 64 * parts.SIZES["tiny"]["inner"]  # of one layer, at two of four tokens
    products = body * 4 - spared * 2 + 512 * 64 * 2
    assert parts.learn_operations("tiny", 1, 4) == 6 * (products + 2 * 4 * 32 * 4**2)
    plan = parts.Plan(torch.device("cpu")).quick()
    position = 2 * 2 * 2 * 32 * 2  # keys and values of two layers and two heads, in bfloat16
    step = 2 * (body + 512 * 64) + 4 * (24 + 3) * position
    assert parts._bytes_of_step(plan, "tiny", 4) == step
