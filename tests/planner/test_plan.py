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
from megatron_dppo.planner.plan import HEADROOM, make_plan, plan_recipe
from megatron_dppo.planner.suggest import suggest_layouts
from tests.planner.configs import QWEN3_30B, config, shape
from tests.tiny_models import tiny_config


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


def test_an_objective_that_cannot_be_is_a_violation(recipe: Path) -> None:
    result, found = run(recipe, "objective.name=cispo", "objective.delta=0.2")
    assert result.exit_code == 2
    assert found["violations"] == ["objective: cispo: got delta, which it does not use, expected cap"]


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
    assert {text.split(":")[0] for text in alone["violations"]} == {
        "parallel.ranks",
        "parallel.tensor",
        "rollout.top_p",
    }
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


def test_suggestions_are_unlike_and_choose_engines(recipe: Path) -> None:
    engines = ["rollout.tensor=1", "rollout.engines=8", "cluster.engine_nodes=1", "cluster.device=h200"]
    search = suggest_layouts(plan_recipe(recipe, engines), 1, 8)
    assert len(search.found) == 5
    degrees = set()
    for suggestion in search.found:
        assert suggestion.plan.config is not None
        parallel, rollout = suggestion.plan.config.parallel, suggestion.plan.config.rollout
        degrees.add((parallel.tensor, parallel.context, parallel.pipeline, parallel.expert))
        assert (rollout.tensor, rollout.engines) == (8, 1)  # the fastest of as many devices
    assert len(degrees) == 5
    best = search.found[0]
    for tensor in (1, 2, 4):
        other = [*engines, *best.command_line().split(), f"rollout.tensor={tensor}", f"rollout.engines={8 // tensor}"]
        estimate = plan_recipe(recipe, other).estimate
        assert estimate is not None and estimate.time.total > best.seconds


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_a_job_whose_engines_have_no_nodes_gets_all_of_them(recipe: Path, nodes: int) -> None:
    shared = ["cluster={nodes: 1, device: h200}", "parallel.ranks=8", "rollout.engines=2", "sync.transport=auto"]
    found = suggest_layouts(plan_recipe(recipe, shared), nodes, 8).found
    assert found
    for suggestion in found:
        config = suggestion.plan.config
        assert config is not None and config.cluster.machines == nodes
        workers = config.rollout.engines * config.rollout.tensor
        assert suggestion.used == (
            f"{config.parallel.ranks} ranks + {config.rollout.engines} engines of {config.rollout.tensor}"
        )
        if nodes > 1:  # none is idle
            assert config.parallel.ranks + workers == 8 * nodes
        pasted = plan_recipe(recipe, [*shared, *suggestion.command_line().split()])
        assert pasted.fits, pasted.violations


def test_what_no_layout_mends_is_said_at_once(recipe: Path) -> None:
    result, found = run(recipe, "lora.rank=32", "parallel.tensor=3", "--suggest", "2x8")
    assert (result.exit_code, found["suggestions"]) == (2, [])
    last = result.stdout[result.stdout.index("no layout mends this") :]
    assert "lora: got rank 32" in last and "parallel.tensor" not in last.splitlines()[1]


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


@pytest.mark.parametrize(
    ("text", "fault"),
    [(None, "cannot be read: No such file or directory"), ("[]", "got list, expected a mapping"), ("a: [", "not YAML")],
)
def test_what_is_no_recipe_is_refused_by_its_name(tmp_path: Path, text: str | None, fault: str) -> None:
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    result = CliRunner().invoke(app, ["plan", str(path)])
    assert result.exit_code == 2 and f"{path}: 1 fault" in result.stderr and fault in result.stderr


def test_machines_that_are_none(recipe: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(recipe), "--suggest", "4by8"])
    assert result.exit_code == 1
    assert "--suggest: got '4by8', expected NODESxGPUS, as in 4x8" in result.stderr


def test_a_rank_that_is_nearly_full_is_advised_against() -> None:
    arch = shape(QWEN3_30B["model"]["path"].rpartition("/")[2])
    fits, advised = [], []
    for tokens in range(8192, 18_000, 2048):
        plan = make_plan(config(training={"micro_batch_tokens": tokens, "recompute": "none"}), arch)
        assert plan.memory is not None
        fits.append(plan.memory.worst.needed / plan.memory.limit)
        advised.append(any(text.startswith("memory of a rank") and "at most 92%" in text for text in plan.advice))
    assert any(HEADROOM < share <= 1 for share in fits)
    assert advised == [HEADROOM < share <= 1 for share in fits]
