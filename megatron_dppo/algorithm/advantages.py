"""Advantages from the rewards of a group of responses to one prompt (paper section 4.1). Numpy only."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

Normalise = Literal["none", "std", "leave_one_out"]

STD_EPSILON = 1e-6  # added to a group's standard deviation, as in GRPO implementations


def group_advantages(
    rewards: npt.ArrayLike, group_index: npt.ArrayLike, normalise: Normalise = "none"
) -> npt.NDArray[np.float32]:
    """A_i = R_i - mean reward of i's group: GRPO without standard-deviation normalisation (section 4.1).

    Args:
        rewards: float[N], one per response; must be finite.
        group_index: integer[N], equal for the responses to one prompt; any integers, in any order.
        normalise: "none" (the paper's); "std" divides by the group's population standard deviation + 1e-6 (as
            GRPO was first published); "leave_one_out" takes the mean of the *other* responses as baseline
            (RLOO), which is n / (n - 1) times "none".

    Returns:
        f32[N], computed in float64. A group of one response has advantage 0 in every mode, having nothing to
        be compared with; so has every member of a group of equal rewards.

    Raises:
        ValueError: differing shapes, a reward that is not finite, indices that are not integers, unknown
            `normalise`.
    """
    reward = np.asarray(rewards, dtype=np.float64)
    index = np.asarray(group_index)
    _check(reward, index, normalise)

    _, group = np.unique(index, return_inverse=True)
    size = np.bincount(group)
    advantage = reward - (np.bincount(group, weights=reward) / size)[group]
    if normalise == "std":
        std = np.sqrt(np.bincount(group, weights=advantage**2) / size)
        advantage /= std[group] + STD_EPSILON
    elif normalise == "leave_one_out":
        advantage *= (size / np.maximum(size - 1, 1))[group]
    return advantage.astype(np.float32)


def _check(reward: npt.NDArray[np.float64], index: npt.NDArray[np.generic], normalise: str) -> None:
    if normalise not in get_args(Normalise):
        raise ValueError(f"normalise: got {normalise!r}, expected one of {', '.join(get_args(Normalise))}")
    if reward.ndim != 1 or reward.shape != index.shape:
        raise ValueError(
            f"rewards and group_index: got shapes {reward.shape} and {index.shape}, expected two equal [N]"
        )
    if index.size and not np.issubdtype(index.dtype, np.integer):
        raise ValueError(f"group_index: got dtype {index.dtype}, expected integers")
    if not np.isfinite(reward).all():
        bad = int(np.flatnonzero(~np.isfinite(reward))[0])
        raise ValueError(f"rewards: got {reward[bad]} at position {bad}, expected finite numbers")
