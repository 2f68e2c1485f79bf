"""An optimizer's state in a checkpoint: only its tensors, and how far it has come, readable at any other layout.

The rest of what Megatron would write follows from the settings and the number of steps, and is built differently at
different layouts. Most of this file mends what Megatron's state lacks: see the reason at each function.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_dppo.backend.optimizer import Optimizer, adam_package


@dataclass(frozen=True)
class OptimizerState:
    """What there is of one rank's optimizer for Megatron's `dist_checkpointing` to save, or to fill for `load`."""

    optimizer: Optimizer
    steps: int  # gradient steps so far
    template: Any  # Megatron's own state, whole

    @property
    def tensors(self) -> dict[str, Any]:
        """To be saved, or to be loaded, with the model's sharded state."""
        advanced = self.optimizer.schedule.num_steps
        return {"optimizer": _sharded_only(self.template), "steps": self.steps, "advanced": advanced}

    def load(self, loaded: Mapping[str, Any]) -> None:
        """What `tensors` were loaded with. The schedule's numbers stay this job's, its place is the loaded one.
        Collectives: none."""
        self.optimizer.megatron.load_state_dict(_filled(self.template, loaded["optimizer"]))
        for _, count in _counters(self.optimizer):
            count(loaded["steps"])
        schedule = self.optimizer.schedule
        schedule.num_steps = 0
        schedule.step(increment=loaded["advanced"])


def state_to_save(optimizer: Optimizer, weights: dict[str, Any], metadata: dict[str, Any]) -> OptimizerState:
    """The state as it is; `weights`: the model's sharded state. Raises RuntimeError where Megatron has other main
    weights than the model's.

    Collectives: with the distributed optimizer, Megatron's gathers over gloo, of each bucket's main weights and two
    moments (12 bytes a parameter in all) on the first of the replicas that share them; one all-reduce of one f32 over
    the job. Both once more where Megatron took wrong weights at first (`_places_without_padding`).
    """
    steps = _steps(optimizer)  # before a state is prepared that counts one
    template = _megatron_state(optimizer, weights, metadata, loading=False)
    if not _has_weights(optimizer, template):
        with contextlib.ExitStack() as stack:
            for part in _parts(optimizer):
                if isinstance(part, DistributedOptimizer):
                    stack.enter_context(_places_without_padding(part))
            template = optimizer.megatron.sharded_state_dict(weights, is_loading=False, metadata=metadata)
        if not _has_weights(optimizer, template):
            raise RuntimeError("checkpoint: Megatron's optimizer state does not have the model's weights")
    return OptimizerState(optimizer, steps, template)


def state_to_load(optimizer: Optimizer, weights: dict[str, Any], metadata: dict[str, Any]) -> OptimizerState:
    """A state to be filled; `weights`: the model's sharded state. Collectives: none."""
    steps = _steps(optimizer)
    return OptimizerState(optimizer, steps, _megatron_state(optimizer, weights, metadata, loading=True))


def _megatron_state(optimizer: Optimizer, weights: dict[str, Any], metadata: dict[str, Any], *, loading: bool) -> Any:
    if adam_package() == "torch":
        _prepare_torch(optimizer)
    return optimizer.megatron.sharded_state_dict(weights, is_loading=loading, metadata=metadata)


def _steps(optimizer: Optimizer) -> int:
    """Gradient steps so far."""
    return int(max(counts)) if (counts := [float(count) for count, _ in _counters(optimizer)]) else 0


def _parts(optimizer: Optimizer) -> list[Any]:
    """Megatron has one optimizer for dense parameters and one for experts, where these have groups of their own."""
    return list(getattr(optimizer.megatron, "chained_optimizers", [optimizer.megatron]))


def _has_weights(optimizer: Optimizer, state: Any) -> bool:
    """Whether what is to be saved as the main weights are the model's, on all ranks. One all-reduce of one f32."""
    states = [state] if len(_parts(optimizer)) == 1 else [state[number] for number in sorted(state)]
    same = True
    for part, found in zip(_parts(optimizer), states, strict=True):
        if not isinstance(part, DistributedOptimizer) or found["param_state"] is None:
            continue  # Megatron gives it to one replica only
        parameters = (p for buffer in part.buffers for p in buffer.param_index_map)
        for parameter, tensors in zip(parameters, found["param_state"].values(), strict=True):
            saved = tensors["fp32_param" if "fp32_param" in tensors else "param"].data
            same &= bool((saved.to(parameter.dtype).view(parameter.shape) == parameter.detach().to(saved.device)).all())
    flag = torch.tensor(float(same), device=next(optimizer.chunks[0].parameters()).device)
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def _prepare_torch(optimizer: Optimizer) -> None:
    """torch's Adam has no state before its first step, where Megatron reads the step, and another form of it."""
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            part._set_main_param_and_optimizer_states = partial(_set_all_but_step, part)
        for parameter in (p for group in part.optimizer.param_groups for p in group["params"]):
            if not (state := part.optimizer.state[parameter]):
                state["step"] = torch.ones(())  # Megatron would leave out a 0, and torch miss it
                state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        if isinstance(part, DistributedOptimizer) and not part.optimizer.state:
            part.optimizer.state["no parameter"] = {"step": torch.ones(())}  # as on a stage without experts


def _counters(optimizer: Optimizer) -> Iterator[tuple[Any, Callable[[int], None]]]:
    """Wherever Adam counts steps: the count, and how to set it. torch counts for each parameter, others a group."""
    for part in _parts(optimizer):
        holders = part.optimizer.state.values() if adam_package() == "torch" else part.optimizer.param_groups
        for holder in holders:
            yield holder.get("step", 0), partial(_set_step, holder)


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
