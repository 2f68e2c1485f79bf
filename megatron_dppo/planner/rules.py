"""Rules of a job on several machines, in the manner of `config_rules`: one line a fault, with what would mend it.

`violations` stop a job or waste whole machines; `advice` costs time. `config_rules` has the rules that the launchers
check, too; these are the planner's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_dppo.architecture import Architecture
from megatron_dppo.config import ClusterConfig, Config, ModelConfig, ParallelConfig, RolloutConfig
from megatron_dppo.config.cluster_rules import startable
from megatron_dppo.config.loading import sections_of
from megatron_dppo.config.rules import SETTING_RULES, Rule, broken_rules, machine_rules
from megatron_dppo.planner.engine import EngineMemory
from megatron_dppo.planner.hardware import Device
from megatron_dppo.planner.workload import Workload

LATENT_NORM_EPS = 1e-6  # backend.layers.LATENT_NORM_EPS, which is not imported: it brings Megatron
FEW_MICRO_BATCHES = 4  # a pipeline stage: with fewer, more than a fifth of the time is its bubble


def violations(config: Config, arch: Architecture, device: Device) -> list[str]:
    """Every broken rule of the settings, of the cluster and, where the device is this machine's, of the machine."""
    return broken_sections(sections_of(config), arch, device)


def broken_sections(sections: Mapping[str, Any], arch: Architecture | None, device: Device | None) -> list[str]:
    """The same of what could be read: the rules that need more are not run."""
    known = dict(sections) | ({} if device is None else {"device": device})
    rules = (*machine_rules(sections["cluster"]), *SETTING_RULES) if "cluster" in sections else SETTING_RULES
    return broken_rules(known, (*rules, *PLANNER_RULES), arch)


def _within_node(parallel: ParallelConfig, cluster: ClusterConfig, device: Device) -> Iterator[str]:
    """Tensor parallelism talks in every layer, in between its products: a network is too slow for that."""
    if not device.is_gpu:
        return
    per_node = min(cluster.devices_per_node, max(1, parallel.ranks // cluster.nodes))
    for name in ("tensor", "expert_tensor"):
        degree = getattr(parallel, name)
        if per_node % degree:
            yield (
                f"parallel.{name}: got {degree}, expected a divisor of the {per_node} ranks of a node, so that its "
                "groups stay within one"
            )


def _all_devices(
    parallel: ParallelConfig, cluster: ClusterConfig, rollout: RolloutConfig, device: Device
) -> Iterator[str]:
    """Every device of the trainer's nodes has a rank, or a worker of an engine."""
    total = cluster.nodes * cluster.devices_per_node
    has_engines = not cluster.engine_nodes and not rollout.urls
    used = parallel.ranks + (rollout.engines * rollout.tensor if has_engines else 0)
    if device.is_gpu and used < total:
        what = "ranks and engine workers" if has_engines else "ranks"
        yield (
            f"parallel.ranks: got {parallel.ranks}, expected {total - used + parallel.ranks}: cluster.nodes "
            f"{cluster.nodes} x devices_per_node {cluster.devices_per_node} hold {total}, {what} use {used}"
        )


def _latent_norms(model: ModelConfig, arch: Architecture, device: Device) -> Iterator[str]:
    """Transformer Engine's norms of the latents take the model's epsilon, where the models have their own."""
    if arch.latent and device.is_gpu and model.layers != "torch" and arch.rms_norm_eps != LATENT_NORM_EPS:
        yield (
            f"model.layers: got {model.layers}, expected torch: rms_norm_eps is {arch.rms_norm_eps}, and Transformer "
            f"Engine computes latent attention with {LATENT_NORM_EPS} only"
        )


def _room(cluster: ClusterConfig, rollout: RolloutConfig) -> int:
    """Engines that the engine nodes hold."""
    if rollout.tensor <= cluster.devices_per_node:
        return cluster.engine_nodes * (cluster.devices_per_node // rollout.tensor)
    return cluster.engine_nodes // -(-rollout.tensor // cluster.devices_per_node)


PLANNER_RULES: tuple[Rule, ...] = (_within_node, _all_devices, _latent_norms)


def advice(
    config: Config, arch: Architecture, device: Device, work: Workload, engine: EngineMemory | None
) -> list[str]:
    """What runs, and would run better otherwise."""
    return [
        *_bubble(config, work),
        *_idle_engines(config, device),
        *_experts_over_network(config, arch, device),
        *_large_engines(config, device),
        *_concurrency(config, work, engine),
    ]


def _bubble(config: Config, work: Workload) -> Iterator[str]:
    parallel = config.parallel
    if parallel.pipeline > 1 and work.mean_micro_batches < FEW_MICRO_BATCHES * parallel.pipeline:
        yield (
            f"parallel.pipeline: {parallel.pipeline} stages have {work.mean_micro_batches} micro-batches of a gradient "
            f"step to share, at least {FEW_MICRO_BATCHES * parallel.pipeline} keep them busy: fewer "
            "training.minibatches or training.micro_batch_tokens, or more rollout.prompts_per_step"
        )


def _idle_engines(config: Config, device: Device) -> Iterator[str]:
    cluster, rollout = config.cluster, config.rollout
    room = _room(cluster, rollout)
    if device.is_gpu and cluster.engine_nodes and not rollout.urls and rollout.engines < room:
        yield f"rollout.engines: {rollout.engines} leave devices of the engine nodes idle, which hold {room}"


def _large_engines(config: Config, device: Device) -> Iterator[str]:
    """What launchers refuse is planned all the same: others may start it."""
    if device.is_gpu and config.cluster.engine_nodes:
        yield from startable(config.cluster, config.rollout)


def _concurrency(config: Config, work: Workload, engine: EngineMemory | None) -> Iterator[str]:
    """Engines are as full as their caches permit."""
    if engine is None:
        return
    most, room = config.rollout.max_concurrency, engine.sequences * config.rollout.engines
    if 2 * most <= min(room, work.samples):
        yield (
            f"rollout.max_concurrency: {most} requests at a time, where the caches hold {room} of the longest "
            f"sequences and a step has {work.samples} samples"
        )


def _experts_over_network(config: Config, arch: Architecture, device: Device) -> Iterator[str]:
    parallel, per_node = config.parallel, config.cluster.devices_per_node
    if device.is_gpu and arch.is_moe and parallel.expert * parallel.expert_tensor > per_node:
        yield (
            f"parallel.expert: {parallel.expert} x expert_tensor {parallel.expert_tensor} reach over nodes of "
            f"{per_node}: every MoE layer's dispatch goes over the network"
        )
