"""Every recipe in configs/ fits its cluster, or says by name what is not there yet."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_dppo.architecture import load_architecture
from megatron_dppo.config.loading import load_config, save_config
from megatron_dppo.cut import cut_config, cut_model, cut_parallel
from megatron_dppo.planner.plan import HEADROOM, make_plan, plan_recipe
from megatron_dppo.planner.suggest import engine_choices, with_overrides
from tools.make_quickstart_input import write_initial_model

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


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_no_other_engines_on_as_many_devices_are_much_faster(path: Path) -> None:
    plan = plan_recipe(path, ["lora.rank=0", "lora.alpha=null"])
    assert plan.config is not None and plan.arch is not None and plan.estimate is not None
    assert plan.memory is not None and plan.memory.worst.needed <= HEADROOM * plan.memory.limit
    for engines in engine_choices(plan.config):
        other = make_plan(with_overrides(plan.config, engines), plan.arch)
        if other.fits:
            assert other.estimate is not None
            assert other.estimate.time.total >= 0.95 * plan.estimate.time.total, engines


def test_the_quickstart_fits(tmp_path: Path) -> None:
    write_initial_model(tmp_path, seed=0)
    plan = plan_recipe(CONFIGS / "quickstart.yaml", [f"model.path={tmp_path}", "cluster.device=cpu"])
    assert (plan.violations, plan.fits) == ((), True)
    assert plan.device is not None and plan.device.name == "cpu"


LARGE_CUTS = [path for path in RECIPES if cut_parallel(load_config(path).parallel).ranks > 4]  # than a test has


@pytest.mark.parametrize("path", LARGE_CUTS, ids=lambda path: path.stem)
def test_a_cut_of_more_ranks_than_a_machine_has_room_for_is_planned(path: Path, tmp_path: Path) -> None:
    recipe = load_config(path)
    shape = CONFIGS / recipe.model.path
    parallel, arch = cut_parallel(recipe.parallel), load_architecture(shape)
    cut = cut_config(recipe, tmp_path, parallel)
    small = cut_model(json.loads((shape / "config.json").read_text()), arch, parallel)
    cut.model.path.mkdir()  # planning needs no weights
    (cut.model.path / "config.json").write_text(json.dumps(small))
    save_config(cut, tmp_path / "recipe.yaml")
    cluster = recipe.cluster
    nodes = parallel.ranks // cluster.devices_per_node
    machines = [f"cluster.nodes={nodes}", "cluster.engine_nodes=1", f"cluster.device={cluster.device}"]
    plan = plan_recipe(tmp_path / "recipe.yaml", [*machines, f"cluster.devices_per_node={cluster.devices_per_node}"])
    assert [text.partition(":")[0] for text in plan.violations] == (["lora"] if path.stem == "moe_lora" else [])
    assert plan.memory is not None and plan.memory.worst.needed <= plan.memory.limit
