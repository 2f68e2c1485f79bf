"""Megatron's model and the policy head against transformers on the same weights: fp32 log-probs within 1e-4."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megatron_dppo.data.packing import MicroBatch
from megatron_dppo.weights.layout import Parallel, coordinates
from tests.distributed.jobs import context_stats, loading_warnings, policy_stats
from tests.distributed.rank_pool import RankPool
from tests.tiny_models import (
    YARN,
    deepseek_config,
    llama3_config,
    qwen2_config,
    read_checkpoint,
    tiny_config,
    tiny_model,
    write_checkpoint,
)

TOLERANCE = 1e-4
NUM_TOPK = 5

MODELS = {
    "plain": tiny_config(),
    "router_not_normalised": tiny_config(norm_topk_prob=False, top_k=3),
    "tied": tiny_config(tie_word_embeddings=True, vocab_size=97),
    "dense_among_moe": tiny_config(num_layers=4, decoder_sparse_step=2, mlp_only_layers=(3,)),
    "odd_vocabulary_one_kv_head": tiny_config(vocab_size=131, num_kv_heads=1, head_dim=24),
    "padded_vocabulary": tiny_config(vocab_size=260, hidden_size=48),
}
DENSE_MODELS = {
    "qwen2": qwen2_config(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "qwen2_tied": qwen2_config(tie_word_embeddings=True, vocab_size=97),
    "llama3": llama3_config(num_hidden_layers=4),
    "llama_plain_rope": llama3_config(rope_parameters=None, tie_word_embeddings=True),
}
LATENT_MODELS = {
    "deepseek_v3": deepseek_config(),
    "kimi_k2": deepseek_config(
        n_group=1, topk_group=1, n_shared_experts=1, rms_norm_eps=1e-2, rope_parameters=YARN | {"beta_fast": 1.0}
    ),
    "queries_in_one_step": deepseek_config(
        q_lora_rank=None, num_hidden_layers=4, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    ),
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
    "dense_tp4": Parallel(tensor=4, ranks=4),
}
CONTEXT_LAYOUTS = {
    "cp2": Parallel(context=2, ranks=2),
    "cp4": Parallel(context=4, ranks=4),
    "tp2_cp2": Parallel(tensor=2, context=2, ranks=4),
    "cp2_ep4": Parallel(context=2, expert=4, ranks=4),
    "cp2_pp2": Parallel(context=2, pipeline=2, ranks=4),
}
DEEP_LAYOUTS = {  # for models of four layers
    "pp2_virtual2": Parallel(pipeline=2, virtual=2, ranks=2),
    "pp4_uneven": Parallel(pipeline=4, ranks=4, chunk_layers=(0, 2, 2, 0)),
    "tp2_pp2_virtual2_uneven": Parallel(tensor=2, pipeline=2, virtual=2, ranks=4, chunk_layers=(1, 2, 0, 1)),
}
SOME_LAYOUTS = ("single", "tp2_ep2_pp2")  # of every model but the first of its kind, without MDPPO_ALL_PAIRS
PAIRS = [
    *((model, layout) for model in MODELS for layout in LAYOUTS if layout != "dense_tp4"),
    *((model, layout) for model in DENSE_MODELS for layout in ("single", "pp2", "dense_tp4")),
    *((model, layout) for model in LATENT_MODELS for layout in ("single", "etp2", "tp2_ep2_pp2", "tp4")),
    *((model, layout) for model in ("dense_among_moe", "llama3", "queries_in_one_step") for layout in DEEP_LAYOUTS),
]
CASES = [
    (model, layout)
    for model, layout in PAIRS
    if model in ("plain", "qwen2", "deepseek_v3", "queries_in_one_step")
    or layout in (*SOME_LAYOUTS, "dense_tp4", "tp2_pp2_virtual2_uneven")
    or "MDPPO_ALL_PAIRS" in os.environ
]


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = request.param
    model = tiny_model((MODELS | DENSE_MODELS | LATENT_MODELS)[name], seed=7)
    model_type = name if name == "kimi_k2" else None
    return write_checkpoint(tmp_path_factory.mktemp(name), model, model_type)


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
        count=len(rows), topk_ids=topk, padding=np.arange(width) >= np.array(lengths)[:, None],
    )  # fmt: skip


def packed(batch: MicroBatch, lengths: list[int], multiple: int = 1) -> MicroBatch:
    """The same samples one behind the other, each padded to `multiple`, all to one of 16; tokens keep their order."""
    starts = np.cumsum([0, *(-(-length // multiple) * multiple for length in lengths)])
    total = -(-starts[-1] // 16) * 16
    ids = np.zeros((1, total), np.int64)
    for b, length in enumerate(lengths):
        ids[0, starts[b] : starts[b] + length] = batch.input_ids[b, :length]
    s, b = np.divmod(batch.row, len(lengths))
    cu_seqlens = np.array([*starts[:-1], total], np.int32)
    padding = np.ones(ids.shape, np.bool_)
    for start, length in zip(starts, lengths, strict=False):
        padding[0, start : start + length] = False
    return replace(batch, input_ids=ids, padding=padding, row=starts[b] + s, cu_seqlens=cu_seqlens)


def transformers_stats(path: Path, batch: MicroBatch, temperature: float, **changes: Any) -> dict[str, np.ndarray]:
    model = read_checkpoint(path, **changes)
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


@pytest.mark.parametrize(("checkpoint", "layout"), CASES, indirect=["checkpoint"])
def test_statistics_equal_transformers(ranks: RankPool, checkpoint: Path, layout: str) -> None:
    parallel = (LAYOUTS | DEEP_LAYOUTS)[layout]
    vocab_size = _vocab_size(checkpoint)
    lengths = ([9, 16, 5], [12, 3])
    padded = [random_batch(vocab_size, each, seed) for seed, each in enumerate(lengths)]
    both = padded + [packed(batch, each) for batch, each in zip(padded, lengths, strict=True)]
    answers = ranks.run(policy_stats, parallel, checkpoint, both, 0.8)
    last_stage = [answer for answer in answers if answer]
    assert len(last_stage) == parallel.ranks // parallel.pipeline
    for index, batch in enumerate(padded * 2):
        expected = transformers_stats(checkpoint, batch, 0.8)
        for answer in last_stage:
            for name, values in expected.items():
                np.testing.assert_allclose(answer[index][name], values, rtol=0, atol=TOLERANCE, err_msg=name)
                # every TP rank must see the very same bits, or the ranks would mask differently
                np.testing.assert_array_equal(answer[index][name], last_stage[0][index][name])


@pytest.mark.parametrize(
    ("checkpoint", "layout"),
    [
        *(("plain", layout) for layout in CONTEXT_LAYOUTS),
        *((model, "tp2_cp2") for model in ("tied", "odd_vocabulary_one_kv_head", *LATENT_MODELS)),
        *((model, "cp4") for model in ("qwen2", "llama3", *LATENT_MODELS)),
    ],
    indirect=["checkpoint"],
)
def test_statistics_over_context_ranks(ranks: RankPool, checkpoint: Path, layout: str) -> None:
    """Each context rank has its part of the tokens; together they have each once."""
    parallel, lengths = CONTEXT_LAYOUTS[layout], [9, 16, 5]
    batch = random_batch(_vocab_size(checkpoint), lengths, seed=1)
    whole = packed(batch, lengths, parallel.sequence_multiple)
    expected = transformers_stats(checkpoint, batch, 0.8)
    answers = ranks.run(context_stats, parallel, checkpoint, [whole], 0.8)
    seen = np.zeros(len(batch.row), int)
    for rank, answer in enumerate(answers):
        at = coordinates(parallel, rank)
        if at.pipeline == parallel.pipeline - 1:
            mine = of_context_rank(whole, parallel, at.context)
            for name, values in expected.items():
                np.testing.assert_allclose(answer[0][name], values[mine], rtol=0, atol=TOLERANCE, err_msg=name)
            seen[mine] += at.tensor == 0
    assert (seen == parallel.data).all()


def of_context_rank(batch: MicroBatch, parallel: Parallel, rank: int) -> np.ndarray:
    """Which tokens are those of a context rank, told from positions alone: i64[n]."""
    starts, stops = batch.cu_seqlens[:-1], batch.cu_seqlens[1:]
    sequence = np.searchsorted(stops, batch.row, "right")
    chunk = (batch.row - starts[sequence]) // ((stops - starts)[sequence] // (2 * parallel.context))
    return np.flatnonzero((chunk == rank) | (chunk == 2 * parallel.context - 1 - rank))


@pytest.mark.parametrize(
    ("checkpoint", "changes"),
    [
        ("llama3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("deepseek_v3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("deepseek_v3", {"rope_parameters": YARN | {"mscale_all_dim": 1.0}}),
        ("deepseek_v3", {"topk_group": 4}),
        ("kimi_k2", {"rms_norm_eps": 1e-6}),
    ],
    indirect=["checkpoint"],
)
def test_the_features_under_test_are_visible(checkpoint: Path, changes: dict[str, Any]) -> None:
    """Without one of them the reference itself moves by a hundred tolerances at the tested lengths."""
    batch = random_batch(_vocab_size(checkpoint), [9, 16, 5], seed=1)
    with_it, without = (transformers_stats(checkpoint, batch, 0.8, **c) for c in ({}, changes))
    assert np.abs(with_it["logprob"] - without["logprob"]).max() > 100 * TOLERANCE


def test_multi_token_prediction_is_skipped_and_said_once(ranks: RankPool, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", tiny_model(deepseek_config(), seed=7))
    extra = {f"model.layers.2.{name}.weight": torch.ones(3) for name in ("enorm", "hnorm", "mlp.experts.0.up_proj")}
    save_file(extra, path / "mtp.safetensors")
    answers = ranks.run(loading_warnings, LAYOUTS["tp2_ep2"], path)
    assert answers == [
        [f"{path}: 3 tensors are left out, model.layers.2.enorm.weight first: neither trained nor exported"],
        [],
    ]


def _vocab_size(path: Path) -> int:
    import json

    return json.loads((path / "config.json").read_text())["vocab_size"]
