"""The quickstart on a real Slurm: two trainer nodes (TP 2 x EP 2, a rank each) and an engine node with a real vLLM; how
its job ends, and how it goes on.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_dppo.weights.megatron_files import open_checkpoint
from megatron_dppo.weights.verify import differences
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
START_S = 170.0  # until a job has trained its first step
END_S = 60.0
OVER = "COMPLETED|FAILED|TIMEOUT|CANCELLED|NODE_FAIL"
pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class Recipe:
    """The quickstart's, in a directory of its own: its processes are known by the run's name on their command lines."""

    path: Path

    @property
    def run(self) -> Path:
        """The run's directory."""
        return self.path.parent / "run"

    def write(self, **training: Any) -> None:
        """Once more, with other settings of training."""
        config = yaml.safe_load(self.path.read_text())
        config["training"] |= training
        self.path.write_text(yaml.safe_dump(config))

    def records(self) -> list[dict[str, Any]]:
        """metrics.jsonl."""
        path = self.run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def output(self) -> str:
        """What the job's script and the launcher wrote, and the last lines of every process's log."""
        paths = [*self.run.glob("slurm-*.out"), *sorted(self.run.glob("logs/*.log"))]
        return "\n".join(f"== {path}\n" + "\n".join(path.read_text().splitlines()[-30:]) for path in paths)

    def ranks(self, cluster: Cluster) -> list[int]:
        """The trainer's, which are not srun nor guards."""
        wanted, marker = [b"-m", b"megatron_dppo.trainer"], str(self.path.parent).encode()
        lines = {pid: _command_line(pid) for pid in cluster.processes()}
        return [pid for pid, line in lines.items() if line[1:3] == wanted and any(marker in word for word in line)]


def _command_line(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    config = yaml.safe_load(QUICKSTART.read_text())
    (tmp_path / "model").symlink_to(ROOT / config["model"]["path"])
    config["run"]["dir"] = str(tmp_path / "run")
    config["model"]["path"] = str(tmp_path / "model")
    for name in ("train", "eval"):
        config["data"][name] = str(ROOT / config["data"][name])
    config["cluster"] = {"nodes": 2, "engine_nodes": 1, "device": "cpu"}
    config["checkpoint"] = {"every": 1000}
    config["evaluation"] = {"prompts": 8}
    config["rollout"] |= {"prompts_per_step": 8}
    config["training"] |= {"steps": 1000, "decay_steps": 1000}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(config))
    return Recipe(path)


def launched(cluster: Cluster, recipe: Recipe, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "megatron_dppo.cli", "launch", "slurm", str(recipe.path), *words]
    env = {**cluster.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, check=False)


def submitted(cluster: Cluster, recipe: Recipe, *words: str) -> str:
    """The id of a job that was submitted."""
    result = launched(cluster, recipe, *words)
    assert result.returncode == 0, result.stderr
    found = re.match(r"job (\d+) submitted\n", result.stdout)
    logs = recipe.run / "evaluate" / "logs" if "evaluate" in words else recipe.run / "logs"
    assert found and f"{recipe.run}/slurm-{found[1]}.out" in result.stdout and str(logs) in result.stdout
    return found[1]


def wait_for_state(cluster: Cluster, recipe: Recipe, job: str, states: str, seconds: float) -> dict[str, str]:
    """Until the job is in one of the states, given as a regular expression."""
    cluster.wait(
        lambda: re.fullmatch(states, cluster.job(job)["JobState"]) is not None,
        seconds,
        lambda: f"{cluster.job(job)}\n{recipe.output()}",
    )
    return cluster.job(job)


def wait_for_step(cluster: Cluster, recipe: Recipe, job: str, step: int) -> None:
    """Until the step was trained; fails where the job ends before."""

    def trained() -> bool:
        assert cluster.job(job)["JobState"] not in ("FAILED", "CANCELLED", "TIMEOUT", "COMPLETED"), recipe.output()
        return any(record["step"] >= step and "loss" in record for record in recipe.records())

    cluster.wait(trained, START_S, recipe.output)


def assert_nothing_left(cluster: Cluster, recipe: Recipe) -> None:
    cluster.wait(lambda: not cluster.processes(), END_S, lambda: f"left: {[*map(_command_line, cluster.processes())]}")
    assert not (recipe.run / "shared").exists() or not list((recipe.run / "shared").iterdir())


def test_a_bad_config_is_refused_at_submission(cluster: Cluster, recipe: Recipe) -> None:
    result = launched(cluster, recipe, "cluster.nodes=3", "rollout.top_p=0.5", "sync.transport=shm")
    assert result.returncode == 2 and not result.stdout
    for fault in ("cluster.nodes: got 3", "rollout.top_p: got 0.5", "sync.transport: got shm"):
        assert fault in result.stderr
    assert not cluster.run("squeue", "-h") and not recipe.run.exists()


def test_what_a_dry_run_prints_is_what_slurm_takes(cluster: Cluster, recipe: Recipe) -> None:
    result = launched(cluster, recipe, "--dry-run", "--time", "01:00:00")
    assert result.returncode == 0 and not recipe.run.exists()
    command = result.stdout.splitlines()[1]
    recipe.run.mkdir()
    job = subprocess.run(
        command.replace("sbatch", "sbatch --hold", 1), shell=True, env=cluster.environment, cwd=ROOT,
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    taken = cluster.job(job)
    assert (taken["NumNodes"].partition("-")[0], taken["TimeLimit"], taken["Requeue"]) == ("3", "01:00:00", "1")
    assert taken["Command"].split()[0].endswith("launchers/slurm/train.sbatch")
    cluster.run("scancel", job)


def test_a_cancelled_job_leaves_nothing(cluster: Cluster, recipe: Recipe) -> None:
    job = submitted(cluster, recipe)
    cluster.wait(lambda: len(recipe.ranks(cluster)) == 2, START_S, recipe.output)
    cluster.run("scancel", job)
    wait_for_state(cluster, recipe, job, "CANCELLED", END_S)
    assert_nothing_left(cluster, recipe)


def test_a_rank_that_dies_ends_the_job(cluster: Cluster, recipe: Recipe) -> None:
    job = submitted(cluster, recipe)
    cluster.wait(lambda: len(recipe.ranks(cluster)) == 2, START_S, recipe.output)
    os.kill(recipe.ranks(cluster)[0], signal.SIGKILL)
    ended = wait_for_state(cluster, recipe, job, "FAILED|NODE_FAIL|COMPLETED|PENDING", END_S)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "1:0"), recipe.output()
    output = next(recipe.run.glob("slurm-*.out")).read_text()
    assert re.search(r"megatron-dppo: run 'quickstart' failed: ranks ended with code \d+", output)
    assert re.search(r"srun: error: n[12]: task [01]: Killed", output)
    assert_nothing_left(cluster, recipe)


def test_a_job_goes_on_after_its_time_limit_and_after_a_node_died(cluster: Cluster, recipe: Recipe) -> None:
    """Three starts: ended by the signal before the limit, by a node whose machine vanishes, by the end of the run."""
    job = submitted(cluster, recipe, "--time", "00:03:00", "--notice", "90")
    wait_for_step(cluster, recipe, job, 0)
    first = cluster.job(job)
    wait_for_state(cluster, recipe, job, "PENDING|COMPLETING|REQUEUED", 180.0)
    saved = [path.name for path in (recipe.run / "checkpoints").iterdir()]
    assert len(saved) == 1, recipe.output()
    steps = int(saved[0].removeprefix("step-"))
    assert (recipe.run / "checkpoints" / saved[0] / "training.json").is_file() and not (recipe.run / "model").exists()
    assert f"stopped after step {steps}" in recipe.output() and first["Restarts"] == "0"
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=20")

    wait_for_step(cluster, recipe, job, steps + 1)
    assert cluster.job(job)["Restarts"] == "1"
    recipe.write(steps=steps + 2)
    second = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()[1]
    cluster.kill_node(second)
    cluster.wait(lambda: cluster.job(job)["Restarts"] == "2", 2 * END_S, recipe.output)

    ended = wait_for_state(cluster, recipe, job, OVER, START_S + END_S)
    assert ended["JobState"] == "COMPLETED", f"{ended}\n{recipe.output()}"
    records = recipe.records()
    assert [record["step"] for record in records] == list(range(steps + 3))
    assert all(record["mismatch"] < 1e-5 for record in records[:-1])  # the engine took every version
    assert json.loads((recipe.run / "summary.json").read_text())["steps"] == steps + 2
    assert (recipe.run / "model" / "model.safetensors").is_file()
    logs = {path.name for path in (recipe.run / "logs").iterdir()}
    assert {"rank0.log", "rank1.log", "ranks.log", "engine.log", "client.log"} <= logs
    assert not list(recipe.run.glob("previous-*")) and "could not be requeued" not in recipe.output()
    assert_nothing_left(cluster, recipe)
    cluster.start_node(second)
    cluster.wait_until_idle()

    newest = max((recipe.run / "checkpoints").iterdir())
    job = submitted(cluster, recipe, "--kind", "convert")
    ended = wait_for_state(cluster, recipe, job, OVER, START_S)
    assert ended["JobState"] == "COMPLETED", recipe.output()
    assert not [*differences(open_checkpoint(newest), open_checkpoint(recipe.run / f"hf-{newest.name}"))]

    job = submitted(cluster, recipe, "--kind", "evaluate", f"model.path={recipe.run / 'model'}")
    ended = wait_for_state(cluster, recipe, job, OVER, START_S)
    assert ended["JobState"] == "COMPLETED" and ended["NumNodes"] == "1", recipe.output()
    evaluated = json.loads((recipe.run / "evaluate" / "summary.json").read_text())
    assert evaluated["model"] == str(recipe.run / "model") and evaluated["results"][0]["prompts"] == 8
    assert_nothing_left(cluster, recipe)
