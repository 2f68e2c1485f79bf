"""Either kind of checkpoint as what both hold: hub tensors, whose rows are read block by block."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_dppo.architecture import Architecture, load_architecture
from megatron_dppo.files import absent
from megatron_dppo.weights.global_tensors import BLOCK_BYTES, SCHEMES, Block, KeyScheme, global_blocks
from megatron_dppo.weights.hub_files import INDEX_FILE, HubFiles, TensorInfo, typed
from megatron_dppo.weights.mapping import hub_shapes, mtp_tensors
from megatron_dppo.weights.torch_dist import COMPLETE_FILE, TorchDistFiles

CARRIED = "hf"  # in a Megatron checkpoint: the Hugging Face directory without its weights
SCALE = "_scale_inv"  # of `X.weight` in float8, `X.weight_scale_inv`: one factor for each tile
TILE = 128
WEIGHTS = ("*.safetensors", INDEX_FILE, "*.bin", "*.pth", "*.pt", "*.gguf", "original", "onnx")  # not carried over


class Checkpoint(Protocol):
    """Hub tensors by name, in the order in which they are best read."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read_rows(self, name: str, row: int, rows: int, buffer: Tensor) -> Tensor:
        """[rows, ...] in the stored dtype, in the memory of `buffer` (uint8, large enough)."""
        ...

    def close(self) -> None: ...


class MegatronFiles:
    """A torch_dist checkpoint under the hub's names, through the mapping table.

    Raises ValueError, naming the key, where a tensor of the model is missing or has another shape.
    """

    def __init__(self, root: Path, arch: Architecture) -> None:
        self.arch = arch
        self._dist = TorchDistFiles(root)
        self._blocks: dict[str, list[tuple[Block, str]]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        shapes = hub_shapes(arch)
        for block in global_blocks(arch, self._scheme(arch), block_bytes=1 << 62):
            key = self._dist.find(block.keys)
            if key is None:
                raise ValueError(f"{root}: got no {' nor '.join(block.keys)}, expected it for {block.tensor}")
            dtype, shape = self._dist.describe(key)
            self._check_shape(root, key, shape, block)
            self._blocks.setdefault(block.tensor, []).append((block, key))
            self.tensors[block.tensor] = TensorInfo(dtype, shapes[block.tensor])

    def _check_shape(self, root: Path, key: str, shape: tuple[int, ...], block: Block) -> None:
        """The vocabulary's rows may be padded, for the TP that wrote them."""
        rows, expected = shape[0], block.global_shape[0]
        may_pad = "word_embeddings" in key or "output_layer" in key
        if shape[1:] != block.global_shape[1:] or (rows < expected if may_pad else rows != expected):
            raise ValueError(f"{root}: {key}: got shape {shape}, expected {block.global_shape}")

    def _scheme(self, arch: Architecture) -> KeyScheme:
        """The spelling of which most of the last layer is there; what is missing from it is named later."""
        last = range(arch.num_layers - 1, arch.num_layers)

        def found(scheme: KeyScheme) -> int:
            blocks = global_blocks(arch, scheme, block_bytes=1 << 62, layers=last)
            return sum(self._dist.find(block.keys) is not None for block in blocks)

        return max(SCHEMES, key=found)

    def read_rows(self, name: str, row: int, rows: int, buffer: Tensor) -> Tensor:
        """As `Checkpoint.read_rows`."""
        tensor = self.tensors[name]
        out = typed(buffer, tensor.dtype, (rows, *tensor.shape[1:]))
        for block, key in self._blocks[name]:
            low, high = max(row, block.row), min(row + rows, block.row + block.rows)
            if low >= high:
                continue
            lead = len(block.offset) - len(tensor.shape)
            offset = list(block.offset)
            offset[lead] += low - block.row
            part = out[low - row : high - row]
            self._dist.read_box(key, tuple(offset), part.view((1,) * lead + tuple(part.shape)))
        return out

    def close(self) -> None:
        """Closes the files."""
        self._dist.close()


def open_checkpoint(root: Path, config: Path | None = None) -> Checkpoint:
    """Of either kind; `config`: the Hugging Face directory that describes a Megatron checkpoint without its own.

    Raises FileNotFoundError and ValueError as the readers do, and where it is neither kind.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{absent('directory', root)}, expected a checkpoint")
    if (root / COMPLETE_FILE).is_file():
        return MegatronFiles(root, load_architecture(config or carried_config(root)))
    if (root / ".metadata").is_file():
        raise ValueError(f"{root}: got no {COMPLETE_FILE}, expected a complete torch_dist checkpoint")
    return HubFiles(root)


def carried_config(root: Path) -> Path:
    """The Hugging Face directory inside a Megatron checkpoint; raises ValueError where there is none."""
    if not root.is_dir():
        raise FileNotFoundError(f"{absent('directory', root)}, expected a Megatron checkpoint")
    if not (root / COMPLETE_FILE).is_file() and (root / "config.json").is_file():
        raise ValueError(f"{root}: got a Hugging Face directory, expected a Megatron checkpoint")
    if not (root / CARRIED / "config.json").is_file():
        raise ValueError(
            f"{root}: it carries no {CARRIED}/config.json; name the model's Hugging Face directory with --config"
        )
    return root / CARRIED


def check_tensors(checkpoint: HubFiles, arch: Architecture) -> list[str]:
    """That the files hold the model's tensors; returns what is left out (MTP layers, what follows from the rest).

    Raises ValueError naming the first tensor that is missing, misshapen or unknown, and its file.
    """
    expected, stored = hub_shapes(arch), checkpoint.tensors
    for name, shape in expected.items():
        if name not in stored:
            raise ValueError(f"{checkpoint.root}: got no tensor {name}, expected it for {arch.model_type}")
        if stored[name].shape != shape:
            raise ValueError(f"{stored[name].file}: {name}: got shape {stored[name].shape}, expected {shape}")
        if not stored[name].dtype.is_floating_point:
            raise ValueError(f"{stored[name].file}: {name}: got {stored[name].dtype}, expected floating point")
        if stored[name].dtype == torch.float8_e4m3fn:
            tiles = tuple(-(-extent // TILE) for extent in shape)
            if name + SCALE not in stored or stored[name + SCALE].shape != tiles:
                raise ValueError(f"{stored[name].file}: {name} is float8, expected {name + SCALE} of shape {tiles}")
    skipped = [name for name in mtp_tensors(arch, stored) if name not in expected]
    skipped += [name for name in stored if name not in expected and _is_derived(name, arch)]
    known = {*expected, *skipped, *(name + SCALE for name in expected)}
    for name in stored.keys() - known:
        raise ValueError(f"{stored[name].file}: got tensor {name}, which {arch.model_type} does not have")
    return skipped


def _is_derived(name: str, arch: Architecture) -> bool:
    """What some files hold beside the parameters: rope tables, a tied head written out."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and arch.tie_word_embeddings)


def row_blocks(tensor: TensorInfo, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """(first row, rows) of blocks of at most `block_bytes`."""
    most = max(1, block_bytes // max(tensor.row_bytes, 1))
    yield from ((row, min(most, tensor.shape[0] - row)) for row in range(0, tensor.shape[0], most))


def block_buffer(tensors: Mapping[str, TensorInfo]) -> Tensor:
    """uint8, for any block that `row_blocks` gives of these tensors."""
    return torch.empty(max(BLOCK_BYTES, *(info.row_bytes for info in tensors.values())), dtype=torch.uint8)


def read_values(files: HubFiles, name: str, row: int, rows: int, buffer: Tensor) -> Tensor:
    """As `HubFiles.read_rows`; float8 as fp32, each 128 x 128 tile times its factor."""
    stored = files.read_rows(name, row, rows, buffer)
    if stored.dtype != torch.float8_e4m3fn:
        return stored
    scales = files.tensors[name + SCALE]
    first, last = row // TILE, -(-(row + rows) // TILE)
    own = torch.empty((last - first) * scales.row_bytes, dtype=torch.uint8)
    scale = files.read_rows(name + SCALE, first, last - first, own).float()
    by_row = scale.repeat_interleave(TILE, 0)[row - first * TILE :][:rows]
    return stored.float() * by_row.repeat_interleave(TILE, 1)[:, : stored.shape[1]]


def carry_description(source: Path, destination: Path, dtype: torch.dtype | None) -> None:
    """Copies everything of a Hugging Face directory but its weights: config, tokenizer, whatever else is there.

    config.json then says the new dtype (None: the old one), no quantisation, and no layers of multi-token prediction:
    what is written beside it has neither.
    """
    shutil.copytree(source, destination, ignore=shutil.ignore_patterns(*WEIGHTS), dirs_exist_ok=True)
    config = json.loads((destination / "config.json").read_text())
    quantised = config.pop("quantization_config", None) is not None
    if dtype is not None or quantised:
        config.pop("torch_dtype", None)  # the older name
        config["dtype"] = str(dtype or torch.bfloat16).removeprefix("torch.")
    for name in {"num_nextn_predict_layers", "num_mtp_layers"} & config.keys():
        config[name] = 0
    (destination / "config.json").write_text(json.dumps(config, indent=2) + "\n")
