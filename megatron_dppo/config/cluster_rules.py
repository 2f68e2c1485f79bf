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
    """No two engines that a job starts share a GPU. Ranks and engines do, where all are on one machine."""
    if rollout.urls:
        if cluster.engine_nodes:
            yield f"cluster.engine_nodes: got {cluster.engine_nodes}, expected 0: engines of rollout.urls run already"
        return
    gpus = gpus_per_machine(cluster)
    over = nodes_of_engine(rollout, gpus)
    if rollout.engines * over < cluster.engine_nodes:
        yield (
            f"rollout.engines: got {rollout.engines}, expected at least {-(-cluster.engine_nodes // over)}: none of "
            f"cluster.engine_nodes {cluster.engine_nodes} is without one"
        )
    if gpus is None:
        return
    if over > 1 and (rollout.tensor % gpus or not cluster.engine_nodes):
        yield (
            f"rollout.tensor: got {rollout.tensor}, expected at most a node's {gpus} GPUs, or a multiple of them on "
            "nodes of its own (cluster.engine_nodes)"
        )
        return
    if cluster.engine_nodes:
        free, whose = gpus, f"cluster.engine_nodes {cluster.engine_nodes} have"
    elif cluster.machines == 1:
        free, whose = gpus, f"the {gpus} GPUs of one machine have room for, beside ranks or not"
    else:
        free, whose = max(gpus - -(-parallel.ranks // cluster.nodes), 0), "ranks leave on nodes"
    on_each = free // rollout.tensor if over == 1 else 1
    room = (cluster.engine_nodes or cluster.nodes) // over * on_each
    if rollout.engines > room:
        yield (
            f"rollout.engines: got {rollout.engines} of {rollout.tensor} GPUs, expected at most {room}: what {whose}"
        )


def nodes_of_engine(rollout: RolloutConfig, gpus: int | None) -> int:
    """Over how many nodes of so many GPUs an engine reaches; None: the CPU, of which there is enough."""
    return 1 if gpus is None else -(-rollout.tensor // gpus)


def startable(cluster: ClusterConfig, rollout: RolloutConfig) -> Iterator[str]:
    """A rule of those who start engines, not of those who plan them."""
    over = nodes_of_engine(rollout, gpus_per_machine(cluster))
    if not rollout.urls and over > 1:
        yield (
            f"rollout.tensor: got {rollout.tensor}, an engine over {over} nodes, expected one within a node: launchers "
            "do not start larger ones; start them as the engine's own documentation says, and name them in rollout.urls"
        )


CLUSTER_RULES = (_nodes, _gpus, _engine_nodes)
