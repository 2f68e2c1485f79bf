"""An estimate of a step's seconds, each term with a name. Rough: to compare layouts with, not to promise.

Matrix products at a share of the peak (`hardware.Device`), collectives at a share of the links' speed and not
overlapped, decoding at the memory's bandwidth. Lengths are means (`workload`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_dppo.architecture import Architecture, forward_flops
from megatron_dppo.config import Config, objective_of
from megatron_dppo.placement import engines_apart
from megatron_dppo.planner.engine import EngineMemory
from megatron_dppo.planner.hardware import FILE_BANDWIDTH, Device
from megatron_dppo.planner.memory import ITEMSIZE, expert_data
from megatron_dppo.planner.parameters import stage_parameters
from megatron_dppo.planner.traffic import Sync, Wire
from megatron_dppo.planner.workload import MEAN_PROMPT, MEAN_RESPONSE, Workload, evaluation_samples
from megatron_dppo.weights.layout import Parallel, chunk_layers

DECODE_SHARE = 0.6  # of the memory's bandwidth
LAYER_LATENCY_S = 15e-6  # of the two all-reduces of a layer under an engine's tensor parallelism, and its launches
HOST_BANDWIDTH = 25e9  # bytes a second between a GPU and its host
ADAM_BYTES = 28  # a parameter's gradient, main weight and moments read, the last three written


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step of the trainer. `terms` add up to `total`, but for what runs at the same time (`hidden`).

    `model_flops_utilisation`: of the trainer's peak while it trains, by the operations of one forward and backward.
    """

    terms: dict[str, float]
    hidden: float
    tokens: float
    tokens_per_second_per_device: float
    model_flops_utilisation: float

    @property
    def total(self) -> float:
        """Seconds."""
        return sum(self.terms.values()) - self.hidden


def step_time(
    config: Config,
    arch: Architecture,
    device: Device,
    work: Workload,
    wires: dict[str, Wire],
    sync: Sync | None,
    engine: EngineMemory | None,
) -> StepTime:
    """`engine`, `sync`: None where engines are not this job's; then their terms are missing."""
    p = config.parallel
    forward = float(forward_flops(arch, np.array([round(work.mean_length)]))[0]) * work.samples / p.ranks
    passes = 3 + (config.training.recompute == "full") + _extra_passes(config)
    compute = forward * passes * _stage_imbalance(config, arch) / device.flops
    inside = sum(wires[kind].seconds for kind in ("tensor", "experts", "context", "pipeline", "head"))
    bubble = (p.pipeline - 1) / (p.virtual * work.mean_micro_batches) * (compute + inside)
    train = {
        "compute": compute,
        **{kind: wire.seconds for kind, wire in wires.items()},
        "bubble": bubble,
        "optimizer": _optimizer_seconds(config, arch, device, work),
    }
    trained = sum(train.values())
    terms: dict[str, float] = {}
    if engine is not None:
        terms["rollout"] = sampling_seconds(
            config, arch, device, engine, work.samples, config.rollout.max_response_tokens
        )
    if sync is not None:
        terms["sync"] = sync.seconds
    # On the same devices one waits for the other, however stale samples may be.
    at_once = config.rollout.max_staleness and engines_apart(config)
    hidden = min(terms.get("rollout", 0.0), trained) if at_once else 0.0
    terms |= train
    if engine is not None and config.data.eval:
        terms["evaluation"] = _evaluation_seconds(config, arch, device, engine)
    if config.checkpoint.every:
        terms["checkpoint"] = checkpoint_bytes(config, arch) / config.checkpoint.every / _writing_bandwidth(config)
    total = sum(terms.values()) - hidden
    cluster = config.cluster
    devices = (cluster.nodes + cluster.engine_nodes) * cluster.devices_per_node if device.is_gpu else p.ranks
    return StepTime(
        terms=terms,
        hidden=hidden,
        tokens=work.total_tokens,
        tokens_per_second_per_device=work.total_tokens / total / devices,
        model_flops_utilisation=3 * forward / trained / device.peak_flops,
    )


def _extra_passes(config: Config) -> int:
    """Forward passes beside that of the gradient: the old policy's, the reference's, one for routes to replay."""
    anchor = objective_of(config).anchor == "recomputed"
    return int(anchor) + bool(config.loss.kl.coefficient) + (config.routing.mode == "recompute")


def _stage_imbalance(config: Config, arch: Architecture) -> float:
    """The slowest stage over the mean of all; the head counts as what it computes."""
    p = config.parallel
    one = np.array([1])
    head = 2.0 * arch.hidden_size * arch.vocab_size
    layer = (float(forward_flops(arch, one)[0]) - head) / arch.num_layers
    stages = [
        layer * sum(len(chunk_layers(arch.num_layers, p.layout, stage, v)) for v in range(p.virtual))
        + head * (stage == p.pipeline - 1)
        for stage in range(p.pipeline)
    ]
    return max(stages) * p.pipeline / sum(stages)


def _optimizer_seconds(config: Config, arch: Architecture, device: Device, work: Workload) -> float:
    p, distributed = config.parallel, config.parallel.distributed_optimizer
    own = stage_parameters(arch, p.layout, 0)
    dense = own.dense / (p.data * p.context if distributed else 1)
    expert = own.expert / (expert_data(config) if distributed else 1)
    bandwidth = HOST_BANDWIDTH if config.training.offload_optimizer else device.memory_bandwidth
    return work.minibatches * ADAM_BYTES * (dense + expert) / bandwidth


def _evaluation_seconds(config: Config, arch: Architecture, device: Device, engine: EngineMemory) -> float:
    """Of a step's share of all evaluations: before, after, and every so many steps."""
    steps, every = config.training.steps, config.evaluation.every
    count = 2 + ((steps - 1) // every if every else 0)
    longest = config.evaluation.max_response_tokens or config.rollout.max_response_tokens
    return count / steps * sampling_seconds(config, arch, device, engine, evaluation_samples(config), longest)


def checkpoint_bytes(config: Config, arch: Architecture) -> int:
    """Of a whole checkpoint: weights, and Adam's float32 weights and moments."""
    d = ITEMSIZE[config.model.dtype]
    return (d + (12 if d == 2 else 8)) * stage_parameters(arch, Parallel(), 0).trained


def _writing_bandwidth(config: Config) -> float:
    """Bytes a second of the nodes that have a rank of the first replica, which writes."""
    p, cluster = config.parallel, config.cluster
    writers = p.pipeline * max(p.tensor, p.expert * p.expert_tensor)
    return FILE_BANDWIDTH["disk"] * min(cluster.nodes, -(-writers * cluster.nodes // p.ranks))


def sampling_seconds(
    config: Config, arch: Architecture, device: Device, engine: EngineMemory, samples: int, longest: int
) -> float:
    """Of so many samples of at most `longest` tokens.

    A decoding step reads the weights once and every sequence's cache; long samples end alone.
    """
    rollout = config.rollout
    prompts, responses = config.data.max_prompt_tokens * MEAN_PROMPT, longest * MEAN_RESPONSE
    context = prompts + responses / 2
    own = samples / rollout.engines
    room = engine.cache / (engine.kv_bytes_per_token * (prompts + responses))
    batch = max(1.0, min(own, rollout.max_concurrency / rollout.engines, room))
    latency = arch.num_layers * LAYER_LATENCY_S
    read = device.memory_bandwidth * DECODE_SHARE
    active = float(forward_flops(arch, np.array([1]))[0]) / rollout.tensor
    # A batch that is small beside the experts reads only some of them; a large one all.
    touched = min(1.0, batch * arch.num_experts_per_tok / arch.num_experts) if arch.is_moe else 1.0
    weights = engine.weights * max(touched, active / 2 * ITEMSIZE[rollout.dtype] / engine.weights)

    def step(sequences: float, share: float) -> float:
        moved = (weights * share + sequences * context * engine.kv_bytes_per_token) / read
        return max(moved, sequences * active / device.flops) + latency

    all_samples = own * responses / batch * step(batch, 1.0)
    alone = longest * step(1.0, min(1.0, active / 2 * ITEMSIZE[rollout.dtype] / engine.weights))
    return max(all_samples, alone)
