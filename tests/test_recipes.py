"""Every recipe in configs/: its experiment's numbers, every objective, its layout; and the cuts of all."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest

from megatron_dppo.algorithm.objectives import OBJECTIVES
from megatron_dppo.architecture import load_architecture
from megatron_dppo.config import Config, objective_of
from megatron_dppo.config.loading import check_config, load_config
from megatron_dppo.cut import LAYERS, cut_parallel, write_cut
from megatron_dppo.weights.layout import megatron_layout
from megatron_dppo.weights.mapping import hub_shapes

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = [path for path in sorted(CONFIGS.rglob("*.yaml")) if path.name != "quickstart.yaml"]
SCALING = ["moe_base", "moe_base_r3", "moe_thinking", "dense_base", "moe_lora"]
LORA = "lora: got rank 32, expected 0: training of low-rank adapters is not there yet"
NOT_HERE = ("model.path: no model.safetensors", "model.path: no tokenizer.json", "data.train: no file", "data.eval.")


def recipe(path: Path, *overrides: str) -> Config:
    """With the model's shape from configs/models."""
    model = load_config(path).model.path
    return load_config(path, [f"model.path={CONFIGS / model}", *overrides])


def faults(config: Config) -> list[str]:
    """Beside those of files that users bring."""
    return [fault for fault in check_config(config) if not fault.startswith(NOT_HERE)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_sound_with_every_objective(path: Path) -> None:
    for name in OBJECTIVES:
        config = recipe(path, f"objective.name={name}")
        assert objective_of(config).name == name
        found = faults(config)
        if path.stem == "moe_lora":
            assert len(found) == 1 and found[0].startswith(LORA)
        else:
            assert found == []


def test_the_scaling_recipes_are_table_1() -> None:
    rows = {}
    for name in SCALING:
        config = recipe(CONFIGS / "scaling" / f"{name}.yaml")
        rollout, training, evaluation = config.rollout, config.training, config.evaluation
        assert (rollout.temperature, config.data.max_prompt_tokens, config.advantage.normalise) == (1.0, 1024, "none")
        assert (evaluation.samples, evaluation.temperature, evaluation.top_p) == (32, 0.7, 0.95)
        assert evaluation.max_response_tokens is None and list(config.data.eval) == ["aime24", "aime25"]
        rows[name] = (
            rollout.max_response_tokens, rollout.prompts_per_step, rollout.prompts_per_step // training.minibatches,
            training.lr, rollout.samples_per_prompt, evaluation.every, config.routing.mode, config.lora.rank,
        )  # fmt: skip
    moe = (16384, 256, 32, 1e-6, 16, 5)
    assert rows == {
        "moe_base": (*moe, "off", 0),
        "moe_base_r3": (*moe, "rollout", 0),
        "moe_thinking": (*moe, "off", 0),
        "dense_base": (8000, 128, 32, 1e-6, 8, 10, "off", 0),
        "moe_lora": (8000, 128, 16, 1e-5, 8, 10, "off", 32),
    }


def test_thresholds_are_appendix_fs() -> None:
    for name, delta in (("moe_base", 0.2), ("dense_base", 0.2), ("moe_lora", 0.15)):
        objective = objective_of(recipe(CONFIGS / "scaling" / f"{name}.yaml"))
        assert (objective.mask.delta_low, objective.mask.delta_high, objective.cap) == (delta, delta, 5.0)  # type: ignore[union-attr]
    sanity = recipe(CONFIGS / "sanity_deepseek_1p5b.yaml")
    objective = objective_of(sanity)
    assert (objective.mask.delta_high, objective.cap) == (0.15, math.inf)  # type: ignore[union-attr]
    rollout = sanity.rollout
    assert (rollout.prompts_per_step, rollout.samples_per_prompt, sanity.training.minibatches) == (64, 8, 4)
    assert sanity.data.max_prompt_tokens + rollout.max_response_tokens == 8000


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_cut_has_the_recipes_layout_and_is_sound(path: Path, tmp_path: Path) -> None:
    config = recipe(path)
    cut = load_config(write_cut(config, tmp_path))
    whole, small = config.parallel, cut.parallel
    for name in ("tensor", "context", "expert", "expert_tensor"):
        assert getattr(small, name) == getattr(whole, name)
    assert small.pipeline == min(whole.pipeline, LAYERS) and small.ranks <= whole.ranks
    assert cut.routing == config.routing and cut.objective == config.objective
    found = check_config(cut)  # of files too: they are there
    assert [fault for fault in found if not fault.startswith(LORA)] == []
    arch, small_arch = load_architecture(config.model.path), load_architecture(cut.model.path)
    for name in ("model_type", "is_moe", "qk_norm", "sigmoid_router", "tie_word_embeddings", "qkv_bias"):
        assert getattr(arch, name) == getattr(small_arch, name)
    held: Counter[str] = Counter()
    for rank in range(small.ranks):
        for piece in megatron_layout(small_arch, small.layout, rank):
            if piece.replica == 0:
                held[piece.tensor] += math.prod(b - a for a, b in zip(piece.start, piece.stop, strict=True))
    assert held == {name: math.prod(shape) for name, shape in hub_shapes(small_arch).items()}


@pytest.mark.parametrize(
    ("overrides", "pipeline", "virtual", "chunks", "ranks"),
    [
        (("parallel.pipeline=3", "parallel.ranks=24"), 3, 1, (1, 2, 1), 24),
        (("parallel.pipeline=2", "parallel.virtual=4", "parallel.ranks=16"), 2, 2, None, 16),
        (("parallel.pipeline=16", "parallel.ranks=256"), 4, 1, None, 32),
    ],
)
def test_pipelines_are_cut_as_four_layers_demand(
    overrides: tuple[str, ...], pipeline: int, virtual: int, chunks: tuple[int, ...] | None, ranks: int
) -> None:
    parallel = cut_parallel(load_config(CONFIGS / "scaling" / "moe_base.yaml", overrides).parallel)
    assert (parallel.pipeline, parallel.virtual, parallel.chunk_layers, parallel.ranks) == (
        pipeline, virtual, chunks, ranks,
    )  # fmt: skip


def test_lora_settings_without_a_rank_are_refused() -> None:
    found = faults(recipe(CONFIGS / "scaling" / "moe_base.yaml", "lora.alpha=64"))
    assert found == ["lora.alpha: got 64.0, which lora.rank 0 does not use"]
