"""Our part of vLLM's worker processes: they take the weights written down for them, and end with us."""

from __future__ import annotations

import os
import select
import shutil
import signal
import threading
from typing import Any

import torch

from ludus.engines.shared_weights import Place, read


class WorkerExtension:
    """What vLLM mixes into its worker class (`worker_extension_cls`), for `collective_rpc` to call."""

    def receive_weights(self: Any, path: str, places: list[tuple[str, list[int], int]], dtype: str) -> None:
        """Replace the model's weights. Each worker takes its own share of every tensor."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        where = [Place(name, tuple(shape), offset) for name, shape, offset in places]
        self.reload_weights(weights_iterator=iter(read(path, where, getattr(torch, dtype)).items()))
        # A head that is tied to the embedding is no weight of its own and so was not loaded, but on the CPU
        # it computes with a packed copy, which has to be made anew.
        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    def end_with(self, pid: int, folder: str) -> None:
        """End vLLM's processes when that one ends, however it does, and remove its folder.

        By themselves they outlive a killed client, and keep its GPU's memory from the run that goes on.
        """
        process = os.pidfd_open(pid)

        def watch() -> None:
            select.select([process], [], [])
            os.kill(os.getppid(), signal.SIGKILL)  # the engine core
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(1)

        threading.Thread(target=watch, name="ludus-end-with", daemon=True).start()
