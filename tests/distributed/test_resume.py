"""Training that stops and goes on: the same bits at the same layout, the same numbers at another."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dppo.checkpoints import checkpoint_path, complete_checkpoints, read_state
from megatron_dppo.config import Config
from megatron_dppo.weights.convert import megatron_to_hf
from megatron_dppo.weights.layout import Parallel
from megatron_dppo.weights.megatron_files import open_checkpoint
from tests.distributed.jobs import interrupted_steps, rl_steps
from tests.distributed.rank_pool import RankPool
from tests.distributed.test_trainer import GROUPS, OBJECTIVES, SAMPLES, numbers, samples
from tests.tiny_models import deepseek_config, hub_tensors, tiny_config, tiny_model, write_checkpoint

LAYOUTS = {
    "single": Parallel(),
    "tp2": Parallel(tensor=2, ranks=2),  # whole experts on both ranks
    "tp2_ep2": Parallel(tensor=2, expert=2, ranks=2),
    "pp2": Parallel(pipeline=2, ranks=2),
    "dp2_ep2": Parallel(expert=2, ranks=2),
    "dp4": Parallel(ranks=4),
    "pp2_dp2": Parallel(pipeline=2, ranks=4),
    "tp2_cp2_ep2": Parallel(tensor=2, context=2, expert=2, ranks=4),
    "tp2_ep2_pp2_virtual2": Parallel(tensor=2, expert=2, pipeline=2, virtual=2, ranks=4),
}
CASES = [
    ("tp2_ep2", ["tp2_ep2", "single", "pp2", "dp4"]),
    ("dp2_ep2", ["dp2_ep2", "tp2_ep2_pp2_virtual2"]),
    ("tp2", ["tp2", "pp2"]),
    ("tp2_ep2_pp2_virtual2", ["tp2_ep2_pp2_virtual2", "tp2_cp2_ep2"]),
]
MODELS = {
    "moe": tiny_config(num_layers=4),
    "deepseek_v3": deepseek_config(num_hidden_layers=4),
    "tied": tiny_config(
        tie_word_embeddings=True, vocab_size=64, num_layers=4
    ),  # the copy at the end has a bucket alone
    "dense_first_stage": deepseek_config(),  # a rank without experts
}


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "model"
    return write_checkpoint(path, tiny_model(MODELS[request.param], seed=5))


def config(parallel: Parallel, run_dir: Path, hf: Path, **changes: Any) -> Config:
    training = {"steps": 4, "minibatches": 2, "micro_batch_tokens": 40, "lr": 1e-3, "eps": 1e-5}
    schedule = {"schedule": "linear", "warmup_steps": 1, "min_lr_ratio": 0.1}  # its place must be kept, too
    model = {"path": str(hf), "dtype": changes.pop("dtype", "float32")}
    return Config.model_validate(
        {
            "run": {"name": "test", "dir": str(run_dir)},
            "model": model,
            "parallel": asdict(parallel) | changes,
            "data": {"train": "unused", "max_prompt_tokens": 8},
            "reward": {"name": "final_answer"},
            "rollout": {"max_response_tokens": 8, "prompts_per_step": GROUPS, "samples_per_prompt": SAMPLES},
            "training": training | schedule,
            **OBJECTIVES["binary_tv"],
        }
    )


@pytest.mark.parametrize(
    ("checkpoint", "saved", "others", "changes"),
    [
        *(("moe", saved, others, {}) for saved, others in CASES),
        ("deepseek_v3", "tp2_ep2", ["tp2_ep2", "pp2"], {}),
        ("tied", "pp2", ["pp2", "tp2_ep2"], {}),
        ("tied", "pp2_dp2", ["pp2_dp2"], {}),
        ("dense_first_stage", "pp2", ["pp2", "single"], {}),
        ("moe", "tp2_ep2", ["tp2_ep2", "dp2_ep2"], {"dtype": "bfloat16"}),
        ("moe", "tp2_ep2", ["tp2_ep2", "dp2_ep2"], {"distributed_optimizer": False}),
    ],
    indirect=["checkpoint"],
)
def test_the_next_step_is_the_same(
    ranks: RankPool, checkpoint: Path, tmp_path: Path, saved: str, others: list[str], changes: dict[str, Any]
) -> None:
    batch = samples(checkpoint)
    first = LAYOUTS[saved]
    settings = config(first, tmp_path / "run", checkpoint, **changes)
    whole, whole_metrics = ranks.run(rl_steps, first, checkpoint, settings, *batch, tmp_path)[0]
    one, _ = ranks.run(interrupted_steps, first, checkpoint, settings, *batch, tmp_path, None)[0]
    path = checkpoint_path(tmp_path / "run", 1)
    assert read_state(path).step == 1 and read_state(path).layout == str(first)
    assert any(np.linalg.norm(whole[name] - one[name]) > 1e-3 * np.linalg.norm(one[name]) for name in whole)
    for name in others:
        then = config(LAYOUTS[name], tmp_path / name, checkpoint, **changes)
        got, metrics = ranks.run(interrupted_steps, LAYOUTS[name], checkpoint, then, *batch, tmp_path, path)[0]
        if name == saved:
            assert all(np.array_equal(got[tensor], whole[tensor]) for tensor in whole)
            assert metrics == whole_metrics[1]
            continue
        for tensor in whole:
            error = np.linalg.norm(got[tensor] - whole[tensor]) / np.linalg.norm(whole[tensor])
            assert error <= (1e-5 if settings.model.dtype == "float32" else 2e-3), f"{name}: {tensor}: {error:.1e}"
        if settings.model.dtype == "float32":
            assert numbers(metrics) == pytest.approx(numbers(whole_metrics[1]), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("checkpoint", ["moe"], indirect=True)
def test_a_training_checkpoint_becomes_a_hub_directory(ranks: RankPool, checkpoint: Path, tmp_path: Path) -> None:
    parallel = LAYOUTS["tp2_ep2"]
    settings = config(parallel, tmp_path / "run", checkpoint)
    weights, _ = ranks.run(interrupted_steps, parallel, checkpoint, settings, *samples(checkpoint), tmp_path, None)[0]
    (path,) = complete_checkpoints(tmp_path / "run")
    megatron_to_hf(path, tmp_path / "hub", say=lambda _: None)
    found = hub_tensors(tmp_path / "hub")
    assert found.keys() == weights.keys() == open_checkpoint(path).tensors.keys()
    assert all(np.array_equal(found[name].numpy(), weights[name]) for name in weights)
