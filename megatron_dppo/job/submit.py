"""What `megatron-dppo launch slurm` submits: sbatch's command line for a config, and one of the scripts in
`launchers/slurm`. The config was checked before: a bad one is refused here, not when its nodes are allocated.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from megatron_dppo.checkpoints import complete_checkpoints
from megatron_dppo.config import Config
from megatron_dppo.config.cluster_rules import startable

LAUNCHERS = Path(__file__).parents[2] / "launchers"
SITE_WORDS = "SITE_SBATCH"  # of a site file: further words for sbatch
CONVERT_WORDS = "SITE_SBATCH_CONVERT"  # likewise, for conversions, which need no GPUs
TIME_LIMIT = "SBATCH_TIMELIMIT"
SUBMITTED = "slurm-job"  # in a run's directory: the id of the job that was submitted last
# Slurm's ways to write a time limit, each group a number of seconds, minutes, ...: see `seconds_of`.
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")


class Kind(StrEnum):
    """What a job does: the script's name."""

    train = "train"
    trainer = "trainer"
    evaluate = "evaluate"
    convert = "convert"

    @property
    def trains(self) -> bool:
        """And so writes to the run's directory, which no other job may at the same time."""
        return self in (Kind.train, Kind.trainer)


@dataclass(frozen=True)
class Submission:
    """`environment`: what sbatch's has beside the caller's. `reads`: files that the script sources."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    script: Path
    reads: tuple[Path, ...]
    output: str  # of the script; %j is the job's id
    logs: Path  # of the processes
    kind: Kind

    def command(self) -> str:
        """As a shell takes it."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.environment.items())]
        without = ["env", *(f"--unset={name}" for name in sorted(os.environ) if _is_of_another_job(name))]
        return " ".join([*settings, *(without if len(without) > 1 else []), shlex.join(self.argv)])


def faults_of(config: Config, kind: Kind) -> Iterator[str]:
    """What a job of this kind needs of a config that is good otherwise."""
    if kind.trains and not config.checkpoint.every:
        yield "checkpoint.every: got 0, expected more: a job goes on after its time limit from its checkpoints"
    if kind == Kind.trainer and not config.rollout.urls:
        yield "rollout.urls: got none, expected the engines' addresses: --kind trainer starts none"
    if kind == Kind.train and config.rollout.urls:
        yield "rollout.urls: got addresses, expected none: --kind train starts the engines; say --kind trainer"
    if kind in (Kind.train, Kind.evaluate):
        yield from startable(config.cluster, config.rollout)
    if kind == Kind.convert and not complete_checkpoints(config.run.dir):
        yield f"run.dir: got no complete checkpoint in {config.run.dir}, expected one to convert"
    elif kind == Kind.convert and (there := _converted(config)).exists():
        yield f"run.dir: {there} is there already; move it, or use it"


def submission(
    config: Config,
    recipe: Path,
    overrides: Sequence[str],
    *,
    kind: Kind,
    site: Path | None,
    time: str | None,
    notice_s: int,
) -> Submission:
    """What to submit. Runs the site file in a shell, for its variables.

    `time`: the limit as Slurm writes it, None for the partition's; `notice_s`: how long before it the run is told to
    save and stop. Raises ValueError where the scripts or the site file are not there, or the limit is no longer than
    the notice.
    """
    script = LAUNCHERS / "slurm" / f"{kind}.sbatch"
    common = script.with_name("common.sh")
    if not common.is_file():
        raise ValueError(f"launchers: no {common}, expected the project's checkout; install it with `pip install -e`")
    if site is not None and not site.is_file():
        raise ValueError(f"--site: no file {site}, expected one such as {LAUNCHERS / 'sites'}/*.sh")
    variables = _sbatch_variables(os.environ) | (site_variables(site) if site else {})
    site_words = {name: variables.pop(name, "") for name in (SITE_WORDS, CONVERT_WORDS)}
    if kind.trains:
        _check_notice(notice_s, time or variables.get(TIME_LIMIT))
    run_dir = config.run.dir.absolute()
    output = f"{run_dir}/slurm-%j.out"
    words = [
        "sbatch",
        "--parsable",
        f"--job-name={config.run.name if kind == Kind.train else f'{config.run.name}-{kind}'}",
        f"--output={output}",
        "--export=ALL",
        *resource_words(config, kind),
        *([f"--time={time}"] if time else []),
        *([f"--signal=B:USR1@{notice_s}"] if kind.trains else []),
        *shlex.split(site_words[CONVERT_WORDS if kind == Kind.convert else SITE_WORDS]),
    ]
    environment = {
        "MEGATRON_DPPO_LAUNCHERS": str(LAUNCHERS),
        "MEGATRON_DPPO_PYTHON": sys.executable,
        **({"MEGATRON_DPPO_SITE": str(site.absolute())} if site else {}),
        **variables,
    }
    return Submission(
        argv=(*words, str(script), *arguments(config, recipe, overrides, kind)),
        environment=environment,
        script=script,
        reads=(common, *([site] if site else [])),
        output=output,
        kind=kind,
        logs=(run_dir / "evaluate" if kind == Kind.evaluate else run_dir) / "logs",
    )


def resource_words(config: Config, kind: Kind) -> list[str]:
    """Nodes and GPUs. A device that only the nodes know (`auto`) is the site file's to ask for."""
    cluster = config.cluster
    if kind == Kind.convert:
        return ["--nodes=1"]
    nodes = 1 if kind == Kind.evaluate else cluster.machines
    gpus = [] if cluster.device in ("auto", "cpu") else [f"--gpus-per-node={cluster.devices_per_node}"]
    return [f"--nodes={nodes}", *gpus]


def arguments(config: Config, recipe: Path, overrides: Sequence[str], kind: Kind) -> list[str]:
    """Of the script. A conversion is of the run's newest checkpoint, to a Hugging Face directory beside its own."""
    if kind != Kind.convert:
        return [str(recipe), *overrides]
    return ["megatron-to-hf", str(complete_checkpoints(config.run.dir)[-1]), str(_converted(config))]


def _converted(config: Config) -> Path:
    """Where the run's newest checkpoint goes."""
    return config.run.dir / f"hf-{complete_checkpoints(config.run.dir)[-1].name}"


def seconds_of(limit: str) -> int | None:
    """Of a time limit: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. None for what is no such number, as UNLIMITED."""
    found = TIME.fullmatch(limit)
    if found is None:
        return None
    numbers = [int(number) for number in (found["first"], found["second"], found["third"]) if number is not None]
    if found["days"] is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return ((int(found["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _check_notice(notice_s: int, limit: str | None) -> None:
    """A job that is asked to stop as soon as it starts would go round and round in the queue."""
    seconds = seconds_of(limit) if limit else None
    if seconds and notice_s >= seconds:
        raise ValueError(
            f"--notice: got {notice_s} s, expected less than the time limit {limit} ({seconds} s), by a start of the "
            "job and some steps"
        )


def site_variables(site: Path) -> dict[str, str]:
    """sbatch's variables (SBATCH_*) and further words that a site file sets. Raises ValueError where it fails."""
    found = subprocess.run(
        ["bash", "-c", 'set -a; . "$0" >&2 && env -0', str(site.absolute())],
        env={name: value for name, value in os.environ.items() if not _is_sbatch(name)},
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        raise ValueError(f"--site: {site} failed: {found.stderr.strip()}")
    return _sbatch_variables(dict(line.partition("=")[::2] for line in found.stdout.split("\0")))


def _sbatch_variables(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if _is_sbatch(name)}


def _is_sbatch(name: str) -> bool:
    return name.startswith("SBATCH_") or name in (SITE_WORDS, CONVERT_WORDS)


def _is_of_another_job(name: str) -> bool:
    """A variable of the allocation in which this is called; srun would take it for the new job's."""
    return name.startswith("SLURM_") and name != "SLURM_CONF"


def submit(what: Submission) -> str:
    """Submits, and returns the job's id.

    Raises RuntimeError with sbatch's own message, or where an earlier job is going to write to the same directory.
    """
    run_dir = Path(what.output).parent
    run_dir.mkdir(parents=True, exist_ok=True)
    if what.kind.trains:
        _check_earlier(run_dir / SUBMITTED)
    environment = {name: value for name, value in os.environ.items() if not _is_of_another_job(name)}
    try:
        found = subprocess.run(
            what.argv, env={**environment, **what.environment}, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise RuntimeError("sbatch: not found, expected Slurm's commands on the PATH") from None
    if found.returncode:
        raise RuntimeError(f"sbatch: {found.stderr.strip()}")
    job = found.stdout.strip().partition(";")[0]  # a federation adds its cluster
    if what.kind.trains:
        (run_dir / SUBMITTED).write_text(job)
    return job


def _check_earlier(note: Path) -> None:
    """Raises RuntimeError where the job that was submitted last for this directory is still in the queue."""
    if not note.is_file():
        return
    argv = ["squeue", "--noheader", "--format=%i %T", f"--jobs={note.read_text().strip()}"]
    with contextlib.suppress(FileNotFoundError):  # sbatch's absence is told
        found = subprocess.run(argv, capture_output=True, text=True, check=False)  # fails for a job of long ago
        if found.returncode == 0 and found.stdout.strip():
            raise RuntimeError(
                f"run.dir: job {found.stdout.strip()} writes to {note.parent}; scancel it, wait, or set run.dir"
            )


def description(what: Submission) -> str:
    """Everything that would be submitted: the command and the files, as they are."""
    parts = [f"# submits:\n{what.command()}\n", f"# {what.script}:\n{what.script.read_text()}"]
    parts += [f"# {path}, which it reads:\n{path.read_text()}" for path in what.reads]
    return "\n".join(parts)
