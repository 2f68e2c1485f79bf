"""The trainer's step with every kind of loss, split against whole: weights, metrics; and what a NaN does.

Every layout with one loss, tensor by tensor: test_layouts.py.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dppo.config import Config
from megatron_dppo.data.trajectory import Scored, Trajectory, load_batch, save_batch
from megatron_dppo.weights.layout import Parallel
from tests.distributed.jobs import poisoned_step, rl_steps
from tests.distributed.rank_pool import RankPool
from tests.tiny_models import (
    deepseek_config,
    hub_tensors,
    qwen2_config,
    read_checkpoint,
    tiny_config,
    tiny_model,
    write_checkpoint,
)

VOCAB, NUM_TOPK = 64, 4
GROUPS, SAMPLES = 4, 3
LAYOUTS = {
    "tp2_ep2": Parallel(tensor=2, expert=2, ranks=2),
    "dp2": Parallel(ranks=2),
    "dp2_ep2": Parallel(expert=2, ranks=2),
    "pp2": Parallel(pipeline=2, ranks=2),
    "tp2_ep2_pp2": Parallel(tensor=2, expert=2, pipeline=2, ranks=4),
    "cp2": Parallel(context=2, ranks=2),
    "tp2_cp2_ep2": Parallel(tensor=2, context=2, expert=2, ranks=4),
    "cp2_dp2_ep2": Parallel(context=2, expert=2, ranks=4),
    "pp2_virtual2_dp2": Parallel(pipeline=2, virtual=2, ranks=4),
    "tp2_ep2_pp2_virtual2_uneven": Parallel(
        tensor=2, expert=2, pipeline=2, virtual=2, ranks=4, chunk_layers=(1, 2, 0, 1)
    ),
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "binary_tv": {"objective": {"name": "dppo_binary_tv"}},
    "topk_kl_decoupled": {"objective": {"name": "dppo_topk_kl_decoupled", "top_k": NUM_TOPK, "delta": 1e-3}},
    "minirl_by_sequence": {
        "objective": {"name": "minirl"},
        "loss": {"normaliser": "sequences", "entropy_coefficient": 0.01},
    },
    "reference": {"objective": {"name": "dppo_binary_kl"}, "loss": {"kl": {"coefficient": 0.5, "estimator": "k2"}}},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), tiny_model(tiny_config(num_layers=4), seed=5))


def config(parallel: Parallel, **sections: Any) -> Config:
    """Adam with eps 1e-5: with 1e-8 a gradient of rounding noise moves a weight as far as a real one."""
    return Config.model_validate(
        {
            "run": {"name": "test"},
            "model": {"path": "unused", "dtype": "float32"},
            "parallel": asdict(parallel),
            "data": {"train": "unused", "max_prompt_tokens": 8},
            "reward": {"name": "final_answer"},
            "rollout": {"max_response_tokens": 8, "prompts_per_step": GROUPS, "samples_per_prompt": SAMPLES},
            "training": {"steps": 2, "minibatches": 2, "micro_batch_tokens": 40, "lr": 1e-3, "eps": 1e-5},
            **sections,
        }
    )


@cache
def samples(path: Path) -> tuple[Path, np.ndarray]:
    """A batch file and its groups: responses of 3 to 9 tokens sampled from mu, which is transformers' policy with noise
    on its logits, so that masks on both sides bite."""
    model = read_checkpoint(path)
    generator = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    scored = [
        _sampled(model, rng.integers(0, VOCAB, rng.integers(2, 7)), int(rng.integers(3, 10)), i, generator)
        for i in range(GROUPS * SAMPLES)
    ]
    batch = path.parent / "batch.safetensors"
    save_batch(batch, scored)
    return batch, np.repeat(np.arange(GROUPS), SAMPLES)


@torch.no_grad()
def _sampled(model: Any, prompt: np.ndarray, length: int, i: int, generator: torch.Generator) -> Scored:
    ids, log_mus = prompt.tolist(), []
    for _ in range(length):
        logits = model(torch.tensor([ids])).logits[0, -1]
        log_mus.append(torch.log_softmax(logits + torch.randn(VOCAB, generator=generator), -1))
        ids.append(int(torch.multinomial(log_mus[-1].exp(), 1, generator=generator)))
    log_mu, response = torch.stack(log_mus), np.array(ids[len(prompt) :], np.int32)
    topk = log_mu.topk(NUM_TOPK)
    mask = np.ones(length, np.bool_)
    mask[1] = i % 4 != 0  # some tokens are the environment's
    trajectory = Trajectory(
        sample_id=str(i), group_id=str(i // SAMPLES), engine="test", finish_reason="stop", temperature=1.0,
        prompt_ids=prompt.astype(np.int32), response_ids=response, loss_mask=mask,
        rollout_logprobs=log_mu[torch.arange(length), torch.from_numpy(response).long()].numpy(),
        topk_ids=topk.indices.numpy().astype(np.int32), topk_logprobs=topk.values.numpy(),
        policy_versions=np.zeros(length, np.int32),
    )  # fmt: skip
    advantage = torch.randn(length, generator=generator).numpy()
    return Scored(trajectory, {"reward": 0.0}, advantage)


def _longer(scored: Scored, times: int = 4) -> Scored:
    """A response, so many times."""
    old = scored.trajectory
    per_token = ("response_ids", "loss_mask", "rollout_logprobs", "topk_ids", "topk_logprobs", "policy_versions")
    longer = {name: np.concatenate([getattr(old, name)] * times) for name in per_token}
    return replace(scored, trajectory=replace(old, **longer), advantage=np.tile(scored.advantage, times))


@cache
def on_one_rank(ranks: RankPool, path: Path, objective: str, shared: Path) -> tuple[dict, list[dict]]:
    parallel = Parallel()
    return ranks.run(rl_steps, parallel, path, config(parallel, **OBJECTIVES[objective]), *samples(path), shared)[0]


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not isinstance(value, str)}


@pytest.mark.parametrize(
    ("objective", "layout"),
    [
        ("binary_tv", "tp2_ep2_pp2_virtual2_uneven"),
        *(
            ("topk_kl_decoupled", layout)
            for layout in ("tp2_ep2", "dp2_ep2", "tp2_cp2_ep2", "tp2_ep2_pp2_virtual2_uneven")
        ),
        *(("minirl_by_sequence", layout) for layout in ("dp2_ep2", "pp2_virtual2_dp2", "cp2_dp2_ep2")),
        *(("reference", layout) for layout in ("tp2_ep2", "dp2", "tp2_cp2_ep2", "pp2_virtual2_dp2")),
    ],
)
def test_two_steps_equal_one_rank(
    ranks: RankPool, checkpoint: Path, tmp_path: Path, layout: str, objective: str
) -> None:
    check_two_steps(ranks, checkpoint, objective, LAYOUTS[layout], tmp_path)


@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        (deepseek_config(), Parallel(tensor=2, expert=2, pipeline=2, ranks=4)),
        (deepseek_config(q_lora_rank=None, n_group=1, topk_group=1), Parallel(tensor=2, expert_tensor=2, ranks=4)),
        (qwen2_config(), Parallel(tensor=4, ranks=4)),
    ],
    ids=["deepseek_v3", "queries_in_one_step", "qwen2"],
)
def test_two_steps_of_other_architectures(
    ranks: RankPool, model: Any, parallel: Parallel, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("other") / "model", tiny_model(model, seed=5))
    check_two_steps(ranks, checkpoint, "binary_tv", parallel, tmp_path)


def check_two_steps(ranks: RankPool, checkpoint: Path, objective: str, parallel: Parallel, tmp_path: Path) -> None:
    expected, expected_metrics = on_one_rank(ranks, checkpoint, objective, checkpoint.parent)
    settings = config(parallel, **OBJECTIVES[objective])
    answers = ranks.run(rl_steps, parallel, checkpoint, settings, *samples(checkpoint), tmp_path)
    weights, metrics = answers[0]
    for name, tensor in expected.items():
        error = np.linalg.norm(weights[name] - tensor) / np.linalg.norm(tensor)
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"
    for step, values in enumerate(expected_metrics):
        assert numbers(metrics[step]) == pytest.approx(numbers(values), rel=1e-4, abs=1e-6)
    # the masks did something, on both sides, or this compares nothing
    assert expected_metrics[0]["masked_share_positive"] > 0 and expected_metrics[0]["masked_share_negative"] > 0
    assert expected_metrics[0]["loss"] != expected_metrics[1]["loss"]


@pytest.mark.parametrize("layout", ["tp2_ep2", "pp2", "dp2_ep2"])
def test_padding_changes_nothing(ranks: RankPool, checkpoint: Path, tmp_path: Path, layout: str) -> None:
    expected, _ = on_one_rank(ranks, checkpoint, "binary_tv", checkpoint.parent)
    training = {"steps": 2, "minibatches": 2, "micro_batch_tokens": 40, "lr": 1e-3, "eps": 1e-5, "packed": False}
    settings = config(LAYOUTS[layout], **OBJECTIVES["binary_tv"], training=training)
    weights, _ = ranks.run(rl_steps, LAYOUTS[layout], checkpoint, settings, *samples(checkpoint), tmp_path)[0]
    for name, tensor in expected.items():
        error = np.linalg.norm(weights[name] - tensor) / np.linalg.norm(tensor)
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("layout", ["tp2_ep2", "pp2"])
@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
def test_chunks_and_skipped_tokens_change_nothing(
    ranks: RankPool, checkpoint: Path, tmp_path: Path, layout: str, skip: bool
) -> None:
    """A few tokens' logits at a time, and without those of zero advantage: the same weights; other means, named."""
    batch, groups = samples(checkpoint)
    scored = [replace(s, advantage=s.advantage * (i % 5 != 0)) for i, s in enumerate(load_batch(batch))]
    batch = tmp_path / "some_without_advantage.safetensors"
    save_batch(batch, scored)
    one = config(Parallel(), **OBJECTIVES["binary_tv"])
    expected, expected_metrics = ranks.run(rl_steps, Parallel(), checkpoint, one, batch, groups, tmp_path)[0]
    few = {"path": "chunk", "memory_mib": 0.001}
    settings = config(LAYOUTS[layout], **OBJECTIVES["binary_tv"], head=few, loss={"skip_zero_advantage": skip})
    weights, metrics = ranks.run(rl_steps, LAYOUTS[layout], checkpoint, settings, batch, groups, tmp_path)[0]
    for name, tensor in expected.items():
        error = np.linalg.norm(weights[name] - tensor) / np.linalg.norm(tensor)
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"
    if not skip:
        assert numbers(metrics[0]) == pytest.approx(numbers(expected_metrics[0]), rel=1e-4, abs=1e-6)
        return
    assert metrics[0]["means_of"] == "tokens with an advantage"
    assert metrics[0]["tokens"] + metrics[0]["tokens_skipped"] == expected_metrics[0]["tokens"]
    assert metrics[0]["tokens_skipped"] > 0 and metrics[0]["entropy"] != expected_metrics[0]["entropy"]
    assert metrics[0]["loss"] == pytest.approx(expected_metrics[0]["loss"], rel=1e-4)


@pytest.mark.parametrize("layout", ["tp2_ep2", "tp2_ep2_pp2"])
def test_bfloat16_is_near_fp32(ranks: RankPool, checkpoint: Path, tmp_path: Path, layout: str) -> None:
    """bf16 parameters under Megatron's mixed-precision optimizer: as near to the fp32 run as bf16 allows."""
    objective = OBJECTIVES["binary_tv"]
    _, fp32 = on_one_rank(ranks, checkpoint, "binary_tv", checkpoint.parent)
    settings = config(LAYOUTS[layout], **objective, model={"path": "unused", "dtype": "bfloat16"})
    _, metrics = ranks.run(rl_steps, LAYOUTS[layout], checkpoint, settings, *samples(checkpoint), tmp_path)[0]
    assert metrics[0]["entropy"] == pytest.approx(fp32[0]["entropy"], rel=0.05)
    assert metrics[0]["mean_abs_pi_minus_mu"] == pytest.approx(fp32[0]["mean_abs_pi_minus_mu"], rel=0.1)
    assert metrics[0]["grad_norm"] == pytest.approx(fp32[0]["grad_norm"], rel=0.2)


@pytest.mark.skipif(find_spec("transformer_engine") is None, reason="Megatron offloads with Transformer Engine alone")
def test_an_offloaded_optimizer_moves_the_weights_alike(ranks: RankPool, checkpoint: Path, tmp_path: Path) -> None:
    """Two steps of Adam on the CPU are those on the GPU, to a rounding to bf16."""
    found = {}
    for offload in (False, True):
        settings = config(Parallel(), **OBJECTIVES["binary_tv"], model={"path": "unused", "dtype": "bfloat16"})
        training = settings.training.model_copy(update={"offload_optimizer": offload})
        settings = settings.model_copy(update={"training": training})
        found[offload], _ = ranks.run(rl_steps, Parallel(), checkpoint, settings, *samples(checkpoint), tmp_path)[0]
    before = hub_tensors(checkpoint)
    for name, weight in found[False].items():
        np.testing.assert_allclose(found[True][name], weight, rtol=2**-7, atol=1e-6, err_msg=name)
    assert any(not np.array_equal(found[True][name], before[name].bfloat16().float()) for name in before)


def test_a_routers_bias_keeps_its_bits(ranks: RankPool, tmp_path: Path) -> None:
    """Two steps in bf16: everything moves but the buffer, which stays in fp32 and goes to the engines as it was."""
    path = write_checkpoint(tmp_path / "model", tiny_model(deepseek_config(), seed=5))
    settings = config(LAYOUTS["tp2_ep2"], **OBJECTIVES["binary_tv"], model={"path": "unused", "dtype": "bfloat16"})
    weights, _ = ranks.run(rl_steps, LAYOUTS["tp2_ep2"], path, settings, *samples(path), tmp_path)[0]
    before = hub_tensors(path)
    assert before.keys() == weights.keys()
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    np.testing.assert_array_equal(weights[bias], before[bias].numpy())
    for name in before.keys() - {bias}:
        assert not np.array_equal(weights[name], before[name].bfloat16().float()), f"{name} has not moved"


def test_the_reference_stays(ranks: RankPool, checkpoint: Path, tmp_path: Path) -> None:
    """It is the policy at first, and the harder it pulls the less the policy leaves it."""
    training = {"steps": 2, "minibatches": 4, "micro_batch_tokens": 40, "lr": 1e-5, "eps": 1e-5}
    moved = []
    for coefficient in (1e-6, 100.0):
        loss = {"kl": {"coefficient": coefficient}}
        settings = config(Parallel(), objective={"name": "dppo_binary_tv"}, loss=loss, training=training)
        _, metrics = ranks.run(rl_steps, Parallel(), checkpoint, settings, *samples(checkpoint), tmp_path)[0]
        moved.append(metrics[0]["kl_reference"])
    assert 0 < moved[1] < 0.5 * moved[0]


@pytest.mark.parametrize(
    ("layout", "training"),
    [
        ("tp2_ep2", {}),
        ("pp2", {"recompute": "full"}),
        ("cp2", {}),
        ("dp2_ep2", {"packed": False}),
        # the experts are on the second stage, which has to divide the padding itself
        ("tp2_ep2_pp2", {"packed": False}),
    ],
    ids=str,
)
def test_experts_move_by_the_tokens_they_get(
    ranks: RankPool, tmp_path: Path, layout: str, training: dict[str, Any]
) -> None:
    """The same bits, however tokens are padded or split; by the rate up or down, or not at all, in each step.

    Not packed, long samples beside short ones: a micro-batch has so much padding that it would move experts otherwise.
    """
    path = write_checkpoint(tmp_path / "model", tiny_model(deepseek_config(), seed=5))
    batch, groups = samples(path)
    budget = 40
    if not training.get("packed", True):
        scored, budget = load_batch(batch), 400
        batch = tmp_path / "some_long.safetensors"
        save_batch(batch, [_longer(s) if i % SAMPLES == 0 else s for i, s in enumerate(scored)])
    of_training = {"steps": 2, "minibatches": 1, "micro_batch_tokens": budget, "lr": 1e-5, "expert_bias_rate": 2**-10}
    found = {}
    for name, parallel, changes in (("one", Parallel(), {}), (layout, LAYOUTS[layout], training)):
        settings = config(parallel, **OBJECTIVES["binary_tv"], training=of_training | changes)
        weights, _ = ranks.run(rl_steps, parallel, path, settings, batch, groups, tmp_path)[0]
        found[name] = {tensor: value for tensor, value in weights.items() if tensor.endswith("correction_bias")}
    before = hub_tensors(path)
    assert found["one"]
    for tensor, value in found["one"].items():
        np.testing.assert_array_equal(found[layout][tensor], value)
        moves = np.round((value - before[tensor].numpy()) * 2**10, 4)
        assert {-2, 2} <= set(moves) <= {-2, -1, 0, 1, 2}


def test_the_mismatch_is_of_the_first_minibatch_only(ranks: RankPool, checkpoint: Path, tmp_path: Path) -> None:
    """With one minibatch it is the whole step's; with two it is not, since the weights have moved in between."""
    _, metrics = on_one_rank(ranks, checkpoint, "binary_tv", checkpoint.parent)
    assert metrics[0]["mismatch"] != metrics[0]["mean_abs_pi_minus_mu"]
    training = {"steps": 2, "minibatches": 1, "micro_batch_tokens": 40, "lr": 1e-3}
    one = config(Parallel(), **OBJECTIVES["binary_tv"], training=training)
    _, metrics = ranks.run(rl_steps, Parallel(), checkpoint, one, *samples(checkpoint), tmp_path)[0]
    assert metrics[0]["mismatch"] == metrics[0]["mean_abs_pi_minus_mu"]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("loss", "got inf or NaN in the loss of micro-batch 0 (rank 1)"),
        ("router", "got inf or NaN in the gradient of decoder.layers.1.mlp.router.weight (rank 0)"),
        (  # gradients of experts are in buffers of their own
            "experts.local_experts.3.linear_fc2",
            "got inf or NaN in the gradient of decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight (rank 0)",
        ),
    ],
)
def test_a_nan_stops_before_any_weight_moves(ranks: RankPool, checkpoint: Path, where: str, message: str) -> None:
    answers = ranks.run(poisoned_step, Parallel(tensor=2, expert=2, ranks=2), checkpoint, where)
    assert answers == [message, message]


def test_a_nan_in_the_weights_names_step_minibatch_and_tensors(ranks: RankPool, tmp_path: Path) -> None:
    model = tiny_model(tiny_config(), seed=5)
    path = write_checkpoint(tmp_path / "model", model)
    batch, groups = samples(path)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    write_checkpoint(path, model)
    parallel = Parallel(pipeline=2, ranks=2)
    # the last stage's loss, and what flows back from it through both stages
    with pytest.raises(RuntimeError, match=r"step 0, minibatch 0: got inf or NaN in .*\(rank 0\) and \d+ more"):
        ranks.run(rl_steps, parallel, path, config(parallel, **OBJECTIVES["binary_tv"]), batch, groups, tmp_path)
