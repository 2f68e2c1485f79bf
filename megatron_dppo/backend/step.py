"""One gradient step, or one pass without gradient, over micro-batches: Megatron's schedule around the policy head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn

from megatron_dppo.algorithm.objectives import TokenStats
from megatron_dppo.backend.model import Model, head_weight
from megatron_dppo.data.packing import MicroBatch
from megatron_dppo.head.policy_head import policy_loss, token_stats

Sums = dict[str, Tensor]  # scalars that add up over micro-batches and replicas
# (index of the micro-batch, statistics of its tokens) -> (c_logprob, c_entropy or None, sums for the metrics)
MicroCoefficientFn = Callable[[int, TokenStats], tuple[Tensor, Tensor | None, Sums]]


def loss_pass(model: Model, micro_batches: Sequence[MicroBatch], coefficient_fn: MicroCoefficientFn) -> list[Sums]:
    """Forward and backward over the micro-batches; gradients end up summed over replicas and divided.

    The loss of a micro-batch is -sum_t weight_t (c_logprob_t log pi(y_t) + c_entropy_t H_t); the sum over all
    micro-batches of all replicas is divided by the sum of their counts (`finalize_model_grads`). Returns one dict
    of sums a micro-batch on the ranks of the last stage, nothing elsewhere. Collectives: Megatron's.
    """

    def lose(index: int, batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, Sums]:
        weight = head_weight(model.chunk)
        importance = torch.from_numpy(batch.weight).to(model.device)
        sums: Sums = {}

        def coefficients(stats: TokenStats, _: slice) -> tuple[Tensor, Tensor | None]:
            c_logprob, c_entropy, metrics = coefficient_fn(index, stats)
            sums.update(metrics)
            return -importance * c_logprob, None if c_entropy is None else -importance * c_entropy

        target, topk_ids = _ids(batch, model.device)
        loss, _ = policy_loss(
            _counted_rows(hidden, batch, model), weight, target, topk_ids, coefficients,
            shard=model.shard(weight), temperature=model.temperature,
        )  # fmt: skip
        count = torch.tensor(batch.count, dtype=torch.int, device=model.device)
        return loss, count, sums | {"loss": loss.detach(), "count": count.detach().clone()}

    return _run(model, micro_batches, lose, forward_only=False)


def stats_pass(model: Model, micro_batches: Sequence[MicroBatch]) -> list[TokenStats]:
    """Statistics of every counted token under the current weights, without gradient: one a micro-batch on the
    ranks of the last stage, nothing elsewhere. Collectives: Megatron's and the head's."""

    def measure(_: int, batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, TokenStats]:
        weight = head_weight(model.chunk)
        target, topk_ids = _ids(batch, model.device)
        stats = token_stats(
            _counted_rows(hidden, batch, model), weight, target, topk_ids,
            shard=model.shard(weight), temperature=model.temperature,
        )  # fmt: skip
        zero = torch.zeros((), device=model.device)
        return zero, zero.int(), stats

    with torch.no_grad():  # Megatron's forward_only alone would keep every activation
        return _run(model, micro_batches, measure, forward_only=True)


def _run(model: Model, micro_batches: Sequence[MicroBatch], last_stage: Callable, *, forward_only: bool) -> list:
    """Megatron's schedule (none, or 1F1B over pipeline stages) with `last_stage` as its loss function."""

    def forward_step(batches: Any, chunk: nn.Module) -> tuple[Tensor, Callable]:
        index, batch = next(batches)
        input_ids = torch.from_numpy(batch.input_ids).to(model.device)
        positions = torch.arange(input_ids.shape[1], device=model.device).expand_as(input_ids)
        output = chunk(input_ids, positions, attention_mask=None)
        return output, lambda hidden: last_stage(index, batch, hidden)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(enumerate(micro_batches)),
        model=[model.chunk],
        num_microbatches=len(micro_batches),
        seq_length=max(batch.input_ids.shape[1] for batch in micro_batches),
        micro_batch_size=max(batch.input_ids.shape[0] for batch in micro_batches),
        forward_only=forward_only,
    )


def _counted_rows(hidden_BSH: Tensor, batch: MicroBatch, model: Model) -> Tensor:
    """Hidden states [T, H] of the counted tokens, on every TP rank.

    Backward sums the ranks' gradients: a reduce-scatter under sequence parallelism, an all-reduce without.
    """
    hidden_SBH = hidden_BSH.transpose(0, 1)
    if model.config.sequence_parallel:
        hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH.contiguous(), tensor_parallel_output_grad=True)
    else:
        hidden_SBH = copy_to_tensor_model_parallel_region(hidden_SBH)
    rows = torch.from_numpy(batch.row).to(model.device)
    return hidden_SBH.flatten(0, 1).index_select(0, rows)


def _ids(batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor | None]:
    topk = None if batch.topk_ids is None else torch.from_numpy(batch.topk_ids).to(device)
    return torch.from_numpy(batch.target).to(device), topk
