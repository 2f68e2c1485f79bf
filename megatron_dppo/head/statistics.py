"""From what each vocabulary shard knows of a row to the row's statistics, identical on every tensor-parallel rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dppo.algorithm.divergence import topk_members
from megatron_dppo.algorithm.objectives import TokenStats
from megatron_dppo.head.reference import RowParts, RowScalars


@dataclass(frozen=True)
class VocabShard:
    """Which rows of the LM head this rank holds: `start .. start + rows`, of which those below `vocab_size` count."""

    start: int
    vocab_size: int
    group: dist.ProcessGroup | None = None  # tensor-parallel group; None: this rank holds all

    def columns(self, rows: int) -> int:
        """How many of the shard's `rows` are vocabulary and not padding."""
        return max(0, min(self.start + rows, self.vocab_size) - self.start)

    def local(self, ids: Tensor, columns: int) -> Tensor:
        """Columns of the shard for ids of the vocabulary, i64; -1 where an id is absent or on another shard."""
        local = ids - self.start
        return local.masked_fill((ids < 0) | (local < 0) | (local >= columns), -1)

    @property
    def is_split(self) -> bool:
        return self.group is not None and dist.get_world_size(self.group) > 1


def pick(logits_TV: Tensor, columns_TN: Tensor) -> Tensor:
    """Logits at columns of the shard, f32[T, N]; 0 where the column is negative."""
    if not logits_TV.shape[1]:
        return logits_TV.new_zeros(columns_TN.shape)
    return logits_TV.gather(1, columns_TN.clamp(min=0)).masked_fill_(columns_TN < 0, 0.0)


def merge(
    parts: RowParts,
    target_logit_T: Tensor,
    topk_logit_TK: Tensor | None,
    targets_T: Tensor,
    topk_ids_TK: Tensor | None,
    shard: VocabShard,
    temperature: float,
) -> tuple[TokenStats, RowScalars]:
    """Statistics of the whole vocabulary from this shard's parts.

    `target_logit_T`, `topk_logit_TK`: this shard's logits, 0 where the id is on another one. The parts are gathered
    and added in the order of the ranks, in float64, so every rank computes the same bits.

    Collectives over `shard.group`: one all-gather of 4 f32 a token (m, s - 1, u, the target's logit) and, where there
    are Top-K ids, one sum all-reduce of K f32 a token (one of the addends is not 0, so it is exact).
    """
    packed_R4T = torch.stack([*parts, target_logit_T])[None]
    if shard.is_split:
        packed_R4T = _all_gather(packed_R4T[0], shard.group)
        if topk_logit_TK is not None:
            dist.all_reduce(topk_logit_TK, group=shard.group)
    maximum_RT, excess_RT, moment_RT, target_RT = packed_R4T.double().unbind(1)
    sum_RT = 1 + excess_RT
    maximum_T = maximum_RT.amax(0)
    log_scale_RT = (maximum_RT - maximum_T) / temperature
    scale_RT = log_scale_RT.exp()
    sum_T = (sum_RT * scale_RT).sum(0)
    moment_T = ((moment_RT + sum_RT * log_scale_RT) * scale_RT).sum(0)
    log_sum_T = sum_T.log()
    entropy_T = (log_sum_T - moment_T / sum_T).float()

    def logprob(logits: Tensor) -> Tensor:  # [T, N]
        return ((logits.double() - maximum_T[:, None]) / temperature - log_sum_T[:, None]).float()

    logprob_T1 = logprob(target_RT.sum(0)[:, None])
    member = topk_logprob = None
    if topk_ids_TK is not None:
        assert topk_logit_TK is not None
        member = topk_members(topk_ids_TK, targets_T)
        of_ids = logprob(topk_logit_TK).masked_fill_(topk_ids_TK < 0, -torch.inf)
        topk_logprob = torch.cat([of_ids, logprob_T1], dim=1)
    stats = TokenStats(logprob_T1[:, 0].contiguous(), entropy_T, topk_logprob, member)
    return stats, RowScalars(parts.maximum, maximum_T.float(), log_sum_T.float(), entropy_T, stats.logprob)


def _all_gather(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[...] on each of R ranks -> [R, ...] on all."""
    gathered = tensor.new_empty((dist.get_world_size(group), *tensor.shape))
    dist.all_gather_into_tensor(gathered.flatten(0, 1), tensor, group=group)
    return gathered
