"""A trained model as a Hugging Face directory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch.distributed as dist

from megatron_dppo.weights.hub_files import carry_description
from megatron_dppo.weights.image import create_image, image_tensors
from megatron_dppo.weights.sync import Held


def export_model(held: Held, source: Path, destination: Path) -> None:
    """Writes a Hugging Face directory: the weights, and everything but weights from `source` (config, tokenizer).

    Every rank calls this. Written beside and renamed; an older `destination` is replaced. Three barriers.
    """
    beside = destination.with_name(destination.name + ".tmp")
    file = beside / "model.safetensors"
    if held.rank == 0:
        shutil.rmtree(beside, ignore_errors=True)
        carry_description(source, beside, held.dtype)
        create_image(file, image_tensors(held.arch, held.dtype))
    dist.barrier()
    held.write(file)
    if held.rank == 0:
        if destination.exists():
            shutil.rmtree(destination)
        os.replace(beside, destination)
    dist.barrier()
