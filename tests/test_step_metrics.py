"""A step's metrics from its sums, by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_dppo.step_metrics import SUMS, token_means


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The one rank of a job."""
    monkeypatch.setattr(dist, "all_reduce", lambda total: None)
    return SimpleNamespace(rank=SimpleNamespace(reports=True), device=torch.device("cpu"))


def sums(**values: float) -> dict[str, torch.Tensor]:
    every = dict.fromkeys(set(SUMS) - {"topk_tv", "kl_reference"}, 0.0) | values
    return {name: torch.tensor(value) for name, value in every.items()}


def test_sums_become_means(model: Any) -> None:
    one = sums(loss=3.0, count=4, skipped=1, tokens=3, entropy=1.5, abs_pi_minus_mu=0.5, positive=2, masked_positive=1)
    other = sums(loss=1.0, count=4, tokens=5, entropy=0.5, negative=4, masked_negative=1, bad_updates=3)
    found = token_means([one, other], model)
    expected = {"loss": 0.5, "tokens": 8, "tokens_skipped": 1, "mean_abs_pi_minus_mu": 0.0625, "entropy": 0.25}
    expected |= {"masked_share_positive": 0.5, "masked_share_negative": 0.25, "bad_update_share": 0.75}
    assert found == expected | {"divergence": 0, "kl_mu_pi": 0}


def test_what_was_not_measured_is_left_out_and_what_was_is_there(model: Any) -> None:
    found = token_means([sums(tokens=2, topk_tv=0.5), sums(tokens=2, topk_tv=0.5, kl_reference=1.0)], model)
    assert found["topk_tv"] == 0.25 and found["kl_reference"] == 0.25
    assert not {"topk_tv", "kl_reference"} & token_means([sums(tokens=2)], model).keys()


def test_of_no_tokens_there_is_no_mean(model: Any) -> None:
    found = token_means([sums(skipped=3)], model)
    assert math.isnan(found["entropy"]) and found["loss"] == found["masked_share_positive"] == 0


def test_a_sum_that_nobody_reports_is_an_error(model: Any) -> None:
    with pytest.raises(AssertionError, match="nobody reports: .'surprise'"):
        token_means([sums(surprise=1.0)], model)
