"""What SGLang does in silence, on real servers: one without our loader, and a model that it would serve wrongly."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from megatron_dppo.rollout.engine import EngineError, RolloutEngine
from megatron_dppo.rollout.sglang.whole_tensors import BucketWeights
from tests.engines.conftest import Served, serving, share
from tests.engines.kinds import KIND
from tests.engines.test_engine_contract import PROMPTS, TOLERANCE, on, training, update, worst, wrong_rows
from tests.tiny_models import hub_tensors, tiny_config, tiny_model, write_checkpoint

pytestmark = pytest.mark.skipif(KIND.name != "sglang", reason="of SGLang alone")


@pytest.fixture
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server without our loader, on two workers."""
    model = tiny_model(tiny_config(), seed=0)
    with serving(
        request.config, tmp_path_factory.mktemp("stock"), model, loaders=(), tensor_parallel_size=2, routed_experts=True
    ) as engine:
        yield engine


def test_a_stock_server_gets_whole_tensors_in_buckets(
    stock: Served, tmp_path_factory: pytest.TempPathFactory, shared_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny_model(stock.model.config, seed=1)
    tensors = hub_tensors(write_checkpoint(tmp_path_factory.mktemp("other"), other))
    sent: list[int] = []
    send = BucketWeights._send

    async def counted(self: Any, *args: Any) -> None:
        sent.append(1)
        await send(self, *args)

    monkeypatch.setattr(BucketWeights, "_send", counted)
    monkeypatch.setattr(BucketWeights, "bucket_bytes", 1 << 16)

    async def body(engine: RolloutEngine) -> None:
        assert (await engine.capabilities()).weights == "whole tensors, in buckets"
        await update(engine, share(shared_memory, tensors, 1))
        assert len(sent) == 2  # over other random weights each time
        t = await engine.generate(PROMPTS[0], training(), "r")
        assert t.policy_versions[0] == 1 and worst([t], other) <= TOLERANCE and not wrong_rows(t, other).any()
        await update(engine, share(shared_memory, hub_tensors(stock.model_dir), 2))
        assert len(sent) == 3
        t = await engine.generate(PROMPTS[0], training(), "r")
        assert t.policy_versions[0] == 2 and worst([t], stock.model) <= TOLERANCE

        part = dict(list(tensors.items())[:5])
        with pytest.raises(EngineError, match="got 5 tensors"):
            await engine.begin_update(3, share(shared_memory, part, 3).manifest)
        await engine.abort_update()
        assert (await engine.generate(PROMPTS[0], training(), "r")).policy_versions[0] == 2
        with pytest.raises(EngineError, match="takes whole tensors only: expected sync.transport shm or disk"):
            await engine.layout()

    on(stock, body)


def test_every_number_of_a_model_is_in_an_update(served: Served, original: Any, shared_memory: Path) -> None:
    """From different random weights each time, an update makes the same parameters."""

    def check(action: str) -> Any:
        answer = httpx.post(f"{served.url}/weights_checker", json={"action": action}, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def body(engine: RolloutEngine) -> list[Any]:
        found = []
        for _ in range(2):
            check("reset_tensors")
            before = check("checksum")["ranks"]
            await update(engine, share(shared_memory, original, await engine.version() + 1))
            found += [before, check("checksum")["ranks"]]
        return found

    random, first, others, second = on(served, body)
    assert random != others and random != first and first == second


@pytest.mark.skipif("MDPPO_ALL_PAIRS" not in os.environ, reason="for make test-long: a server of its own")
def test_a_model_that_sglang_would_serve_wrongly_is_named(
    request: pytest.FixtureRequest, tmp_path: Path, original: Any
) -> None:
    """It gives experts to the dense layer, finds no numbers for them, and drops the layer's own."""
    model = tiny_model(tiny_config(mlp_only_layers=(0,)), seed=0)
    message = r"reads nothing of 3 tensors \(model.layers.0.mlp.down_proj.weight, "
    with serving(request.config, tmp_path, model) as engine, pytest.raises(EngineError, match=message):
        on(engine, lambda client: client.layout())
