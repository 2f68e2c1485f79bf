"""One gradient step, or one pass without gradient, over micro-batches: Megatron's schedule around the policy head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_dppo.algorithm.objectives import TokenStats
from megatron_dppo.backend.layers import PackedSequences
from megatron_dppo.backend.model import Model, unwrapped
from megatron_dppo.backend.replay import Routes
from megatron_dppo.data.packing import MicroBatch
from megatron_dppo.head.policy_head import policy_loss, token_stats
from megatron_dppo.head.rows import counted_rows, to_device

Sums = dict[str, Tensor]  # scalars that add up over micro-batches and replicas
LOSS_SUMS = ("loss", "count", "skipped")  # those of `loss_pass` itself
# (index of the micro-batch, statistics of a range of its tokens, the range)
# -> (c_logprob, c_entropy or None, sums over the range for the metrics)
MicroCoefficientFn = Callable[[int, TokenStats, slice], tuple[Tensor, Tensor | None, Sums]]


def loss_pass(
    model: Model,
    micro_batches: Sequence[MicroBatch],
    coefficient_fn: MicroCoefficientFn,
    *,
    entropy_gradient: bool = False,
    routes: Sequence[Routes | None] | None = None,
) -> list[Sums]:
    """Forward and backward over the micro-batches; gradients end up summed over replicas and divided.

    The loss of a micro-batch is -sum_t weight_t (c_logprob_t log pi(y_t) + c_entropy_t H_t); the sum over all
    micro-batches of all replicas is divided by the sum of their counts (`finalize_model_grads`). `coefficient_fn` may
    return c_entropy only with `entropy_gradient`, and sees a micro-batch in one range or several. Returns one dict
    of sums a micro-batch on the ranks of the last stage, nothing elsewhere. `routes`: of each micro-batch, what the
    routers of this rank replay.

    Collectives, each micro-batch: over every boundary between pipeline chunks one message of hidden states
    [S / (CP TP), B, H] (TP: under sequence parallelism) and one of their gradient back, each behind its shape; those
    of Megatron's layers, forward and backward; on the last stage those of `counted_rows` and `policy_loss`. Once, in
    `finalize_model_grads`: the sum of each gradient bucket, fp32, over the replicas that share it (reduce-scatter with
    the distributed optimizer, else all-reduce); over TP under sequence parallelism an all-reduce of the gradients of
    norms and routers; between first and last stage one of a tied embedding's [V / TP, H]; of the experts' loads
    (f32[layers, E]) where their bias moves; a broadcast over PP and an all-reduce over replicas of the count (i32).
    """

    def lose(index: int, batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, Sums]:
        weight = model.head_weight
        importance = to_device(batch.weight, model.device)
        sums: Sums = {}

        def coefficients(stats: TokenStats, tokens: slice) -> tuple[Tensor, Tensor | None]:
            c_logprob, c_entropy, metrics = coefficient_fn(index, stats, tokens)
            for name, value in metrics.items():
                sums[name] = sums[name] + value if name in sums else value
            share = -importance[tokens]
            return share * c_logprob, None if c_entropy is None else share * c_entropy

        target, topk_ids = _ids(batch, model)
        loss, _ = policy_loss(
            _counted_rows(hidden, batch, model), weight, target, topk_ids, coefficients,
            shard=model.shard(weight), temperature=model.temperature,
            entropy_gradient=entropy_gradient, memory=model.head_memory,
        )  # fmt: skip
        count = torch.full((), batch.count, dtype=torch.int, device=model.device)
        skipped = torch.full((), batch.skipped, device=model.device)
        return loss, count, sums | {"loss": loss.detach(), "count": count.detach().clone(), "skipped": skipped}

    return _run(model, micro_batches, lose, routes, forward_only=False)


def stats_pass(
    model: Model, micro_batches: Sequence[MicroBatch], routes: Sequence[Routes | None] | None = None
) -> list[TokenStats]:
    """Statistics of every counted token under the current weights, without gradient: one a micro-batch on the
    ranks of the last stage, nothing elsewhere. `routes` as in `loss_pass`, or places for what routers take themselves.

    Collectives, each micro-batch: as `loss_pass` forward, with `token_stats` for `policy_loss`; none at the end.
    """

    def measure(_: int, batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, TokenStats]:
        weight = model.head_weight
        target, topk_ids = _ids(batch, model)
        stats = token_stats(
            _counted_rows(hidden, batch, model), weight, target, topk_ids,
            shard=model.shard(weight), temperature=model.temperature, memory=model.head_memory,
        )  # fmt: skip
        zero = torch.zeros((), device=model.device)
        return zero, zero.int(), stats

    with torch.no_grad():  # Megatron's forward_only alone would keep every activation
        return _run(model, micro_batches, measure, routes, forward_only=True)


def _run(
    model: Model,
    micro_batches: Sequence[MicroBatch],
    last_stage: Callable,
    routes: Sequence[Routes | None] | None,
    *,
    forward_only: bool,
) -> list:
    """Megatron's schedule (none, 1F1B or interleaved 1F1B over pipeline stages), `last_stage` as its loss function."""

    def forward_step(batches: Any, chunk: nn.Module) -> tuple[Tensor, Callable]:
        index, batch = next(batches)
        input_ids = to_device(batch.input_ids, model.device)
        positions = torch.arange(input_ids.shape[1], device=model.device).expand_as(input_ids)  # rope has its own
        replayed = None if routes is None else routes[index]
        assert replayed is None or batch.cu_seqlens is not None, "routes are replayed for packed sequences"
        packed = None if batch.cu_seqlens is None else PackedSequences.of(batch.cu_seqlens, model.device, replayed)
        padding = _padding(batch, model, chunk) if counts_experts else None
        output = chunk(input_ids, positions, attention_mask=None, packed_seq_params=packed, padding_mask=padding)
        return output, lambda hidden: last_stage(index, batch, hidden)

    counts_experts = not forward_only and model.arch.sigmoid_router and model.config.moe_router_bias_update_rate > 0
    iterators = [iter(enumerate(micro_batches)) for _ in model.chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(model.chunks),
        num_microbatches=len(micro_batches),
        seq_length=max(batch.input_ids.shape[1] for batch in micro_batches),
        micro_batch_size=max(batch.input_ids.shape[0] for batch in micro_batches),
        forward_only=forward_only,
    )


def _padding(batch: MicroBatch, model: Model, chunk: nn.Module) -> Tensor:
    """bool[B, S], True on padding, as Megatron wants it: its first chunk divides it for sequence parallelism itself."""
    padding = to_device(batch.padding, model.device)
    if unwrapped(chunk).pre_process or not model.config.sequence_parallel:
        return padding
    return padding.chunk(model.rank.parallel.tensor, dim=1)[model.rank.at.tensor]


def _counted_rows(hidden_BSH: Tensor, batch: MicroBatch, model: Model) -> Tensor:
    """Hidden states [T, H] of the counted tokens, on every TP rank; `batch.row` counts in Megatron's [S, B] order."""
    hidden_NH = hidden_BSH.transpose(0, 1).flatten(0, 1)
    return counted_rows(hidden_NH, batch.row, model.rank.tensor_group, sequence_parallel=model.config.sequence_parallel)


def _ids(batch: MicroBatch, model: Model) -> tuple[Tensor, Tensor | None]:
    """Targets and Top-K ids on the device."""
    topk = None if batch.topk_ids is None else to_device(batch.topk_ids, model.device)
    return to_device(batch.target, model.device), topk
