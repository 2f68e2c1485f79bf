"""Recorded routes as arrays: `experts u8|u16[N, L, k]`, the ids of the k experts that each of N tokens took in each of
L MoE layers (uint16 from 257 experts on), and `valid bool[N]`, False where the engine recorded nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Experts = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
LEAST_ROWS = 64  # of which all are alike in a layer, beyond which nobody believes them


def check_routes(experts: Experts, valid: npt.NDArray[np.bool_], *, num_experts: int, topk: int) -> None:
    """Raises ValueError unless every valid row names `topk` distinct experts of `num_experts`, in every layer."""
    if experts.shape[2] != topk:
        raise ValueError(f"routes: got {experts.shape[2]} experts a token, expected the model's {topk}")
    rows = np.flatnonzero(valid)
    found = experts[rows]
    if len(wrong := np.argwhere(found >= num_experts)):
        row, layer, place = wrong[0].tolist()
        got = found[row, layer, place]
        raise ValueError(f"routes: got expert {got} at token {rows[row]} {_of(layer)}, expected below {num_experts}")
    ordered = np.sort(found, axis=2)
    if len(twice := np.argwhere(ordered[..., 1:] == ordered[..., :-1])):
        row, layer, place = twice[0].tolist()
        got = ordered[row, layer, place]
        raise ValueError(f"routes: got expert {got} twice at token {rows[row]} {_of(layer)}, expected {topk} distinct")


def check_not_constant(batch: Sequence[tuple[Experts, npt.NDArray[np.bool_]]]) -> None:
    """Raises ValueError where all tokens of a batch took the same experts in a layer: nothing was recorded there."""
    found = [experts[valid] for experts, valid in batch]
    if sum(map(len, found)) < LEAST_ROWS:
        return
    first = next(rows for rows in found if len(rows))[0]
    constant = np.logical_and.reduce([(rows == first).all(axis=(0, 2)) for rows in found if len(rows)])
    if constant.any():
        layer = int(np.flatnonzero(constant)[0])
        raise ValueError(
            f"routes: got experts {first[layer].tolist()} for all {sum(map(len, found))} tokens {_of(layer)}, expected "
            "different ones: the engine does not record there"
        )


def _of(layer: int) -> str:
    return f"of MoE layer {layer} (counted from 0)"
