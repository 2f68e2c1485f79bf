"""The command `megatron-dppo`.

Exit codes: 0 done, 1 the run failed, 2 the config is at fault (nothing was started), 130 interrupted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from megatron_dppo.config import ConfigError, load_config, validate_or_raise

FAILED, CONFIG_FAULT, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    help="RL post-training of mixture-of-experts language models with DPPO on Megatron-core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="As in training.steps=50")
    ] = None,
) -> None:
    """Train a model as the recipe CONFIG says."""
    try:
        resolved = load_config(config, overrides or [])
        validate_or_raise(resolved)
    except ConfigError as error:
        typer.echo(f"megatron-dppo: {error}", err=True)
        raise typer.Exit(CONFIG_FAULT) from None

    from megatron_dppo.launch import launch

    try:
        launch(resolved)
    except KeyboardInterrupt:
        typer.echo("megatron-dppo: interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # what this package raises for users; a bug shows its traceback
        typer.echo(f"megatron-dppo: run {resolved.run.name!r} failed: {error}", err=True)
        raise typer.Exit(FAILED) from None


@app.command()
def check(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Tell what this machine has and what that makes possible."""
    from megatron_dppo.check import inspect_machine, print_report

    report = inspect_machine()
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        print_report(report)


if __name__ == "__main__":
    app()
