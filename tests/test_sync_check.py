"""How an update is judged, by what ranks and engines say; real ones: tests/engines/test_sync.py."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_dppo.config import Config
from megatron_dppo.control import SHARED_VARIABLE
from megatron_dppo.sync_check import Row, _check_update
from tests.tiny_models import tiny_config

SENT = {"a": 1, "b": 2, "c": 3}


@dataclass
class Engine:
    """What it received, by tensor."""

    url: str
    received: Mapping[str, int]

    async def checksum(self) -> Mapping[str, int]:
        return self.received


class Fleet:
    def __init__(self, engines: Sequence[Engine], living: Sequence[Engine]) -> None:
        self.engines, self.living = engines, living

    async def update(self, version: int) -> None: ...

    async def sample(self, requests: Sequence[Any]) -> list[Any]:
        return []


class Ranks:
    def __init__(self, worst: float) -> None:
        self._answers = {"change": {"fingerprints": SENT}, "score": {"worst": worst}}

    async def do(self, order: Mapping[str, Any]) -> dict[str, Any]:
        return self._answers[order["do"]]


@pytest.mark.parametrize(
    ("engines", "lost", "worst", "different", "passed"),
    [
        ([SENT, SENT], 0, 1e-6, (), True),
        ([SENT, {**SENT, "b": 9}], 0, 1e-6, ("b",), False),  # the second of two engines
        ([{"a": 1, "b": 2}], 0, 1e-6, ("c",), False),  # one that never came
        ([{"a": 7}, {**SENT, "a": 8}], 0, 1e-6, ("a", "b", "c"), False),
        ([SENT, SENT], 1, 1e-6, (), False),
        ([SENT], 0, 1e-3, (), False),
    ],
    ids=["alike", "other bits", "missing", "several", "lost", "log-probs"],
)
def test_an_update_passes_where_every_engine_has_every_tensor(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engines: list[Mapping[str, int]],
    lost: int,
    worst: float,
    different: tuple[str, ...],
    passed: bool,
) -> None:
    monkeypatch.setenv(SHARED_VARIABLE, str(tmp_path))
    config = Config.model_validate(
        {
            "run": {"name": "test"},
            "model": {"path": "unused"},
            "data": {"train": "unused", "max_prompt_tokens": 8},
            "reward": {"name": "final_answer"},
            "rollout": {"max_response_tokens": 8, "prompts_per_step": 1, "samples_per_prompt": 2, "dtype": "float32"},
            "training": {"steps": 1, "micro_batch_tokens": 64, "lr": 1e-3},
        }
    )
    everybody = [Engine(f"engine{i}", received) for i, received in enumerate(engines)]
    fleet: Any = Fleet(everybody, everybody[lost:])
    ranks: Any = Ranks(worst)
    row: Row = asyncio.run(_check_update(config, tiny_config().vocab_size, fleet, ranks, 1))
    assert (row.different, row.passed, row.tensors) == (different, passed, len(SENT))
    assert row.lost == tuple(engine.url for engine in everybody[:lost])
