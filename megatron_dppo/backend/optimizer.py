"""Megatron's distributed data parallelism, Adam and learning-rate schedule around a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, ParamGroupOverride, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn


@dataclass(frozen=True)
class OptimizerSettings:
    """Adam with decoupled weight decay (or plain SGD), and its schedule counted in `Optimizer.advance` calls."""

    lr: float
    kind: str = "adam"  # adam | sgd
    min_lr_ratio: float = 1.0
    warmup_steps: int = 0
    decay_steps: int = 1
    schedule: str = "constant"  # constant | linear | cosine
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad: float = 1.0
    offload: bool = False  # Adam on the CPU, of weights on a GPU


NO_DECAY = "megatron_dppo_no_decay"  # an attribute of parameters
MAX_NAMES = 8  # in the message of NonFinite


class NonFinite(RuntimeError):
    """A loss or a gradient is inf or NaN; the message names them."""


class Optimizer:
    """Megatron's optimizer of one rank: `zero`, then a loss pass, then `step`.

    `megatron`: its optimizer, `schedule`: its learning-rate schedule; what a checkpoint has of both is
    `optimizer_state`'s.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        settings: OptimizerSettings,
        *,
        dtype: torch.dtype,
        distributed: bool,
        overlap_grad_reduce: bool = False,
        without_decay: Sequence[Tensor] = (),
    ) -> None:
        """Wraps the model's chunks (see `self.chunks`); `distributed` shards the optimizer's state over replicas;
        `overlap_grad_reduce` sums gradients over replicas while backward still runs; `without_decay`: parameters whose
        weights do not decay, beside vectors (norms, biases)."""
        settings_of_ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=distributed,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=overlap_grad_reduce,
        )
        self.chunks = tuple(
            # Buckets are for overlapping, and only the first chunk's backward comes last.
            DistributedDataParallel(chunk.config, settings_of_ddp, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(chunks)
        )
        no_syncs = [chunk.no_sync for chunk in self.chunks]  # the schedule: reduce in the last micro-batch only
        self.chunks[0].config.no_sync_func = no_syncs if len(no_syncs) > 1 else no_syncs[0]
        for parameter in without_decay:
            setattr(parameter, NO_DECAY, True)
        self.megatron = get_megatron_optimizer(
            OptimizerConfig(
                optimizer=settings.kind,
                sgd_momentum=0.0,
                lr=settings.lr,
                min_lr=settings.lr * settings.min_lr_ratio,
                weight_decay=settings.weight_decay,
                adam_beta1=settings.beta1,
                adam_beta2=settings.beta2,
                adam_eps=settings.eps,
                clip_grad=settings.clip_grad,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=distributed,
                optimizer_cpu_offload=settings.offload,  # by Megatron's HybridDeviceOptimizer
                use_precision_aware_optimizer=settings.offload,
                optimizer_offload_fraction=1.0 if settings.offload else 0.0,
                overlap_cpu_optimizer_d2h_h2d=settings.offload,
            ),
            list(self.chunks),
            config_overrides={
                ParamKey(predicate=ParamPredicate("vector or chosen", _has_no_decay)): ParamGroupOverride(wd_mult=0.0)
            },
        )
        self.schedule = _schedule(self.megatron, settings)

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self.megatron.param_groups[0]["lr"])

    def advance(self) -> None:
        """Moves the learning rate on by one unit of the schedule."""
        self.schedule.step(increment=1)

    def zero(self) -> None:
        """Clears gradients and the flags of their reduction."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    def step(self, watch: Mapping[str, Tensor]) -> float:
        """Clips and applies the gradients; returns their norm before clipping.

        `watch`: named scalars of this rank (its losses) that must be finite too. Raises NonFinite, before any weight
        moved (but for a router's bias), naming what is inf or NaN and on which rank.

        Collectives: one all-reduce of one f32 over the job, after which the host waits; Megatron's of one f32 for the
        norm, two where experts have groups of their own; with the distributed optimizer an all-gather of each bucket's
        parameters, in their dtype, over the replicas that share them. Before NonFinite one object all-gather of names
        over the job.
        """
        self._refuse_non_finite(watch)
        _, norm, _ = self.megatron.step()
        return float(norm)

    def _refuse_non_finite(self, watch: Mapping[str, Tensor]) -> None:
        buffers = [b for chunk in self.chunks for b in chunk.buffers + chunk.expert_parallel_buffers]
        sums = [buffer.grad_data.sum().double() for buffer in buffers]  # one pass; it may overflow, see below
        total = torch.stack([*sums, *(value.double() for value in watch.values())]).sum()
        finite = torch.isfinite(total).to(torch.float32)
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        if bool(finite):
            return
        gradients = {
            f"the gradient of {name}{f' of chunk {v}' if v else ''}": p.main_grad
            for v, chunk in enumerate(self.chunks)
            for name, p in chunk.module.named_parameters()
        }
        mine = [name for name, value in {**watch, **gradients}.items() if not bool(torch.isfinite(value).all())]
        # Every rank says the same, so that it does not matter which of them is heard first.
        of_ranks: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(of_ranks, mine)
        names = [f"{name} (rank {rank})" for rank, found in enumerate(of_ranks) for name in found]
        if not names:
            names = ["the gradients' sum (they are finite, and too large for float32)"]
        rest = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        raise NonFinite(f"got inf or NaN in {', '.join(names[:MAX_NAMES])}{rest}")


def _has_no_decay(parameter: Tensor) -> bool:
    return parameter.dim() == 1 or getattr(parameter, NO_DECAY, False)


def adam_package() -> str:
    """Where Megatron found its Adam: `transformer_engine`, `apex` or, without either, `torch`."""
    return megatron_optimizer.Adam.__module__.partition(".")[0]


def _schedule(optimizer: Any, settings: OptimizerSettings) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.lr * settings.min_lr_ratio,
        lr_warmup_steps=settings.warmup_steps,
        # Megatron wants decay to end after warm-up, whatever the style.
        lr_decay_steps=max(settings.decay_steps, settings.warmup_steps + 1),
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
