"""Bytes that each rank of the trainer needs, by kind: of one pipeline stage, whose ranks are all alike.

What is always there (weights, gradients, the optimizer's state, staging) and, on top, the largest of what comes and
goes: a gradient step's activations, the optimizer's scratch memory.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megatron_dppo.architecture import Architecture
from megatron_dppo.config import Config, num_recorded_topk, objective_of
from megatron_dppo.head.policy_head import HeadMemory
from megatron_dppo.placement import transport_of
from megatron_dppo.planner.activations import (
    Layers,
    attention_core_bytes,
    dispatched_bytes,
    final_norm_bytes,
    kept_bytes,
    layer_input_bytes,
)
from megatron_dppo.planner.hardware import Device
from megatron_dppo.planner.parameters import Parameters, stage_parameters
from megatron_dppo.planner.workload import Workload, chunks_in_flight
from megatron_dppo.weights.layout import chunk_layers, padded_vocab_size
from megatron_dppo.weights.plan import BUCKETS_IN_FLIGHT

ITEMSIZE = {"float32": 4, "bfloat16": 2}
GRADIENT_BYTES = 4  # Megatron's main_grad: grad_reduce_in_fp32
# Of a layer's backward, in copies of the rows for the experts (or of the hidden states, in a dense layer) that are
# alive at once, above what the layer kept. Frozen on the three calibration runs of benchmarks/planner.md.
LAYER_COPIES = 5
ADAM_SCRATCH = 2  # float32 copies of the largest parameter, in torch's Adam on a CPU


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the device of each rank of pipeline stage `stage`; `host` on its machine, for each rank.

    `recorded`: what is known of a step's tokens before its weights move. `activations`: kept for backward, of all
    micro-batches in flight. `logits`: what the policy head has at once beside. `working`: of a layer's backward, or
    recomputed. `scratch`: of the gradients' reduction, and the optimizer's. `checkpoint_host`: of the replica that
    gathers the optimizer's state while a checkpoint is written.
    """

    stage: int
    weights: int
    gradients: int
    optimizer: int
    reference: int
    staging: int
    routes: int
    recorded: int
    activations: int
    logits: int
    working: int
    scratch: int
    overhead: int
    optimizer_host: int
    checkpoint_host: int

    @property
    def standing(self) -> int:
        """What is always there."""
        return self.weights + self.gradients + self.optimizer + self.reference + self.staging

    @property
    def peak(self) -> int:
        """What tensors take at most; `overhead` comes on top."""
        of_step = self.routes + self.recorded
        return self.standing + of_step + max(self.activations + max(self.logits, self.working), self.scratch)

    @property
    def needed(self) -> int:
        """Of the device."""
        return self.peak + self.overhead

    def by_kind(self) -> dict[str, int]:
        """For programs."""
        return {k: v for k, v in asdict(self).items() if k != "stage"} | {"peak": self.peak, "needed": self.needed}


def layers_of(config: Config, device: Device) -> Layers:
    """Whose layers `model.layers` means on that device."""
    fused = device.is_gpu and config.model.layers != "torch"
    shares = config.parallel.tensor if config.parallel.uses_sequence_parallel else 1
    return Layers(fused, ITEMSIZE[config.model.dtype], device.is_gpu, shares)


def rank_memory(config: Config, arch: Architecture, device: Device, work: Workload, stage: int) -> RankMemory:
    """Of each rank of a pipeline stage. Raises ValueError where the layers do not divide."""
    layers, parallel = layers_of(config, device), config.parallel
    own = stage_parameters(arch, parallel.layout, stage)
    weights = layers.itemsize * own.trained + 4 * own.float32
    state, host = _optimizer(config, own)
    kept, recomputed = _activations(config, arch, layers, work, stage)
    working = round(LAYER_COPIES * dispatched_bytes(arch, parallel.layout, layers) * _tokens(config, work)) + recomputed
    return RankMemory(
        stage=stage,
        weights=weights,
        gradients=GRADIENT_BYTES * own.trained,
        optimizer=state,
        reference=weights if config.loss.kl.coefficient else 0,
        staging=_staging(config, weights),
        routes=_routes(config, arch, layers, work, stage),
        recorded=_recorded(config, work, stage == parallel.pipeline - 1),
        activations=kept,
        logits=_logits(config, arch, device, layers, work) if stage == parallel.pipeline - 1 else 0,
        working=working,
        scratch=_scratch(config, device, layers, own),
        overhead=device.overhead_bytes,
        optimizer_host=host,
        checkpoint_host=12 * own.trained if config.checkpoint.every and parallel.distributed_optimizer else 0,
    )


def all_stages(config: Config, arch: Architecture, device: Device, work: Workload) -> list[RankMemory]:
    """One a pipeline stage; see `rank_memory`."""
    return [rank_memory(config, arch, device, work, stage) for stage in range(config.parallel.pipeline)]


def _tokens(config: Config, work: Workload) -> int:
    """Of a micro-batch, on a context rank."""
    return work.tokens // config.parallel.context


def _optimizer(config: Config, own: Parameters) -> tuple[int, int]:
    """Bytes of main weights and Adam's moments on the device, and on the host."""
    parallel, training = config.parallel, config.training
    moments = 0 if training.optimizer == "sgd" else 8
    main = 4 if config.model.dtype == "bfloat16" else 0  # float32 weights are their own
    dense, expert = own.dense, own.expert
    if parallel.distributed_optimizer:
        dense = -(-dense // (parallel.data * parallel.context))
        expert = -(-expert // expert_data(config))
    state = (main + moments) * (dense + expert)
    if training.offload_optimizer:  # with gradients, where Adam computes
        return 0, state + 4 * (dense + expert)
    return state, 0


def expert_data(config: Config) -> int:
    """Replicas of the experts."""
    parallel = config.parallel
    return max(1, parallel.ranks // (parallel.expert * parallel.expert_tensor * parallel.pipeline))


def _scratch(config: Config, device: Device, layers: Layers, own: Parameters) -> int:
    """Of the reduction of gradients, which gloo does in a copy of them, and of torch's Adam: on a GPU that takes the
    roots of all second moments at once. Transformer Engine's, which Megatron prefers, needs none."""
    if layers.fused:
        return 0
    replicas = config.parallel.data * config.parallel.context if config.parallel.distributed_optimizer else 1
    shard = -(-own.trained // replicas)
    if device.is_gpu:
        return 0 if config.training.optimizer == "sgd" or config.training.offload_optimizer else 4 * shard
    copy = GRADIENT_BYTES * own.trained if config.parallel.distributed_optimizer else 0
    return max(copy, 4 * ADAM_SCRATCH * min(own.largest, shard))


def _staging(config: Config, weights: int) -> int:
    """Two buckets, of no more than what a rank may have to send; files are written from the weights as they are."""
    if transport_of(config) in ("shm", "disk"):
        return 0
    return min(BUCKETS_IN_FLIGHT * config.sync.bucket_bytes, weights)


def _routes(config: Config, arch: Architecture, layers: Layers, work: Workload, stage: int) -> int:
    """Recorded experts of all samples of a step, on the device at once, for the stage's layers."""
    if config.routing.mode == "off" or not arch.is_moe:
        return 0
    parallel = config.parallel
    ids = 1 if config.routing.mode == "rollout" and arch.num_experts <= 256 else 2
    tokens = -(-work.samples // parallel.data) * work.longest / parallel.context / layers.sequence_shares
    moe = sum(arch.moe_layers[layer] for chunk in _layers_of(config, arch, stage) for layer in chunk)
    return round(tokens * (moe * arch.num_experts_per_tok * ids + 1))


def _recorded(config: Config, work: Workload, is_last_stage: bool) -> int:
    """Float32 numbers of all sampled tokens of a step (`trainer._rollout_tokens`): advantage, the engine's log-prob and
    its K + 1 most probable ones; on the last stage the old policy's of an anchor, and a reference's log-prob."""
    top_k = num_recorded_topk(config)
    sampled = 1 + (top_k + 1 if top_k else 0)
    numbers = 1 + sampled
    if is_last_stage:
        numbers += (sampled if objective_of(config).anchor == "recomputed" else 0) + bool(config.loss.kl.coefficient)
    samples = -(-work.samples // config.parallel.data)
    return 4 * numbers * samples * config.rollout.max_response_tokens // config.parallel.context


def _layers_of(config: Config, arch: Architecture, stage: int) -> list[range]:
    layout = config.parallel.layout
    return [chunk_layers(arch.num_layers, layout, stage, chunk) for chunk in range(layout.virtual)]


def _activations(config: Config, arch: Architecture, layers: Layers, work: Workload, stage: int) -> tuple[int, int]:
    """Bytes kept of all micro-batches in flight, and of the one layer that is computed again."""
    layout, recompute = config.parallel.layout, config.training.recompute
    tokens = _tokens(config, work)
    full = {kind: kept_bytes(arch, layout, layers, kind, work.longest) for kind in set(arch.moe_layers)}
    border = layer_input_bytes(arch, layers)
    if recompute == "full":
        each = dict.fromkeys(full, border)
    elif recompute == "selective":
        core = attention_core_bytes(arch, layout, layers, work.longest)
        each = {kind: kept - core for kind, kept in full.items()}
    else:
        each = full
    in_flight = chunks_in_flight(layout, stage, work.most_micro_batches)
    kept = 0.0
    for chunk, (own, count) in enumerate(zip(_layers_of(config, arch, stage), in_flight, strict=True)):
        number = chunk * layout.pipeline + stage
        one = sum(each[arch.moe_layers[layer]] for layer in own)
        # Between stages both ends keep what was handed over.
        one += border * ((number > 0) + (number < layout.pipeline * layout.virtual - 1))
        kept += count * one
    if stage == layout.pipeline - 1:
        kept += final_norm_bytes(arch, layers) + layers.itemsize * arch.hidden_size  # and its counted rows
    again = max(full.values()) if recompute == "full" else 0.0
    if recompute == "selective":
        again = attention_core_bytes(arch, layout, layers, work.longest)
    return round(kept * tokens), round(again * tokens)


def _logits(config: Config, arch: Architecture, device: Device, layers: Layers, work: Workload) -> int:
    """What the policy head has at once: logits, their gradient in the dtype of the products, float32 copies on a CPU.

    Every token counts: the most that can.
    """
    head = HeadMemory(config.head.path, config.head.memory_bytes)
    tokens, hidden = _tokens(config, work), arch.hidden_size
    rows = padded_vocab_size(arch.vocab_size, config.parallel.tensor) // config.parallel.tensor
    chunk = tokens if head.stores(tokens, rows) else min(head.chunk_tokens(rows), tokens)
    logits = 4 * chunk * rows
    if device.is_gpu and layers.itemsize == 2:
        logits += 2 * chunk * rows
    copies = 4 * hidden * (rows + tokens) if not device.is_gpu and layers.itemsize == 2 else 0
    d_hidden = layers.itemsize * tokens * hidden
    dummy = layers.itemsize * rows * hidden  # what backward hands to Megatron in place of the weight's gradient
    return logits + copies + d_hidden + dummy
