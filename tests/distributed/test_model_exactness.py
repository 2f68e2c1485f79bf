"""Megatron's model and the policy head against transformers on the same weights: fp32 log-probs within 1e-4."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_dppo.data.packing import MicroBatch
from megatron_dppo.weights.layout import Parallel
from tests.distributed.jobs import policy_stats
from tests.distributed.rank_pool import RankPool
from tests.tiny_models import tiny_config, tiny_model, write_checkpoint

TOLERANCE = 1e-4
NUM_TOPK = 5

MODELS = {
    "plain": {},
    "router_not_normalised": {"norm_topk_prob": False, "top_k": 3},
    "tied": {"tie_word_embeddings": True, "vocab_size": 97},
    "dense_among_moe": {"num_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": (3,)},
    "odd_vocabulary_one_kv_head": {"vocab_size": 131, "num_kv_heads": 1, "head_dim": 24},
    "padded_vocabulary": {"vocab_size": 260, "hidden_size": 48},
}
LAYOUTS = {
    "single": Parallel(),
    "tp2": Parallel(tensor=2, ranks=2),
    "ep2": Parallel(expert=2, ranks=2),
    "tp2_ep2": Parallel(tensor=2, expert=2, ranks=2),
    "etp2": Parallel(tensor=2, expert_tensor=2, ranks=2),
    "pp2": Parallel(pipeline=2, ranks=2),
    "tp2_ep2_pp2": Parallel(tensor=2, expert=2, pipeline=2, ranks=4),
    "tp4": Parallel(tensor=4, expert=4, ranks=4),
}


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model(tiny_config(**MODELS[request.param]), seed=7)
    return write_checkpoint(tmp_path_factory.mktemp(request.param), model)


def random_batch(vocab_size: int, lengths: list[int], seed: int) -> MicroBatch:
    """Sequences of random ids; every token but the first is counted, with random Top-K ids, some absent."""
    rng = np.random.default_rng(seed)
    width = -(-max(lengths) // 4) * 4
    ids = np.zeros((len(lengths), width), np.int64)
    rows, targets = [], []
    for b, length in enumerate(lengths):
        ids[b, :length] = rng.integers(0, vocab_size, length)
        rows += [s * len(lengths) + b for s in range(length - 1)]
        targets += ids[b, 1:length].tolist()
    topk = np.stack([rng.permutation(vocab_size)[:NUM_TOPK] for _ in rows])
    topk[::7, -1] = -1
    ones = np.ones(len(rows), np.float32)
    return MicroBatch(
        input_ids=ids, row=np.array(rows), target=np.array(targets), advantage=ones, mu_logprob=ones, weight=ones,
        count=len(rows), topk_ids=topk,
    )  # fmt: skip


def transformers_stats(path: Path, batch: MicroBatch, temperature: float) -> dict[str, np.ndarray]:
    from transformers import Qwen3MoeForCausalLM

    model = Qwen3MoeForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(batch.input_ids)).logits / temperature
    log_p = torch.log_softmax(logits.double().transpose(0, 1).flatten(0, 1)[torch.from_numpy(batch.row)], -1)
    target = torch.from_numpy(batch.target)[:, None]
    topk_ids = torch.from_numpy(batch.topk_ids)
    columns = torch.cat([topk_ids.clamp(min=0), target], 1)
    topk = log_p.gather(1, columns)
    topk[:, :-1][topk_ids < 0] = -torch.inf
    return {
        "logprob": log_p.gather(1, target)[:, 0].numpy(),
        "entropy": -(log_p.exp() * log_p).sum(-1).numpy(),
        "topk_logprob": topk.numpy(),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_equal_transformers(ranks: RankPool, checkpoint: Path, layout: str) -> None:
    parallel = LAYOUTS[layout]
    vocab_size = _vocab_size(checkpoint)
    batches = [random_batch(vocab_size, [9, 16, 5], seed=1), random_batch(vocab_size, [12, 3], seed=2)]
    answers = ranks.run(policy_stats, parallel, checkpoint, batches, 0.8)
    last_stage = [answer for answer in answers if answer]
    assert len(last_stage) == parallel.ranks // parallel.pipeline
    for index, batch in enumerate(batches):
        expected = transformers_stats(checkpoint, batch, 0.8)
        for answer in last_stage:
            for name, values in expected.items():
                np.testing.assert_allclose(answer[index][name], values, rtol=0, atol=TOLERANCE, err_msg=name)
                # every TP rank must see the very same bits, or the ranks would mask differently
                np.testing.assert_array_equal(answer[index][name], last_stage[0][index][name])


def _vocab_size(path: Path) -> int:
    import json

    return json.loads((path / "config.json").read_text())["vocab_size"]
