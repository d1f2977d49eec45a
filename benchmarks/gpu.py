"""What one GPU gives: sampling, learning, whole self-play steps, and the memory of the loss, in one call.

    python benchmarks/gpu.py [--sizes 0.1b 0.6b 4b] [--parts decode learn step loss] [--out gpu.json]

Models have the proportions of Qwen3 and random weights in bfloat16, made on the spot. Each part prints a
table, and each row is in the JSON file before the next begins; what does not fit into memory, or fails, says
so in its row. `--device cpu --sizes tiny --quick` runs all of it on any machine, to see that it runs.

decode  Tokens per second of the torch engine with and without CUDA graphs, of `model.generate` (with its
        defaults, and no log-probabilities, which keeps it from holding the logits of all steps) and of vLLM
        where it is installed, all sequences abreast. A round with replies of one token is taken from a round
        with long ones, the best of each, so that neither prefill nor start counts. The limit is what the
        memory's bandwidth allows: a step reads all weights once, and the keys and values of every sequence at
        its mean length, so

            limit = sequences * bandwidth / (bytes of weights + sequences * mean length * bytes of a position)

        with bytes of a position = 2 * layers * kv_heads * head_dim * 2. The bandwidth is that of a copy of a
        large tensor, measured beforehand (bytes read and written).
learn   `Learner.update` on rows of random tokens, half prompt and half reply: tokens per second, and the
        share of the peak, which is that of a large bfloat16 product, measured beforehand. A token costs 6
        operations per weight that it is multiplied by (forward 2, backward 4; by the head only where it is
        trained), and a row of L tokens the causal half of its attention:

            6 * body * L + 6 * vocabulary * hidden * L / 2 + 6 * layers * heads * head_dim * L^2

        less what the last layer spares where nothing is trained (not with gradient checkpointing, 4b). Work
        done twice does not count.
step    The stages of `Trainer.step` on Kuhn poker, medians, in seconds. Random weights make no legal move, so
        a match is four replies of the full length and a forfeit. Beside them, timed alone: `hand-over`, which
        on CUDA a step does not wait for, and `score`, the engine's second look at all replies of the last
        step, which is no part of one.
loss    `loss_memory.py`, at 8,192 trained tokens, a vocabulary of 151,936 and the size's hidden width.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from gpu_parts import (
    DTYPE,
    GENERATE,
    SIZES,
    Machine,
    Measure,
    Plan,
    Row,
    decode,
    free,
    learn,
    loss,
    step,
    synchronize,
)

from ludus.errors import UserError
from ludus.memory import within_memory

PARTS: dict[str, Callable[[Plan, Machine, str], Iterator[Measure]]] = {
    "decode": decode,
    "learn": learn,
    "step": step,
    "loss": loss,
}
FAILED = "failed"


def main() -> None:
    args = _arguments()
    plan = Plan(torch.device(args.device))
    plan = plan.quick() if args.quick else plan
    plan = replace(plan, sequences=tuple(args.sequences)) if args.sequences else plan
    machine = Machine(_bandwidth(plan), _peak(plan))
    about = _about(plan, machine)
    told: dict[str, Any] = {"about": about, "plan": {**asdict(plan), "device": str(plan.device)}}
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    failed = False
    for part in args.parts:
        told[part] = []
        for head, measure in (pair for size in args.sizes for pair in PARTS[part](plan, machine, size)):
            row = {**head, **_found(measure)}
            failed |= row.get("note", "").startswith(FAILED)
            told[part].append(row)
            print(f"{part}: {row}", file=sys.stderr, flush=True)
            args.out.write_text(json.dumps(told, indent=1) + "\n")
        print(f"\n## {part}\n\n{table(told[part])}", flush=True)
        if part == "decode":
            print("\n".join(["", *_ratios(told[part])]), flush=True)
    sys.exit(failed)


def _found(measure: Callable[[], Row]) -> Row:
    """What a measure finds. What does not fit, or fails, must not take the rest with it: a machine with a GPU
    may be there only once. It says so in a note, and what failed with its traceback."""
    try:
        with within_memory("here", "take a smaller size, or --sequences"):
            return measure()
    except UserError as e:
        return {"note": str(e)}
    except (RuntimeError, AssertionError, AttributeError, ImportError, OSError, TypeError, ValueError) as e:
        traceback.print_exc()
        return {"note": f"{FAILED}: {type(e).__name__}: {str(e)[:300]}"}
    finally:
        free()


def _ratios(rows: Sequence[Row]) -> Iterator[str]:
    """Everybody's speed as a multiple of `model.generate`'s."""
    speeds = {(row["size"], row["sequences"], row["contestant"]): row.get("tokens/s") for row in rows}
    for (size, sequences, name), speed in speeds.items():
        theirs = speeds.get((size, sequences, GENERATE))
        if speed and theirs and name != GENERATE:
            yield f"{size}, {sequences} sequences: {name} has {speed / theirs:.2f}x of generate"


def _bandwidth(plan: Plan) -> float:
    """Bytes per second that a copy reads and writes."""
    a = torch.zeros(plan.copied, dtype=torch.uint8, device=plan.device)
    b = torch.empty_like(a)
    return 2 * plan.copied / _best(lambda: b.copy_(a), plan.device)


def _peak(plan: Plan) -> float:
    """Operations per second of a square bfloat16 product."""
    a, b = (torch.randn(plan.product, plan.product, device=plan.device, dtype=DTYPE) for _ in range(2))
    return 2 * plan.product**3 / _best(lambda: a @ b, plan.device)


def _best(work: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Seconds of one of several, where the clock is read once for all: the best of three such rounds."""
    best = float("inf")
    for _ in range(4):  # the first warms up, and never is the best
        synchronize(device)
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronize(device)
        best = min(best, (time.perf_counter() - began) / repeats)
    return best


def _about(plan: Plan, machine: Machine) -> dict[str, str]:
    """What the numbers depend on."""
    cuda = plan.device.type == "cuda"
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {
        "device": torch.cuda.get_device_name(plan.device) if cuda else "CPU",
        "commit": described.stdout.strip() or "unknown",
        **versions,
        "cuda": str(torch.version.cuda),
        "bandwidth": f"{machine.bandwidth / 1e9:,.1f} GB/s, a copy of {plan.copied / 2**20:,.0f} MiB",
        "peak": f"{machine.peak / 1e12:,.2f} TFLOP/s, a bfloat16 product of width {plan.product:,}",
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; a row's note stands in its last column."""
    columns = [*dict.fromkeys(key for row in rows for key in row if key != "note")]
    columns += ["note"] * any("note" in row for row in rows)
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(column, row.get(column)) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(column: str, value: object) -> str:
    if isinstance(value, float):
        if column.startswith("of the") or column.endswith("share"):
            return f"{value:.1%}"
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["0.1b", "0.6b", "4b"])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--sequences", type=int, nargs="+", help="decoded together (default: 64 128 256)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="so little of everything that a CPU can do it")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
