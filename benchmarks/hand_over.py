"""Where the time of a self-play step goes, and what the hand-over of weights takes of it.

    taskset -c 0,1 .venv-vllm/bin/python benchmarks/hand_over.py --model models/m30 [key=value ...]

A model of 30 million parameters, warmed up on Kuhn poker alone, is made in --model where there is none yet
(some minutes). Each engine then plays the same recipe: 64 matches of Kuhn poker a step, sampled in bfloat16,
learnt in float32. Printed are the medians over all steps but the first two, in seconds, and the share of
"load": the weights' way from the learner into the engine, and vLLM's forgetting of cached prefixes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median

from ludus import config as configuration
from ludus.config import RunConfig
from ludus.records import is_evaluation, read_metrics
from ludus.small.make import Course, SmallSpec, make
from ludus.train.loop import train

SPEC = SmallSpec(
    courses=(Course("kuhn_poker", 3_000),),
    hidden=512,
    layers=9,
    heads=8,
    kv_heads=4,
    ffn=1536,
    context=1024,
    batch=32,
    lr=5e-4,
    init=0.03,
)
STAGES = ("rollout", "learn", "load", "write")


def recipe(model: Path, engine: str, threads: int, overrides: list[str]) -> RunConfig:
    data = {
        "name": "hand_over",
        "threads": threads,
        "model": {"path": str(model)},
        "games": [{"name": "kuhn_poker"}],
        "text": {"rules": False},
        "engine": {"kind": engine, "dtype": "bfloat16", "slots": 64, "context": 256},
        "rollout": {"matches": 64, "max_tokens": 32},
        "optim": {"lr": 1e-5},
        "train": {"steps": 12, "checkpoint_every": 12},
        "eval": {"final_matches": 2, "exploitability": False},
    }
    return configuration.validate(configuration.override(data, overrides), where="the benchmark's recipe")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engines", nargs="+", default=["vllm", "torch"], choices=["vllm", "torch"])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    if not args.model.exists():
        make(args.model, SPEC)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for engine in args.engines:
            out = Path(folder) / engine
            train(recipe(args.model, engine, args.threads, args.overrides), out)
            records = [r for r in read_metrics(out / "metrics.jsonl") if not is_evaluation(r)][2:]
            found[engine] = (
                {stage: median(r["seconds"][stage] for r in records) for stage in STAGES},
                median(r["seconds"]["load"] / sum(r["seconds"][s] for s in STAGES) for r in records),
                median(r["speed"]["tokens_per_s"] for r in records),
            )
    for engine, (stages, share, speed) in found.items():
        said = ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in stages.items())
        print(f"{engine}: {said} s; load is {share:.1%} of a step; {speed:.0f} sampled tokens/s of the step")


if __name__ == "__main__":
    main()
