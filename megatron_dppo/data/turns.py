"""Several turns of one conversation as one trajectory: what a rollout loop with tools or an environment trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_dppo.data.trajectory import Array, Trajectory


def join_turns(turns: Sequence[Trajectory]) -> Trajectory:
    """One trajectory, whose response begins with the first turn's.

    The prompt of each turn is all of the turn before, its response included, and then what the environment fed: those
    tokens are not in the loss (no log-prob, version -1). Each row of routes is of the turn that recorded it first, and
    so of the weights of its time; a turn's last token has its row from the next turn, which read it. Rows that no turn
    recorded are not valid. Ids, engine and finish reason are the last turn's.

    Raises ValueError naming the turn that does not go on from the one before, or was sampled or recorded otherwise.
    """
    if not turns:
        raise ValueError("turns: got none, expected at least one")
    for number in range(1, len(turns)):
        _check_goes_on(number, turns[number - 1], turns[number])
    first, last = turns[0], turns[-1]
    fed = [t.prompt_length - len(_text(before)) for before, t in zip(turns, turns[1:], strict=False)]

    def joined(name: str, missing: Any) -> Array:
        """A field a token, `missing` on what was fed between turns."""
        own = [getattr(t, name) for t in turns]
        between = [np.full((num, *own[0].shape[1:]), missing, own[0].dtype) for num in fed]
        return np.concatenate([own[0], *(part for pair in zip(between, own[1:], strict=True) for part in pair)])

    return replace(
        last,
        prompt_ids=first.prompt_ids,
        response_ids=_text(last)[first.prompt_length :],
        loss_mask=joined("loss_mask", False),
        rollout_logprobs=joined("rollout_logprobs", np.nan),
        topk_ids=joined("topk_ids", -1),
        topk_logprobs=joined("topk_logprobs", -np.inf),
        policy_versions=joined("policy_versions", -1),
        **_routes(turns),
    )


def without_last_token(t: Trajectory) -> Trajectory:
    """The trajectory before its last token was sampled, and so without the row of routes of the token before."""
    names = ["response_ids", "loss_mask", "rollout_logprobs", "topk_ids", "topk_logprobs", "policy_versions"]
    names += [] if t.routes is None else ["routed_experts", "routes_valid"]
    fields: dict[str, Any] = {name: getattr(t, name)[:-1] for name in names}
    return replace(t, **fields)


def _routes(turns: Sequence[Trajectory]) -> dict[str, Any]:
    recorded = [t.routes for t in turns if t.routes is not None]
    if not recorded:
        return {}
    experts, valid, _ = map(np.copy, recorded[-1])
    for of_turn, sound, _ in reversed(recorded[:-1]):
        rows = np.flatnonzero(sound)
        experts[rows], valid[rows] = of_turn[rows], True
    return {"routed_experts": experts, "routes_valid": valid}


def _text(t: Trajectory) -> Array:
    return np.concatenate([t.prompt_ids, t.response_ids])


def _check_goes_on(number: int, before: Trajectory, turn: Trajectory) -> None:
    told = _text(before)
    if not np.array_equal(turn.prompt_ids[: len(told)], told):
        raise ValueError(
            f"turn {number}: got a prompt of {turn.prompt_length} tokens that does not begin with the {len(told)} of "
            "the turn before, expected its prompt and response, then what the environment fed"
        )
    for what, found, expected in (
        ("temperature", turn.temperature, before.temperature),
        ("top-K", turn.topk_ids.shape[1], before.topk_ids.shape[1]),
        ("recorded routes of layers", _layers(turn), _layers(before)),
    ):
        if found != expected:
            raise ValueError(f"turn {number}: got {what} {found}, expected {expected} as in the turn before")


def _layers(t: Trajectory) -> list[int] | None:
    return None if t.moe_layers is None else t.moe_layers.tolist()
