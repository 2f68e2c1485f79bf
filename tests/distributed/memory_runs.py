"""Runs of the trainer whose memory is traced, and what the planner says of them.

A run is two steps of the trainer's own on random samples that fill their micro-batches. What a rank has between them is
counted tensor by tensor; from there torch's profiler follows every allocation of the second.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from megatron_dppo.architecture import load_architecture
from megatron_dppo.backend.parallel import Rank
from megatron_dppo.config import Config
from megatron_dppo.data.trajectory import Scored, Trajectory, load_batch, save_batch
from megatron_dppo.planner.hardware import GIB, GPUS, Device
from megatron_dppo.planner.memory import RankMemory, rank_memory
from megatron_dppo.planner.workload import workload_of
from megatron_dppo.rollout.client import place_batch
from megatron_dppo.weights.layout import Parallel, coordinates
from tests.distributed.jobs import trainer_of
from tests.distributed.rank_pool import RankPool
from tests.tiny_models import deepseek_config, qwen2_config, tiny_config, tiny_model, write_checkpoint

PROMPT = 16  # short, for every token is planned as a counted one
HERE = GPUS["h200"] if torch.cuda.is_available() else Device("cpu", 24 * GIB, 0, 1e11, 1.0, 1e10, 1e9, 1e9)


@dataclass(frozen=True)
class MemoryRun:
    """A model, a layout and a workload; `micro_batches` of `samples` samples of `length` tokens a gradient step."""

    model: dict[str, Any]
    family: Callable[..., Any] = tiny_config
    parallel: Parallel = Parallel()
    length: int = 512
    samples: int = 2
    micro_batches: int = 1
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    def config(self) -> Config:
        """The run's; `model.path` is the caller's to set."""
        replicas = self.parallel.data
        training = {"steps": 2, "minibatches": 1, "micro_batch_tokens": self.samples * self.length, "lr": 1e-3}
        return Config.model_validate(
            {
                "run": {"name": "memory"},
                "data": {"train": "unused", "max_prompt_tokens": PROMPT},
                "reward": {"name": "final_answer"},
                "sync": {"transport": "shm"},
                "rollout": {
                    "max_response_tokens": self.length - PROMPT,
                    "prompts_per_step": self.micro_batches * replicas,
                    "samples_per_prompt": self.samples,
                },
                **self.sections,
                "model": {"path": "unused", "dtype": "bfloat16", "layers": "torch"} | self.sections.get("model", {}),
                "parallel": asdict(self.parallel) | self.sections.get("parallel", {}),
                "training": training | self.sections.get("training", {}),
            }
        )


BASE = {
    "vocab_size": 4096, "num_layers": 2, "hidden_size": 256, "num_heads": 8, "num_kv_heads": 4, "head_dim": 32,
    "num_experts": 8, "top_k": 2, "moe_intermediate_size": 256, "max_position_embeddings": 4096,
}  # fmt: skip
CALIBRATION = {
    "base": MemoryRun(BASE),
    "four experts a token": MemoryRun(BASE | {"top_k": 4, "vocab_size": 1024}),
    "recomputed, head in chunks": MemoryRun(
        BASE | {"num_layers": 3, "top_k": 4},
        sections={  # gloo's reduce-scatter would need more than a layer's backward
            "training": {"recompute": "full"},
            "head": {"memory_mib": 2},
            "parallel": {"distributed_optimizer": False},
        },
    ),
}
CHECKS = {
    "hidden x 2": MemoryRun(BASE | {"hidden_size": 512}),
    "layers x 2": MemoryRun(BASE | {"num_layers": 4}),
    "sequence x 2": MemoryRun(BASE, length=1024),
    "TP 2, EP 2": MemoryRun(BASE, parallel=Parallel(tensor=2, expert=2, ranks=2)),
    "PP 2": MemoryRun(BASE | {"num_layers": 4}, parallel=Parallel(pipeline=2, ranks=2), micro_batches=3),
}
OTHERS = {  # what the constants were never looked at for
    "CP 2": MemoryRun(BASE, parallel=Parallel(context=2, ranks=2), length=1024),
    "PP 2, two virtual stages": MemoryRun(
        BASE | {"num_layers": 4}, parallel=Parallel(pipeline=2, virtual=2, ranks=2), micro_batches=4
    ),
    "dense, float32": MemoryRun(
        {
            "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
            "intermediate_size": 768, "max_position_embeddings": 4096,
        },
        qwen2_config,
        sections={"model": {"dtype": "float32"}},
    ),
    "latent attention": MemoryRun(
        {
            "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8,
            "num_key_value_heads": 8, "intermediate_size": 768, "moe_intermediate_size": 128, "q_lora_rank": 96,
            "kv_lora_rank": 64, "qk_nope_head_dim": 32, "v_head_dim": 32, "max_position_embeddings": 4096,
        },
        deepseek_config,
    ),
}  # fmt: skip


def traced(ranks: RankPool, run: MemoryRun, place: Path) -> list[int]:
    """Peak bytes of torch's allocations on each rank."""
    model = write_checkpoint(place / "model", tiny_model(run.family(**run.model), seed=1))
    config = run.config()
    count = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    save_batch(place / "batch.safetensors", [_sample(i, run) for i in range(count)])
    groups = np.repeat(np.arange(config.rollout.prompts_per_step), config.rollout.samples_per_prompt)
    return ranks.run(_peak, run.parallel, model, config, place / "batch.safetensors", groups, place)


def planned(run: MemoryRun, place: Path) -> list[RankMemory]:
    """What the planner says of each rank, of the model that `traced` wrote."""
    config, arch = run.config(), load_architecture(place / "model")
    stages = [coordinates(run.parallel, rank).pipeline for rank in range(run.parallel.ranks)]
    return [rank_memory(config, arch, HERE, workload_of(config), stage) for stage in stages]


def _peak(rank: Rank, path: Path, config: Config, batch: Path, groups: np.ndarray, shared: Path) -> int:
    if torch.cuda.is_available():
        return _peak_on_gpu(rank, path, config, batch, groups, shared)
    before = _storages()  # what jobs before left in this process
    second_step = _after_one_step(rank, path, config, batch, groups, shared)
    standing = sum(nbytes for place, nbytes in _storages().items() if place not in before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        second_step()
    assert found.profiler is not None
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = np.array([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return standing + int(changes.cumsum().max())


def _peak_on_gpu(rank: Rank, path: Path, config: Config, batch: Path, groups: np.ndarray, shared: Path) -> int:
    """By the allocator's own count, without the workspace of cuBLAS, which is in the planner's overhead."""
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(256, 256, dtype=dtype, device="cuda", requires_grad=True)
        (square @ square).sum().backward()  # on a thread of its own, with a workspace of its own
    del square
    gc.collect()
    before = torch.cuda.memory_allocated()
    second_step = _after_one_step(rank, path, config, batch, groups, shared)
    torch.cuda.reset_peak_memory_stats()
    second_step()
    return torch.cuda.max_memory_allocated() - before


def _after_one_step(
    rank: Rank, path: Path, config: Config, batch: Path, groups: np.ndarray, shared: Path
) -> Callable[[], Any]:
    """The next step of a trainer whose Adam has its state."""
    trainer = trainer_of(rank, path, config, shared)
    minibatches = trainer._load(place_batch(shared, 0, load_batch(batch), groups, config))
    trainer._train_step(0, minibatches)
    return partial(trainer._train_step, 1, minibatches)


def _storages() -> dict[int, int]:
    """Address and bytes of all tensors' memory. The profiler alone would miss what gloo's threads free."""
    gc.collect()
    # `isinstance` would ask lazily imported modules for their class, which warn.
    found = [item.untyped_storage() for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def _sample(number: int, run: MemoryRun) -> Scored:
    rng = np.random.default_rng(number)
    length, vocabulary = run.length - PROMPT, run.model["vocab_size"]
    trajectory = Trajectory(
        sample_id=str(number), group_id=str(number // run.samples), engine="test", finish_reason="stop",
        temperature=1.0, prompt_ids=rng.integers(3, vocabulary, PROMPT).astype(np.int32),
        response_ids=rng.integers(3, vocabulary, length).astype(np.int32), loss_mask=np.ones(length, np.bool_),
        rollout_logprobs=np.full(length, -7.0, np.float32), topk_ids=np.empty((length, 0), np.int32),
        topk_logprobs=np.empty((length, 0), np.float32), policy_versions=np.zeros(length, np.int32),
    )  # fmt: skip
    return Scored(trajectory, {"reward": 0.0}, rng.normal(size=length).astype(np.float32))
