"""Measures a training step: packed against padded, its phases, how even the work is, and what sampling ahead gains.

    python tools/bench_trainer.py [--sequences 16] [--rounds 5] [--json]

512 lengths (lognormal, median 400, at most 4096, seed 0) and a Qwen3-MoE of 100 million parameters, untrained, in
float32. Balance and bubble are of the plan for all 512 over 8 replicas (the bubble of a simulated 1F1B schedule of 4
stages, where backward costs twice forward). Steps are real ones of the trainer on one rank with as many threads as the
machine has cores, on every n-th of the sorted lengths, so that the few have the distribution of all. Ways take turns.

Overlap: the real client and a real rank on the quickstart's small model, with an engine that does nothing but wait, as
long as a step of training takes: an engine that computes would take the cores from the trainer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from megatron_dppo.architecture import forward_flops, load_architecture
from megatron_dppo.backend import step as backend_step
from megatron_dppo.backend.model import Model
from megatron_dppo.backend.optimizer import Optimizer
from megatron_dppo.backend.parallel import Rank, finalise_parallel, initialise_parallel
from megatron_dppo.config import Config, objective_of
from megatron_dppo.config.loading import save_config
from megatron_dppo.control import CONTROL_VARIABLE, SHARED_VARIABLE, Control, Inbox, Orders
from megatron_dppo.data.packing import imbalance, plan_step
from megatron_dppo.data.prompts import Prompt
from megatron_dppo.data.trajectory import Scored, Trajectory
from megatron_dppo.job.machines import start_ranks
from megatron_dppo.job.processes import free_port, stop_on_exit
from megatron_dppo.metrics import read_metrics
from megatron_dppo.rank import load_policy, with_optimizer
from megatron_dppo.rollout.client import Client, place_batch
from megatron_dppo.rollout.engine import Sampling
from megatron_dppo.rollout.fleet import Fleet
from megatron_dppo.rollout.sampler import Ahead, Sampler
from megatron_dppo.trainer import Trainer
from megatron_dppo.weights.layout import Parallel

LENGTHS, MEDIAN, LONGEST, PROMPT = 512, 400, 4096, 8
REPLICAS, STAGES = 8, 4
BUDGET = 8192  # tokens of a micro-batch
NUM_TOPK = 20
MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": 8,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 448,
    "intermediate_size": 1024,
    "vocab_size": 8192,
    "max_position_embeddings": 8192,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
OVERLAP_STEPS, OVERLAP_WARMUP = 12, 3


def lengths_of_all() -> np.ndarray:
    """512 of them."""
    drawn = np.random.default_rng(0).lognormal(math.log(MEDIAN), 1.0, LENGTHS)
    return np.clip(drawn, PROMPT + 1, LONGEST).astype(np.int64)


def write_model(path: Path) -> int:
    """Random weights; returns how many."""
    from safetensors.torch import save_file

    from megatron_dppo.weights.mapping import hub_shapes

    path.mkdir()
    (path / "config.json").write_text(json.dumps(MODEL))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
        for name, shape in hub_shapes(load_architecture(path)).items()
    }
    save_file(tensors, path / "model.safetensors")
    return sum(tensor.numel() for tensor in tensors.values())


def scored(length: int, number: int, vocab_size: int) -> Scored:
    """A response as an engine would have recorded it, but for its content."""
    rng = np.random.default_rng([1, number])
    num = length - PROMPT
    topk = np.stack([rng.permutation(vocab_size)[:NUM_TOPK] for _ in range(num)]).astype(np.int32)
    logprobs = np.full(num, -math.log(vocab_size), np.float32)
    trajectory = Trajectory(
        sample_id=str(number), group_id=str(number), engine="none", finish_reason="stop", temperature=1.0,
        prompt_ids=rng.integers(0, vocab_size, PROMPT).astype(np.int32),
        response_ids=rng.integers(0, vocab_size, num).astype(np.int32),
        loss_mask=np.ones(num, np.bool_), rollout_logprobs=logprobs,
        topk_ids=topk, topk_logprobs=np.full((num, NUM_TOPK), -math.log(vocab_size), np.float32),
        policy_versions=np.zeros(num, np.int32),
    )  # fmt: skip
    return Scored(trajectory, {"reward": 0.0}, np.full(num, rng.choice([-1.0, 1.0]), np.float32))


def config_of(path: Path, run_dir: Path, **training: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "bench", "dir": str(run_dir)},
            "model": {"path": str(path), "dtype": "float32"},
            "data": {"train": "unused", "max_prompt_tokens": PROMPT},
            "reward": {"name": "final_answer"},
            "rollout": {"max_response_tokens": LONGEST, "prompts_per_step": 2, "samples_per_prompt": 2},
            "objective": {"name": "dppo_topk_kl", "top_k": NUM_TOPK},
            "training": {"steps": 1000, "minibatches": 1, "micro_batch_tokens": BUDGET, "lr": 1e-6, **training},
            "logging": {"tensorboard": False},
        }
    )


# ---- the plan for all lengths ----


def planned() -> dict[str, float]:
    """How even the work of 8 replicas is, and what a pipeline of 4 stages would idle."""
    lengths = lengths_of_all()
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "config.json").write_text(json.dumps(MODEL))
        cost = forward_flops(load_architecture(root), lengths)
    plan = plan_step(
        lengths, np.arange(LENGTHS), minibatches=1, replicas=REPLICAS, micro_batch_tokens=BUDGET, seed=0, cost=cost
    )
    bubbles = [bubble([float(cost[micro].sum()) for micro in replica], STAGES) for replica in plan[0]]
    return {"balance": imbalance(plan, cost), "bubble": max(bubbles)}


def bubble(costs: list[float], stages: int) -> float:
    """Share of the stages' time in which they wait, under 1F1B; `costs`: of the whole forward pass of micro-batches."""
    count = len(costs)
    work = {"F": [cost / stages for cost in costs], "B": [2 * cost / stages for cost in costs]}
    orders = []
    for stage in range(stages):
        warm = min(stages - 1 - stage, count)
        order = [("F", i) for i in range(warm)]
        for i in range(count - warm):
            order += [("F", warm + i), ("B", i)]
        orders.append(order + [("B", i) for i in range(count - warm, count)])
    done: dict[tuple[int, str, int], float] = {}
    at, clock = [0] * stages, [0.0] * stages
    while any(place < len(order) for place, order in zip(at, orders, strict=True)):
        for stage, order in enumerate(orders):
            while at[stage] < len(order):
                kind, i = order[at[stage]]
                before = (stage - 1, kind, i) if kind == "F" else (stage + 1, kind, i)
                first = (kind == "F" and stage == 0) or (kind == "B" and stage == stages - 1)
                if not first and before not in done:
                    break
                clock[stage] = max(clock[stage], 0.0 if first else done[before]) + work[kind][i]
                done[stage, kind, i] = clock[stage]
                at[stage] += 1
    return 1 - 3 * sum(costs) / (stages * max(clock))


# ---- steps ----


@dataclass
class Way:
    """One way of training on the same samples."""

    trainer: Trainer
    order: Callable[[], Mapping[str, Any]]
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def step(self) -> None:
        phases: dict[str, float] = {}
        started = time.perf_counter()
        with _timed(phases, "place"):
            order = self.order()
        with _timed(phases, "load"):
            minibatches = self.trainer._load(order)
        with (
            _counting(phases, "forward_backward", backend_step, "get_forward_backward_func", made=True),
            _counting(phases, "head", backend_step, "policy_loss"),
            _counting(phases, "optimizer", self.trainer.optimizer, "step"),
        ):
            self.trainer._train_step(0, minibatches)
        phases["total"] = time.perf_counter() - started
        for name, value in phases.items():
            self.seconds.setdefault(name, []).append(value)


@contextlib.contextmanager
def _timed(phases: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    phases[name] = phases.get(name, 0.0) + time.perf_counter() - started


@contextlib.contextmanager
def _counting(phases: dict[str, float], name: str, owner: Any, function: str, *, made: bool = False) -> Iterator[None]:
    """Counts the time of a function as a phase; `made`: of the function that it returns."""
    original = getattr(owner, function)

    def counted(*args: Any, **kwargs: Any) -> Any:
        if made:
            work = original(*args, **kwargs)
            return lambda *a, **k: _call(phases, name, work, *a, **k)
        return _call(phases, name, original, *args, **kwargs)

    with mock.patch.object(owner, function, counted):
        yield


def _call(phases: dict[str, float], name: str, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _timed(phases, name):
        return work(*args, **kwargs)


def one_rank() -> Rank:
    """This process as the only rank."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return initialise_parallel(Parallel(), 0)


def trainer_of(config: Config, model: Model, optimizer: Optimizer) -> Trainer:
    """A trainer that nobody gives orders."""
    inbox = Inbox(Control.serve(), answers=False, patience_s=1.0)
    return Trainer(config, inbox, model, optimizer, objective_of(config), {})


def steps(sequences: int, rounds: int, root: Path) -> dict[str, Any]:
    """Packed steps, padded ones of sorted lengths (as `training.packed=false`), and padded ones in order of arrival."""
    parameters = write_model(root / "model")
    rank = one_rank()
    torch.set_num_threads(os.cpu_count() or 1)
    lengths = np.random.default_rng(0).permutation(np.sort(lengths_of_all())[:: LENGTHS // sequences])
    samples = [scored(int(length), i, int(str(MODEL["vocab_size"]))) for i, length in enumerate(lengths)]
    groups = np.arange(len(samples))
    configs = {packed: config_of(root / "model", root, packed=packed) for packed in (True, False)}
    model, optimizer = with_optimizer(configs[True], load_policy(configs[True], rank))
    arch = model.arch

    def placed(packed: bool) -> Mapping[str, Any]:
        return place_batch(root, 0, samples, groups, configs[packed], arch)

    def in_order() -> Mapping[str, Any]:
        sizes: list[int] = []
        longest = 0
        for length in lengths.tolist():
            longest = max(longest, length)
            if not sizes or (sizes[-1] + 1) * longest > BUDGET:
                sizes.append(0)
                longest = length
            sizes[-1] += 1
        with mock.patch("megatron_dppo.rollout.client.plan_step") as plan:
            ends = np.cumsum(sizes)
            plan.return_value = [[[list(range(e - n, e)) for e, n in zip(ends.tolist(), sizes, strict=True)]]]
            return placed(False)

    ways = {
        "packed": Way(trainer_of(configs[True], model, optimizer), lambda: placed(True)),
        "padded, sorted": Way(trainer_of(configs[False], model, optimizer), lambda: placed(False)),
        "padded, as they come": Way(trainer_of(configs[False], model, optimizer), in_order),
    }
    for number in range(rounds + 1):
        for way in ways.values():
            way.step()
        if number == 0:
            for way in ways.values():
                way.seconds.clear()  # the first one warms up
    finalise_parallel()
    return {
        "parameters": parameters,
        "tokens": int(lengths.sum()),
        "seconds": {name: way.seconds for name, way in ways.items()},
    }


# ---- overlap ----


@dataclass(eq=False)
class WaitingEngine:
    """Answers after a while, with anything; takes weights at once."""

    seconds: float
    url: str = "an engine that waits"
    version: int = 0

    async def capabilities(self) -> None: ...
    async def rejoin(self) -> None: ...
    async def pause(self, mode: str) -> None: ...
    async def health(self) -> None: ...
    async def begin_update(self, version: int, update: Any) -> None:
        self.version = version

    async def commit(self) -> None: ...

    async def generate(self, prompt: Any, sampling: Sampling, request_id: str, *, group_id: str) -> Trajectory:
        version = self.version
        await asyncio.sleep(self.seconds)
        num = sampling.max_tokens
        return Trajectory(
            sample_id=request_id, group_id=group_id, engine=self.url, finish_reason="length", temperature=1.0,
            prompt_ids=np.array(prompt, np.int32), response_ids=np.ones(num, np.int32),
            loss_mask=np.ones(num, np.bool_), rollout_logprobs=np.full(num, -2.0, np.float32),
            topk_ids=np.empty((num, 0), np.int32), topk_logprobs=np.empty((num, 0), np.float32),
            policy_versions=np.full(num, version, np.int32),
        )  # fmt: skip


def overlap(staleness: int, engine_s: float, root: Path) -> list[float]:
    """Seconds of each step but the first few."""
    from make_quickstart_input import write_initial_model

    run = root / f"overlap-{staleness}-{engine_s:.3f}"
    write_initial_model(run / "model", seed=1)
    config = Config.model_validate(
        {
            "run": {"name": "overlap", "dir": str(run)},
            "model": {"path": str(run / "model"), "dtype": "float32"},
            "data": {"train": "unused", "max_prompt_tokens": 8},
            "reward": {"name": "final_answer"},
            "rollout": {
                "max_response_tokens": 48, "prompts_per_step": 32, "samples_per_prompt": 8, "max_staleness": staleness,
            },
            "training": {"steps": OVERLAP_STEPS, "minibatches": 2, "micro_batch_tokens": 1024, "lr": 1e-6},
            "logging": {"tensorboard": False},
        }
    )  # fmt: skip
    save_config(config, run / "resolved.yaml")
    asyncio.run(_overlap(config, WaitingEngine(engine_s), run))
    records = read_metrics(run / "metrics.jsonl")
    return [record["seconds/total"] for record in records if "loss" in record][OVERLAP_WARMUP:]


async def _overlap(config: Config, engine: WaitingEngine, run: Path) -> None:
    control = Control.serve()
    shared = run / "shared"
    shared.mkdir()
    env = {**os.environ, CONTROL_VARIABLE: control.address, SHARED_VARIABLE: str(shared)}
    argv = [sys.executable, "-W", "ignore", "-m", "megatron_dppo.trainer", str(run / "resolved.yaml")]
    with stop_on_exit() as children:
        children.extend(start_ranks(argv, 1, env=env, logs=run / "logs"))
        orders = Orders(control, 300.0)
        fleet = Fleet([engine], orders, transport="shm")  # type: ignore[list-item]
        prompts = [Prompt(1, "1+1", "2", np.array([1, 2, 3], np.int32))]
        tokenizer = mock.Mock()
        tokenizer.batch_decode = lambda ids, **_: [""] * len(ids)
        rewards = itertools.cycle([1.0, 0.0])
        arch = load_architecture(config.model.path)
        sampler = Sampler(config, fleet, tokenizer, prompts, lambda *_: {"reward": next(rewards)}, arch)
        ahead = Ahead(sampler)
        await Client(config, orders, sampler, ahead, arch, shared, {}).run()
        await ahead.close()
        for child in children:
            while child.poll() is None:
                await asyncio.sleep(0.05)


# ---- all of it ----


def measure(sequences: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as root:
        alone = statistics.median(overlap(0, 0.0, Path(root)))
        times = {staleness: overlap(staleness, alone, Path(root)) for staleness in (0, 1)}
        found = steps(sequences, rounds, Path(root))
    seconds = found["seconds"]
    packed = seconds["packed"]

    def over(way: str) -> float:
        return statistics.median(b / a for a, b in zip(packed["total"], seconds[way]["total"], strict=True))

    outside = [
        1 - (work + optimizer) / total
        for work, optimizer, total in zip(packed["forward_backward"], packed["optimizer"], packed["total"], strict=True)
    ]
    total = statistics.median(packed["total"])
    return {
        **planned(),
        "tokens_per_second": found["tokens"] / total,
        "outside_share": statistics.median(outside),
        "packed_over_padded": over("padded, as they come"),
        "packed_over_sorted": over("padded, sorted"),
        "async_over_sync": statistics.median(times[0]) / statistics.median(times[1]),
        "parameters": found["parameters"],
        "tokens": found["tokens"],
        "tflops": 3 * float(_flops(sequences)) / total / 1e12,
        "seconds": {way: {k: _spread(v) for k, v in phases.items()} for way, phases in seconds.items()},
        "overlap": {"train_alone": alone, **{f"max_staleness {s}": _spread(times[s]) for s in times}},
    }


def _flops(sequences: int) -> float:
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "config.json").write_text(json.dumps(MODEL))
        return float(forward_flops(load_architecture(root), np.sort(lengths_of_all())[:: LENGTHS // sequences]).sum())


def _spread(values: list[float]) -> list[float]:
    """Median, least, most."""
    return [statistics.median(values), min(values), max(values)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=16, help="of the 512, in a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    arguments = parser.parse_args()
    result = measure(arguments.sequences, arguments.rounds)
    print(
        f"{result['parameters'] / 1e6:.1f} M parameters, {result['tokens']} tokens a step; median (least..most) seconds"
    )
    for way, phases in result["seconds"].items():
        print(f"  {way:22}", *(f"{name} {m:.2f} ({a:.2f}..{b:.2f})" for name, (m, a, b) in phases.items()))
    for name, value in result["overlap"].items():
        print(f"  {name:22}", value if isinstance(value, float) else "{:.2f} ({:.2f}..{:.2f})".format(*value))
    for name, value in result.items():
        if isinstance(value, float):
            print(f"{name:22} {value:.4g}")
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
