"""`reference.row_statistics_` and `reference.row_gradient_` as two Triton kernels; the only file that imports Triton.

One program a row. The logits are read once for the statistics and once for the gradient, which is written over them:
12 bytes of traffic for each f32 logit with an f32 gradient, 10 with a bf16 one, 6 for bf16 logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dppo.head.reference import LOG2_E, LOWEST, RowParts, RowScalars, target_gradient

BLOCK = 4096  # columns in flight in one program
NUM_WARPS = 8


def row_statistics_(logits_TV: Tensor, temperature: float, *, keep_logits: bool) -> RowParts:
    """As `reference.row_statistics_`, for f32 or bf16 logits, which are kept in any case."""
    del keep_logits  # here a second exponential costs less than writing w
    tokens, columns = logits_TV.shape
    out = RowParts(*(logits_TV.new_empty((tokens,), dtype=torch.float32) for _ in RowParts._fields))
    if tokens:
        _row_statistics[(tokens,)](
            logits_TV, logits_TV.stride(0), columns, LOG2_E / temperature, *out,
            LOWEST=tl.constexpr(LOWEST), BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
        out.moment.mul_(1 / LOG2_E)
    return out


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
    """As `reference.row_gradient_`; `dtype` may not be wider than the logits' and the result shares their memory."""
    tokens, columns = logits_TV.shape
    assert dtype.itemsize <= logits_TV.dtype.itemsize
    gradient_TV = logits_TV.view(dtype)[:, :columns]
    if tokens and columns:
        _row_gradient[(tokens,)](
            logits_TV, gradient_TV, logits_TV.stride(0), gradient_TV.stride(0), columns,
            scalars.maximum, scalars.log_sum, scalars.entropy, target_column_T,
            target_gradient(scalars, c_logprob_T, c_entropy_T, temperature),
            c_logprob_T.contiguous(), c_logprob_T if c_entropy_T is None else c_entropy_T.contiguous(), 1 / temperature,
            WITH_ENTROPY=c_entropy_T is not None,
            LOG2_E=tl.constexpr(LOG2_E), LOWEST=tl.constexpr(LOWEST), BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return gradient_TV


@triton.jit
def _row_statistics(
    logits, row_stride, columns, log2_scale, maximum, excess, moment,
    LOWEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """m and s - 1 of a row, and u in units of log 2. The maximum is one number a row; the others are kept a lane each
    and rescaled when it grows, so a block costs one reduction and one exponential a column."""
    row = tl.program_id(0).to(tl.int64)
    m = tl.full((), LOWEST, tl.float32)
    ones = tl.zeros((BLOCK,), tl.float32)  # columns equal to the maximum, and the sum of the others
    below_one = tl.zeros((BLOCK,), tl.float32)
    u = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * row_stride + column, column < columns, other=float("-inf")).to(tl.float32)
        grown = tl.maximum(m, tl.max(x, 0))
        step = (m - grown) * log2_scale
        scale = tl.exp2(step)
        log2_w = (x - grown) * log2_scale
        log2_w = tl.where(log2_w < LOWEST, LOWEST, log2_w)  # not tl.maximum, which may drop a NaN
        w = tl.exp2(log2_w)
        s = ones + below_one
        u = (u + s * step) * scale + w * log2_w
        is_maximum = x == grown
        below_one = tl.where(step < 0, s * scale, below_one) + tl.where(is_maximum, 0.0, w)
        ones = tl.where(step < 0, 0.0, ones) + tl.where(is_maximum, 1.0, 0.0)
        m = grown
    tl.store(maximum + row, m)
    tl.store(excess + row, tl.sum(ones, 0) - 1 + tl.sum(below_one, 0))
    tl.store(moment + row, tl.sum(u, 0))


@triton.jit
def _row_gradient(
    logits, gradient, row_stride, gradient_stride, columns,
    maximum, log_sum, entropy, target_column, target_value, c_logprob, c_entropy, inverse_temperature,
    WITH_ENTROPY: tl.constexpr, LOG2_E: tl.constexpr, LOWEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of a row, over its logits: `gradient` may be the same memory seen as a narrower type."""
    row = tl.program_id(0).to(tl.int64)
    m = tl.load(maximum + row)
    shift = tl.load(log_sum + row)
    target = tl.load(target_column + row)
    of_target = tl.load(target_value + row)
    c = tl.load(c_logprob + row)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * row_stride + column, column < columns, other=float("-inf")).to(tl.float32)
        # A narrower gradient lands where logits of this block, or of an earlier one, lie: all have to be read before
        # any is overwritten.
        tl.debug_barrier()
        log_p = (x - m) * inverse_temperature - shift
        log_p = tl.where(log_p < LOWEST, LOWEST, log_p)
        p = tl.exp2(log_p * LOG2_E)
        slope = c
        if WITH_ENTROPY:
            slope = c + tl.load(c_entropy + row) * (log_p + tl.load(entropy + row))
        g = tl.where(column == target, of_target, -p * slope * inverse_temperature)
        tl.store(gradient + row * gradient_stride + column, g.to(gradient.dtype.element_ty), column < columns)
