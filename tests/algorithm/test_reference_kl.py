"""The pull to a reference against autograd through the exact divergence of small distributions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_dppo.algorithm.reference_kl import MAX_LOG_RATIO, ReferenceKl, estimate, kl_coefficient

VOCAB = 7


def distributions(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of pi, log-probs of the reference and of mu."""
    generator = torch.Generator().manual_seed(seed)
    pi, reference, mu = torch.randn(3, VOCAB, generator=generator, dtype=torch.float64)
    return pi, reference.log_softmax(-1), mu.log_softmax(-1)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("seed", range(3))
def test_with_importance_the_expected_pull_is_the_gradient_of_the_divergence(estimator: str, seed: int) -> None:
    """Over all tokens as mu samples them, in closed form."""
    logits, reference, mu = distributions(seed)
    logits.requires_grad_()
    log_pi = logits.log_softmax(-1)
    (expected,) = torch.autograd.grad((log_pi.exp() * (log_pi - reference)).sum(), logits, retain_graph=True)
    ratio = (log_pi - mu).exp().detach()
    kl = ReferenceKl(0.3, estimator, importance=True)  # type: ignore[arg-type]
    coefficient, _ = kl_coefficient(kl, log_pi.detach(), reference, ratio)
    (got,) = torch.autograd.grad((mu.exp() * coefficient * log_pi).sum(), logits)
    torch.testing.assert_close(got, -0.3 * expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_without_importance_it_is_the_terms_own_derivative(estimator: str) -> None:
    d = torch.tensor([-3.0, -0.5, -1e-9, 0.0, 1e-9, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    value = {"k2": d * d / 2, "k3": (-d).exp() - 1 + d}[estimator]
    (slope,) = torch.autograd.grad(value.sum(), d)
    zero = torch.zeros(7, dtype=torch.float64)
    kl = ReferenceKl(2.0, estimator, importance=False)  # type: ignore[arg-type]
    coefficient, estimated = kl_coefficient(kl, d.detach(), zero, torch.full((7,), 5.0))
    torch.testing.assert_close(coefficient, -2.0 * slope, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(estimated, value.detach(), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("importance", [True, False])
def test_at_the_reference_nothing_pulls(estimator: str, importance: bool) -> None:
    """Also where the ratio is capped."""
    kl, log_pi = ReferenceKl(1.0, estimator, importance), torch.tensor([-0.1, -3.0])  # type: ignore[arg-type]
    coefficient, value = kl_coefficient(kl, log_pi, log_pi, torch.tensor([0.2, 3.0]))
    assert not coefficient.any() and not value.any()


def test_small_differences_keep_their_sign_and_large_ones_stay_finite() -> None:
    """In float32, where exp(-d) - 1 + d is rounding noise."""
    logprob, reference = torch.tensor([-1.0, -50.0, -torch.inf]), torch.tensor([-1.0 - 1e-6, 0.0, -1.0])
    value, slope = estimate("k3", logprob, reference)
    assert 0 < float(value[0]) < 1e-11 and 0 < float(slope[0]) < 2e-6
    assert torch.isfinite(value).all() and torch.isfinite(slope).all()
    assert float(slope[2]) == pytest.approx(1 - torch.tensor(MAX_LOG_RATIO, dtype=torch.float64).exp().item())
