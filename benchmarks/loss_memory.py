"""How much memory the loss takes at a large vocabulary, beyond the model that it is the loss of.

    python benchmarks/loss_memory.py [--tokens 8192] [--vocabulary 151936] [--width 1024] [--whole] [--json]
                                     [--device cpu]

From hidden states [N, D] of the trained tokens to their gradient, and the head's: log-probabilities, entropy
with a gradient and the exact KL to a second model, all in bfloat16 autocast over float32 weights as the
learner has them. Measured is the peak of this process's resident memory (Linux), or on CUDA of what torch
holds there, beyond what it holds before: hidden states and both models' heads. The gradient of the head,
[V, D] in float32, is the model's rather than the loss's; it is part of the peak that is measured, and told
beside it. `--whole` holds all logits at once, as plain code does.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import time
from pathlib import Path

import torch

from ludus.learner import head as room
from ludus.learner.head import Head, head_terms

STATUS = Path("/proc/self/status")


def main() -> None:
    args = _arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.whole:
        room.WHOLE_BYTES = 1 << 62
    measured = measure(args.tokens, args.vocabulary, args.width, torch.device(args.device))
    if args.json:
        print(json.dumps(measured))
        return
    print(f"{args.tokens:,} tokens, {args.vocabulary:,} words, width {args.width:,}")
    print(f"logits over the whole vocabulary  {measured['logits_mib']:9,.0f} MiB in float32")
    print(f"peak beyond both models           {measured['peak_mib']:9,.0f} MiB")
    print(f"  of that the head's gradient     {measured['gradient_mib']:9,.0f} MiB")
    print(
        f"forward and backward              {measured['seconds']:9.1f} s, {torch.get_num_threads()} threads"
    )


def measure(tokens: int, vocabulary: int, width: int, device: torch.device) -> dict[str, float]:
    """Peak memory in MiB of one forward and backward pass, and its seconds.

    On the CPU it has to be the first of its process: memory that is free already would not be seen.
    """
    with device:
        return _measured(tokens, vocabulary, width, device)


def _measured(tokens: int, vocabulary: int, width: int, device: torch.device) -> dict[str, float]:
    torch.manual_seed(0)
    states, theirs = (torch.randn(tokens, width).bfloat16() for _ in range(2))
    states.requires_grad_()
    weight, frozen = (torch.randn(vocabulary, width).mul_(width**-0.5) for _ in range(2))
    weight.requires_grad_()
    frozen = frozen.bfloat16()
    targets = torch.randint(vocabulary, (tokens,))
    _step(states[:8], targets[:8], weight[:64], theirs[:8], frozen[:64])  # what a first product allocates
    gc.collect()
    before = _count_from_here(device)
    began = time.perf_counter()
    _step(states, targets, weight, theirs, frozen)
    peak = _peak(device)
    seconds = time.perf_counter() - began
    mib = 2**20
    return {
        "peak_mib": peak - before,
        "gradient_mib": 4 * weight.numel() / mib,
        "logits_mib": 4 * tokens * vocabulary / mib,
        "seconds": seconds,
    }


def _step(
    states: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor,
    theirs: torch.Tensor,
    frozen: torch.Tensor,
) -> None:
    with torch.autocast(states.device.type, torch.bfloat16):
        other = (theirs, Head(frozen, None, None))
        terms = head_terms(
            states, targets % len(weight), Head(weight, None, None), 1.0, other, entropy_gradient=True
        )
    assert terms.kl is not None
    loss = (terms.kl - terms.logprobs - 0.01 * terms.entropy).mean()
    loss.backward()  # type: ignore[no-untyped-call]


def _count_from_here(device: torch.device) -> float:
    """Memory in use, in MiB; the peak is that of what follows."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    return _resident("VmHWM")


def _resident(name: str) -> float:
    """A line of /proc/self/status in MiB."""
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 2**10


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=8192, help="trained tokens of a micro-batch")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=1024, help="hidden width")
    parser.add_argument("--whole", action="store_true", help="hold all logits at once, to compare")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
