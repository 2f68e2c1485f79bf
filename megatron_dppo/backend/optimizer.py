"""Megatron's distributed data parallelism, Adam and learning-rate schedule around a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn


@dataclass(frozen=True)
class AdamSettings:
    """Adam with decoupled weight decay, and its schedule counted in `Optimizer.advance` calls."""

    lr: float
    min_lr_ratio: float = 1.0
    warmup_steps: int = 0
    decay_steps: int = 1
    schedule: str = "constant"  # constant | linear | cosine
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad: float = 1.0


MAX_NAMES = 8  # in the message of NonFinite


class NonFinite(RuntimeError):
    """A loss or a gradient is inf or NaN; the message names them."""


class Optimizer:
    """Megatron's optimizer of one rank: `zero`, then a loss pass, then `step`."""

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        settings: AdamSettings,
        *,
        dtype: torch.dtype,
        distributed: bool,
        overlap_grad_reduce: bool = False,
    ) -> None:
        """Wraps the model's chunks (see `self.chunks`); `distributed` shards the optimizer's state over replicas;
        `overlap_grad_reduce` sums gradients over replicas while backward still runs."""
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
        self._optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
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
            ),
            list(self.chunks),
        )
        self._schedule = _schedule(self._optimizer, settings)

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def advance(self) -> None:
        """Moves the learning rate on by one unit of the schedule."""
        self._schedule.step(increment=1)

    def zero(self) -> None:
        """Clears gradients and the flags of their reduction."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()

    def step(self, watch: Mapping[str, Tensor]) -> float:
        """Clips and applies the gradients; returns their norm before clipping.

        `watch`: named scalars of this rank (its losses) that must be finite too. Raises NonFinite, before any weight
        moved, naming what is inf or NaN and on which rank. Collectives: one scalar all-reduce, and Megatron's (the
        norm; the gather of parameters with the distributed optimizer).
        """
        self._refuse_non_finite(watch)
        _, norm, _ = self._optimizer.step()
        return float(norm)

    def _refuse_non_finite(self, watch: Mapping[str, Tensor]) -> None:
        buffers = [b for chunk in self.chunks for b in chunk.buffers + chunk.expert_parallel_buffers]
        sums = [buffer.grad_data.sum(dtype=torch.float64) for buffer in buffers]
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
        rest = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        raise NonFinite(f"got inf or NaN in {', '.join(names[:MAX_NAMES])}{rest}")


def adam_package() -> str:
    """Where Megatron found its Adam: `transformer_engine`, `apex` or, without either, `torch`."""
    return megatron_optimizer.Adam.__module__.partition(".")[0]


def _schedule(optimizer: Any, settings: AdamSettings) -> OptimizerParamScheduler:
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
