"""The launcher's directories: locked, never overwritten, shared memory given back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_dppo.checkpoints import DESCRIPTION, TrainingState, checkpoint_path
from megatron_dppo.config.loading import load_config
from megatron_dppo.config.rules import RULES, submission_rules
from megatron_dppo.job import machines, slurm
from megatron_dppo.job import run as job_run
from megatron_dppo.job.machines import ThisMachine, shared_directory
from megatron_dppo.job.nodes import NamedNodes, Node
from megatron_dppo.job.places import rules_of_job
from megatron_dppo.job.run import machines_of, run_directory
from megatron_dppo.job.slurm import Allocation

RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def fake_checkpoint(run: Path, step: int) -> Path:
    """What the launcher reads of one."""
    path = checkpoint_path(run, step)
    path.mkdir(parents=True)
    state = TrainingState(step, 0, "qwen3_moe", "float32", False, "", "")
    (path / DESCRIPTION).write_text(json.dumps(vars(state)))
    return path


def test_what_an_earlier_run_left_is_moved_and_the_input_stays(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for n in (1, 2):
        with run_directory(run):
            assert not (run / "metrics.jsonl").exists()
            (run / "metrics.jsonl").write_text(f"run {n}")
            (run / "logs").mkdir()
            (run / "input").mkdir(exist_ok=True)
    with run_directory(run):
        pass
    assert (run / "previous-1" / "metrics.jsonl").read_text() == "run 1"
    assert (run / "previous-2" / "metrics.jsonl").read_text() == "run 2"
    assert (run / "previous-2" / "logs").is_dir() and (run / "input").is_dir()


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    with (
        run_directory(tmp_path / "run"),
        pytest.raises(RuntimeError, match="another run writes to"),
        run_directory(tmp_path / "run"),
    ):
        pass
    with run_directory(tmp_path / "run"):  # free again
        pass


def test_a_directory_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RuntimeError, match=f"^run.dir: got {path}, expected a directory"), run_directory(path):
            pass


def test_shared_memory_is_given_back_also_after_an_error() -> None:
    seen: list[Path] = []
    with pytest.raises(KeyError), shared_directory("test") as shared:
        (shared / "weights").write_bytes(b"x" * 1000)
        seen.append(shared)
        raise KeyError
    assert not seen[0].exists()


def test_shared_memory_of_a_killed_launcher_goes_with_the_next_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "SHARED_MEMORY", tmp_path)
    for name in ("megatron_dppo-killed-1", "megatron_dppo-new-1", "of-another-program"):
        (tmp_path / name).mkdir()
        (tmp_path / name / machines.HOLD).touch()
        if "new" not in name:
            os.utime(tmp_path / name / machines.HOLD, (0, 0))
    with shared_directory("running") as running:
        os.utime(running / machines.HOLD, (0, 0))
        with shared_directory("next") as after:
            there = sorted(path.name for path in tmp_path.iterdir())
    assert there == sorted([running.name, after.name, "megatron_dppo-new-1", "of-another-program"])


def test_where_a_job_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    assert isinstance(machines_of(load_config(recipe)), ThisMachine)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ValueError, match="got 2 machines outside of a Slurm job"):
        machines_of(load_config(recipe, ["cluster.nodes=2"]))
    monkeypatch.setenv("MEGATRON_DPPO_NODES", "a b")
    monkeypatch.setenv("MEGATRON_DPPO_ON", "launchers/local/over_ssh.sh")
    assert isinstance(machines_of(load_config(recipe, ["cluster.nodes=2"])), NamedNodes)
    with pytest.raises(
        ValueError, match=r"cluster.device: got h100, expected auto or cpu: here are \d GPUs for 99 ranks"
    ):
        machines_of(load_config(recipe, ["cluster.device=h100", "parallel.ranks=99"]))


def test_containers_of_a_slurm_job_are_entered_on_one_machine_too(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_config(RECIPE, ["cluster.device=h100", "parallel.ranks=99"])
    for name, value in (("SLURM_JOB_ID", "7"), ("SLURM_JOB_NODELIST", "n1"), ("SLURMD_NODENAME", "n1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MEGATRON_DPPO_NODES", "a b")  # of another day
    answers = {"hostnames": "n1", "show": "NodeName=n1 NodeAddr=10.0.0.1"}
    monkeypatch.setattr(slurm, "_scontrol", lambda *words: answers[words[1]])
    with pytest.raises(ValueError, match=r"here are \d GPUs for 99 ranks"):
        machines_of(recipe)
    for variable in ("MEGATRON_DPPO_SRUN", "MEGATRON_DPPO_STEP"):
        with monkeypatch.context() as site:
            site.setenv(variable, "--container-image=/images/a.sqsh")
            assert machines_of(recipe) == Allocation(*[(Node("n1", "10.0.0.1"),)] * 2)
            assert rules_of_job(recipe.cluster) == submission_rules(recipe.cluster)  # the launcher has no GPU
    assert rules_of_job(recipe.cluster) == RULES


def test_a_job_that_starts_again_goes_on_from_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other, own = (fake_checkpoint(tmp_path / name, 3) for name in ("other", "own"))
    monkeypatch.setattr(job_run, "check_resumable", lambda *_, **__: None)
    monkeypatch.setattr(job_run, "load_architecture", lambda _: SimpleNamespace(model_type="qwen3_moe"))

    def resumed(run: str, resume: str) -> str:
        config = load_config(RECIPE, [f"run.dir={tmp_path / run}", f"resume={resume}"])
        return str(job_run.with_checkpoint(config).resume)

    assert resumed("own", str(other)) == str(other) and resumed("own", "never") == "never"
    monkeypatch.setenv("MEGATRON_DPPO_RESTARTED", "1")
    assert resumed("own", str(other)) == resumed("own", "never") == resumed("own", "auto") == str(own)
    assert resumed("new", str(other)) == str(other) and resumed("new", "auto") == resumed("new", "never") == "never"


def test_a_file_system_without_locks_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def flock(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(job_run.fcntl, "flock", flock)
    with pytest.raises(RuntimeError, match="cannot be locked .Function not implemented."), run_directory(tmp_path):
        pass
