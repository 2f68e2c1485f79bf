"""Recorded routes: what is refused, and how it is said."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dppo.rollout.routes import LEAST_ROWS, check_not_constant, check_routes

EXPERTS, LAYERS, TOPK = 8, 3, 2


def routes(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    experts = np.argsort(rng.random((rows, LAYERS, EXPERTS)), axis=2)[..., :TOPK].astype(np.uint8)
    return experts, np.ones(rows, np.bool_)


def test_sound_routes_pass_whatever_stands_in_rows_that_are_not_valid() -> None:
    experts, valid = routes(20)
    experts[7], valid[7] = 255, False
    check_routes(experts, valid, num_experts=EXPERTS, topk=TOPK)
    check_routes(experts[:0], valid[:0], num_experts=EXPERTS, topk=TOPK)


@pytest.mark.parametrize(
    ("row", "layer", "found", "message"),
    [
        (5, 1, (3, 8), "got expert 8 at token 5 of MoE layer 1"),
        (9, 2, (4, 4), "got expert 4 twice at token 9 of MoE layer 2"),
        (0, 0, (0, 0), "got expert 0 twice at token 0 of MoE layer 0"),
    ],
)
def test_what_cannot_be_right_is_named(row: int, layer: int, found: tuple[int, int], message: str) -> None:
    experts, valid = routes(20)
    valid[3] = False  # places are counted in all rows
    experts[row, layer] = found
    with pytest.raises(ValueError, match=message):
        check_routes(experts, valid, num_experts=EXPERTS, topk=TOPK)


def test_another_number_of_experts_a_token_is_refused() -> None:
    experts, valid = routes(4)
    with pytest.raises(ValueError, match="got 2 experts a token, expected the model's 4"):
        check_routes(experts, valid, num_experts=EXPERTS, topk=4)


def test_a_layer_that_always_says_the_same_is_refused() -> None:
    batch = [routes(LEAST_ROWS // 2, seed) for seed in range(3)]
    check_not_constant(batch)
    for experts, _ in batch:
        experts[:, 1] = (6, 2)
    with pytest.raises(ValueError, match=r"got experts \[6, 2\] for all 96 tokens of MoE layer 1"):
        check_not_constant(batch)
    batch[0][0][5, 1] = (6, 3)  # one other is enough
    check_not_constant(batch)
    few = [(np.zeros((LEAST_ROWS - 1, LAYERS, TOPK), np.uint8), np.ones(LEAST_ROWS - 1, np.bool_))]
    check_not_constant(few)  # too few to tell
