"""The rules of a config about the machines of a job. See `config_rules`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_dppo.config import ClusterConfig, ParallelConfig, RolloutConfig


def gpus_per_machine(cluster: ClusterConfig) -> int | None:
    """What a job may count on; None on the CPU, or where only the job's machines know (`device: auto`)."""
    if cluster.device == "auto":
        import torch

        return torch.cuda.device_count() or None
    return None if cluster.device == "cpu" else cluster.devices_per_node


def _nodes(parallel: ParallelConfig, cluster: ClusterConfig) -> Iterator[str]:
    if parallel.ranks % cluster.nodes:
        yield f"cluster.nodes: got {cluster.nodes}, expected a divisor of parallel.ranks {parallel.ranks}"


def _gpus(parallel: ParallelConfig, cluster: ClusterConfig) -> Iterator[str]:
    """Every rank has a GPU of its own, where there are any."""
    gpus = gpus_per_machine(cluster)
    if gpus is None or parallel.ranks <= cluster.nodes * gpus:
        return
    if cluster.device == "auto" and cluster.machines == 1:
        yield f"parallel.ranks: got {parallel.ranks}, expected at most this machine's {gpus} GPUs"
        return
    yield (
        f"parallel.ranks: got {parallel.ranks}, expected at most {cluster.nodes * gpus}: cluster.nodes {cluster.nodes} "
        f"x {gpus} GPUs"
    )


def _engine_nodes(parallel: ParallelConfig, cluster: ClusterConfig, rollout: RolloutConfig) -> Iterator[str]:
    """Engines that a job of several machines starts have GPUs of their own."""
    if rollout.urls:
        if cluster.engine_nodes:
            yield f"cluster.engine_nodes: got {cluster.engine_nodes}, expected 0: engines of rollout.urls run already"
        return
    if rollout.engines < cluster.engine_nodes:
        yield f"rollout.engines: got {rollout.engines}, expected one or more for each of cluster.engine_nodes"
    gpus = gpus_per_machine(cluster)
    if gpus is None or cluster.machines == 1:
        return
    if rollout.tensor > gpus:
        yield f"rollout.tensor: got {rollout.tensor}, expected at most a node's {gpus} GPUs"
        return
    free = gpus if cluster.engine_nodes else gpus - -(-parallel.ranks // cluster.nodes)
    room = (cluster.engine_nodes or cluster.nodes) * (max(free, 0) // rollout.tensor)
    if rollout.engines > room:
        yield (
            f"rollout.engines: got {rollout.engines} of {rollout.tensor} GPUs, expected at most {room}: what "
            + (f"cluster.engine_nodes {cluster.engine_nodes} have" if cluster.engine_nodes else "ranks leave on nodes")
        )


CLUSTER_RULES = (_nodes, _gpus, _engine_nodes)
