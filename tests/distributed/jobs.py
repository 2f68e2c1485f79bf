"""What ranks run in the distributed tests: the package's own path from a Hugging Face directory to results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_dppo.algorithm.objectives import TokenStats
from megatron_dppo.backend.model import Model, load_model
from megatron_dppo.backend.optimizer import AdamSettings, Optimizer
from megatron_dppo.backend.parallel import Rank
from megatron_dppo.backend.step import loss_pass, stats_pass
from megatron_dppo.data.packing import MicroBatch
from megatron_dppo.weights.local import export_pieces
from megatron_dppo.weights.mapping import hub_shapes


def fp32_model(rank: Rank, path: Path, temperature: float = 1.0) -> Model:
    return load_model(path, rank, torch.float32, sequence_parallel=rank.parallel.tensor > 1, temperature=temperature)


def numpy(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().numpy().copy()


def policy_stats(rank: Rank, path: Path, batches: list[MicroBatch], temperature: float) -> list[dict[str, np.ndarray]]:
    """Statistics of every counted token, as each rank of the last stage has them."""
    model = fp32_model(rank, path, temperature)
    return [
        {"logprob": numpy(s.logprob), "entropy": numpy(s.entropy), "topk_logprob": numpy(s.topk_logprob)}
        for s in stats_pass(model, batches)
    ]


def policy_gradients(rank: Rank, path: Path, batches: list[list[MicroBatch]]) -> dict[str, np.ndarray]:
    """Gradients in Hugging Face coordinates after one loss pass: this rank's boxes, zeros elsewhere.

    `batches[replica]` are a replica's micro-batches; the coefficient of each token is its `advantage`, that of its
    entropy 0.1.
    """
    model = fp32_model(rank, path)
    optimizer = Optimizer(model.chunk, AdamSettings(lr=1e-3), dtype=torch.float32, distributed=False)
    model = replace(model, chunk=optimizer.model)
    optimizer.zero()
    mine = batches[rank.at.data]

    def coefficient(index: int, stats: TokenStats) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        advantage = torch.from_numpy(mine[index].advantage)
        return advantage, torch.full_like(advantage, 0.1), {}

    loss_pass(model, mine, coefficient)
    image = {name: torch.zeros(shape) for name, shape in hub_shapes(model.arch).items()}
    export_pieces({name: p.main_grad for name, p in model.parameters.items()}, model.pieces, image)
    return {name: numpy(tensor) for name, tensor in image.items()}
