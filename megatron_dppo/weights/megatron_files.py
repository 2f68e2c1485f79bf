"""A Megatron checkpoint read as a Hugging Face directory is: hub tensors, whose rows are read block by block."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from megatron_dppo.architecture import Architecture, load_architecture
from megatron_dppo.files import absent
from megatron_dppo.weights.global_tensors import SCHEMES, Block, KeyScheme, global_blocks
from megatron_dppo.weights.hub_files import HubFiles, TensorInfo, typed
from megatron_dppo.weights.mapping import hub_shapes
from megatron_dppo.weights.torch_dist import COMPLETE_FILE, TorchDistFiles

CARRIED = "hf"  # in a Megatron checkpoint: the Hugging Face directory without its weights


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
