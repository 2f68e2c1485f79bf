"""A step's metrics from its sums, by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_dppo import step_metrics as module
from megatron_dppo.backend.replay import LayerRoutes
from megatron_dppo.step_metrics import SUMS, Native, step_metrics

MODEL: Any = SimpleNamespace(
    rank=SimpleNamespace(reports=True),
    device=torch.device("cpu"),
    arch=SimpleNamespace(num_layers=3, num_experts_per_tok=2),
)


def means(sums: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    return module.token_means(module.token_totals(sums, MODEL).tolist())


def sums(**values: float) -> dict[str, torch.Tensor]:
    every = dict.fromkeys(set(SUMS) - {"topk_tv", "kl_reference"}, 0.0) | values
    return {name: torch.tensor(value) for name, value in every.items()}


def test_sums_become_means() -> None:
    one = sums(loss=3.0, count=4, skipped=1, tokens=3, entropy=1.5, abs_pi_minus_mu=0.5, positive=2, masked_positive=1)
    other = sums(loss=1.0, count=4, tokens=5, entropy=0.5, negative=4, masked_negative=1, bad_updates=3)
    found = means([one, other])
    expected = {"loss": 0.5, "tokens": 8, "tokens_skipped": 1, "mean_abs_pi_minus_mu": 0.0625, "entropy": 0.25}
    expected |= {"masked_share_positive": 0.5, "masked_share_negative": 0.25, "bad_update_share": 0.75}
    assert found == expected | {"divergence": 0, "kl_mu_pi": 0}


def test_what_was_not_measured_is_left_out_and_what_was_is_there() -> None:
    found = means([sums(tokens=2, topk_tv=0.5), sums(tokens=2, topk_tv=0.5, kl_reference=1.0)])
    assert found["topk_tv"] == 0.25 and found["kl_reference"] == 0.25
    assert not {"topk_tv", "kl_reference"} & means([sums(tokens=2)]).keys()


def test_of_no_tokens_there_is_no_mean() -> None:
    found = means([sums(skipped=3)])
    assert math.isnan(found["entropy"]) and found["loss"] == found["masked_share_positive"] == 0


def test_a_sum_that_nobody_reports_is_an_error() -> None:
    with pytest.raises(AssertionError, match="nobody reports: .'surprise'"):
        means([sums(surprise=1.0)])


def test_the_metrics_leave_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with the same numbers; the first of two gradient steps has one micro-batch."""
    reduced = []

    def all_reduce(total: torch.Tensor) -> None:
        reduced.append(len(total))
        total *= 2

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    routes = {2: LayerRoutes(agreed=torch.tensor(3), valid=torch.tensor([True, False, True]))}
    native = Native(torch.tensor([0.5, 2.0], dtype=torch.float64), torch.tensor([[0, 1.0, 0], [0, 4, 0]]).double())
    parts = [sums(tokens=1, abs_pi_minus_mu=0.5), sums(tokens=3, abs_pi_minus_mu=0.3)]
    found = step_metrics(MODEL, parts, 1, [routes, None], native)
    assert reduced == [4 * len(SUMS) + 2 * 3 + 2 + 2 * 3]
    assert (found["tokens"], found["mismatch"]) == (8, 0.5) and found["mean_abs_pi_minus_mu"] == pytest.approx(0.2)
    assert (found["route_agreement"], found["route_agreement/2"]) == (0.75, 0.75)
    assert found["route_agreement_without_replay/1"] == found["mismatch_without_replay"] == 0.25
    without = step_metrics(MODEL, parts, 1, [None, None], None)
    assert not [name for name in without if "route" in name or "without" in name]
