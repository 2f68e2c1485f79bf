"""The trainer: what every rank runs. Started by the launcher as `python -m megatron_dppo.trainer CONFIG`.

Each step: send the weights to the engines -> wait for scored samples -> gradient steps on their minibatches -> metrics.
What comes next is the rollout client's to say, by an order (`control.Orders`).
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dppo.algorithm.objectives import (
    Objective,
    RolloutTokens,
    TokenStats,
    coefficient,
    metrics,
)
from megatron_dppo.backend.checkpoint import load_training, save_training
from megatron_dppo.backend.device import communication_backend
from megatron_dppo.backend.layers import transformer_engine_installed
from megatron_dppo.backend.model import Model, load_model
from megatron_dppo.backend.optimizer import AdamSettings, NonFinite, Optimizer, adam_package
from megatron_dppo.backend.parallel import finalise_parallel, initialise_parallel
from megatron_dppo.backend.step import Sums, loss_pass, stats_pass
from megatron_dppo.checkpoints import TrainingState, checkpoint_path, remove_old_checkpoints, start_of
from megatron_dppo.config import Config, Transport, load_config, num_recorded_topk, objective_of
from megatron_dppo.control import BACKEND_KEY, CONTROL_VARIABLE, SHARED_VARIABLE, Control, order_key, reply_key
from megatron_dppo.data.packing import LossWeights, MicroBatch, build_micro_batch, context_share
from megatron_dppo.head.policy_head import HeadMemory
from megatron_dppo.metrics import Laps, MetricsWriter
from megatron_dppo.rollout.trajectory import load_batch
from megatron_dppo.weights.sync import FileSender, GroupSender, Held, WeightSender, save_checkpoint


@dataclass(frozen=True)
class Trainer:
    """One rank's model and optimizer, and the ways on which its weights leave."""

    config: Config
    control: Control
    model: Model
    optimizer: Optimizer
    objective: Objective
    senders: Mapping[Transport, WeightSender]
    start: int = 0  # steps done before

    def run(self, writer: MetricsWriter | None) -> None:
        """Does what the client orders until there are no more samples. `writer` on one rank only."""
        step, laps = self.start, Laps()
        for number in itertools.count():
            order = self.control.wait(order_key(number), self._patience_s(number))
            laps.end("wait")
            if order["do"] == "send":
                reply = self.senders[order["transport"]].send(order)
                laps.end("send")
            elif order["do"] == "train":
                trained = self._train_step(step, self._load(order))
                laps.end("train")
                _write(writer, step, order, trained, laps.restart())
                step += 1
                self._save(step, due=self.config.checkpoint.every)
                laps.end("save")
                reply = {"version": step}
            else:
                _write(writer, step, order, {}, laps.restart())
                return
            if self.model.rank.rank == 0:
                self.control.post(reply_key(number), reply)

    def _save(self, step: int, due: int) -> None:
        """A checkpoint every `due` steps (0: never), and none that is too old."""
        if not due or step % due:
            return
        config = self.config
        state = TrainingState(
            step=step,
            seed=config.run.seed,
            model_type=self.model.arch.model_type,
            dtype=config.model.dtype,
            distributed_optimizer=config.parallel.distributed_optimizer,
            layout=str(config.parallel.layout),
            megatron_core=metadata.version("megatron-core"),
        )
        save_training(checkpoint_path(config.run.dir, step), self.model, self.optimizer, state, config.model.path)
        if self.model.rank.rank == 0:
            remove_old_checkpoints(config.run.dir, config.checkpoint.keep)

    def _patience_s(self, number: int) -> float:
        """How long to wait for an order; the first one comes only after the engine has started."""
        start = self.config.rollout.start_timeout_s if number == 0 else 0.0
        return start + self.config.training.rollout_timeout_s

    def _load(self, order: Mapping[str, Any]) -> list[list[MicroBatch]]:
        """This replica's samples as minibatches of micro-batches; this context rank's part of each."""
        at = self.model.rank.at
        samples = iter(load_batch(Path(order["files"][at.data])))
        loss, num_topk = self.config.loss, num_recorded_topk(self.config)
        weights = LossWeights(loss.normaliser, loss.constant or 1)
        layout = self.config.parallel.layout
        return [
            [
                context_share(
                    build_micro_batch(
                        [next(samples) for _ in range(size)],
                        num_topk=num_topk,
                        weights=weights,
                        packed=self.config.training.packed,
                        length_multiple=layout.length_multiple,
                        sequence_multiple=layout.sequence_multiple,
                        skip_zero_advantage=loss.skip_zero_advantage,
                    ),
                    layout.context,
                    at.context,
                )
                for size in sizes
            ]
            for sizes in order["micro_batch_sizes"][at.data]
        ]

    def _train_step(self, step: int, minibatches: Sequence[Sequence[MicroBatch]]) -> dict[str, float | str]:
        """One gradient step a minibatch; returns the step's metrics (on every rank)."""
        old = self._recompute(minibatches)
        self.optimizer.advance()
        sums: list[Sums] = []
        norms = []
        for index, minibatch in enumerate(minibatches):
            self.optimizer.zero()
            tokens = [
                _rollout_tokens(batch, old_stats, self.model.device)
                for batch, old_stats in zip(minibatch, old[index], strict=True)
            ]
            results = loss_pass(
                self.model,
                minibatch,
                self._coefficients(tokens),
                entropy_gradient=bool(self.config.loss.entropy_coefficient),
            )
            try:
                losses = {f"the loss of micro-batch {i}": result["loss"] for i, result in enumerate(results)}
                norms.append(self.optimizer.step(watch=losses))
            except NonFinite as error:
                raise NonFinite(f"step {step}, minibatch {index}: {error}") from None
            sums += results
        at_sampling = _means(sums[: len(minibatches[0])], self.model)  # weights as the engine had them
        means = _means(sums, self.model)
        if not num_recorded_topk(self.config):
            del means["topk_tv"]  # not measured
        return means | {
            "means_of": "tokens with an advantage" if self.config.loss.skip_zero_advantage else "counted tokens",
            "mismatch": at_sampling["mean_abs_pi_minus_mu"],
            "grad_norm": sum(norms) / len(norms),
            "lr": self.optimizer.lr,
        }

    def _recompute(self, minibatches: Sequence[Sequence[MicroBatch]]) -> list[list[TokenStats | None]]:
        """The old policy's statistics, before its weights move; only where the objective is anchored to it."""
        if self.objective.anchor == "rollout":
            return [[None] * len(minibatch) for minibatch in minibatches]
        old: list[list[TokenStats | None]] = []
        for minibatch in minibatches:
            stats = stats_pass(self.model, minibatch)
            old.append([*stats] if self.model.rank.is_last_stage else [None] * len(minibatch))
        return old

    def _coefficients(self, tokens: Sequence[RolloutTokens]) -> Any:
        """Eq. 23 for the head: per token M_t min(r_t, C) A_t, and the entropy bonus where the config has one."""
        bonus = self.config.loss.entropy_coefficient

        def coefficients(index: int, stats: TokenStats, part: slice) -> tuple[Tensor, Tensor | None, Sums]:
            rollout = tokens[index][part]
            result = coefficient(self.objective, stats, rollout)
            c_entropy = torch.full_like(stats.entropy, bonus) if bonus else None
            return result.value, c_entropy, metrics(stats, rollout, result)

        return coefficients


def _rollout_tokens(batch: MicroBatch, old: TokenStats | None, device: torch.device) -> RolloutTokens:
    topk = None if batch.mu_topk_logprob is None else torch.from_numpy(batch.mu_topk_logprob).to(device)
    return RolloutTokens(
        advantage=torch.from_numpy(batch.advantage).to(device),
        logprob=torch.from_numpy(batch.mu_logprob).to(device),
        topk_logprob=topk,
        recomputed_logprob=None if old is None else old.logprob,
        recomputed_topk_logprob=None if old is None else old.topk_logprob,
    )


def _means(sums: Sequence[Sums], model: Model) -> dict[str, float]:
    """Means over all tokens of all replicas. One all-reduce of a dozen float64; the numbers leave the device here."""
    names = (
        "loss", "count", "skipped", "tokens", "abs_pi_minus_mu", "entropy", "divergence", "kl_mu_pi", "topk_tv",
        "positive", "negative", "masked_positive", "masked_negative", "bad_updates",
    )  # fmt: skip
    total = torch.zeros(len(names), dtype=torch.float64, device=model.device)
    if model.rank.reports:
        for result in sums:
            total += torch.stack([result[name].double() if name in result else total.new_zeros(()) for name in names])
    dist.all_reduce(total)
    value = dict(zip(names, total.tolist(), strict=True))
    positive, negative = (max(value[name], 1.0) for name in ("positive", "negative"))
    tokens = value["tokens"] or math.nan  # where all were skipped, nothing was measured
    return {
        "loss": value["loss"] / max(value["count"], 1.0),
        "tokens": value["tokens"],
        "tokens_skipped": value["skipped"],
        "mean_abs_pi_minus_mu": value["abs_pi_minus_mu"] / tokens,
        "entropy": value["entropy"] / tokens,
        "divergence": value["divergence"] / tokens,
        "kl_mu_pi": value["kl_mu_pi"] / tokens,
        "topk_tv": value["topk_tv"] / tokens,
        "masked_share_positive": value["masked_positive"] / positive,
        "masked_share_negative": value["masked_negative"] / negative,
        "bad_update_share": value["bad_updates"] / negative,
    }


def _write(
    writer: MetricsWriter | None,
    step: int,
    order: dict[str, Any],
    trained: dict[str, float | str],
    seconds: dict[str, float],
) -> None:
    """One record: the client's numbers (of the weights before this step) and the trainer's."""
    if writer is None:
        return
    record = dict(order.get("metrics", {})) | trained
    record |= {f"eval/{name}": value for name, value in (order["evaluation"] or {}).items()}
    record |= {f"seconds/{name}": value for name, value in {**order["seconds"], **seconds}.items()}
    writer.write(step, record)


def main(config: Config) -> None:
    """One rank, from joining the job to leaving it."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    split = config.parallel
    rank = initialise_parallel(split.layout, config.run.seed, config.training.rollout_timeout_s)
    dtype = getattr(torch, config.model.dtype)
    model = load_model(
        config.model.path, rank, dtype,
        sequence_parallel=split.uses_sequence_parallel, temperature=config.rollout.temperature,
        head_memory=HeadMemory(config.head.path, config.head.memory_bytes),
    )  # fmt: skip
    training = config.training
    settings = AdamSettings(
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
    )
    optimizer = Optimizer(
        model.chunks,
        settings,
        dtype=dtype,
        distributed=split.distributed_optimizer,
        overlap_grad_reduce=split.overlap_grad_reduce,
    )
    control = Control.connect(os.environ[CONTROL_VARIABLE])
    if rank.rank == 0:
        layers = "Transformer Engine" if transformer_engine_installed() else "torch"
        text = f"{model.device.type} over {communication_backend()}, layers of {layers}, Adam of {adam_package()}"
        control.post(BACKEND_KEY, {"text": text})
    model = replace(model, chunks=optimizer.chunks)
    start = start_of(config.resume)
    if config.resume != "never":
        load_training(Path(config.resume), model, optimizer)
    trainer = Trainer(
        config=config,
        control=control,
        model=model,
        optimizer=optimizer,
        objective=objective_of(config),
        senders=weight_senders(config, control, model.held),
        start=start,
    )
    logging = config.logging
    writer = (
        MetricsWriter(config.run.dir, tensorboard=logging.tensorboard, start=start) if rank.rank == 0 else nullcontext()
    )
    with writer as opened:
        trainer.run(opened)
    disk = trainer.senders["disk"]
    if rank.rank == 0 and isinstance(disk, FileSender):
        disk.close()
    save_checkpoint(model.held, config.model.path, config.run.dir / "model")
    finalise_parallel()


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


if __name__ == "__main__":
    main(load_config(sys.argv[1]))
