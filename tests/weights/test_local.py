"""Copies between parameters, Hugging Face files and a shared image: both ways give the same bits; faults are named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_dppo.architecture import Architecture, load_architecture
from megatron_dppo.weights.export import export_model
from megatron_dppo.weights.hub_files import HubFiles, TensorInfo, check_tensors, read_header
from megatron_dppo.weights.image import create_image, image_tensors
from megatron_dppo.weights.layout import Parallel, Piece, megatron_layout, parameter_shapes
from megatron_dppo.weights.local import load_pieces, write_pieces
from megatron_dppo.weights.sync import Held
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
    image = tmp_path / "image.safetensors"
    create_image(image, image_tensors(arch, torch.float32))
    for rank in range(parallel.ranks):
        pieces = list(megatron_layout(arch, parallel, rank))
        parameters = empty_parameters(pieces)
        load_pieces(parameters, pieces, files)
        assert not any(p.isnan().any() for p in parameters.values())
        write_pieces(parameters, pieces, read_header(image))
    original, written = hub_tensors(checkpoint), load_file(image)
    assert original.keys() == written.keys()
    for name, tensor in original.items():
        assert torch.equal(written[name], tensor), name


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A job of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def held_by_one_rank(checkpoint: Path, dtype: torch.dtype) -> Held:
    return held_of(load_architecture(checkpoint), checkpoint, dtype)


def held_of(arch: Architecture, checkpoint: Path, dtype: torch.dtype) -> Held:
    pieces = list(megatron_layout(arch, Parallel(), 0))
    parameters = empty_parameters(pieces)
    load_pieces(parameters, pieces, HubFiles(checkpoint))
    return Held(arch, 0, 1, parameters, lambda rank: pieces, dtype, torch.device("cpu"))


@pytest.mark.usefixtures("alone")
def test_a_saved_checkpoint_replaces_the_old_one_and_says_its_dtype(checkpoint: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    for dtype in (torch.float32, torch.bfloat16):
        export_model(held_by_one_rank(checkpoint, dtype), checkpoint, saved)
        original, found = hub_tensors(checkpoint), hub_tensors(saved)
        assert original.keys() == found.keys()
        assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in original.items())
        assert f"torch.{json.loads((saved / 'config.json').read_text())['dtype']}" == str(dtype)
        assert (saved / "tokenizer.json").is_file()
        assert sorted(tmp_path.iterdir()) == [saved]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("checkpoint", ["deepseek_v3"], indirect=True)
def test_multi_token_prediction_is_neither_loaded_nor_announced(checkpoint: Path, tmp_path: Path) -> None:
    """Tensors behind the last layer are left alone; what is saved without them says that it has none."""
    extra = {"model.layers.4.eh_proj.weight": torch.ones(64, 128)}
    arch, path = broken(checkpoint, tmp_path, extra)
    assert json.loads((checkpoint / "config.json").read_text())["num_nextn_predict_layers"] == 1
    export_model(held_of(arch, path, torch.float32), checkpoint, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("checkpoint", ["deepseek_v3"], indirect=True)
def test_an_image_keeps_buffers_in_float32_and_aligns_all(checkpoint: Path, tmp_path: Path) -> None:
    arch, image = load_architecture(checkpoint), tmp_path / "image.safetensors"
    create_image(image, image_tensors(arch, torch.bfloat16))
    held = held_by_one_rank(checkpoint, torch.bfloat16)
    write_pieces(held.parameters, held.pieces_of(0), read_header(image))
    written, original = load_file(image), hub_tensors(checkpoint)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(written[bias], original[bias]) and written[bias].dtype == torch.float32
    assert {tensor.dtype for name, tensor in written.items() if name != bias and "correction" not in name} == {
        torch.bfloat16
    }
    assert all(stored.offset % stored.dtype.itemsize == 0 for stored in read_header(image).values())


def test_an_image_without_room_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"for weights of .* bytes: '{tmp_path}/image'"):
        create_image(tmp_path / "image", {"weight": TensorInfo(torch.float32, (1 << 50,))})


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
