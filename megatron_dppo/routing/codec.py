"""Recorded routes as arrays: `experts u8|u16[N, L, k]`, the ids of the k experts that each of N tokens took in each of
L MoE layers (uint16 from 257 experts on), and `valid bool[N]`, False where the engine recorded nothing.
"""

from __future__ import annotations

import itertools
from collections import Counter
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
    if found.max(initial=0) >= num_experts:
        row, layer, place = np.argwhere(found >= num_experts)[0].tolist()
        got = found[row, layer, place]
        raise ValueError(f"routes: got expert {got} at token {rows[row]} {_of(layer)}, expected below {num_experts}")
    columns = np.ascontiguousarray(np.moveaxis(found, 2, 0))  # compared pairwise, several times as fast as sorted
    twice = np.zeros(columns.shape[1:], np.bool_)
    for one, other in itertools.combinations(columns, 2):
        twice |= one == other
    if twice.any():
        row, layer = np.argwhere(twice)[0].tolist()
        got = Counter(found[row, layer].tolist()).most_common(1)[0][0]
        raise ValueError(f"routes: got expert {got} twice at token {rows[row]} {_of(layer)}, expected {topk} distinct")


def check_not_constant(batch: Sequence[tuple[Experts, npt.NDArray[np.bool_]]]) -> None:
    """Raises ValueError where all tokens of a batch took the same experts in a layer: nothing was recorded there."""
    found = [experts[valid] for experts, valid in batch]
    if sum(map(len, found)) < LEAST_ROWS:
        return
    least = np.minimum.reduce([rows.min(axis=0) for rows in found if len(rows)])
    constant = (least == np.maximum.reduce([rows.max(axis=0) for rows in found if len(rows)])).all(axis=1)
    if constant.any():
        layer = int(np.flatnonzero(constant)[0])
        raise ValueError(
            f"routes: got experts {least[layer].tolist()} for all {sum(map(len, found))} tokens {_of(layer)}, expected "
            "different ones: the engine does not record there"
        )


def _of(layer: int) -> str:
    return f"of MoE layer {layer} (counted from 0)"
