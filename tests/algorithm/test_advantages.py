"""Group advantages against hand-computed numbers."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from megatron_dppo.algorithm.advantages import group_advantages


def test_reward_minus_group_mean_with_groups_interleaved() -> None:
    rewards, group = np.array([1.0, 0.0, 0.0, 4.0, 2.0]), np.array([7, -2, 7, -2, 7])
    advantage = group_advantages(rewards, group)
    assert advantage.dtype == np.float32
    np.testing.assert_allclose(advantage, [0, -2, -1, 2, 1], atol=1e-7)


def test_std_divides_by_the_population_deviation() -> None:
    # Rewards 1, 0, 0, 0: mean .25, std sqrt(3)/4.
    advantage = group_advantages(np.array([1.0, 0, 0, 0]), np.zeros(4, dtype=np.int64), normalise="std")
    np.testing.assert_allclose(advantage, [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)], rtol=1e-5)


def test_leave_one_out_takes_the_mean_of_the_others() -> None:
    rewards = np.array([3.0, 1.0, 2.0, 0.0, 5.0])
    advantage = group_advantages(rewards, np.array([0, 0, 0, 1, 1]), normalise="leave_one_out")
    np.testing.assert_allclose(advantage, [3 - 1.5, 1 - 2.5, 2 - 2.0, 0 - 5, 5 - 0], atol=1e-6)


@pytest.mark.parametrize("normalise", ["none", "std", "leave_one_out"])
def test_nothing_to_compare_with_is_no_advantage(normalise: str) -> None:
    """A group of one, and a group of equal rewards whose mean is not a float64 number exactly."""
    rewards, group = np.array([5.0, 0.1, 0.1, 0.1]), np.array([0, 1, 1, 1])
    np.testing.assert_allclose(group_advantages(rewards, group, normalise), 0, atol=1e-9)  # type: ignore[arg-type]


def test_float64_inside() -> None:
    """Rewards that differ by less than float32 resolves around 1e8."""
    advantage = group_advantages(np.array([1e8 + 1, 1e8 - 1]), np.array([0, 0]))
    np.testing.assert_array_equal(advantage, [1.0, -1.0])


def test_no_responses() -> None:
    assert group_advantages(np.array([]), np.array([])).shape == (0,)


@pytest.mark.parametrize(
    ("rewards", "group", "normalise", "message"),
    [
        ([1.0, 2.0], [0], "none", r"rewards and group_index: got shapes \(2,\) and \(1,\)"),
        ([[1.0]], [[0]], "none", "rewards and group_index"),
        ([1.0, np.nan], [0, 0], "none", "rewards: got nan at position 1"),
        ([1.0, 2.0], [0.0, 0.0], "none", "group_index: got dtype float64, expected integers"),
        ([1.0, 2.0], [0, 0], "rloo", "normalise: got 'rloo', expected one of none, std, leave_one_out"),
    ],
)
def test_refusals(rewards: list[float], group: list[int], normalise: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, group, normalise)  # type: ignore[arg-type]


def test_needs_no_torch() -> None:
    """The rollout client scores without it."""
    code = "import sys, megatron_dppo.algorithm.advantages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
