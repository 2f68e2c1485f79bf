"""The rollout client: the process between engines and trainer ranks.

For each step it brings new weights to the engines, evaluates where it is due, has the next batches sampled and scored
(`sampler`), and leaves for each data-parallel replica a file with just that replica's samples, in the order of its
micro-batches. Started by the launcher as `python -m megatron_dppo.rollout.client CONFIG`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dppo.architecture import Architecture, forward_flops, load_architecture
from megatron_dppo.checkpoints import queued_batches, start_of
from megatron_dppo.config import Config
from megatron_dppo.config.loading import load_config
from megatron_dppo.control import (
    CONTROL_VARIABLE,
    READY_KEY,
    SHARED_VARIABLE,
    STOP_KEY,
    STOPPED_KEY,
    Control,
    Orders,
)
from megatron_dppo.data.packing import Plan, imbalance, plan_step, up_to_multiple
from megatron_dppo.data.prompts import Prompt, load_prompts
from megatron_dppo.data.rewards import MathAnswer, make_reward
from megatron_dppo.data.trajectory import Scored, save_batch
from megatron_dppo.rollout.engines import connect_engines, fleet_of
from megatron_dppo.rollout.evaluation import describe_eval_sets, evaluate, load_eval_sets, measures_of
from megatron_dppo.rollout.routes import probe_routes
from megatron_dppo.rollout.sampler import MAX_SEED, Ahead, Sampler, batch_metrics, timed

MOST_IMBALANCE = 1.05  # of the replicas' work, beyond which the log says why


@dataclass
class Client:
    """What the client knows for the whole run."""

    config: Config
    orders: Orders
    sampler: Sampler
    ahead: Ahead
    arch: Architecture
    shared: Path
    held_out: Mapping[str, Sequence[Prompt]]  # by the name of their set
    start: int = 0  # steps done before
    seconds: dict[str, float] = field(default_factory=dict)  # of the step at hand, by phase

    async def run(self) -> None:
        """All steps. Training ends with an order that says why instead of samples."""
        fleet = self.sampler.fleet
        for step in range(self.start, self.config.training.steps + 1):
            # Version 0 too: whatever an engine started with, what it samples from is what the trainer has.
            with timed(self.seconds, "update_engines"):
                await fleet.update(step)
            if step == self.start and self.config.routing.mode == "rollout":
                await probe_routes(fleet.living, self.sampler.train, self.arch)
            evaluation = await self._evaluate(step)
            stop = self._reason_to_stop(step, evaluation)
            if stop is not None:
                await self.ahead.close()
                await self.orders.end({"do": "stop", "stop": stop, "evaluation": evaluation, "seconds": self.seconds})
                return
            self.ahead.begin(step)
            order = await self._next_batch(step)
            seconds, self.seconds = self.seconds, {}
            with timed(self.seconds, "wait_for_trainer"):
                await self.orders.do({"do": "train", "evaluation": evaluation, "seconds": seconds, **order})
                self.ahead.check()
                for path in self.shared.glob("batch-*"):  # the ranks are done with them
                    path.unlink()
                asked = self.orders.control.peek(STOP_KEY) is not None
                await self._save(step + 1, at_once=asked)
            if asked:
                await self._stop_early(step + 1)
                return

    async def _stop_early(self, steps: int) -> None:
        """The end of a run that goes on from its checkpoint."""
        await self.ahead.close()
        self.orders.control.post(STOPPED_KEY, {"steps": steps})
        stop = {"stop": f"asked to stop after step {steps}", "resumable": True}
        await self.orders.end({"do": "stop", "evaluation": None, "seconds": self.seconds, **stop})

    async def _evaluate(self, step: int) -> dict[str, float] | None:
        """Held-out accuracies by name where they are due: before, after, and every so many steps."""
        settings = self.config.evaluation
        due = step in (0, self.config.training.steps) or (settings.every and step % settings.every == 0)
        if not self.held_out or not due:
            return None
        with timed(self.seconds, "evaluate"):
            sampler, measures = self.sampler, measures_of(self.config, self.held_out, f"eval{step}")
            seed = self.config.run.seed
            results = await evaluate(measures, sampler.fleet.sample, sampler.tokenizer, sampler.reward, seed)
        for result in results:
            print(f"step {step}: {result}", flush=True)
        return {result.name: result.accuracy for result in results}

    def _reason_to_stop(self, step: int, evaluation: dict[str, float] | None) -> str | None:
        target = self.config.evaluation.target_accuracy
        # Not before the first step: a run that trains nothing is not what was asked for.
        if step and evaluation and target is not None and min(evaluation.values()) >= target:
            return f"held-out accuracy reached {target}"
        return f"{step} steps done" if step == self.config.training.steps else None

    async def _next_batch(self, step: int) -> dict[str, Any]:
        """Waits for the step's samples and leaves them for the ranks; returns the part of the order that says where
        they lie and how they are."""
        with timed(self.seconds, "wait_for_samples"):
            batch = await self.ahead.take(step)
        self.seconds |= batch.seconds
        rollout = self.config.rollout
        groups = np.repeat(np.arange(rollout.prompts_per_step), rollout.samples_per_prompt)
        with timed(self.seconds, "pack"):
            placed = place_batch(self.shared, step, batch.samples, groups, self.config, self.arch)
        state = {"engines": len(self.sampler.fleet.living), "balance": placed["balance"]}
        return placed | {"metrics": batch_metrics(batch, step) | state}

    async def _save(self, step: int, *, at_once: bool = False) -> None:
        """A checkpoint where one is due, or `at_once`, with the batches that are waiting to be trained."""
        every = self.config.checkpoint.every
        if at_once or (every and step % every == 0):
            queue = self.ahead.save(self.shared)
            await self.orders.do({"do": "save", "queue": queue})
            for path in queue.values():
                Path(path).unlink()


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
    plan = plan_step(
        up_to_multiple(lengths, config.parallel.layout.sequence_multiple),
        groups,
        minibatches=config.training.minibatches,
        replicas=config.parallel.data,
        micro_batch_tokens=config.training.micro_batch_tokens,
        micro_batch_multiple=config.parallel.micro_batch_multiple,
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


def _order(plan: Plan, replica: int) -> list[int]:
    return [index for minibatch in plan for micro_batch in minibatch[replica] for index in micro_batch]


async def main(config: Config) -> None:
    """Connects to what the environment names and runs."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    data, arch = config.data, load_architecture(config.model.path)

    control = Control.connect(os.environ[CONTROL_VARIABLE])
    orders = Orders(control, config.training.rollout_timeout_s)
    engines, found = await connect_engines(config, arch)
    reward = make_reward(config.reward)
    try:
        train = load_prompts(
            data.train, tokenizer, max_prompt_tokens=data.max_prompt_tokens, prompt_key=data.prompt_key,
            answer_key=data.answer_key, prompt_template=data.prompt_template, chat_template=data.chat_template,
        )  # fmt: skip
        held_out = load_eval_sets(config, tokenizer)
        taken = {f"training, {data.train}": train.describe(), **describe_eval_sets(config, held_out)}
        control.post(READY_KEY, {"engines": [asdict(capabilities) for capabilities in found], "prompts": taken})
        fleet = fleet_of(config, arch, engines, orders)
        sampler = Sampler(config, fleet, tokenizer, train.prompts, reward, arch)
        ahead = Ahead(sampler)
        if config.resume != "never":
            ahead.restore(queued_batches(Path(config.resume)))
        client = Client(
            config=config,
            orders=orders,
            sampler=sampler,
            ahead=ahead,
            arch=arch,
            shared=Path(os.environ[SHARED_VARIABLE]),
            held_out={name: found.prompts for name, found in held_out.items()},
            start=start_of(config.resume),
        )
        try:
            await client.run()
        finally:
            await ahead.close()
    finally:
        for engine in engines:
            await engine.close()
        if isinstance(reward, MathAnswer):
            reward.close()


if __name__ == "__main__":
    asyncio.run(main(load_config(sys.argv[1])))
