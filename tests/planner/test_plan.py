"""Whole recipes, as the command plans them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from megatron_dppo.cli import app
from megatron_dppo.planner.plan import plan_recipe
from tests.planner.configs import CONFIGS, QWEN3_30B
from tests.tiny_models import tiny_config

RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Outside of the project, whose shapes are found all the same."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(QWEN3_30B))
    return path


def run(recipe: Path, *arguments: str) -> tuple[Result, dict[str, Any]]:
    result = CliRunner().invoke(app, ["plan", str(recipe), *arguments, "--json"])
    return result, json.loads(result.stdout.splitlines()[-1])


def test_a_recipe_that_fits(recipe: Path) -> None:
    result, found = run(recipe)
    assert result.exit_code == 0
    assert (found["fits"], found["violations"]) == (True, [])
    kinds = found["bytes_per_rank"]
    standing = sum(kinds[kind] for kind in ("weights", "gradients", "optimizer", "reference", "staging"))
    of_step = kinds["routes"] + kinds["recorded"]
    coming = kinds["activations"] + max(kinds["logits"], kinds["working"])
    assert kinds["peak"] == standing + of_step + max(coming, kinds["scratch"])
    assert kinds["needed"] == kinds["peak"] + kinds["overhead"] <= kinds["limit"] == found["device"]["memory_bytes"]
    time = found["step_time"]
    assert time["total"] == pytest.approx(math.fsum(time["terms"].values()) - time["hidden"])
    assert {"rollout", "sync", "compute", "bubble", "experts", "optimizer"} <= time["terms"].keys()
    assert found["sync"]["transport"] == "group"
    assert found["engine"]["fits"]


def test_one_that_does_not_says_why_and_what_would(recipe: Path) -> None:
    result, found = run(recipe, "training.recompute=none", "training.micro_batch_tokens=32768", "head.path=store")
    assert (result.exit_code, found["fits"]) == (2, False)
    assert [text.split(":")[0] for text in found["violations"]] == ["memory of a rank"]
    assert "does not fit" in result.stdout
    fixing = found["fixes"][0]["overrides"].split()
    fixed, again = run(
        recipe, "training.recompute=none", "training.micro_batch_tokens=32768", "head.path=store", *fixing
    )
    assert fixed.exit_code == 0
    assert again["bytes_per_rank"]["needed"] == found["fixes"][0]["needed"]


def test_faults_of_the_types_and_of_the_model_are_violations(recipe: Path) -> None:
    result, found = run(recipe, "training.step=3")
    assert result.exit_code == 2
    assert found["violations"] == ["training.step: unknown key, did you mean training.steps?"]
    result, found = run(recipe, "model.path=/nowhere/Nothing-7B")
    assert result.exit_code == 2
    assert found["violations"][0].startswith("model.path: no config.json in /nowhere/Nothing-7B, nor configs/models/")


def test_a_fault_of_the_types_hides_no_broken_rule(recipe: Path) -> None:
    _, alone = run(recipe, "parallel.tensor=3", "rollout.top_p=0.9")
    assert {text.split(":")[0] for text in alone["violations"]} == {"parallel.ranks", "parallel.tensor", "rollout.top_p"}
    _, both = run(recipe, "parallel.tensor=3", "rollout.top_p=0.9", "training.steps=0")
    assert both["violations"][0] == "training.steps: got 0, input should be greater than 0"
    assert both["violations"][1:] == alone["violations"]
    _, unknown = run(recipe, "model.path=/nowhere/Nothing-7B", "rollout.top_p=0.9")
    assert [text.split(":")[0] for text in unknown["violations"]] == ["model.path", "rollout.top_p"]


def test_suggestions_fit_and_can_be_pasted(recipe: Path) -> None:
    result, found = run(recipe, "--suggest", "1x8", "cluster.device=h200")
    assert result.exit_code == 0
    assert found["suggestions"]
    seconds = [suggestion["seconds"] for suggestion in found["suggestions"]]
    assert seconds == sorted(seconds)
    for suggestion in found["suggestions"]:
        plan = plan_recipe(recipe, ["cluster.device=h200", *suggestion["overrides"].split()])
        assert plan.fits, plan.violations
        assert plan.memory is not None
        assert plan.memory.worst.needed == suggestion["needed"]


def test_a_job_on_this_machine_without_gpus(recipe: Path, tmp_path: Path) -> None:
    tiny_config(num_layers=4).save_pretrained(tmp_path / "model")
    result, found = run(
        recipe,
        f"model.path={tmp_path}/model",
        "cluster={device: cpu}",
        "parallel={pipeline: 2, expert: 2, ranks: 4}",
        "rollout={max_response_tokens: 100, prompts_per_step: 8, samples_per_prompt: 4}",
        "data.max_prompt_tokens=100",
        "sync.transport=auto",
        "training.micro_batch_tokens=400",
    )
    assert result.exit_code == 0, found["violations"]
    assert found["device"]["name"] == "cpu"
    assert found["sync"]["transport"] == "shm"
    assert [stage["stage"] for stage in found["stages"]] == [0, 1]
    assert found["bytes_per_rank"]["scratch"] >= found["bytes_per_rank"]["gradients"]  # gloo reduces in a copy


def test_machines_that_are_none(recipe: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(recipe), "--suggest", "4by8"])
    assert result.exit_code == 1
    assert "--suggest: got '4by8', expected NODESxGPUS, as in 4x8" in result.stderr


@pytest.mark.parametrize("path", RECIPES, ids=[str(path.relative_to(CONFIGS)) for path in RECIPES])
def test_every_recipe_is_planned(path: Path) -> None:
    plan = plan_recipe(path)
    if "quickstart" in path.name:  # its model is made by the quickstart itself
        assert plan.fits or plan.violations[0].startswith("model.path: no config.json in runs/quickstart/input/model")
    elif "lora" in path.name:
        assert any("lora" in text.lower() for text in plan.violations)
    else:
        assert plan.violations == ()
