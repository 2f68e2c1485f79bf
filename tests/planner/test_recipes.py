"""Every recipe in configs/ fits its cluster, or says by name what is not there yet."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_dppo.config_loading import load_config
from megatron_dppo.cut import write_cut
from megatron_dppo.planner.plan import plan_recipe

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = [path for path in sorted(CONFIGS.rglob("*.yaml")) if path.name != "quickstart.yaml"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits(path: Path) -> None:
    found = plan_recipe(path, []).as_json()
    if path.stem == "moe_lora":
        assert not found["fits"] and [fault.partition(":")[0] for fault in found["violations"]] == ["lora"]
        return
    assert found["violations"] == [] and found["fits"]
    needed, limit = found["bytes_per_rank"]["needed"], found["bytes_per_rank"]["limit"]
    assert 0 < needed <= limit
    assert all(math.isfinite(seconds) for seconds in found["step_time"]["terms"].values())


@pytest.mark.parametrize("name", ["qwen3_235b_a22b_16node", "deepseek_v3", "kimi_k2_1t"])
def test_a_cut_of_more_ranks_than_a_machine_has_room_for_is_planned(name: str, tmp_path: Path) -> None:
    path = CONFIGS / f"{name}.yaml"
    recipe = load_config(path)
    recipe = load_config(path, [f"model.path={CONFIGS / recipe.model.path}"])
    cut = write_cut(recipe, tmp_path)
    nodes = load_config(cut).parallel.ranks // recipe.cluster.devices_per_node
    device = recipe.cluster.device
    machines = [f"cluster.nodes={nodes}", "cluster.engine_nodes=1", f"cluster.device={device}"]
    found = plan_recipe(cut, [*machines, "cluster.devices_per_node=8"]).as_json()
    assert found["violations"] == [] and found["fits"]
