"""Prompts in, scored groups of responses out: what the rollout client asks of its engines, and how far ahead.

A batch is the prompts of one training step. Its samples may be begun as soon as the trainer has weights at most
`max_staleness` versions older than those the batch will train; `Ahead` samples that many batches while ranks train.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dppo.algorithm.advantages import group_advantages
from megatron_dppo.architecture import Architecture
from megatron_dppo.config import Config, num_recorded_topk
from megatron_dppo.data.prompts import Prompt, batch_indices
from megatron_dppo.data.rewards import Reward
from megatron_dppo.data.trajectory import Scored, Trajectory, load_batch, save_batch
from megatron_dppo.rollout.engine import Sampling
from megatron_dppo.rollout.fleet import Fleet, Request
from megatron_dppo.rollout.routes import check_recorded

MAX_SEED = 2**31 - 1
log = logging.getLogger(__name__)


@contextlib.contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the seconds of a block to `seconds[phase]`."""
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Sampler:
    """Samples and scores."""

    config: Config
    fleet: Fleet
    tokenizer: Any
    train: Sequence[Prompt]
    reward: Reward
    arch: Architecture

    async def groups(self, step: int, groups: Sequence[int], seconds: dict[str, float]) -> list[Scored]:
        """All responses to some of the step's prompts (by their places in it), group by group."""
        settings = self.config.rollout
        size, of_step = settings.samples_per_prompt, self.prompts(step)
        prompts = [of_step[group] for group in groups for _ in range(size)]
        sampling = Sampling(
            temperature=settings.temperature,
            max_tokens=settings.max_response_tokens,
            training=True,
            num_topk_logprobs=num_recorded_topk(self.config),
            top_p=settings.top_p,
            top_k=settings.top_k,
        )
        requests = [
            request_of(
                of_step[group],
                sampling,
                self.config.run.seed,
                f"{step}-{number}",
                group=f"{step}-{group}",
                spread=group,
            )
            for group in groups
            for number in range(group * size, (group + 1) * size)
        ]
        with timed(seconds, "generate"):
            trajectories = await self.fleet.sample(requests)
        if self.config.routing.mode == "rollout":
            with timed(seconds, "check_routes"):
                await asyncio.to_thread(check_recorded, trajectories, self.arch)
        with timed(seconds, "score"):
            scores = await score(trajectories, prompts, self.tokenizer, self.reward)
            of_group = np.repeat(np.asarray(groups), size)
            return with_advantages(trajectories, scores, of_group, self.config.advantage.normalise)

    def prompts(self, step: int) -> list[Prompt]:
        """The step's, which follow from the seed."""
        number, seed = self.config.rollout.prompts_per_step, self.config.run.seed
        return [self.train[index] for index in batch_indices(step, number, len(self.train), seed)]

    def fits(self, step: int, samples: Sequence[Scored]) -> bool:
        """Whether samples of an earlier run are answers to the step's prompts, recorded as this run would."""
        rollout = self.config.rollout
        prompts = [prompt for prompt in self.prompts(step) for _ in range(rollout.samples_per_prompt)]
        if self.config.routing.mode == "rollout":
            try:
                check_recorded([sample.trajectory for sample in samples], self.arch)
            except ValueError:
                return False
        return len(samples) == len(prompts) and all(
            np.array_equal(sample.trajectory.prompt_ids, prompt.token_ids)
            and sample.trajectory.temperature == rollout.temperature
            and sample.trajectory.topk_ids.shape[1] >= num_recorded_topk(self.config)
            for sample, prompt in zip(samples, prompts, strict=True)
        )


def request_of(prompt: Prompt, sampling: Sampling, seed: int, name: str, *, group: str, spread: int) -> Request:
    """One response to a prompt, with a seed of its own, which follows from the run's and the request's name."""
    own = int(np.random.default_rng([seed, *name.encode()]).integers(MAX_SEED))
    return Request(prompt.token_ids.tolist(), replace(sampling, seed=own), name, group, spread)


async def score(
    answers: Sequence[Trajectory], prompts: Sequence[Prompt], tokenizer: Any, reward: Reward
) -> list[dict[str, float]]:
    """What the reward says of each answer to the prompt at its place."""
    texts = tokenizer.batch_decode([a.response_ids for a in answers], skip_special_tokens=True)
    return await asyncio.gather(
        *(
            asyncio.to_thread(reward, text, prompt.answer, answer.finish_reason)
            for text, prompt, answer in zip(texts, prompts, answers, strict=True)
        )
    )


def with_advantages(
    trajectories: Sequence[Trajectory], scores: Sequence[dict[str, float]], groups: np.ndarray, normalise: Any
) -> list[Scored]:
    """Every token of a response has the response's advantage."""
    advantages = group_advantages(np.array([score["reward"] for score in scores]), groups, normalise)
    return [
        Scored(trajectory, score, np.full(trajectory.response_length, advantage, np.float32))
        for trajectory, score, advantage in zip(trajectories, scores, advantages, strict=True)
    ]


@dataclass(frozen=True)
class Batch:
    """What one training step learns from: its prompts' groups in order, all of the same size."""

    samples: list[Scored]
    seconds: Mapping[str, float]  # of sampling and scoring, also while ranks trained
    too_old: int = 0  # samples that were dropped, and taken anew


class TooOld(RuntimeError):
    """A sample has tokens of weights older than `rollout.max_staleness` allows."""


class Ahead:
    """Batches that are being sampled or wait to be trained. `begin`, then `take` in the order of steps."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        settings = sampler.config.rollout
        self._most, self._steps = settings.max_staleness, sampler.config.training.steps
        self._refuse, self._prompts = settings.too_old == "refuse", settings.prompts_per_step
        self._size = settings.samples_per_prompt
        self._batches: dict[int, asyncio.Task[Batch]] = {}

    def begin(self, version: int) -> None:
        """Samples what may be begun now that all engines have `version`."""
        for step in range(version, min(version + self._most + 1, self._steps)):
            if step not in self._batches:
                self._batches[step] = asyncio.create_task(self._sample(step))

    async def _sample(self, step: int) -> Batch:
        seconds: dict[str, float] = {}
        return Batch(await self._sampler.groups(step, range(self._prompts), seconds), seconds)

    async def take(self, step: int) -> Batch:
        """The batch of `step`, which the weights of that version are to be trained on, and no token of it older than
        allowed: groups with one are dropped and sampled anew. Raises TooOld where the config says so, and what sampling
        raised.
        """
        batch = await self._batches[step]
        samples, seconds, dropped = list(batch.samples), dict(batch.seconds), 0
        while old := [i for i, sample in enumerate(samples) if _oldest(sample, step) < step - self._most]:
            trajectory = samples[old[0]].trajectory
            message = (
                f"step {step}: {len(old)} samples are too old: {trajectory.sample_id} has tokens of version "
                f"{_oldest(samples[old[0]], step)}, expected at least {step - self._most} (rollout.max_staleness)"
            )
            if self._refuse:
                raise TooOld(f"{message}; set rollout.too_old=drop to have them sampled anew")
            log.warning("%s; their groups are sampled anew", message)
            groups = sorted({i // self._size for i in old})
            anew = await self._sampler.groups(step, groups, seconds)
            for place, group in enumerate(groups):
                samples[group * self._size : (group + 1) * self._size] = anew[place * self._size :][: self._size]
            dropped += len(groups) * self._size
        del self._batches[step]
        return Batch(samples, seconds, dropped)

    def check(self) -> None:
        """Raises what went wrong with a batch that nobody waits for yet."""
        for task in self._batches.values():
            if task.done():
                task.result()

    async def close(self) -> None:
        """Ends what is still being sampled."""
        for task in self._batches.values():
            task.cancel()
        await asyncio.gather(*self._batches.values(), return_exceptions=True)

    def save(self, directory: Path) -> dict[str, str]:
        """Leaves every batch that is complete in a file; returns their paths by step."""
        files = {}
        for step, task in self._batches.items():
            if task.done() and not task.cancelled() and task.exception() is None:
                path = directory / f"queue-{step}.safetensors"
                save_batch(path, task.result().samples)
                files[str(step)] = str(path)
        return files

    def restore(self, files: Mapping[int, Path]) -> None:
        """Takes batches that `save` left; those that do not fit this run are sampled anew."""
        for step, path in files.items():
            try:
                samples = load_batch(path)
            except ValueError as error:  # of another version
                log.warning("step %d: %s; the checkpoint's batch is sampled anew", step, error)
                continue
            if self._sampler.fits(step, samples):
                self._batches[step] = asyncio.create_task(_done(Batch(samples, {})))
            else:
                log.warning(
                    "step %d: the checkpoint's batch is not of this run's prompts and settings: sampled anew", step
                )


async def _done(batch: Batch) -> Batch:
    return batch


def _oldest(sample: Scored, step: int) -> int:
    """The oldest weights that sampled a token of it."""
    trajectory = sample.trajectory
    return int(trajectory.policy_versions[trajectory.loss_mask].min(initial=step))


def batch_metrics(batch: Batch, step: int) -> dict[str, float]:
    """Means over the batch's samples of what they scored, of their lengths; and how old their tokens are."""
    scores, trajectories = [s.rewards for s in batch.samples], [s.trajectory for s in batch.samples]
    names = sorted({name for score in scores for name in score})
    metrics = {name: float(np.mean([score[name] for score in scores])) for name in names}
    metrics["response_length"] = float(np.mean([t.response_length for t in trajectories]))
    metrics["truncated_share"] = float(np.mean([t.finish_reason == "length" for t in trajectories]))
    ages = step - np.concatenate([t.policy_versions[t.loss_mask] for t in trajectories])
    metrics["staleness"] = float(ages.mean()) if len(ages) else 0.0
    metrics["staleness_max"] = float(ages.max(initial=0))
    metrics["too_old"] = float(batch.too_old)
    if routes := [t.routes for t in trajectories if t.routes is not None]:
        experts = routes[0][0]
        metrics["route_bytes_per_token"] = float(np.prod(experts.shape[1:]) * experts.itemsize)
        rows = sum(t.num_tokens - 1 for t in trajectories)
        metrics["routes_invalid_share"] = 1 - sum(int(valid.sum()) for _, valid, _ in routes) / max(rows, 1)
    return metrics
