"""From hidden states and a shard of the LM head to token statistics and the policy gradient.

The logits never leave this module. `token_stats` yields log-probs, entropy and the log-probs of the engine's
Top-K; `policy_loss` also yields the loss, whose gradient is made in forward: the coefficient of a token (paper
Eq. 23) is known as soon as its statistics are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dppo.algorithm.divergence import topk_members
from megatron_dppo.algorithm.objectives import TokenStats
from megatron_dppo.head.reference import shard_gradient_, shard_logits, shard_max, shard_sums

# (statistics of a range of tokens, that range) -> (coefficient of log-prob, coefficient of entropy or None)
CoefficientFn = Callable[[TokenStats, slice], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class VocabShard:
    """Which rows of the LM head this rank holds: `start .. start + rows`, of which those below `vocab_size` count."""

    start: int
    vocab_size: int
    group: dist.ProcessGroup | None = None  # tensor-parallel group; None: this rank holds all

    def columns(self, rows: int) -> int:
        """How many of the shard's `rows` are vocabulary and not padding."""
        return max(0, min(self.start + rows, self.vocab_size) - self.start)


def token_stats(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    topk_ids_TK: Tensor | None = None,
    *,
    shard: VocabShard,
    temperature: float = 1.0,
) -> TokenStats:
    """Log-prob, entropy and the K+1 log-probs of each token, without gradient.

    hidden_TH: [T, H], the rows of the counted tokens, the same on every rank of the group. weight_VH: [V/TP, H].
    targets_T: i64[T], the token that came next. topk_ids_TK: i64[T, K], -1 where absent. Results are fp32 and
    bit-identical on all ranks of the group. Columns 0..K-1 of `topk_logprob` are the ids', column K the target's.

    Collectives: one max all-reduce of T and one sum all-reduce of T x (3 + K) fp32 over `shard.group`.
    Raises ValueError for shapes that do not fit, ids outside the vocabulary and temperatures <= 0.
    """
    _check(hidden_TH, weight_VH, targets_T, topk_ids_TK, shard, temperature)
    with torch.no_grad():
        return _forward(hidden_TH, weight_VH, targets_T, topk_ids_TK, shard, temperature).stats


def policy_loss(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    topk_ids_TK: Tensor | None,
    coefficient_fn: CoefficientFn,
    *,
    shard: VocabShard,
    temperature: float = 1.0,
) -> tuple[Tensor, TokenStats]:
    """The scalar sum_t c_logprob_t log pi(y_t) + c_entropy_t H_t (fp32, unnormalised) and detached statistics.

    Arguments as in `token_stats`. Coefficients are constants of the gradient; the caller puts the sign in. The
    gradient with respect to `hidden_TH` is this rank's part: its sum over the group is the caller's (Megatron's
    copy-to or gather-from region does it). Keeps the logits' gradient, fp32 [T, V/TP], for backward.

    Collectives: as `token_stats`; none in backward.
    Raises as `token_stats`; a second derivative is refused.
    """
    _check(hidden_TH, weight_VH, targets_T, topk_ids_TK, shard, temperature)
    loss, *parts = _PolicyLoss.apply(hidden_TH, weight_VH, targets_T, topk_ids_TK, coefficient_fn, shard, temperature)
    return loss, TokenStats(*parts)


@dataclass(frozen=True)
class _Forward:
    stats: TokenStats
    z_TV: Tensor  # [T, columns of the shard that are vocabulary]
    log_normaliser_T: Tensor
    target_column_T: Tensor


def _forward(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    topk_ids_TK: Tensor | None,
    shard: VocabShard,
    temperature: float,
) -> _Forward:
    columns = shard.columns(weight_VH.shape[0])
    z_TV = shard_logits(hidden_TH, weight_VH[:columns], temperature)
    max_T = shard_max(z_TV)
    _all_reduce(max_T, dist.ReduceOp.MAX, shard.group)
    wanted_TN = targets_T[:, None] if topk_ids_TK is None else torch.cat([topk_ids_TK, targets_T[:, None]], dim=1)
    local_TN = wanted_TN - shard.start
    local_TN = local_TN.masked_fill((wanted_TN < 0) | (local_TN < 0) | (local_TN >= columns), -1)
    sums = shard_sums(z_TV, max_T, local_TN)
    _all_reduce(sums, dist.ReduceOp.SUM, shard.group)
    log_sum_T = sums[:, 0].log()
    logprob_TN = sums[:, 2:] - log_sum_T[:, None]
    member = topk_logprob = None
    if topk_ids_TK is not None:
        member = topk_members(topk_ids_TK, targets_T)
        topk_logprob = logprob_TN.masked_fill(wanted_TN < 0, -torch.inf)
    stats = TokenStats(
        logprob=logprob_TN[:, -1].contiguous(),
        entropy=log_sum_T - sums[:, 1] / sums[:, 0],
        topk_logprob=topk_logprob,
        member=member,
    )
    return _Forward(stats, z_TV, max_T + log_sum_T, local_TN[:, -1])


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        targets_T: Tensor,
        topk_ids_TK: Tensor | None,
        coefficient_fn: CoefficientFn,
        shard: VocabShard,
        temperature: float,
    ) -> tuple[Tensor | None, ...]:
        out = _forward(hidden_TH, weight_VH, targets_T, topk_ids_TK, shard, temperature)
        stats = out.stats
        c_logprob, c_entropy = coefficient_fn(stats, slice(0, targets_T.shape[0]))
        loss = (c_logprob * stats.logprob).sum()
        if c_entropy is not None:
            loss = loss + (c_entropy * stats.entropy).sum()
        d_logits = shard_gradient_(
            out.z_TV, out.log_normaliser_T, out.target_column_T, stats.entropy, c_logprob, c_entropy, temperature
        )
        ctx.save_for_backward(hidden_TH, weight_VH, d_logits.to(weight_VH.dtype))
        parts = (stats.logprob, stats.entropy, stats.topk_logprob, stats.member)
        ctx.mark_non_differentiable(*(part for part in parts if part is not None))
        return loss, *parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, d_logits = ctx.saved_tensors
        columns = d_logits.shape[1]
        d_hidden = (d_logits @ weight_VH[:columns]).mul_(d_loss).to(hidden_TH.dtype)
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight_VH)
            d_weight[:columns] = (d_logits.t() @ hidden_TH.to(d_logits.dtype)).mul_(d_loss)
        return d_hidden, d_weight, None, None, None, None, None


def _all_reduce(tensor: Tensor, op: Any, group: dist.ProcessGroup | None) -> None:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op, group)


def _check(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    topk_ids_TK: Tensor | None,
    shard: VocabShard,
    temperature: float,
) -> None:
    tokens = hidden_TH.shape[0]
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, expected a number above 0")
    if hidden_TH.dim() != 2 or weight_VH.dim() != 2 or hidden_TH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"hidden, weight: got {tuple(hidden_TH.shape)}, {tuple(weight_VH.shape)}, expected [T,H], [V,H]"
        )
    if targets_T.shape != (tokens,):
        raise ValueError(f"targets: got shape {tuple(targets_T.shape)}, expected ({tokens},)")
    if topk_ids_TK is not None and (topk_ids_TK.dim() != 2 or topk_ids_TK.shape[0] != tokens):
        raise ValueError(f"topk_ids: got shape {tuple(topk_ids_TK.shape)}, expected ({tokens}, K)")
    if not tokens or targets_T.is_cuda:
        return  # ids that come from a GPU were checked where they entered: a look at them here would wait for it
    if targets_T.min() < 0 or targets_T.max() >= shard.vocab_size:
        raise ValueError(f"targets: got an id outside of 0..{shard.vocab_size - 1}")
    if topk_ids_TK is None or not topk_ids_TK.numel():
        return
    if topk_ids_TK.min() < -1 or topk_ids_TK.max() >= shard.vocab_size:
        raise ValueError(f"topk_ids: got an id outside of -1..{shard.vocab_size - 1}")
