"""Where a model's numbers are found, and which device a job has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import psutil
import pytest
import torch

from megatron_dppo.config import ClusterConfig
from megatron_dppo.planner.hardware import GPUS, device_of
from megatron_dppo.planner.shapes import find_architecture
from tests.planner.configs import CONFIGS

KNOWN = CONFIGS / "models" / "Qwen3-8B-Base"


def write(directory: Path, **changes: int) -> None:
    directory.mkdir(parents=True)
    values = json.loads((KNOWN / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(values))


def test_the_nearest_is_taken(tmp_path: Path) -> None:
    recipe = tmp_path / "configs" / "paper" / "recipe.yaml"
    model = tmp_path / "models" / "Qwen3-8B-Base"
    arch, place = find_architecture(model, recipe)
    assert (arch.num_layers, place) == (36, KNOWN)  # of this project
    write(tmp_path / "configs" / "models" / "Qwen3-8B-Base", num_hidden_layers=7)
    assert find_architecture(model, recipe)[0].num_layers == 7  # beside a recipe's parent directory
    write(model, num_hidden_layers=5)
    assert find_architecture(model, recipe)[0].num_layers == 5  # the model's own
    shutil.rmtree(model)
    assert find_architecture(model, recipe)[0].num_layers == 7


def test_a_model_that_nobody_knows_or_can_compute(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model.path: no config.json in .*/Unknown, nor configs/models/Unknown/config"):
        find_architecture(tmp_path / "Unknown", tmp_path / "recipe.yaml")
    write(tmp_path / "Odd", sliding_window=4096, use_sliding_window=True)
    with pytest.raises(ValueError, match="model.path: .*/Odd/config.json: use_sliding_window: got true"):
        find_architecture(tmp_path / "Odd", tmp_path / "recipe.yaml")


def test_devices() -> None:
    assert device_of(ClusterConfig(device="h200"), 8) is GPUS["h200"]
    cpu = device_of(ClusterConfig(device="cpu"), 4)
    assert cpu.memory_bytes == psutil.virtual_memory().total // 4
    assert not cpu.is_gpu
    if not torch.cuda.device_count():
        assert device_of(ClusterConfig(), 4) == cpu
