"""Every objective of the paper as one number per token.

The gradient of all of them is Eq. 23,

    sum_t  M_t * min(pi(a_t) / mu(a_t), C) * A_t * grad log pi(a_t),

so an objective is a mask M_t and a cap C. `coefficient` computes M_t * min(r_t, C) * A_t without gradient;
the loss is -sum(coefficient * logprob). The ratio that weights the gradient is always pi / mu, against the
policy that sampled. The mask compares pi with the *anchor*: mu as the engine recorded it ("rollout", which
section 5.2 advises) or the old policy as the trainer recomputes it ("recomputed": MiniRL and the decoupled
variants).

Reading order: the masks, `OBJECTIVES` (Appendix D as a table), `coefficient` and `_blocked`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from megatron_dppo.algorithm.divergence import binary_kl, binary_tv, topk_kl, topk_tv

Anchor = Literal["rollout", "recomputed"]
Divergence = Literal["binary_tv", "binary_kl", "topk_tv", "topk_kl"]
Preset = Literal["sanity", "scaling", "lora"]
Relax = Literal["both", "high", "low"]

MAX_LOG_RATIO = 40.0  # exp(40) is finite in float32, and so is its square (gradient norms)


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name}: got {number}, expected > 0 (inf leaves that side free)")


def _check_choice(what: str, got: str, choices: Any) -> None:
    if got not in get_args(choices):
        raise ValueError(f"{what}: got {got!r}, expected one of {', '.join(get_args(choices))}")


@dataclass(frozen=True)
class DivergenceMask:
    """DPPO (Eq. 12): blocks a token that moves away from the anchor where the divergence D exceeds delta.

    `delta_high` holds where A > 0, `delta_low` where A < 0; inf leaves that side free. `top_k`: K of Eqs. 15,
    16.
    """

    divergence: Divergence
    delta_low: float
    delta_high: float
    top_k: int = 0

    def __post_init__(self) -> None:
        _check_choice("divergence", self.divergence, Divergence)
        _check_positive(delta_low=self.delta_low, delta_high=self.delta_high)
        if self.divergence.startswith("topk") != (self.top_k >= 1):
            raise ValueError(f"top_k: got {self.top_k} for {self.divergence}, expected >= 1 for Top-K, 0 for Binary")


@dataclass(frozen=True)
class RatioClip:
    """PPO's clip (Eq. 9) as a mask (App. D): blocks A > 0, r > 1 + eps_high and A < 0, r < 1 - eps_low."""

    eps_low: float = 0.2
    eps_high: float = 0.28

    def __post_init__(self) -> None:
        _check_positive(eps_low=self.eps_low, eps_high=self.eps_high)


@dataclass(frozen=True)
class RelaxedClip(RatioClip):
    """`RatioClip` whose eps is infinite on the `relax` side for tokens with mu < alpha (section 6)."""

    alpha: float = 0.1
    relax: Relax = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("relax", self.relax, Relax)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: got {self.alpha}, expected a probability in [0, 1] (0 relaxes no token)")


@dataclass(frozen=True)
class MinimalMask:
    """Section 5.3: blocks only A < 0 where the token's probability has fallen by delta_low or more."""

    delta_low: float = 0.5

    def __post_init__(self) -> None:
        _check_positive(delta_low=self.delta_low)


Mask = DivergenceMask | RatioClip | MinimalMask | None


@dataclass(frozen=True)
class Objective:
    """A mask (None: M_t = 1), the policy it is anchored to, and the cap C of Eq. 23 (inf: none).

    Raises ValueError for a cap below 1, an unknown anchor, or a recomputed anchor that no mask would use.
    """

    name: str
    mask: Mask
    anchor: Anchor = "rollout"
    cap: float = math.inf

    def __post_init__(self) -> None:
        _check_choice("anchor", self.anchor, Anchor)
        if not self.cap >= 1:
            raise ValueError(f"cap: got {self.cap}, expected C >= 1 (inf for none)")
        if self.mask is None and self.anchor != "rollout":
            raise ValueError(f"anchor: got {self.anchor!r}, expected 'rollout': {self.name} has no mask to anchor")

    @property
    def top_k(self) -> int:
        """K, how many of mu's most probable tokens must be recorded; 0 where the sampled one is enough."""
        return self.mask.top_k if isinstance(self.mask, DivergenceMask) else 0


_DPPO = (
    Objective("dppo_binary_tv", DivergenceMask("binary_tv", delta_low=0.15, delta_high=0.15)),
    Objective("dppo_binary_kl", DivergenceMask("binary_kl", delta_low=0.05, delta_high=0.05)),
    Objective("dppo_topk_tv", DivergenceMask("topk_tv", delta_low=0.15, delta_high=0.15, top_k=20)),
    Objective("dppo_topk_kl", DivergenceMask("topk_kl", delta_low=0.05, delta_high=0.05, top_k=20)),
)

# The numbers of the sanity test (sections 5 and 6, Appendix D).
OBJECTIVES: Mapping[str, Objective] = {
    objective.name: objective
    for objective in (
        *_DPPO,
        *(replace(dppo, name=f"{dppo.name}_decoupled", anchor="recomputed") for dppo in _DPPO),
        Objective("grpo_clip_higher", RatioClip()),
        Objective("grpo_relaxed_clip", RelaxedClip()),
        Objective("minirl", RatioClip(), anchor="recomputed"),
        Objective("minirl_tis", RatioClip(), anchor="recomputed", cap=3.0),
        Objective("minimal_mask", MinimalMask()),
        Objective("pg_is", mask=None),
        Objective("pg_tis", mask=None, cap=3.0),
        Objective("cispo", mask=None, cap=3.0),  # another name of pg_tis
    )
}


def make_objective(name: str, *, preset: Preset = "sanity", **overrides: Any) -> Objective:
    """The objective called `name`, with the paper's numbers except those given here.

    Args:
        name: a key of `OBJECTIVES`.
        preset: "sanity" (Appendix D), or the scaling runs (Appendix F) without and with LoRA, "scaling" and
            "lora": C = 5 for *every* objective (pg_is and cispo then coincide), eps_high 0.27, and for TV
            delta 0.2 and 0.15.
        overrides: `cap` and, where there is a mask, `anchor` and the fields of that mask: `delta_low` and
            `delta_high` (or `delta` for all there are), `top_k`, `eps_low`, `eps_high`, `alpha`, `relax`.

    Raises:
        ValueError: unknown name or preset, an override this objective does not use, a number out of range.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective: got {name!r}, expected one of {', '.join(sorted(OBJECTIVES))}")
    _check_choice("preset", preset, Preset)
    objective = _apply_preset(OBJECTIVES[name], preset)

    of_mask = _tunable(objective.mask)
    deltas = {field for field in of_mask if field.startswith("delta_")}
    usable = {"cap"} | of_mask | ({"anchor"} if objective.mask else set()) | ({"delta"} if deltas else set())
    if unused := sorted(overrides.keys() - usable):
        raise ValueError(
            f"{name}: got {', '.join(unused)}, which it does not use, expected {', '.join(sorted(usable))}"
        )
    if "delta" in overrides:
        if both := sorted(deltas & overrides.keys()):
            raise ValueError(f"{name}: got delta and {', '.join(both)}, expected one or the other")
        overrides |= dict.fromkeys(deltas, overrides.pop("delta"))

    changes = {field: overrides.pop(field) for field in of_mask & overrides.keys()}
    mask = replace(objective.mask, **changes) if objective.mask else None
    return replace(objective, mask=mask, **overrides)


def _apply_preset(objective: Objective, preset: Preset) -> Objective:
    if preset == "sanity":
        return objective
    mask = objective.mask
    if isinstance(mask, RatioClip):
        mask = replace(mask, eps_high=0.27)
    if isinstance(mask, DivergenceMask) and mask.divergence.endswith("tv") and preset == "scaling":
        mask = replace(mask, delta_low=0.2, delta_high=0.2)
    return replace(objective, mask=mask, cap=5.0)


def _tunable(mask: Mask) -> set[str]:
    """Names of the numbers in a mask; which divergence it measures is said by the objective's name."""
    if mask is None:
        return set()
    is_binary = isinstance(mask, DivergenceMask) and mask.top_k == 0
    return {field.name for field in fields(mask)} - {"divergence"} - ({"top_k"} if is_binary else set())


@dataclass(frozen=True)
class _PerToken:
    """Tensors whose first axis is the token; `x[start:stop]` cuts all of them."""

    def __getitem__(self, tokens: slice) -> Self:
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: tensor[tokens] for name, tensor in tensors.items() if tensor is not None})


@dataclass(frozen=True)
class TokenStats(_PerToken):
    """What the policy head measures under pi for the T counted tokens; detached."""

    logprob: Tensor  # f32[T], log pi(a_t)
    entropy: Tensor  # f32[T], nats
    topk_logprob: Tensor | None = None  # f32[T, K+1], log pi of mu's K recorded ids and, last, of a_t
    member: Tensor | None = None  # bool[T, K+1], see divergence.topk_members


@dataclass(frozen=True)
class RolloutTokens(_PerToken):
    """What the trainer knows beforehand of the same T tokens: advantages and policies to compare with."""

    advantage: Tensor  # f32[T]
    logprob: Tensor  # f32[T], log mu(a_t) as recorded by the engine
    topk_logprob: Tensor | None = None  # f32[T, K+1], log mu in the columns of TokenStats.topk_logprob
    recomputed_logprob: Tensor | None = None  # f32[T], of the old policy, recomputed by the trainer
    recomputed_topk_logprob: Tensor | None = None  # f32[T, K+1], the same at mu's recorded ids
    reference_logprob: Tensor | None = None  # f32[T], of a frozen policy (`reference_kl`)


@dataclass(frozen=True)
class Coefficient(_PerToken):
    """What an objective says about T tokens."""

    value: Tensor  # f32[T], M_t * min(pi / mu, C) * A_t
    keep: Tensor  # bool[T], M_t
    ratio: Tensor  # f32[T], pi / mu, before the cap
    divergence: Tensor  # f32[T], the D compared with delta; |pi - mu| where the mask uses none


@torch.no_grad()
def coefficient(objective: Objective, stats: TokenStats, rollout: RolloutTokens) -> Coefficient:
    """M_t * min(pi / mu, C) * A_t of Eq. 23 for T tokens. No collectives, no host synchronisation.

    Finite for every log-prob in [-inf, 0]: log ratios are clamped to +-40. NaN inputs come out as NaN values,
    for the trainer's check of the loss to find. With a recomputed anchor, Top-K divergences keep the set A'
    of the ids recorded for mu and take the anchor's probabilities on it from `recomputed_topk_logprob`.

    Raises:
        ValueError: the objective needs recomputed or Top-K log-probs that are not there.
    """
    anchor, anchor_topk = _anchor_logprobs(objective, rollout)
    ratio = _ratio(stats.logprob, rollout.logprob)
    anchor_ratio = _ratio(stats.logprob, anchor)
    divergence = _divergence(objective, stats, rollout, anchor, anchor_topk)
    keep = ~_blocked(
        objective.mask,
        advantage=rollout.advantage,
        ratio=anchor_ratio,
        divergence=divergence,
        mu=rollout.logprob.double().exp(),
    )
    value = torch.where(keep, ratio.clamp(max=objective.cap) * rollout.advantage, 0.0)
    # NaN exceeds no threshold: a missing log-prob must stop the run, not switch the mask off.
    value = value.masked_fill((anchor_ratio + divergence).isnan(), math.nan)
    dtype = stats.logprob.dtype
    return Coefficient(value.to(dtype), keep, ratio.to(dtype), divergence)


def _blocked(mask: Mask, *, advantage: Tensor, ratio: Tensor, divergence: Tensor, mu: Tensor) -> Tensor:
    """1 - M_t. `ratio` and `divergence` are against the anchor, `mu` the rollout policy's probabilities."""
    # Only a token that moves away from the anchor is ever blocked: one to rise further, one to fall further.
    rising = (advantage > 0) & (ratio > 1)
    falling = (advantage < 0) & (ratio < 1)
    match mask:
        case None:
            return torch.zeros_like(rising)
        case DivergenceMask():  # Eq. 12
            return (rising & (divergence > mask.delta_high)) | (falling & (divergence > mask.delta_low))
        case MinimalMask():  # section 5.3, with >=; of a falling token |anchor - pi| is the fall
            return falling & (divergence >= mask.delta_low)
        case RatioClip():  # Appendix D
            too_high, too_low = ratio > 1 + mask.eps_high, ratio < 1 - mask.eps_low
            if isinstance(mask, RelaxedClip):  # section 6
                is_common = mu >= mask.alpha
                too_high = too_high if mask.relax == "low" else too_high & is_common
                too_low = too_low if mask.relax == "high" else too_low & is_common
            return (rising & too_high) | (falling & too_low)


def _divergence(
    objective: Objective,
    stats: TokenStats,
    rollout: RolloutTokens,
    anchor: Tensor,
    anchor_topk: Tensor | None,
) -> Tensor:
    match objective.mask:
        case DivergenceMask(divergence="binary_kl"):
            return binary_kl(anchor, stats.logprob)
        case DivergenceMask(divergence="binary_tv") | MinimalMask():
            return binary_tv(anchor, stats.logprob)
        case DivergenceMask(divergence=kind):
            if stats.topk_logprob is None or stats.member is None or anchor_topk is None:
                raise ValueError(
                    f"{objective.name}: got no Top-K log-probs, expected those of pi and of the "
                    f"{objective.anchor} policy; record top_k={objective.top_k} at rollout"
                )
            if stats.topk_logprob.shape[-1] != objective.top_k + 1:
                raise ValueError(
                    f"{objective.name}: got {stats.topk_logprob.shape[-1]} Top-K columns, expected K + 1 = "
                    f"{objective.top_k + 1}; record top_k={objective.top_k} at rollout"
                )
            topk = topk_kl if kind == "topk_kl" else topk_tv
            return topk(anchor_topk, stats.topk_logprob, stats.member)
        case _:
            return binary_tv(rollout.logprob, stats.logprob)


def _anchor_logprobs(objective: Objective, rollout: RolloutTokens) -> tuple[Tensor, Tensor | None]:
    if objective.anchor == "rollout":
        return rollout.logprob, rollout.topk_logprob
    if rollout.recomputed_logprob is None:
        raise ValueError(
            f"{objective.name}: got no recomputed_logprob, expected f32[T] for anchor 'recomputed'; "
            "compute it before the first gradient step, or set anchor to 'rollout'"
        )
    return rollout.recomputed_logprob, rollout.recomputed_topk_logprob


def _ratio(log_pi: Tensor, log_base: Tensor) -> Tensor:
    """pi / base in float64, within exp(+-MAX_LOG_RATIO)."""
    # The floor keeps -inf from meeting -inf; it lies far outside the clamp.
    log_ratio = log_pi.double().clamp(min=-1e4) - log_base.double().clamp(min=-1e4)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


# What `token_sums` may have; `step_metrics` makes a metric of each.
TOKEN_SUMS = (
    "tokens", "abs_pi_minus_mu", "entropy", "divergence", "kl_mu_pi", "topk_tv",
    "positive", "negative", "masked_positive", "masked_negative", "bad_updates",
)  # fmt: skip


@torch.no_grad()
def token_sums(stats: TokenStats, rollout: RolloutTokens, result: Coefficient) -> dict[str, Tensor]:
    """Sums over the T tokens (f64 scalars), to be added over micro-batches and ranks before dividing: all of
    `TOKEN_SUMS`, `topk_tv` where Top-K log-probs are there.

    Sums per token: `tokens`, `abs_pi_minus_mu` (probabilities, Appendix G.1), `entropy` (nats), `divergence`
    (the mask's), `kl_mu_pi` (r - 1 - log r, the k3 estimate of KL(mu || pi)). Counts: `positive` and
    `negative` tokens by sign of A, `masked_positive` and `masked_negative` those blocked, `bad_updates` those
    with A < 0 and mu - pi >= 0.5 (section 5.3). The largest ratio is not a sum: take `result.ratio.max()`.
    """
    positive, negative = rollout.advantage > 0, rollout.advantage < 0
    distance = binary_tv(rollout.logprob, stats.logprob)
    ratio = _ratio(stats.logprob, rollout.logprob)
    per_token = {
        "tokens": torch.ones_like(distance),
        "abs_pi_minus_mu": distance,
        "entropy": stats.entropy,
        "divergence": result.divergence,
        "kl_mu_pi": ratio - 1 - ratio.log(),
        "positive": positive,
        "negative": negative,
        "masked_positive": positive & ~result.keep,
        "masked_negative": negative & ~result.keep,
        "bad_updates": negative & (ratio < 1) & (distance >= 0.5),
    }
    if stats.topk_logprob is not None and stats.member is not None and rollout.topk_logprob is not None:
        per_token["topk_tv"] = topk_tv(rollout.topk_logprob, stats.topk_logprob, stats.member)
    assert per_token.keys() <= set(TOKEN_SUMS), "a sum without its name in TOKEN_SUMS"
    return {name: value.double().sum() for name, value in per_token.items()}
