"""The vLLM side of `benchmarks/engine.py`: for another environment's python, so it imports nothing of ours.

python engine_vllm.py TASK.json     prints READY; for each line read, does the work and prints SECONDS x
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main(path: Path) -> None:
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)  # its default leaves cores unused
    from vllm import LLM, SamplingParams

    task = json.loads(path.read_text())
    model = LLM(
        model=task["model"],
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=256,
        kv_cache_memory_bytes=2**30,  # ample: all 256 sequences fit at once
        gpu_memory_utilization=0.3,  # on the CPU: share of the main memory that must be free
        enable_prefix_caching=False,  # the prompts share nothing; keep it from answering repeated rounds
    )
    prompts = [{"prompt_token_ids": ids} for ids in task["prompts"]]
    sampling = [
        SamplingParams(temperature=1.0, max_tokens=limit, ignore_eos=True, logprobs=0, detokenize=False)
        for limit in task["limits"]
    ]
    print("READY", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        outputs = model.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert [len(o.outputs[0].logprobs) for o in outputs] == task["limits"]
        print(f"SECONDS {seconds}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
