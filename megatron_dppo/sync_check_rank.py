"""What the ranks do in `megatron-dppo sync-check`: change their weights, send them, say what they have.

Run as `python -m megatron_dppo.sync_check_rank CONFIG`.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_dppo.backend.model import Model, load_model
from megatron_dppo.backend.parallel import finalise_parallel, initialise_parallel
from megatron_dppo.backend.step import stats_pass
from megatron_dppo.config import Config, load_config
from megatron_dppo.control import CONTROL_VARIABLE, Control, order_key, reply_key
from megatron_dppo.data.packing import LossWeights, build_micro_batch, context_share
from megatron_dppo.rollout.trajectory import load_batch
from megatron_dppo.trainer import weight_senders
from megatron_dppo.weights.fingerprint import fingerprints
from megatron_dppo.weights.image import image_tensors

AMPLITUDE = 0.1  # by how much of itself a weight is changed
GOLDEN = 2.399963229728653  # radians between neighbours: no two are changed alike


def main(config: Config) -> None:
    """Does what is ordered until there is no more."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    split = config.parallel
    rank = initialise_parallel(split.layout, config.run.seed, config.training.rollout_timeout_s)
    dtype = getattr(torch, config.model.dtype)
    model = load_model(
        config.model.path, rank, dtype,
        sequence_parallel=split.uses_sequence_parallel, temperature=config.rollout.temperature,
    )  # fmt: skip
    control = Control.connect(os.environ[CONTROL_VARIABLE])
    held = model.held
    senders = weight_senders(config, control, held)
    tensors = image_tensors(model.arch, dtype)
    patience_s = config.rollout.start_timeout_s + config.training.rollout_timeout_s
    for number in itertools.count():
        order = control.wait(order_key(number), patience_s)
        if order["do"] == "send":
            reply = senders[order["transport"]].send(order)
        elif order["do"] == "change":
            change_weights(model, order["version"])
            reply = dict(fingerprints(held.parameters, model.pieces, tensors))
        elif order["do"] == "score":
            reply = {"worst": score(model, Path(order["file"]), split.least_micro_batches)}
        else:
            break
        if rank.rank == 0:
            control.post(reply_key(number), reply)
    finalise_parallel()


@torch.no_grad()
def change_weights(model: Model, seed: int) -> None:
    """Every element by up to a tenth, according to its place in its hub tensor: replicas stay equal."""
    weights, tensors = model.weights, image_tensors(model.arch, model.config.params_dtype)
    for piece in model.pieces:
        local = weights[piece.param][piece.local_index]
        columns = math.prod(tensors[piece.tensor].shape[1:])
        row = torch.arange(piece.start[0], piece.stop[0], dtype=torch.float64, device=local.device)
        place = row * columns
        if local.dim() > 1:
            column = torch.arange(piece.start[1], piece.stop[1], dtype=torch.float64, device=local.device)
            place = place[:, None] + column
        local.mul_((1 + AMPLITUDE * torch.cos(place * GOLDEN + seed)).to(local.dtype))


def score(model: Model, path: Path, least: int) -> float:
    """The largest difference between recorded log-probs and the model's. One all-reduce."""
    samples, layout = load_batch(path), model.rank.parallel
    assert len(samples) >= least
    batches = [
        context_share(
            build_micro_batch(
                [sample],
                num_topk=0,
                weights=LossWeights(),
                length_multiple=layout.length_multiple,
                sequence_multiple=layout.sequence_multiple,
            ),
            layout.context,
            model.rank.at.context,
        )
        for sample in samples
    ]
    worst = torch.zeros((), dtype=torch.float64, device=model.device)
    for batch, stats in zip(batches, stats_pass(model, batches), strict=False):  # nothing but on the last stage
        mu = torch.from_numpy(batch.mu_logprob).to(model.device)
        if batch.num_tokens:
            worst = torch.maximum(worst, (stats.logprob - mu).abs().max().double())
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)


if __name__ == "__main__":
    main(load_config(sys.argv[1]))
