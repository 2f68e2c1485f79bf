"""The trainer: what every rank runs. Started by the launcher as `python -m megatron_dppo.trainer CONFIG`.

Each step: send the weights to the engines -> wait for scored samples -> gradient steps on their minibatches -> metrics.
What comes next is the rollout client's to say, by an order (`control.Orders`).
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dppo.algorithm.divergence import binary_tv
from megatron_dppo.algorithm.objectives import (
    Objective,
    RolloutTokens,
    TokenStats,
    coefficient,
    metrics,
)
from megatron_dppo.algorithm.reference_kl import kl_coefficient
from megatron_dppo.backend.checkpoint import load_training, save_training
from megatron_dppo.backend.device import communication_backend
from megatron_dppo.backend.model import Model
from megatron_dppo.backend.optimizer import NonFinite, Optimizer, adam_package
from megatron_dppo.backend.parallel import finalise_parallel
from megatron_dppo.backend.replay import LayerRoutes, Routes
from megatron_dppo.backend.step import Sums, as_taken, compared_routes, loss_pass, recorded_routes, stats_pass
from megatron_dppo.checkpoints import TrainingState, checkpoint_path, remove_old_checkpoints, start_of
from megatron_dppo.config import Config, num_recorded_topk, objective_of, reference_kl_of
from megatron_dppo.config.loading import load_config
from megatron_dppo.control import BACKEND_KEY, CONTROL_VARIABLE, Control, Inbox
from megatron_dppo.data.packing import LossWeights, MicroBatch, rank_micro_batch
from megatron_dppo.data.trajectory import load_batch
from megatron_dppo.metrics import Laps, MetricsWriter
from megatron_dppo.rank import join_job, load_policy, reference_of, weight_senders, with_optimizer
from megatron_dppo.rollout.engine import Transport
from megatron_dppo.weights.sync import WeightSender, save_checkpoint


@dataclass(frozen=True)
class Trainer:
    """One rank's model and optimizer, and the ways on which its weights leave."""

    config: Config
    inbox: Inbox
    model: Model
    optimizer: Optimizer
    objective: Objective
    senders: Mapping[Transport, WeightSender]
    reference: Model | None = None  # frozen, where the loss has a KL term
    start: int = 0  # steps done before

    def run(self, writer: MetricsWriter | None) -> bool:
        """Does what the client orders until there are no more samples. `writer` on one rank only.

        False where the run will go on from its last checkpoint: it was asked to stop before its end.
        """
        step, laps, complete = self.start, Laps(), True
        for order in self.inbox:
            laps.end("wait")
            match order["do"]:
                case "send":
                    self.inbox.answer(self.senders[order["transport"]].send(order))
                case "train":
                    trained = self._train_step(step, self._load(order))
                    laps.end("train")
                    _write(writer, step, order, trained, laps.restart())
                    step += 1
                    self.inbox.answer({"version": step})
                case "save":
                    self._save(step, {int(batch): Path(file) for batch, file in order["queue"].items()})
                    self.inbox.answer({})
                case "stop":
                    _write(writer, step, order, {}, laps.restart())
                    complete = not order.get("resumable", False)
            laps.end(order["do"])
        return complete

    def _save(self, step: int, queue: Mapping[int, Path]) -> None:
        """A checkpoint, and none that is too old any more."""
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
        path = checkpoint_path(config.run.dir, step)
        save_training(path, self.model, self.optimizer, state, config.model.path, queue)
        if self.model.rank.rank == 0:
            remove_old_checkpoints(config.run.dir, config.checkpoint.keep)

    def _load(self, order: Mapping[str, Any]) -> list[list[MicroBatch]]:
        """This replica's samples as minibatches of micro-batches; this context rank's part of each."""
        rank, loss = self.model.rank, self.config.loss
        layers = self.model.moe_layers if self.config.routing.mode == "rollout" else None
        samples = iter(load_batch(Path(order["files"][rank.at.data]), layers or ()))
        build = partial(
            rank_micro_batch,
            layout=rank.parallel,
            context_rank=rank.at.context,
            routes_of_tensor_rank=rank.at.tensor if self.model.config.sequence_parallel else None,
            num_topk=num_recorded_topk(self.config),
            weights=LossWeights(loss.normaliser, loss.constant or 1),
            packed=self.config.training.packed,
            skip_zero_advantage=loss.skip_zero_advantage,
            routed_layers=layers,
        )
        return [
            [build([next(samples) for _ in range(size)]) for size in sizes]
            for sizes in order["micro_batch_sizes"][rank.at.data]
        ]

    def _train_step(self, step: int, minibatches: Sequence[Sequence[MicroBatch]]) -> dict[str, float | str]:
        """One gradient step a minibatch; returns the step's metrics (on every rank)."""
        routes = self._routes(minibatches)
        known = self._rollout_tokens(minibatches, routes)
        unreplayed = self._without_replay(step, minibatches[0], routes[0], known[0])
        self.optimizer.advance()
        sums: list[Sums] = []
        norms = []
        for index, minibatch in enumerate(minibatches):
            self.optimizer.zero()
            results = loss_pass(
                self.model,
                minibatch,
                self._coefficients(known[index]),
                entropy_gradient=bool(self.config.loss.entropy_coefficient),
                routes=routes[index],
            )
            try:
                losses = {f"the loss of micro-batch {i}": result["loss"] for i, result in enumerate(results)}
                norms.append(self.optimizer.step(watch=losses))
            except NonFinite as error:
                raise NonFinite(f"step {step}, minibatch {index}: {error}") from None
            sums += results
        at_sampling = _means(sums[: len(minibatches[0])], self.model)  # weights as the engine had them
        means = _means(sums, self.model)
        for name, measured in (("topk_tv", num_recorded_topk(self.config)), ("kl_reference", self.reference)):
            if not measured:
                del means[name]
        return (
            means
            | unreplayed
            | route_agreement(self.model, routes[0])  # mismatch and this: of the weights that the engine had
            | {
                "means_of": "tokens with an advantage" if self.config.loss.skip_zero_advantage else "counted tokens",
                "mismatch": at_sampling["mean_abs_pi_minus_mu"],
                "grad_norm": sum(norms) / len(norms),
                "lr": self.optimizer.lr,
            }
        )

    def _routes(self, minibatches: Sequence[Sequence[MicroBatch]]) -> list[list[Routes | None]]:
        """What routers replay in each micro-batch: what the engine recorded, or what they take now, before the weights
        move (one pass without gradient)."""
        if self.config.routing.mode == "rollout":
            return [[recorded_routes(self.model, batch) for batch in minibatch] for minibatch in minibatches]
        if self.config.routing.mode == "off":
            return [[None] * len(minibatch) for minibatch in minibatches]
        taken: list[list[Routes | None]] = []
        for minibatch in minibatches:
            places = self._native_places(minibatch)
            stats_pass(self.model, minibatch, places)
            taken.append([as_taken(place) for place in places])
        return taken

    def _without_replay(
        self,
        step: int,
        minibatch: Sequence[MicroBatch],
        routes: Sequence[Routes | None],
        tokens: Sequence[RolloutTokens],
    ) -> dict[str, float]:
        """Of the first gradient step, if routers chose themselves: mean |pi - mu|, and the share of recorded experts
        that they take; where it is due."""
        every = self.config.routing.measure_every
        if not every or step % every:
            return {}
        native = self._native_places(minibatch)
        total = torch.zeros(2, dtype=torch.float64, device=self.model.device)
        for stats, rollout in zip(stats_pass(self.model, minibatch, native), tokens, strict=False):
            if self.model.rank.reports:
                total[0] += binary_tv(rollout.logprob, stats.logprob).double().sum()
                total[1] += len(stats.logprob)
        dist.all_reduce(total)
        compared = [compared_routes(own, found) for own, found in zip(native, routes, strict=True) if found is not None]
        return {
            "mismatch_without_replay": float(total[0] / total[1]) if total[1] else math.nan,
            **route_agreement(self.model, compared, "route_agreement_without_replay"),
        }

    def _native_places(self, minibatch: Sequence[MicroBatch]) -> list[Routes]:
        """Where routers leave what they take."""
        return [{layer: LayerRoutes() for layer in self.model.moe_layers} for _ in minibatch]

    def _rollout_tokens(
        self, minibatches: Sequence[Sequence[MicroBatch]], routes: Sequence[Sequence[Routes | None]]
    ) -> list[list[RolloutTokens]]:
        """What is known of each micro-batch's tokens before the weights move: what the engine recorded and, where the
        loss asks for them, the old policy's statistics and the reference's."""
        known = [[_recorded(batch, self.model.device) for batch in minibatch] for minibatch in minibatches]
        if self.objective.anchor == "recomputed":
            known = _extended(known, self.model, minibatches, _as_anchor, routes)
        if self.reference is not None:
            alone = [[replace(batch, topk_ids=None) for batch in minibatch] for minibatch in minibatches]
            known = _extended(known, self.reference, alone, _as_reference)
        return known

    def _coefficients(self, tokens: Sequence[RolloutTokens]) -> Any:
        """Eq. 23 for the head: per token M_t min(r_t, C) A_t, and the entropy bonus and the pull to the reference where
        the config has them."""
        bonus, penalty = self.config.loss.entropy_coefficient, reference_kl_of(self.config)

        def coefficients(index: int, stats: TokenStats, part: slice) -> tuple[Tensor, Tensor | None, Sums]:
            rollout = tokens[index][part]
            result = coefficient(self.objective, stats, rollout)
            c_entropy = torch.full_like(stats.entropy, bonus) if bonus else None
            value, sums = result.value, metrics(stats, rollout, result)
            if rollout.reference_logprob is not None:
                ratio = result.ratio.clamp(max=self.objective.cap)
                pull, distance = kl_coefficient(penalty, stats.logprob, rollout.reference_logprob, ratio)
                value = value + pull
                sums["kl_reference"] = distance.double().sum()
            return value, c_entropy, sums

        return coefficients


def _recorded(batch: MicroBatch, device: torch.device) -> RolloutTokens:
    topk = None if batch.mu_topk_logprob is None else torch.from_numpy(batch.mu_topk_logprob).to(device)
    return RolloutTokens(
        advantage=torch.from_numpy(batch.advantage).to(device),
        logprob=torch.from_numpy(batch.mu_logprob).to(device),
        topk_logprob=topk,
    )


def _as_anchor(tokens: RolloutTokens, old: TokenStats) -> RolloutTokens:
    return replace(tokens, recomputed_logprob=old.logprob, recomputed_topk_logprob=old.topk_logprob)


def _as_reference(tokens: RolloutTokens, reference: TokenStats) -> RolloutTokens:
    return replace(tokens, reference_logprob=reference.logprob)


def _extended(
    known: list[list[RolloutTokens]],
    model: Model,
    minibatches: Sequence[Sequence[MicroBatch]],
    extend: Callable[[RolloutTokens, TokenStats], RolloutTokens],
    routes: Sequence[Sequence[Routes | None]] | None = None,
) -> list[list[RolloutTokens]]:
    """What is known, with a model's statistics; on the ranks of the last stage, where they are."""
    extended = []
    for index, (tokens, minibatch) in enumerate(zip(known, minibatches, strict=True)):
        found = stats_pass(model, minibatch, None if routes is None else routes[index])
        extended.append([*map(extend, tokens, found)] if model.rank.is_last_stage else tokens)
    return extended


def route_agreement(
    model: Model, micro_batches: Sequence[Routes | None], name: str = "route_agreement"
) -> dict[str, float]:
    """Share of the recorded experts that routers take themselves, in all layers and in each, of passes that have been.
    One all-reduce of two float64 a layer."""
    replayed = [routes for routes in micro_batches if routes is not None]
    if not replayed:
        return {}
    total = torch.zeros(2, model.arch.num_layers, dtype=torch.float64, device=model.device)
    for layer, routes in (item for of_layers in replayed for item in of_layers.items()):
        assert routes.agreed is not None and routes.valid is not None
        total[0, layer] += routes.agreed
        total[1, layer] += routes.valid.sum() * model.arch.num_experts_per_tok
    dist.all_reduce(total)
    agreed, experts = total.tolist()
    if not sum(experts):
        return {}
    of_layers = {f"{name}/{i}": a / n for i, (a, n) in enumerate(zip(agreed, experts, strict=True)) if n}
    return {name: sum(agreed) / sum(experts)} | of_layers


def _means(sums: Sequence[Sums], model: Model) -> dict[str, float]:
    """Means over all tokens of all replicas. One all-reduce of a dozen float64; the numbers leave the device here."""
    names = (
        "loss", "count", "skipped", "tokens", "abs_pi_minus_mu", "entropy", "divergence", "kl_mu_pi", "topk_tv",
        "kl_reference", "positive", "negative", "masked_positive", "masked_negative", "bad_updates",
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
        "kl_reference": value["kl_reference"] / tokens,
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
    rank = join_job(config)
    model, optimizer = with_optimizer(config, load_policy(config, rank))
    control = Control.connect(os.environ[CONTROL_VARIABLE])
    if rank.rank == 0:
        layers = "Transformer Engine" if model.transformer_engine else "torch"
        text = f"{model.device.type} over {communication_backend()}, layers of {layers}, Adam of {adam_package()}"
        control.post(BACKEND_KEY, {"text": text})
    start = start_of(config.resume)
    if config.resume != "never":
        load_training(Path(config.resume), model, optimizer)
    trainer = Trainer(
        config=config,
        inbox=Inbox(
            control,
            answers=rank.rank == 0,
            patience_s=config.training.rollout_timeout_s,
            start_s=config.rollout.start_timeout_s,
        ),
        model=model,
        optimizer=optimizer,
        objective=objective_of(config),
        senders=weight_senders(config, control, model.held),
        reference=reference_of(config, rank),
        start=start,
    )
    logging = config.logging
    writer = (
        MetricsWriter(config.run.dir, tensorboard=logging.tensorboard, start=start) if rank.rank == 0 else nullcontext()
    )
    with writer as opened:
        complete = trainer.run(opened)
    for sender in trainer.senders.values():
        sender.close()
    if complete:
        save_checkpoint(model.held, config.model.path, config.run.dir / "model")
    finalise_parallel()


if __name__ == "__main__":
    main(load_config(sys.argv[1]))
