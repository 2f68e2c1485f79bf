"""The command `megatron-dppo`.

Exit codes: 0 done, 1 the run failed, 2 the config is at fault (nothing was started; `plan`: it does not fit), 75 asked
to stop by SIGUSR1 (a checkpoint was saved, `resume=auto` goes on), 130 interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from megatron_dppo.config import ClusterConfig, Config
from megatron_dppo.config.loading import ConfigError, load_config, validate_or_raise
from megatron_dppo.config.rules import Rule, submission_rules
from megatron_dppo.job.places import rules_of_job
from megatron_dppo.job.submit import Kind, description, faults_of, submission, submit

FAILED, CONFIG_FAULT, STOPPED_EARLY, INTERRUPTED = 1, 2, 75, 130

app = typer.Typer(
    help="RL post-training of mixture-of-experts language models with DPPO on Megatron-core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


Recipe = Annotated[Path, typer.Argument(help="The recipe, a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="As in training.steps=50")]


@app.command()
def train(config: Recipe, overrides: Overrides = None) -> None:
    """Train a model as the recipe CONFIG says."""
    resolved = _load(config, overrides)
    from megatron_dppo.job.run import launch

    with _user_errors(f"run {resolved.run.name!r}"):
        stopped_early = launch(resolved)
    if stopped_early:
        raise typer.Exit(STOPPED_EARLY)


@app.command("sync-check")
def sync_check(
    config: Recipe,
    overrides: Overrides = None,
    updates: Annotated[int, typer.Option(min=1, help="How often the weights are changed and sent.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on the last line.")] = False,
) -> None:
    """Start trainer and engines of CONFIG, and compare what they have after changed weights were sent.

    Exit code 1 where a tensor differs in a bit, or a log-prob by more than kernels explain.
    """
    resolved = _load(config, overrides)
    from rich.console import Console

    from megatron_dppo.sync_check import check_sync

    with _user_errors("sync-check"):
        rows = check_sync(resolved, updates, Console(soft_wrap=True))
    passed = all(row.passed for row in rows)
    if as_json:
        typer.echo(json.dumps({"passed": passed, "updates": [asdict(row) for row in rows]}))
    if not passed:
        raise typer.Exit(FAILED)


@app.command()
def evaluate(
    config: Recipe,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on the last line.")] = False,
) -> None:
    """Measure the accuracy of CONFIG's model on its held-out prompts, without training: engines alone."""
    from megatron_dppo.evaluate import evaluate_model, for_evaluation, print_evaluation

    resolved = _load(config, overrides, for_evaluation)
    from rich.console import Console

    console = Console(soft_wrap=True)
    with _user_errors("evaluate"):
        evaluation = evaluate_model(resolved, console)
    print_evaluation(evaluation, console)
    if as_json:
        typer.echo(json.dumps(asdict(evaluation)))


@app.command()
def plan(
    config: Recipe,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on the last line.")] = False,
    suggest: Annotated[
        str | None, typer.Option(metavar="NODESxGPUS", help="Layouts for so many trainer nodes, as in 4x8.")
    ] = None,
) -> None:
    """Tell what CONFIG needs on its cluster, and whether that is there; nothing is started and no GPU is used.

    Exit code 0 where it fits, 2 where a rule is broken or memory is missing.
    """
    from megatron_dppo.planner.plan import plan_recipe
    from megatron_dppo.planner.report import print_plan, print_suggestions
    from megatron_dppo.planner.suggest import fixes, machines, suggest_layouts

    with _user_errors("plan"):
        wanted = machines(suggest) if suggest else None
        found = plan_recipe(config, overrides or [])
        mending = fixes(found)
        layouts = suggest_layouts(found, *wanted) if wanted else None
    print_plan(found)
    if mending:
        print_suggestions("fits with", mending)
    if layouts is not None:
        print_suggestions(f"layouts for {suggest}", layouts.found, layouts.unmended)
    if as_json:
        more: dict[str, Any] = {"fixes": [fix.as_json() for fix in mending]}
        if layouts is not None:
            more["suggestions"] = [layout.as_json() for layout in layouts.found]
        typer.echo(json.dumps(found.as_json() | more))
    if not found.fits:
        raise typer.Exit(CONFIG_FAULT)


def _load(
    path: Path,
    overrides: list[str] | None,
    adapt: Callable[[Config], Config] = lambda config: config,
    rules: Callable[[ClusterConfig], Sequence[Rule]] = rules_of_job,
) -> Config:
    """The recipe as `adapt` makes it, checked; a fault in it is the command's end."""
    try:
        config = adapt(load_config(path, overrides or []))
        validate_or_raise(config, rules(config.cluster))
    except ConfigError as error:
        _refuse(error)
    return config


def _refuse(error: ConfigError) -> NoReturn:
    typer.echo(f"megatron-dppo: {error}", err=True)
    raise typer.Exit(CONFIG_FAULT) from None


launch_app = typer.Typer(help="Start a job on a cluster.", no_args_is_help=True)
app.add_typer(launch_app, name="launch")


@launch_app.callback()
def _launch() -> None:
    """Keeps `launch slurm` a subcommand while it is the only one."""


@launch_app.command("slurm")
def launch_slurm(
    config: Recipe,
    overrides: Overrides = None,
    site: Annotated[Path | None, typer.Option(help="A site file, such as launchers/sites/*.sh.")] = None,
    kind: Annotated[
        Kind,
        typer.Option(
            help="train: trainer and engines; trainer: with engines of rollout.urls; evaluate: engines alone; "
            "convert: the newest checkpoint."
        ),
    ] = Kind.train,
    time: Annotated[
        str | None, typer.Option(metavar="HH:MM:SS", help="The time limit; the partition's if not given.")
    ] = None,
    notice: Annotated[
        int,
        typer.Option(
            min=1, metavar="SECONDS", help="How long before its limit a job saves and stops: a step, and a checkpoint."
        ),
    ] = 600,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be submitted, and submit nothing.")
    ] = False,
) -> None:
    """Submit a job that does what the recipe CONFIG says; print its id, and where its logs are.

    The recipe is checked first: exit code 2 where it is at fault, and nothing is submitted.
    """
    resolved = _load(config, overrides, rules=submission_rules)
    if faults := list(faults_of(resolved, kind)):
        _refuse(ConfigError(f"{config} as a job of kind {kind}", faults))
    with _user_errors("launch slurm"):
        what = submission(resolved, config, overrides or [], kind=kind, site=site, time=time, notice_s=notice)
        if dry_run:
            typer.echo(description(what))
            return
        job = submit(what)
    typer.echo(
        f"job {job} submitted\n  its output: {what.output.replace('%j', job)}\n  logs of its processes: {what.logs}"
    )


@app.command()
def check(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Tell what this machine has and what that makes possible."""
    from megatron_dppo.check import inspect_machine, print_report

    report = inspect_machine()
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        print_report(report)


class DType(StrEnum):
    """dtypes a conversion can produce."""

    bfloat16 = "bfloat16"
    float32 = "float32"


class Keys(StrEnum):
    """How Megatron spells a checkpoint's tensors; see docs/conversion.md."""

    stacked = "stacked"
    per_layer = "per_layer"
    singleton = "singleton"


convert = typer.Typer(help="Hugging Face directory to Megatron checkpoint and back.", no_args_is_help=True)
app.add_typer(convert, name="convert")
Source = Annotated[Path, typer.Argument(help="The checkpoint to read.")]
Destination = Annotated[Path, typer.Argument(help="A directory that is not there yet.")]
ToDType = Annotated[DType | None, typer.Option("--dtype", help="Of the result; the source's if not given.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes that share the work.")]


@convert.command("hf-to-megatron")
def hf_to_megatron(
    source: Source,
    destination: Destination,
    keys: Annotated[Keys | None, typer.Option(help="Spelling of the tensors; Megatron's default if not given.")] = None,
    dtype: ToDType = None,
    workers: Workers = 1,
) -> None:
    """Write a Megatron torch_dist checkpoint of the Hugging Face directory SOURCE."""
    from megatron_dppo.weights.convert import hf_to_megatron as run

    with _user_errors("convert"):
        run(source, destination, scheme=keys.value if keys else None, dtype=_torch_dtype(dtype), workers=workers)


@convert.command("megatron-to-hf")
def megatron_to_hf(
    source: Source,
    destination: Destination,
    config: Annotated[
        Path | None, typer.Option(help="The model's Hugging Face directory, if SOURCE does not carry one.")
    ] = None,
    dtype: ToDType = None,
    workers: Workers = 1,
) -> None:
    """Write a Hugging Face directory of the Megatron torch_dist checkpoint SOURCE."""
    from megatron_dppo.weights.convert import megatron_to_hf as run

    with _user_errors("convert"):
        run(source, destination, config=config, dtype=_torch_dtype(dtype), workers=workers)


@app.command()
def verify(
    a: Annotated[Path, typer.Argument(help="A checkpoint of either kind.")],
    b: Annotated[Path, typer.Argument(help="Another.")],
    config: Annotated[
        Path | None, typer.Option(help="The model's Hugging Face directory, for Megatron checkpoints without one.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many differences to name.")] = 10,
) -> None:
    """Compare two checkpoints bit by bit; exit code 1 where they differ."""
    from itertools import islice

    from megatron_dppo.weights.checkpoint import open_checkpoint
    from megatron_dppo.weights.verify import differences

    with _user_errors("verify"):
        first, second = open_checkpoint(a, config), open_checkpoint(b, config)
        found = list(islice(differences(first, second), limit))
    for line in found:
        typer.echo(line)
    if found:
        raise typer.Exit(FAILED)
    typer.echo(f"equal: {len(first.tensors)} tensors, bit by bit")


def _torch_dtype(dtype: DType | None) -> Any:
    import torch

    return getattr(torch, dtype.value) if dtype else None


@contextmanager
def _user_errors(command: str) -> Iterator[None]:
    """What the package raises for users as one line; a bug shows its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"megatron-dppo: {command}: interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except ConfigError as error:
        _refuse(error)
    except (OSError, RuntimeError, ValueError) as error:
        typer.echo(f"megatron-dppo: {command} failed: {error}", err=True)
        raise typer.Exit(FAILED) from None


if __name__ == "__main__":
    app()
