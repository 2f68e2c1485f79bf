"""An engine on another node than the launcher's: finds a port that is free here, says where it will answer, and becomes
the guard of the server. Run as `python -m megatron_dppo.rollout.node_engine CONFIG NUMBER ADDRESS FIRST_GPU`.

Only the node itself knows its free ports and what it has to compute with.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from megatron_dppo.config import Config
from megatron_dppo.config_loading import load_config
from megatron_dppo.control import CONTROL_VARIABLE, Control, engine_url_key
from megatron_dppo.machines import visible_gpus
from megatron_dppo.processes import GRACE_S, become_guarded, free_port
from megatron_dppo.rollout.engines import runs_on_cpu, server_of


def main(config: Config, number: int, address: str, first_gpu: int) -> NoReturn:
    """Does not return. `address`: of this node; `first_gpu`: of the `rollout.tensor` ones that are this engine's."""
    port, cpu = free_port(address), runs_on_cpu(config.rollout.engine)
    argv, env = server_of(config, host=address, port=port, cpu=cpu, gpu_memory_utilization=None)
    if not cpu:
        env["CUDA_VISIBLE_DEVICES"] = visible_gpus(first_gpu, config.rollout.tensor)
    Control.connect(os.environ[CONTROL_VARIABLE]).post(engine_url_key(number), {"url": f"http://{address}:{port}"})
    become_guarded(argv, env, GRACE_S / 2)  # through before the launcher gives up


if __name__ == "__main__":
    main(load_config(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
