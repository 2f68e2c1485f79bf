"""The server of an engine that a config names: its command line, and waiting until it answers."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from megatron_dppo.config import Config, longest_sequence, num_recorded_topk
from megatron_dppo.job.processes import Child
from megatron_dppo.rollout.engine import EngineUnreachable
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
