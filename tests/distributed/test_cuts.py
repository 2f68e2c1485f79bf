"""Two steps of the cuts of recipes whose layout needs no more than four ranks, against one rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_dppo.architecture import load_architecture
from megatron_dppo.config import Config
from megatron_dppo.config.loading import load_config
from megatron_dppo.cut import write_cut
from megatron_dppo.data.trajectory import Scored, Trajectory, save_batch
from megatron_dppo.weights.layout import Parallel
from tests.distributed.jobs import rl_steps
from tests.distributed.rank_pool import RankPool
from tests.tiny_models import hub_tensors

CONFIGS = Path(__file__).parents[2] / "configs"
SMALLER = (
    "parallel.expert=2",
    "parallel.tensor=2",
    "parallel.ranks=2",
)  # of 8 x 4: the rest of the recipe on two ranks


def sample(rng: np.random.Generator, number: int, vocab_size: int) -> Scored:
    """Random tokens of a policy that finds all alike, as a random model nearly does."""
    prompt, length = rng.integers(0, vocab_size, 5), int(rng.integers(3, 10))
    trajectory = Trajectory(
        sample_id=str(number), group_id=str(number // 2), engine="test", finish_reason="stop", temperature=1.0,
        prompt_ids=prompt.astype(np.int32), response_ids=rng.integers(0, vocab_size, length).astype(np.int32),
        loss_mask=np.ones(length, np.bool_), rollout_logprobs=np.full(length, -np.log(vocab_size), np.float32),
        topk_ids=np.empty((length, 0), np.int32), topk_logprobs=np.empty((length, 0), np.float32),
        policy_versions=np.zeros(length, np.int32),
    )  # fmt: skip
    return Scored(trajectory, {"reward": 0.0}, np.full(length, 1.0 - 2 * (number % 2), np.float32))


@pytest.mark.parametrize(
    ("recipe", "overrides", "ranks_needed"),
    [
        ("scaling/dense_base", (), 2),
        ("sanity_deepseek_1p5b", (), 1),
        ("scaling/moe_base", SMALLER, 2),
        ("kimi_k2_1t", (*SMALLER, "parallel.pipeline=2", "parallel.ranks=4", "parallel.chunk_layers=[31,30]"), 4),
    ],
)
def test_a_cut_trains_as_one_rank_does(
    ranks: RankPool, tmp_path: Path, recipe: str, overrides: tuple[str, ...], ranks_needed: int
) -> None:
    path = CONFIGS / f"{recipe}.yaml"
    shape = CONFIGS / load_config(path).model.path
    exact = ("model.dtype=float32", "training.lr=1e-3", "training.eps=1e-5")
    cut = load_config(write_cut(load_config(path, [f"model.path={shape}", *exact, *overrides]), tmp_path))
    assert cut.parallel.ranks == ranks_needed
    size, rng = cut.rollout.prompts_per_step, np.random.default_rng(0)
    vocab_size = load_architecture(cut.model.path).vocab_size
    batch = tmp_path / "batch.safetensors"
    save_batch(batch, [sample(rng, i, vocab_size) for i in range(2 * size)])
    groups = np.repeat(np.arange(size), 2)

    def trained(config: Config, parallel: Parallel, place: str) -> dict[str, np.ndarray]:
        (tmp_path / place).mkdir()
        return ranks.run(rl_steps, parallel, cut.model.path, config, batch, groups, tmp_path / place)[0][0]

    alone = cut.model_copy(update={"parallel": type(cut.parallel)()})
    expected = trained(alone, Parallel(), "alone")
    weights = trained(cut, cut.parallel.layout, "split")
    before = hub_tensors(cut.model.path)
    assert weights.keys() == expected.keys() == before.keys()
    assert any(np.abs(expected[name] - before[name].float().numpy()).max() > 5e-4 for name in before)  # it trained
    for name, tensor in expected.items():
        error = np.linalg.norm(weights[name] - tensor) / max(np.linalg.norm(tensor), 1e-12)
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"
