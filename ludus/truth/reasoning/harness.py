"""lm-evaluation-harness (EleutherAI) in a process of its own: its tasks, its prompts, its metrics.

`harness_child.py` runs there. What the harness prints goes to a log file.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ludus.errors import UserError
from ludus.truth.intervals import Z95, wilson

_TAIL = 3  # lines of its log, where it fails in words of its own


@dataclass(frozen=True, slots=True)
class Job:
    """What the harness is asked for. `limit`: only a task's first problems; `include`: more tasks (YAML)."""

    tasks: tuple[str, ...]
    engine: str  # "hf" (transformers) or "vllm"
    model: str  # directory
    dtype: str
    device: str
    max_length: int  # tokens of prompt and reply together
    batch: int
    limit: int | None
    include: str | None
    seed: int


def evaluate(job: Job, log: Path) -> dict[str, Any]:
    """{"lm_eval": version, "tasks": {task: {metric: {"value", "stderr", "ci95"}}}, "problems": {task: n}}

    Raises UserError where the harness is not installed or fails, for a task that it does not know, and for
    one whose dataset cannot be had, which it names.
    """
    try:
        version = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError as e:
        raise UserError(
            "lm-evaluation-harness is not installed; get it by: pip install 'ludus[lm-eval]'"
        ) from e
    with log.open("wb") as file:
        done = subprocess.run(
            [sys.executable, "-m", "ludus.truth.reasoning.harness_child"],
            input=json.dumps(asdict(job)).encode(),
            stdout=subprocess.PIPE,
            stderr=file,
            check=False,
        )
    if done.returncode:
        tail = " / ".join(log.read_text(errors="replace").split("\n")[-_TAIL - 1 :]).strip(" /")
        raise UserError(f"lm-evaluation-harness failed ({tail}); its log is {log}")
    found = json.loads(done.stdout)
    if "unknown" in found:
        near = f"; did you mean {', '.join(found['near'])}?" if found["near"] else ""
        raise UserError(
            f"lm-evaluation-harness knows no task {found['unknown']!r}{near} (lm-eval ls tasks lists all of "
            "them; --include names a directory with more)"
        )
    if "unreachable" in found:
        raise UserError(
            f"the dataset of task {found['unreachable']!r} cannot be had: {found['why']}. Run the command "
            "once on a machine that reaches the Hugging Face hub and bring its cache here (HF_HOME); or "
            "write a task over a local file and name its directory (--include). Mathematics in a file needs "
            "neither: --suite math:FILE"
        )
    return {"lm_eval": version, **_read(found)}


def _read(found: Mapping[str, Any]) -> dict[str, Any]:
    """The harness's own keys are "metric,filter" and "metric_stderr,filter"."""
    tasks: dict[str, dict[str, Any]] = {}
    for task, numbers in found["results"].items():
        tasks[task] = {}
        for key, value in numbers.items():
            metric, comma, kept_by = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue  # names, and numbers about the task
            error = numbers.get(f"{metric}_stderr,{kept_by}")
            error = float(error) if isinstance(error, int | float) else None
            tasks[task][metric if kept_by == "none" else f"{metric} ({kept_by})"] = {
                "value": float(value),
                "stderr": error,
                "ci95": _interval(float(value), error, found["problems"].get(task)),
            }
    return {"tasks": tasks, "problems": found["problems"]}


def _interval(value: float, error: float | None, n: int | None) -> list[float] | None:
    if error is None:
        return None
    if error == 0 and n and 0 <= value <= 1:  # problems that all agree say little about their variance
        return list(wilson(value, n))
    return [value - Z95 * error, value + Z95 * error]


def split_tasks(words: str) -> tuple[str, ...]:
    """Names out of "a,b". Raises UserError where there is none."""
    names: Sequence[str] = [name.strip() for name in words.split(",") if name.strip()]
    if not names:
        raise UserError("--suite lm-eval: names no task; write lm-eval:gsm8k or lm-eval:aime24,aime25")
    return tuple(dict.fromkeys(names))
