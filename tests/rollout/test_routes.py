"""The probe of recorded routes, on engines of one line: what a real one could send is in tests/engines."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_dppo.data.trajectory import Trajectory
from megatron_dppo.rollout.routes import PROBES, check_recorded, probe_routes
from tests.data.test_trajectory import make

ARCH: Any = SimpleNamespace(num_experts=200, num_experts_per_tok=5, moe_layer_numbers=(1, 2, 4))
PROMPTS: Any = [SimpleNamespace(token_ids=np.arange(1, 10, dtype=np.int32)), SimpleNamespace(token_ids=np.arange(5))]


def sound(number: int) -> Trajectory:
    rng = np.random.default_rng(number)
    experts = np.argsort(rng.random((24, 3, 200)), axis=2)[..., :5].astype(np.uint8)
    return make(P=9, R=16, routes="uint8", seed=number, routed_experts=experts)


def without(number: int) -> Trajectory:
    return make(seed=number)


def zeros(number: int) -> Trajectory:
    return make(P=9, R=16, routes="uint8", routed_experts=np.zeros((24, 3, 5), np.uint8))


def same(number: int) -> Trajectory:
    rows = np.broadcast_to(np.arange(5, dtype=np.uint8), (24, 3, 5))
    return make(P=9, R=16, routes="uint8", seed=number, routed_experts=rows)


def too_large(number: int) -> Trajectory:
    experts = sound(number).routed_experts.copy()
    experts[:, 2, 0] = 200
    return make(P=9, R=16, routes="uint8", seed=number, routed_experts=experts)


class Engine:
    def __init__(self, url: str, answer: Any) -> None:
        self.url, self.answer, self.asked = url, answer, 0

    async def generate(self, prompt_ids: list[int], sampling: Any, request_id: str) -> Trajectory:
        self.asked += 1
        return self.answer(self.asked)


def test_every_engine_is_asked() -> None:
    engines: Any = [Engine("a", sound), Engine("b", sound)]
    asyncio.run(probe_routes(engines, PROMPTS, ARCH))
    assert [engine.asked for engine in engines] == [PROBES, PROBES]


def other_layers(number: int) -> Trajectory:
    return replace(sound(number), moe_layers=np.array([0, 1, 2], np.int32))


def test_an_aborted_sample_may_lack_routes_and_engines_are_told_apart() -> None:
    check_recorded([sound(1), replace(without(2), finish_reason="abort"), sound(3)], ARCH)
    with pytest.raises(ValueError, match=r"http://b:2: routes: got experts \[0, 1, 2, 3, 4\] for all \d+ tokens"):
        check_recorded([*map(sound, range(4)), *(replace(same(i), engine="http://b:2") for i in range(4))], ARCH)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (without, "got no routes"),
        (zeros, "got expert 0 twice"),
        (same, r"got experts \[0, 1, 2, 3, 4\] for all"),
        (other_layers, r"got routes of layers \[0, 1, 2\], expected the model's \[1, 2, 4\]"),
        (too_large, "got expert 200 at token . of MoE layer 2"),
    ],
)
def test_an_engine_without_sound_routes_is_named(answer: Any, message: str) -> None:
    engines: Any = [Engine("a", sound), Engine("http://b:1", answer)]
    with pytest.raises(ValueError, match=f"engine http://b:1: .*{message}"):
        asyncio.run(probe_routes(engines, PROMPTS, ARCH))
