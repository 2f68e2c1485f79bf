"""Whether the routes that an engine records can be believed: when a run starts, and of every batch.

Recorded routes are arrays: `experts u8|u16[N, L, k]`, the ids of the k experts that each of N tokens took in each of L
MoE layers (uint16 from 257 experts on), and `valid bool[N]`, False where the engine recorded nothing.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_dppo.architecture import Architecture
from megatron_dppo.data.prompts import Prompt
from megatron_dppo.data.trajectory import Array, Trajectory
from megatron_dppo.rollout.engine import RolloutEngine, Sampling

Experts = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
LEAST_ROWS = 64  # of which all are alike in a layer, beyond which nobody believes them
PROBES, PROBE_TOKENS = 8, 16


def check_recorded(trajectories: Sequence[Trajectory], arch: Architecture) -> None:
    """Raises ValueError naming the sample and its engine, if routes are missing, or cannot be the model's.

    A sample that was aborted may have none.
    """
    moe_layers = list(arch.moe_layer_numbers)
    of_engines: dict[str, list[tuple[Array, Array]]] = {}
    for t in trajectories:
        if t.routes is None and t.finish_reason == "abort":
            continue
        try:
            if t.routes is None:
                raise ValueError("got no routes, expected them")
            experts, valid, layers = t.routes
            if layers.tolist() != moe_layers:
                raise ValueError(f"got routes of layers {layers.tolist()}, expected the model's {moe_layers}")
            check_routes(experts, valid, num_experts=arch.num_experts, topk=arch.num_experts_per_tok)
        except ValueError as error:
            raise ValueError(f"sample {t.sample_id} of {t.engine}: {error}") from None
        of_engines.setdefault(t.engine, []).append((experts, valid))
    for engine, recorded in of_engines.items():
        try:
            check_not_constant(recorded)
        except ValueError as error:
            raise ValueError(f"{engine}: {error}") from None


async def probe_routes(engines: Sequence[RolloutEngine], prompts: Sequence[Prompt], arch: Architecture) -> None:
    """Has every engine answer a few prompts, so that one without sound routes is found before anything is trained.

    Raises ValueError naming the engine, and what `generate` does.
    """
    sampling = Sampling(1.0, PROBE_TOKENS, training=True)
    chosen = [*itertools.islice(itertools.cycle(prompts), PROBES)]

    async def probe(engine: RolloutEngine) -> None:
        answers = await asyncio.gather(
            *(engine.generate(p.token_ids.tolist(), sampling, f"probe-{i}") for i, p in enumerate(chosen))
        )
        try:
            check_recorded(answers, arch)
        except ValueError as error:
            raise ValueError(f"engine {engine.url}: {error}") from None

    await asyncio.gather(*map(probe, engines))


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
