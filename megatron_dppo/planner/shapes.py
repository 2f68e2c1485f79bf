"""A model's numbers before its weights are there: from its own directory, or from the shapes of this project."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_dppo.architecture import Architecture, load_architecture

MODELS = "models"  # beside the recipes: a directory a model, with its config.json


def find_architecture(model_path: Path, recipe: Path) -> tuple[Architecture, Path]:
    """The model's numbers and where they were found.

    `model_path/config.json` where it exists; else `models/<last part of model_path>/config.json` in the recipe's
    directory, the directories above it, and the `configs` of those. Raises ValueError naming what was looked for, or
    what in the file cannot be computed.
    """
    looked = [model_path, *_known_shapes(model_path.name, recipe)]
    for place in looked:
        if (place / "config.json").is_file():
            try:
                return load_architecture(place), place
            except ValueError as error:
                raise ValueError(f"model.path: {error}") from None
    raise ValueError(
        f"model.path: no config.json in {model_path}, nor configs/{MODELS}/{model_path.name}/config.json in this "
        "project, expected one: put the model's config.json into either"
    )


def _known_shapes(name: str, recipe: Path) -> Iterator[Path]:
    for directory in recipe.absolute().parents:
        yield directory / MODELS / name
        yield directory / "configs" / MODELS / name
    yield Path(__file__).parents[2] / "configs" / MODELS / name
