"""Box by box into real vLLM workers: the boxes are the table's, the parameters those that vLLM's own loaders make."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from megatron_dppo.architecture import load_architecture
from megatron_dppo.rollout.engine import EngineError
from megatron_dppo.weights import transfer
from megatron_dppo.weights.engine_layout import EngineParallel, engine_layout
from megatron_dppo.weights.layout import Box, Parallel, Piece, megatron_layout
from megatron_dppo.weights.mapping import hub_dtypes
from megatron_dppo.weights.plan import Plan, sync_plan
from megatron_dppo.weights.transfer import Sender, join_as_rank, publish
from megatron_dppo.weights.update import GroupUpdate
from tests.engines.conftest import Served, serving, share
from tests.engines.test_engine_contract import PROMPTS, TOLERANCE, on, training, update, worst
from tests.tiny_models import (
    hub_tensors,
    qwen2_config,
    tiny_config,
    tiny_model,
    write_checkpoint,
)
from tests.weights.test_transfer import parameters_of

GROUP_TIMEOUT_S = 10.0
MODELS = {
    "moe": tiny_config(),
    "tied": tiny_config(tie_word_embeddings=True, vocab_size=97, mlp_only_layers=(1,)),
    "one_kv_head": tiny_config(num_kv_heads=1, vocab_size=131, num_experts=6, moe_intermediate_size=96),
    "qwen2": qwen2_config(num_key_value_heads=1, hidden_size=128),
}
CASES = {
    "tied-tp1": ("tied", EngineParallel()),
    "one_kv_head-tp2": ("one_kv_head", EngineParallel(tensor=2)),
    "moe-tp2_ep": ("moe", EngineParallel(tensor=2, expert_parallel=True)),
    "qwen2-tp2": ("qwen2", EngineParallel(tensor=2)),
}


@dataclass(frozen=True)
class Case:
    name: str
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
    options = {"tensor_parallel_size": parallel.tensor, "expert_parallel": parallel.expert_parallel}
    with serving(request.config, directory, tiny_model(MODELS[name], seed=0), **options) as served:
        yield Case(request.param, served, parallel, other, other_dir)


@dataclass
class Ranks:
    """The ranks of a trainer, as threads, with the numbers of a checkpoint in their parameters."""

    store: dist.TCPStore
    plan: Plan
    pieces: list[list[Piece]]
    update: GroupUpdate
    senders: dict[int, Sender] = field(default_factory=dict)

    @classmethod
    def meet(cls, case: Case, trainer: Parallel, generation: int) -> Ranks:
        """Plans from the boxes that the workers tell of."""
        arch = load_architecture(case.served.model_dir)
        pieces = [list(megatron_layout(arch, trainer, rank)) for rank in range(trainer.ranks)]
        answers = sorted(ask(case.served, "mdppo_boxes"), key=lambda answer: answer["worker"])
        boxes = [[*map(Box.from_json, answer["boxes"])] for answer in answers]
        plan = sync_plan(pieces, boxes, hub_dtypes(arch, "float32"), bucket_bytes=1 << 16)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        publish(store, plan)
        address = f"127.0.0.1:{store.port}"
        update = GroupUpdate(0, address, plan.digest(), generation, trainer.ranks, timeout_s=GROUP_TIMEOUT_S)
        return cls(store, plan, pieces, update)

    def send(self, rank: int, hub: dict[str, torch.Tensor]) -> None:
        if rank not in self.senders:
            store = dist.TCPStore("127.0.0.1", self.store.port, is_master=False, wait_for_workers=False)
            channels = join_as_rank(store, self.update, rank, len(self.plan.kept_bytes), torch.device("cpu"))
            self.senders[rank] = Sender(self.plan, rank, channels, len(self.pieces))
        self.senders[rank].send(parameters_of(self.pieces[rank], hub))

    async def sync(self, engine: Any, version: int, hub: dict[str, torch.Tensor]) -> None:
        await engine.pause("wait")
        sending = [asyncio.to_thread(self.send, rank, hub) for rank in range(len(self.pieces))]
        update = dataclasses.replace(self.update, version=version)
        _, *ends = await asyncio.gather(engine.begin_update(update), *sending, return_exceptions=True)
        for end in (_, *ends):
            if end is not None:
                raise end
        await engine.commit()


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
        table = engine_layout(arch, case.parallel, answer["worker"])
        assert set(map(Box.from_json, answer["boxes"])) == set(table)


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


TRAINERS = {
    "tied-tp1": Parallel(pipeline=2, ranks=2),
    "one_kv_head-tp2": Parallel(tensor=2, expert=2, ranks=4),
    "moe-tp2_ep": Parallel(tensor=2, expert=2, pipeline=2, ranks=4),
    "qwen2-tp2": Parallel(tensor=2, ranks=4),
}


def test_updates_from_ranks_over_a_group(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten updates over the same channels; one that is damaged on its way; and, over new channels, the cure."""
    models = {case.other_dir: case.other, case.served.model_dir: case.served.model}
    expected = {path: ask(case.served, "test_load", str(path)) for path in models}
    trainer = TRAINERS[case.name]

    async def check(engine: Any, ranks: Ranks, version: int) -> None:
        path, model = list(models.items())[version % 2]
        await ranks.sync(engine, version, hub_tensors(path))
        assert await asyncio.to_thread(ask, case.served, "test_parameters") == expected[path]
        samples = [await engine.generate(prompt, training(), str(version)) for prompt in PROMPTS[:2]]
        assert worst(samples, model) <= TOLERANCE
        assert {int(v) for s in samples for v in s.policy_versions} == {version}

    async def body(engine: Any) -> None:
        first = await engine.version()
        ranks = await asyncio.to_thread(Ranks.meet, case, trainer, 1)
        assert ranks.plan.num_buckets > 3
        for version in range(first + 1, first + 11):
            await check(engine, ranks, version)

        pack = transfer._pack

        def damage(message: transfer.Message, buffer: torch.Tensor, parameters: Any) -> None:
            pack(message, buffer, parameters)
            if any(part.tensor == "model.layers.1.input_layernorm.weight" for part in message.parts):
                buffer[5] ^= 1

        monkeypatch.setattr(transfer, "_pack", damage)
        with pytest.raises(EngineError, match=r"bucket \d+ from trainer rank \d .*got checksum"):
            await ranks.sync(engine, first + 11, hub_tensors(case.other_dir))
        monkeypatch.setattr(transfer, "_pack", pack)
        assert await engine.version() == -1
        with pytest.raises(EngineError, match="generate refused"):
            await engine.generate(PROMPTS[0], training(), "r")
        ranks = await asyncio.to_thread(Ranks.meet, case, trainer, 2)
        await check(engine, ranks, first + 12)

    on(case.served, body, deadline_s=120)
