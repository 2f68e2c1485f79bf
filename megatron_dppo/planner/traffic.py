"""Bytes on the wire, of each rank and by kind, and the seconds they take at the links' speed.

Of one rank of the stage that has most layers: what it receives of each collective in a step of the trainer. A group's
link is the slowest between two of its ranks, in Megatron's order of ranks (`weights.layout.coordinates`).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dppo.architecture import Architecture
from megatron_dppo.config import Config, ParallelConfig
from megatron_dppo.placement import engines_apart, transport_of
from megatron_dppo.planner.engine import engine_parallel, worker_weights
from megatron_dppo.planner.hardware import FILE_BANDWIDTH, Device
from megatron_dppo.planner.memory import ITEMSIZE, expert_data
from megatron_dppo.planner.parameters import Parameters, stage_parameters
from megatron_dppo.planner.workload import Workload
from megatron_dppo.weights.layout import chunk_layers

LINK_SHARE = 0.7  # of a link's bandwidth that large collectives get


@dataclass(frozen=True)
class Wire:
    """Bytes that a rank receives in a step, and their seconds."""

    bytes: int
    seconds: float


@dataclass(frozen=True)
class Sync:
    """One update of all engines: bytes from the trainer to one instance, and between instances.

    `bytes_per_worker`: the most that a worker receives. `busiest_bytes`: what the busiest rank or worker of each bucket
    moves, of all buckets: they go one after the other.
    """

    transport: str
    trainer_to_engine_bytes: int
    engine_to_engine_bytes: int
    bytes_per_worker: int
    busiest_bytes: int
    buckets: int
    seconds: float


def step_wires(config: Config, arch: Architecture, device: Device, work: Workload) -> dict[str, Wire]:
    """Of a step of the trainer, by kind: `tensor`, `experts`, `context`, `pipeline`, `gradients`, `weights`, `head`."""
    p, d, hidden = config.parallel, ITEMSIZE[config.model.dtype], arch.hidden_size
    stage = _largest_stage(config, arch)
    layers = [layer for v in range(p.virtual) for layer in chunk_layers(arch.num_layers, p.layout, stage, v)]
    moe = sum(arch.moe_layers[layer] for layer in layers)
    tokens = work.total_tokens / p.data / p.context  # of this context rank, in a step
    rows = tokens / (p.tensor if p.uses_sequence_parallel else 1)
    own = stage_parameters(arch, p.layout, stage)
    again = 1 if config.training.recompute == "full" else 0
    mlps = len(layers) - moe + (moe if arch.shared_expert_intermediate_size else 0)
    gathered = len(layers) * _attention_input(arch) + mlps * hidden
    scattered = (len(layers) + mlps) * hidden
    # Forward gathers inputs and scatters outputs; backward gathers gradients and the inputs again, and scatters theirs.
    tensor = ((3 + again) * gathered + (2 + again) * scattered) * rows * d * (p.tensor - 1)
    to_others = (p.expert - 1) / p.expert + (p.expert_tensor - 1)
    experts = (4 + 2 * again) * moe * arch.num_experts_per_tok * rows * hidden * d * to_others
    values = arch.latent.v_head_dim if arch.latent is not None else arch.head_dim
    keys = d * max(1, arch.num_key_value_heads // p.tensor) * (arch.head_dim + values)
    context = (3 + again) * len(layers) * tokens * keys * (p.context - 1)
    borders = 2 * p.virtual * (p.pipeline > 1)
    return {
        "tensor": _wire(tensor, device, p.tensor, config),
        "experts": _wire(experts, device, p.expert * p.expert_tensor, config),
        "context": _wire(context, device, p.tensor * p.context, config),
        "pipeline": _wire(borders * rows * hidden * d, device, p.ranks, config),
        "gradients": _replicas(config, own, device, 4, work),
        "weights": _replicas(config, own, device, d if p.distributed_optimizer else 4, work),
        "head": _wire(2 * tokens * hidden * d * (p.tensor > 1), device, p.tensor, config),
    }


def _attention_input(arch: Architecture) -> int:
    """Numbers of a token that attention's first products by heads take: latents are made before, of each rank's share
    of the tokens."""
    latent = arch.latent
    if latent is None:
        return arch.hidden_size
    return (latent.q_lora_rank or arch.hidden_size) + latent.kv_lora_rank + latent.qk_rope_head_dim


def _largest_stage(config: Config, arch: Architecture) -> int:
    p = config.parallel

    def layers(stage: int) -> int:
        return sum(len(chunk_layers(arch.num_layers, p.layout, stage, v)) for v in range(p.virtual))

    return max(range(p.pipeline), key=layers)


def _wire(nbytes: float, device: Device, span: int, config: Config) -> Wire:
    """`span`: ranks, one behind the other, among which the group lies. A network carries what leaves a node."""
    per_node = min(config.cluster.devices_per_node, max(1, config.parallel.ranks // config.cluster.nodes))
    far = 0.0 if span <= per_node else 1 - per_node / span
    seconds = nbytes * ((1 - far) / device.node_bandwidth + far / device.network_bandwidth) / LINK_SHARE
    return Wire(round(nbytes), seconds)


def _replicas(config: Config, own: Parameters, device: Device, itemsize: int, work: Workload) -> Wire:
    """A reduce-scatter or all-gather of all parameters over their replicas, once a gradient step."""
    p = config.parallel
    dense, expert = p.data * p.context, expert_data(config)
    nbytes = itemsize * (own.dense * (dense - 1) / dense + own.expert * (expert - 1) / expert)
    return _wire(nbytes * work.minibatches, device, p.ranks // p.pipeline, config)


def sync_traffic(config: Config, arch: Architecture, device: Device) -> Sync:
    """Of the weights to the engines that the job starts.

    In a group every worker receives what it keeps, from the ranks that hold it, evenly; instances hand buckets on in a
    ring.
    """
    rollout, transport = config.rollout, transport_of(config)
    parallel, itemsize = engine_parallel(config), ITEMSIZE[config.model.dtype]
    of_workers = [worker_weights(arch, parallel, itemsize, worker) for worker in range(parallel.workers)]
    total, most, hops = sum(of_workers), max(of_workers), rollout.engines - 1
    if transport in FILE_BANDWIDTH:
        whole = worker_weights(arch, type(parallel)(), itemsize)
        seconds = 2 * whole / FILE_BANDWIDTH[transport]  # written, then read
        return Sync(transport, whole, 0, most, whole, 1, seconds)
    buckets = -(-most // config.sync.bucket_bytes)
    near = not config.cluster.engine_nodes and config.cluster.nodes == 1 and engines_apart(config)
    bandwidth = (device.node_bandwidth if near or transport == "ipc" else device.network_bandwidth) * LINK_SHARE
    senders = config.parallel.ranks * _sending_share(config.parallel, arch.num_layers, buckets)
    busiest = round(max(total / senders, most))
    seconds = busiest / bandwidth * (1 + hops / buckets)
    return Sync(transport, total, total * hops, most, busiest, buckets, seconds)


def _sending_share(parallel: ParallelConfig, num_layers: int, buckets: int) -> float:
    """Of the ranks, those that hold something of a bucket. Layers are sent in order and in each its experts: many small
    buckets are one pipeline stage's each, and one expert-parallel rank's of it."""
    stages = min(1.0, max(1 / parallel.pipeline, parallel.virtual / buckets))
    experts = min(1.0, max(1 / parallel.expert, num_layers / buckets))
    return stages * experts
