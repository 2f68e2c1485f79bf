from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from megatron_dppo.cli import app
from megatron_dppo.config import Config, loading

RECIPE = str(Path(__file__).parents[1] / "configs" / "quickstart.yaml")


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Config], int]], None]:
    """Stands in for the launcher, and lets the recipe pass without its input files."""

    def use(function: Callable[[Config], int]) -> None:
        module = ModuleType("megatron_dppo.job.run")
        module.launch = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "megatron_dppo.job.run", module)
        monkeypatch.setattr(loading, "check_config", lambda *_: [])

    return use


def test_train_hands_the_resolved_config_to_the_launcher(launch: Callable[..., None]) -> None:
    seen: list[Config] = []
    launch(lambda config: seen.append(config) or 0)
    result = CliRunner().invoke(app, ["train", RECIPE, "training.steps=7", "run.seed=3"])
    assert result.exit_code == 0
    assert (seen[0].training.steps, seen[0].run.seed) == (7, 3)


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (RuntimeError("engine is gone"), 1, "megatron-dppo: run 'quickstart' failed: engine is gone\n"),
        (
            TimeoutError("no rollouts for 5 s"),
            1,
            "megatron-dppo: run 'quickstart' failed: no rollouts for 5 s\n",
        ),
        (KeyboardInterrupt(), 130, "megatron-dppo: run 'quickstart': interrupted\n"),
    ],
)
def test_a_failed_run_is_one_message_and_an_exit_code(
    launch: Callable[..., None], failure: BaseException, code: int, message: str
) -> None:
    def fail(config: Config) -> int:
        raise failure

    launch(fail)
    result = CliRunner().invoke(app, ["train", RECIPE])
    assert (result.exit_code, result.stderr) == (code, message)


def test_config_faults_exit_2_and_start_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "megatron_dppo.job.run", None)  # importing it would raise
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["train", RECIPE, "training.step=1", "rollout.top_p=0.5"])
    assert result.exit_code == 2
    assert "training.step: unknown key, did you mean training.steps?" in result.stderr
    assert "rollout.top_p: got 0.5, expected 1.0" in result.stderr
    assert "model.path: no directory runs/quickstart/input/model" in result.stderr
    assert result.stderr.count("megatron-dppo:") == 1


def test_check_prints_json_for_programs() -> None:
    result = CliRunner().invoke(app, ["check", "--json"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["python"].startswith("3.")
    assert {c["name"] for c in report["components"]} >= {"torch", "megatron-core", "vLLM", "apex"}
