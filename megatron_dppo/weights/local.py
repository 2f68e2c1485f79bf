"""Between a rank's parameters and Hugging Face files or a shared image: copies of the pieces of its layout."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_dppo.weights.hub_files import INDEX_FILE
from megatron_dppo.weights.layout import Piece

FLOATS = ("BF16", "F16", "F32")  # what is a weight as it stands; 8 bits and less need scales


def checkpoint_files(model_path: Path | str) -> dict[str, Path]:
    """Tensor name -> the safetensors file of a Hugging Face directory that holds it.

    Raises FileNotFoundError where the directory has no safetensors.
    """
    root = Path(model_path)
    index = root / INDEX_FILE
    if index.is_file():
        return {name: root / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    files: dict[str, Path] = {}
    for file in sorted(root.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            files.update(dict.fromkeys(tensors.keys(), file))
    if not files:
        raise FileNotFoundError(f"model.path: no .safetensors files in {root}")
    return files


@torch.no_grad()
def load_pieces(parameters: Mapping[str, Tensor], pieces: Iterable[Piece], files: Mapping[str, Path]) -> None:
    """Fills local parameters from Hugging Face files, reading only the boxes this rank holds.

    Raises ValueError for a tensor that is missing, has another shape than the model or is quantised, and when a
    parameter is left unfilled.
    """
    unfilled = set(parameters)
    by_file: dict[Path, list[Piece]] = {}
    for piece in pieces:
        if piece.tensor not in files:
            raise ValueError(f"checkpoint: got no tensor {piece.tensor}, expected it for {piece.param}")
        by_file.setdefault(files[piece.tensor], []).append(piece)
    for file, wanted in by_file.items():
        with safe_open(file, "pt") as tensors:
            for piece in wanted:
                source = tensors.get_slice(piece.tensor)
                shape = tuple(source.get_shape())
                if len(shape) != len(piece.stop) or any(n < stop for n, stop in zip(shape, piece.stop, strict=True)):
                    raise ValueError(f"checkpoint: got {piece.tensor} of shape {shape}, expected at least {piece.stop}")
                if (dtype := source.get_dtype()) not in FLOATS:
                    raise ValueError(f"checkpoint: got {piece.tensor} in {dtype}, expected one of {', '.join(FLOATS)}")
                parameters[piece.param][piece.local_index].copy_(source[piece.hub_index])
                unfilled.discard(piece.param)
    if unfilled:
        raise ValueError(f"checkpoint: parameters without weights: {', '.join(sorted(unfilled))}")


@torch.no_grad()
def export_pieces(parameters: Mapping[str, Tensor], pieces: Iterable[Piece], image: Mapping[str, Tensor]) -> None:
    """Copies this rank's boxes into `image` (hub name -> whole tensor, typically in shared memory).

    Only pieces of replica 0 are written: over all ranks, each element is written once.
    """
    for piece in pieces:
        if piece.replica == 0:
            image[piece.tensor][piece.hub_index].copy_(parameters[piece.param][piece.local_index])
