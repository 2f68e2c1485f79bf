"""What a rollout engine's workers need: weights, key/value cache, and how many sequences that is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_dppo.architecture import Architecture
from megatron_dppo.config import Config, longest_sequence
from megatron_dppo.placement import SHARED_GPU_MEMORY, engines_apart, transport_of
from megatron_dppo.planner.hardware import GIB, Device
from megatron_dppo.planner.memory import ITEMSIZE
from megatron_dppo.weights.engine_layout import EngineParallel, engine_layout
from megatron_dppo.weights.mapping import float32_tensors
from megatron_dppo.weights.plan import BUCKETS_IN_FLIGHT

ENGINE_SHARE = 0.9  # of a device that the engine has alone: vLLM's default
FORWARD_BYTES = 2 * GIB  # activations and graphs of a worker's largest batch


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of each worker of an engine, whose `budget` is its share of the device.

    `kv_bytes_per_token`: of one token's keys and values in all layers. `cache`: what is left for them. `sequences`: of
    the longest length that the cache of one engine holds; `shares_devices`: with ranks of the trainer.
    """

    weights: int
    staging: int
    forward: int
    budget: int
    kv_bytes_per_token: int
    cache: int
    sequences: int
    shares_devices: bool

    @property
    def fits(self) -> bool:
        """Whether one sequence can be sampled."""
        return self.sequences >= 1


def engine_memory(config: Config, arch: Architecture, device: Device) -> EngineMemory:
    """Of an engine that the job starts. Raises ValueError where its degrees do not divide the model."""
    rollout = config.rollout
    itemsize = ITEMSIZE[rollout.dtype]
    weights = worker_weights(arch, engine_parallel(config), itemsize)
    shared = device.is_gpu and not engines_apart(config)
    staging = BUCKETS_IN_FLIGHT * config.sync.bucket_bytes if transport_of(config) in ("group", "ipc") else 0
    forward = FORWARD_BYTES if device.is_gpu else 0
    kv = kv_bytes_per_token(arch, rollout.tensor, itemsize)
    budget = round(device.memory_bytes * (SHARED_GPU_MEMORY if shared else ENGINE_SHARE))
    # On a CPU the cache has its own setting, beside the weights.
    cache = budget - weights - staging - forward if device.is_gpu else rollout.kv_cache_gib * GIB
    sequences = max(cache, 0) // (kv * longest_sequence(config))
    return EngineMemory(weights, staging, forward, budget, kv, max(cache, 0), sequences, shared)


def engine_parallel(config: Config) -> EngineParallel:
    """How the engines that a job starts split the model."""
    return EngineParallel(tensor=config.rollout.tensor, expert_parallel=config.rollout.expert_parallel)


@lru_cache(maxsize=256)
def worker_weights(arch: Architecture, parallel: EngineParallel, itemsize: int, worker: int = 0) -> int:
    """Bytes of a worker, of which number 0 has no fewer than another; from one layer of each kind."""

    def of(moe_layers: tuple[bool, ...]) -> int:
        cut = replace(arch, num_layers=len(moe_layers), moe_layers=moe_layers)
        split = replace(parallel, expert_parallel=parallel.expert_parallel and any(moe_layers))
        float32 = float32_tensors(cut)
        return sum((4 if box.tensor in float32 else itemsize) * box.numel for box in engine_layout(cut, split, worker))

    outer = of(())
    return outer + sum((of((kind,)) - outer) * arch.moe_layers.count(kind) for kind in set(arch.moe_layers))


def kv_bytes_per_token(arch: Architecture, tensor: int, itemsize: int) -> int:
    """Of each worker: heads are split, and repeated where there are more workers; a latent is on every worker."""
    if arch.latent is not None:
        return itemsize * arch.num_layers * (arch.latent.kv_lora_rank + arch.latent.qk_rope_head_dim)
    heads = max(1, arch.num_key_value_heads // tensor)
    return 2 * itemsize * arch.num_layers * heads * arch.head_dim
