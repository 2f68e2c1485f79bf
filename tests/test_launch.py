"""The launcher's directories: locked, never overwritten, shared memory given back."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dppo.config_loading import load_config
from megatron_dppo.launch import machines_of, run_directory
from megatron_dppo.machines import ThisMachine, shared_directory
from megatron_dppo.nodes import NamedNodes


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


def test_shared_memory_is_given_back_also_after_an_error() -> None:
    seen: list[Path] = []
    with pytest.raises(KeyError), shared_directory("test") as shared:
        (shared / "weights").write_bytes(b"x" * 1000)
        seen.append(shared)
        raise KeyError
    assert not seen[0].exists()


def test_where_a_job_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
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
