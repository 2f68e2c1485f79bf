"""The rules of a config about sampling and the engines that do it. See `config.rules`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from megatron_dppo.architecture import Architecture
from megatron_dppo.config.file_rules import few
from megatron_dppo.placement import is_local, runs_on_cpu
from megatron_dppo.weights.engine_layout import EngineParallel, engine_layout, indivisible
from megatron_dppo.weights.update import UPDATE_DTYPES

if TYPE_CHECKING:
    from megatron_dppo.config import ClusterConfig, ModelConfig, RolloutConfig, SyncConfig

VLLM_CPU_LATENT_SIZE = 576
VLLM_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def _sampling(rollout: RolloutConfig) -> Iterator[str]:
    """Training knows mu only where sampling did not cut the distribution."""
    reason = "the trainer cannot reproduce the log-probs of a truncated distribution"
    if rollout.top_p != 1.0:
        yield f"rollout.top_p: got {rollout.top_p}, expected 1.0: {reason}"
    if rollout.top_k != -1:
        yield f"rollout.top_k: got {rollout.top_k}, expected -1: {reason}"
    for url in rollout.urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            yield f"rollout.urls: got {url!r}, expected an address such as http://127.0.0.1:8000"
    if len(set(rollout.urls)) < len(rollout.urls):
        yield "rollout.urls: got an address twice, expected each engine once"


def _transport(rollout: RolloutConfig, sync: SyncConfig, cluster: ClusterConfig) -> Iterator[str]:
    """Shared memory is one machine's."""
    far = [url for url in rollout.urls if not is_local(url)]
    if sync.transport in ("shm", "ipc") and (far or cluster.machines > 1):
        reason = f"{few(far)} is on another machine" if far else f"the job has {cluster.machines} machines"
        yield f"sync.transport: got {sync.transport}, expected group or disk: {reason}"
    if sync.transport == "disk" and far and sync.dir is None:
        yield f"sync.dir: missing, {few(far)} must see it too"


def _bucket(sync: SyncConfig, rollout: RolloutConfig, model: ModelConfig, arch: Architecture) -> Iterator[str]:
    """What a worker receives at a time has room for two rows of every tensor (`weights.plan.sync_plan`)."""
    # Of other engines' layout nothing is known: their rows may be whole.
    engine = EngineParallel(tensor=1 if rollout.urls else rollout.tensor)
    if sync.transport in ("shm", "disk") or any(indivisible(arch, engine)):
        return
    columns = _longest_row(arch, engine)
    least = 2 * columns * UPDATE_DTYPES[model.dtype]
    if sync.bucket_bytes < least:
        mib = math.ceil(1e4 * least / (1 << 20)) / 1e4
        yield f"sync.bucket_mib: got {sync.bucket_mib:g}, expected at least {mib:g}: two rows of {columns} numbers"


@lru_cache(maxsize=64)
def _longest_row(arch: Architecture, engine: EngineParallel) -> int:
    """Numbers in a row of what a worker keeps, from one layer of each kind."""
    kinds = tuple(sorted(set(arch.moe_layers)))
    boxes = engine_layout(replace(arch, num_layers=len(kinds), moe_layers=kinds), engine, 0)
    return max(box.stop[1] - box.start[1] for box in boxes if len(box.start) > 1)


def _engine_layout(rollout: RolloutConfig, arch: Architecture) -> Iterator[str]:
    """An engine that this job starts can split the model."""
    if rollout.urls:
        for name in ("engines", "tensor", "expert_parallel"):
            if (got := getattr(rollout, name)) != type(rollout).model_fields[name].default:
                yield f"rollout.{name}: got {got}, which engines of rollout.urls do not heed"
        return
    tensor = rollout.tensor
    for fault in indivisible(arch, EngineParallel(tensor=tensor, expert_parallel=rollout.expert_parallel)):
        yield fault.replace("engine.tensor x data", "rollout.tensor").replace("engine.tensor", "rollout.tensor")
    if rollout.expert_parallel and (tensor == 1 or not arch.is_moe):
        yield "rollout.expert_parallel: got true, expected false: there is nothing to divide" + (
            " (rollout.tensor is 1)" if arch.is_moe else " (the model has no experts)"
        )


def _engine(rollout: RolloutConfig, arch: Architecture) -> Iterator[str]:
    """The engine that this job starts can compute the model here, where that is on the CPU."""
    if rollout.urls or not runs_on_cpu(rollout.engine):
        return
    if rollout.engine == "sglang":
        if arch.latent is not None:
            yield "rollout.engine: got sglang, expected vllm: SGLang computes latent attention on GPUs only"
        if rollout.expert_parallel:
            yield "rollout.expert_parallel: got true, expected false: SGLang spreads experts over GPUs only"
    elif arch.latent is not None:
        cached = arch.latent.kv_lora_rank + arch.latent.qk_rope_head_dim
        if cached != VLLM_CPU_LATENT_SIZE:
            yield (
                f"model.path: got kv_lora_rank + qk_rope_head_dim = {cached}, expected what vLLM computes on CPU: "
                f"{VLLM_CPU_LATENT_SIZE}"
            )
    elif arch.head_dim not in VLLM_CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, VLLM_CPU_HEAD_SIZES))
        yield f"model.path: got head_dim {arch.head_dim}, expected one that vLLM computes on CPU: {sizes}"


def _engine_model(rollout: RolloutConfig, arch: Architecture) -> Iterator[str]:
    """The engine computes the same model."""
    if rollout.engine == "sglang" and arch.model_type == "qwen3_moe" and not all(arch.moe_layers):
        yield (
            "rollout.engine: got sglang, expected vllm: SGLang gives experts to all layers of a Qwen3-MoE model, of "
            f"which this one has them in {sum(arch.moe_layers)} of {arch.num_layers} (mlp_only_layers, "
            "decoder_sparse_step)"
        )


ROLLOUT_RULES = (_sampling, _transport, _bucket, _engine_layout, _engine_model)
ENGINE_MACHINE_RULES = (_engine,)  # of the machine that this runs on
