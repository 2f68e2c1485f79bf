"""The KL divergence from a frozen reference policy, as a penalty in the gradient of Eq. 23.

With d = log pi(a_t) - log ref(a_t), Schulman's estimators of KL(pi || ref) from samples of pi are

    k1 = d        k2 = d^2 / 2        k3 = exp(-d) - 1 + d

A term beta * k in the loss adds -beta * dk / dlog pi to a token's coefficient: 1, d or 1 - exp(-d). The 1 of k1
averages to nothing and is left out; what k3 adds is the gradient of KL(ref || pi). What is wanted is the gradient of
the *expectation* under pi. Samples come from mu, so that is of E_mu[r k] with r = pi / mu, whose token adds
-beta * r * (k + dk / dlog pi): r * d with k1 and k3. `importance` chooses it; r is capped as in Eq. 23.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
MAX_LOG_RATIO = 20.0  # beyond it a token's reference probability is nothing, and exp(-d) no number to train with


@dataclass(frozen=True)
class ReferenceKl:
    """`coefficient` is beta; `importance`: of the expectation under pi, not of the term alone."""

    coefficient: float
    estimator: Estimator
    importance: bool


def estimate(estimator: Estimator, logprob: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """The estimator and what its derivative by log pi pulls with, f64[T] each, from log-probs f32[T]; d is clamped to
    +-20."""
    d = (logprob.double() - reference.double()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    match estimator:
        case "k1":
            return d, torch.zeros_like(d)
        case "k2":
            return d * d / 2, d
        case "k3":
            return torch.expm1(-d) + d, -torch.expm1(-d)


@torch.no_grad()
def kl_coefficient(kl: ReferenceKl, logprob: Tensor, reference: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """What the penalty adds to the coefficient of log pi, and the estimate itself; f32[T] each.

    `ratio f32[T]`: min(pi / mu, C). No collectives.
    """
    value, slope = estimate(kl.estimator, logprob, reference)
    pull = ratio * (value + slope) if kl.importance else slope
    return (-kl.coefficient * pull).to(logprob.dtype), value.to(logprob.dtype)
