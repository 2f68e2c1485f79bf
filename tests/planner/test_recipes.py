"""Every recipe in configs/ fits its cluster, or says by name what is not there yet."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

plan_recipe = pytest.importorskip("megatron_dppo.planner.plan").plan_recipe

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
