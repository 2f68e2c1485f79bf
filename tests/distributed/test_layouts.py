"""A run does not depend on how it is split: loss, every gradient and the weights after three steps, against one rank.

The models' routers keep a margin between the experts they take and those they do not, or a rounding error would take
another expert and nothing would be comparable; the margin is asserted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from megatron_dppo.config import Config
from megatron_dppo.data.trajectory import Scored, load_batch, save_batch
from megatron_dppo.rollout.client import place_batch
from megatron_dppo.weights.layout import Parallel
from tests.distributed.proof import Proof, proof
from tests.distributed.rank_pool import RankPool
from tests.distributed.test_trainer import GROUPS, SAMPLES, samples
from tests.tiny_models import hub_tensors, qwen2_config, tiny_config, tiny_model, write_checkpoint

STEPS = 3
MOE_LAYERS = (0, 2, 3)  # of "moe"
LEAST_MARGIN = 1e-4
MODELS = {
    "moe": (tiny_config(num_layers=4, mlp_only_layers=(1,)), 8),
    "tied": (tiny_config(num_layers=4, tie_word_embeddings=True), 13),
    "dense": (qwen2_config(), 5),
}


@dataclass(frozen=True)
class Case:
    """One row of the table. `tokens`: budget of a micro-batch; None: one micro-batch. `uneven`: most samples go to
    the first replica."""

    parallel: Parallel
    model: str = "moe"
    optimizer: str = "adam"
    distributed: bool = True
    packed: bool = True
    recompute: str = "none"
    tokens: int | None = 40
    uneven: bool = False
    replay: bool = False  # random routes
    sequence: Literal["auto", False] = "auto"  # parallelism; experts under tensor parallelism cannot do without


def _sgd(parallel: Parallel, **rest: Any) -> Case:
    return Case(parallel, optimizer="sgd", distributed=False, **rest)


TP2, EP2 = Parallel(tensor=2, ranks=2), Parallel(expert=2, ranks=2)
ETP2 = Parallel(tensor=2, expert_tensor=2, ranks=2)
TP2_EP2 = Parallel(tensor=2, expert=2, ranks=2)
PP2 = Parallel(pipeline=2, ranks=2)
PP2_VPP2 = Parallel(pipeline=2, virtual=2, ranks=2)
CP2, DP2 = Parallel(context=2, ranks=2), Parallel(ranks=2)
TP2_PP2 = Parallel(tensor=2, pipeline=2, ranks=4)
TP2_CP2 = Parallel(tensor=2, context=2, ranks=4)
CP2_VPP2 = Parallel(context=2, pipeline=2, virtual=2, ranks=4)
TP2_EP2_PP2 = Parallel(tensor=2, expert=2, pipeline=2, ranks=4)
DP4_EP2 = Parallel(expert=2, ranks=4)

CASES = {
    "tp2": _sgd(TP2),
    "tp2 of a dense model": Case(TP2, model="dense", sequence=False),
    "tp2 x cp2 of a dense model": Case(TP2_CP2, model="dense", sequence=False, recompute="full"),
    "tp2 padded, recomputed": Case(TP2, packed=False, recompute="full"),
    "ep2": _sgd(EP2, tokens=32, uneven=True),
    "ep2 adam": Case(EP2, recompute="selective"),
    "etp2": _sgd(ETP2, recompute="full"),
    "etp2 padded": Case(ETP2, packed=False),
    "etp2, dense layers not split": _sgd(Parallel(expert_tensor=2, ranks=2)),
    "tp2 x ep2 x etp2": _sgd(Parallel(tensor=2, expert=2, expert_tensor=2, ranks=4)),
    "tp2 x ep2": _sgd(TP2_EP2, recompute="selective"),
    "tp2 x ep2 padded, 8 micro-batches": Case(TP2_EP2, packed=False, tokens=16),
    "tp2 x ep2, recomputed": Case(TP2_EP2, recompute="full"),
    "pp2": _sgd(PP2, recompute="full"),
    "pp2 padded, 8 micro-batches": Case(PP2, packed=False, tokens=16),
    "pp2 tied": Case(PP2, model="tied", tokens=None),
    "pp2 x vpp2": _sgd(PP2_VPP2, recompute="full"),
    "pp2 x vpp2 padded": Case(PP2_VPP2, packed=False),
    "pp2 x vpp2 tied": Case(PP2_VPP2, model="tied", tokens=16),
    "cp2": _sgd(CP2, tokens=None),
    "cp2 adam, 8 micro-batches": Case(CP2, tokens=16, recompute="full"),
    "dp2": _sgd(DP2, uneven=True),
    "dp2 padded": Case(DP2, distributed=False, packed=False),
    "dp2 distributed": Case(DP2, uneven=True, recompute="selective"),
    "dp2 distributed, padded": Case(DP2, packed=False, uneven=True),
    "tp2 x pp2": _sgd(TP2_PP2, packed=False),
    "tp2 x pp2 adam": Case(TP2_PP2, recompute="full", tokens=16),
    "tp2 x cp2": _sgd(TP2_CP2, recompute="full"),
    "tp2 x cp2 adam": Case(TP2_CP2, model="tied"),
    "cp2 x vpp2": _sgd(CP2_VPP2),
    "cp2 x vpp2 adam": Case(CP2_VPP2, recompute="full"),
    "tp2 x ep2 x pp2": _sgd(TP2_EP2_PP2, recompute="selective"),
    "tp2 x ep2 x pp2 padded": Case(TP2_EP2_PP2, packed=False, recompute="full"),
    "dp4 x ep2": Case(DP4_EP2, uneven=True),
    "tp2 replayed": Case(TP2, replay=True),
    "ep2 replayed": _sgd(EP2, replay=True, uneven=True),
    "etp2 replayed": _sgd(ETP2, replay=True, recompute="full"),
    "tp2 x ep2 replayed, recomputed": Case(TP2_EP2, replay=True, recompute="full"),
    "tp2 x ep2 x etp2 replayed": _sgd(Parallel(tensor=2, expert=2, expert_tensor=2, ranks=4), replay=True),
    "pp2 replayed, 8 micro-batches": Case(PP2, replay=True, tokens=16, recompute="full"),
    "pp2 x vpp2 replayed": _sgd(PP2_VPP2, replay=True, recompute="full"),
    "cp2 replayed": Case(CP2, replay=True, recompute="full"),
    "dp2 replayed": Case(DP2, replay=True, uneven=True),
    "dp4 x ep2 replayed": Case(DP4_EP2, replay=True, uneven=True),
    "tp2 x pp2 replayed": Case(TP2_PP2, replay=True, tokens=16),
    "tp2 x cp2 replayed": _sgd(TP2_CP2, replay=True, recompute="selective"),
    "cp2 x vpp2 replayed": Case(CP2_VPP2, replay=True),
    "tp2 x ep2 x pp2 replayed": Case(TP2_EP2_PP2, replay=True, recompute="full"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: write_checkpoint(tmp_path_factory.mktemp(name) / "model", tiny_model(config, seed=seed))
        for name, (config, seed) in MODELS.items()
    }


def config(case: Case, path: Path, **sections: Any) -> Config:
    """Adam's eps is 1e-5: with 1e-8 a gradient of rounding noise moves a weight as far as a real one."""
    return Config.model_validate(
        {
            "run": {"name": "test"},
            "routing": {"mode": "rollout" if case.replay else "off"},
            "model": {"path": str(path), "dtype": "float32"},
            "parallel": asdict(case.parallel)
            | {"distributed_optimizer": case.distributed, "sequence_parallel": case.sequence},
            "data": {"train": "unused", "max_prompt_tokens": 8},
            "reward": {"name": "final_answer"},
            "rollout": {"max_response_tokens": 12, "prompts_per_step": GROUPS, "samples_per_prompt": SAMPLES},
            "training": {
                "steps": STEPS,
                "minibatches": 1,
                "micro_batch_tokens": case.tokens or 1000,
                "packed": case.packed,
                "recompute": case.recompute,
                "optimizer": case.optimizer,
                "lr": 1e-3 if case.optimizer == "adam" else 1e-1,
                "weight_decay": 0.1,
                "no_weight_decay": ["*_proj.bias" if case.model == "dense" else "*.mlp.gate.weight"],
                "eps": 1e-5,
            },
            **sections,
        }
    )


def order_of(case: Case, settings: Config, path: Path, shared: Path) -> dict[str, Any]:
    """The samples as the client divides them or, unevenly, almost all to the first replica."""
    batch, groups = samples(path)
    scored = load_batch(batch)
    if case.replay:
        scored = with_routes(scored)
    if not case.uneven:
        return place_batch(shared, 0, scored, groups, settings)
    files, sizes = [], []
    for replica, micro_batches in enumerate(_uneven(scored, settings.parallel.data)):
        files.append(shared / f"uneven-{replica}.safetensors")
        save_batch(files[-1], [sample for micro_batch in micro_batches for sample in micro_batch])
        sizes.append([[len(micro_batch) for micro_batch in micro_batches]])
    return {"files": [str(file) for file in files], "micro_batch_sizes": sizes}


def with_routes(scored: list[Scored], layers: tuple[int, ...] = MOE_LAYERS, topk: int = 2) -> list[Scored]:
    """The same samples with random experts in the layers that have any; a few rows are not valid."""
    rng = np.random.default_rng(7)
    routed = []
    for sample in scored:
        rows = sample.trajectory.num_tokens - 1
        experts = np.argsort(rng.random((rows, len(layers), 8)), axis=2)[..., :topk].astype(np.uint8)
        trajectory = replace(
            sample.trajectory,
            routed_experts=experts,
            routes_valid=rng.random(rows) < 0.9,
            moe_layers=np.array(layers, np.int32),
        )
        routed.append(replace(sample, trajectory=trajectory))
    return routed


def _uneven(scored: list[Scored], replicas: int) -> list[list[list[Scored]]]:
    """Two micro-batches each; but for the first replica, one of a single sample and an empty one."""
    most = len(scored) - (replicas - 1)
    first = [scored[: most // 3], scored[most // 3 : most]]
    return [first, *([[sample], []] for sample in scored[most:])]


@cache
def on_one_rank(
    ranks: RankPool, path: Path, shared: Path, optimizer: str, replay: bool = False, model: str = "moe"
) -> Proof:
    case = Case(Parallel(), model, optimizer, distributed=False, replay=replay)
    settings = config(case, path)
    (found,) = ranks.run(proof, Parallel(), path, settings, order_of(case, settings, path, shared), STEPS, shared)
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_split_changes_nothing(
    ranks: RankPool, checkpoints: dict[str, Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    case = CASES[name]
    path = checkpoints[case.model]
    expected = on_one_rank(ranks, path, path.parent, case.optimizer, case.replay, case.model)
    assert case.replay or expected.margin >= LEAST_MARGIN
    settings = config(case, path)
    answers = ranks.run(proof, case.parallel, path, settings, order_of(case, settings, path, tmp_path), STEPS, tmp_path)
    if case.tokens == 16:
        assert answers[0].micro_batches >= 8
    if case.tokens is None:
        assert answers[0].micro_batches == 1
    for kind in ("gradients", "weights"):
        reference: dict[str, np.ndarray] = getattr(expected, kind)
        got = {tensor: sum(getattr(answer, kind)[tensor] for answer in answers) for tensor in reference}
        for tensor, value in reference.items():
            assert np.linalg.norm(value) > 0
            error = np.linalg.norm(got[tensor] - value) / np.linalg.norm(value)
            assert error <= 1e-5, f"{kind} of {tensor}: relative error {error:.1e}"
    assert answers[0].metrics[0]["grad_norm"] == pytest.approx(expected.metrics[0]["grad_norm"], rel=1e-5)
    # Of the same weights to 1e-6 (the scores of experts that are forced may be small, and lose digits as they are
    # normalised); later ones are those of weights that differ by as much as they may.
    for step, tolerance in enumerate((3e-6 if case.replay else 1e-6, 1e-4, 1e-4)):
        assert answers[0].metrics[step]["loss"] == pytest.approx(
            expected.metrics[step]["loss"], rel=tolerance, abs=tolerance
        )


def test_the_steps_are_worth_comparing(ranks: RankPool, checkpoints: dict[str, Path]) -> None:
    """Masks on both sides bite, gradients are clipped, weights move."""
    path = checkpoints["moe"]
    for optimizer in ("adam", "sgd"):
        found = on_one_rank(ranks, path, path.parent, optimizer)
        first, last = found.metrics[0], found.metrics[-1]
        assert first["masked_share_positive"] > 0 and first["masked_share_negative"] > 0
        assert abs(first["loss"] - last["loss"]) > 1e-3
        assert first["grad_norm"] > 1.5


def test_only_what_was_named_keeps_from_decaying(ranks: RankPool, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """One step with and without the names: routers' weights differ by the decay, nothing else does."""
    path, case = checkpoints["moe"], Case(Parallel(), optimizer="sgd", distributed=False)
    named = config(case, path)
    training = named.training.model_copy(update={"no_weight_decay": ()})
    order = order_of(case, named, path, tmp_path)
    found = []
    for settings in (named, named.model_copy(update={"training": training})):
        (one,) = ranks.run(proof, Parallel(), path, settings, order, 1, tmp_path)
        found.append(one.weights)
    before = hub_tensors(path)
    for tensor, kept in found[0].items():
        if tensor.endswith(".mlp.gate.weight"):
            decay = training.lr * training.weight_decay * before[tensor].numpy()
            np.testing.assert_allclose(found[1][tensor], kept - decay, rtol=1e-6, atol=1e-7)
            assert np.abs(decay).max() > 1e-4
        else:
            np.testing.assert_array_equal(found[1][tensor], kept)
