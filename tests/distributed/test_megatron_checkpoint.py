"""Checkpoints that we write load by Megatron's own dist_checkpointing at any layout, and what it saves we read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dppo.architecture import load_architecture
from megatron_dppo.backend.model import Model, load_model
from megatron_dppo.backend.parallel import Rank
from megatron_dppo.weights.convert import hf_to_megatron, megatron_to_hf
from megatron_dppo.weights.global_tensors import SCHEMES, KeyScheme, content_metadata, default_scheme
from megatron_dppo.weights.layout import Parallel
from megatron_dppo.weights.megatron_files import open_checkpoint
from megatron_dppo.weights.verify import differences
from tests.distributed.jobs import numpy
from tests.distributed.rank_pool import RankPool
from tests.tiny_models import deepseek_config, llama3_config, qwen2_config, tiny_config, tiny_model, write_checkpoint

MODELS = {  # four layers where stages are virtual
    "moe": tiny_config(vocab_size=97, num_layers=4),
    "dense_among_moe": tiny_config(num_layers=4, decoder_sparse_step=2, mlp_only_layers=(3,)),
    "tied_one_kv_head": tiny_config(tie_word_embeddings=True, num_kv_heads=1, vocab_size=64, num_layers=4),
    "qwen2": qwen2_config(num_hidden_layers=4),
    "llama3": llama3_config(num_hidden_layers=4),
    "deepseek_v3": deepseek_config(num_hidden_layers=4),
}
LAYOUTS = {
    "single": Parallel(),
    "tp2_ep2": Parallel(tensor=2, expert=2, ranks=2),
    "etp2": Parallel(tensor=2, expert_tensor=2, ranks=2),
    "pp2": Parallel(pipeline=2, ranks=2),
    "tp2_ep2_pp2": Parallel(tensor=2, expert=2, pipeline=2, ranks=4),
    "pp2_virtual2": Parallel(pipeline=2, virtual=2, ranks=2),
    "tp2_ep2_pp2_uneven": Parallel(tensor=2, expert=2, pipeline=2, ranks=4, chunk_layers=(3, 1)),
    "tp2_etp2_pp2_virtual2_uneven": Parallel(
        tensor=2, expert_tensor=2, pipeline=2, virtual=2, ranks=4, chunk_layers=(1, 2, 0, 1)
    ),
}
DENSE_LAYOUTS = {
    "tp2": Parallel(tensor=2, ranks=2),
    "tp2_pp2_virtual2_uneven": Parallel(tensor=2, pipeline=2, virtual=2, ranks=4, chunk_layers=(1, 2, 0, 1)),
}
# Of every model but the first of its kind, without MDPPO_ALL_PAIRS: what Megatron reads does not depend on the layout.
SOME_LAYOUTS = ("single", "tp2_ep2_pp2", "tp2_etp2_pp2_virtual2_uneven", "tp2_pp2_virtual2_uneven")
PAIRS = [
    *((model, layout) for model in ("moe", "dense_among_moe", "tied_one_kv_head", "deepseek_v3") for layout in LAYOUTS),
    *((model, layout) for model in ("qwen2", "llama3") for layout in ("single", "pp2_virtual2", *DENSE_LAYOUTS)),
]
CASES = [
    (model, layout)
    for model, layout in PAIRS
    if model in ("moe", "qwen2") or layout in SOME_LAYOUTS or "MDPPO_ALL_PAIRS" in os.environ
]
SAVED = ("tp2_ep2_pp2", "tp2_etp2_pp2_virtual2_uneven", "tp2_pp2_virtual2_uneven")


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "hf"
    return write_checkpoint(path, tiny_model(MODELS[request.param], seed=11))


def schemes(checkpoint: Path, layout: str) -> list[KeyScheme]:
    """All at two layouts, else what is written by default; Megatron stacks nothing where dense and MoE layers mix."""
    arch = load_architecture(checkpoint)
    if layout not in ("single", "tp2_ep2_pp2"):
        return [default_scheme(arch)]
    return [scheme for scheme in SCHEMES if scheme != "stacked" or len(set(arch.moe_layers)) == 1]


def sharded_state(model: Model, metadata: Any) -> dict[str, Any]:
    return {f"model{v}": chunk.sharded_state_dict(metadata=metadata) for v, chunk in enumerate(model.chunks)}


def load_by_megatron(rank: Rank, hf: Path, megatron: Path) -> None:
    """Asserts that every parameter loaded from the torch_dist checkpoint has the bits loaded from the hub's files."""
    from megatron.core import dist_checkpointing

    model = load_model(hf, rank, torch.float32, sequence_parallel=rank.parallel.tensor > 1)
    expected = {name: numpy(p) for name, p in model.parameters.items()}
    for p in model.parameters.values():
        p.data.fill_(torch.nan)
    common = dist_checkpointing.load_common_state_dict(str(megatron))
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    state = dist_checkpointing.load(sharded_state(model, metadata), str(megatron))
    for v, chunk in enumerate(model.chunks):
        chunk.load_state_dict(state.get(f"model{v}", {}), strict=True)  # a chunk without layers has none
    vocabulary = model.arch.vocab_size
    for name, p in model.parameters.items():
        rows = slice(None)
        if "embedding." in name or "output_layer." in name:  # padding rows are anything
            rows = slice(0, max(0, min(len(p), vocabulary - rank.at.tensor * len(p))))
        np.testing.assert_array_equal(numpy(p)[rows], expected[name][rows], err_msg=name)


def save_by_megatron(rank: Rank, hf: Path, megatron: Path, scheme: KeyScheme) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    model = load_model(hf, rank, torch.float32, sequence_parallel=rank.parallel.tensor > 1)
    metadata = content_metadata(scheme)
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    dist_checkpointing.save(
        sharded_state(model, metadata), str(megatron), sharded_strategy=strategy, content_metadata=metadata
    )


@pytest.mark.parametrize(("checkpoint", "layout"), CASES, indirect=["checkpoint"])
def test_megatron_loads_what_we_write(ranks: RankPool, checkpoint: Path, tmp_path: Path, layout: str) -> None:
    for scheme in schemes(checkpoint, layout):
        hf_to_megatron(checkpoint, tmp_path / scheme, scheme=scheme, say=lambda _: None)
        ranks.run(load_by_megatron, (LAYOUTS | DENSE_LAYOUTS)[layout], checkpoint, tmp_path / scheme)


@pytest.mark.parametrize(("checkpoint", "layout"), [c for c in CASES if c[1] in SAVED], indirect=["checkpoint"])
def test_we_read_what_megatron_saves(ranks: RankPool, checkpoint: Path, tmp_path: Path, layout: str) -> None:
    for scheme in schemes(checkpoint, layout):
        megatron, back = tmp_path / scheme, tmp_path / f"{scheme}_hf"
        megatron.mkdir()
        ranks.run(save_by_megatron, (LAYOUTS | DENSE_LAYOUTS)[layout], checkpoint, megatron, scheme)
        ranks.run(load_by_megatron, LAYOUTS["pp2"], checkpoint, megatron)  # at another layout
        megatron_to_hf(megatron, back, config=checkpoint, say=lambda _: None)
        assert list(differences(open_checkpoint(checkpoint), open_checkpoint(back))) == []
        assert list(differences(open_checkpoint(checkpoint), open_checkpoint(megatron, checkpoint))) == []
