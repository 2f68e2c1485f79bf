"""Masks, caps and coefficients against hand-computed numbers, truth tables and autograd."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_dppo.algorithm.divergence import binary_kl, binary_tv, topk_kl, topk_members, topk_tv
from megatron_dppo.algorithm.objectives import (
    OBJECTIVES,
    DivergenceMask,
    Objective,
    RolloutTokens,
    TokenStats,
    coefficient,
    make_objective,
    token_sums,
)

INF = math.inf


def log(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log().float()


def stats_of(logprob: Tensor, **topk: Tensor) -> TokenStats:
    return TokenStats(logprob=logprob, entropy=torch.zeros_like(logprob), **topk)


def keep_of(objective: Objective, mu: float, pi: float, advantage: float, old: float | None = None) -> bool:
    """M_t of one token with these probabilities (`old`: recomputed)."""
    recomputed = None if old is None else log(old)
    rollout = RolloutTokens(torch.tensor([advantage]), log(mu), recomputed_logprob=recomputed)
    return bool(coefficient(objective, stats_of(log(pi)), rollout).keep)


# The paper's numbers -----------------------------------------------------------------------------


def test_the_papers_examples() -> None:
    """Section 4.2: 1e-4 -> 1e-2 is clipped by GRPO and kept by DPPO, 0.99 -> 0.80 the other way round."""
    mu, pi, advantage = log(1e-4, 0.99), log(1e-2, 0.80), torch.tensor([1.0, -1.0])
    rollout = RolloutTokens(advantage, mu)
    grpo = coefficient(make_objective("grpo_clip_higher"), stats_of(pi), rollout)
    dppo = coefficient(make_objective("dppo_binary_tv"), stats_of(pi), rollout)
    for result in (grpo, dppo):
        torch.testing.assert_close(result.ratio, torch.tensor([100.0, 0.8080808]), rtol=1e-5, atol=0.0)
        torch.testing.assert_close(result.divergence, torch.tensor([0.0099, 0.19]), rtol=1e-5, atol=0.0)
    assert grpo.keep.tolist() == [False, True]
    assert dppo.keep.tolist() == [True, False]
    torch.testing.assert_close(grpo.value, torch.tensor([0.0, -0.8080808]), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(dppo.value, torch.tensor([100.0, 0.0]), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(("name", "cap"), [("pg_is", INF), ("pg_tis", 3.0), ("cispo", 3.0)])
def test_policy_gradients_keep_all_and_cap_the_ratio(name: str, cap: float) -> None:
    rollout = RolloutTokens(torch.tensor([2.0, -2.0, 0.5]), log(0.1, 0.1, 0.8))
    result = coefficient(make_objective(name), stats_of(log(0.9, 0.9, 0.4)), rollout)
    assert result.keep.all()
    torch.testing.assert_close(result.ratio, torch.tensor([9.0, 9.0, 0.5]), rtol=1e-6, atol=0.0)
    expected = torch.tensor([2 * min(9.0, cap), -2 * min(9.0, cap), 0.25])
    torch.testing.assert_close(result.value, expected, rtol=1e-6, atol=0.0)


def numbers_of(objective: Objective) -> tuple[Any, ...]:
    mask = objective.mask
    if isinstance(mask, DivergenceMask):
        return objective.cap, objective.anchor, mask.delta_low, mask.delta_high, objective.top_k
    return objective.cap, objective.anchor, *(vars(mask).values() if mask else ())


# name: sanity (Appendix D, sections 5 and 6), scaling, lora (Appendix F)
PAPER: dict[str, tuple[tuple[Any, ...], ...]] = {
    "dppo_binary_tv": (
        (INF, "rollout", 0.15, 0.15, 0),
        (5.0, "rollout", 0.2, 0.2, 0),
        (5.0, "rollout", 0.15, 0.15, 0),
    ),
    "dppo_binary_kl": ((INF, "rollout", 0.05, 0.05, 0), *[(5.0, "rollout", 0.05, 0.05, 0)] * 2),
    "dppo_topk_tv": (
        (INF, "rollout", 0.15, 0.15, 20),
        (5.0, "rollout", 0.2, 0.2, 20),
        (5.0, "rollout", 0.15, 0.15, 20),
    ),
    "dppo_topk_kl": ((INF, "rollout", 0.05, 0.05, 20), *[(5.0, "rollout", 0.05, 0.05, 20)] * 2),
    "grpo_clip_higher": ((INF, "rollout", 0.2, 0.28), *[(5.0, "rollout", 0.2, 0.27)] * 2),
    "grpo_relaxed_clip": (
        (INF, "rollout", 0.2, 0.28, 0.1, "both"),
        *[(5.0, "rollout", 0.2, 0.27, 0.1, "both")] * 2,
    ),
    "minirl": ((INF, "recomputed", 0.2, 0.28), *[(5.0, "recomputed", 0.2, 0.27)] * 2),
    "minirl_tis": ((3.0, "recomputed", 0.2, 0.28), *[(5.0, "recomputed", 0.2, 0.27)] * 2),
    "minimal_mask": ((INF, "rollout", 0.5), *[(5.0, "rollout", 0.5)] * 2),
    "pg_is": ((INF, "rollout"), *[(5.0, "rollout")] * 2),
    "pg_tis": ((3.0, "rollout"), *[(5.0, "rollout")] * 2),
    "cispo": ((3.0, "rollout"), *[(5.0, "rollout")] * 2),
}
PAPER |= {
    f"{name}_decoupled": tuple((row[0], "recomputed", *row[2:]) for row in PAPER[name])
    for name in ("dppo_binary_tv", "dppo_binary_kl", "dppo_topk_tv", "dppo_topk_kl")
}


def test_every_objective_is_listed_here() -> None:
    assert PAPER.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize("name", PAPER)
def test_presets_are_the_papers_numbers(name: str) -> None:
    for preset, expected in zip(("sanity", "scaling", "lora"), PAPER[name], strict=True):
        objective = make_objective(name, preset=preset)  # type: ignore[arg-type]
        assert objective.name == name
        assert numbers_of(objective) == expected
    assert make_objective(name) == make_objective(name, preset="sanity")


def test_overrides() -> None:
    one_sided = make_objective("dppo_binary_tv", delta_low=0.3, delta_high=INF, cap=4, anchor="recomputed")
    assert numbers_of(one_sided) == (4, "recomputed", 0.3, INF, 0)
    assert numbers_of(make_objective("dppo_topk_kl", delta=0.1, top_k=8)) == (INF, "rollout", 0.1, 0.1, 8)
    assert numbers_of(make_objective("minimal_mask", delta=0.8, anchor="recomputed")) == (
        INF,
        "recomputed",
        0.8,
    )
    relaxed = make_objective("grpo_relaxed_clip", preset="scaling", alpha=0.2, relax="low", eps_low=0.1)
    assert numbers_of(relaxed) == (5.0, "rollout", 0.1, 0.27, 0.2, "low")


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("dppo", {}, "objective: got 'dppo', expected one of cispo, dppo_binary_kl, "),
        ("pg_is", {"preset": "big"}, "preset: got 'big', expected one of sanity, scaling, lora"),
        (
            "dppo_binary_tv",
            {"top_k": 20},
            "dppo_binary_tv: got top_k, which it does not use, expected anchor, ",
        ),
        (
            "grpo_clip_higher",
            {"alpha": 0.1, "delta": 1},
            "grpo_clip_higher: got alpha, delta, which it does not",
        ),
        ("minimal_mask", {"delta_high": 0.5}, "got delta_high, which it does not use"),
        ("cispo", {"anchor": "recomputed"}, "cispo: got anchor, which it does not use, expected cap"),
        ("dppo_topk_tv", {"divergence": "topk_kl"}, "got divergence, which it does not use"),
        (
            "dppo_binary_kl",
            {"delta": 0.1, "delta_low": 0.2},
            "got delta and delta_low, expected one or the other",
        ),
        ("dppo_binary_kl", {"delta": 0}, r"delta_\w+: got 0, expected > 0"),
        ("dppo_binary_kl", {"delta_low": math.nan}, "delta_low: got nan, expected > 0"),
        ("grpo_clip_higher", {"eps_high": -0.1}, "eps_high: got -0.1, expected > 0"),
        ("dppo_topk_kl", {"top_k": 0}, "top_k: got 0 for topk_kl, expected >= 1"),
        ("grpo_relaxed_clip", {"alpha": 1.5}, r"alpha: got 1.5, expected a probability in \[0, 1\]"),
        ("grpo_relaxed_clip", {"relax": "none"}, "relax: got 'none', expected one of both, high, low"),
        ("cispo", {"cap": 0.5}, "cap: got 0.5, expected C >= 1"),
        ("minirl", {"anchor": "old"}, "anchor: got 'old', expected one of rollout, recomputed"),
    ],
)
def test_refusals(name: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_objective(name, **overrides)


def test_an_anchor_without_a_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="anchor: got 'recomputed', expected 'rollout': mine has no mask"):
        Objective("mine", mask=None, anchor="recomputed")


# Masks: sign(A) x (r < 1, r = 1, r > 1) x (D below, equal to, above the threshold) ------------------


UP, DOWN = (0.4, 0.6), (0.6, 0.4)  # mu -> pi: r = 1.5, 0.667; TV .2


def topk_stats(mu: Tensor, pi: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """K+1 columns: the sampled token, K-1 absent ones, and the sampled token again (no member)."""
    ids = torch.full((len(mu), columns - 1), -1)
    ids[:, 0] = 7
    member = topk_members(ids, torch.full((len(mu),), 7))
    return mu[:, None].expand(-1, columns), pi[:, None].expand(-1, columns), member


@pytest.mark.parametrize("anchor", ["rollout", "recomputed"])
@pytest.mark.parametrize("kind", ["binary_tv", "binary_kl", "topk_tv", "topk_kl"])
def test_dppo_truth_table(kind: str, anchor: str) -> None:
    """Eq. 12: blocked if and only if D > delta (strictly) and the token moves further away."""
    name = f"dppo_{kind}" + ("_decoupled" if anchor == "recomputed" else "")
    for (old, pi), sign, side in itertools.product((UP, DOWN), (1.0, 0.0, -1.0), ("above", "equal", "below")):
        # mu sits on the other side of pi when the anchor is recomputed: only the anchor may decide.
        mu = old if anchor == "rollout" else 1 - old
        lp_old, lp_mu, lp_pi = log(old), log(mu), log(pi)
        exact = (binary_tv if kind.endswith("tv") else binary_kl)(lp_old, lp_pi).item()
        topk: dict[str, Tensor] = {}
        mu_topk = old_topk = None
        if kind.startswith("topk"):
            mu_topk, pi_topk, member = topk_stats(lp_mu, lp_pi, columns=21)
            old_topk = topk_stats(lp_old, lp_pi, columns=21)[0]
            topk = {"topk_logprob": pi_topk, "member": member}
            exact = (topk_tv if kind.endswith("tv") else topk_kl)(old_topk, pi_topk, member).item()
        delta = {"above": exact * 0.99, "equal": exact, "below": exact * 1.01}[side]  # D is ... delta
        rollout = RolloutTokens(torch.tensor([sign]), lp_mu, mu_topk, lp_old, old_topk)
        result = coefficient(make_objective(name, delta=delta), stats_of(lp_pi, **topk), rollout)
        away = sign * (pi - old) > 0
        assert bool(result.keep) == (not (away and side == "above")), (old, pi, sign, side)
        assert result.divergence.item() == exact
        value = pi / mu * sign if result.keep else 0.0  # the ratio is against the rollout policy, always
        assert result.value.item() == pytest.approx(value, rel=1e-5)


def test_dppo_thresholds_are_by_the_sign_of_the_advantage() -> None:
    only_low = make_objective("dppo_binary_tv", delta_low=0.1, delta_high=INF)
    assert keep_of(only_low, *UP, 1.0) and not keep_of(only_low, *DOWN, -1.0)
    only_high = make_objective("dppo_binary_tv", delta_low=INF, delta_high=0.1)
    assert not keep_of(only_high, *UP, 1.0) and keep_of(only_high, *DOWN, -1.0)


def test_topk_sees_a_move_that_binary_does_not() -> None:
    """The sampled token hardly moves (.1 -> .11) while the two most probable ones trade .4 of mass."""
    mu, pi = log(0.6, 0.2, 0.1)[None], log(0.2, 0.6, 0.11)[None]
    member = topk_members(torch.tensor([[0, 1]]), torch.tensor([2]))
    rollout = RolloutTokens(torch.ones(1), mu[:, -1], mu)
    stats = stats_of(pi[:, -1], topk_logprob=pi, member=member)
    assert coefficient(make_objective("dppo_binary_tv"), stats, rollout).keep.item()
    topk = coefficient(make_objective("dppo_topk_tv", top_k=2), stats, rollout)
    assert topk.divergence.item() == pytest.approx(0.5 * (0.4 + 0.4 + 0.01 + 0.01), rel=1e-5)
    assert not topk.keep.item()


@pytest.mark.parametrize(
    ("ratio", "kept_positive", "kept_negative"),
    [(0.5, True, False), (0.79, True, False), (0.81, True, True), (1.0, True, True), (1.27, True, True)]
    + [(1.29, False, True), (2.0, False, True)],
)
def test_clip_truth_table(ratio: float, kept_positive: bool, kept_negative: bool) -> None:
    """Appendix D: r > 1.28 with A > 0, r < 0.8 with A < 0; MiniRL the same against the recomputed policy."""
    grpo, minirl = make_objective("grpo_clip_higher"), make_objective("minirl")
    for advantage, kept in ((1.0, kept_positive), (-1.0, kept_negative), (0.0, True)):
        assert keep_of(grpo, 0.4, 0.4 * ratio, advantage) == kept
        assert keep_of(minirl, mu=0.9, pi=0.4 * ratio, advantage=advantage, old=0.4) == kept


def test_clip_is_strict_at_its_bounds() -> None:
    """With eps the distance of r from 1 to the last bit, r is kept; a shade less, and it is blocked."""
    for r, sign, side in ((1.5, 1.0, "eps_high"), (0.6, -1.0, "eps_low")):
        pi = torch.tensor([math.log(r) - 3], dtype=torch.float64)
        mu = pi - math.log(r)
        ratio = (pi - mu).exp().item()
        eps = abs(ratio - 1)
        assert 1 + sign * eps == ratio, "or this says nothing about equality"
        rollout = RolloutTokens(torch.tensor([sign], dtype=torch.float64), mu)
        for value, kept in ((eps, True), (eps - 1e-9, False)):
            overrides: dict[str, Any] = {side: value}
            objective = make_objective("grpo_clip_higher", **overrides)
            assert bool(coefficient(objective, stats_of(pi), rollout).keep) == kept


@pytest.mark.parametrize("relax", ["both", "high", "low"])
@pytest.mark.parametrize("mu", [0.05, 0.15])
def test_relaxed_clip(mu: float, relax: str) -> None:
    """Section 6: eps is infinite on the relaxed side, for mu < alpha = 0.1 only."""
    objective = make_objective("grpo_relaxed_clip", relax=relax)
    rare = mu < 0.1
    assert keep_of(objective, mu, 2 * mu, 1.0) == (rare and relax in ("both", "high"))
    assert keep_of(objective, mu, mu / 2, -1.0) == (rare and relax in ("both", "low"))
    assert keep_of(objective, mu, 2 * mu, -1.0) and keep_of(objective, mu, mu / 2, 1.0)


def test_relaxed_clip_with_alpha_zero_is_the_clip() -> None:
    g = torch.Generator().manual_seed(0)
    mu, pi = -8 * torch.rand(500, generator=g), -8 * torch.rand(500, generator=g)
    rollout = RolloutTokens(torch.randn(500, generator=g), mu)
    relaxed = coefficient(make_objective("grpo_relaxed_clip", alpha=0), stats_of(pi), rollout)
    clip = coefficient(make_objective("grpo_clip_higher"), stats_of(pi), rollout)
    assert 0 < clip.keep.sum() < 500
    assert torch.equal(relaxed.keep, clip.keep) and torch.equal(relaxed.value, clip.value)


@pytest.mark.parametrize("anchor", ["rollout", "recomputed"])
def test_minimal_mask_truth_table(anchor: str) -> None:
    """Section 5.3: blocked if and only if A < 0 and anchor - pi >= delta, equality included."""
    for (old, pi), sign, side in itertools.product(
        ((0.9, 0.2), (0.2, 0.9)), (1.0, 0.0, -1.0), ("above", "equal", "below")
    ):
        fall = binary_tv(log(old), log(pi)).item()
        delta = {"above": fall * 0.99, "equal": fall, "below": fall * 1.01}[side]
        mu = old if anchor == "rollout" else pi
        objective = make_objective("minimal_mask", delta=delta, anchor=anchor)
        blocked = sign < 0 and pi < old and side != "below"
        assert keep_of(objective, mu, pi, sign, old=old) == (not blocked), (old, pi, sign, side)


@pytest.mark.parametrize(("delta", "kept"), [(0.5, False), (0.8, True)])
def test_minimal_mask_of_the_paper(delta: float, kept: bool) -> None:
    assert keep_of(make_objective("minimal_mask", delta=delta), 0.9, 0.3, -1.0) == kept


# Missing and extreme inputs -----------------------------------------------------------------------


def test_what_an_objective_needs_is_asked_for_by_name() -> None:
    rollout, stats = RolloutTokens(torch.ones(1), log(0.5)), stats_of(log(0.6))
    with pytest.raises(ValueError, match="minirl: got no recomputed_logprob, expected f32.T. for anchor"):
        coefficient(make_objective("minirl"), stats, rollout)
    with pytest.raises(ValueError, match="dppo_topk_kl: got no Top-K log-probs, .*record top_k=20 at rollout"):
        coefficient(make_objective("dppo_topk_kl"), stats, rollout)
    with_topk = stats_of(log(0.6), topk_logprob=log(0.6, 0.6)[None], member=torch.tensor([[True, False]]))
    with pytest.raises(ValueError, match="dppo_topk_tv_decoupled: got no Top-K .* recomputed policy"):
        only_mu = RolloutTokens(torch.ones(1), log(0.5), log(0.5, 0.5)[None], recomputed_logprob=log(0.5))
        coefficient(make_objective("dppo_topk_tv_decoupled", top_k=1), with_topk, only_mu)
    with pytest.raises(ValueError, match=r"dppo_topk_tv: got 2 Top-K columns, expected K \+ 1 = 21"):
        coefficient(make_objective("dppo_topk_tv"), with_topk, replace(rollout, topk_logprob=log(0.5, 0.5)[None]))


EXTREMES = [-INF, -9999.0, -100.0, -30.0, math.log(0.5), -1e-8, 0.0, 1e-7]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_coefficients_are_finite_at_probabilities_zero_and_one(name: str) -> None:
    rows = torch.tensor(list(itertools.product(EXTREMES, EXTREMES, EXTREMES, [-1.0, 0.0, 1.0])))
    mu, pi, old, advantage = rows.unbind(-1)
    objective = make_objective(name)
    mu_topk, pi_topk, member = topk_stats(mu, pi, columns=objective.top_k + 1 if objective.top_k else 2)
    old_topk = topk_stats(old, pi, columns=mu_topk.shape[1])[0]
    stats = stats_of(pi, topk_logprob=pi_topk, member=member)
    result = coefficient(objective, stats, RolloutTokens(advantage, mu, mu_topk, old, old_topk))
    assert result.value.isfinite().all() and result.ratio.isfinite().all() and result.divergence.isfinite().all()
    assert (result.value[advantage == 0] == 0).all() and (result.value[~result.keep] == 0).all()
    assert ((result.value > 0) == (result.keep & (advantage > 0))).all()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    name=st.sampled_from([name for name, objective in OBJECTIVES.items() if not objective.top_k]),
    token=st.tuples(*[st.floats(max_value=0, width=32, allow_nan=False)] * 3),
    advantage=st.floats(-100, 100, width=32),
)
def test_coefficients_are_finite(name: str, token: tuple[float, float, float], advantage: float) -> None:
    mu, pi, old = (torch.tensor([x]) for x in token)
    rollout = RolloutTokens(torch.tensor([advantage]), mu, recomputed_logprob=old)
    value = coefficient(make_objective(name), stats_of(pi), rollout).value
    assert value.isfinite().all()
    assert (value / max(abs(advantage), 1)).square().isfinite().all()  # gradient norms square it


@pytest.mark.parametrize("name", ["dppo_binary_kl", "grpo_clip_higher", "minimal_mask", "pg_is"])
def test_a_missing_logprob_stops_the_run(name: str) -> None:
    """It must not pass as "inside the trust region"; the trainer looks for non-finite losses."""
    nan = torch.tensor([math.nan])
    objective = make_objective(name)
    assert coefficient(objective, stats_of(nan), RolloutTokens(torch.ones(1), log(0.5))).value.isnan()
    assert coefficient(objective, stats_of(log(0.5)), RolloutTokens(torch.ones(1), nan)).value.isnan()
    if objective.mask:
        anchored = replace(objective, anchor="recomputed")
        rollout = RolloutTokens(torch.ones(1), log(0.5), recomputed_logprob=nan)
        assert coefficient(anchored, stats_of(log(0.5)), rollout).value.isnan()


# Gradients ----------------------------------------------------------------------------------------


def softmax_problem(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """theta [T, V] (60 tokens, logits of pi), log mu and log old [T, V], sampled ids and advantages [T], in float64."""
    g = torch.Generator().manual_seed(seed)
    theta = torch.randn(60, 5, generator=g, dtype=torch.float64)
    mu_TV = (theta + 0.7 * torch.randn(theta.shape, generator=g, dtype=torch.float64)).log_softmax(-1)
    old_TV = (theta + 0.7 * torch.randn(theta.shape, generator=g, dtype=torch.float64)).log_softmax(-1)
    ids = torch.multinomial(mu_TV.exp(), 1, generator=g)[:, 0]
    advantage = torch.randn(60, generator=g, dtype=torch.float64)
    return theta.requires_grad_(), mu_TV, old_TV, ids, advantage


def picked(x_TV: Tensor, ids: Tensor) -> Tensor:
    return x_TV.gather(-1, ids[:, None])[:, 0]


# The masks once more, in plain Python from the paper: kept(A, mu, old, pi) for the probabilities of a_t.
def kl(m: float, p: float) -> float:
    return m * math.log(m / p) + (1 - m) * math.log((1 - m) / (1 - p))


def moved(a: float, m: float, p: float, far: bool) -> bool:
    return (a > 0 and p / m > 1 and far) or (a < 0 and p / m < 1 and far)


def clipped(a: float, r: float) -> bool:
    return (a > 0 and r > 1.28) or (a < 0 and r < 0.8)


KEPT: dict[str, tuple[Callable[[float, float, float, float], bool], float]] = {
    "pg_is": (lambda a, m, o, p: True, INF),
    "cispo": (lambda a, m, o, p: True, 3.0),
    "grpo_clip_higher": (lambda a, m, o, p: not clipped(a, p / m), INF),
    "grpo_relaxed_clip": (lambda a, m, o, p: m < 0.1 or not clipped(a, p / m), INF),
    "minirl": (lambda a, m, o, p: not clipped(a, p / o), INF),
    "minirl_tis": (lambda a, m, o, p: not clipped(a, p / o), 3.0),
    "minimal_mask": (lambda a, m, o, p: not (a < 0 and m - p >= 0.5), INF),
    "dppo_binary_tv": (lambda a, m, o, p: not moved(a, m, p, abs(m - p) > 0.15), INF),
    "dppo_binary_kl": (lambda a, m, o, p: not moved(a, m, p, kl(m, p) > 0.05), INF),
    "dppo_binary_tv_decoupled": (lambda a, m, o, p: not moved(a, o, p, abs(o - p) > 0.15), INF),
    "dppo_binary_kl_decoupled": (lambda a, m, o, p: not moved(a, o, p, kl(o, p) > 0.05), INF),
}


@pytest.mark.parametrize("name", KEPT)
def test_gradient_is_equation_23(name: str) -> None:
    """d/dtheta of -sum(coefficient * logprob), by autograd, against Eq. 23 summed in an independent loop."""
    theta, mu_TV, old_TV, ids, advantage = softmax_problem(seed=3)
    logprob = picked(theta.log_softmax(-1), ids)
    rollout = RolloutTokens(advantage, picked(mu_TV, ids), recomputed_logprob=picked(old_TV, ids))
    result = coefficient(make_objective(name), stats_of(logprob.detach()), rollout)
    assert not result.value.requires_grad
    (gradient,) = torch.autograd.grad(-(result.value * logprob).sum(), theta)

    kept, cap = KEPT[name]
    pi_TV = theta.detach().softmax(-1)
    expected = torch.zeros_like(theta)
    for t, (y, a) in enumerate(zip(ids.tolist(), advantage.tolist(), strict=True)):
        m, o, p = (x[t, y].item() for x in (mu_TV.exp(), old_TV.exp(), pi_TV))
        for v in range(theta.shape[1]):
            grad_log_pi = (v == y) - pi_TV[t, v].item()
            expected[t, v] = -kept(a, m, o, p) * min(p / m, cap) * a * grad_log_pi
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    if name not in ("pg_is", "cispo", "minimal_mask"):
        assert 3 < (~result.keep).sum() < 50, "the example must exercise the mask"
    if cap < INF:
        assert (result.ratio > cap).any(), "the example must exercise the cap"


@pytest.mark.parametrize("seed", range(3))
def test_grpo_is_the_gradient_of_the_clipped_objective(seed: int) -> None:
    """Eq. 9 with clip-higher, differentiated by autograd, equals the masked form at C = inf."""
    theta, mu_TV, _, ids, advantage = softmax_problem(seed)
    logprob, mu = picked(theta.log_softmax(-1), ids), picked(mu_TV, ids)
    ratio = (logprob - mu).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - 0.2, 1 + 0.28) * advantage).sum()
    (expected,) = torch.autograd.grad(-surrogate, theta, retain_graph=True)
    result = coefficient(make_objective("grpo_clip_higher"), stats_of(logprob.detach()), RolloutTokens(advantage, mu))
    (gradient,) = torch.autograd.grad(-(result.value * logprob).sum(), theta)
    assert 0 < result.keep.sum() < len(ids)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


# Slices and metrics -------------------------------------------------------------------------------


def test_a_slice_of_tokens_has_the_coefficients_of_the_whole() -> None:
    g = torch.Generator().manual_seed(1)
    mu, pi = (torch.randn(40, 9, generator=g).log_softmax(-1) for _ in range(2))
    targets, ids = torch.randint(9, (40,), generator=g), mu.topk(4).indices
    columns = torch.cat([ids, targets[:, None]], -1)
    mu_topk, pi_topk = mu.gather(-1, columns), pi.gather(-1, columns)
    rollout = RolloutTokens(torch.randn(40, generator=g), picked(mu, targets), mu_topk)
    stats = stats_of(picked(pi, targets), topk_logprob=pi_topk, member=topk_members(ids, targets))
    objective = make_objective("dppo_topk_kl", top_k=4)
    whole = coefficient(objective, stats, rollout)
    part = coefficient(objective, stats[10:25], rollout[10:25])
    assert rollout[10:25].recomputed_logprob is None and rollout[10:25].topk_logprob is not None
    assert 0 < whole.keep.sum() < 40
    for field in ("value", "keep", "ratio", "divergence"):
        assert torch.equal(getattr(part, field), getattr(whole[10:25], field))


def test_token_sums_by_hand() -> None:
    mu, pi = log(0.4, 0.8, 0.5, 0.9, 0.5), log(0.6, 0.2, 0.5, 0.8, 0.6)
    advantage = torch.tensor([1.0, -1.0, 1.0, -2.0, 0.0])
    rollout = RolloutTokens(advantage, mu)
    stats = TokenStats(pi, entropy=torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]))
    sums = token_sums(stats, rollout, coefficient(make_objective("dppo_binary_tv"), stats, rollout))
    ratios = [1.5, 0.25, 1.0, 8 / 9, 1.2]
    expected = {
        "tokens": 5,
        "abs_pi_minus_mu": 0.2 + 0.6 + 0.1 + 0.1,
        "entropy": 1.5,
        "divergence": 1.0,
        "kl_mu_pi": sum(r - 1 - math.log(r) for r in ratios),
        "positive": 2,
        "negative": 2,
        "masked_positive": 1,
        "masked_negative": 1,
        "bad_updates": 1,
    }
    assert sums.keys() == expected.keys()
    for name, value in expected.items():
        assert sums[name].item() == pytest.approx(value, rel=1e-6), name


def test_token_sums_of_no_tokens_are_zero() -> None:
    rollout = RolloutTokens(torch.empty(0), torch.empty(0))
    stats = stats_of(torch.empty(0))
    sums = token_sums(stats, rollout, coefficient(make_objective("dppo_binary_kl"), stats, rollout))
    assert {value.item() for value in sums.values()} == {0.0}
