"""The hidden states of counted tokens, from wherever they lie on the ranks of a tensor-parallel group."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A copy on the device; from pinned memory on a GPU, where a plain copy would wait for all work in flight."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def counted_rows(
    hidden_NH: Tensor, rows: npt.NDArray[np.int64], group: dist.ProcessGroup | None, *, sequence_parallel: bool
) -> Tensor:
    """hidden[rows] as [T, H] on every rank of the group; backward adds up the ranks' gradients.

    Without sequence parallelism `hidden_NH` [N, H] is the same on every rank. With it, rank r of R holds rows
    r N .. (r + 1) N of a sequence of R N, and `rows` (on the host, the same on every rank) count through all of it.
    Prompt, padding and environment rows stay where they are.

    Collectives over `group`, with n the most counted rows on one rank: under sequence parallelism one all-gather
    of n H a rank forward and one reduce-scatter of the same backward, else one all-reduce of T H backward. In the
    dtype of `hidden_NH`.
    """
    size = 1 if group is None else dist.get_world_size(group)
    if size == 1 or not sequence_parallel:
        counted = hidden_NH.index_select(0, to_device(rows, hidden_NH.device))
        return counted if size == 1 else _SumGradient.apply(counted, group)
    owner, local = np.divmod(rows, len(hidden_NH))
    counts = np.bincount(owner, minlength=size)
    most = int(counts.max())
    if most == 0:
        return hidden_NH[:0]
    # Position of each row in the gathered tensor: a rank's rows come in the order of `rows`, behind its padding-to-n.
    order = np.argsort(owner, kind="stable")
    place = np.empty_like(rows)
    place[order] = np.concatenate([rank * most + np.arange(count) for rank, count in enumerate(counts)])
    mine = np.zeros(most, np.int64)  # what pads it is any row: it is never read
    mine[: counts[dist.get_rank(group)]] = local[owner == dist.get_rank(group)]
    device = hidden_NH.device
    return _GatherRows.apply(hidden_NH, to_device(mine, device), to_device(place, device), group)


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden_TH.view_as(hidden_TH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_hidden: Tensor) -> tuple[Tensor, None]:
        d_hidden = d_hidden.contiguous()
        dist.all_reduce(d_hidden, group=ctx.group)
        return d_hidden, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, mine: Tensor, place_T: Tensor, group: dist.ProcessGroup) -> Tensor:
        gathered = hidden_NH.new_empty((dist.get_world_size(group) * len(mine), hidden_NH.shape[1]))
        dist.all_gather_into_tensor(gathered, hidden_NH.index_select(0, mine), group=group)
        ctx.save_for_backward(mine, place_T)
        ctx.group, ctx.shape = group, hidden_NH.shape
        return gathered.index_select(0, place_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_hidden: Tensor) -> tuple[Tensor | None, ...]:
        mine, place_T = ctx.saved_tensors
        size = dist.get_world_size(ctx.group)
        sent = d_hidden.new_zeros((size * len(mine), d_hidden.shape[1]))
        sent.index_copy_(0, place_T, d_hidden)  # rows that pad a rank's share stay 0
        received = torch.empty_like(sent[: len(mine)])
        dist.reduce_scatter_tensor(received, sent, group=ctx.group)
        gradient = d_hidden.new_zeros(ctx.shape)
        return gradient.index_add_(0, mine, received), None, None, None
