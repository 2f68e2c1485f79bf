"""A recipe for thirty billion parameters, as a mapping; tests change sections of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_dppo.architecture import Architecture
from megatron_dppo.config import Config
from megatron_dppo.planner.shapes import find_architecture

CONFIGS = Path(__file__).parents[2] / "configs"
QWEN3_30B: dict[str, Any] = {
    "run": {"name": "planned"},
    "model": {"path": "/nowhere/Qwen3-30B-A3B-Base"},
    "parallel": {"tensor": 4, "expert": 8, "ranks": 16},
    "cluster": {"nodes": 2, "engine_nodes": 2, "device": "h100"},
    "data": {"train": "/nowhere/train.jsonl", "max_prompt_tokens": 1024},
    "reward": {"name": "math"},
    "rollout": {
        "engines": 4,
        "tensor": 4,
        "max_response_tokens": 7168,
        "prompts_per_step": 128,
        "samples_per_prompt": 8,
    },
    "sync": {"transport": "group"},
    "training": {"steps": 10, "minibatches": 4, "micro_batch_tokens": 8192, "lr": 1e-6, "recompute": "full"},
}


def config(**sections: dict[str, Any]) -> Config:
    """The recipe with values of some sections replaced."""
    return Config.model_validate(QWEN3_30B | {name: QWEN3_30B.get(name, {}) | new for name, new in sections.items()})


def shape(name: str) -> Architecture:
    """Of a model whose numbers this project has."""
    return find_architecture(Path("/nowhere") / name, CONFIGS / "quickstart.yaml")[0]
