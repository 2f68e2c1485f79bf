"""How far the trained policy pi has moved from the behaviour policy mu (paper section 4.4, Eqs. 13-16).

Both approximations are divergences over a partition of the vocabulary: {a_t} and the rest for Binary; the K
most probable tokens of mu, the sampled token and "other" for Top-K. A coarser partition never shows more than
a finer one: 0 <= D_binary <= D_topk <= D_full (Appendix C).

All is computed in float64 from log-probs and returned in the dtype of the inputs (float32 in training):

- A log-prob slightly above 0 (rounding) counts as 0; -inf is a probability of 0. NaN comes out as NaN: a
  missing log-prob must not pass for a small divergence.
- Near p = 1, where most tokens of a language model are, 1 - p is -expm1(log p). In float32 it would be 0 from
  p = 1 - 6e-8 on.
- KL is measured against (1 - EPSILON) pi + EPSILON mu. So it is finite where pi = 0 (at most -ln EPSILON,
  46 nats), equals the plain KL to 1e-6 wherever pi > 1e-14 mu, and keeps the order above, because mixing
  commutes with merging tokens. A floor on each probability would break that order.
- The rounding of the inputs remains. A float32 softmax that reports p = 1 and yet gives other tokens mass
  contradicts itself, and "other" is known to about 1e-7 only: where pi leaves less than that to a class that
  has mass m under mu, KL is uncertain by up to 46 m. TV is not affected.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPSILON = 1e-20
LOG_ZERO = -1000.0  # exp(-1000) is 0 in float64


def binary_tv(mu_logprob: Tensor, pi_logprob: Tensor) -> Tensor:
    """Eq. 13, |mu(a_t) - pi(a_t)| of the sampled tokens: f32[T] log-probs -> f32[T] in [0, 1]."""
    divergence = (_as_log(mu_logprob).exp() - _as_log(pi_logprob).exp()).abs()
    return divergence.to(mu_logprob.dtype)


def binary_kl(mu_logprob: Tensor, pi_logprob: Tensor) -> Tensor:
    """Eq. 14, KL(mu || pi) of {a_t, the rest}: f32[T] log-probs -> f32[T] nats, finite and >= 0."""
    log_mu, log_pi = _as_log(mu_logprob), _as_log(pi_logprob)
    sampled = _mu_log_mu_over_pi(log_mu, log_pi)
    rest = _mu_log_mu_over_pi(_log_complement(log_mu), _log_complement(log_pi))
    return (sampled + rest).clamp(min=0).to(mu_logprob.dtype)


def topk_tv(mu: Tensor, pi: Tensor, member: Tensor) -> Tensor:
    """Eq. 15 over A'' = TopK(mu, K) u {a_t} u {other}: half the L1 distance, f32[T] in [0, 1].

    Eq. 15 as printed sums A' only; without "other" D_binary <= D_topk would fail, and Appendix C includes it.

    Args:
        mu, pi: f32[T, K+1], log-probs of the K recorded ids (columns 0..K-1) and of the sampled token (column
            K).
        member: bool[T, K+1] of `topk_members`; columns that are False are ignored, whatever they hold.
    """
    p_mu, p_pi = _with_other(mu, member).exp(), _with_other(pi, member).exp()
    return (0.5 * (p_mu - p_pi).abs().sum(dim=-1)).to(mu.dtype)


def topk_kl(mu: Tensor, pi: Tensor, member: Tensor) -> Tensor:
    """Eq. 16, KL(mu || pi) over A'' = TopK(mu, K) u {a_t} u {other}: f32[T] nats, finite and >= 0.

    Arguments as for `topk_tv`.
    """
    terms = _mu_log_mu_over_pi(_with_other(mu, member), _with_other(pi, member))
    return terms.sum(dim=-1).clamp(min=0).to(mu.dtype)


def topk_members(topk_ids: Tensor, targets: Tensor) -> Tensor:
    """Which of the K+1 columns make up A' = TopK(mu, K) u {a_t}, every token once: bool[T, K+1].

    Args:
        topk_ids: integer[T, K] as recorded by the engine; -1 where absent. Of a repeated id the first counts.
        targets: integer[T], the sampled token a_t; column K is a member only where a_t is not among the K.
    """
    sorted_ids, order = topk_ids.sort(dim=-1, stable=True)
    repeats_previous = torch.zeros_like(sorted_ids, dtype=torch.bool)
    repeats_previous[:, 1:] = sorted_ids[:, 1:] == sorted_ids[:, :-1]
    repeated = torch.zeros_like(repeats_previous).scatter(-1, order, repeats_previous)
    present = (topk_ids >= 0) & ~repeated
    outside = ~(present & (topk_ids == targets.unsqueeze(-1))).any(dim=-1, keepdim=True)
    return torch.cat([present, outside], dim=-1)


def _as_log(logprob: Tensor) -> Tensor:
    return logprob.double().clamp(max=0)


def _log_complement(log_p: Tensor) -> Tensor:
    """log(1 - p) from log p, with all its digits for p next to 1."""
    return (-torch.expm1(log_p)).log()


def _with_other(logprob: Tensor, member: Tensor) -> Tensor:
    """Log-probs over A'': f64[T, K+2], the last column "other"; -inf in columns that are not members."""
    log_p = _as_log(logprob).masked_fill(~member, -math.inf)
    # 1 - sum, with the largest member's own complement by expm1: no digits are lost where it is close to 1.
    largest, column = log_p.max(dim=-1, keepdim=True)
    smaller = log_p.scatter(-1, column, -math.inf).exp().sum(dim=-1, keepdim=True)
    # Rounded float32 log-probs may sum to a little more than 1.
    other = (-torch.expm1(largest) - smaller).clamp(min=0)
    return torch.cat([log_p, other.log()], dim=-1)


def _mu_log_mu_over_pi(log_mu: Tensor, log_pi: Tensor) -> Tensor:
    """One term of KL(mu || (1 - EPSILON) pi + EPSILON mu), in float64; 0 where mu = 0, even if pi = 0."""
    log_mu = log_mu.clamp(min=LOG_ZERO)  # keeps the difference below from being (-inf) - (-inf)
    log_pi_over_mu = torch.logaddexp(log_pi - log_mu, log_mu.new_full((), math.log(EPSILON)))
    return -log_mu.exp() * log_pi_over_mu
