"""What ranks run in `test_layouts`: steps of the real trainer, with everything that must not depend on the split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from megatron_dppo.backend.optimizer import Optimizer
from megatron_dppo.backend.parallel import Rank
from megatron_dppo.config import Config
from tests.distributed.jobs import boxes, trainer_of


@dataclass(frozen=True)
class Proof:
    """Of one rank: its boxes of each tensor, zeros elsewhere; metrics are the whole job's."""

    gradients: dict[str, np.ndarray]  # of the first gradient step
    weights: dict[str, np.ndarray]  # after the last step
    metrics: list[dict[str, float | str]]
    micro_batches: int  # of a gradient step on a replica
    margin: float  # the least distance between an expert that was kept and one that was not, in router probabilities


def proof(rank: Rank, path: Path, config: Config, order: Mapping[str, Any], steps: int, shared: Path) -> Proof:
    trainer = trainer_of(rank, path, config, shared)
    minibatches = trainer._load(order)
    gradients: list[dict[str, np.ndarray]] = []
    apply = trainer.optimizer.step

    def step(watch: Mapping[str, Tensor]) -> float:
        if not gradients:
            if config.parallel.distributed_optimizer:
                _gather_shards(trainer.optimizer)
            gradients.append(boxes(trainer.model, lambda parameter: parameter.main_grad))
        return apply(watch)

    with mock.patch.object(trainer.optimizer, "step", step), _margins(trainer.model.chunks) as margins:
        metrics = [trainer._train_step(number, minibatches) for number in range(steps)]
    weights = boxes(trainer.model, lambda parameter: parameter.detach())
    return Proof(gradients[0], weights, metrics, len(minibatches[0]), min(margins, default=1.0))


def _gather_shards(optimizer: Optimizer) -> None:
    """A distributed optimizer's rank has the sum over replicas of its own shard of a bucket only."""
    for buffer in (b for chunk in optimizer.chunks for b in chunk.buffers + chunk.expert_parallel_buffers):
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            shards = list(bucket.grad_data.chunk(group.size()))
            parts = [torch.empty_like(shards[0]) for _ in shards]
            dist.all_gather(parts, shards[group.rank()].clone(), group=group)
            bucket.grad_data.copy_(torch.cat(parts))


@contextmanager
def _margins(chunks: tuple[nn.Module, ...]) -> Iterator[list[float]]:
    """Collects how far apart kept and dropped experts were, of every token in every pass."""
    found: list[float] = []

    def look(router: TopKRouter, inputs: tuple[Any, ...], _: Any) -> None:
        logits = torch.nn.functional.linear(inputs[0].float(), router.weight.float())
        best = torch.softmax(logits, -1).topk(router.topk + 1).values
        found.append(float((best[..., -2] - best[..., -1]).min()))

    routers = [m for chunk in chunks for m in chunk.modules() if isinstance(m, TopKRouter)]
    handles = [router.register_forward_hook(look) for router in routers]
    yield found
    for handle in handles:
        handle.remove()
