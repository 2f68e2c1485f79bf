"""Whether the routes that an engine records can be believed: when a run starts, and of every batch."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

from megatron_dppo.architecture import Architecture
from megatron_dppo.data.prompts import Prompt
from megatron_dppo.data.trajectory import Array, Trajectory
from megatron_dppo.rollout.engine import RolloutEngine, Sampling
from megatron_dppo.routing.codec import check_not_constant, check_routes

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
