"""Divergences against hand-computed numbers, against the definition in float64, and Appendix C's order."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_dppo.algorithm.divergence import binary_kl, binary_tv, topk_kl, topk_members, topk_tv

F64 = torch.float64


def log(*probabilities: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(probabilities, dtype=F64).log().to(dtype)


def full_tv(mu_TV: Tensor, pi_TV: Tensor) -> Tensor:
    return 0.5 * (mu_TV.exp() - pi_TV.exp()).abs().sum(-1)


def full_kl(mu_TV: Tensor, pi_TV: Tensor) -> Tensor:
    """The definition, without any floor: infinite where mu > 0 = pi."""
    p = mu_TV.exp()
    return torch.where(p > 0, p * (mu_TV - pi_TV), 0.0).sum(-1)


def test_binary_on_the_papers_examples() -> None:
    mu, pi = log(1e-4, 0.99, 0.5), log(1e-2, 0.80, 0.5)
    torch.testing.assert_close(binary_tv(mu, pi), torch.tensor([0.0099, 0.19, 0.0]), rtol=1e-6, atol=1e-7)
    # 1e-4 ln(1e-2) + .9999 ln(.9999/.99) and .99 ln(.99/.8) + .01 ln(.01/.2)
    expected = torch.tensor([0.0094888, 0.1810052, 0.0])
    torch.testing.assert_close(binary_kl(mu, pi), expected, rtol=1e-5, atol=1e-7)


def test_binary_kl_of_a_half_to_a_quarter() -> None:
    # .5 ln 2 + .5 ln(.5/.75) = .5 ln(4/3)
    assert binary_kl(log(0.5), log(0.25)).item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)


def test_binary_kl_keeps_its_digits_next_to_one() -> None:
    """float32 1 - p is 0 at 1 - 1e-8; the log-prob -1e-8 is not, and its complement must be used."""
    mu, pi = torch.tensor([-1e-8, -1e-6, -1e-4]), torch.tensor([-1e-6, -1e-8, -1e-8])
    q_mu, q_pi = -torch.expm1(mu.double()), -torch.expm1(pi.double())
    exact = (1 - q_mu) * (mu.double() - pi.double()) + q_mu * (q_mu / q_pi).log()
    torch.testing.assert_close(binary_kl(mu, pi).double(), exact, rtol=1e-6, atol=0.0)
    assert (exact > 0).all()


def test_binary_kl_grows_with_distance_on_both_sides_of_mu() -> None:
    nearly_one = torch.tensor([-1e-7, -1e-8, -1e-12, 0.0])
    pi = torch.cat([torch.tensor([-math.inf]), log(1e-16, 1e-8, 0.1, 0.3, 0.5, 0.9, 0.999), nearly_one])
    steps = binary_kl(log(0.5).expand_as(pi), pi).diff()
    assert (steps[:5] < 0).all() and (steps[5:] > 0).all()


EXTREMES = torch.tensor([-math.inf, -9999.0, -100.0, math.log(0.5), -1e-8, -1e-45, 0.0, 1e-7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_binary_is_finite_and_not_negative_for_every_pair_of_extremes(dtype: torch.dtype) -> None:
    mu, pi = (x.flatten().to(dtype) for x in torch.meshgrid(EXTREMES, EXTREMES, indexing="ij"))
    for divergence in (binary_tv, binary_kl):
        d = divergence(mu, pi)
        assert d.dtype == dtype
        assert d.isfinite().all() and (d >= 0).all()
    equal = mu == pi
    assert (binary_tv(mu, pi)[equal] == 0).all() and (binary_kl(mu, pi)[equal] == 0).all()


def test_a_positive_rounding_error_counts_as_probability_one() -> None:
    assert binary_tv(torch.tensor([1e-6]), torch.tensor([0.0])).item() == 0.0
    assert binary_kl(torch.tensor([1e-6]), torch.tensor([0.0])).item() == 0.0


def test_kl_to_a_vanished_token_is_large_and_finite() -> None:
    # mu = .5, pi = 0: .5 ln(1e20) + .5 ln(.5)
    d = binary_kl(log(0.5), torch.tensor([-math.inf])).item()
    assert d == pytest.approx(0.5 * math.log(1e20) + 0.5 * math.log(0.5), rel=1e-6)


def test_a_missing_logprob_is_not_a_small_divergence() -> None:
    nan, half, members = torch.tensor([math.nan]), log(0.5), torch.ones(1, 1, dtype=torch.bool)
    assert binary_tv(nan, half).isnan() and binary_kl(half, nan).isnan()
    assert topk_tv(nan[None], half[None], members).isnan() and topk_kl(half[None], nan[None], members).isnan()


def test_members_inside_outside_absent_and_repeated() -> None:
    ids = torch.tensor([[7, 3, 5], [7, 3, 5], [7, -1, -1], [4, 9, 4], [4, 4, 4], [-1, -1, -1]])
    targets = torch.tensor([3, 8, 7, 4, 9, 2])
    expected = [
        [True, True, True, False],  # inside
        [True, True, True, True],  # outside
        [True, False, False, False],
        [True, True, False, False],
        [True, False, False, True],
        [False, False, False, True],  # nothing recorded: Binary
    ]
    assert topk_members(ids, targets).tolist() == expected


def test_members_without_recorded_ids() -> None:
    assert topk_members(torch.empty(2, 0, dtype=torch.int64), torch.tensor([1, 2])).tolist() == [
        [True],
        [True],
    ]


def test_topk_with_the_sampled_token_inside() -> None:
    # A' = {a, b}, sampled b; "other" is .2 -> .3. The last column repeats b and must not count.
    mu, pi = log(0.5, 0.3, 0.3)[None], log(0.6, 0.1, 0.1)[None]
    member = topk_members(torch.tensor([[0, 1]]), torch.tensor([1]))
    assert topk_tv(mu, pi, member).item() == pytest.approx(0.5 * (0.1 + 0.2 + 0.1), rel=1e-6)
    kl = 0.5 * math.log(0.5 / 0.6) + 0.3 * math.log(3) + 0.2 * math.log(0.2 / 0.3)
    assert topk_kl(mu, pi, member).item() == pytest.approx(kl, rel=1e-5)


def test_topk_with_the_sampled_token_outside() -> None:
    # A' = {a, b, c}, sampled c = .05 -> .2; "other" is .15 -> .1
    mu, pi = log(0.5, 0.3, 0.05)[None], log(0.6, 0.1, 0.2)[None]
    member = topk_members(torch.tensor([[0, 1]]), torch.tensor([2]))
    assert topk_tv(mu, pi, member).item() == pytest.approx(0.5 * (0.1 + 0.2 + 0.15 + 0.05), rel=1e-6)
    kl = 0.5 * math.log(0.5 / 0.6) + 0.3 * math.log(3) + 0.05 * math.log(0.05 / 0.2) + 0.15 * math.log(0.15 / 0.1)
    assert topk_kl(mu, pi, member).item() == pytest.approx(kl, rel=1e-5)


def test_other_counts_in_tv() -> None:
    """Without "other" this is .05, less than the binary .1, against Appendix C."""
    mu, pi = log(0.4)[None], log(0.5)[None]
    d = topk_tv(mu, pi, torch.ones(1, 1, dtype=torch.bool))
    torch.testing.assert_close(d, binary_tv(mu[0], pi[0]))
    assert d.item() == pytest.approx(0.1, rel=1e-5)


def test_columns_that_are_not_members_are_ignored() -> None:
    member = torch.tensor([[True, False, True]])
    mu, pi = log(0.5, 0.2, 0.3)[None], log(0.4, 0.1, 0.2)[None]
    garbage = torch.tensor([[False, True, False]])
    for divergence in (topk_tv, topk_kl):
        clean = divergence(mu, pi, member)
        for value in (math.nan, -math.inf, 5.0):
            assert divergence(mu.masked_fill(garbage, value), pi.masked_fill(garbage, value), member) == clean


def test_topk_is_finite_when_rounded_members_sum_to_more_than_one() -> None:
    mu, pi = torch.tensor([[1e-7, -15.0]]), torch.tensor([[0.0, -math.inf]])
    member = torch.ones(1, 2, dtype=torch.bool)
    for divergence in (topk_tv, topk_kl):
        for d in (divergence(mu, pi, member), divergence(pi, mu, member), divergence(mu, mu, member)):
            assert d.isfinite().all() and (d >= 0).all()


def policies(seed: int, tokens: int, vocabulary: int, scale: float, shift: float, zeros: float) -> list[Tensor]:
    """Two float64 policies log mu, log pi [T, V], `shift` apart, with a share of exact zeros in each.

    log p_i is taken as -log(1 + sum_j!=i exp(l_j - l_i)): torch.log_softmax rounds 1 - p to multiples of
    1e-16, which is all that is left of it in the peaked policies drawn here.
    """
    diagonal = torch.eye(vocabulary, dtype=torch.bool)
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, vocabulary, generator=g, dtype=F64) * scale
    moved = logits + torch.randn(tokens, vocabulary, generator=g, dtype=F64) * shift
    out = []
    for x in (logits, moved):
        gone = torch.rand(tokens, vocabulary, generator=g) < zeros
        gone[:, 0] = False  # something must remain
        x = x.masked_fill(gone, -math.inf)
        others = x[:, None, :].expand(-1, vocabulary, -1).masked_fill(diagonal, -math.inf).logsumexp(-1)
        out.append(torch.where(gone, -math.inf, -torch.logaddexp(torch.zeros_like(x), others - x)))
    return out


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    vocabulary=st.integers(2, 40),
    top_k=st.integers(1, 25),
    scale=st.floats(0, 60),
    shift=st.one_of(st.floats(0, 1), st.floats(0, 60)),
    zeros=st.sampled_from([0.0, 0.0, 0.3]),
)
def test_binary_topk_full_are_ordered(
    seed: int, vocabulary: int, top_k: int, scale: float, shift: float, zeros: float
) -> None:
    """0 <= D_binary <= D_topk <= D_full (Appendix C), for flat and peaked policies and with exact zeros."""
    tokens = 16
    mu_TV, pi_TV = policies(seed, tokens, vocabulary, scale, shift, zeros)
    targets = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))
    ids = mu_TV.topk(min(top_k, vocabulary)).indices
    columns = torch.cat([ids, targets[:, None]], -1)
    member = topk_members(ids, targets)
    mu, pi = mu_TV.gather(-1, columns), pi_TV.gather(-1, columns)
    # "other" is a difference of float64 numbers near 1 - max: below 1e-6 of that its log has lost its digits.
    outside = torch.ones_like(mu_TV).scatter(-1, columns, 0.0)
    pi_other, pi_not_max = (pi_TV.exp() * outside).sum(-1), -torch.expm1(pi.max(-1).values)
    resolved = (pi_other == 0) | (pi_other > 1e-6 * pi_not_max)
    for binary, topk, full in ((binary_tv, topk_tv, full_tv), (binary_kl, topk_kl, full_kl)):
        d_binary, d_topk, d_full = binary(mu[:, -1], pi[:, -1]), topk(mu, pi, member), full(mu_TV, pi_TV)
        assert d_binary.isfinite().all() and d_topk.isfinite().all()
        assert (d_binary >= 0).all()
        assert (d_binary <= d_topk * (1 + 1e-8) + 1e-12).all()
        assert (d_topk <= d_full * (1 + 1e-8) + 1e-12)[resolved].all()

    # Float32 log-probs leave "other" an error near 1e-7, which TV passes on as it is. KL divides by it where
    # pi gives "other" less: finite and not negative is all that can be asked there.
    mu32, pi32 = mu.float(), pi.float()
    tv = topk_tv(mu32, pi32, member)
    assert (binary_tv(mu32[:, -1], pi32[:, -1]) <= tv + 1e-6).all()
    torch.testing.assert_close(tv.double(), topk_tv(mu, pi, member), rtol=0.0, atol=1e-6)
    torch.testing.assert_close(
        binary_kl(mu32[:, -1], pi32[:, -1]).double(), binary_kl(mu[:, -1], pi[:, -1]), rtol=1e-5, atol=1e-6
    )
    kl = topk_kl(mu32, pi32, member)
    assert kl.isfinite().all() and (kl >= 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_topk_of_the_whole_vocabulary_is_the_full_divergence(seed: int) -> None:
    mu_TV, pi_TV = policies(seed, tokens=32, vocabulary=12, scale=2.0, shift=1.0, zeros=0.0)
    ids = torch.arange(12).expand(32, 12)
    targets = torch.zeros(32, dtype=torch.int64)
    columns, member = torch.cat([ids, targets[:, None]], -1), topk_members(ids, targets)
    mu, pi = mu_TV.gather(-1, columns), pi_TV.gather(-1, columns)
    torch.testing.assert_close(topk_tv(mu, pi, member), full_tv(mu_TV, pi_TV), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(topk_kl(mu, pi, member), full_kl(mu_TV, pi_TV), rtol=1e-9, atol=1e-12)
