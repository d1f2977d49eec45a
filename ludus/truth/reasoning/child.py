"""The process that runs reasoning-gym and math-verify: lines of JSON in and out. See `library.py`."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

_MEMORY = 4 << 30  # bytes of address space
_datasets: dict[tuple[str, int, int], Any] = {}


def main() -> None:
    """Answer until standard input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the libraries print
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    print(json.dumps({"found": "ready"}), file=out, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            reply = {"found": _DO[job.pop("do")](**job)}
        except Exception as e:  # noqa: BLE001  whatever a library raises is told to whoever asked
            reply = {"error": f"{type(e).__name__}: {e}"}
        print(json.dumps(reply), file=out, flush=True)


def _dataset(task: str, seed: int, size: int) -> Any:
    import reasoning_gym

    key = (task, seed, size)
    if key not in _datasets:
        made = reasoning_gym.create_dataset(task, seed=seed, size=size)
        _datasets[key] = (made, [made[i] for i in range(size)])
    return _datasets[key]


def _generate(task: str, seed: int, size: int) -> list[str]:
    return [str(entry["question"]) for entry in _dataset(task, seed, size)[1]]


def _mark(task: str, seed: int, size: int, index: int, answer: str) -> dict[str, Any]:
    made, entries = _dataset(task, seed, size)
    try:
        score = float(made.score_answer(answer, entries[index]))
    except Exception as e:  # noqa: BLE001  several graders raise for what they cannot read
        return {"score": 0.0, "problem": type(e).__name__}
    return {"score": min(1.0, max(0.0, score)), "problem": None}


def _equal(truth: str, answer: str) -> dict[str, Any]:
    from math_verify import parse, verify

    # The boxes are what the library looks for first. Its own time limits are off: the process has one.
    gold = parse(f"\\boxed{{{truth}}}", parsing_timeout=None)
    if not gold:
        raise ValueError(f"{truth!r} cannot be read as mathematics")
    try:
        said = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
        same = verify(gold, said, timeout_seconds=None)
    except Exception as e:  # noqa: BLE001  as above
        return {"score": 0.0, "problem": type(e).__name__}
    return {"score": float(same), "problem": None}


_DO: dict[str, Callable[..., Any]] = {"generate": _generate, "mark": _mark, "equal": _equal}

if __name__ == "__main__":
    main()
