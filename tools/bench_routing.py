"""Measures router replay: what it costs a step and a rank's memory, and how much nearer it brings trainer to engine.

    python tools/bench_routing.py [--rounds 5] [--json]

Cost: steps of the trainer on one rank with and without replay, in turns, on one sequence of 4096 tokens and an
untrained Qwen3-MoE that routes as Qwen3-30B-A3B does (8 of 128 experts) in 8 narrow layers. CPU-seconds of the replay's
own code are measured where it runs; the ratio of whole steps is printed beside (both have the hook and the router's
call of it; backward through the scores is the router's own).

Memory: what a rank of TP 2 x CP 2 x PP 4 x DP 4 keeps of the routes of a million tokens, of Qwen3-30B-A3B's 48 layers,
on the host and once packed; while it loads it has its replica's columns of its layers.

Mismatch: a real vLLM and one rank, both in bfloat16, on a random model with wide logits and routers that are often
undecided; the trainer's metrics of one step.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import math
import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from bench_trainer import MODEL, PROMPT, one_rank, scored, trainer_of

from megatron_dppo import step_metrics
from megatron_dppo import trainer as trainer_module
from megatron_dppo.architecture import load_architecture
from megatron_dppo.backend import replay as replay_module
from megatron_dppo.backend.parallel import finalise_parallel
from megatron_dppo.config import Config
from megatron_dppo.data.addition import build_tokenizer
from megatron_dppo.data.packing import rank_micro_batch
from megatron_dppo.data.trajectory import Scored, Trajectory, load_batch, save_batch
from megatron_dppo.job.engine_server import wait_ready
from megatron_dppo.job.processes import free_port, start
from megatron_dppo.rank import load_policy, with_optimizer
from megatron_dppo.rollout.client import place_batch
from megatron_dppo.rollout.engine import Sampling
from megatron_dppo.rollout.routes import check_recorded
from megatron_dppo.rollout.sampler import with_advantages
from megatron_dppo.rollout.vllm.client import VllmEngine
from megatron_dppo.rollout.vllm.server import server_command, server_env
from megatron_dppo.weights.layout import Parallel
from megatron_dppo.weights.mapping import hub_shapes

LENGTH = 4096
ROUTING = {"num_experts": 128, "num_experts_per_tok": 8}
COST_MODEL = MODEL | ROUTING | {"moe_intermediate_size": 96}
LAYERS_30B, TOKENS = 48, 1_000_000
LAYOUT = Parallel(tensor=2, context=2, pipeline=4, ranks=64)
# Small, but with many close decisions: 16 layers of 32 experts, and logits of a spread of about 5.
TOUGH_MODEL = MODEL | {
    "num_hidden_layers": 16,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "head_dim": 32,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "intermediate_size": 256,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "dtype": "bfloat16",
    "eos_token_id": 1,
}
TOUGH_LOGIT_SCALE = 5.0
SAMPLES, RESPONSE = 64, 64


def write_model(path: Path, model: dict[str, Any], logit_scale: float) -> None:
    """Random weights: matrices N(0, 1 / fan-in), the head `logit_scale` times as wide, norms U(0.5, 1.5)."""
    from safetensors.torch import save_file

    path.mkdir()
    build_tokenizer(path)
    (path / "config.json").write_text(json.dumps(model))
    generator = torch.Generator().manual_seed(0)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.rand(shape, generator=generator) + 0.5
        scale = logit_scale if name == "lm_head.weight" else 1.0
        return torch.randn(shape, generator=generator) * (scale / math.sqrt(shape[-1]))

    dtype = getattr(torch, model["dtype"])
    shapes = hub_shapes(load_architecture(path))
    save_file({name: draw(name, shape).to(dtype) for name, shape in shapes.items()}, path / "model.safetensors")


def config_of(path: Path, run_dir: Path, mode: str, response: int, **routing: Any) -> Config:
    dtype = json.loads((path / "config.json").read_text())["dtype"]
    return Config.model_validate(
        {
            "run": {"name": "bench", "dir": str(run_dir)},
            "model": {"path": str(path), "dtype": dtype},
            "data": {"train": "unused", "max_prompt_tokens": 64},
            "reward": {"name": "final_answer"},
            "rollout": {"max_response_tokens": response, "prompts_per_step": 2, "samples_per_prompt": 2},
            "routing": {"mode": mode, **routing},
            "training": {"steps": 1000, "minibatches": 1, "micro_batch_tokens": LENGTH, "lr": 1e-6},
            "logging": {"tensorboard": False},
        }
    )


def with_routes(sample: Scored, layers: int, rng: np.random.Generator) -> Scored:
    """Random experts: 8 distinct ones of 128."""
    rows = sample.trajectory.num_tokens - 1
    experts = (rng.integers(0, 128, (rows, layers, 1)) + 16 * np.arange(8)) % 128
    trajectory = replace(
        sample.trajectory,
        routed_experts=experts.astype(np.uint8),
        routes_valid=np.ones(rows, np.bool_),
        moe_layers=np.arange(layers, dtype=np.int32),
    )
    return replace(sample, trajectory=trajectory)


# ---- what it costs a step ----


@contextlib.contextmanager
def replay_cpu() -> Iterator[Callable[[], float]]:
    """CPU-seconds of the replay's own code: what routers do beyond their top-k, and what is done around the model."""
    seconds = dict.fromkeys(("routers", "own top-k", "to the device", "agreement"), 0.0)
    answer = replay_module.Replay.get_replay_topk

    def counted(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            result = work(*args, **kwargs)
            seconds[name] += time.process_time() - started
            return result

        return call

    def get_replay_topk(self: Any, scores: Any, topk: int, groups: Any, group_topk: Any, own_topk: Any) -> Any:
        return counted("routers", answer)(self, scores, topk, groups, group_topk, counted("own top-k", own_topk))

    with (
        mock.patch.object(replay_module.Replay, "get_replay_topk", get_replay_topk),
        mock.patch.object(trainer_module, "recorded_routes", counted("to the device", replay_module.recorded_routes)),
        mock.patch.object(step_metrics, "agreement_sums", counted("agreement", replay_module.agreement_sums)),
    ):
        yield lambda: seconds["routers"] - seconds["own top-k"] + seconds["to the device"] + seconds["agreement"]


def step_cost(rounds: int, root: Path) -> dict[str, Any]:
    """Share of replay in a step's CPU-seconds, and steps with over steps without; medians of rounds."""
    write_model(root / "cost", COST_MODEL | {"dtype": "float32"}, 1.0)
    configs = {mode: config_of(root / "cost", root, mode, LENGTH) for mode in ("off", "rollout")}
    rank = one_rank()
    torch.set_num_threads(os.cpu_count() or 1)
    rng = np.random.default_rng(0)
    sample = with_routes(scored(LENGTH, 0, int(str(MODEL["vocab_size"]))), int(str(MODEL["num_hidden_layers"])), rng)
    model, optimizer = with_optimizer(configs["rollout"], load_policy(configs["rollout"], rank))
    trainers = {mode: trainer_of(config, model, optimizer) for mode, config in configs.items()}
    order = place_batch(root, 0, [sample], np.zeros(1, np.int64), configs["off"])
    shares: list[float] = []
    cpu: dict[str, list[float]] = {"off": [], "rollout": []}
    for number in range(rounds + 1):
        loads = {}
        for mode, trainer in trainers.items():
            with replay_cpu() as own_code:
                started = time.process_time()
                minibatches = trainer._load(order)
                loads[mode] = time.process_time() - started
                trainer._train_step(0, minibatches)
                seconds = time.process_time() - started
            if number:  # the first one warms up
                cpu[mode].append(seconds)
                if mode == "rollout":
                    shares.append((own_code() + loads["rollout"] - loads["off"]) / seconds)
    finalise_parallel()
    return {
        "step_overhead": statistics.median(shares),
        "step_overhead_spread": [min(shares), max(shares)],
        "step_over_off": statistics.median(b / a for a, b in zip(cpu["off"], cpu["rollout"], strict=True)),
        "step_cpu_seconds": statistics.median(cpu["rollout"]),
    }


# ---- what it costs a rank's memory ----


def memory(root: Path) -> dict[str, Any]:
    """What one rank keeps over its share, own layers x own tokens x 8 ids of a byte; and bytes a token in the batch."""
    rng = np.random.default_rng(0)
    count = TOKENS // LAYOUT.data // LENGTH
    samples = [with_routes(scored(LENGTH, i, 512), LAYERS_30B, rng) for i in range(count)]
    first = samples[0].trajectory
    assert first.routed_experts is not None
    bytes_per_token = first.routed_experts.nbytes / len(first.routed_experts)
    save_batch(root / "batch.safetensors", samples)
    del samples, first
    layers = range(LAYERS_30B // LAYOUT.pipeline)

    def kept(routed: bool) -> int:
        gc.collect()
        tracemalloc.start()
        scored = load_batch(root / "batch.safetensors", layers if routed else ())
        settings: dict[str, Any] = {"routed_layers": layers} if routed else {}
        batches = [
            rank_micro_batch(
                scored[i : i + 2],
                layout=LAYOUT,
                context_rank=1,
                routes_of_tensor_rank=1 if routed else None,
                **settings,
            )
            for i in range(0, count, 2)
        ]
        del scored
        gc.collect()
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert batches
        return size

    share = count * LENGTH / LAYOUT.context / LAYOUT.tensor * len(layers) * 8
    return {
        "bytes_per_token": bytes_per_token,
        "host_bytes_over_share": (kept(True) - kept(False)) / share,
        "host_share_mib": share / 2**20,
    }


# ---- how near the trainer comes to the engine ----


async def _sample(url: str, path: Path) -> list[Trajectory]:
    rng = np.random.default_rng(0)
    engine = VllmEngine(url, concurrency=SAMPLES)
    prompts = [rng.integers(3, 512, PROMPT).tolist() for _ in range(SAMPLES)]
    try:
        answers = await asyncio.gather(
            *(
                engine.generate(prompt, Sampling(1.0, RESPONSE, training=True, seed=i), str(i))
                for i, prompt in enumerate(prompts)
            )
        )
    finally:
        await engine.close()
    check_recorded(answers, load_architecture(path))
    return answers


def mismatch(root: Path) -> dict[str, Any]:
    """Mean |pi - mu| without replay over that with it; and how many experts agree without, layer by layer."""
    path, port = root / "tough", free_port()
    write_model(path, TOUGH_MODEL, TOUGH_LOGIT_SCALE)
    argv = server_command(
        path, port=port, cpu=True, dtype="bfloat16", routed_experts=True, max_model_len=256, max_num_seqs=SAMPLES
    )
    server = start("vllm", argv, env=server_env(cpu=True, cache_root=root / "cache"), log_path=root / "server.log")
    try:
        url = f"http://127.0.0.1:{port}"
        wait_ready(url, server, 300.0)
        answers = asyncio.run(_sample(url, path))
    finally:
        server.stop()
    groups = np.arange(len(answers)) // 2
    rewards = [{"reward": float(i % 2)} for i in range(len(answers))]
    batch = with_advantages(answers, rewards, groups, "none")
    config = config_of(path, root, "rollout", RESPONSE, measure_every=1)
    rank = one_rank()
    model, optimizer = with_optimizer(config, load_policy(config, rank))
    trainer = trainer_of(config, model, optimizer)
    metrics: dict[str, Any] = trainer._train_step(0, trainer._load(place_batch(root, 0, batch, groups, config)))
    finalise_parallel()
    layers = int(str(TOUGH_MODEL["num_hidden_layers"]))
    return {
        "mismatch": metrics["mismatch"],
        "mismatch_without_replay": metrics["mismatch_without_replay"],
        "mismatch_reduction": metrics["mismatch_without_replay"] / metrics["mismatch"],
        "agreement": metrics["route_agreement_without_replay"],
        "agreement_per_layer": [metrics[f"route_agreement_without_replay/{layer}"] for layer in range(layers)],
        "agreement_above_replayed_layers": metrics["route_agreement"],
        "sampled_tokens": int(sum(t.response_length for t in answers)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        result = memory(Path(root)) | mismatch(Path(root)) | step_cost(arguments.rounds, Path(root))
    for name, value in result.items():
        print(f"{name:26}", *(f"{x:.4g}" for x in (value if isinstance(value, list) else [value])))
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
