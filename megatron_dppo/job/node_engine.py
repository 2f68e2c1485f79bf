"""An engine on another node than the launcher's: finds a port that is free here, says where it will answer, and becomes
the guard of the server. Run as `python -m megatron_dppo.job.node_engine CONFIG NUMBER ADDRESS FIRST_GPU SHARED`.

Only the node itself knows its free ports and what it has to compute with.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import NoReturn

from megatron_dppo.config import Config
from megatron_dppo.config.loading import load_config
from megatron_dppo.control import CONTROL_VARIABLE, Control, engine_url_key
from megatron_dppo.job.engine_server import server_of
from megatron_dppo.job.machines import visible_gpus
from megatron_dppo.job.processes import GRACE_S, become_guarded, free_port
from megatron_dppo.placement import SHARED_GPU_MEMORY, runs_on_cpu


def main(config: Config, number: int, address: str, first_gpu: int, shared: bool) -> NoReturn:
    """Does not return. `address`: of this node; `first_gpu`: of the `rollout.tensor` ones that this engine has alone
    or with ranks (`shared`).

    Raises ValueError where this node lacks those GPUs.
    """
    host = listening_address(address)
    port, cpu = free_port(host), runs_on_cpu(config.rollout.engine)
    memory = SHARED_GPU_MEMORY if shared else None
    argv, env = server_of(config, host=host, port=port, cpu=cpu, gpu_memory_utilization=memory)
    if not cpu:
        if not shared:
            check_gpus(first_gpu + config.rollout.tensor)
        env["CUDA_VISIBLE_DEVICES"] = visible_gpus(first_gpu, config.rollout.tensor)
    Control.connect(os.environ[CONTROL_VARIABLE]).post(engine_url_key(number), {"url": f"http://{address}:{port}"})
    become_guarded(argv, env, GRACE_S / 2)  # through before the launcher gives up


def listening_address(address: str) -> str:
    """Where to listen so that others reach `address`. A name that means loopback to its own node only: everywhere."""
    try:
        found = socket.gethostbyname(address)
    except OSError:  # a name for others alone
        return "0.0.0.0"
    return "0.0.0.0" if found.startswith("127.") and found != address else found


def check_gpus(needed: int) -> None:
    """Raises ValueError where this node has fewer."""
    import torch

    if (gpus := torch.cuda.device_count()) < needed:
        raise ValueError(
            f"rollout.engines: got one that needs {needed} GPUs of its node, ranks and other engines included, expected"
            f" at most the {gpus} that are here; name the nodes' GPUs in cluster.device to have this checked beforehand"
        )


if __name__ == "__main__":
    main(load_config(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), bool(int(sys.argv[5])))
