"""What `megatron-dppo launch slurm` submits: sbatch's command line for a config, and one of the scripts in
`launchers/slurm`. The config was checked before: a bad one is refused here, not when its nodes are allocated.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from megatron_dppo.checkpoints import complete_checkpoints
from megatron_dppo.config import Config
from megatron_dppo.config_cluster_rules import startable

LAUNCHERS = Path(__file__).parents[1] / "launchers"
SITE_WORDS = "SITE_SBATCH"  # of a site file: further words for sbatch


class Kind(StrEnum):
    """What a job does: the script's name."""

    train = "train"
    trainer = "trainer"
    evaluate = "evaluate"
    convert = "convert"


@dataclass(frozen=True)
class Submission:
    """`environment`: what sbatch's has beside the caller's. `reads`: files that the script sources."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    script: Path
    reads: tuple[Path, ...]
    output: str  # of the script; %j is the job's id
    logs: Path  # of the processes

    def command(self) -> str:
        """As a shell takes it."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.environment.items())]
        return " ".join([*settings, shlex.join(self.argv)])


def faults_of(config: Config, kind: Kind) -> Iterator[str]:
    """What a job of this kind needs of a config that is good otherwise."""
    if kind in (Kind.train, Kind.trainer) and not config.checkpoint.every:
        yield "checkpoint.every: got 0, expected more: a job goes on after its time limit from its checkpoints"
    if kind == Kind.trainer and not config.rollout.urls:
        yield "rollout.urls: got none, expected the engines' addresses: --kind trainer starts none"
    if kind == Kind.train and config.rollout.urls:
        yield "rollout.urls: got addresses, expected none: --kind train starts the engines; say --kind trainer"
    if kind in (Kind.train, Kind.evaluate):
        yield from startable(config.cluster, config.rollout)
    if kind == Kind.convert and not complete_checkpoints(config.run.dir):
        yield f"run.dir: got no complete checkpoint in {config.run.dir}, expected one to convert"


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
    save and stop. Raises ValueError where the scripts or the site file are not there.
    """
    script = LAUNCHERS / "slurm" / f"{kind}.sbatch"
    common = script.with_name("common.sh")
    if not common.is_file():
        raise ValueError(f"launchers: no {common}, expected the project's checkout; install it with `pip install -e`")
    if site is not None and not site.is_file():
        raise ValueError(f"--site: no file {site}, expected one such as {LAUNCHERS / 'sites'}/*.sh")
    variables = site_variables(site) if site else {}
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
        *([f"--signal=B:USR1@{notice_s}"] if kind in (Kind.train, Kind.trainer) else []),
        *shlex.split(variables.pop(SITE_WORDS, "")),
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
        logs=run_dir / "logs",
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
    newest = complete_checkpoints(config.run.dir)[-1]
    return ["megatron-to-hf", str(newest), str(config.run.dir / f"hf-{newest.name}")]


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
    variables = (line.partition("=")[::2] for line in found.stdout.split("\0"))
    return {name: value for name, value in variables if _is_sbatch(name)}


def _is_sbatch(name: str) -> bool:
    return name.startswith("SBATCH_") or name == SITE_WORDS


def submit(what: Submission) -> str:
    """Submits, and returns the job's id. Raises RuntimeError with sbatch's own message."""
    Path(what.output).parent.mkdir(parents=True, exist_ok=True)
    try:
        found = subprocess.run(
            what.argv, env={**os.environ, **what.environment}, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise RuntimeError("sbatch: not found, expected Slurm's commands on the PATH") from None
    if found.returncode:
        raise RuntimeError(f"sbatch: {found.stderr.strip()}")
    return found.stdout.strip().partition(";")[0]  # a federation adds its cluster


def description(what: Submission) -> str:
    """Everything that would be submitted: the command and the files, as they are."""
    parts = [f"# submits:\n{what.command()}\n", f"# {what.script}:\n{what.script.read_text()}"]
    parts += [f"# {path}, which it reads:\n{path.read_text()}" for path in what.reads]
    return "\n".join(parts)
