"""Row statistics and the gradient of the logits on one vocabulary shard, in plain torch.

Notation: z = logit / temperature, m = the shard's largest logit, w = exp((logit - m) / temperature), s = sum w,
u = sum w log w. Over the whole vocabulary, log pi(y) = (logit_y - m) / temperature - log s and the entropy is
H = log s - u / s. `kernels.py` has the same two functions in Triton.

The largest term of s is 1, and where a policy is nearly sure the others are far below a float32's step there. So not s
but s - 1 is computed, from terms that are all below 1: log-probs next to 0, and the small divergences that hang on
them, keep their digits.

Both go through the logits in blocks that stay in cache, and powers of two are taken where e is meant: torch's exp2
costs half of its exp on a CPU.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)
BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}  # 2 MiB of float32, within a core's cache; few launches on a GPU
LOWEST = -1e30  # finite, and 0 times it is 0: what an impossible column's -inf becomes


class RowParts(NamedTuple):
    """What one shard knows of each row, f32[T] each: m, s - 1 and u; of an empty shard -1e30, -1 and 0."""

    maximum: Tensor
    excess: Tensor
    moment: Tensor


class RowScalars(NamedTuple):
    """What the gradient of a row needs beside its logits, f32[T] each."""

    shard_maximum: Tensor  # m of this shard
    maximum: Tensor  # m of the whole vocabulary
    log_sum: Tensor  # log s of the whole vocabulary, relative to `maximum`
    entropy: Tensor
    logprob: Tensor  # of the target


def row_statistics_(logits_TV: Tensor, temperature: float, *, keep_logits: bool) -> RowParts:
    """m, s - 1 and u of each row of a shard; `logits_TV` f32[T, V] may have 0 columns, and -inf in some.

    Unless `keep_logits`, w is written over the logits: the gradient through log-probs alone is w times one number a
    row, so no second exponential is paid. The gradient through the entropy needs the logits themselves.
    """
    tokens, columns = logits_TV.shape
    parts = RowParts(*(logits_TV.new_full((tokens,), value) for value in (LOWEST, -1.0, 0.0)))
    if not columns:
        return parts
    rows = _rows_of_a_block(logits_TV)
    scratch = [logits_TV.new_empty((min(rows, tokens), columns)) for _ in range(2 if keep_logits else 1)]
    for logits, m, excess, u in zip(*(x.split(rows) for x in (logits_TV, *parts)), strict=True):
        log2_w = scratch[0][: len(logits)]
        w = scratch[1][: len(logits)] if keep_logits else logits
        torch.amax(logits, 1, out=m).clamp_(min=LOWEST)
        torch.sub(logits, m[:, None], out=log2_w).mul_(LOG2_E / temperature).clamp_(min=LOWEST)
        torch.exp2(log2_w, out=w)
        u.copy_(_row_dots(w, log2_w))
        below_one = torch.frac(w, out=log2_w).sum(1)  # w without its ones, of which equal maxima make several
        torch.sub((w.sum(1) - below_one).round_(), 1, out=excess).add_(below_one)
    parts.moment.mul_(1 / LOG2_E)
    return parts


def row_gradient_(
    logits_TV: Tensor,
    scalars: RowScalars,
    target_column_T: Tensor,
    c_logprob_T: Tensor,
    c_entropy_T: Tensor | None,
    temperature: float,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """d/d(logit) of sum_t c_logprob_t log pi(y_t) + c_entropy_t H_t, written over `logits_TV`.

    d log pi(y)/dz_j = [j = y] - p_j and dH/dz_j = -p_j (log p_j + H). `logits_TV` holds what `row_statistics_` left:
    the logits where c_entropy_T is given, else w. `target_column_T`: the target's column in this shard, negative
    where it lies on another. Returned in `dtype`; in float32 it is the memory of the logits.
    """
    if not logits_TV.shape[1]:
        return logits_TV.to(dtype)
    c_T = c_logprob_T / temperature
    if c_entropy_T is None:
        share = ((scalars.shard_maximum - scalars.maximum) / temperature - scalars.log_sum).exp()  # p = w * share
        logits_TV.mul_((-c_T * share)[:, None])
    else:
        _entropy_gradient_(logits_TV, scalars, c_T, c_entropy_T / temperature, temperature)
    column_T1 = target_column_T.clamp(min=0)[:, None]
    own_T1 = target_gradient(scalars, c_logprob_T, c_entropy_T, temperature)[:, None]
    kept_T1 = torch.where(target_column_T[:, None] < 0, logits_TV.gather(1, column_T1), own_T1)
    return logits_TV.scatter_(1, column_T1, kept_T1).to(dtype)


def target_gradient(scalars: RowScalars, c_logprob_T: Tensor, c_entropy_T: Tensor | None, temperature: float) -> Tensor:
    """The gradient of the target's logit, f32[T]: c (1 - p) keeps its digits next to p = 1, which c - c p loses."""
    log_p = scalars.logprob.clamp(min=LOWEST)
    own = -c_logprob_T * torch.expm1(log_p)
    if c_entropy_T is not None:
        own = own - c_entropy_T * log_p.exp() * (log_p + scalars.entropy)
    return own / temperature


def _entropy_gradient_(logits_TV: Tensor, scalars: RowScalars, c_T: Tensor, e_T: Tensor, temperature: float) -> None:
    """-p (c + e (log p + H)) over the logits."""
    offset = c_T + e_T * scalars.entropy
    rows = _rows_of_a_block(logits_TV)
    scratch = logits_TV.new_empty((min(rows, len(logits_TV)), logits_TV.shape[1]))
    per_row = (x[:, None].split(rows) for x in (scalars.maximum, scalars.log_sum, -e_T, offset))
    for log_p, maximum, log_sum, minus_e, shift in zip(logits_TV.split(rows), *per_row, strict=True):
        p = scratch[: len(log_p)]
        log_p.sub_(maximum).mul_(1 / temperature).sub_(log_sum).clamp_(min=LOWEST)
        torch.mul(log_p, LOG2_E, out=p).exp2_()
        log_p.mul_(minus_e).sub_(shift).mul_(p)


def _row_dots(a: Tensor, b: Tensor) -> Tensor:
    """sum_j a_ij b_ij; BLAS's dot where the block is a single row, which is the common case."""
    return torch.dot(a[0], b[0]) if a.shape[0] == 1 else torch.linalg.vecdot(a, b)


def _rows_of_a_block(logits_TV: Tensor) -> int:
    return max(1, BLOCK_ELEMENTS.get(logits_TV.device.type, 1 << 19) // logits_TV.shape[1])
