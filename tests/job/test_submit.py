"""`megatron-dppo launch slurm`: what it would submit, and what it refuses to. Needs no Slurm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_dppo.cli import app
from megatron_dppo.config import Config, loading
from megatron_dppo.config.loading import check_config, load_config
from megatron_dppo.config.rules import submission_rules
from megatron_dppo.job.submit import (
    LAUNCHERS,
    Kind,
    Submission,
    faults_of,
    seconds_of,
    site_variables,
    submission,
    submit,
)

RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SITES = sorted((LAUNCHERS / "sites").glob("*.sh"))


def config(*overrides: str) -> Config:
    return load_config(RECIPE, overrides)


def submitted(
    *overrides: str, kind: Kind = Kind.train, site: Path | None = None, time: str | None = None
) -> Submission:
    return submission(config(*overrides), RECIPE, overrides, kind=kind, site=site, time=time, notice_s=300)


def test_nodes_gpus_and_the_notice_follow_from_the_config() -> None:
    overrides = ("cluster.nodes=2", "cluster.engine_nodes=1", "cluster.device=h100", "run.dir=/shared/runs/a")
    what = submitted(*overrides, time="12:00:00")
    assert what.argv == (
        "sbatch", "--parsable", "--job-name=quickstart", "--output=/shared/runs/a/slurm-%j.out", "--export=ALL",
        "--nodes=3", "--gpus-per-node=8", "--time=12:00:00", "--signal=B:USR1@300",
        str(LAUNCHERS / "slurm" / "train.sbatch"), str(RECIPE), *overrides,
    )  # fmt: skip
    assert what.environment == {"MEGATRON_DPPO_LAUNCHERS": str(LAUNCHERS), "MEGATRON_DPPO_PYTHON": sys.executable}
    assert what.logs == Path("/shared/runs/a/logs")


def test_an_evaluation_is_of_one_node_and_has_no_notice() -> None:
    words = submitted("cluster.nodes=2", "cluster.engine_nodes=1", kind=Kind.evaluate).argv
    assert "--nodes=1" in words and not any(word.startswith(("--signal", "--gpus")) for word in words)


def test_a_conversion_is_of_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    assert [*faults_of(config(f"run.dir={tmp_path}"), Kind.convert)] == [
        f"run.dir: got no complete checkpoint in {tmp_path}, expected one to convert"
    ]
    for step in (2, 4):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000002" / "training.json").touch()
    newest = tmp_path / "checkpoints" / "step-000002"
    words = submitted(f"run.dir={tmp_path}", kind=Kind.convert).argv
    assert words[-3:] == ("megatron-to-hf", str(newest), f"{tmp_path}/hf-step-000002")
    (tmp_path / "hf-step-000002").mkdir()
    assert [*faults_of(config(f"run.dir={tmp_path}"), Kind.convert)] == [
        f"run.dir: {tmp_path}/hf-step-000002 is there already; move it, or use it"
    ]


def test_a_conversion_does_not_take_the_sites_gpus(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-000002").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000002" / "training.json").touch()
    site = tmp_path / "site.sh"
    site.write_text("SBATCH_PARTITION=gpu\nSITE_SBATCH=--gres=gpu:8\nSITE_SBATCH_CONVERT=--cpus-per-task=16\n")
    words = submitted(f"run.dir={tmp_path}", kind=Kind.convert, site=site).argv
    assert "--cpus-per-task=16" in words and "--gres=gpu:8" not in words
    assert "--gres=gpu:8" in submitted(f"run.dir={tmp_path}", kind=Kind.evaluate, site=site).argv


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("90", 5400), ("5:30", 330), ("01:00:00", 3600), ("2-6", 194400), ("1-00:30", 88200), ("1-0:0:5", 86405),
     ("UNLIMITED", None)],
)  # fmt: skip
def test_time_limits_as_slurm_writes_them(limit: str, seconds: int | None) -> None:
    assert seconds_of(limit) == seconds


def test_a_limit_that_is_no_longer_than_the_notice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--notice: got 300 s, expected less than the time limit 5 \(300 s\)"):
        submitted(time="5")
    site = tmp_path / "site.sh"
    site.write_text("SBATCH_TIMELIMIT=00:04:00\n")
    with pytest.raises(ValueError, match="the time limit 00:04:00"):
        submitted(site=site)
    submitted(time="6", site=site)
    submitted(time="5", kind=Kind.evaluate)


def test_variables_of_another_allocation_are_left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text('#!/bin/sh\nenv > "$SEEN"\necho 12\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "100")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("SBATCH_QOS", "high")
    what = submitted(f"run.dir={tmp_path}/run")
    assert "SBATCH_QOS=high" in what.command() and "env --unset=SLURM_MEM_PER_CPU sbatch " in what.command()
    assert submit(what) == "12"
    seen = (tmp_path / "seen").read_text().splitlines()
    assert {"SLURM_CONF=/etc/slurm.conf", "SBATCH_QOS=high"} <= set(seen)
    assert not any(line.startswith("SLURM_MEM") for line in seen)


def test_a_directory_belongs_to_one_job_of_the_queue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, text in (("sbatch", "echo 13"), ("squeue", 'echo "$QUEUED"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("QUEUED", "13 PENDING")
    run = f"run.dir={tmp_path}/run"
    assert submit(submitted(run)) == "13"
    with pytest.raises(RuntimeError, match="run.dir: job 13 PENDING writes to"):
        submit(submitted(run))
    submit(submitted(run, kind=Kind.evaluate))
    monkeypatch.setenv("QUEUED", "")
    submit(submitted(run))


def test_a_site_file_has_variables_for_sbatch_and_words_that_come_last(tmp_path: Path) -> None:
    site = tmp_path / "my site.sh"
    site.write_text("SBATCH_PARTITION=gpu\nSITE_SBATCH=\"--gres=gpu:8 --comment='a b'\"\nsite_setup() { exit 3; }\n")
    what = submitted(site=site)
    assert what.argv[-4:-2] == ("--gres=gpu:8", "--comment=a b")
    assert what.environment.items() >= {"SBATCH_PARTITION": "gpu", "MEGATRON_DPPO_SITE": str(site)}.items()
    assert what.command().startswith("MEGATRON_DPPO_LAUNCHERS=")
    assert f"MEGATRON_DPPO_SITE='{site}' SBATCH_PARTITION=gpu sbatch --parsable" in what.command()
    site.write_text("no_such_command\n")
    with pytest.raises(ValueError, match="no_such_command"):
        submitted(site=site)


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.stem)
def test_the_site_files_that_are_there(site: Path) -> None:
    assert site_variables(site)["SBATCH_PARTITION"] == "gpu"
    modules = 'module() { echo "module $*"; }; . "$0"; site_setup; echo "$MEGATRON_DPPO_PYTHON"'
    found = subprocess.run(["bash", "-euc", modules, str(site)], capture_output=True, text=True, check=True)
    assert "/shared/envs/" in found.stdout


@pytest.mark.parametrize("script", sorted((LAUNCHERS / "slurm").iterdir()), ids=lambda script: script.name)
def test_scripts_are_shell(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if script.suffix == ".sbatch":
        assert script.stem in list(Kind) and script.read_text().startswith("#!/usr/bin/env bash\n")


@pytest.fixture
def good_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe passes without its input files."""
    monkeypatch.setattr(loading, "check_config", lambda *_: [])


@pytest.mark.parametrize(
    ("kind", "overrides", "fault"),
    [
        ("train", [], "checkpoint.every: got 0, expected more"),
        ("train", ["checkpoint.every=5", "rollout.urls=[http://10.0.0.1:8000]"], "say --kind trainer"),
        ("trainer", ["checkpoint.every=5"], "rollout.urls: got none"),
    ],
)
@pytest.mark.usefixtures("good_config")
def test_what_the_kind_of_job_needs_is_refused_with_2(kind: str, overrides: list[str], fault: str) -> None:
    result = CliRunner().invoke(app, ["launch", "slurm", str(RECIPE), "--kind", kind, "--dry-run", *overrides])
    assert result.exit_code == 2 and fault in result.stderr and not result.stdout


def test_a_bad_config_is_refused_before_slurm_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch there
    result = CliRunner().invoke(app, ["launch", "slurm", str(RECIPE), "cluster.nodes=3", "checkpoint.every=5"])
    assert result.exit_code == 2
    assert "cluster.nodes: got 3, expected a divisor of parallel.ranks 2" in result.stderr


@pytest.mark.parametrize(("device", "submitted_from_here"), [("h100", True), ("auto", False)])
def test_a_login_node_need_not_have_the_gpus_of_the_nodes(device: str, submitted_from_here: bool) -> None:
    recipe = config("model.layers=transformer_engine", f"cluster.device={device}")
    fault = "model.layers: got transformer_engine, expected auto or torch: there is none, or no GPU"
    assert fault in check_config(recipe)
    assert (fault not in check_config(recipe, submission_rules(recipe.cluster))) == submitted_from_here


@pytest.mark.usefixtures("good_config")
def test_dry_run_prints_command_script_and_what_it_reads(tmp_path: Path) -> None:
    run = f"run.dir={tmp_path}/run"
    argv = ["launch", "slurm", str(RECIPE), "--dry-run", "checkpoint.every=5", "--site", str(SITES[0]), run]
    result = CliRunner().invoke(app, argv)
    assert result.exit_code == 0
    what = submitted("checkpoint.every=5", run, site=SITES[0])
    assert what.command().replace("USR1@300", "USR1@600") in result.stdout
    for path in (what.script, *what.reads):
        assert path.read_text() in result.stdout
    assert len(what.reads) == 2 and not (tmp_path / "run").exists()


@pytest.mark.usefixtures("good_config")
def test_without_slurm_a_submission_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(app, ["launch", "slurm", str(RECIPE), "checkpoint.every=5", f"run.dir={tmp_path}"])
    assert result.exit_code == 1 and "sbatch: not found" in result.stderr
