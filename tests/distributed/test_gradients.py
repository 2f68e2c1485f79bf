"""Gradients of the policy loss at every layout against transformers' autograd, tensor by tensor in hub names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_dppo.data.packing import MicroBatch
from megatron_dppo.head.policy_head import HeadMemory
from megatron_dppo.weights.layout import Parallel
from tests.distributed.jobs import policy_gradients
from tests.distributed.rank_pool import RankPool
from tests.distributed.test_model_exactness import packed, random_batch
from tests.tiny_models import deepseek_config, qwen2_config, read_checkpoint, tiny_config, tiny_model, write_checkpoint

TOLERANCE = 1e-5  # relative, in the Frobenius norm of each tensor
MODELS = {
    "moe_and_dense": tiny_config(num_layers=4, mlp_only_layers=(1,), vocab_size=97),
    "tied": tiny_config(tie_word_embeddings=True, vocab_size=64, num_layers=4),
    "one_kv_head": tiny_config(num_kv_heads=1),
}
FAMILIES = {"qwen2": qwen2_config(), "deepseek_v3": deepseek_config()}
LAYOUTS = {
    "single": Parallel(),
    "tp2_ep2": Parallel(tensor=2, expert=2, ranks=2),
    "etp2": Parallel(tensor=2, expert_tensor=2, ranks=2),
    "dp2": Parallel(ranks=2),
    "dp2_ep2": Parallel(expert=2, ranks=2),
    "pp2": Parallel(pipeline=2, ranks=2),
    "tp2_ep2_pp2": Parallel(tensor=2, expert=2, pipeline=2, ranks=4),
    "pp2_dp2": Parallel(pipeline=2, ranks=4),
    "tp2_dp2_ep2": Parallel(tensor=2, expert=2, ranks=4),
    "dense_tp4": Parallel(tensor=4, ranks=4),
}
CONTEXT_LAYOUTS = {
    "cp2": Parallel(context=2, ranks=2),
    "tp2_cp2_ep2": Parallel(tensor=2, context=2, expert=2, ranks=4),
    "cp2_pp2": Parallel(context=2, pipeline=2, ranks=4),
    "cp2_dp2_ep2": Parallel(context=2, expert=2, ranks=4),
}
DEEP_LAYOUTS = {  # for models of four layers
    "pp2_virtual2": Parallel(pipeline=2, virtual=2, ranks=2),
    "pp2_virtual2_dp2": Parallel(pipeline=2, virtual=2, ranks=4),
    "tp2_ep2_pp2_virtual2_uneven": Parallel(
        tensor=2, expert=2, pipeline=2, virtual=2, ranks=4, chunk_layers=(1, 2, 0, 1)
    ),
    "pp2_uneven": Parallel(pipeline=2, ranks=2, chunk_layers=(4, 0)),
}
CASES = [  # what test_layouts does not vary: the model
    *((model, layout) for model in MODELS for layout in ("single", "tp2_ep2_pp2", "tp2_dp2_ep2", "tp2_cp2_ep2")),
    *(("one_kv_head", layout) for layout in ("tp2_ep2", "etp2", "cp2_pp2")),
    *(("qwen2", layout) for layout in ("single", "pp2", "dense_tp4")),
    *(("deepseek_v3", layout) for layout in ("single", "etp2", "tp2_ep2_pp2", "tp2_dp2_ep2", "tp2_cp2_ep2")),
    *((model, layout) for model in ("moe_and_dense", "tied") for layout in DEEP_LAYOUTS),
]


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model((MODELS | FAMILIES)[request.param], seed=3)
    return write_checkpoint(tmp_path_factory.mktemp(request.param), model)


LENGTHS = ([7, 12], [5], [9, 3, 4], [10])


def micro_batches() -> list[MicroBatch]:
    """Two micro-batches for each of two replicas, of unequal size, with advantages of both signs."""
    batches = [random_batch(64, lengths, seed) for seed, lengths in enumerate(LENGTHS)]
    rng = np.random.default_rng(0)
    return [replace(b, advantage=rng.normal(size=b.num_tokens).astype(np.float32)) for b in batches]


def transformers_gradients(path: Path, batches: list[MicroBatch]) -> dict[str, np.ndarray]:
    """d/dw of -sum(A log pi + 0.1 H) / tokens by plain autograd on transformers' model."""
    model = read_checkpoint(path)
    loss = torch.zeros(())
    for batch in batches:
        logits = model(torch.from_numpy(batch.input_ids)).logits.transpose(0, 1).flatten(0, 1)
        log_p = torch.log_softmax(logits[torch.from_numpy(batch.row)], -1)
        chosen = log_p.gather(1, torch.from_numpy(batch.target)[:, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        loss = loss - (torch.from_numpy(batch.advantage) * chosen + 0.1 * entropy).sum()
    (loss / sum(batch.num_tokens for batch in batches)).backward()
    return {hub: gradient for name, p in model.named_parameters() for hub, gradient in _hub(name, p.grad.numpy())}


def _hub(name: str, gradient: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """transformers 5 fuses experts in memory ([E, 2F, H] gate over up, and [E, H, F]); the hub's files do not."""
    if name.endswith("experts.gate_up_proj"):
        base, width = name.removesuffix("gate_up_proj"), gradient.shape[1] // 2
        return [
            (f"{base}{expert}.{part}_proj.weight", gradient[expert, rows])
            for expert in range(len(gradient))
            for part, rows in (("gate", slice(0, width)), ("up", slice(width, None)))
        ]
    if name.endswith("experts.down_proj"):
        base = name.removesuffix("down_proj")
        return [(f"{base}{expert}.down_proj.weight", g) for expert, g in enumerate(gradient)]
    return [(name, gradient)]


@pytest.mark.parametrize(("checkpoint", "layout"), CASES, indirect=["checkpoint"])
def test_gradients_equal_transformers(ranks: RankPool, checkpoint: Path, layout: str) -> None:
    check(ranks, checkpoint, (LAYOUTS | DEEP_LAYOUTS | CONTEXT_LAYOUTS)[layout])


@pytest.mark.parametrize(("path", "overlap"), [("store", True), ("chunk", False), ("chunk", True)])
@pytest.mark.parametrize(
    ("checkpoint", "layout"),
    [
        *(("tied", layout) for layout in ("single", "pp2", "pp2_dp2", "pp2_virtual2_dp2")),
        *(("moe_and_dense", layout) for layout in ("dp2", "tp2_dp2_ep2", "pp2_virtual2_dp2")),
    ],
    indirect=["checkpoint"],
)
def test_every_path_of_the_head(ranks: RankPool, checkpoint: Path, layout: str, path: str, overlap: bool) -> None:
    """Into main_grad, with the embedding's own gradient where it is tied, before a reduction that may run already."""
    memory = HeadMemory("store") if path == "store" else HeadMemory("chunk", 4 * 3 * 97)  # a few tokens
    check(ranks, checkpoint, (LAYOUTS | DEEP_LAYOUTS)[layout], memory, overlap)


def check(
    ranks: RankPool,
    checkpoint: Path,
    parallel: Parallel,
    memory: HeadMemory = HeadMemory(),
    overlap: bool = False,
) -> None:
    batches, multiple = micro_batches(), parallel.sequence_multiple
    used = [packed(batch, lengths, multiple) for batch, lengths in zip(batches, LENGTHS, strict=True)]
    if parallel.context == 1:
        used[0] = batches[0]  # the first is computed padded
    shares = [used] if parallel.data == 1 else [used[:2], used[2:]]
    answers = ranks.run(policy_gradients, parallel, checkpoint, shares, memory, overlap)
    expected = transformers_gradients(checkpoint, batches)
    assert expected.keys() == answers[0].keys()
    for name, gradient in expected.items():
        got = sum(answer[name] for answer in answers)
        error = np.linalg.norm(got - gradient) / max(np.linalg.norm(gradient), 1e-12)
        assert error <= TOLERANCE, f"{name}: relative error {error:.2e}"
