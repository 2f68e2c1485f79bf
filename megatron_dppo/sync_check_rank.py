"""What the ranks do in `megatron-dppo sync-check`: change their weights, send them, say what they have.

Run as `python -m megatron_dppo.sync_check_rank CONFIG`.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_dppo.backend.model import Model
from megatron_dppo.backend.parallel import finalise_parallel
from megatron_dppo.backend.step import stats_pass
from megatron_dppo.config import Config
from megatron_dppo.config.loading import load_config
from megatron_dppo.control import CONTROL_VARIABLE, Control, Inbox
from megatron_dppo.data.packing import rank_micro_batch
from megatron_dppo.data.trajectory import load_batch
from megatron_dppo.rank import join_job, load_policy, weight_senders
from megatron_dppo.weights.fingerprint import fingerprints
from megatron_dppo.weights.hub_files import TensorInfo
from megatron_dppo.weights.image import image_tensors

AMPLITUDE = 0.1  # by how much of itself a weight is changed
GOLDEN = 2.399963229728653  # radians between neighbours: no two are changed alike


def main(config: Config) -> None:
    """Does what is ordered until there is no more."""
    rank = join_job(config)
    model = load_policy(config, rank)
    control = Control.connect(os.environ[CONTROL_VARIABLE])
    held = model.held
    senders = weight_senders(config, control, held)
    tensors = image_tensors(model.arch, held.dtype)
    patience_s, start_s = config.training.rollout_timeout_s, config.rollout.start_timeout_s
    inbox = Inbox(control, answers=rank.rank == 0, patience_s=patience_s, start_s=start_s)
    for order in inbox:
        match order["do"]:
            case "send":
                inbox.answer(senders[order["transport"]].send(order))
            case "change":
                change_weights(model, tensors, order["seed"])
                inbox.answer({"fingerprints": dict(fingerprints(held.parameters, model.pieces, tensors))})
            case "score":
                inbox.answer({"worst": score(model, Path(order["file"]))})
    finalise_parallel()


@torch.no_grad()
def change_weights(model: Model, tensors: Mapping[str, TensorInfo], seed: int) -> None:
    """Every element by up to a tenth, according to its place in its hub tensor: replicas stay equal."""
    weights = model.weights
    for piece in model.pieces:
        local = weights[piece.param][piece.local_index]
        columns = math.prod(tensors[piece.tensor].shape[1:])
        row = torch.arange(piece.start[0], piece.stop[0], dtype=torch.float64, device=local.device)
        place = row * columns
        if local.dim() > 1:
            column = torch.arange(piece.start[1], piece.stop[1], dtype=torch.float64, device=local.device)
            place = place[:, None] + column
        local.mul_((1 + AMPLITUDE * torch.cos(place * GOLDEN + seed)).to(local.dtype))


def score(model: Model, path: Path) -> float:
    """The largest difference between recorded log-probs and the model's. One all-reduce."""
    samples, rank = load_batch(path), model.rank
    batches = [rank_micro_batch([sample], layout=rank.parallel, context_rank=rank.at.context) for sample in samples]
    worst = torch.zeros((), dtype=torch.float64, device=model.device)
    for batch, stats in zip(batches, stats_pass(model, batches), strict=False):  # nothing but on the last stage
        mu = torch.from_numpy(batch.mu_logprob).to(model.device)
        if batch.num_tokens:
            worst = torch.maximum(worst, (stats.logprob - mu).abs().max().double())
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)


if __name__ == "__main__":
    main(load_config(sys.argv[1]))
