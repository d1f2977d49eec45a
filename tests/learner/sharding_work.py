"""What the processes of tests/learner/test_learner_sharding.py compute.

Every job leaves FOLDER/JOB-N.safetensors and FOLDER/JOB-N.json for each number N of processes that ran it.
"""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from learner_models import make_model, make_rows
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from ludus.config import AdapterConfig, LossConfig, OptimConfig
from ludus.learner import head
from ludus.learner.adapters import attach
from ludus.learner.learner import Learner, NonFinite
from ludus.learner.placement import Placement
from ludus.learner.sharding import Sharded
from ludus.learner.supervised import Row, Source, Supervised

LOSS = LossConfig(magnet_kl=0.2, magnet_every=3, magnet_of="average", reference_kl=0.1, entropy=0.01)
OPTIM = OptimConfig(
    lr=1e-3, schedule="cosine", warmup_steps=2, minibatches=2, microbatch_tokens=60, average=0.9
)
# Ten batches: one without rows, some with fewer rows than ranks.
BATCHES = [make_rows(count, seed=k) for k, count in enumerate((12, 7, 1, 0, 9, 3, 12, 2, 5, 16))]
HALF = 5

Made = tuple[dict[str, torch.Tensor], dict[str, Any]]
Job = Callable[[Placement | None, Path], Made]


def learner(
    placement: Placement | None,
    model: PreTrainedModel | None = None,
    loss: LossConfig = LOSS,
    optim: OptimConfig = OPTIM,
) -> Learner:
    model = make_model() if model is None else model
    return Learner(model, loss, optim, max_tokens=8, total_steps=10, seed=3, placement=placement)


def result(made: Learner, measured: Sequence[Mapping[str, float]]) -> Made:
    """All that a learner holds and ships, and what it measured."""
    shipped = {f"shipped.{name}": tensor.clone() for name, tensor in made.weights().items()}
    shipped |= {f"shipped_average.{name}": tensor.clone() for name, tensor in made.average_weights().items()}
    tensors, values = made.state()
    return {**tensors, **shipped}, {**values, "measured": list(measured)}


def ten(placement: Placement | None, folder: Path) -> Made:
    """Ten updates; the state after half of them goes to a file."""
    made = learner(placement)
    measured = [made.update(rows) for rows in BATCHES[:HALF]]
    tensors, values = made.state()
    if tensors:
        write(folder, f"half-{made.placement.lanes}", (tensors, values))
    measured += [made.update(rows) for rows in BATCHES[HALF:]]
    return result(made, measured)


def _rest(placement: Placement | None, folder: Path, saved_by: int) -> Made:
    made = learner(placement, make_model(seed=99))  # every weight must come from the state
    values = json.loads((folder / f"half-{saved_by}.json").read_text())
    made.load_state(load_file(folder / f"half-{saved_by}.safetensors"), values)
    return result(made, [made.update(rows) for rows in BATCHES[HALF:]])


def rest_of_one(placement: Placement | None, folder: Path) -> Made:
    """The second half of `ten`, from the state that one process saved."""
    return _rest(placement, folder, 1)


def rest_of_two(placement: Placement | None, folder: Path) -> Made:
    """The second half of `ten`, from the state that two ranks saved."""
    return _rest(placement, folder, 2)


def untied(placement: Placement | None, folder: Path) -> Made:
    """A head of its own, two passes over the rows, another normaliser."""
    loss, optim = LossConfig(normaliser="turn_mean"), OptimConfig(lr=1e-3, epochs=2, microbatch_tokens=60)
    made = learner(placement, make_model(tie_word_embeddings=False), loss, optim)
    return result(made, [made.update(rows) for rows in BATCHES[:2]])


def blocked(placement: Placement | None, folder: Path) -> Made:
    """With the vocabulary walked in blocks, as a large one is."""
    whole, block = head.WHOLE_BYTES, head.BLOCK_BYTES
    head.WHOLE_BYTES, head.BLOCK_BYTES = 0, {"cpu": 1024}
    try:
        made = learner(placement)
        return result(made, [made.update(rows) for rows in BATCHES[:2]])
    finally:
        head.WHOLE_BYTES, head.BLOCK_BYTES = whole, block


def packed(placement: Placement | None, folder: Path) -> Made:
    """Rows end to end in one forward pass."""
    made = learner(placement, optim=OPTIM.model_copy(update={"batching": "packed"}))
    return result(made, [made.update(rows) for rows in BATCHES[:2]])


def recomputing(placement: Placement | None, folder: Path) -> Made:
    """With gradient checkpointing."""
    model = make_model()
    model.gradient_checkpointing_enable()
    made = learner(placement, model)
    return result(made, [made.update(BATCHES[0])])


def supervised(placement: Placement | None, folder: Path) -> Made:
    """Cross-entropy alone."""
    made = learner(placement)
    return result(made, [made.sft(rows) for rows in BATCHES[:2]])


def mixed(placement: Placement | None, folder: Path) -> Made:
    """Supervised rows beside the others, fewer than there are ranks."""
    rows = [Row(array("i", [k, 3, 4, k]), ((1, 4),)) for k in range(9)]
    beside = Supervised([Source("rows", 1.0, rows)], weight=0.5, batch=3)
    made = Learner(
        make_model(), LOSS, OPTIM, max_tokens=8, total_steps=10, supervised=beside, placement=placement
    )
    return result(made, [made.update(rows) for rows in BATCHES[:2]])


def adapter(placement: Placement | None, folder: Path) -> Made:
    """An adapter, whose frozen base is shared with the magnet and the reference."""
    made = learner(placement, attach(make_model(), AdapterConfig(rank=3, alpha=6), 0))
    return result(made, [made.update(rows) for rows in BATCHES[:4]])


def half_precision(placement: Placement | None, folder: Path) -> Made:
    """A bfloat16 model, whose weights are kept in float32."""
    made = learner(placement, make_model().to(torch.bfloat16))
    return result(made, [made.update(BATCHES[0])])


def nonfinite(placement: Placement | None, folder: Path) -> Made:
    """A loss that overflows in one row: every rank refuses the step."""
    made = learner(placement, optim=OptimConfig())
    rows = make_rows(6)
    rows[4].advantages[:] = [3e38 * trained for trained in rows[4].mask]
    try:
        made.update(rows)
    except NonFinite as e:
        return result(made, [])[0], {"refused": str(e)}
    raise AssertionError("a loss that is not finite was taken")


def syncs(placement: Placement | None, folder: Path) -> Made:
    """How often gradients were added up between ranks, in an optimizer step of few and one of many rounds."""
    counts = []
    for tokens in (1000, 30):
        made = learner(placement, loss=LossConfig(), optim=OptimConfig(microbatch_tokens=tokens))
        seen: list[int] = []
        for module in made.model.modules():
            if isinstance(module, FSDPModule):
                module.set_all_reduce_hook(lambda gradient, seen=seen: seen.append(gradient.numel()))
        made.update(BATCHES[-1])
        counts.append(len(seen))
    return {}, {"reductions": counts}


def write(folder: Path, name: str, made: Made) -> None:
    tensors, values = made
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(values))


def work(folder: Path, rank: int, size: int) -> None:
    """Two ranks, one process alone and an idler work side by side; then all four together."""
    sys.stderr = (folder / f"rank-{rank}.txt").open("w")
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=280))
    device = torch.device("cpu")
    pair = dist.new_group([0, 1])
    alike: tuple[Job, ...] = (ten, blocked, packed, recomputing, half_precision)
    apart: tuple[Job, ...] = (*alike, nonfinite, syncs)
    alone: tuple[Job, ...] = (*alike, untied, supervised, mixed, adapter)
    if rank < 2:
        _do(apart, Sharded(pair, device), folder, 2, rank == 0)
    elif rank == 2:
        _do(alone, None, folder, 1, True)
    dist.barrier()
    everybody = Sharded(dist.group.WORLD, device)
    _do(
        (ten, untied, supervised, mixed, adapter, rest_of_one, rest_of_two),
        everybody,
        folder,
        size,
        rank == 0,
    )
    if rank == 0:
        _do((rest_of_two,), None, folder, 1, True)
    dist.barrier()
    dist.destroy_process_group()


def _do(jobs: Sequence[Job], placement: Placement | None, folder: Path, size: int, writes: bool) -> None:
    for job in jobs:
        made = job(placement, folder)
        if writes:
            write(folder, f"{job.__name__}-{size}", made)
