"""The trainer's loss and its gradient, every term that a config can ask for, against transformers' autograd.

That a split changes neither: test_layouts.py, test_trainer.py. Here one rank is compared with something that knows
nothing of it, so that a term with the wrong sign, or a setting that nobody reads, shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_dppo.config import Config
from megatron_dppo.data.trajectory import Scored, load_batch
from megatron_dppo.rollout.client import place_batch
from megatron_dppo.weights.layout import Parallel
from tests.distributed.proof import proof
from tests.distributed.rank_pool import RankPool
from tests.distributed.test_gradients import _hub
from tests.distributed.test_layouts import Case, config
from tests.distributed.test_trainer import samples
from tests.tiny_models import hub_tensors, read_checkpoint, tiny_config, tiny_model, write_checkpoint

CAP, BONUS, BETA, CONSTANT, TEMPERATURE = 1.5, 0.3, 0.7, 5, 0.7
ONE = Case(Parallel(), optimizer="sgd", distributed=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("policy") / "model", tiny_model(tiny_config(), seed=13))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("reference") / "model", tiny_model(tiny_config(), seed=6))


def log_probs(model: Any, sample: Scored, temperature: float) -> Tensor:
    """[counted tokens, V]."""
    t = sample.trajectory
    ids = torch.from_numpy(np.concatenate([t.prompt_ids, t.response_ids])).long()
    logits = model(ids[None]).logits[0, len(t.prompt_ids) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1)[torch.from_numpy(t.loss_mask.copy())]


def trainable(path: Path) -> Any:
    model = read_checkpoint(path)
    model.model.embed_tokens.padding_idx = None  # of which transformers keeps no gradient
    return model


def loss_by_hand(model: Any, frozen: Any, scored: list[Scored], temperature: float, normaliser: str) -> Tensor:
    """-sum_t w_t ((min(r, C) A - beta min(r, C) (log pi - log ref)) log pi + bonus H) over the normaliser's divisor, in
    which the coefficients are constants."""
    loss, divisor = torch.zeros(()), 0
    for sample in scored:
        counted = sample.trajectory.loss_mask
        targets = torch.from_numpy(sample.trajectory.response_ids[counted]).long()[:, None]
        mu, advantage = (torch.from_numpy(x[counted]) for x in (sample.trajectory.rollout_logprobs, sample.advantage))
        log_p = log_probs(model, sample, temperature)
        with torch.no_grad():
            of_reference = log_probs(frozen, sample, temperature).gather(1, targets)[:, 0]
        chosen, entropy = log_p.gather(1, targets)[:, 0], -(log_p.exp() * log_p).sum(-1)
        ratio = (chosen - mu).exp().clamp(max=CAP).detach()
        coefficient = ratio * (advantage - BETA * (chosen - of_reference).detach())
        terms = (coefficient * chosen + BONUS * entropy).sum()
        tokens = int(counted.sum())
        loss = loss - (terms / tokens if normaliser == "sequences" else terms)
        divisor += {"tokens": tokens, "sequences": 1, "constant": CONSTANT}[normaliser]
    return loss / divisor


def settings_of(checkpoint: Path, reference: Path, temperature: float, normaliser: str, **training: Any) -> Config:
    """A capped ratio, an entropy bonus and a reference of its own."""
    loss = {
        "normaliser": normaliser,
        "entropy_coefficient": BONUS,
        "kl": {"coefficient": BETA, "estimator": "k3", "reference": str(reference)},
    } | ({"constant": CONSTANT} if normaliser == "constant" else {})
    plain = config(ONE, checkpoint)
    return config(
        ONE,
        checkpoint,
        loss=loss,
        rollout=plain.rollout.model_dump() | {"temperature": temperature},
        objective={"name": "pg_tis", "cap": CAP},
        training=plain.training.model_dump() | training,
    )


@pytest.mark.parametrize("normaliser", ["tokens", "sequences", "constant"])
def test_every_term_of_the_loss_equals_transformers(
    ranks: RankPool, checkpoint: Path, reference: Path, tmp_path: Path, normaliser: str
) -> None:
    """At a temperature that is not 1."""
    batch, groups = samples(checkpoint)
    settings = settings_of(checkpoint, reference, TEMPERATURE, normaliser)
    order = place_batch(tmp_path, 0, load_batch(batch), groups, settings)
    (found,) = ranks.run(proof, Parallel(), checkpoint, settings, order, 1, tmp_path)
    model = trainable(checkpoint)
    loss = loss_by_hand(model, read_checkpoint(reference), load_batch(batch), TEMPERATURE, normaliser)
    loss.backward()
    gradients = {hub: g for name, p in model.named_parameters() for hub, g in _hub(name, p.grad.numpy())}
    assert found.metrics[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert found.gradients.keys() == gradients.keys()
    for name, expected in gradients.items():
        error = np.linalg.norm(found.gradients[name] - expected) / np.linalg.norm(expected)
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"


def test_three_steps_equal_torchs_adamw(ranks: RankPool, checkpoint: Path, reference: Path, tmp_path: Path) -> None:
    """With numbers of Adam that are no defaults, and the gradient clipped in every step."""
    batch, groups = samples(checkpoint)
    settings = settings_of(
        checkpoint, reference, TEMPERATURE, "sequences",
        optimizer="adam", lr=2e-4, beta1=0.6, beta2=0.7, eps=1e-4, weight_decay=0.2, no_weight_decay=[], clip_grad=0.5,
    )  # fmt: skip
    order = place_batch(tmp_path, 0, load_batch(batch), groups, settings)
    (found,) = ranks.run(proof, Parallel(), checkpoint, settings, order, 3, tmp_path)
    assert found.margin >= 1e-5  # or a rounding error would take another expert
    model, frozen = trainable(checkpoint), read_checkpoint(reference)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}
    adam = torch.optim.AdamW([{"params": matrices}, vectors], lr=2e-4, betas=(0.6, 0.7), eps=1e-4, weight_decay=0.2)
    for step in range(3):
        adam.zero_grad()
        loss = loss_by_hand(model, frozen, load_batch(batch), TEMPERATURE, "sequences")
        assert found.metrics[step]["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert found.metrics[step]["grad_norm"] == pytest.approx(float(norm), rel=1e-3) and norm > 0.5
        adam.step()
    before = hub_tensors(checkpoint)
    after = {hub: value for name, p in model.named_parameters() for hub, value in _hub(name, p.detach().numpy())}
    for name, expected in after.items():
        moved, should = found.weights[name] - before[name].numpy(), expected - before[name].numpy()
        error = np.linalg.norm(moved - should) / np.linalg.norm(should)
        assert error <= 1e-3, f"{name}: relative error {error:.1e}"


def test_metrics_are_means_over_the_tokens_that_they_name(ranks: RankPool, checkpoint: Path, tmp_path: Path) -> None:
    batch, groups = samples(checkpoint)
    settings = config(ONE, checkpoint, objective={"name": "dppo_binary_tv", "delta_low": 0.05, "delta_high": 0.1})
    order = place_batch(tmp_path, 0, load_batch(batch), groups, settings)
    (found,) = ranks.run(proof, Parallel(), checkpoint, settings, order, 1, tmp_path)
    model, per_token = read_checkpoint(checkpoint), []
    for sample in load_batch(batch):
        counted = sample.trajectory.loss_mask
        with torch.no_grad():
            log_p = log_probs(model, sample, 1.0)
        chosen = log_p.gather(1, torch.from_numpy(sample.trajectory.response_ids[counted]).long()[:, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        of_sample = (chosen.numpy(), entropy.numpy(), sample.trajectory.rollout_logprobs[counted])
        per_token.append(np.stack([*of_sample, sample.advantage[counted]]).astype(np.float64))
    log_pi, entropy_T, log_mu, advantage = np.concatenate(per_token, axis=1)
    ratio, distance = np.exp(log_pi - log_mu), np.abs(np.exp(log_pi) - np.exp(log_mu))
    rising, falling = (advantage > 0) & (ratio > 1), (advantage < 0) & (ratio < 1)
    expected = {
        "tokens": len(log_pi),
        "mean_abs_pi_minus_mu": distance.mean(),
        "mismatch": distance.mean(),
        "divergence": distance.mean(),
        "entropy": entropy_T.mean(),
        "kl_mu_pi": (ratio - 1 - np.log(ratio)).mean(),
        "masked_share_positive": (rising & (distance > 0.1)).sum() / (advantage > 0).sum(),
        "masked_share_negative": (falling & (distance > 0.05)).sum() / (advantage < 0).sum(),
        "bad_update_share": (falling & (distance >= 0.5)).sum() / (advantage < 0).sum(),
    }
    assert {name: found.metrics[0][name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert all(value > 0 for value in expected.values()) and (advantage > 0).sum() != (advantage < 0).sum()


def test_a_gradient_step_is_as_long_as_the_clipped_gradient(ranks: RankPool, checkpoint: Path, tmp_path: Path) -> None:
    """SGD without decay: all weights together move by lr x clip_grad where the gradient's norm is above that."""
    batch, groups = samples(checkpoint)
    lr, clip = 0.1, 0.25
    training = config(ONE, checkpoint).training.model_dump()
    training |= {"lr": lr, "clip_grad": clip, "weight_decay": 0.0, "no_weight_decay": []}
    settings = config(ONE, checkpoint, training=training)
    order = place_batch(tmp_path, 0, load_batch(batch), groups, settings)
    (found,) = ranks.run(proof, Parallel(), checkpoint, settings, order, 1, tmp_path)
    before = hub_tensors(checkpoint)
    moved = sum(float(np.square(found.weights[name] - before[name].numpy()).sum()) for name in found.weights) ** 0.5
    norm = sum(float(np.square(gradient).sum()) for gradient in found.gradients.values()) ** 0.5
    assert found.metrics[0]["grad_norm"] == pytest.approx(norm, rel=1e-5) and norm > 2 * clip
    assert moved == pytest.approx(lr * clip, rel=1e-3)


def test_the_learning_rate_moves_once_a_step(ranks: RankPool, checkpoint: Path, tmp_path: Path) -> None:
    """Whatever the number of minibatches: two steps of warm-up, then down on a line to a tenth at the fifth."""
    batch, groups = samples(checkpoint)
    training = config(ONE, checkpoint).training.model_dump()
    training |= {"lr": 1e-3, "minibatches": 2, "schedule": "linear", "warmup_steps": 2, "decay_steps": 5}
    settings = config(ONE, checkpoint, training=training | {"min_lr_ratio": 0.1})
    order = place_batch(tmp_path, 0, load_batch(batch), groups, settings)
    (found,) = ranks.run(proof, Parallel(), checkpoint, settings, order, 5, tmp_path)
    rates = [metrics["lr"] for metrics in found.metrics]
    assert rates == pytest.approx([0.5e-3, 1e-3, 0.7e-3, 0.4e-3, 0.1e-3], rel=1e-9)
