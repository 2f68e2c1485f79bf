"""A training step's metrics: the passes' sums over tokens, added over the job at once, and divided.

A sum becomes a metric of its own name, its mean over tokens, but for those in `TOTALS` and `SHARES`. One that is not
in `SUMS` is an error, so that none is lost on the way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dppo.algorithm.divergence import binary_tv
from megatron_dppo.algorithm.objectives import TOKEN_SUMS, RolloutTokens, TokenStats
from megatron_dppo.backend.model import Model
from megatron_dppo.backend.replay import Routes, agreement_sums, compared_routes
from megatron_dppo.backend.step import LOSS_SUMS, Sums
from megatron_dppo.metrics import MASKED_NEGATIVE, MASKED_POSITIVE, MEAN_ABS_PI_MINUS_MU, MISMATCH

KL_REFERENCE = "kl_reference"  # where the loss has a KL term
SUMS = (*LOSS_SUMS, *TOKEN_SUMS, KL_REFERENCE)
TOTALS = ("count", "skipped", "tokens", "positive", "negative")  # divisors, or metrics as they are
SHARES = {  # of a sum: the metric, and the total that it is divided by
    "loss": ("loss", "count"),
    "abs_pi_minus_mu": (MEAN_ABS_PI_MINUS_MU, "tokens"),
    "masked_positive": (MASKED_POSITIVE, "positive"),
    "masked_negative": (MASKED_NEGATIVE, "negative"),
    "bad_updates": ("bad_update_share", "negative"),
}


@dataclass(frozen=True)
class Native:
    """Of the first gradient step, if routers chose themselves; on this rank."""

    mismatch: Tensor  # f64[2]: the sum of |pi - mu|, and of how many tokens
    agreement: Tensor  # `replay.agreement_sums`


def native_sums(
    model: Model,
    stats: Sequence[TokenStats],
    tokens: Sequence[RolloutTokens],
    taken: Sequence[Routes],
    recorded: Sequence[Routes | None],
) -> Native:
    """From the statistics of a pass without replay (none but on the last stage), and the routes that it took."""
    total = torch.zeros(2, dtype=torch.float64, device=model.device)
    if model.rank.reports:
        for found, rollout in zip(stats, tokens, strict=True):
            total[0] += binary_tv(rollout.logprob, found.logprob).double().sum()
            total[1] += len(found.logprob)
    compared = [compared_routes(own, found) for own, found in zip(taken, recorded, strict=True) if found is not None]
    return Native(total, agreement_sums(compared, model.arch, model.device))


def step_metrics(
    model: Model, sums: Sequence[Sums], first: int, routes: Sequence[Routes | None], native: Native | None
) -> dict[str, float]:
    """The metrics of a step, the same on every rank.

    `sums`: of all micro-batches that this rank has some of, in order. `first`: how many micro-batches the first
    gradient step has, whose weights are still the engine's; `routes`: what each of those replayed; `native`: where it
    was measured, which is then on every rank.

    Collectives: one all-reduce over the job, of 4 f64 a name in `SUMS`, 2 a layer, and as many again and 2 with
    `native`. The metrics leave the device after it, and nowhere else.
    """
    parts = {
        "all": token_totals(sums, model),
        "first": token_totals(sums[:first], model),
        "agreement": agreement_sums([found for found in routes if found is not None], model.arch, model.device),
    }
    if native is not None:
        parts |= {"native mismatch": native.mismatch, "native agreement": native.agreement}
    total = _over_job(parts)
    mismatch = token_means(total["first"])[MEAN_ABS_PI_MINUS_MU]
    result = token_means(total["all"]) | {MISMATCH: mismatch} | route_agreement(total["agreement"])
    if native is not None:
        distance, tokens = total["native mismatch"]
        result["mismatch_without_replay"] = distance / tokens if tokens else math.nan
        result |= route_agreement(total["native agreement"], "route_agreement_without_replay")
    return result


def _over_job(parts: Mapping[str, Tensor]) -> dict[str, Any]:
    """f64 tensors, of the same shapes on every rank, summed over the job, as lists."""
    total = torch.cat([part.flatten() for part in parts.values()])
    dist.all_reduce(total)
    split = total.cpu().split([part.numel() for part in parts.values()])
    return {name: whole.view(parts[name].shape).tolist() for name, whole in zip(parts, split, strict=True)}


def token_totals(sums: Sequence[Sums], model: Model) -> Tensor:
    """f64[2, SUMS]: the sums of micro-batches, and how many of these have each; 0 on ranks whose sums do not count."""
    total = torch.zeros(2, len(SUMS), dtype=torch.float64, device=model.device)
    if not model.rank.reports:
        return total
    zero, one = total.new_zeros(()), total.new_ones(())
    for result in sums:
        assert result.keys() <= set(SUMS), f"sums that nobody reports: {sorted(result.keys() - set(SUMS))}"
        total[0] += torch.stack([result.get(name, zero).double() for name in SUMS])
        total[1] += torch.stack([one if name in result else zero for name in SUMS])
    return total


def token_means(totals: Sequence[Sequence[float]]) -> dict[str, float]:
    """Means over tokens from `token_totals` of the job; of sums that no micro-batch has, none."""
    value = {name: added for name, added, times in zip(SUMS, *totals, strict=True) if times}
    divisor = {name: max(value[name], 1.0) for name in ("count", "positive", "negative")}
    divisor["tokens"] = value["tokens"] or math.nan  # where all were skipped, nothing was measured
    shares = {name: SHARES.get(name, (name, "tokens")) for name in value if name not in TOTALS}
    means = {metric: value[name] / divisor[per] for name, (metric, per) in shares.items()}
    return means | {"tokens": value["tokens"], "tokens_skipped": value["skipped"]}


def route_agreement(totals: Sequence[Sequence[float]], name: str = "route_agreement") -> dict[str, float]:
    """Share of the recorded experts that routers take themselves, in all layers and in each, from `agreement_sums` of
    the job; nothing where none were recorded."""
    agreed, experts = totals
    if not sum(experts):
        return {}
    of_layers = {f"{name}/{i}": a / n for i, (a, n) in enumerate(zip(agreed, experts, strict=True)) if n}
    return {name: sum(agreed) / sum(experts)} | of_layers
