"""Copies between parameters, Hugging Face files and a shared image: both ways give the same bits; faults are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_dppo.architecture import Architecture, load_architecture
from megatron_dppo.weights.checkpoint import check_tensors
from megatron_dppo.weights.hub_files import HubFiles
from megatron_dppo.weights.layout import Parallel, Piece, megatron_layout, parameter_shapes
from megatron_dppo.weights.local import export_pieces, load_pieces
from megatron_dppo.weights.mapping import hub_shapes
from megatron_dppo.weights.sync import SharedImage, image_layout, save_checkpoint
from tests.tiny_models import (
    deepseek_config,
    hub_tensors,
    llama3_config,
    qwen2_config,
    tiny_config,
    tiny_model,
    write_checkpoint,
)

MODELS = {
    "qwen3_moe": tiny_config(num_layers=4, mlp_only_layers=(0,), vocab_size=61),
    "qwen2": qwen2_config(tie_word_embeddings=True, num_hidden_layers=4),
    "llama": llama3_config(num_hidden_layers=4),
    "deepseek_v3": deepseek_config(num_hidden_layers=4),
    "kimi_k2": deepseek_config(q_lora_rank=None, num_hidden_layers=4),
}


@pytest.fixture(scope="module", params=["qwen3_moe"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model(MODELS[request.param], seed=2)
    return write_checkpoint(tmp_path_factory.mktemp("model"), model, request.param)


def empty_parameters(pieces: list[Piece]) -> dict[str, torch.Tensor]:
    return {name: torch.full(shape, torch.nan) for name, shape in parameter_shapes(pieces).items()}


@pytest.mark.parametrize(
    "parallel",
    [
        Parallel(),
        Parallel(tensor=4, expert=2, ranks=4),
        Parallel(tensor=2, expert=2, expert_tensor=2, ranks=4),
        Parallel(tensor=2, expert=2, pipeline=2, ranks=8),
        Parallel(pipeline=2, virtual=2, ranks=2),
        Parallel(tensor=2, expert=2, pipeline=2, virtual=2, ranks=4, chunk_layers=(1, 2, 0, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("checkpoint", MODELS, indirect=True)
def test_all_ranks_together_write_the_checkpoint_they_read(
    checkpoint: Path, parallel: Parallel, tmp_path: Path
) -> None:
    arch, files = load_architecture(checkpoint), HubFiles(checkpoint)
    image = SharedImage(tmp_path / "image", hub_shapes(arch), torch.float32)
    for rank in range(parallel.ranks):
        pieces = list(megatron_layout(arch, parallel, rank))
        parameters = empty_parameters(pieces)
        load_pieces(parameters, pieces, files)
        assert not any(p.isnan().any() for p in parameters.values())
        export_pieces(parameters, pieces, image.tensors)
    original = hub_tensors(checkpoint)
    assert original.keys() == image.tensors.keys()
    for name, tensor in original.items():
        assert torch.equal(image.tensors[name], tensor), name

    save_checkpoint(image.tensors, checkpoint, tmp_path / "saved")
    saved = hub_tensors(tmp_path / "saved")
    assert all(torch.equal(saved[name], tensor) for name, tensor in original.items())
    assert (tmp_path / "saved" / "tokenizer.json").is_file()


def test_a_saved_checkpoint_says_its_dtype(checkpoint: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in hub_tensors(checkpoint).items()}
    save_checkpoint(tensors, checkpoint, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("checkpoint", ["deepseek_v3"], indirect=True)
def test_multi_token_prediction_is_neither_loaded_nor_announced(checkpoint: Path, tmp_path: Path) -> None:
    """Tensors behind the last layer are left alone; what is saved without them says that it has none."""
    extra = {"model.layers.4.eh_proj.weight": torch.ones(64, 128)}
    arch, path = broken(checkpoint, tmp_path, extra)
    assert json.loads((checkpoint / "config.json").read_text())["num_nextn_predict_layers"] == 1
    pieces = list(megatron_layout(arch, Parallel(), 0))
    load_pieces(empty_parameters(pieces), pieces, HubFiles(path))
    save_checkpoint(hub_tensors(checkpoint), checkpoint, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_an_image_keeps_named_tensors_in_float32(tmp_path: Path) -> None:
    image = SharedImage(tmp_path / "image", {"weight": (3,), "bias": (5,)}, torch.bfloat16, {"bias"})
    values = {"weight": torch.full((3,), 1.5), "bias": torch.tensor([1 / 3, -0.1, 1e-8, 0.0, 7.0])}
    pieces = [Piece(name, (0,), tuple(v.shape), name, (0,), 0) for name, v in values.items()]
    export_pieces(values, pieces, image.tensors)
    assert torch.equal(image.tensors["bias"], values["bias"])
    assert image.tensors["weight"].dtype == torch.bfloat16 and image.tensors["weight"].tolist() == [1.5] * 3
    assert [entry[1] for entry in image.layout.tensors] == ["bfloat16", "float32"]


def test_image_layout_aligns_and_does_not_overlap() -> None:
    layout = image_layout({"a": (3, 5), "b": (7,), "c": (64,)}, torch.bfloat16)
    assert layout.tensors == (("a", "bfloat16", (3, 5), 0), ("b", "bfloat16", (7,), 64), ("c", "bfloat16", (64,), 128))
    assert layout.nbytes == 256


def broken(checkpoint: Path, tmp_path: Path, change: dict[str, torch.Tensor | None]) -> tuple[Architecture, Path]:
    tensors = {k: v for k, v in (hub_tensors(checkpoint) | change).items() if v is not None}
    (tmp_path / "broken").mkdir()
    save_file(tensors, tmp_path / "broken" / "model.safetensors")
    return load_architecture(checkpoint), tmp_path / "broken"


def test_float8_loads_as_its_values(checkpoint: Path, tmp_path: Path) -> None:
    """Tiles of 128 x 128 with a factor each: [512 + 256, 64] of the joint QKV are four, one and one of k and v."""
    names = {"q_proj": 128, "k_proj": 64, "v_proj": 64}
    change: dict[str, torch.Tensor | None] = {}
    expected = {}
    for name, rows in names.items():
        full = f"model.layers.1.self_attn.{name}.weight"
        change[full] = (hub_tensors(checkpoint)[full] * 100).to(torch.float8_e4m3fn)
        change[full + "_scale_inv"] = torch.full((-(-rows // 128), 1), 0.01 * rows)
        expected[full] = change[full].float() * (0.01 * rows)  # type: ignore[union-attr]
    arch, path = broken(checkpoint, tmp_path, change)
    files = HubFiles(path)
    assert check_tensors(files, arch) == []
    for rank in range(2):
        pieces = list(megatron_layout(arch, Parallel(tensor=2, expert=2, ranks=2), rank))
        parameters = empty_parameters(pieces)
        load_pieces(parameters, pieces, files)
        for piece in pieces:
            if piece.tensor in expected:
                got = parameters[piece.param][piece.local_index]
                assert torch.equal(got, expected[piece.tensor][piece.hub_index]), piece


def test_a_parameter_without_weights_is_named(checkpoint: Path) -> None:
    pieces = list(megatron_layout(load_architecture(checkpoint), Parallel(), 0))
    parameters = empty_parameters(pieces) | {"decoder.extra": torch.zeros(1)}
    with pytest.raises(ValueError, match="parameters without weights: decoder.extra"):
        load_pieces(parameters, pieces, HubFiles(checkpoint))


def test_a_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no .safetensors files"):
        HubFiles(tmp_path)
