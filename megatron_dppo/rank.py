"""One rank of the trainer's job, from its config: the groups, the models, the optimizer, the ways for its weights."""

from __future__ import annotations

import os
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from megatron_dppo.backend.model import Model, load_model
from megatron_dppo.backend.optimizer import Optimizer, OptimizerSettings
from megatron_dppo.backend.parallel import Rank, initialise_parallel
from megatron_dppo.config import Config
from megatron_dppo.control import SHARED_VARIABLE, Control
from megatron_dppo.head.policy_head import HeadMemory
from megatron_dppo.weights.sync import FileSender, GroupSender, Held, WeightSender
from megatron_dppo.weights.update import Transport


def join_job(config: Config) -> Rank:
    """This process becomes the rank that its environment says."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    return initialise_parallel(config.parallel.layout, config.run.seed, config.training.rollout_timeout_s)


def load_policy(config: Config, rank: Rank, path: Path | None = None) -> Model:
    """The config's model, or another Hugging Face directory of its kind, as the policy is computed."""
    return load_model(
        path or config.model.path,
        rank,
        getattr(torch, config.model.dtype),
        sequence_parallel=config.parallel.uses_sequence_parallel,
        temperature=config.rollout.temperature,
        head_memory=HeadMemory(config.head.path, config.head.memory_bytes),
        recompute=config.training.recompute,
        expert_bias_rate=config.training.expert_bias_rate,
        layers=config.model.layers,
        replay=config.routing.mode != "off",
    )


def reference_of(config: Config, rank: Rank) -> Model | None:
    """The frozen policy that the loss keeps near, where it has a KL term: loaded once, without an optimizer."""
    kl = config.loss.kl
    return load_policy(config, rank, kl.reference) if kl.coefficient else None


def with_optimizer(config: Config, model: Model) -> tuple[Model, Optimizer]:
    """The optimizer, and the model under Megatron's data parallelism."""
    training, parallel = config.training, config.parallel
    settings = OptimizerSettings(
        kind=training.optimizer,
        lr=training.lr,
        min_lr_ratio=training.min_lr_ratio,
        warmup_steps=training.warmup_steps,
        decay_steps=training.decay_steps or training.steps,
        schedule=training.schedule,
        weight_decay=training.weight_decay,
        beta1=training.beta1,
        beta2=training.beta2,
        eps=training.eps,
        clip_grad=training.clip_grad,
        offload=training.offload_optimizer,
    )
    optimizer = Optimizer(
        model.chunks,
        settings,
        dtype=model.config.params_dtype,
        distributed=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        without_decay=parameters_like(model, training.no_weight_decay),
    )
    return replace(model, chunks=optimizer.chunks), optimizer


def parameters_like(model: Model, patterns: tuple[str, ...]) -> list[Tensor]:
    """This rank's parameters whose hub tensors match one of `patterns` (as a shell's).

    Raises ValueError for a parameter that holds several tensors of which only some match.
    """
    tensors: dict[str, set[str]] = {}
    for piece in model.pieces:
        tensors.setdefault(piece.param, set()).add(piece.tensor)
    found = []
    for name, parameter in model.parameters.items():
        matching = {t for t in tensors[name] if any(fnmatchcase(t, pattern) for pattern in patterns)}
        if matching and matching != tensors[name]:
            raise ValueError(
                f"training.no_weight_decay: got {', '.join(sorted(matching))}, expected all or none of "
                f"{', '.join(sorted(tensors[name]))}: they are one parameter in training"
            )
        if matching:
            found.append(parameter)
    return found


def weight_senders(config: Config, control: Control, held: Held) -> dict[Transport, WeightSender]:
    """A way for every transport that an order may name."""
    sync = config.sync
    return {
        "shm": FileSender(held, Path(os.environ[SHARED_VARIABLE]), on_disk=False),
        "disk": FileSender(held, sync.directory_of(config.run), on_disk=True),
        **{
            transport: GroupSender(
                held,
                control,
                bucket_bytes=sync.bucket_bytes,
                timeout_s=sync.timeout_s,
                one_machine=transport == "ipc",
            )
            for transport in ("group", "ipc")
        },
    }
