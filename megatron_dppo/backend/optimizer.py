"""Megatron's distributed data parallelism, Adam and learning-rate schedule around a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, ParamGroupOverride, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
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
    """Megatron's optimizer of one rank: `zero`, then a loss pass, then `step`."""

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
        self._optimizer = get_megatron_optimizer(
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
        moved (but for a router's bias), naming what is inf or NaN and on which rank. Collectives: one scalar
        all-reduce, and Megatron's (the norm; the gather of parameters with the distributed optimizer).
        """
        self._refuse_non_finite(watch)
        _, norm, _ = self._optimizer.step()
        return float(norm)

    @property
    def steps(self) -> int:
        """Gradient steps so far."""
        return int(max(counts)) if (counts := [float(count) for count, _ in self._counters()]) else 0

    def sharded_state(self, weights: dict[str, Any], metadata: dict[str, Any], *, loading: bool) -> dict[str, Any]:
        """What Megatron's `dist_checkpointing` is to save, or to load, with the model's sharded state: tensors only.

        The rest of Megatron's state follows from the settings and the number of steps; it is built differently at
        different layouts.
        """
        steps = self.steps
        if adam_package() == "torch":
            self._prepare_torch()
        self._template = self._optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata)
        if not loading and not self._has_weights(self._template):
            with contextlib.ExitStack() as stack:
                for part in self._distributed_parts():
                    stack.enter_context(_places_without_padding(part))
                self._template = self._optimizer.sharded_state_dict(weights, is_loading=False, metadata=metadata)
            if not self._has_weights(self._template):
                raise RuntimeError("checkpoint: Megatron's optimizer state does not have the model's weights")
        return {"optimizer": _sharded_only(self._template), "steps": steps, "advanced": self._schedule.num_steps}

    def load_state(self, loaded: Mapping[str, Any]) -> None:
        """What `sharded_state` was loaded with. The schedule's numbers stay this job's, its place is the loaded one."""
        self._optimizer.load_state_dict(_filled(self._template, loaded["optimizer"]))
        for _, count in self._counters():
            count(loaded["steps"])
        self._schedule.num_steps = 0
        self._schedule.step(increment=loaded["advanced"])

    def _parts(self) -> list[Any]:
        """Megatron has one optimizer for dense parameters and one for experts, where these have groups of their own."""
        return list(getattr(self._optimizer, "chained_optimizers", [self._optimizer]))

    def _distributed_parts(self) -> list[DistributedOptimizer]:
        return [part for part in self._parts() if isinstance(part, DistributedOptimizer)]

    def _has_weights(self, state: Any) -> bool:
        """Whether what is to be saved as the main weights are the model's, on all ranks. One scalar all-reduce."""
        states = [state] if len(self._parts()) == 1 else [state[number] for number in sorted(state)]
        same = True
        for part, found in zip(self._parts(), states, strict=True):
            if not isinstance(part, DistributedOptimizer) or found["param_state"] is None:
                continue  # Megatron gives it to one replica only
            parameters = (p for buffer in part.buffers for p in buffer.param_index_map)
            for parameter, tensors in zip(parameters, found["param_state"].values(), strict=True):
                saved = tensors["fp32_param" if "fp32_param" in tensors else "param"].data
                same &= bool(
                    (saved.to(parameter.dtype).view(parameter.shape) == parameter.detach().to(saved.device)).all()
                )
        flag = torch.tensor(float(same), device=next(self.chunks[0].parameters()).device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
        return bool(flag)

    def _prepare_torch(self) -> None:
        """torch's Adam has no state before its first step, where Megatron reads the step, and another form of it."""
        for part in self._parts():
            if isinstance(part, DistributedOptimizer):
                part._set_main_param_and_optimizer_states = partial(_set_all_but_step, part)
            for parameter in (p for group in part.optimizer.param_groups for p in group["params"]):
                if not (state := part.optimizer.state[parameter]):
                    state["step"] = torch.ones(())  # Megatron would leave out a 0, and torch miss it
                    state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            if isinstance(part, DistributedOptimizer) and not part.optimizer.state:
                part.optimizer.state["no parameter"] = {"step": torch.ones(())}  # as on a stage without experts

    def _counters(self) -> Iterator[tuple[Any, Callable[[int], None]]]:
        """Wherever Adam counts steps: the count, and how to set it. torch counts for each parameter, others a group."""
        for part in self._parts():
            holders = part.optimizer.state.values() if adam_package() == "torch" else part.optimizer.param_groups
            for holder in holders:
                yield holder.get("step", 0), partial(_set_step, holder)

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


@contextlib.contextmanager
def _places_without_padding(part: DistributedOptimizer) -> Iterator[None]:
    """Megatron 0.16 joins the buckets of a buffer without the padding between them, and then looks up parameters by
    places that count it: each is read from the bucket after its own."""
    before = [buffer.param_index_map for buffer in part.buffers]
    for buffer in part.buffers:
        shift, seen = {}, 0
        for bucket in buffer.buckets:
            shift[bucket.bucket_id] = bucket.offset - seen
            seen += bucket.numel_unpadded
        buffer.param_index_map = {
            p: (start - shift[bucket], stop - shift[bucket], bucket)
            for p, (start, stop, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, places in zip(part.buffers, before, strict=True):
            buffer.param_index_map = places


def _has_no_decay(parameter: Tensor) -> bool:
    return parameter.dim() == 1 or getattr(parameter, NO_DECAY, False)


def _set_step(holder: dict[str, Any], steps: int) -> None:
    """A tensor of its own for each parameter: Adam counts up in place."""
    holder["step"] = torch.tensor(float(steps)) if adam_package() == "torch" else steps


def _sharded_only(state: Any) -> Any:
    """The tensors of a nested state; lists as dicts of their positions."""
    items = state.items() if isinstance(state, dict) else enumerate(state)
    found = {}
    for key, value in items:
        if isinstance(value, ShardedBase):
            found[key] = value
        elif isinstance(value, dict | list) and (inner := _sharded_only(value)):
            found[key] = inner
    return found


def _filled(state: Any, loaded: Any) -> Any:
    """A nested state with its tensors replaced by those of `_sharded_only` that were loaded."""

    def leaf(key: Any, value: Any) -> Any:
        if isinstance(value, ShardedBase):
            return loaded[key]
        if isinstance(value, dict | list):
            inner = loaded is not None and (isinstance(loaded, list) or key in loaded)
            return _filled(value, loaded[key] if inner else {})
        return value.unwrap() if isinstance(value, LocalNonpersistentObject) else value

    if isinstance(state, dict):
        return {key: leaf(key, value) for key, value in state.items()}
    return [leaf(key, value) for key, value in enumerate(state)]


def _set_all_but_step(part: DistributedOptimizer, parameter: Tensor, tensors: dict[str, Tensor]) -> None:
    """Megatron loads the step of torch's Adam with its parameter groups, and then misses it here."""
    group, place = part.model_param_group_index_map[parameter]
    step = part.optimizer.state[part.optimizer.param_groups[group]["params"][place]]["step"]
    DistributedOptimizer._set_main_param_and_optimizer_states(part, parameter, {**tensors, "step": step})


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
