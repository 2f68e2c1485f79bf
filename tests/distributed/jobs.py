"""What ranks run in the distributed tests: the package's own path from a Hugging Face directory to results."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_dppo.algorithm.objectives import TokenStats
from megatron_dppo.backend.checkpoint import load_training
from megatron_dppo.backend.model import Model, load_model
from megatron_dppo.backend.optimizer import NonFinite, Optimizer, OptimizerSettings
from megatron_dppo.backend.parallel import Rank
from megatron_dppo.backend.step import loss_pass, stats_pass
from megatron_dppo.checkpoints import read_state
from megatron_dppo.config import Config, objective_of
from megatron_dppo.control import Control, Inbox
from megatron_dppo.data.packing import MicroBatch, context_share
from megatron_dppo.data.trajectory import load_batch
from megatron_dppo.head.policy_head import HeadMemory
from megatron_dppo.rank import load_policy, reference_of, with_optimizer
from megatron_dppo.rollout.client import place_batch
from megatron_dppo.rollout.engine import Manifest
from megatron_dppo.trainer import Trainer
from megatron_dppo.weights.mapping import float32_tensors, hub_shapes
from megatron_dppo.weights.sync import FileSender


def model_of(
    rank: Rank,
    path: Path,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float32,
    head_memory: HeadMemory = HeadMemory(),
) -> Model:
    return load_model(
        path,
        rank,
        dtype,
        sequence_parallel=rank.parallel.tensor > 1,
        temperature=temperature,
        head_memory=head_memory,
    )


def numpy(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().numpy().copy()


def policy_stats(rank: Rank, path: Path, batches: list[MicroBatch], temperature: float) -> list[dict[str, np.ndarray]]:
    """Statistics of every counted token, as each rank of the last stage has them."""
    model = model_of(rank, path, temperature)
    return [
        {"logprob": numpy(s.logprob), "entropy": numpy(s.entropy), "topk_logprob": numpy(s.topk_logprob)}
        for s in stats_pass(model, batches)
    ]


def context_stats(rank: Rank, path: Path, batches: list[MicroBatch], temperature: float) -> list[dict[str, np.ndarray]]:
    """As `policy_stats`, of this context rank's share of each batch."""
    shares = [context_share(batch, rank.parallel.context, rank.at.context) for batch in batches]
    return policy_stats(rank, path, shares, temperature)


def policy_gradients(
    rank: Rank,
    path: Path,
    batches: list[list[MicroBatch]],
    head_memory: HeadMemory = HeadMemory(),
    overlap_grad_reduce: bool = False,
) -> dict[str, np.ndarray]:
    """Gradients in Hugging Face coordinates after one loss pass: this rank's boxes, zeros elsewhere.

    `batches[replica]` are a replica's micro-batches; the coefficient of each token is its `advantage`, that of its
    entropy 0.1.
    """
    model = model_of(rank, path, head_memory=head_memory)
    optimizer = Optimizer(
        model.chunks,
        OptimizerSettings(lr=1e-3),
        dtype=torch.float32,
        distributed=False,
        overlap_grad_reduce=overlap_grad_reduce,
    )
    model = replace(model, chunks=optimizer.chunks)
    mine = [context_share(batch, rank.parallel.context, rank.at.context) for batch in batches[rank.at.data]]

    def coefficient(index: int, stats: TokenStats, tokens: slice) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        advantage = torch.from_numpy(mine[index].advantage)[tokens]
        return advantage, torch.full_like(advantage, 0.1), {}

    during_backward: list[bool] = []
    for chunk in optimizer.chunks:
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            group.start_grad_sync = _noting_backward(group.start_grad_sync, during_backward)
    for _ in range(2):  # Megatron reduces early from the second time on: the first teaches it the order of gradients
        optimizer.zero()
        loss_pass(model, mine, coefficient, entropy_gradient=True)
    assert any(during_backward) == overlap_grad_reduce, "the reduction began at another time than asked for"
    return boxes(model, lambda parameter: parameter.main_grad)


def boxes(model: Model, tensor_of: Callable[[Any], Tensor]) -> dict[str, np.ndarray]:
    """What is trained, in Hugging Face coordinates: this rank's boxes where it has them first, zeros elsewhere."""
    fixed, parameters = float32_tensors(model.arch), model.parameters
    image = {name: torch.zeros(shape) for name, shape in hub_shapes(model.arch).items() if name not in fixed}
    for piece in model.pieces:
        if piece.replica == 0 and piece.tensor in image:
            image[piece.tensor][piece.hub_index] = tensor_of(parameters[piece.param])[piece.local_index]
    return {name: numpy(tensor) for name, tensor in image.items()}


def loading_warnings(rank: Rank, path: Path) -> list[str]:
    """What this rank says while it loads a model."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_dppo")
    logger.addHandler(handler)
    model_of(rank, path)
    logger.removeHandler(handler)
    return [record.getMessage() for record in records]


def _noting_backward(start: Callable[..., Any], during_backward: list[bool]) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        during_backward.append(torch._C._current_graph_task_id() != -1)
        return start(*args, **kwargs)

    return noted


def trainer_of(rank: Rank, path: Path, config: Config, shared: Path) -> Trainer:
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": path})})
    model, optimizer = with_optimizer(config, load_policy(config, rank))
    return Trainer(
        config=config,
        inbox=Inbox(Control.serve(), answers=False, patience_s=1.0),
        model=model,
        optimizer=optimizer,
        objective=objective_of(config),
        senders={"shm": FileSender(model.held, shared, on_disk=False)},
        reference=reference_of(config, rank),
    )


def rl_steps(
    rank: Rank, path: Path, config: Config, batch: Path, groups: np.ndarray, shared: Path
) -> tuple[dict[str, np.ndarray], list[dict[str, float | str]]]:
    """Two steps of the trainer on the same samples; the weights as it publishes them, and its metrics."""
    trainer = trainer_of(rank, path, config, shared)
    minibatches = trainer._load(place_batch(shared, 0, load_batch(batch), groups, config))
    results = [trainer._train_step(step, minibatches) for step in range(2)]
    manifest = Manifest.from_json(trainer.senders["shm"].send({"version": 1})["file"])
    tensors = load_file(manifest.path)
    crc32 = {name: zlib.crc32(t.view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()}
    assert list(manifest.crc32 or ()) == [crc32[name] for name, *_ in manifest.tensors]
    return {name: numpy(tensor.float()) for name, tensor in tensors.items()}, results


def interrupted_steps(
    rank: Rank, path: Path, config: Config, batch: Path, groups: np.ndarray, shared: Path, resume: Path | None
) -> tuple[dict[str, np.ndarray], dict[str, float | str]]:
    """A step from the beginning, with a checkpoint behind it; or the next one, from `resume`. Its weights, metrics."""
    trainer = trainer_of(rank, path, config, shared)
    if resume is not None:
        load_training(resume, trainer.model, trainer.optimizer)
    step = 0 if resume is None else read_state(resume).step
    minibatches = trainer._load(place_batch(shared, 0, load_batch(batch), groups, config))
    metrics = trainer._train_step(step, minibatches)
    trainer._save(step + 1, {})
    manifest = Manifest.from_json(trainer.senders["shm"].send({"version": 1})["file"])
    return {name: numpy(tensor.float()) for name, tensor in load_file(manifest.path).items()}, metrics


def poisoned_step(rank: Rank, path: Path, where: str) -> str:
    """What the optimizer says of a NaN, and whether it left the weights alone."""
    model = model_of(rank, path)
    optimizer = Optimizer(model.chunks, OptimizerSettings(lr=1.0), dtype=torch.float32, distributed=True)
    before = {name: p.detach().clone() for name, p in model.parameters.items()}
    optimizer.zero()
    loss = torch.tensor(torch.nan if where == "loss" and rank.rank == 1 else 1.0)
    if where == "gradient" and rank.rank == 0:
        dict(optimizer.chunks[0].module.named_parameters())["decoder.layers.1.mlp.router.weight"].main_grad[0, 0] = (
            torch.inf
        )
    try:
        optimizer.step(watch={"the loss of micro-batch 0": loss})
    except NonFinite as error:
        assert all(torch.equal(before[name], p) for name, p in model.parameters.items())
        return str(error)
    return "no error"
