"""How far ahead of training is sampled, what is too old, and what a checkpoint keeps of it.

The sampler here is told what to return; the real one with a real engine: tests/engines/test_job.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_dppo.config import Config
from megatron_dppo.data.prompts import Prompt
from megatron_dppo.data.trajectory import Scored, Trajectory
from megatron_dppo.rollout.sampler import Ahead, Batch, TooOld, batch_metrics
from megatron_dppo.rollout.sampler import Sampler as RealSampler

PROMPTS, SIZE, STEPS = 3, 2, 5


def config(**rollout: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "test"},
            "model": {"path": "unused"},
            "data": {"train": "unused", "max_prompt_tokens": 8},
            "reward": {"name": "final_answer"},
            "rollout": {"max_response_tokens": 8, "prompts_per_step": PROMPTS, "samples_per_prompt": SIZE, **rollout},
            "training": {"steps": STEPS, "micro_batch_tokens": 64, "lr": 1e-3},
        }
    )


def scored(name: str, versions: Sequence[int]) -> Scored:
    length = len(versions)
    trajectory = Trajectory(
        sample_id=name, group_id="0", engine="test", finish_reason="stop", temperature=1.0,
        prompt_ids=np.array([1], np.int32), response_ids=np.ones(length, np.int32),
        loss_mask=np.ones(length, np.bool_), rollout_logprobs=np.full(length, -1.0, np.float32),
        topk_ids=np.empty((length, 0), np.int32), topk_logprobs=np.empty((length, 0), np.float32),
        policy_versions=np.array(versions, np.int32),
    )  # fmt: skip
    return Scored(trajectory, {"reward": 1.0}, np.ones(length, np.float32))


@dataclass
class Sampler:
    """Two tokens of the weights of `version`, as it is when a group is begun."""

    config: Config
    version: int = 0
    first_id: int = 1
    asked: list[tuple[int, tuple[int, ...], int]] = field(default_factory=list)  # step, groups, version

    async def groups(self, step: int, groups: Sequence[int], seconds: dict[str, float]) -> list[Scored]:
        self.asked.append((step, tuple(groups), self.version))
        seconds["generate"] = seconds.get("generate", 0.0) + 1.0
        version = self.version
        await asyncio.sleep(0)
        return [scored(f"{step}-{g}-{i}", [version, version]) for g in groups for i in range(SIZE)]

    fits = RealSampler.fits

    def prompts(self, step: int) -> list[Prompt]:
        return [Prompt(1, "1", "1", np.array([self.first_id], np.int32))] * self.config.rollout.prompts_per_step


@pytest.mark.parametrize("most", [0, 1, 3])
def test_batches_are_begun_as_soon_as_they_may(most: int) -> None:
    async def run() -> None:
        sampler = Sampler(config(max_staleness=most))
        ahead = Ahead(sampler)  # type: ignore[arg-type]
        for version in range(STEPS):
            sampler.version = version
            ahead.begin(version)
            await asyncio.sleep(0.001)
            batch = await ahead.take(version)
            assert len(batch.samples) == PROMPTS * SIZE and batch.too_old == 0
            metrics = batch_metrics(batch, version)
            assert metrics["staleness_max"] == metrics["staleness"] == min(version, most)
        everything = tuple(range(PROMPTS))
        assert sampler.asked == [(step, everything, max(0, step - most)) for step in range(STEPS)]

    asyncio.run(run())


@pytest.mark.parametrize("too_old", ["drop", "refuse"])
def test_what_is_too_old(tmp_path: Path, too_old: str) -> None:
    """A checkpoint's batch, of a run that allowed more: one token is enough, and its whole group goes."""

    async def save() -> dict[int, Path]:
        ahead = Ahead(Sampler(config(max_staleness=3)))  # type: ignore[arg-type]
        samples = [scored(str(i), [2, 3]) for i in range(PROMPTS * SIZE)]
        samples[3] = scored("old one", [1, 3])
        ahead._batches[3] = asyncio.create_task(_done(Batch(samples, {})))
        ahead._batches[4] = asyncio.create_task(asyncio.sleep(60))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        files = ahead.save(tmp_path)
        await ahead.close()
        return {int(step): Path(file) for step, file in files.items()}

    async def resume(files: dict[int, Path]) -> tuple[Batch, Sampler]:
        sampler = Sampler(config(max_staleness=1, too_old=too_old), version=3)
        ahead = Ahead(sampler)  # type: ignore[arg-type]
        ahead.restore(files)
        ahead.begin(3)
        try:
            return await ahead.take(3), sampler
        finally:
            await ahead.close()

    files = asyncio.run(save())
    assert list(files) == [3]  # the other was not complete
    if too_old == "refuse":
        message = "step 3: 1 samples are too old: old one has tokens of version 1, expected at least 2"
        with pytest.raises(TooOld, match=message):
            asyncio.run(resume(files))
        return
    batch, sampler = asyncio.run(resume(files))
    assert (3, (1,), 3) in sampler.asked and (3, (0, 1, 2), 3) not in sampler.asked
    assert [s.trajectory.sample_id for s in batch.samples] == ["0", "1", "3-1-0", "3-1-1", "4", "5"]
    assert batch.too_old == SIZE and batch_metrics(batch, 3)["staleness_max"] == 1


async def _done(batch: Batch) -> Batch:
    return batch


@pytest.mark.parametrize(
    ("rollout", "first_id"),
    [({"samples_per_prompt": 4}, 1), ({"temperature": 0.5}, 1), ({"log_topk": 2}, 1), ({}, 2)],
    ids=["size", "temperature", "topk", "prompts"],
)
def test_batches_that_do_not_fit_are_sampled_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rollout: dict[str, Any], first_id: int
) -> None:
    async def run() -> list[tuple[int, tuple[int, ...], int]]:
        ahead = Ahead(Sampler(config(max_staleness=1)))  # type: ignore[arg-type]
        ahead.begin(0)
        await asyncio.sleep(0.001)
        files = {int(step): Path(file) for step, file in ahead.save(tmp_path).items()}
        assert list(files) == [0, 1]
        sampler = Sampler(config(max_staleness=1, **rollout), first_id=first_id)
        other = Ahead(sampler)  # type: ignore[arg-type]
        other.restore(files)
        other.begin(0)
        await asyncio.sleep(0.001)
        return sampler.asked

    assert [step for step, *_ in asyncio.run(run())] == [0, 1]
    assert "step 0: the checkpoint's batch is not of this run's prompts and settings: sampled anew" in caplog.text


def test_a_batch_of_another_format_is_sampled_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"format_version": np.array([1], np.int32)}, tmp_path / "queue-1.safetensors")

    async def run() -> list[tuple[int, tuple[int, ...], int]]:
        sampler = Sampler(config(max_staleness=1))
        ahead = Ahead(sampler)  # type: ignore[arg-type]
        ahead.restore({1: tmp_path / "queue-1.safetensors"})
        ahead.begin(0)
        await asyncio.sleep(0.001)
        return sampler.asked

    assert [step for step, *_ in asyncio.run(run())] == [0, 1]
    assert "step 1: batch columns: got format [1], expected [2]" in caplog.text


def test_what_sampling_raises_comes_out_where_it_is_waited_for() -> None:
    class Broken(Sampler):
        async def groups(self, step: int, groups: Sequence[int], seconds: dict[str, float]) -> list[Scored]:
            raise RuntimeError("no engine is left")

    async def run() -> None:
        ahead = Ahead(Broken(config(max_staleness=1)))  # type: ignore[arg-type]
        ahead.begin(0)
        await asyncio.sleep(0)
        assert ahead.save(Path("nowhere")) == {}
        with pytest.raises(RuntimeError, match="no engine is left"):
            ahead.check()
        with pytest.raises(RuntimeError, match="no engine is left"):
            await ahead.take(0)
        await ahead.close()

    asyncio.run(run())
