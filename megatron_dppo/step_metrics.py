"""A training step's metrics: the passes' sums over tokens, added over the job and divided.

A sum becomes a metric of its own name, its mean over tokens, but for those in `TOTALS` and `SHARES`. One that is not
in `SUMS` is an error, so that none is lost on the way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_dppo.algorithm.objectives import TOKEN_SUMS
from megatron_dppo.backend.model import Model
from megatron_dppo.backend.replay import Routes, agreement_sums
from megatron_dppo.backend.step import LOSS_SUMS, Sums
from megatron_dppo.metrics import MASKED_NEGATIVE, MASKED_POSITIVE, MEAN_ABS_PI_MINUS_MU

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


def token_means(sums: Sequence[Sums], model: Model) -> dict[str, float]:
    """Means over all tokens of all replicas, the same on every rank; of sums that no micro-batch has, none.

    Collectives: one all-reduce of 2 f64 a name in `SUMS` over the job. The numbers leave the device here.
    """
    total = torch.zeros(2, len(SUMS), dtype=torch.float64, device=model.device)  # sums; how many results have them
    if model.rank.reports:
        zero, one = total.new_zeros(()), total.new_ones(())
        for result in sums:
            assert result.keys() <= set(SUMS), f"sums that nobody reports: {sorted(result.keys() - set(SUMS))}"
            total[0] += torch.stack([result.get(name, zero).double() for name in SUMS])
            total[1] += torch.stack([one if name in result else zero for name in SUMS])
    dist.all_reduce(total)
    totals, found = total.tolist()
    value = {name: added for name, added, times in zip(SUMS, totals, found, strict=True) if times}
    divisor = {name: max(value[name], 1.0) for name in ("count", "positive", "negative")}
    divisor["tokens"] = value["tokens"] or math.nan  # where all were skipped, nothing was measured
    shares = {name: SHARES.get(name, (name, "tokens")) for name in value if name not in TOTALS}
    means = {metric: value[name] / divisor[per] for name, (metric, per) in shares.items()}
    return means | {"tokens": value["tokens"], "tokens_skipped": value["skipped"]}


def route_agreement(
    model: Model, micro_batches: Sequence[Routes | None], name: str = "route_agreement"
) -> dict[str, float]:
    """Share of the recorded experts that routers take themselves, in all layers and in each, of passes that have been;
    nothing where none are replayed. One all-reduce of two f64 a layer."""
    replayed = [routes for routes in micro_batches if routes is not None]
    if not replayed:
        return {}
    total = agreement_sums(replayed, model.arch, model.device)
    dist.all_reduce(total)
    agreed, experts = total.tolist()
    if not sum(experts):
        return {}
    of_layers = {f"{name}/{i}": a / n for i, (a, n) in enumerate(zip(agreed, experts, strict=True)) if n}
    return {name: sum(agreed) / sum(experts)} | of_layers
