"""The rollout client: the process between engines and trainer ranks.

For each step it brings new weights to the engines, evaluates where it is due, samples groups of responses, scores
them, and leaves for each data-parallel replica a file with just that replica's samples, in the order of its
micro-batches. Started by the launcher as `python -m megatron_dppo.rollout.client CONFIG`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dppo.algorithm.advantages import group_advantages
from megatron_dppo.architecture import Architecture, forward_flops, load_architecture
from megatron_dppo.checkpoints import start_of
from megatron_dppo.config import Config, load_config, num_recorded_topk
from megatron_dppo.control import (
    CONTROL_VARIABLE,
    ENGINE_URLS_VARIABLE,
    READY_KEY,
    SHARED_VARIABLE,
    Control,
    Orders,
)
from megatron_dppo.data.packing import Plan, imbalance, plan_step
from megatron_dppo.data.prompts import Prompt, PromptSet, batch_indices, load_prompts
from megatron_dppo.data.rewards import MathAnswer, Reward, make_reward
from megatron_dppo.rollout.engine import Capabilities, RolloutEngine, Sampling
from megatron_dppo.rollout.fleet import Fleet, Request
from megatron_dppo.rollout.trajectory import Scored, Trajectory, save_batch
from megatron_dppo.rollout.vllm import VllmEngine

MAX_SEED = 2**31 - 1
MOST_IMBALANCE = 1.05  # of the replicas' work, beyond which the log says why


@dataclass
class Client:
    """What the client knows for the whole run."""

    config: Config
    orders: Orders
    fleet: Fleet
    arch: Architecture
    shared: Path
    tokenizer: Any
    train: Sequence[Prompt]
    held_out: Sequence[Prompt]
    reward: Reward
    start: int = 0  # steps done before
    seconds: dict[str, float] = field(default_factory=dict)  # of the step at hand, by phase

    async def run(self) -> None:
        """All steps. Training ends with an order that says why instead of samples."""
        for step in range(self.start, self.config.training.steps + 1):
            self.seconds = {}
            # Version 0 too: whatever an engine started with, what it samples from is what the trainer has.
            await self._update_engines(step)
            evaluation = await self._evaluate(step)
            stop = self._reason_to_stop(step, evaluation)
            order: dict[str, Any] = {"do": "train" if stop is None else "stop", "stop": stop, "evaluation": evaluation}
            if stop is None:
                order |= await self._roll_out(step)
            self.orders.give(order | {"seconds": self.seconds})
            if stop is not None:
                return

    async def _update_engines(self, version: int) -> None:
        """Waits for the trainer to have `version`; on return every engine answers with it."""
        if version > self.start:
            with _timed(self.seconds, "wait_for_trainer"):
                await self.orders.reply()
        for path in self.shared.glob("batch-*"):  # the ranks are done with them
            path.unlink()
        with _timed(self.seconds, "update_engines"):
            await self.fleet.update(version)

    async def _evaluate(self, step: int) -> dict[str, float] | None:
        """Held-out accuracy where it is due: before, after, and every so many steps."""
        settings = self.config.evaluation
        due = step in (0, self.config.training.steps) or (settings.every and step % settings.every == 0)
        if not self.held_out or not due:
            return None
        with _timed(self.seconds, "evaluate"):
            max_tokens = self.config.rollout.max_response_tokens
            greedy = Sampling(temperature=0.0, max_tokens=max_tokens, training=False)
            result = {"accuracy_greedy": await self._accuracy(greedy, f"eval{step}-greedy")}
            if settings.sampled:
                sampled = Sampling(temperature=settings.temperature, max_tokens=max_tokens, training=False)
                result["accuracy_sampled"] = await self._accuracy(sampled, f"eval{step}-sampled")
        return result

    async def _accuracy(self, sampling: Sampling, name: str) -> float:
        answers = await self.fleet.sample(
            [self._request(prompt, sampling, f"{name}-{i}", str(i), i) for i, prompt in enumerate(self.held_out)]
        )
        scores = await self._score(answers, self.held_out)
        return float(np.mean([score.get("accuracy", score["reward"]) for score in scores]))

    def _reason_to_stop(self, step: int, evaluation: dict[str, float] | None) -> str | None:
        target = self.config.evaluation.target_accuracy
        # Not before the first step: a run that trains nothing is not what was asked for.
        if step and evaluation and target is not None and min(evaluation.values()) >= target:
            return f"held-out accuracy reached {target}"
        return f"{step} steps done" if step == self.config.training.steps else None

    async def _roll_out(self, step: int) -> dict[str, Any]:
        """Samples, scores and leaves the step's batch; returns the message's part that says where and how it went."""
        settings = self.config.rollout
        indices = batch_indices(step, settings.prompts_per_step, len(self.train), self.config.run.seed)
        prompts = [self.train[i] for i in indices for _ in range(settings.samples_per_prompt)]
        groups = np.repeat(np.arange(len(indices)), settings.samples_per_prompt)
        top_k = num_recorded_topk(self.config)
        sampling = Sampling(
            temperature=settings.temperature,
            max_tokens=settings.max_response_tokens,
            training=True,
            num_topk_logprobs=top_k,
            top_p=settings.top_p,
            top_k=settings.top_k,
        )
        with _timed(self.seconds, "generate"):
            trajectories = await self.fleet.sample(
                [
                    self._request(prompt, sampling, f"{step}-{i}", f"{step}-{groups[i]}", int(groups[i]))
                    for i, prompt in enumerate(prompts)
                ]
            )
        with _timed(self.seconds, "score"):
            scores = await self._score(trajectories, prompts)
            samples = with_advantages(trajectories, scores, groups, self.config.advantage.normalise)
        with _timed(self.seconds, "pack"):
            placed = place_batch(self.shared, step, samples, groups, self.config, self.arch)
        state = {"engines": len(self.fleet.living), "balance": placed["balance"]}
        return placed | {"metrics": _batch_metrics(trajectories, scores) | state}

    def _request(self, prompt: Prompt, sampling: Sampling, name: str, group: str, spread: int) -> Request:
        """One response, with a seed of its own."""
        seed = int(np.random.default_rng([self.config.run.seed, *name.encode()]).integers(MAX_SEED))
        return Request(prompt.token_ids.tolist(), replace(sampling, seed=seed), name, group, spread)

    async def _score(self, answers: Sequence[Trajectory], prompts: Sequence[Prompt]) -> list[dict[str, float]]:
        texts = self.tokenizer.batch_decode([a.response_ids for a in answers], skip_special_tokens=True)
        return await asyncio.gather(
            *(
                asyncio.to_thread(self.reward, text, prompt.answer, answer.finish_reason)
                for text, prompt, answer in zip(texts, prompts, answers, strict=True)
            )
        )


def place_batch(
    shared: Path,
    step: int,
    samples: Sequence[Scored],
    groups: np.ndarray,
    config: Config,
    arch: Architecture | None = None,
) -> dict[str, Any]:
    """One file a replica in `shared`; the result says where, how its samples divide into micro-batches, and how even
    the replicas' work is. `arch`: of which a sample costs its share of operations; without it, its length.
    """
    lengths = np.array([sample.trajectory.num_tokens for sample in samples])
    cost = lengths.astype(np.float64) if arch is None else forward_flops(arch, lengths)
    multiple = config.parallel.layout.sequence_multiple
    plan = plan_step(
        -(-lengths // multiple) * multiple,
        groups,
        minibatches=config.training.minibatches,
        replicas=config.parallel.data,
        micro_batch_tokens=config.training.micro_batch_tokens,
        least_micro_batches=config.parallel.least_micro_batches,
        seed=int(np.random.default_rng([config.run.seed, step]).integers(MAX_SEED)),
        packed=config.training.packed,
        cost=cost,
    )
    balance = imbalance(plan, cost)
    if balance > MOST_IMBALANCE:
        share = cost.sum() / (config.training.minibatches * config.parallel.data)
        logging.getLogger(__name__).warning(
            "step %d: the busiest replica has %.2f times the mean work: %d samples for %d replicas in %d minibatches, "
            "the longest of %d tokens is %.2f of a mean share; larger minibatches would even it out",
            step, balance, len(samples), config.parallel.data, config.training.minibatches, lengths.max(),
            cost.max() / share,
        )  # fmt: skip
    files, sizes = [], []
    for replica in range(config.parallel.data):
        path = shared / f"batch-{step}-{replica}.safetensors"
        save_batch(path, [samples[i] for i in _order(plan, replica)])
        files.append(str(path))
        sizes.append([[len(micro) for micro in minibatch[replica]] for minibatch in plan])
    return {"files": files, "micro_batch_sizes": sizes, "balance": balance}


def with_advantages(
    trajectories: Sequence[Trajectory], scores: Sequence[dict[str, float]], groups: np.ndarray, normalise: Any
) -> list[Scored]:
    """Every token of a response has the response's advantage."""
    advantages = group_advantages(np.array([score["reward"] for score in scores]), groups, normalise)
    return [
        Scored(trajectory, score, np.full(trajectory.response_length, advantage, np.float32))
        for trajectory, score, advantage in zip(trajectories, scores, advantages, strict=True)
    ]


def _order(plan: Plan, replica: int) -> list[int]:
    return [index for minibatch in plan for micro_batch in minibatch[replica] for index in micro_batch]


def _batch_metrics(trajectories: Sequence[Trajectory], scores: Sequence[dict[str, float]]) -> dict[str, float]:
    names = sorted({name for score in scores for name in score})
    metrics = {name: float(np.mean([score[name] for score in scores])) for name in names}
    metrics["response_length"] = float(np.mean([t.response_length for t in trajectories]))
    metrics["truncated_share"] = float(np.mean([t.finish_reason == "length" for t in trajectories]))
    return metrics


@contextlib.contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Leaves the seconds of a block, which runs once a step, in `seconds[phase]`."""
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start


def check_engine(url: str, found: Capabilities, config: Config) -> None:
    """Raises ValueError naming everything in which a running engine is not what the config asks for."""
    rollout, arch = config.rollout, load_architecture(config.model.path)
    faults = []
    if found.vocab_size != arch.vocab_size:
        faults.append(f"a vocabulary of {found.vocab_size}, expected the model's {arch.vocab_size}")
    if found.dtype != rollout.dtype:
        faults.append(f"dtype {found.dtype}, expected rollout.dtype {rollout.dtype}")
    longest = config.data.max_prompt_tokens + rollout.max_response_tokens
    if found.max_model_len < longest:
        faults.append(f"a context of {found.max_model_len}, expected at least prompt + response = {longest}")
    if found.max_logprobs < (needed := num_recorded_topk(config) + 1):
        faults.append(f"at most {found.max_logprobs} log-probs, expected {needed} (--max-logprobs)")
    if faults:
        raise ValueError(f"engine {url}: got {'; '.join(faults)}")


async def connect_engines(config: Config) -> tuple[list[VllmEngine], list[Capabilities]]:
    """Clients of the engines that the environment names, and what those say; raises ValueError for one unfit."""
    rollout, urls = config.rollout, os.environ[ENGINE_URLS_VARIABLE].split(",")
    engines = [
        VllmEngine(
            url,
            concurrency=max(1, rollout.max_concurrency // len(urls)),
            timeout_s=rollout.request_timeout_s,
            attempts=rollout.max_retries + 1,
        )
        for url in urls
    ]
    try:
        found = [await engine.capabilities() for engine in engines]
        for url, capabilities in zip(urls, found, strict=True):
            print(f"{url}: {capabilities}", flush=True)
            check_engine(url, capabilities, config)
    except BaseException:
        for engine in engines:
            await engine.close()
        raise
    return engines, found


def fleet_of(config: Config, engines: Sequence[RolloutEngine], orders: Orders, *, fingerprints: bool = False) -> Fleet:
    """The engines as the config wants them kept up to date."""
    assert config.sync.transport != "auto", "the launcher decides"
    return Fleet(
        engines,
        orders,
        transport=config.sync.transport,
        attempts=config.sync.attempts,
        patience_s=config.rollout.start_timeout_s,
        check=functools.partial(check_engine, config=config),
        fingerprints=fingerprints,
    )


async def main(config: Config) -> None:
    """Connects to what the environment names and runs."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    data = config.data

    def prompts(path: Path, limit: int | None) -> PromptSet:
        return load_prompts(
            path, tokenizer, max_prompt_tokens=data.max_prompt_tokens, prompt_key=data.prompt_key,
            answer_key=data.answer_key, chat_template=data.chat_template, limit=limit,
        )  # fmt: skip

    control = Control.connect(os.environ[CONTROL_VARIABLE])
    orders = Orders(control, config.training.rollout_timeout_s)
    engines, found = await connect_engines(config)
    reward = make_reward(config.reward)
    try:
        train = prompts(data.train, None)
        held_out = prompts(data.eval, config.evaluation.prompts) if data.eval else None
        taken = {f"training, {data.train}": train.describe()}
        if held_out:
            taken[f"held out, {data.eval}"] = held_out.describe()
        control.post(READY_KEY, {"engines": [asdict(capabilities) for capabilities in found], "prompts": taken})
        client = Client(
            config=config,
            orders=orders,
            fleet=fleet_of(config, engines, orders),
            arch=load_architecture(config.model.path),
            shared=Path(os.environ[SHARED_VARIABLE]),
            tokenizer=tokenizer,
            train=train.prompts,
            held_out=held_out.prompts if held_out else (),
            reward=reward,
            start=start_of(config.resume),
        )
        await client.run()
    finally:
        for engine in engines:
            await engine.close()
        if isinstance(reward, MathAnswer):
            reward.close()


if __name__ == "__main__":
    asyncio.run(main(load_config(sys.argv[1])))
