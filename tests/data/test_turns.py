"""`join_turns`: every token keeps what its own turn said of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_dppo.data.trajectory import Trajectory
from megatron_dppo.data.turns import join_turns
from tests.data.test_trajectory import make

FED = 3


def after(before: Trajectory, seed: int, **changes: Any) -> Trajectory:
    """A next turn: the environment has fed three tokens."""
    told = np.concatenate([before.prompt_ids, before.response_ids, np.arange(FED, dtype=np.int32)])
    return make(P=len(told), R=5, seed=seed, prompt_ids=told, **{"routes": "uint8"} | changes)


def turns(**changes: Any) -> list[Trajectory]:
    first = make(P=3, R=4, seed=1, **{"routes": "uint8"} | changes)
    second = after(first, 2, **changes)
    return [first, second, after(second, 3, **changes)]


def test_tokens_keep_what_their_turn_said_and_fed_ones_are_not_in_the_loss() -> None:
    all_turns = turns()
    joined = join_turns(all_turns)
    last = all_turns[-1]
    assert joined.prompt_ids.tolist() == all_turns[0].prompt_ids.tolist()
    told = np.concatenate([last.prompt_ids, last.response_ids])
    assert np.concatenate([joined.prompt_ids, joined.response_ids]).tolist() == told.tolist()
    sampled = np.zeros(joined.response_length, np.bool_)
    for t in all_turns:
        start = t.prompt_length - joined.prompt_length
        here = slice(start, start + t.response_length)
        sampled[here] = True
        for name in ("loss_mask", "rollout_logprobs", "topk_ids", "topk_logprobs", "policy_versions"):
            np.testing.assert_array_equal(getattr(joined, name)[here], getattr(t, name))
    assert (~sampled).sum() == 2 * FED and not joined.loss_mask[~sampled].any()
    assert (joined.policy_versions[~sampled] == -1).all() and np.isnan(joined.rollout_logprobs[~sampled]).all()


def test_rows_are_of_the_turn_that_recorded_them_first() -> None:
    all_turns = turns()
    joined = join_turns(all_turns)
    for row in range(joined.num_tokens - 1):
        by = [t for t in all_turns if row < t.num_tokens - 1 and t.routes_valid[row]]
        assert joined.routes_valid[row] == bool(by)
        if by:
            np.testing.assert_array_equal(joined.routed_experts[row], by[0].routed_experts[row])


def test_one_turn_is_itself_and_turns_without_routes_have_none() -> None:
    (first, *_) = turns()
    joined = join_turns([first])
    np.testing.assert_array_equal(joined.response_ids, first.response_ids)
    np.testing.assert_array_equal(joined.routed_experts, first.routed_experts)
    assert join_turns(turns(routes=None)).routed_experts is None


def test_what_does_not_go_on_is_named() -> None:
    first, second, third = turns()
    with pytest.raises(ValueError, match="turns: got none"):
        join_turns([])
    with pytest.raises(ValueError, match="turn 2: got a prompt of 18 tokens that does not begin with the 15 of"):
        join_turns([first, second, replace(third, prompt_ids=third.prompt_ids[::-1].copy())])
    with pytest.raises(ValueError, match=r"turn 1: got temperature 0.9, expected 0.7"):
        join_turns([first, replace(second, temperature=0.9)])
    with pytest.raises(ValueError, match=r"turn 1: got recorded routes of layers None, expected \[1, 2, 4\]"):
        join_turns([first, after(first, 2, routes=None)])
