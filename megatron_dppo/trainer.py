"""The trainer: what every rank runs. Started by the launcher as `python -m megatron_dppo.trainer CONFIG`.

Each step: send the weights to the engines -> wait for scored samples -> gradient steps on their minibatches -> metrics.
What comes next is the rollout client's to say, by an order (`control.Orders`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dppo.algorithm.objectives import Objective, RolloutTokens, TokenStats, coefficient, token_sums
from megatron_dppo.algorithm.reference_kl import kl_coefficient
from megatron_dppo.backend.checkpoint import load_training, save_training
from megatron_dppo.backend.device import communication_backend
from megatron_dppo.backend.model import Model
from megatron_dppo.backend.optimizer import NonFinite, Optimizer, adam_package
from megatron_dppo.backend.parallel import finalise_parallel
from megatron_dppo.backend.replay import Routes, as_taken, places_for, recorded_routes
from megatron_dppo.backend.step import Sums, loss_pass, stats_pass
from megatron_dppo.checkpoints import TrainingState, checkpoint_path, remove_old_checkpoints, start_of
from megatron_dppo.config import Config, num_recorded_topk, objective_of, reference_kl_of
from megatron_dppo.config.loading import load_config
from megatron_dppo.control import BACKEND_KEY, CONTROL_VARIABLE, Control, Inbox
from megatron_dppo.data.packing import LossWeights, MicroBatch, rank_micro_batch
from megatron_dppo.data.trajectory import load_batch
from megatron_dppo.head.rows import to_device
from megatron_dppo.metrics import Laps, MetricsWriter
from megatron_dppo.rank import join_job, load_policy, reference_of, weight_senders, with_optimizer
from megatron_dppo.step_metrics import KL_REFERENCE, Native, native_sums, step_metrics
from megatron_dppo.weights.export import export_model
from megatron_dppo.weights.sync import WeightSender
from megatron_dppo.weights.update import Transport


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
        """This replica's samples as minibatches of micro-batches; this context rank's part of each.

        Raises ValueError for ids outside of the model's vocabulary.
        """
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
        minibatches = [
            [build([next(samples) for _ in range(size)]) for size in sizes]
            for sizes in order["micro_batch_sizes"][rank.at.data]
        ]
        for batch in chain.from_iterable(minibatches):
            batch.check_ids(self.model.arch.vocab_size)
        return minibatches

    def _train_step(self, step: int, minibatches: Sequence[Sequence[MicroBatch]]) -> dict[str, float | str]:
        """One gradient step a minibatch; returns the step's metrics (on every rank).

        Collectives: for each minibatch a `loss_pass` and an `Optimizer.step`; before all of them, where the config
        wants it, a `stats_pass` over each minibatch for its routes, for the old policy and for the reference, and one
        over the first without replay; at the end those of `step_metrics`.
        """
        routes = self._routes(minibatches)
        known = self._rollout_tokens(minibatches, routes)
        native = self._without_replay(step, minibatches[0], routes[0], known[0])
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
        return step_metrics(self.model, sums, len(minibatches[0]), routes[0], native) | {
            "means_of": "tokens with an advantage" if self.config.loss.skip_zero_advantage else "counted tokens",
            "grad_norm": sum(norms) / len(norms),
            "lr": self.optimizer.lr,
        }

    def _routes(self, minibatches: Sequence[Sequence[MicroBatch]]) -> list[list[Routes | None]]:
        """What routers replay in each micro-batch: what the engine recorded, or what they take now, before the weights
        move (one pass without gradient)."""
        if self.config.routing.mode == "rollout":
            recorded = partial(recorded_routes, moe_layers=self.model.moe_layers, device=self.model.device)
            return [[recorded(batch) for batch in minibatch] for minibatch in minibatches]
        if self.config.routing.mode == "off":
            return [[None] * len(minibatch) for minibatch in minibatches]
        taken: list[list[Routes | None]] = []
        for minibatch in minibatches:
            places = [places_for(self.model.moe_layers) for _ in minibatch]
            stats_pass(self.model, minibatch, places)
            taken.append([as_taken(place) for place in places])
        return taken

    def _without_replay(
        self,
        step: int,
        minibatch: Sequence[MicroBatch],
        routes: Sequence[Routes | None],
        tokens: Sequence[RolloutTokens],
    ) -> Native | None:
        """How the first gradient step would be if routers chose themselves, where it is due. Collectives: a
        `stats_pass` over its minibatch."""
        every = self.config.routing.measure_every
        if not every or step % every:
            return None
        places = [places_for(self.model.moe_layers) for _ in minibatch]
        stats = stats_pass(self.model, minibatch, places)
        return native_sums(self.model, stats, tokens, places, routes)

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
            value, sums = result.value, token_sums(stats, rollout, result)
            if rollout.reference_logprob is not None:
                ratio = result.ratio.clamp(max=self.objective.cap)
                pull, distance = kl_coefficient(penalty, stats.logprob, rollout.reference_logprob, ratio)
                value = value + pull
                sums[KL_REFERENCE] = distance.double().sum()
            return value, c_entropy, sums

        return coefficients


def _recorded(batch: MicroBatch, device: torch.device) -> RolloutTokens:
    topk = None if batch.mu_topk_logprob is None else to_device(batch.mu_topk_logprob, device)
    return RolloutTokens(to_device(batch.advantage, device), to_device(batch.mu_logprob, device), topk)


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
        export_model(model.held, config.model.path, config.run.dir / "model")
    finalise_parallel()


if __name__ == "__main__":
    main(load_config(sys.argv[1]))
