"""Box by box into real vLLM workers: the boxes are the table's, the parameters those that vLLM's own loaders make."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import PreTrainedModel

from megatron_dppo.architecture import load_architecture
from megatron_dppo.weights.engine_layout import EngineParallel, engine_layout
from tests.engines.conftest import Served, serving, share
from tests.engines.test_engine_contract import PROMPTS, TOLERANCE, on, training, update, worst
from tests.tiny_models import (
    deepseek_config,
    hub_tensors,
    llama3_config,
    qwen2_config,
    tiny_config,
    tiny_model,
    write_checkpoint,
)

MODELS = {
    "moe": tiny_config(),
    "tied": tiny_config(tie_word_embeddings=True, vocab_size=97, mlp_only_layers=(1,)),
    "one_kv_head": tiny_config(num_kv_heads=1, vocab_size=131, num_experts=6, moe_intermediate_size=96),
    "qwen2": qwen2_config(num_key_value_heads=1, hidden_size=128),
    "llama3": llama3_config(hidden_size=128, tie_word_embeddings=True),
    "deepseek_v3": deepseek_config(),
}
CASES = {
    "tied-tp1": ("tied", EngineParallel()),
    "one_kv_head-tp2": ("one_kv_head", EngineParallel(tensor=2)),
    "moe-tp2_ep": ("moe", EngineParallel(tensor=2, expert_parallel=True)),
    "qwen2-tp2": ("qwen2", EngineParallel(tensor=2)),
}


@dataclass(frozen=True)
class Case:
    served: Served
    parallel: EngineParallel
    other: PreTrainedModel
    other_dir: Path


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    name, parallel = CASES[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    other = tiny_model(MODELS[name], seed=1)
    other_dir = write_checkpoint(directory / "other", other)
    flags = ["--enable-expert-parallel"] if parallel.expert_parallel else []
    options = {"tensor_parallel_size": parallel.tensor}
    with serving(request.config, directory, tiny_model(MODELS[name], seed=0), *flags, **options) as served:
        yield Case(served, parallel, other, other_dir)


def ask(served: Served, method: str, *args: Any) -> list[Any]:
    """What every worker answers."""
    answer = httpx.post(f"{served.url}/collective_rpc", json={"method": method, "args": list(args)}, timeout=60.0)
    assert answer.status_code == 200, answer.text
    return answer.json()["results"]


def test_workers_keep_the_boxes_of_the_table(case: Case) -> None:
    arch = load_architecture(case.served.model_dir)
    before = ask(case.served, "test_parameters")
    answers = ask(case.served, "mdppo_boxes")
    assert ask(case.served, "test_parameters") == before  # looking changed nothing
    assert ask(case.served, "test_whole") == [{}] * case.parallel.workers
    assert [answer["worker"] for answer in answers] == list(range(case.parallel.workers))
    for answer in answers:
        recorded = {(name, tuple(start), tuple(stop)) for name, start, stop in answer["boxes"]}
        table = {(b.tensor, b.start, b.stop) for b in engine_layout(arch, case.parallel, answer["worker"])}
        assert recorded == table


def test_updates_make_what_the_loaders_make(case: Case, shared_memory: Path) -> None:
    models = {case.other_dir: case.other, case.served.model_dir: case.served.model}
    expected = {path: ask(case.served, "test_load", str(path)) for path in models}
    assert expected[case.other_dir] != expected[case.served.model_dir]

    async def body(engine: Any) -> None:
        for i in range(4):
            path, model = list(models.items())[i % 2]
            await update(engine, share(shared_memory, hub_tensors(path), i + 1))
            assert await asyncio.to_thread(ask, case.served, "test_parameters") == expected[path]
            samples = [await engine.generate(prompt, training(), str(i)) for prompt in PROMPTS[:3]]
            assert worst(samples, model) <= TOLERANCE

    on(case.served, body)
