"""Router replay: a model that is forced to take other experts equals transformers forced to take the same.

Routes here are random: nothing that a router would choose, so that a row too many or too few shows at once. That every
layout replays alike: test_layouts.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dppo.data.trajectory import Scored, load_batch
from megatron_dppo.rollout.client import place_batch
from megatron_dppo.weights.layout import Parallel
from tests.distributed.proof import proof
from tests.distributed.rank_pool import RankPool
from tests.distributed.test_gradients import _hub
from tests.distributed.test_layouts import MODELS, MOE_LAYERS, TP2_EP2_PP2, Case, config, with_routes
from tests.distributed.test_trainer import samples
from tests.tiny_models import deepseek_config, read_checkpoint, tiny_model, write_checkpoint

OBJECTIVE = {"name": "pg_is"}  # a coefficient of pi / mu A
FAMILIES = {"qwen3_moe": (MODELS["moe"][0], MOE_LAYERS), "deepseek_v3": (deepseek_config(), (1,))}


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = getattr(request, "param", "qwen3_moe")
    return write_checkpoint(tmp_path_factory.mktemp(name) / "model", tiny_model(FAMILIES[name][0], seed=8))


def forced(path: Path, scored: list[Scored]) -> tuple[float, dict[str, np.ndarray], float]:
    """Loss and gradients of transformers' model whose routers take the recorded experts; and the share of those that
    they take when nobody forces them."""
    model = read_checkpoint(path)
    model.model.embed_tokens.padding_idx = None  # of which transformers keeps no gradient
    wanted: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    agreed: list[torch.Tensor] = []
    force = True

    def take(layer: int, gate: Any, own_forward: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, _, own = answer = own_forward(hidden)
        experts, valid = (torch.from_numpy(x) for x in wanted[layer])
        if not force:
            same = (experts.long()[:, :, None] == own[: len(experts), None, :]).any(-1)
            agreed.append(same[valid])
            return answer
        ids = own.clone()
        ids[: len(experts)] = torch.where(valid[:, None], experts.long(), own[: len(experts)])
        scores = logits.sigmoid() if hasattr(gate, "routed_scaling_factor") else logits.softmax(-1)
        chosen = scores.gather(1, ids)
        return logits, chosen / chosen.sum(-1, keepdim=True) * getattr(gate, "routed_scaling_factor", 1.0), ids

    for number, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "gate") and hasattr(layer.mlp, "experts"):
            layer.mlp.gate.forward = partial(take, number, layer.mlp.gate, layer.mlp.gate.forward)
    loss, count = torch.zeros(()), 0
    for sample in scored:
        t = sample.trajectory
        assert t.routes is not None
        experts, valid, layers = t.routes
        wanted |= {layer: (experts[:, place].copy(), valid.copy()) for place, layer in enumerate(layers.tolist())}
        ids = torch.from_numpy(np.concatenate([t.prompt_ids, t.response_ids])).long()
        log_p = torch.log_softmax(model(ids[None]).logits[0, len(t.prompt_ids) - 1 : -1], -1)
        chosen = log_p.gather(1, ids[len(t.prompt_ids) :, None])[:, 0]
        ratio = (chosen - torch.from_numpy(t.rollout_logprobs.copy())).detach().exp()
        force = False
        with torch.no_grad():
            model(ids[None])
        force = True
        counted = torch.from_numpy(t.loss_mask.copy())
        loss = loss - (ratio * torch.from_numpy(sample.advantage.copy()) * chosen)[counted].sum()
        count += int(counted.sum())
    loss = loss / count
    loss.backward()
    gradients = {hub: g for name, p in model.named_parameters() for hub, g in _hub(name, p.grad.numpy())}
    return float(loss.detach()), gradients, float(torch.cat(agreed).double().mean())


@pytest.mark.parametrize(
    ("checkpoint", "recompute"),
    [("qwen3_moe", "none"), ("qwen3_moe", "full"), ("deepseek_v3", "none")],
    indirect=["checkpoint"],
)
def test_forced_experts_equal_transformers(
    ranks: RankPool, checkpoint: Path, tmp_path: Path, recompute: str, request: pytest.FixtureRequest
) -> None:
    batch, groups = samples(checkpoint)
    model, layers = FAMILIES[request.node.callspec.params["checkpoint"]]
    scored = with_routes(load_batch(batch), layers, model.num_experts_per_tok)
    case = Case(Parallel(), optimizer="sgd", distributed=False, recompute=recompute, replay=True)
    routing = {"mode": "rollout", "measure_every": 1}
    settings = config(case, checkpoint, objective=OBJECTIVE, routing=routing)
    order = place_batch(tmp_path, 0, scored, groups, settings)
    (found,) = ranks.run(proof, Parallel(), checkpoint, settings, order, 1, tmp_path)
    loss, gradients, agreement = forced(checkpoint, scored)
    assert found.metrics[0]["loss"] == pytest.approx(loss, rel=1e-5)
    for name, value in gradients.items():
        error = np.linalg.norm(found.gradients[name] - value) / np.linalg.norm(value)
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"
    assert found.metrics[0]["route_agreement"] < 0.75  # 2 or 4 of 8 experts, by chance 0.25 or 0.5
    assert {f"route_agreement/{layer}" for layer in layers} <= found.metrics[0].keys()
    assert found.metrics[0]["route_agreement_without_replay"] == pytest.approx(agreement, abs=1e-9)
    free = config(replace(case, replay=False), checkpoint, objective=OBJECTIVE)
    (unforced,) = ranks.run(proof, Parallel(), checkpoint, free, order, 1, tmp_path)
    without = unforced.metrics[0]["mismatch"]
    assert found.metrics[0]["mismatch_without_replay"] == pytest.approx(without, rel=1e-6)
    assert found.metrics[0]["mismatch"] != pytest.approx(without, rel=1e-2)


@pytest.mark.parametrize("parallel", [Parallel(), TP2_EP2_PP2], ids=["one rank", "tp2 x ep2 x pp2"])
def test_the_old_policys_own_routes_change_nothing_at_first(
    ranks: RankPool, checkpoint: Path, tmp_path: Path, parallel: Parallel
) -> None:
    """R2: in the first step they are what routers take; and all agree with themselves."""
    batch, groups = samples(checkpoint)
    found = {}
    for mode in ("off", "recompute"):
        settings = config(Case(parallel, distributed=False), checkpoint, routing={"mode": mode})
        order = place_batch(tmp_path, 0, load_batch(batch), groups, settings)
        found[mode] = ranks.run(proof, parallel, checkpoint, settings, order, 1, tmp_path)[0]
    for name, value in found["off"].gradients.items():
        np.testing.assert_array_equal(found["recompute"].gradients[name], value)
    assert found["recompute"].metrics[0]["route_agreement"] == 1
    assert "route_agreement" not in found["off"].metrics[0]
