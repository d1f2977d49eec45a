"""The process that runs lm-evaluation-harness: a job as JSON in, a result as JSON out; see `harness.py`."""

from __future__ import annotations

import difflib
import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the harness prints
    json.dump(_run(**json.load(sys.stdin)), out)
    out.close()


def _run(
    tasks: list[str],
    engine: str,
    model: str,
    dtype: str,
    device: str,
    max_length: int,
    batch: int,
    limit: int | None,
    include: str | None,
    seed: int,
) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include)
    for task in tasks:
        if not manager.match_tasks([task]):
            return {"unknown": task, "near": difflib.get_close_matches(task, manager.all_tasks, n=3)}
    for task in tasks:  # before the model is loaded
        try:
            manager.load([task])
        except OSError as e:  # ConnectionError and FileNotFoundError among them
            return {"unreachable": task, "why": " ".join(str(e).split())}
    where: dict[str, Any] = {"pretrained": model, "dtype": dtype}
    if engine == "vllm":
        where |= {"max_model_len": max_length, "seed": seed}
    else:
        where |= {"max_length": max_length}
    found = lm_eval.simple_evaluate(
        model=engine,
        model_args=where,
        tasks=tasks,
        task_manager=manager,
        batch_size=batch,
        device=device,
        limit=limit,
        apply_chat_template=_talks(Path(model)),
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed % 2**32,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    assert found is not None, "only processes of a higher rank get None"
    return {
        "results": found["results"],
        "problems": {task: n["effective"] for task, n in found["n-samples"].items()},
    }


def _talks(model: Path) -> bool:
    """Whether the model has a chat template of its own."""
    if (model / "chat_template.jinja").is_file():
        return True
    settings = model / "tokenizer_config.json"
    return settings.is_file() and "chat_template" in json.loads(settings.read_bytes())


if __name__ == "__main__":
    main()
