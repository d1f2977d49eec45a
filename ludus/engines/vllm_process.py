"""Starting vLLM's processes: what they are told, and what can be seen beforehand to go wrong."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import ValidationError
from transformers import PreTrainedConfig

from ludus.config import EngineConfig
from ludus.engines.vllm_adapters import PRODUCTS
from ludus.errors import UserError

# What torchrun tells a process of ours; vLLM's processes would take it as said to them.
_OF_TORCHRUN = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
)
_PATIENCE = "1800"  # seconds that vLLM waits for its processes: a busy machine is no broken one
_CPU_BLOCK = 32  # positions of a block of vLLM's cache there; what prompts share is reused in whole blocks


def unusable() -> str | None:
    """Why vLLM cannot be used here, and what mends it; None where it can, as far as can be told."""
    if importlib.util.find_spec("vllm") is None:
        return (
            "vLLM is not installed; on a machine with GPUs: pip install 'ludus[vllm]', and on the CPU see "
            "docs/models.md (or take engine.kind = 'torch')"
        )
    try:
        with _environment({}):
            import vllm.v1.engine.async_llm  # noqa: F401  (its dependencies break more often than it does)
    except (ImportError, OSError, RuntimeError) as e:
        return f"vLLM is installed but does not load: {type(e).__name__}: {e}"
    return None


def on_cpu() -> bool:
    """Whether the vLLM that is installed is that for CPUs."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


async def start(model: Path, config: EngineConfig, text: PreTrainedConfig, rank: int, folder: str) -> Any:
    """An AsyncLLM without weights worth the name. Raises UserError.

    It takes adapters of up to `rank` (0: none), and removes `folder`, where they lie, when it outlives us.
    """
    options = config.vllm
    settings = {"OMP_NUM_THREADS": str(config.threads or torch.get_num_threads())}
    gpus = _gpus(options.tensor_parallel)
    if gpus and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        settings["CUDA_VISIBLE_DEVICES"] = seen.split(",")[gpus[0]]
    with _environment(settings):
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        if on_cpu():
            device = _cpu_options(config, text)
        else:
            _check_room(options.memory, gpus)
            device = {"gpu_memory_utilization": options.memory}
        places = options.adapters + on_cpu()  # see vllm_adapters.nothing
        lora = {
            "enable_lora": True,
            "max_loras": places,
            "max_cpu_loras": 2 * places,  # while a version is in flight, the next is there as well
            "max_lora_rank": rank,
            "lora_target_modules": list(PRODUCTS),
        }
        try:
            args = AsyncEngineArgs(
                model=str(model),
                skip_tokenizer_init=True,
                generation_config="vllm",  # the directory's own would set limits of its own
                load_format="dummy",
                dtype=config.dtype,
                max_model_len=config.context,
                max_num_seqs=config.slots,
                tensor_parallel_size=options.tensor_parallel,
                enforce_eager=options.eager,
                enable_prefix_caching=True,
                enable_sleep_mode=options.sleep,
                logprobs_mode="processed_logprobs",
                worker_extension_cls="ludus.engines.vllm_worker.WorkerExtension",
                disable_log_stats=True,
                **(lora if rank else {}),
                **device,
            )
            llm = AsyncLLM.from_engine_args(args)
        except ValueError as e:
            said = e.errors()[0]["msg"] if isinstance(e, ValidationError) else str(e)
            raise UserError(f"vLLM refuses {model}: {said}") from e
        except RuntimeError as e:
            raise UserError(
                f"vLLM did not start: {e} (What its processes wrote above says why; where memory ran out, "
                "lower engine.slots or engine.context, or give it more with engine.vllm.memory)"
            ) from e
    await llm.collective_rpc("end_with", args=(os.getpid(), folder))
    return llm


def _cpu_options(config: EngineConfig, text: PreTrainedConfig) -> dict[str, Any]:
    """Room for every slot at full length; and prompts in one piece, as vLLM's CPU worker cannot take a draw
    back, which it does for requests with seeds whose prompts it takes in pieces."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    if config.vllm.sleep:
        raise UserError(
            "engine.vllm.sleep leaves the memory of a GPU to the learner, and vLLM on the CPU cannot give "
            "back its own; set it to false"
        )
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    if width not in (known := CPUAttentionBackend.get_supported_head_sizes()):
        raise UserError(
            f"vLLM on the CPU runs models with a head_dim of {', '.join(map(str, known))}, and this one has "
            f"{width}; take engine.kind = 'torch', or another model"
        )
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    itemsize = getattr(torch, config.dtype).itemsize
    positions = config.slots * (-(-config.context // _CPU_BLOCK) * _CPU_BLOCK) + 2 * _CPU_BLOCK
    cache = 2 * text.num_hidden_layers * kv_heads * width * itemsize * positions
    if cache > (free := psutil.virtual_memory().available):
        raise UserError(
            f"engine.slots = {config.slots} of engine.context = {config.context} tokens need "
            f"{cache / 2**30:.1f} GiB for vLLM's cache, and {free / 2**30:.1f} GiB of memory are free; lower "
            "one of the two"
        )
    return {
        "block_size": _CPU_BLOCK,
        "kv_cache_memory_bytes": cache,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(config.context, 2048),
    }


def _gpus(count: int) -> list[int]:
    """The GPUs that vLLM is to use: the first ones; or, where several ranks share a run, this one's own.

    Raises UserError where they are not there.
    """
    there = torch.cuda.device_count()
    if not there:
        return []
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if count > 1:
            raise UserError(
                f"engine.vllm.tensor_parallel is {count}, but each rank of torchrun has one GPU; set it to 1"
            )
        return [int(os.environ["LOCAL_RANK"])]
    if there < count:
        raise UserError(f"engine.vllm.tensor_parallel is {count}, but torch sees {there} GPUs")
    return list(range(count))


def _check_room(share: float, devices: Sequence[int]) -> None:
    """Raise UserError where a GPU has not as much free memory as vLLM is to fill."""
    if not devices:
        raise UserError(
            "vLLM is installed for GPUs, but torch sees none; see docs/models.md for vLLM on the CPU, or "
            "take engine.kind = 'torch'"
        )
    for device in devices:
        free, total = torch.cuda.mem_get_info(device)
        if free < share * total:
            raise UserError(
                f"engine.vllm.memory = {share} asks for {share * total / 2**30:.1f} GiB of GPU {device}, of "
                f"which {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free; lower it, or end what else "
                "fills the GPU"
            )


@contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    """The environment that vLLM and its processes read at their start; afterwards all is as it was.

    What the user has set stays set.
    """
    before = dict(os.environ)
    wanted = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would copy our threads' locks
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the learner computes on the same cores
        "HF_HUB_OFFLINE": "1",  # models are local directories
        "VLLM_ENGINE_READY_TIMEOUT_S": _PATIENCE,
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": _PATIENCE,
    }
    os.environ.update({**wanted, **before, **more})
    for name in [n for n in before if n in _OF_TORCHRUN or n.startswith("TORCHELASTIC_")]:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
